/** Constellations in which the fleet went wrong: trials that wait, shared GPUs, reloads under a load, caps. */
import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import type { Ticket } from "../../src/core/lanes.ts";
import { judge, SUCCESS } from "../../src/core/outcome.ts";
import { chainOf } from "../../src/core/prefix.ts";
import { select } from "../../src/core/select.ts";
import type { Backend, Snapshot } from "../../src/core/snapshot.ts";
import { Fleet } from "../../src/fleet/fleet.ts";
import type { Admission, Permit, Place } from "../../src/fleet/permit.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";
import { ALIKE } from "../support/ticket.ts";

/** Nobody chooses more often for one thing that happens. */
const MOST_CHOICES = 3;

const OLLAMA = { kind: "ollama" } as const;

/** Backends by id, and per model those that have it. */
interface Plan {
  backends: Record<string, Partial<Backend>>;
  models: Record<string, readonly string[]>;
  caps?: Record<string, number>;
  slots?: number;
}

/** A fleet under a clock of its own, in front of engines whose loads end when the test says so. */
class World {
  now = 1_000_000;
  plan: Plan;
  snapshot: Snapshot;
  /** What Ollamas have in memory, by "backend model". */
  readonly resident: Set<string>;
  /** What they load, likewise, and how that ends. */
  readonly loading = new Map<string, () => void>();
  /** Loads that began in an engine that was at one already. */
  readonly second: string[] = [];
  readonly fleet: Fleet;
  #tickets = 0;

  constructor(plan: Plan, { resident = [] as readonly string[], maxLength = 100 } = {}) {
    this.resident = new Set(resident);
    this.fleet = new Fleet({
      now: () => this.now,
      maxLength,
      upstreamLimit: Infinity,
      breaker: { failureThreshold: 3, resetTimeoutMs: 10_000, halfOpenRequests: 1 },
      random: () => 0,
      apiKeyOf: () => null,
      look: () => {
        this.apply();
        return Promise.resolve(true);
      },
      loaded: () => {},
    });
    globalThis.fetch = ((url: string, init: RequestInit) =>
      this.#answer(url, init)) as typeof fetch;
    this.plan = plan;
    this.snapshot = this.apply();
  }

  /** Takes a new configuration, or what the engines have in memory by now. */
  apply(plan: Plan = this.plan): Snapshot {
    const { backends, models, caps = {}, slots = 1 } = plan;
    const targetOf = (id: string, model: string) => {
      const isCold = backends[id]?.kind === "ollama" && !this.resident.has(`${id} ${model}`);
      return aTarget(id, model, { slots, residency: isCold ? "cold" : "loaded" });
    };
    this.plan = plan;
    this.snapshot = aSnapshot(
      Object.entries(backends).map(([id, more]) => aBackend(id, more)),
      Object.entries(models).map(([name, ids]) => {
        const targets = ids.map((id) => targetOf(id, name));
        return aModel(name, targets, { concurrency: caps[name] ?? null });
      }),
    );
    this.fleet.apply(this.snapshot);
    return this.snapshot;
  }

  /** An Ollama that is asked to load a model, or to put it out. */
  #answer(url: string, { body, signal }: RequestInit): Promise<Response> {
    const { hostname } = new URL(url);
    const asked = JSON.parse(body as string) as { model: string; keep_alive: unknown };
    const name = `${hostname} ${asked.model}`;
    if (asked.keep_alive === 0) {
      this.resident.delete(name);
      return Promise.resolve(Response.json({ done: true, done_reason: "unload" }));
    }
    const isBusy = [...this.loading.keys()].some((each) => each.startsWith(`${hostname} `));
    if (isBusy) this.second.push(name);
    return new Promise((resolve, reject) => {
      this.loading.set(name, () => {
        this.loading.delete(name);
        this.resident.add(name);
        resolve(Response.json({ done: true, done_reason: "load" }));
      });
      signal?.addEventListener("abort", () => {
        this.loading.delete(name);
        reject(signal.reason as Error);
      });
    });
  }

  /** Waits until a load has begun. */
  async begun(name: string): Promise<void> {
    for (let turn = 0; turn < 10 && !this.loading.has(name); turn++) await rest();
    assert(this.loading.has(name), `${name} is not loaded`);
  }

  /** Ends a load, and waits until all that comes of that is done. */
  async end(name: string): Promise<void> {
    this.loading.get(name)?.();
    await rest();
  }

  advance(by: number): void {
    this.now += by;
    mock.timers.tick(by);
  }

  /** One request. @param at where it goes first; null: where selection sends it. */
  ask(model: string, at: string | null, more: Partial<Ticket> = {}): Asking {
    this.#tickets++;
    const { now: arrivedAt } = this;
    const id = `t${this.#tickets}`;
    const asking = new Asking(this, {
      ...ALIKE,
      id,
      model,
      arrivedAt,
      deadlineAt: arrivedAt + 120_000,
      ...more,
    });
    if (at === null) asking.choose();
    else asking.enqueue(at);
    return asking;
  }
}

/** One request, as the data plane asks for it. */
class Asking {
  readonly said: Admission["type"][] = [];
  /** Where it has been sent, one after the other. */
  readonly went: string[] = [];
  readonly #world: World;
  readonly #ticket: Ticket;
  #place: Place | null = null;
  #permit: Permit | null = null;

  constructor(world: World, ticket: Ticket) {
    this.#world = world;
    this.#ticket = ticket;
  }

  enqueue(backend: string): void {
    this.went.push(backend);
    const target = aTarget(backend, this.#ticket.model);
    this.#place = this.#world.fleet.enqueue(this.#ticket, target, (admission) => {
      this.said.push(admission.type);
      if (admission.type === "granted") this.#permit = admission.permit;
    });
  }

  /** Goes where selection sends it, again and again as often as it is told to. */
  choose(): this {
    const { fleet, snapshot } = this.#world;
    const model = snapshot.models.find(({ name }) => name === this.#ticket.model);
    assert(model !== undefined);
    for (let choices = 0; this.said.length === this.went.length; choices++) {
      if (this.went.length > 0 && this.said.at(-1) !== "reselect") break;
      assert(choices < MOST_CHOICES, `chooses again for ever: ${this.went.join(", ")}`);
      const candidates = fleet.candidates(snapshot, model, this.#ticket);
      const selection = select(candidates, fleet.creditOf(model.name));
      assert(selection !== null);
      this.enqueue(selection.target.backend);
    }
    return this;
  }

  get permit(): Permit {
    assert(this.#permit !== null, `was told ${this.said.join(", ") || "nothing"}`);
    return this.#permit;
  }

  leave(): void {
    this.#place?.leave();
  }
}

/** Lets whatever follows from what has happened follow. */
async function rest(): Promise<void> {
  for (let turn = 0; turn < 10; turn++) await new Promise((resolve) => setImmediate(resolve));
}

function answered(ttftMs: number, promptTokens: number, cachedTokens: number | null = null) {
  const tokens = promptTokens + 50;
  return { at: 0, ttftMs, promptTokens, cachedTokens, tokensPerSecond: 50, error: null, tokens };
}

const original = globalThis.fetch;
let world: World;

beforeEach(() => mock.timers.enable({ apis: ["setTimeout"] }));
afterEach(async () => {
  world.fleet.close();
  await rest();
  globalThis.fetch = original;
  mock.timers.reset();
});

describe("a request that is to try a backend whose model has to be loaded for it stays there", () => {
  const tokens = 20_000;
  const prompt = { tokens, chain: { blocks: [], length: 0 }, session: null, shows: true };

  /** Waits at c, which has failed and been started anew since, while b is free. */
  async function waitsAtC(
    more: Partial<Ticket>,
    { ttftMs = null as readonly [b: number, c: number] | null, b = {} as Partial<Backend> } = {},
  ) {
    const plan = { backends: { b: OLLAMA, c: OLLAMA }, models: { m: ["b", "c"] }, slots: 2 };
    world = new World(plan, { resident: ["b m", "c m"] });
    for (const [at, ms] of [...(ttftMs ?? [])].entries()) {
      for (let each = 0; each < 3; each++) {
        const { permit } = world.ask("m", at === 0 ? "b" : "c", { prompt });
        permit.release(SUCCESS, answered(ms, tokens));
      }
    }
    for (let each = 0; each < 3; each++) world.ask("m", "c").permit.release(judge("unreachable"));
    assert.equal(world.fleet.breakerOf("c").state, "open");
    world.advance(20_000);
    world.resident.delete("c m");
    world.apply({ ...plan, backends: { b: { ...OLLAMA, ...b }, c: OLLAMA } });
    const waits = world.ask("m", null, { prompt, ...more });
    assert.deepEqual([waits.went.at(-1), waits.said.length], ["c", waits.went.length - 1]);
    await world.begun("c m");
    await world.end("c m");
    assert.equal(waits.choose().permit.target.backend, "c");
    assert(waits.went.length <= MOST_CHOICES, waits.went.join(", "));
  }

  it("while another is free whose context is too small", async () => {
    await waitsAtC({ cramped: new Set(["b"]) });
  });

  it("while another is free that is slower", async () => {
    await waitsAtC({}, { ttftMs: [60_000, 4000] });
  });

  it("while another is free that is degraded", async () => {
    await waitsAtC({}, { b: { health: "degraded" } });
  });
});

describe("a request that may hardly wait", () => {
  const tokens = 6000;
  const chain = chainOf("m", ["word ".repeat(tokens)]);
  const prompt = { tokens, chain, session: null, shows: true };

  /** b has read the prompt, is busy for another half a second, and would answer first all the same. */
  function arrives(patience: number): Asking {
    world = new World({ backends: { a: {}, b: {} }, models: { m: ["a", "b"] } });
    for (let each = 0; each < 3; each++) {
      const { permit } = world.ask("m", "b", { prompt });
      permit.proved();
      world.advance(1000);
      const told = each === 0 ? answered(3000, tokens, 0) : answered(100, tokens, 5900);
      permit.release(SUCCESS, told);
    }
    world.ask("m", "b", { prompt }).permit.proved();
    world.advance(500);
    return world.ask("m", null, { prompt, deadlineAt: world.now + patience });
  }

  for (const patience of [0, 300]) {
    it(`goes where it starts now: ${patience} ms`, () => {
      const { went, said } = arrives(patience);
      assert.deepEqual([went, said], [["a"], ["granted"]]);
    });
  }

  it("waits where its first token comes first if it has the time", () => {
    const { went, said } = arrives(5000);
    assert.deepEqual([went, said], [["b"], []]);
  });
});

describe("backends that share a GPU", () => {
  it("go on at once when the one who wanted the memory of all of them leaves", () => {
    const shared = { ...OLLAMA, gpu: "g" };
    const models = { m: ["a"], n: ["b"], o: ["c"] };
    const backends = { a: shared, b: shared, c: shared };
    world = new World({ backends, models }, { resident: ["b n", "c o"] });
    const long = world.ask("o", "c");
    const short = world.ask("n", "b");
    const wants = world.ask("m", "a");
    const waits = world.ask("n", "b");
    short.permit.release(SUCCESS);
    assert.deepEqual([long.said, wants.said, waits.said], [["granted"], [], []]);
    wants.leave();
    assert.deepEqual(waits.said, ["granted"]);
  });
});

describe("a reload while a model is being loaded", () => {
  const models = { m: ["o"], n: ["o"], k: ["p"] };
  const planOf = (o: string | null, p: string | null): Plan => {
    return { backends: { o: { ...OLLAMA, gpu: o }, p: { ...OLLAMA, gpu: p } }, models };
  };

  /** The first load goes on, n is asked for meanwhile, and gets a load of its own when that is over. */
  async function loadsInTurn(before: Plan, ...reloads: readonly Plan[]): Promise<void> {
    world = new World(before);
    const first = world.ask("m", "o");
    await world.begun("o m");
    first.leave();
    for (const plan of reloads) world.apply(plan);
    const next = world.ask("n", "o");
    await rest();
    assert.deepEqual(world.second, [], "one at a time");
    await world.end("o m");
    await world.begun("o n");
    assert.deepEqual(next.said, [], "its model is not there yet");
    await world.end("o n");
    assert.equal(next.permit.target.backend, "o");
    assert.deepEqual([world.second, [...world.loading]], [[], []]);
  }

  it("begins no second one where it puts the backend on a shared GPU", async () => {
    await loadsInTurn(planOf(null, null), planOf("g", null));
  });

  it("begins no second one where it takes the backend off a shared GPU", async () => {
    await loadsInTurn(planOf("g", "g"), planOf(null, "g"));
  });

  it("begins no second one where it takes the backend out and puts it back", async () => {
    const all = planOf(null, null);
    const less = { backends: { p: all.backends["p"] ?? {} }, models: { k: ["p"] } };
    await loadsInTurn(all, less, all);
  });

  it("does not take the end of one for the end of another's, with whom it shares from now on", async () => {
    world = new World(planOf(null, "g"));
    const [m, k] = [world.ask("m", "o"), world.ask("k", "p")];
    await world.begun("o m");
    await world.begun("p k");
    world.apply(planOf("g", "g"));
    await world.end("o m");
    assert.deepEqual(k.said, [], "its model is not there yet");
    await world.end("p k");
    assert.deepEqual([m.permit.target.model, k.permit.target.model], ["m", "k"]);
  });
});

describe("a model's concurrency", () => {
  it("holds where a backend went with two models at work, and came back after one had ended", () => {
    const full = { backends: { a: {}, b: {} }, models: { x: ["a"], y: ["a", "b"] }, slots: 64 };
    const less = { backends: { b: {} }, models: { y: ["b"] }, slots: 64 };
    world = new World({ ...full, caps: { x: 2 } });
    const short = world.ask("x", "a");
    const long = world.ask("y", "a");
    world.apply(less);
    short.permit.release(SUCCESS);
    world.apply(less);
    world.apply({ ...full, models: { x: ["a", "b"], y: ["a", "b"] }, caps: { x: 1 } });
    const all = ["a", "a", "b"].map((at) => world.ask("x", at));
    const granted = all.filter(({ said }) => said.includes("granted"));
    assert.deepEqual([long.said, granted.length], [["granted"], 1]);
    granted[0]?.permit.release(SUCCESS);
    for (const each of all) each.choose();
    assert.equal(all.filter(({ said }) => said.includes("granted")).length, 2, "the next");
  });
});

describe("a backend that no longer has a model, and still answers a request for it", () => {
  it("does not keep those who wait from another that is free", () => {
    const backends = { gone: {}, a: {}, b: {} };
    const models = { m: ["gone", "a", "b"], other: ["gone"] };
    world = new World({ backends, models });
    const paces = { gone: 100, a: 400, b: 400 };
    for (const [at, ttftMs] of Object.entries(paces)) {
      for (let each = 0; each < 3; each++) {
        const { permit } = world.ask("m", at);
        world.advance(5000);
        permit.release(SUCCESS, answered(ttftMs, 10));
      }
    }
    const long = world.ask("m", "gone");
    world.apply({ backends, models: { ...models, m: ["a", "b"] } });
    const [, atB] = [world.ask("m", "a"), world.ask("m", "b")];
    const waits = world.ask("m", "a");
    assert.deepEqual([long.said, waits.said], [["granted"], []]);
    atB.permit.release(SUCCESS, answered(400, 10));
    assert.deepEqual(waits.said, ["reselect"]);
    assert.equal(waits.choose().permit.target.backend, "b");
  });
});

describe("a tenant that has taken all places, over two backends", () => {
  for (const at of ["a", "b"]) {
    it(`gives one up for the first request of another: at ${at}`, () => {
      world = new World(
        { backends: { a: {}, b: {} }, models: { m: ["a", "b"] } },
        { maxLength: 4 },
      );
      const asks = (flow: string, backend: string) => world.ask("m", backend, { flow });
      const crowd = ["a", "b", "a", "a", "a", "b"].map((backend) => asks("crowd", backend));
      const waiting = crowd.filter(({ said }) => said.length === 0);
      assert.equal(waiting.length, 4);
      const other = asks("other", at);
      assert.deepEqual(other.said, [], "it waits");
      const refused = crowd.filter(({ said }) => said.includes("refused"));
      assert.deepEqual([refused.length, waiting.includes(refused[0] as Asking)], [1, true]);
      assert.deepEqual(asks("crowd", at).said, ["refused"], "and takes none back");
    });
  }

  it("takes none from another who has fewer", () => {
    const backends = { a: {}, b: {} };
    world = new World({ backends, models: { m: ["a", "b"] } }, { maxLength: 5 });
    const asks = (flow: string, backend: string) => world.ask("m", backend, { flow });
    asks("many", "a");
    asks("few", "b");
    const many = ["a", "a", "a"].map((backend) => asks("many", backend));
    const few = ["b", "b"].map((backend) => asks("few", backend));
    assert.deepEqual(asks("many", "a").said, ["refused"]);
    assert.ok([...many, ...few].every(({ said }) => said.length === 0));
  });

  it("puts nobody out where fewer may wait than before", () => {
    const backends = { a: {}, b: {} };
    world = new World({ backends, models: { m: ["a", "b"] } }, { maxLength: 10 });
    const asks = (flow: string, backend: string) => world.ask("m", backend, { flow });
    for (const backend of ["a", "b"]) asks("crowd", backend);
    const crowd = Array.from({ length: 10 }, () => asks("crowd", "a"));
    world.fleet.maxLength = 2;
    assert.deepEqual(asks("other", "b").said, ["refused"]);
    assert.ok(crowd.every(({ said }) => !said.includes("refused")));
  });
});
