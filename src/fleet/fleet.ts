import type { BreakerSettings, BreakerState } from "../core/breaker.ts";
import { jittered, startIn } from "../core/eta.ts";
import { positionOf, waitsFor, type Cap, type Ticket } from "../core/lanes.ts";
import { judge } from "../core/outcome.ts";
import { NO_PACE } from "../core/pace.ts";
import { Sessions } from "../core/prefix.ts";
import type { Turns } from "../core/turns.ts";
import { step, type SchedulerEffect, type SchedulerEvent } from "../core/scheduler.ts";
import type { Candidate, Credit } from "../core/select.ts";
import {
  backendOf,
  type Backend,
  type Model,
  type Snapshot,
  type Target,
} from "../core/snapshot.ts";
import type { Connection, Engine } from "../engines/engine.ts";
import { changeModels, type Loaded, type Spot } from "./change.ts";
import { beginOf, cachedIn, candidateOf, guessesFrom, sessionKey, type Guesses } from "./expect.ts";
import { Grant } from "./grant.ts";
import {
  breakerReport,
  breakersOf,
  createLive,
  betterOff,
  isAtWork,
  isServed,
  failedLoad,
  keyOf,
  loadedIn,
  loserAmong,
  loadSince,
  namedIn,
  namesOfLoaded,
  prefixOf,
  reportsResidency,
  targetsOf,
  triedAgainIn,
  turnsOf,
  turnReport,
  usageOf,
  type BreakerReport,
  type FailedLoad,
  type Live,
  type TurnReport,
  type Usage,
} from "./live.ts";
import type { Admission, Permit, Place } from "./permit.ts";
import { Shares } from "./shares.ts";

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
  /** Looks at a backend now, and applies what it has seen; true when it answered. Never rejects. */
  look: (connection: Connection, engine: Engine) => Promise<boolean>;
  /** A load is over. */
  loaded: (load: Loaded) => void;
}

/**
 * The live backends. Runs the effects of their schedulers: grants become permits, timers become
 * timers, loads become calls to engines that no client can end. A backend lives as long as its id, url and kind stay; what runs on one that has gone
 * keeps its counters until it ends.
 */
export class Fleet {
  readonly #options: FleetOptions;
  readonly #lives = new Map<string, Live>();
  /** Out of the configuration, and still at work: they come back as they are. */
  readonly #leaving = new Set<Live>();
  readonly #shares: Shares;
  /** The turns of each GPU that several backends share. */
  readonly #gpus = new Map<string, Turns>();
  readonly #asking = new Map<Ticket, Asking>();
  readonly #sessions = new Sessions();
  readonly #upstream: Cap;
  /** Read at every decision: a reload may replace it. */
  breaker: BreakerSettings;
  #turnMs: number | "auto" = "auto";
  /** `timeouts.loadMs`, likewise. */
  loadMs = 600_000;

  constructor(options: FleetOptions) {
    this.#options = options;
    this.#shares = new Shares(options.maxLength);
    this.breaker = options.breaker;
    this.#upstream = { limit: options.upstreamLimit, used: 0 };
  }

  /** Waiting requests per model from now on; a longer queue is not shortened, it takes nobody in. */
  set maxLength(maxLength: number) {
    this.#shares.maxLength = maxLength;
  }

  /** `queue.turnMs` from now on. */
  set turnMs(turnMs: number | "auto") {
    this.#turnMs = turnMs;
    for (const live of this.#lives.values()) this.#run(live, { type: "turns", turnMs });
  }

  /** Takes a new snapshot: new backends come alive, those that went send their queues elsewhere. */
  apply(snapshot: Snapshot): void {
    const present = new Set<string>();
    const turned: Live[] = [];
    this.#shares.limit(snapshot.models);
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
      live.targets = targetsOf(snapshot, backend.id);
      // An engine that loads nothing for us has what it has: nothing there can make room.
      this.#shareGpu(live, live.engine.load === null ? null : backend.gpu);
      this.#configure(live, backend);
    }
    for (const [id, live] of this.#lives) {
      if (!present.has(id) && this.#lives.delete(id)) this.#close(live);
    }
    this.#shares.keep(snapshot.models);
    for (const live of turned) this.#run(live, { type: "recall" });
    this.#offer();
  }

  #configure(live: Live, { health, drained, concurrency }: Backend) {
    const reports = reportsResidency(live, health);
    live.loaded = loadedIn(live.targets);
    const lanes = [...live.targets].map(([model, { slots }]) => {
      const { running, places } = this.#shares.of(model);
      const loaded = !reports || live.loaded.has(model);
      return { model, slots, shared: [running, this.#upstream], places, loaded };
    });
    const limits = { available: !drained, concurrency: concurrency ?? Infinity };
    this.#run(live, { type: "configure", ...limits, lanes });
    if (reports) this.#run(live, { type: "residency", loaded: live.loaded });
  }

  #close(live: Live) {
    this.#shareGpu(live, null);
    this.#run(live, { type: "configure", available: false, concurrency: 0, lanes: [] });
    clearTimeout(live.timer);
    if (isAtWork(live)) this.#leaving.add(live);
  }

  #forgetLeaving() {
    for (const live of this.#leaving) if (!isAtWork(live)) this.#leaving.delete(live);
  }

  /** The targets of a ticket's model as selection wants them, in the snapshot's order. */
  candidates(snapshot: Snapshot, model: Model, ticket: Ticket): Candidate[] {
    const now = this.#options.now();
    const guesses = this.#guesses(model.name);
    const session = sessionKey(ticket);
    const last = session === null ? null : this.#sessions.last(session);
    return model.targets.flatMap((target) => {
      const backend = backendOf(snapshot, target.backend);
      const live = this.#lives.get(target.backend);
      if (backend === undefined || live === undefined || backend.drained) return [];
      const familiar = last === target.backend;
      const { breaker } = this;
      return [candidateOf(live, backend, target, ticket, familiar, breaker, guesses, now)];
    });
  }

  #guesses(model: string): Guesses {
    return guessesFrom(this.#lives.values(), model);
  }

  /** How long an answer takes to begin once it is sent, milliseconds, by what has been measured alone. */
  measuredBeginMs(backend: string, ticket: Ticket): number {
    const live = this.#lives.get(backend);
    const now = this.#options.now();
    return live === undefined
      ? 0
      : beginOf(live, ticket, cachedIn(live, ticket, now), NO_PACE, now);
  }

  /** Of this model's targets the first that is tried again after a load failed; null: none did lately. */
  failedLoad(model: Model): FailedLoad | null {
    return failedLoad(this.#lives, model, this.#options.now());
  }

  /** Might a backend serve such a request, as far as is known? @param except not this one. */
  isServed(request: Pick<Ticket, "model" | "barred">, except: Live | null = null): boolean {
    return isServed(this.#lives.values(), request, except, this.breaker, this.#options.now());
  }

  /** In how many milliseconds the first of this model's open targets is tried again; null: none is open. */
  triedAgainIn(model: Model): number | null {
    return triedAgainIn(this.#lives, model, this.#options.now());
  }

  /** What selection among equals of this model remembers. */
  creditOf(model: string): Credit {
    return this.#shares.of(model).credit;
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
      return { position: () => -1, reason: () => "", etaMs: () => 0, leave: () => {} };
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
      reason: () => waitsFor(live.scheduler, ticket.model),
      etaMs: () => Math.round(startIn(live.scheduler, ticket, this.#options.now())),
      leave: () => {
        permit?.release(judge("ended"));
        // The ticket may ask somewhere else by now: that is another place.
        if (this.#asking.get(ticket) !== asking) return;
        this.#asking.delete(ticket);
        this.#run(live, { type: "cancel", ticket });
        // Where turns are shared it may have been in the way of others.
        this.#offer();
      },
    };
  }

  /**
   * A request that was refused does not come back when it was told to: another model has served it, or has
   * refused it as well, and it was told what holds for the one that it asked for.
   *
   * @param except that one; null: for none.
   */
  forgive(id: string, except: string | null): void {
    for (const live of this.#lives.values()) this.#run(live, { type: "forgive", id, except });
  }

  /** How long the last load of a model there ran within `from` and now, and since when; null: it did not. */
  loadSince(backend: string, model: string, from: number): { from: number; to: number } | null {
    return loadSince(this.#lives.get(backend), model, from, this.#options.now());
  }

  /** Is a load of this model of our own under way there? */
  isLoading(backend: string, model: string): boolean {
    const lane = this.#lives.get(backend)?.scheduler.lanes.get(model);
    return lane?.stay.residency === "loading";
  }

  /** Whose turn it is in a backend; null where everything is loaded. */
  turnOf(backend: string): TurnReport | null {
    const live = this.#lives.get(backend);
    return live === undefined ? null : turnReport(live, this.#options.now());
  }

  /**
   * Has a model loaded that nobody waits for, where it is not.
   *
   * @param mayEvict others go for it, when their turn is over; else only where it fits.
   * @param backend null: everywhere.
   */
  warm(model: string, mayEvict: boolean, backend: string | null = null): void {
    for (const live of this.#lives.values()) {
      if (backend !== null && live.id !== backend) continue;
      this.#run(live, { type: "warm", model, mayEvict });
    }
  }

  /** Has a model put out, as soon as nothing runs there. @param backend null: everywhere. */
  unload(model: string, backend: string | null): void {
    for (const live of this.#lives.values()) {
      if ((backend !== null && live.id !== backend) || live.engine.unload === null) continue;
      this.#run(live, { type: "unload", model });
    }
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

  /** Ends every timer and load; nothing may be enqueued afterwards. */
  close(): void {
    for (const live of [...this.#lives.values(), ...this.#leaving]) {
      clearTimeout(live.timer);
      live.change?.abort(new Error("the gateway ends"));
    }
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
    this.#run(fresh, { type: "turns", turnMs: this.#turnMs });
    return fresh;
  }

  #run(live: Live, event: SchedulerEvent) {
    for (const effect of step(live.scheduler, event, this.#options.now())) {
      if (effect.type === "timer") {
        this.#arm(live, effect.at);
        continue;
      }
      if (effect.type === "load") {
        void this.#change(live, effect);
        continue;
      }
      const asking = this.#asking.get(effect.ticket);
      this.#asking.delete(effect.ticket);
      switch (effect.type) {
        case "grant": {
          const permit = this.#grant(live, effect.ticket, asking?.target);
          if (permit !== null) asking?.decide({ type: "granted", permit });
          break;
        }
        case "reselect":
          asking?.decide({ type: "reselect" });
          break;
        case "refuse":
        case "expire": {
          const cause = effect.type === "refuse" ? effect.cause : "expired";
          const isNew = event.type === "arrive" && event.ticket === effect.ticket;
          if (cause === "full" && isNew && asking !== undefined && this.#makeRoom(event.ticket)) {
            this.#asking.set(event.ticket, asking);
            this.#run(live, event);
            break;
          }
          // What cannot be loaded here may be loaded elsewhere.
          if (cause === "load_failed" && this.isServed(effect.ticket, live)) {
            asking?.decide({ type: "reselect" });
          } else {
            const retryAfterMs = jittered(effect.retryAfterMs, this.#options.random());
            asking?.decide({ type: "refused", cause, retryAfterMs });
          }
          break;
        }
      }
    }
  }

  /** The places of a model are shared by all its backends: somebody who waits at another may have too many. */
  #makeRoom(newcomer: Ticket): boolean {
    const loser = loserAmong([...this.#lives.values()], newcomer);
    if (loser !== null) this.#run(loser.live, { type: "yield", ticket: loser.ticket });
    return loser !== null;
  }

  /** Runs one change of models to its end, whoever comes or leaves. Never rejects. */
  async #change(live: Live, effect: Extract<SchedulerEffect, { type: "load" }>): Promise<void> {
    const { now, loaded: tell } = this.#options;
    const { turns } = live.scheduler;
    const wanted = effect.model === null ? null : this.#spot(live, effect.model);
    const unload = effect.unload.flatMap((name) => this.#spot(live, name) ?? []);
    const look = (each: Live) => this.#options.look(this.#connection(each), each.engine);
    const wish = { load: wanted, unload };
    const { load, changed } = await changeModels(live, wish, this.loadMs, now, look);
    const ms = now() - load.from;
    if (wanted !== null) {
      tell({ ...changed, backend: wanted.live.id, model: wanted.model, ms });
    }
    const sharing = () =>
      [...this.#lives.values()].filter(({ scheduler }) => scheduler.turns === turns);
    const seen = await Promise.all(sharing().map(look));
    load.to = now();
    const there = sharing();
    const loaded = seen.every(Boolean) ? new Set(there.flatMap(namesOfLoaded)) : null;
    // Whoever asked may have gone, or share with others now.
    const teller =
      wanted !== null && there.includes(wanted.live) ? wanted.live : (there[0] ?? live);
    if (changed.loaded === false) this.#run(teller, { type: "loadFailed", loaded });
    else this.#run(teller, { type: "loaded", loadMs: changed.loaded ? ms : null, loaded });
    for (const each of [...this.#lives.values(), ...this.#leaving]) {
      this.#shareGpu(each, each.nextGpu);
    }
    this.#forgetLeaving();
    this.#offer();
  }

  /** The model that a name in the turns of a backend means; null where its backend has gone. */
  #spot(live: Live, name: string): Spot | null {
    const { backend, model } = namedIn(name);
    const owner = backend === null ? live : this.#lives.get(backend);
    return owner === undefined ? null : { live: owner, connection: this.#connection(owner), model };
  }

  #shareGpu(live: Live, gpu: string | null) {
    live.nextGpu = gpu;
    // Whose turns it shares now wait for its load, or it for theirs.
    if (live.gpu === gpu || live.scheduler.turns.change !== null) return;
    live.gpu = gpu;
    const turns = turnsOf(gpu, this.#gpus, [...this.#lives.values(), ...this.#leaving]);
    turns.turnMs = this.#turnMs;
    this.#run(live, { type: "share", turns, prefix: gpu === null ? "" : prefixOf(live) });
  }

  #connection({ id, url }: Live): Connection {
    return { id, url, apiKey: this.#options.apiKeyOf(id) };
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

  /** Null where nobody asks any more: then the slot is free again. */
  #grant(live: Live, ticket: Ticket, target: Target | undefined): Permit | null {
    const { now, random } = this.#options;
    const grant = new Grant(live, ticket, {
      now,
      random,
      breaker: () => this.breaker,
      run: (event) => this.#run(live, event),
      offer: () => {
        this.#forgetLeaving();
        this.#offer();
      },
    });
    if (target === undefined) {
      grant.end(judge("ended"), 0);
      return null;
    }
    const session = sessionKey(ticket);
    if (session !== null) this.#sessions.remember(session, live.id);
    return grant.permit(target, this.#connection(live));
  }

  /** Room came free somewhere: a cap shared with others, or a slot that nobody here waits for. */
  #offer() {
    if (this.#asking.size === 0) return;
    const lives = [...this.#lives.values()];
    const now = this.#options.now();
    for (const live of lives) {
      if (live.scheduler.waiting > 0) this.#run(live, { type: "room" });
    }
    // One at a time: it asks there, which comes back here for the next.
    const head = betterOff(lives, this.breaker, now);
    if (head !== null) this.#run(head.live, { type: "elsewhere", model: head.model });
  }
}
