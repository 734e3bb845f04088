import type { BreakerSettings, BreakerState } from "../core/breaker.ts";
import { judge, type Verdict } from "../core/outcome.ts";
import {
  hasRoom,
  nextOf,
  positionOf,
  step,
  waitFor,
  type Cap,
  type SchedulerEvent,
  type Ticket,
} from "../core/scheduler.ts";
import type { Candidate, Credit } from "../core/select.ts";
import {
  backendOf,
  type Backend,
  type Model,
  type Snapshot,
  type Target,
} from "../core/snapshot.ts";
import type { Connection, Engine } from "../engines/engine.ts";
import {
  breakerReport,
  breakersOf,
  createLive,
  isBetter,
  keyOf,
  usageOf,
  type BreakerReport,
  type Live,
  type Usage,
} from "./live.ts";
import type { Answered } from "./observed.ts";

/** How long a backend that said that it is busy gets nothing more, unless a request of it ends before. */
const HOLD_MS = 1000;

/** The right to one slot, to be given back once. */
export interface Permit {
  readonly target: Target;
  readonly connection: Connection;
  readonly engine: Engine;
  /** Idempotent. @param answered what the attempt showed of the backend, where it was made. */
  release(verdict: Verdict, answered?: Answered): void;
  /** The answer has begun, and is one: whatever was in doubt here, works. */
  proved(): void;
  /** Nothing came in a stream for as long as it may take. */
  stalled(): void;
  /** Bytes of an answer arrived at `at`: the backend works, whatever a probe says. */
  flowed(at: number): void;
}

export type Admission =
  | { type: "granted"; permit: Permit }
  | { type: "reselect" }
  | { type: "refused"; cause: "full" | "expired"; retryAfterMs: number };

/** A request's place in one backend's queue. */
export interface Place {
  /** Requests of the model ahead of it; -1 when it does not wait. */
  position(): number;
  /** Gives up the place, and the permit where one was granted meanwhile. Idempotent. */
  leave(): void;
}

/** What one model uses over all backends. */
interface Share {
  running: Cap;
  places: Cap;
  credit: Credit;
}

interface Asking {
  target: Target;
  decide: (admission: Admission) => void;
}

export interface FleetOptions {
  /** Monotonic milliseconds. */
  now: () => number;
  /** Requests to engines at once in this process; Infinity where the runtime sets no limit. */
  upstreamLimit: number;
  /** Waiting requests per model. */
  maxLength: number;
  breaker: BreakerSettings;
  /** From 0 up to 1. */
  random: () => number;
  /** The key of a backend; keys are no part of the snapshot. */
  apiKeyOf: (backend: string) => string | null;
}

/**
 * The live backends. Runs the effects of their schedulers: grants become permits, timers become
 * timers. A backend lives as long as its id, url and kind stay; what runs on one that has gone
 * keeps its counters until it ends.
 */
export class Fleet {
  readonly #options: FleetOptions;
  readonly #lives = new Map<string, Live>();
  /** Out of the configuration, with requests still running: they come back as they are. */
  readonly #leaving = new Set<Live>();
  readonly #shares = new Map<string, Share>();
  readonly #asking = new Map<Ticket, Asking>();
  readonly #upstream: Cap;
  #maxLength: number;
  /** Read at every decision: a reload may replace it. */
  breaker: BreakerSettings;

  constructor(options: FleetOptions) {
    this.#options = options;
    this.#maxLength = options.maxLength;
    this.breaker = options.breaker;
    this.#upstream = { limit: options.upstreamLimit, used: 0 };
  }

  /** Waiting requests per model from now on; a longer queue is not shortened, it takes nobody in. */
  set maxLength(maxLength: number) {
    this.#maxLength = maxLength;
    for (const { places } of this.#shares.values()) places.limit = maxLength;
  }

  /** Takes a new snapshot: new backends come alive, those that went send their queues elsewhere. */
  apply(snapshot: Snapshot): void {
    const present = new Set<string>();
    const turned: Live[] = [];
    for (const model of snapshot.models) {
      this.#share(model.name).running.limit = model.concurrency ?? Infinity;
    }
    for (const backend of snapshot.backends) {
      const live = this.#liveOf(backend);
      present.add(backend.id);
      if (backend.health === "unhealthy" && live.health !== "unhealthy") {
        live.failedAt = this.#options.now();
        turned.push(live);
      }
      const hadFailed = live.health === "unhealthy" || live.health === "degraded";
      if (backend.health === "healthy" && hadFailed) live.guard.retryNow(this.#options.now());
      live.health = backend.health;
      const lanes = snapshot.models.flatMap((model) => {
        const target = model.targets.find((each) => each.backend === backend.id);
        if (target === undefined) return [];
        const { running, places } = this.#share(model.name);
        return [
          { model: model.name, slots: target.slots, shared: [running, this.#upstream], places },
        ];
      });
      const concurrency = backend.concurrency ?? Infinity;
      this.#run(live, { type: "configure", available: !backend.drained, concurrency, lanes });
    }
    for (const [id, live] of this.#lives) {
      if (present.has(id)) continue;
      this.#lives.delete(id);
      this.#close(live);
    }
    const names = new Set(snapshot.models.map(({ name }) => name));
    for (const [name, { running, places }] of this.#shares) {
      // Those that still run or wait somewhere lower these very counters when they end.
      if (!names.has(name) && running.used + places.used === 0) this.#shares.delete(name);
    }
    for (const live of turned) this.#run(live, { type: "recall" });
    this.#offer();
  }

  #close(live: Live) {
    this.#run(live, { type: "configure", available: false, concurrency: 0, lanes: [] });
    clearTimeout(live.timer);
    if (live.scheduler.backend.used > 0) this.#leaving.add(live);
  }

  /** The targets of a model as selection wants them, in the snapshot's order. */
  candidates(snapshot: Snapshot, model: Model): Candidate[] {
    const now = this.#options.now();
    return model.targets.flatMap((target) => {
      const backend = backendOf(snapshot, target.backend);
      const live = this.#lives.get(target.backend);
      if (backend === undefined || live === undefined || backend.drained) return [];
      const { scheduler, failedAt } = live;
      const { health, weight } = backend;
      const free = hasRoom(scheduler, model.name);
      const load = scheduler.backend.used + scheduler.waiting;
      const admits = live.guard.admits(model.name, this.breaker, now);
      // A trial does not wait in a queue.
      const open = admits === null || (admits === "trial" && !free);
      return [{ target, health, free, load, weight, failedAt, open, trying: live.trials > 0 }];
    });
  }

  /** In how many milliseconds the first of this model's open targets is tried again; null: none is open. */
  triedAgainIn(model: Model): number | null {
    const times = model.targets.flatMap(({ backend }) => {
      const at = this.#lives.get(backend)?.guard.untilAt(model.name) ?? null;
      return at === null ? [] : [at - this.#options.now()];
    });
    return times.length === 0 ? null : Math.max(0, Math.min(...times));
  }

  /** What selection among equals of this model remembers. */
  creditOf(model: string): Credit {
    return this.#share(model).credit;
  }

  engineFor(backend: string): Engine | undefined {
    return this.#lives.get(backend)?.engine;
  }

  /**
   * Asks for a slot. `decide` is called exactly once unless the place is left before, possibly
   * before this returns.
   */
  enqueue(ticket: Ticket, target: Target, decide: (admission: Admission) => void): Place {
    const live = this.#lives.get(target.backend);
    if (live === undefined) {
      decide({ type: "reselect" });
      return { position: () => -1, leave: () => {} };
    }
    let permit: Permit | null = null;
    const asking: Asking = {
      target,
      decide: (admission) => {
        if (admission.type === "granted") permit = admission.permit;
        decide(admission);
      },
    };
    this.#asking.set(ticket, asking);
    this.#run(live, { type: "arrive", ticket });
    // Whoever was sent elsewhere has taken the room by now: is there room for the next?
    this.#offer();
    return {
      position: () => positionOf(live.scheduler, ticket),
      leave: () => {
        permit?.release(judge("ended"));
        // The ticket may ask somewhere else by now: that is another place.
        if (this.#asking.get(ticket) !== asking) return;
        this.#asking.delete(ticket);
        this.#run(live, { type: "cancel", ticket });
      },
    };
  }

  /** How long a request of this model that came now would wait there, milliseconds, at least 1. */
  expectedWaitMs(backend: string, model: string): number {
    const live = this.#lives.get(backend);
    return live === undefined ? 1 : waitFor(live.scheduler, model);
  }

  /** When bytes of an answer last came from this backend, on the clock of `now`. */
  lastChunkAt(backend: string): number {
    return this.#lives.get(backend)?.lastChunkAt ?? -Infinity;
  }

  /**
   * A stream of this backend stood still lately, and none has flowed since: it is stuck, whatever it
   * answers to a probe. For as long as a breaker stays open; then it may try again.
   */
  isStuck(backend: string): boolean {
    const live = this.#lives.get(backend);
    if (live === undefined || live.lastChunkAt > live.stalledAt) return false;
    return this.#options.now() - live.stalledAt < this.breaker.resetTimeoutMs;
  }

  /** Per backend its caps, what each model uses and has waiting, and what its answers showed. */
  usage(): Usage[] {
    return [...this.#lives.values()].map(usageOf);
  }

  /** The breaker of a backend as a whole. */
  breakerOf(backend: string): BreakerReport {
    return breakerReport(this.#lives.get(backend), this.#options.now());
  }

  /** Every breaker; `model` is null for that of a backend as a whole. */
  breakers(): { backend: string; model: string | null; state: BreakerState }[] {
    return [...this.#lives.values()].flatMap(breakersOf);
  }

  /** Ends every timer; nothing may be enqueued afterwards. */
  close(): void {
    for (const live of [...this.#lives.values(), ...this.#leaving]) clearTimeout(live.timer);
  }

  #share(model: string): Share {
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

  #liveOf(backend: Backend): Live {
    const { id } = backend;
    const key = keyOf(backend);
    const known = this.#lives.get(id);
    if (known?.key === key) return known;
    if (known !== undefined) this.#close(known);
    // One that was taken out and put back still runs what it ran: its slots are not free twice.
    const back = [...this.#leaving].find((live) => live.key === key && live.id === id);
    if (back !== undefined) this.#leaving.delete(back);
    const fresh = back ?? createLive(backend);
    this.#lives.set(id, fresh);
    return fresh;
  }

  #run(live: Live, event: SchedulerEvent) {
    for (const effect of step(live.scheduler, event, this.#options.now())) {
      if (effect.type === "timer") {
        this.#arm(live, effect.at);
        continue;
      }
      // Nothing reports residency yet, so everything counts as loaded.
      if (effect.type === "load") continue;
      const asking = this.#asking.get(effect.ticket);
      this.#asking.delete(effect.ticket);
      switch (effect.type) {
        case "grant": {
          const permit = this.#permit(live, effect.ticket, asking?.target);
          if (asking === undefined || permit === null) break;
          asking.decide({ type: "granted", permit });
          break;
        }
        case "reselect":
          asking?.decide({ type: "reselect" });
          break;
        case "refuse":
        case "expire": {
          const cause = effect.type === "refuse" ? "full" : "expired";
          asking?.decide({ type: "refused", cause, retryAfterMs: effect.retryAfterMs });
          break;
        }
      }
    }
  }

  #arm(live: Live, at: number) {
    clearTimeout(live.timer);
    // A timer may fire a little early by the clock that decides: then it is armed again.
    const delay = Math.min(Math.max(1, Math.ceil(at - this.#options.now())), 2 ** 31 - 1);
    live.timer = setTimeout(() => {
      this.#run(live, { type: "timer" });
      // A hold may have ended: who waits elsewhere can start here.
      this.#offer();
    }, delay);
  }

  #permit(live: Live, ticket: Ticket, target: Target | undefined): Permit | null {
    const { now, random } = this.#options;
    const { model } = ticket;
    const grantedAt = now();
    const isTrial =
      live.health === "unhealthy" || live.guard.admits(model, this.breaker, grantedAt) !== "any";
    const passage = live.guard.begin(model);
    let trials = isTrial ? 1 : 0;
    live.trials += trials;
    const tried = () => {
      live.trials -= trials;
      trials = 0;
    };
    const end = (verdict: Verdict, tokens: number | null) => {
      tried();
      const opened = live.guard.settle(passage, verdict, this.breaker, now(), random());
      // Before the slot comes free: nobody is to follow there.
      if (opened.backend) this.#run(live, { type: "recall" });
      else if (opened.model) this.#run(live, { type: "recall", model });
      const serviceMs = verdict.outcome === "success" ? now() - grantedAt : null;
      const heldUntil = verdict.outcome === "saturated" ? now() + HOLD_MS : null;
      this.#run(live, { type: "complete", ticket, serviceMs, tokens, heldUntil });
      if (live.scheduler.backend.used === 0) this.#leaving.delete(live);
      this.#offer();
    };
    // Nobody asks any more: the slot is free again.
    if (target === undefined) {
      end(judge("ended"), 0);
      return null;
    }
    let held = true;
    return {
      target,
      connection: { id: live.id, url: live.url, apiKey: this.#options.apiKeyOf(live.id) },
      engine: live.engine,
      release(verdict, answered) {
        if (!held) return;
        held = false;
        if (verdict.outcome === "failure") live.failedAt = now();
        if (answered !== undefined) live.observed.add(answered);
        // Without an attempt it was given back unused.
        end(verdict, answered === undefined ? 0 : answered.tokens);
      },
      proved: () => {
        const wasTrial = trials > 0;
        tried();
        live.guard.prove(passage, this.breaker);
        // Open to all again: who waits elsewhere can start here.
        if (wasTrial) this.#offer();
      },
      stalled() {
        live.stalledAt = now();
      },
      flowed(at) {
        live.lastChunkAt = at;
      },
    };
  }

  /** Room came free somewhere: a cap shared with others, or a slot that nobody here waits for. */
  #offer() {
    if (this.#asking.size === 0) return;
    const lives = [...this.#lives.values()];
    const now = this.#options.now();
    for (const live of lives) {
      if (live.scheduler.waiting > 0) this.#run(live, { type: "room" });
    }
    for (const live of lives) {
      for (const model of live.scheduler.lanes.keys()) {
        const head = nextOf(live.scheduler, model);
        if (head === undefined) continue;
        if (!lives.some((other) => isBetter(other, live, head, this.breaker, now))) continue;
        // One at a time: it asks there, which comes back here for the next.
        return this.#run(live, { type: "elsewhere", model });
      }
    }
  }
}
