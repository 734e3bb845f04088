import { Estimates } from "../../src/core/estimate.ts";
import {
  createScheduler,
  hasRoom,
  isVacant,
  nextOf,
  type Cap,
  type SchedulerState,
  type Ticket,
} from "../../src/core/lanes.ts";
import { step, type SchedulerEffect, type SchedulerEvent } from "../../src/core/scheduler.ts";
import { select, type Candidate, type Credit } from "../../src/core/select.ts";
import type { Clock } from "./clock.ts";
import { createRandom } from "./random.ts";
import {
  sizeOf,
  type Answer,
  type Engine,
  type Listener,
  type Request,
  type Service,
} from "./service.ts";

/** A backend as it stands in a configuration. */
export interface BackendSetting {
  id: string;
  engine: Engine;
  /** Per model. */
  slots: number;
  weight: number;
}

/** The settings of the gateway that matter here, with its defaults in {@link DEFAULTS}. */
export interface GatewaySetting {
  backends: readonly BackendSetting[];
  models: readonly string[];
  turnMs: number | "auto";
  maxWaitMs: number;
  maxLength: number;
}

export const DEFAULTS = { turnMs: "auto", maxWaitMs: 120_000, maxLength: 512 } as const;

/** How often an engine is asked what it has loaded: `backends[].healthInterval`. */
const PROBE_MS = 5000;
/** How long one that said that it is busy gets nothing: as in the fleet. */
const HOLD_MS = 1000;
/** Promises are spread upward, so that those who were refused at once do not come back at once. */
const JITTER = 0.1;

interface Live extends BackendSetting {
  scheduler: SchedulerState;
  forgetTimer: () => void;
}

/** One request on its way. */
interface Job {
  request: Request;
  listener: Listener;
  ticket: Ticket;
  /** Where it waits or runs. */
  live: Live;
  /** While it runs: leaves the engine. */
  leave: (() => void) | null;
  over: boolean;
}

/** What `select` looks at. Here, and nowhere else, is it said of a backend. */
function candidateOf({ id, scheduler, weight }: Live, request: Request, now: number): Candidate {
  const { model } = request;
  const free = hasRoom(scheduler, model);
  return {
    target: {
      backend: id,
      model,
      residency: scheduler.lanes.get(model)?.stay.residency ?? "cold",
      slots: scheduler.lanes.get(model)?.slots.limit ?? 0,
      sizeBytes: null,
      vramBytes: null,
      digest: null,
    },
    health: "healthy",
    free,
    vacant: free || isVacant(scheduler, model, now),
    load: scheduler.backend.used + scheduler.waiting,
    weight,
    open: false,
    trying: false,
    failedAt: null,
  };
}

/**
 * The gateway in virtual time: its scheduler (`step`) and its choice of a backend (`select`) as they
 * are, and around them what the fleet does with clocks and sockets.
 */
export function createGateway(clock: Clock, setting: GatewaySetting): Service {
  const estimates = new Estimates();
  const random = createRandom(1);
  const credits = new Map<string, Credit>();
  const places = new Map<string, Cap>();
  const jobs = new Map<Ticket, Job>();
  const lives = new Map<string, Live>();
  let isProbing = false;
  let asked = 0;

  for (const model of setting.models) {
    credits.set(model, new Map());
    places.set(model, { limit: setting.maxLength, used: 0 });
  }
  for (const backend of setting.backends) {
    const live: Live = { ...backend, scheduler: createScheduler(), forgetTimer: () => {} };
    lives.set(backend.id, live);
    const { engine, slots } = backend;
    const loaded = new Set(engine.loaded());
    const lanes = setting.models.map((model) => ({
      model,
      slots,
      shared: [],
      places: places.get(model) as Cap,
      loaded: engine.load === null || loaded.has(model),
    }));
    run(live, { type: "turns", turnMs: setting.turnMs });
    run(live, { type: "configure", available: true, concurrency: Infinity, lanes });
    if (engine.load !== null) run(live, { type: "residency", loaded });
  }

  function run(live: Live, event: SchedulerEvent) {
    for (const effect of step(live.scheduler, event, clock.now())) apply(live, effect);
  }

  function apply(live: Live, effect: SchedulerEffect) {
    switch (effect.type) {
      case "timer":
        live.forgetTimer();
        // Timers of the runtimes know whole milliseconds.
        live.forgetTimer = clock.at(Math.ceil(effect.at), () => {
          run(live, { type: "timer" });
          offer();
        });
        return;
      case "load":
        return change(live, effect.model, [...effect.unload], clock.now());
      case "grant":
        return start(live, jobs.get(effect.ticket) as Job);
      case "reselect":
        return place(jobs.get(effect.ticket) as Job);
      case "refuse":
      case "expire":
        return end(jobs.get(effect.ticket) as Job, {
          type: "refused",
          retryAfterMs: effect.retryAfterMs * (1 + JITTER * random()),
        });
    }
  }

  /** One model after the other out, then the new one in, then a look at what is there. */
  function change(live: Live, model: string | null, unload: string[], from: number) {
    const { engine } = live;
    const out = unload.shift();
    if (out !== undefined) {
      engine.unload?.(out, () => change(live, model, unload, from));
      return;
    }
    const done = () => {
      const loadMs = model === null ? null : clock.now() - from;
      run(live, { type: "loaded", loadMs, loaded: new Set(engine.loaded()) });
      offer();
    };
    if (model === null) done();
    else engine.load?.(model, done);
  }

  /** Room came free: who waits at one backend may be able to start at another. */
  function offer() {
    for (const live of lives.values()) {
      for (const model of live.scheduler.waiting > 0 ? setting.models : []) {
        const head = nextOf(live.scheduler, model);
        const isBetter = (other: Live) => other !== live && hasRoom(other.scheduler, model);
        if (head === undefined || ![...lives.values()].some(isBetter)) continue;
        // It asks there, and comes back here for the next.
        return run(live, { type: "elsewhere", model });
      }
    }
  }

  /** Chooses a backend and asks there. */
  function place(job: Job) {
    const { model } = job.request;
    const candidates = [...lives.values()].map((live) => {
      return candidateOf(live, job.request, clock.now());
    });
    const selection = select(candidates, credits.get(model) as Credit);
    const live = lives.get(selection?.target.backend ?? "");
    if (live === undefined) return end(job, { type: "refused", retryAfterMs: null });
    job.live = live;
    run(live, { type: "arrive", ticket: job.ticket });
    offer();
  }

  function start(live: Live, job: Job) {
    const { request, listener, ticket } = job;
    const grantedAt = clock.now();
    let answer: Answer | null = null;
    const leave = live.engine.ask(request, {
      started: () => listener.started?.(),
      firstToken: () => listener.firstToken?.(),
      ended(ended) {
        answer = ended;
        const isServed = ended.type === "served";
        const serviceMs = isServed ? clock.now() - grantedAt : null;
        const heldUntil = isServed ? null : clock.now() + HOLD_MS;
        const tokens = isServed ? sizeOf(request.prompt) + ended.tokens : 0;
        if (isServed) estimates.learnOutput(request.flow, request.model, ended.tokens);
        job.leave = null;
        run(live, { type: "complete", ticket, serviceMs, tokens, heldUntil });
        // Too busy: back into the queue with its age.
        if (isServed) end(job, ended);
        else place(job);
        offer();
      },
      released: (tokens) => listener.released?.(tokens),
    });
    // It may have been answered at once.
    if (answer === null) job.leave = leave;
  }

  function end(job: Job, answer: Answer) {
    if (job.over) return;
    job.over = true;
    jobs.delete(job.ticket);
    job.listener.ended(answer);
  }

  function leave(job: Job) {
    if (job.over) return;
    job.over = true;
    jobs.delete(job.ticket);
    const { ticket, live } = job;
    if (job.leave === null) run(live, { type: "cancel", ticket });
    else {
      job.leave();
      run(live, { type: "complete", ticket, serviceMs: null, tokens: null, heldUntil: null });
    }
    offer();
  }

  function probe() {
    isProbing = jobs.size > 0;
    if (!isProbing) return;
    for (const live of lives.values()) {
      if (live.engine.load === null) continue;
      run(live, { type: "residency", loaded: new Set(live.engine.loaded()) });
    }
    clock.at(clock.now() + PROBE_MS, probe);
  }

  return {
    ask(request, listener) {
      const now = clock.now();
      const { model, flow, priority } = request;
      const ticket: Ticket = {
        id: `r${asked++}`,
        model,
        flow,
        priority,
        weight: 1,
        tokens: sizeOf(request.prompt) + estimates.output(flow, model, null, null),
        barred: new Set(),
        arrivedAt: now,
        deadlineAt: now + setting.maxWaitMs,
      };
      const [first] = lives.values();
      const job: Job = { request, listener, ticket, live: first as Live, leave: null, over: false };
      jobs.set(ticket, job);
      if (!isProbing) probe();
      place(job);
      return () => leave(job);
    },
  };
}
