/** Generations at once, and who waits for a place, first come first served. */
interface Queue {
  running: number;
  waiting: (() => void)[];
}

export class Slots {
  #queues = new Map<string, Queue>();

  waiting(): number {
    return [...this.#queues.values()].reduce((sum, { waiting }) => sum + waiting.length, 0);
  }

  /** Runs the work with a slot; not at all for a client that has left by then. */
  async use(
    name: string,
    slots: number,
    left: AbortSignal,
    work: () => Promise<void>,
  ): Promise<void> {
    const queue = this.#queues.get(name) ?? { running: 0, waiting: [] };
    this.#queues.set(name, queue);
    while (queue.running >= slots && !left.aborted) await untilFree(queue, left);
    if (left.aborted) return;
    queue.running += 1;
    try {
      await work();
    } finally {
      queue.running -= 1;
      queue.waiting.shift()?.();
    }
  }
}

function untilFree({ waiting }: Queue, left: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const settle = (): void => {
      left.removeEventListener("abort", settle);
      const place = waiting.indexOf(settle);
      if (place >= 0) waiting.splice(place, 1);
      resolve();
    };
    waiting.push(settle);
    left.addEventListener("abort", settle);
  });
}
