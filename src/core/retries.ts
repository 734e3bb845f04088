/** How far back requests count, milliseconds, and in how many steps. */
const WINDOW_MS = 10_000;
const STEPS = 10;
const STEP_MS = WINDOW_MS / STEPS;
/** Of the requests of the window so many may wait for a second attempt, and never fewer than these. */
const SHARE = 0.2;
const FEWEST = 10;

/**
 * Which retries may wait for a slot. A retry into a free slot costs nobody anything; one that waits
 * takes the place of somebody else's first attempt, and an outage would double the load with them.
 *
 * After Finagle's RetryBudget (twitter/finagle, RetryBudget.scala). Times are those of one clock.
 */
export class RetryBudget {
  readonly #requests = new Float64Array(STEPS);
  readonly #waits = new Float64Array(STEPS);
  #step = 0;

  /** A request has come. */
  count(now: number): void {
    this.#turn(now);
    this.#add(this.#requests);
  }

  /** May one more retry wait? It is counted if so. */
  take(now: number): boolean {
    this.#turn(now);
    if (sum(this.#waits) >= Math.max(FEWEST, SHARE * sum(this.#requests))) return false;
    this.#add(this.#waits);
    return true;
  }

  #add(counts: Float64Array) {
    const at = this.#step % STEPS;
    counts[at] = (counts[at] ?? 0) + 1;
  }

  /** Forgets the steps that have left the window. */
  #turn(now: number) {
    const step = Math.floor(now / STEP_MS);
    for (let next = Math.max(this.#step, step - STEPS) + 1; next <= step; next++) {
      this.#requests[next % STEPS] = 0;
      this.#waits[next % STEPS] = 0;
    }
    this.#step = Math.max(this.#step, step);
  }
}

function sum(counts: Float64Array): number {
  return counts.reduce((total, each) => total + each, 0);
}
