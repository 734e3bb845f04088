import type { Cap } from "../core/lanes.ts";
import type { Credit } from "../core/select.ts";
import type { Model } from "../core/snapshot.ts";

/** What one model uses over all backends. */
interface Share {
  running: Cap;
  places: Cap;
  /** What selection among equals remembers. */
  credit: Credit;
}

/** The shares of all models. */
export class Shares {
  readonly #shares = new Map<string, Share>();
  #maxLength: number;

  /** @param maxLength waiting requests per model. */
  constructor(maxLength: number) {
    this.#maxLength = maxLength;
  }

  /** From now on; a longer queue is not shortened, it takes nobody in. */
  set maxLength(maxLength: number) {
    this.#maxLength = maxLength;
    for (const { places } of this.#shares.values()) places.limit = maxLength;
  }

  of(model: string): Share {
    let share = this.#shares.get(model);
    if (share === undefined) {
      share = {
        running: { limit: Infinity, used: 0 },
        places: { limit: this.#maxLength, used: 0 },
        credit: new Map(),
      };
      this.#shares.set(model, share);
    }
    return share;
  }

  /** Takes how many requests of each may run at once. */
  limit(models: readonly Model[]): void {
    for (const { name, concurrency } of models) {
      this.of(name).running.limit = concurrency ?? Infinity;
    }
  }

  /** Forgets the others, but for those that still run or wait somewhere: they lower these very counters. */
  keep(models: readonly Model[]): void {
    const names = new Set(models.map(({ name }) => name));
    for (const [name, { running, places }] of this.#shares) {
      if (!names.has(name) && running.used + places.used === 0) this.#shares.delete(name);
    }
  }
}
