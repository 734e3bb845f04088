import { jittered } from "../../src/core/eta.ts";
import { Estimates } from "../../src/core/estimate.ts";
import { type Cap, type SchedulerState, type Ticket } from "../../src/core/lanes.ts";
import { judge, SUCCESS } from "../../src/core/outcome.ts";
import { Sessions } from "../../src/core/prefix.ts";
import type { Backend, Target } from "../../src/core/snapshot.ts";
import type { BreakerSettings } from "../../src/core/breaker.ts";
import { candidateOf, guessesFrom, sessionKey } from "../../src/fleet/expect.ts";
import { Grant } from "../../src/fleet/grant.ts";
import { betterOff, createLive, type Live as Known } from "../../src/fleet/live.ts";
import { promptOf } from "./prompt-text.ts";
import { step, type SchedulerEffect, type SchedulerEvent } from "../../src/core/scheduler.ts";
import { select, type Candidate, type Credit } from "../../src/core/select.ts";
import type { Clock } from "./clock.ts";
import { createRandom } from "../support/random.ts";
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
/** When a model is looked for again that is to go, and then after twice as long each time. */
const GONE_LOOK_MS = 10;

interface Live extends BackendSetting {
  backend: Backend;
  /** What the fleet knows of it. */
  known: Known;
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

/** Nobody sends anything to it. */
const NO_TARGET: Target = {
  backend: "",
  model: "",
  residency: "loaded",
  slots: 0,
  sizeBytes: null,
  vramBytes: null,
  digest: null,
  contextLength: null,
};

/** As it is by default; nothing fails here. */
const BREAKER: BreakerSettings = {
  failureThreshold: 3,
  resetTimeoutMs: 10_000,
  halfOpenRequests: 1,
};

/** A backend as the fleet has it, of which the probes have told that it is there. */
function snapshotOf({ id, weight }: BackendSetting): Backend {
  return {
    id,
    kind: "ollama",
    url: "",
    health: "healthy",
    reason: "",
    checkedAt: null,
    drained: false,
    weight,
    concurrency: null,
    gpu: null,
  };
}

/** What `select` looks at. Here, and nowhere else, is it asked of the fleet's own code. */
function candidatesFor(
  lives: readonly Live[],
  ticket: Ticket,
  last: string | null,
  now: number,
): Candidate[] {
  const { model } = ticket;
  const guesses = guessesFrom(
    lives.map(({ known }) => known),
    model,
  );
  return lives.map(({ id, backend, known, slots }) => {
    const { residency = "cold" } = known.scheduler.lanes.get(model)?.stay ?? {};
    const target: Target = { ...NO_TARGET, backend: id, model, residency, slots };
    return candidateOf(known, backend, target, ticket, id === last, BREAKER, guesses, now);
  });
}

/**
 * The gateway in virtual time: its scheduler (`step`) and its choice of a backend (`select`) as they
 * are, and around them what the fleet does with clocks and sockets.
 */
export function createGateway(clock: Clock, setting: GatewaySetting): Service {
  const sessions = new Sessions();
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
    const known = createLive(snapshotOf(backend));
    known.health = "healthy";
    const live: Live = {
      ...backend,
      backend: snapshotOf(backend),
      known,
      scheduler: known.scheduler,
      forgetTimer: () => {},
    };
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
          retryAfterMs: jittered(effect.retryAfterMs, random()),
        });
    }
  }

  /** What was in use when it was to go goes when nobody uses it any more. */
  function hasGone(live: Live, model: string, then: () => void, waitMs = GONE_LOOK_MS) {
    if (!new Set(live.engine.loaded()).has(model)) return then();
    clock.at(clock.now() + waitMs, () => hasGone(live, model, then, waitMs * 2));
  }

  /** One model after the other out, then the new one in, then a look at what is there. */
  function change(live: Live, model: string | null, unload: string[], from: number) {
    const { engine } = live;
    const out = unload.shift();
    if (out !== undefined) {
      engine.unload?.(out, () => hasGone(live, out, () => change(live, model, unload, from)));
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
    const known = [...lives.values()].map((each) => each.known);
    // It asks there, and comes back here for the next.
    const head = betterOff(known, BREAKER, clock.now());
    if (head === null) return;
    const { model } = head;
    run(lives.get(head.live.id) as Live, { type: "elsewhere", model });
  }

  /** Chooses a backend and asks there. */
  function place(job: Job) {
    const { model } = job.request;
    const last = sessions.last(sessionKey(job.ticket) ?? "");
    const candidates = candidatesFor([...lives.values()], job.ticket, last, clock.now());
    const selection = select(candidates, credits.get(model) as Credit);
    const live = lives.get(selection?.target.backend ?? "");
    if (live === undefined) return end(job, { type: "refused", retryAfterMs: null });
    job.live = live;
    run(live, { type: "arrive", ticket: job.ticket });
    offer();
  }

  function start(live: Live, job: Job) {
    const { request, listener, ticket } = job;
    const session = sessionKey(ticket);
    if (session !== null) sessions.remember(session, live.id);
    const grantedAt = clock.now();
    const grant = new Grant(live.known, ticket, {
      now: () => clock.now(),
      random,
      breaker: () => BREAKER,
      run: (event) => run(live, event),
      offer,
    });
    const promptTokens = sizeOf(request.prompt);
    const shown = { promptTokens, tokensPerSecond: null, error: null };
    let ttftMs: number | null = null;
    let cachedTokens: number | null = null;
    const permit = grant.permit(NO_TARGET, { id: live.id, url: "", apiKey: null });
    let answer: Answer | null = null;
    const leaveEngine = live.engine.ask(request, {
      started: () => listener.started?.(),
      firstToken(cached) {
        ttftMs = clock.now() - grantedAt;
        cachedTokens = cached;
        permit.proved();
        listener.firstToken?.(cached);
      },
      ended(ended) {
        answer = ended;
        job.leave = null;
        const isServed = ended.type === "served";
        if (isServed) estimates.learnOutput(request.flow, request.model, ended.tokens);
        const tokens = isServed ? promptTokens + ended.tokens : 0;
        const seen = { ...shown, at: clock.now(), ttftMs, cachedTokens, tokens };
        permit.release(isServed ? SUCCESS : judge("busy"), seen);
        // Too busy: back into the queue with its age.
        if (isServed) end(job, ended);
        else place(job);
      },
      released: (tokens) => listener.released?.(tokens),
    });
    const leave = () => {
      leaveEngine();
      const seen = { ...shown, at: clock.now(), ttftMs, cachedTokens, tokens: null };
      permit.release(judge("ended"), seen);
    };
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
    else job.leave();
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
        prompt: promptOf(request),
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
