import {
  admits,
  begin,
  createBreaker,
  prove,
  retryNow,
  settle,
  type Breaker,
  type BreakerSettings,
  type Pass,
} from "../core/breaker.ts";
import type { Verdict } from "../core/outcome.ts";

/** One request that was let through: what its verdict is about. */
export interface Passage {
  model: string;
  ofBackend: Pass;
  ofModel: Pass;
}

/** The breakers of one backend: one for all of it, and one for each model there. */
export class Guard {
  readonly backend: Breaker = createBreaker();
  readonly models = new Map<string, Breaker>();

  /** May a request for this model begin? A trial where either breaker wants one. */
  admits(model: string, settings: BreakerSettings, now: number): "any" | "trial" | null {
    const ofBackend = admits(this.backend, settings, now);
    const known = this.models.get(model);
    const ofModel = known === undefined ? "any" : admits(known, settings, now);
    if (ofBackend === null || ofModel === null) return null;
    return ofBackend === "trial" ? ofBackend : ofModel;
  }

  /** Lets a request through, also one that should not be: see `begin`. */
  begin(model: string): Passage {
    const ofModel = begin(this.#modelBreaker(model));
    return { model, ofBackend: begin(this.backend), ofModel };
  }

  /** Its answer has begun. */
  prove({ model, ofBackend, ofModel }: Passage, settings: BreakerSettings): void {
    prove(this.backend, ofBackend, settings);
    prove(this.#modelBreaker(model), ofModel, settings);
  }

  /** @returns which of the two has opened by it. */
  settle(
    { model, ofBackend, ofModel }: Passage,
    verdict: Verdict,
    settings: BreakerSettings,
    now: number,
    random: number,
  ): { backend: boolean; model: boolean } {
    const breaker = this.#modelBreaker(model);
    const wasOpen = [this.backend.state, breaker.state];
    settle(this.backend, ofBackend, verdict.backend, settings, now, random);
    settle(breaker, ofModel, verdict.model, settings, now, random);
    return {
      backend: this.backend.state === "open" && wasOpen[0] !== "open",
      model: breaker.state === "open" && wasOpen[1] !== "open",
    };
  }

  /** A probe has succeeded after having failed. */
  retryNow(now: number): void {
    retryNow(this.backend, now);
    for (const breaker of this.models.values()) retryNow(breaker, now);
  }

  /** When this model is let through again, where it is not now; null when it is. */
  untilAt(model: string): number | null {
    const open = [this.backend, this.models.get(model)].filter((each) => each?.state === "open");
    return open.length === 0 ? null : Math.max(...open.map((each) => each?.untilAt ?? 0));
  }

  #modelBreaker(model: string): Breaker {
    let breaker = this.models.get(model);
    if (breaker === undefined) {
      breaker = createBreaker();
      this.models.set(model, breaker);
    }
    return breaker;
  }
}
