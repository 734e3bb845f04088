/** The real live backends in virtual time, over imitated engines, and requests that ask for their slots. */
import type { Kind } from "../../src/config.ts";
import type { BreakerSettings } from "../../src/core/breaker.ts";
import type { Ticket } from "../../src/core/lanes.ts";
import { judge, SUCCESS, type Verdict } from "../../src/core/outcome.ts";
import { select, type Candidate } from "../../src/core/select.ts";
import type { Health, Snapshot, Target } from "../../src/core/snapshot.ts";
import { Fleet } from "../../src/fleet/fleet.ts";
import type { Admission, Permit, Place } from "../../src/fleet/permit.ts";
import type { Random } from "../support/client.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";
import { ALIKE } from "../support/ticket.ts";

export const MODELS = ["m", "n", "o"] as const;
/** Nobody has asked for it before the end. */
export const UNMEASURED = "unmeasured";

const BREAKER: BreakerSettings = { failureThreshold: 2, resetTimeoutMs: 5000, halfOpenRequests: 1 };
/** Nobody needs more choices at one instant. */
const MOST_CHOICES = 60;
const NO_ROOM = "llama runner process has terminated: cudaMalloc failed: out of memory";

/** A backend as it is configured, as it was last seen, and the engine behind it. */
export interface Machine {
  id: string;
  kind: Kind;
  /** In the configuration. */
  present: boolean;
  drained: boolean;
  gpu: string | null;
  concurrency: number | null;
  slots: number;
  models: readonly string[];
  health: Health;
  up: boolean;
  failsLoads: boolean;
  /** Models in memory, the one that came first put out first, and how many fit. */
  memory: string[];
  fits: number;
  loadMs: number;
  /** Under way, and the most at once. */
  loads: number;
  mostLoads: number;
  msPerToken: number;
}

/** What it asks for, and where it stands. */
interface Request {
  id: string;
  model: string;
  priority: Ticket["priority"];
  flow: string;
  promptTokens: number;
  receivedAt: number;
  patienceMs: number;
  at: { backend: string; doing: "waits" | "runs" } | null;
  left: boolean;
  giveUp: () => void;
}

/** Milliseconds in the place of the runtime's timers: they pass when they are told to. */
class Clock {
  now = 1000;
  #asked = 0;
  readonly #due = new Map<number, { at: number; act: () => void }>();
  readonly #original = { setTimeout: globalThis.setTimeout, clearTimeout: globalThis.clearTimeout };

  constructor() {
    const arm = (act: () => void, ms = 0) => {
      this.#due.set(++this.#asked, { at: this.now + ms, act });
      return this.#asked;
    };
    globalThis.setTimeout = arm as unknown as typeof setTimeout;
    globalThis.clearTimeout = ((timer: number) => this.#due.delete(timer)) as typeof clearTimeout;
  }

  /** Timers that are armed. */
  get timers(): number {
    return this.#due.size;
  }

  /** Fires what is due, each with all that follows from it, until so much time has passed. */
  async pass(ms: number): Promise<void> {
    const until = this.now + ms;
    for (;;) {
      await settled();
      const [first] = [...this.#due].toSorted(([, one], [, other]) => one.at - other.at);
      if (first === undefined || first[1].at > until) break;
      this.#due.delete(first[0]);
      this.now = first[1].at;
      first[1].act();
    }
    this.now = until;
  }

  restore(): void {
    Object.assign(globalThis, this.#original);
  }
}

/** Everything that waits for no timer has happened. */
async function settled(): Promise<void> {
  for (let turn = 0; turn < 2; turn++) await new Promise<void>((resolve) => setImmediate(resolve));
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => void setTimeout(resolve, ms));
}

export class FleetWorld {
  readonly random: Random;
  readonly machines: readonly Machine[];
  readonly fleet: Fleet;
  readonly maxLength: number;
  readonly clock = new Clock();
  /** Not answered yet. */
  readonly requests = new Set<Request>();
  /** Somebody who chose again and again at one instant; null: nobody did. */
  endless: string | null = null;
  answered = 0;
  grants = 0;
  /** Over all backends. */
  readonly caps: ReadonlyMap<string, number | null>;
  #snapshot: Snapshot = aSnapshot([], []);
  #asked = 0;
  readonly #fetch = globalThis.fetch;

  constructor(random: Random) {
    this.random = random;
    this.machines = Array.from({ length: random.between(1, 4) }, (_, at) => machineOf(random, at));
    this.caps = new Map(
      MODELS.map((model) => [model, random.next() < 0.2 ? random.between(1, 3) : null]),
    );
    this.maxLength = random.pick([40, 3]);
    globalThis.fetch = ((url: string, init: RequestInit) =>
      this.#answer(url, init)) as typeof fetch;
    this.fleet = new Fleet({
      now: () => this.clock.now,
      upstreamLimit: Infinity,
      maxLength: this.maxLength,
      breaker: BREAKER,
      random: () => random.next(),
      apiKeyOf: () => null,
      loaded: () => {},
      look: async ({ id }) => {
        await sleep(2);
        const machine = this.machine(id);
        this.probe([machine]);
        return machine.up;
      },
    });
    this.publish();
  }

  /** The runtime has its timers and its `fetch` back. */
  close(): void {
    this.clock.restore();
    globalThis.fetch = this.#fetch;
  }

  machine(id: string): Machine {
    return this.machines.find((machine) => machine.id === id) as Machine;
  }

  /** What a look at them shows becomes known. */
  probe(machines: readonly Machine[] = this.machines): void {
    for (const machine of machines) {
      const worse = machine.health === "healthy" ? "degraded" : "unhealthy";
      machine.health = machine.up ? "healthy" : worse;
    }
    this.publish();
  }

  publish(): void {
    const present = this.machines.filter((machine) => machine.present);
    const backends = present.map((machine) => aBackend(machine.id, machine));
    const names = [...MODELS, UNMEASURED].filter((name) => this.#targets(name).length > 0);
    const models = names.map((name) => {
      return aModel(name, this.#targets(name), { concurrency: this.caps.get(name) ?? null });
    });
    this.#snapshot = aSnapshot(backends, models);
    this.fleet.apply(this.#snapshot);
  }

  #targets(name: string): Target[] {
    return this.machines
      .filter(({ present, models }) => present && models.includes(name))
      .map(({ id, kind, slots, memory }) => {
        const residency = kind === "vllm" || memory.includes(name) ? "loaded" : "cold";
        return aTarget(id, name, { slots, residency });
      });
  }

  /** Of one model in one backend those that do this. */
  count(backend: string, model: string, doing: "waits" | "runs"): number {
    const isOne = (one: Request) =>
      one.model === model && one.at?.backend === backend && one.at.doing === doing;
    return [...this.requests].filter(isOne).length;
  }

  /** Our own loads of models that somebody waits for there. */
  loadsAwaited(): string[] {
    return this.machines.flatMap(({ id, models }) =>
      models
        .filter((model) => this.fleet.isLoading(id, model) && this.count(id, model, "waits") > 0)
        .map((model) => `${model} in ${id}`),
    );
  }

  /** As such a request finds them. */
  candidates(model: string): Candidate[] {
    return this.#candidates(this.#plainTicket(model));
  }

  #candidates(ticket: Ticket): Candidate[] {
    const model = this.#snapshot.models.find(({ name }) => name === ticket.model);
    return model === undefined ? [] : this.fleet.candidates(this.#snapshot, model, ticket);
  }

  #plainTicket(model: string): Ticket {
    const { now: arrivedAt } = this.clock;
    return { ...ALIKE, id: `t${++this.#asked}`, model, arrivedAt, deadlineAt: Infinity };
  }

  /** Asks one backend, for a request that waits for ever and has nothing to compute. */
  ask(backend: string, model: string): { place: Place; told: Admission["type"] | "waits" } {
    const decided: Admission[] = [];
    const ticket = this.#plainTicket(model);
    const decide = (admission: Admission) => decided.push(admission);
    const place = this.fleet.enqueue(ticket, aTarget(backend, model), decide);
    return { place, told: decided[0]?.type ?? "waits" };
  }

  /** A client's request, from its arrival to its answer or until the client has left. */
  async request(): Promise<void> {
    const { random } = this;
    const request: Request = {
      id: `r${++this.#asked}`,
      model: random.pick(MODELS),
      priority: random.pick(["interactive", "default", "batch"]),
      flow: random.pick(["f", "g", "h"]),
      promptTokens: random.pick([10, 5000]),
      receivedAt: this.clock.now,
      patienceMs: random.pick([0, 1000, 20_000, 120_000]),
      at: null,
      left: false,
      giveUp: () => {},
    };
    this.requests.add(request);
    const leave = () => {
      request.left = true;
      request.giveUp();
    };
    const leaving = random.next() < 0.2 ? setTimeout(leave, random.between(0, 20_000)) : undefined;
    await this.#serve(request);
    clearTimeout(leaving);
    this.requests.delete(request);
  }

  /** Two attempts at most, in two backends. */
  async #serve(request: Request): Promise<void> {
    const tried = new Set<string>();
    while (tried.size < 2) {
      const permit = await this.#admit(request, tried);
      if (permit === null || (await this.#attempt(request, permit))) return;
      tried.add(permit.target.backend);
    }
  }

  /** As in `src/data/admit.ts`: chooses again where the scheduler says so. Null: refused, or the client left. */
  async #admit(request: Request, barred: ReadonlySet<string>): Promise<Permit | null> {
    let choices = 0;
    for (let since = this.clock.now; ; choices++) {
      if (this.clock.now > since) [choices, since] = [0, this.clock.now];
      const ticket = ticketFor(request, barred);
      const credit = this.fleet.creditOf(request.model);
      const selection = select(this.#candidates(ticket), credit);
      if (selection === null) return null;
      const { target, reason } = selection;
      if (choices === MOST_CHOICES) {
        this.endless = `${request.id} for ${request.model} at last chose ${target.backend} (${reason})`;
        return null;
      }
      const admission = await this.#place(request, ticket, target);
      if (request.left || admission.type === "refused") return null;
      if (admission.type === "granted") return admission.permit;
    }
  }

  #place(request: Request, ticket: Ticket, target: Target): Promise<Admission> {
    const { backend } = target;
    return new Promise((resolve) => {
      let isDecided = false;
      const place = this.fleet.enqueue(ticket, target, (admission) => {
        isDecided = true;
        const isGranted = admission.type === "granted";
        request.at = isGranted ? { backend, doing: "runs" } : null;
        this.grants += isGranted ? 1 : 0;
        resolve(admission);
      });
      if (!isDecided) request.at = { backend, doing: "waits" };
      request.giveUp = () => {
        request.at = null;
        place.leave();
        resolve({ type: "reselect" });
      };
    });
  }

  /** False where another backend may try. */
  async #attempt(request: Request, permit: Permit): Promise<boolean> {
    const { random } = this;
    const machine = this.machine(permit.target.backend);
    const { promptTokens } = request;
    const ttftMs = machine.up ? 20 + Math.ceil(promptTokens * machine.msPerToken) : 3;
    const end = (verdict: Verdict, began: boolean) => {
      request.at = null;
      request.giveUp = () => {};
      permit.release(verdict, {
        at: 0,
        ttftMs: began ? ttftMs : null,
        promptTokens,
        cachedTokens: null,
        tokensPerSecond: null,
        error: null,
        tokens: began ? promptTokens : 0,
      });
    };
    request.giveUp = () => end(judge("ended"), false);
    await sleep(ttftMs);
    if (request.left) return true;
    const fault = random.next() < 0.06 ? random.pick(["unreachable", "busy"] as const) : null;
    if (!machine.up || fault !== null) {
      end(judge(fault ?? "unreachable"), false);
      return false;
    }
    permit.proved();
    await sleep(random.between(0, 3000));
    if (request.left) return true;
    end(machine.up ? SUCCESS : judge("incomplete"), true);
    this.answered += machine.up ? 1 : 0;
    return true;
  }

  /** Every engine's own API, in the place of `fetch`: loads, and what puts a model out. */
  async #answer(url: string, init: RequestInit): Promise<Response> {
    const machine = this.machine(new URL(url).hostname);
    const { model, keep_alive: keep } = JSON.parse(init.body as string) as Record<string, unknown>;
    await sleep(1);
    if (!machine.up) throw new TypeError("connection refused");
    if (keep === 0) {
      machine.memory = machine.memory.filter((each) => each !== model);
      return Response.json({ done: true });
    }
    machine.loads++;
    machine.mostLoads = Math.max(machine.mostLoads, machine.loads);
    await sleep(machine.loadMs);
    machine.loads--;
    init.signal?.throwIfAborted();
    if (!machine.up) throw new TypeError("reset");
    if (machine.failsLoads) return Response.json({ error: NO_ROOM }, { status: 500 });
    const others = machine.memory.filter((each) => each !== model);
    machine.memory = [...others, String(model)].slice(-machine.fits);
    return Response.json({ done: true });
  }
}

function machineOf(random: Random, at: number): Machine {
  const concurrency = random.next() < 0.3 ? random.between(1, 3) : null;
  return {
    id: `b${at}`,
    kind: random.pick(["ollama", "ollama", "vllm"]),
    present: true,
    drained: false,
    gpu: random.next() < 0.3 ? "g" : null,
    concurrency,
    slots: concurrency ?? random.between(1, 3),
    models: MODELS.filter(() => random.next() < 0.9),
    health: "healthy",
    up: true,
    failsLoads: false,
    memory: [],
    fits: random.between(1, 2),
    loadMs: random.pick([50, 500, 5000]),
    loads: 0,
    mostLoads: 0,
    msPerToken: random.pick([0.01, 0.1, 1]),
  };
}

function ticketFor(request: Request, barred: ReadonlySet<string>): Ticket {
  const { id, model, flow, priority, promptTokens: tokens, receivedAt: arrivedAt } = request;
  const deadlineAt = arrivedAt + request.patienceMs;
  const prompt = { tokens, chain: { blocks: [], length: 0 }, session: null, shows: true };
  const asked = { id, model, flow, priority, arrivedAt, deadlineAt, barred, prompt };
  return { ...asked, weight: 1, tokens: 10 };
}
