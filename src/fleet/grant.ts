import type { BreakerSettings } from "../core/breaker.ts";
import type { Ticket } from "../core/lanes.ts";
import type { Verdict } from "../core/outcome.ts";
import { FIRST_PACE, SHORT_TOKENS } from "../core/pace.ts";
import { remember } from "../core/prefix.ts";
import type { SchedulerEvent } from "../core/scheduler.ts";
import type { Target } from "../core/snapshot.ts";
import type { Connection } from "../engines/engine.ts";
import { beginOf, cachedIn, learn, uncached } from "./expect.ts";
import type { Live } from "./live.ts";
import type { Permit } from "./permit.ts";

/** How long a backend that said that it is busy gets nothing more, unless a request of it ends before. */
const HOLD_MS = 1000;
/** An answer longer than expected is charged in steps of so many tokens. */
const CHARGED_TOKENS = 16;

/** What a grant reaches of the fleet. */
export interface Rim {
  now: () => number;
  random: () => number;
  /** As it is now. */
  breaker: () => BreakerSettings;
  /** Tells the backend's scheduler. */
  run: (event: SchedulerEvent) => void;
  /** Room came free. */
  offer: () => void;
}

/** A slot that the scheduler of `live` has granted: what was begun there, and how it ends. */
export class Grant {
  readonly #live: Live;
  readonly #ticket: Ticket;
  readonly #rim: Rim;
  readonly #passage;
  readonly #grantedAt: number;
  /** 1 while it is to show whether the backend works again. */
  #trials: number;

  constructor(live: Live, ticket: Ticket, rim: Rim) {
    const { guard } = live;
    const breaker = rim.breaker();
    this.#live = live;
    this.#ticket = ticket;
    this.#rim = rim;
    this.#grantedAt = rim.now();
    const isSound = live.health !== "unhealthy";
    const isOpen = guard.admits(ticket.model, breaker, this.#grantedAt) !== "any";
    this.#passage = guard.begin(ticket.model);
    this.#trials = isSound && !isOpen ? 0 : 1;
    live.trials += this.#trials;
  }

  #tried() {
    this.#live.trials -= this.#trials;
    this.#trials = 0;
  }

  /** Gives the slot back, once. @param tokens as in the scheduler's `complete`. */
  end(verdict: Verdict, tokens: number | null): void {
    const { now, random, breaker, run, offer } = this.#rim;
    const { model } = this.#ticket;
    this.#tried();
    const opened = this.#live.guard.settle(this.#passage, verdict, breaker(), now(), random());
    // Before the slot comes free: nobody is to follow there.
    if (opened.backend) run({ type: "recall" });
    else if (opened.model) run({ type: "recall", model });
    const serviceMs = verdict.outcome === "success" ? now() - this.#grantedAt : null;
    const heldUntil = verdict.outcome === "saturated" ? now() + HOLD_MS : null;
    run({ type: "complete", ticket: this.#ticket, serviceMs, tokens, heldUntil });
    offer();
  }

  permit(target: Target, connection: Connection): Permit {
    const live = this.#live;
    const ticket = this.#ticket;
    const { now, breaker, run, offer } = this.#rim;
    const cached = cachedIn(live, ticket, this.#grantedAt);
    const beginMs = beginOf(live, ticket, cached, FIRST_PACE, this.#grantedAt);
    const ahead = live.computing;
    const tokens = uncached(ticket, cached);
    let computing = ticket.prompt?.shows === true && tokens >= SHORT_TOKENS ? tokens : 0;
    live.computing += computing;
    const computed = () => {
      live.computing -= computing;
      computing = 0;
    };
    let held = true;
    let charged = ticket.tokens;
    return {
      target,
      connection,
      engine: live.engine,
      beginMs,
      release: (verdict, answered) => {
        if (!held) return;
        held = false;
        computed();
        if (verdict.outcome === "failure") live.failedAt = now();
        if (answered !== undefined) {
          live.observed.add(answered);
          learn(live, ticket, answered, cached, ahead, now());
        }
        // Without an attempt it was given back unused.
        this.end(verdict, answered === undefined ? 0 : answered.tokens);
      },
      proved: () => {
        const wasTrial = this.#trials > 0;
        computed();
        this.#tried();
        live.guard.prove(this.#passage, breaker());
        if (ticket.prompt !== undefined) remember(live.prefixes, ticket.prompt.chain);
        // Open to all again: who waits elsewhere can start here.
        if (wasTrial) offer();
      },
      stalled() {
        live.stalledAt = now();
      },
      flowed(at, tokens) {
        live.lastChunkAt = at;
        if (tokens < charged + CHARGED_TOKENS) return;
        charged = tokens;
        run({ type: "chunk", ticket, tokens });
      },
    };
  }
}
