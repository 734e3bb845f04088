/** One backend in virtual time: an engine with only so much memory, under the real scheduler. */
import assert from "node:assert/strict";
import type { Priority } from "../../src/core/fairness.ts";
import { seenApart, seenTogether } from "../../src/core/fit.ts";
import { createScheduler, type SchedulerState, type Ticket } from "../../src/core/lanes.ts";
import { step, type SchedulerEffect, type SchedulerEvent } from "../../src/core/scheduler.ts";

export interface Setting {
  models: readonly string[];
  /** Models in memory at once; the engine puts out the one not used for longest. */
  fits: number;
  slots: number;
  serviceMs: number;
  loadMs: number;
  turnMs: number | "auto";
  /** In memory at the beginning. */
  loaded?: readonly string[];
  /** Requests at once, all models together; else as many as each has slots. */
  concurrency?: number;
  /** Of models that are not like the others. */
  times?: Readonly<Record<string, { serviceMs: number; loadMs: number }>>;
}

export interface Job {
  ticket: Ticket;
  queuedAt: number;
  startedAt: number | null;
  endedAt: number | null;
  ending: "done" | "left" | "refused" | "expired" | null;
}

interface Due {
  at: number;
  act: () => void;
}

export class TurnWorld {
  readonly setting: Setting;
  readonly state: SchedulerState = createScheduler();
  readonly jobs = new Map<Ticket, Job>();
  readonly loads: { model: string; at: number }[] = [];
  readonly loaded: Set<string>;
  /** Loads of these fail. */
  readonly broken = new Set<string>();
  /** Models in the order in which requests started. */
  readonly order: string[] = [];
  readonly loops = new Set<Ticket>();
  now = 0;
  /** The most that have waited at once for one model. */
  longest = 0;
  readonly #obedient = new Set<Ticket>();
  #due: Due[] = [];
  #timerAt = Infinity;
  #changing: { model: string | null; must: number } | null = null;
  /** The model whose load finished last, and who waited then. */
  #gates = new Map<string, Set<Ticket>>();

  constructor(setting: Setting) {
    this.setting = setting;
    this.loaded = new Set(setting.loaded ?? []);
    const places = { limit: 1000, used: 0 };
    const lanes = setting.models.map((model) => ({
      model,
      slots: setting.slots,
      shared: [],
      places: { ...places },
      loaded: this.loaded.has(model),
    }));
    const { turnMs, concurrency = Infinity } = setting;
    this.#send({ type: "configure", available: true, concurrency, lanes });
    this.#send({ type: "turns", turnMs });
    this.#send({ type: "residency", loaded: new Set(this.loaded) });
  }

  timesOf(model: string | null): { serviceMs: number; loadMs: number } {
    return this.setting.times?.[model ?? ""] ?? this.setting;
  }

  /** As if all had been served and loaded before, in every order. */
  learn(): void {
    const { models, fits } = this.setting;
    const { lanes, turns } = this.state;
    for (const [model, lane] of lanes) {
      const { serviceMs, loadMs } = this.timesOf(model);
      lane.serviceMs = serviceMs;
      lane.stay.loadMs = loadMs;
    }
    for (const some of subsetsOf(models)) {
      if (some.size <= fits) seenTogether(turns.fit, some);
      else seenApart(turns.fit, some, 0);
    }
  }

  arrive(at: number, model: string, priority: Priority = "default", deadlineAt = 1e12): Ticket {
    const ticket: Ticket = {
      id: `t${this.jobs.size}`,
      model,
      flow: "default",
      priority,
      weight: 1,
      tokens: 10,
      barred: new Set(),
      arrivedAt: at,
      deadlineAt,
    };
    const job: Job = { ticket, queuedAt: at, startedAt: null, endedAt: null, ending: null };
    this.jobs.set(ticket, job);
    this.at(at, () => this.#send({ type: "arrive", ticket }));
    return ticket;
  }

  /** A client that asks again whenever it has its answer. */
  loop(at: number, model: string, priority: Priority = "default"): void {
    this.loops.add(this.arrive(at, model, priority));
  }

  /** A client with so much patience that comes back when it was told to. */
  obey(at: number, model: string, patienceMs: number): void {
    this.#obedient.add(this.arrive(at, model, "default", at + patienceMs));
  }

  #comeBack({ ticket }: Job, retryAfterMs: number): void {
    if (!this.#obedient.has(ticket)) return;
    const patienceMs = ticket.deadlineAt - ticket.arrivedAt;
    this.obey(this.now + Math.ceil(retryAfterMs / 1000) * 1000, ticket.model, patienceMs);
  }

  cancel(at: number, ticket: Ticket): void {
    this.at(at, () => {
      const job = this.jobs.get(ticket) as Job;
      if (job.startedAt !== null || job.ending !== null || ticket.arrivedAt > at) return;
      job.ending = "left";
      for (const gate of this.#gates.values()) gate.delete(ticket);
      this.#send({ type: "cancel", ticket });
    });
  }

  /** Somebody else talks to the same engine, and it loads what that one wants. */
  foreign(at: number, model: string): void {
    this.at(at, () => {
      if (this.#changing !== null) return;
      const idle = [...this.loaded].find((each) => this.running(each) === 0);
      if (!this.loaded.has(model) && this.loaded.size >= this.setting.fits) {
        if (idle === undefined) return;
        this.loaded.delete(idle);
        this.#gates.delete(idle);
      }
      this.loaded.add(model);
      this.#send({ type: "residency", loaded: new Set(this.loaded) });
    });
  }

  at(at: number, act: () => void): void {
    this.#due.push({ at, act });
  }

  running(model: string): number {
    return this.state.lanes.get(model)?.slots.used ?? 0;
  }

  /** Runs until nothing is due any more. Deadlines lie beyond, so that timers for them do not count. */
  run(until = 1e9): void {
    for (let steps = 0; ; steps++) {
      assert(steps < 100_000, "comes to rest");
      const next = this.#due.reduce<Due | null>(
        (first, each) => (first === null || each.at < first.at ? each : first),
        null,
      );
      const at = Math.min(next?.at ?? Infinity, this.#timerAt);
      if (at === Infinity || at > until) return;
      this.now = Math.max(this.now, at);
      if (next !== null && next.at <= this.#timerAt) {
        this.#due.splice(this.#due.indexOf(next), 1);
        next.act();
      } else {
        this.#timerAt = Infinity;
        this.#send({ type: "timer" });
      }
    }
  }

  /** Runs until then, and what comes next comes at that time. */
  runTo(at: number): void {
    this.run(at);
    this.now = at;
  }

  #send(event: SchedulerEvent): void {
    for (const effect of step(this.state, event, this.now)) this.#apply(effect);
    for (const { line } of this.state.lanes.values()) {
      this.longest = Math.max(this.longest, line.waiting);
    }
  }

  #apply(effect: SchedulerEffect): void {
    if (effect.type === "timer") {
      this.#timerAt = effect.at;
      return;
    }
    if (effect.type === "load") return this.#load(effect.model, effect.unload);
    const job = this.jobs.get(effect.ticket) as Job;
    assert.equal(job.ending, null, "decides once");
    assert.equal(job.startedAt, null, "decides once");
    switch (effect.type) {
      case "grant":
        return this.#start(job);
      case "refuse":
        job.ending = "refused";
        assert(effect.retryAfterMs > 0);
        this.#comeBack(job, effect.retryAfterMs);
        if (effect.cause === "late") break;
        assert.equal(effect.cause, "load_failed");
        assert(this.broken.has(job.ticket.model), "refuses only those of the model that failed");
        assert(effect.retryAfterMs <= 80_000);
        break;
      case "expire":
        job.ending = "expired";
        this.#comeBack(job, effect.retryAfterMs);
        break;
      case "reselect":
        assert.fail("nobody is sent away");
    }
    for (const gate of this.#gates.values()) gate.delete(job.ticket);
  }

  #start(job: Job): void {
    const { model } = job.ticket;
    assert(this.loaded.has(model), `${model} is started without being loaded`);
    job.startedAt = this.now;
    this.order.push(model);
    this.#gates.get(model)?.delete(job.ticket);
    const { ticket } = job;
    const { serviceMs } = this.timesOf(model);
    this.at(this.now + serviceMs, () => {
      job.endedAt = this.now;
      job.ending = "done";
      this.#send({ type: "complete", ticket, serviceMs, tokens: null, heldUntil: null });
      if (this.loops.has(ticket)) this.loop(this.now, model, ticket.priority);
    });
  }

  #load(model: string | null, unload: readonly string[]): void {
    assert.equal(this.#changing, null, "one load in flight");
    for (const each of unload) {
      assert.equal(this.running(each), 0, `${each} is put out while it is in use`);
      this.loaded.delete(each);
    }
    this.#changing = { model, must: 0 };
    if (model !== null) {
      this.loads.push({ model, at: this.now });
      // Whom the engine would have to put out is idle now, and stays so.
      while (this.loaded.size >= this.setting.fits) {
        const idle = [...this.loaded].find((each) => {
          const stay = this.state.lanes.get(each)?.stay;
          return this.running(each) === 0 && (stay?.closing ?? true);
        });
        assert(idle !== undefined, "a load begins only when all that must leave are idle");
        const gate = this.#gates.get(idle);
        assert.equal(gate?.size ?? 0, 0, `${idle} has not served its gate`);
        this.loaded.delete(idle);
      }
    }
    const fails = model !== null && this.broken.has(model);
    const { loadMs } = this.timesOf(model);
    this.at(this.now + loadMs, () => {
      this.#changing = null;
      if (model !== null && !fails) this.loaded.add(model);
      const loaded = new Set(this.loaded);
      if (fails) return this.#send({ type: "loadFailed", loaded });
      if (model !== null) {
        const waiting = [...this.jobs.values()].filter(
          ({ ticket, startedAt, ending }) =>
            ticket.model === model && ticket.arrivedAt <= this.now && !startedAt && !ending,
        );
        this.#gates.set(model, new Set(waiting.map(({ ticket }) => ticket)));
      }
      this.#send({ type: "loaded", loadMs, loaded });
    });
  }
}

function subsetsOf(models: readonly string[]): Set<string>[] {
  return models.reduce<Set<string>[]>(
    (all, model) => [...all, ...all.map((each) => new Set([...each, model]))],
    [new Set()],
  );
}
