/** Virtual time: milliseconds since the beginning of a run. It passes as fast as things can be worked off. */
export interface Clock {
  now(): number;
  /**
   * Does something then, at the earliest now; what is due at the same time is done in the order in
   * which it was asked for.
   *
   * @returns takes it back.
   */
  at(time: number, act: () => void): () => void;
  /** Lets time pass until nothing is due, until then, or until it is over. */
  run(until: number, isOver?: () => boolean): void;
}

interface Due {
  at: number;
  order: number;
  act: (() => void) | null;
}

function isBefore(one: Due, other: Due): boolean {
  return one.at < other.at || (one.at === other.at && one.order < other.order);
}

/** The earliest is at 0, and what lies at 2n + 1 and 2n + 2 is later than what lies at n. */
function push(heap: Due[], due: Due): void {
  let place = heap.length;
  while (place > 0) {
    const above = (place - 1) >> 1;
    const parent = heap[above] as Due;
    if (isBefore(parent, due)) break;
    heap[place] = parent;
    place = above;
  }
  heap[place] = due;
}

function pop(heap: Due[]): Due | undefined {
  const first = heap[0];
  const last = heap.pop();
  if (last === undefined || heap.length === 0) return first;
  let place = 0;
  for (;;) {
    let below = 2 * place + 1;
    const other = heap[below + 1];
    if (other !== undefined && isBefore(other, heap[below] as Due)) below++;
    const child = heap[below];
    if (child === undefined || isBefore(last, child)) break;
    heap[place] = child;
    place = below;
  }
  heap[place] = last;
  return first;
}

export function createClock(): Clock {
  const heap: Due[] = [];
  let now = 0;
  let asked = 0;
  return {
    now: () => now,
    at(time, act) {
      const due: Due = { at: Math.max(time, now), order: asked++, act };
      push(heap, due);
      return () => {
        due.act = null;
      };
    },
    run(until, isOver = () => false) {
      while (heap.length > 0 && (heap[0] as Due).at <= until && !isOver()) {
        const due = pop(heap) as Due;
        // Taken back: time does not pass for it.
        if (due.act === null) continue;
        now = due.at;
        due.act();
      }
    },
  };
}
