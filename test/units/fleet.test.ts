/** The live backends: permits, queues, caps that reach over backends, and choosing again. */
import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import fc from "fast-check";
import type { Kind } from "../../src/config.ts";
import type { BreakerSettings } from "../../src/core/breaker.ts";
import { judge, SUCCESS, type Fault, type Verdict } from "../../src/core/outcome.ts";
import type { Ticket } from "../../src/core/lanes.ts";
import { select } from "../../src/core/select.ts";
import type { Backend, Health, Snapshot } from "../../src/core/snapshot.ts";
import { Fleet } from "../../src/fleet/fleet.ts";
import type { Admission, Permit, Place } from "../../src/fleet/permit.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";
import { ALIKE } from "../support/ticket.ts";

/** Of the backend as a whole. */
const FAILURE = judge("unreachable");
const BREAKER: BreakerSettings = { failureThreshold: 3, resetTimeoutMs: 1000, halfOpenRequests: 1 };

type BackendPlan = Partial<Omit<Backend, "id" | "kind">> & { kind?: Kind };
/** Backends by id, and per model its slots by backend. */
interface Plan {
  backends: Record<string, BackendPlan>;
  models: Record<string, Record<string, number>>;
  caps?: Record<string, number>;
}

function snapshotOf({ backends, models, caps = {} }: Plan): Snapshot {
  return aSnapshot(
    Object.entries(backends).map(([id, more]) => aBackend(id, more)),
    Object.entries(models).map(([name, slots]) => {
      const targets = Object.entries(slots).map(([backend, each]) =>
        aTarget(backend, `${name}@${backend}`, { slots: each }),
      );
      return aModel(name, targets, { concurrency: caps[name] ?? null });
    }),
  );
}

/** A fleet under a clock of its own, and what it decided. */
class World {
  now = 1000;
  snapshot: Snapshot;
  readonly fleet: Fleet;
  #tickets = 0;

  constructor(
    plan: Plan,
    { maxLength = 10, upstreamLimit = Infinity, breaker = BREAKER, random = 0 } = {},
  ) {
    this.snapshot = snapshotOf(plan);
    this.fleet = new Fleet({
      now: () => this.now,
      maxLength,
      upstreamLimit,
      breaker,
      random: () => random,
      apiKeyOf: (id) => (id === "a" ? "key of a" : null),
      look: () => Promise.resolve(false),
      loaded: () => {},
    });
    this.fleet.apply(this.snapshot);
  }

  apply(plan: Plan): void {
    this.snapshot = snapshotOf(plan);
    this.fleet.apply(this.snapshot);
  }

  advance(by: number): void {
    this.now += by;
    mock.timers.tick(by);
  }

  ask(backend: string, model = "m", patience = 60_000, more: Partial<Ticket> = {}): Asking {
    this.#tickets++;
    const arrivedAt = this.now;
    const deadlineAt = this.now + patience;
    const id = `t${this.#tickets}`;
    const asking = new Asking(this, { ...ALIKE, id, model, arrivedAt, deadlineAt, ...more });
    asking.enqueue(backend);
    return asking;
  }

  /** Running and waiting of a model in a backend. */
  usage(backend: string, model = "m"): [running: number, waiting: number] {
    const live = this.fleet.usage().find((each) => each.backend === backend);
    const lane = live?.models.find((each) => each.model === model);
    return [lane?.running ?? 0, lane?.waiting ?? 0];
  }

  /** As a request that came now would find them. */
  candidates(model: string, more: Partial<Ticket> = {}) {
    const found = this.snapshot.models.find(({ name }) => name === model);
    if (found === undefined) return [];
    const { now: arrivedAt } = this;
    const ticket = { ...ALIKE, id: "one", model, arrivedAt, deadlineAt: Infinity, ...more };
    return this.fleet.candidates(this.snapshot, found, ticket);
  }

  candidate(backend: string, model = "m", more: Partial<Ticket> = {}) {
    return this.candidates(model, more).find(({ target }) => target.backend === backend);
  }
}

/** One request, as the data plane asks for it: again where it has to choose again. */
class Asking {
  readonly world: World;
  readonly ticket: Ticket;
  readonly decisions: Admission[] = [];
  readonly places: Place[] = [];

  constructor(world: World, ticket: Ticket) {
    this.world = world;
    this.ticket = ticket;
  }

  enqueue(backend: string): void {
    const { snapshot, fleet } = this.world;
    const model = snapshot.models.find(({ name }) => name === this.ticket.model);
    const target = model?.targets.find((each) => each.backend === backend);
    const other = aTarget(backend, "gone");
    const decide = (admission: Admission) => void this.decisions.push(admission);
    this.places.push(fleet.enqueue(this.ticket, target ?? other, decide));
  }

  get said(): string[] {
    return this.decisions.map(({ type }) => type);
  }

  get permit(): Permit {
    const last = this.decisions.at(-1);
    assert(last?.type === "granted", `got ${last?.type}`);
    return last.permit;
  }

  get position(): number {
    return this.places.at(-1)?.position() ?? -1;
  }

  /** As a request that ends: gives up every place it ever had, in order, or only the latest. */
  leave(which: "all" | "latest" = "all"): void {
    for (const place of which === "all" ? this.places : this.places.slice(-1)) place.leave();
  }
}

beforeEach(() => mock.timers.enable({ apis: ["setTimeout"] }));
afterEach(() => mock.timers.reset());

const one: Plan = { backends: { a: {} }, models: { m: { a: 1 } } };
const two: Plan = { backends: { a: {}, b: {} }, models: { m: { a: 1, b: 1 } } };

describe("permits", () => {
  it("carry what is needed to send the request", () => {
    const world = new World({
      backends: { a: { kind: "vllm" }, b: {} },
      models: { m: { a: 1, b: 1 } },
    });
    const { permit } = world.ask("a");
    assert.deepEqual(permit.connection, { id: "a", url: "http://a", apiKey: "key of a" });
    assert.equal(permit.target.model, "m@a");
    assert.equal(permit.engine.kind, "vllm");
    assert.equal(world.ask("b").permit.connection.apiKey, null);
    assert.equal(world.fleet.engineFor("a")?.kind, "vllm");
    assert.equal(world.fleet.engineFor("c"), undefined);
  });

  it("are granted as far as there are slots; the next waits for one that is given back", () => {
    const world = new World({ ...one, models: { m: { a: 2 } } });
    const [first, second, third, fourth] = [1, 2, 3, 4].map(() => world.ask("a"));
    assert(first && second && third && fourth);
    assert.deepEqual([first.said, second.said, third.said], [["granted"], ["granted"], []]);
    assert.deepEqual([third.position, fourth.position], [0, 1]);
    first.permit.release(SUCCESS);
    assert.deepEqual([third.said, fourth.said, fourth.position], [["granted"], [], 0]);
    assert.deepEqual(world.usage("a"), [2, 1]);
  });

  it("are given back once, however often", () => {
    const world = new World(one);
    const [first, second, third] = [1, 2, 3].map(() => world.ask("a"));
    assert(first && second && third);
    const { permit } = first;
    permit.release(SUCCESS);
    permit.release(SUCCESS);
    permit.release(FAILURE);
    assert.deepEqual([second.said, third.said], [["granted"], []]);
    assert.deepEqual(world.usage("a"), [1, 1]);
    assert.equal(world.candidate("a")?.failedAt, null, "only the first word counts");
  });

  it("tell of a failure, and of nothing else, when it was", () => {
    const world = new World(one);
    for (const verdict of [SUCCESS, judge("rejected"), judge("ended"), judge("busy")]) {
      world.ask("a").permit.release(verdict);
      assert.equal(world.candidate("a")?.failedAt, null, verdict.outcome);
    }
    world.advance(1000);
    world.now = 5000;
    world.ask("a").permit.release(FAILURE);
    assert.equal(world.candidate("a")?.failedAt, 5000);
  });

  it("tell when tokens flowed", () => {
    const world = new World(one);
    assert.equal(world.fleet.lastChunkAt("a"), -Infinity);
    const { permit } = world.ask("a");
    permit.flowed(1234, 0);
    assert.equal(world.fleet.lastChunkAt("a"), 1234);
    assert.equal(world.fleet.lastChunkAt("nobody"), -Infinity);
  });
});

describe("leaving", () => {
  it("a queue makes room for others, and says nothing any more", () => {
    const world = new World(one, { maxLength: 2 });
    const running = world.ask("a");
    const [gone, next] = [world.ask("a"), world.ask("a")];
    assert.deepEqual(world.ask("a").said, ["refused"]);
    gone.leave();
    gone.leave();
    assert.deepEqual([gone.position, next.position], [-1, 0]);
    assert.deepEqual(world.ask("a").said, [], "there is a place again");
    running.permit.release(SUCCESS);
    assert.deepEqual([gone.said, next.said], [[], ["granted"]]);
  });

  it("gives back a permit that was granted meanwhile", () => {
    const world = new World(one);
    const running = world.ask("a");
    const waiting = world.ask("a");
    running.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["granted"]);
    waiting.leave();
    waiting.leave();
    assert.deepEqual(world.usage("a"), [0, 0]);
    assert.deepEqual(world.ask("a").said, ["granted"]);
  });

  it("after the permit was given back changes nothing", () => {
    const world = new World(one);
    const first = world.ask("a");
    first.permit.release(SUCCESS);
    const second = world.ask("a");
    first.leave();
    assert.deepEqual(world.usage("a"), [1, 0]);
    assert.deepEqual(second.said, ["granted"]);
  });

  it("takes a request out of the queue it has chosen again, too", () => {
    const world = new World(two);
    world.ask("a");
    world.ask("b");
    const asking = world.ask("a");
    world.apply({ ...two, backends: { a: { drained: true }, b: {} } });
    assert.deepEqual(asking.said, ["reselect"]);
    asking.enqueue("b");
    assert.deepEqual(world.usage("b"), [1, 1]);
    asking.leave();
    assert.deepEqual(world.usage("b"), [1, 0], "nobody waits there any more");
  });
});

describe("tenants", () => {
  const by = (world: World, flow: string, more: Partial<Ticket> = {}) =>
    world.ask("a", "m", 60_000, { flow, ...more });
  const told = (tokens: number | null) => {
    const prompt = { promptTokens: 0, cachedTokens: null };
    return { at: 1, ttftMs: null, tokensPerSecond: null, error: null, tokens, ...prompt };
  };
  /** Ends what runs, with what it is said to have been, and tells who has been granted by it. */
  const next = (all: Asking[], ends: Asking, tokens: number | null = null): Asking | undefined => {
    const before = all.filter(({ said }) => said.length > 0);
    ends.permit.release(SUCCESS, told(tokens));
    return all.find((each) => each.said.length > 0 && !before.includes(each));
  };

  it("take turns, by what their requests are expected to be and then have been", () => {
    const world = new World(one, { maxLength: 50 });
    const first = by(world, "x", { tokens: 1000 });
    const xs = [1, 2, 3].map(() => by(world, "x", { tokens: 1000 }));
    const ys = [1, 2, 3].map(() => by(world, "y", { tokens: 1000 }));
    const all = [...xs, ...ys];
    assert.equal(next(all, first), ys[0], "x has had 1000 already");
    assert.equal(next(all, ys[0] as Asking, 1500), xs[0], "y has had 1500");
    assert.equal(next(all, xs[0] as Asking, 100), xs[1], "x has had 1100");
    assert.equal(next(all, xs[1] as Asking), ys[1], "x has had 2100");
  });

  it("pay nothing for a permit that is given back unused", () => {
    const world = new World(one);
    const first = by(world, "z");
    const x = by(world, "x", { arrivedAt: 1 });
    const again = by(world, "x", { arrivedAt: 2 });
    const y = by(world, "y", { arrivedAt: 3 });
    first.permit.release(SUCCESS);
    assert.deepEqual([x.said, again.said, y.said], [["granted"], [], []]);
    x.leave();
    assert.deepEqual([again.said, y.said], [["granted"], []], "the older, as if nothing had been");
  });

  it("of a better class go first, and take over the place of another in a full queue", () => {
    const world = new World(one, { maxLength: 2 });
    const first = by(world, "x");
    const waiting = [1, 2].map(() => by(world, "x", { priority: "batch" }));
    const sooner = by(world, "y", { priority: "interactive" });
    assert.deepEqual(
      waiting.map(({ said }) => said),
      [[], ["refused"]],
    );
    assert.deepEqual([sooner.position, waiting[0]?.position], [0, 1]);
    first.permit.release(SUCCESS);
    assert.deepEqual([sooner.said, waiting[0]?.said], [["granted"], []]);
  });

  it("who would be next is the one who chooses again when there is room elsewhere", () => {
    const world = new World(one);
    by(world, "x");
    const low = by(world, "x", { priority: "batch" });
    const high = by(world, "y", { priority: "interactive" });
    world.apply(two);
    assert.deepEqual([low.said, high.said], [[], ["reselect"]]);
  });
});

describe("refusals", () => {
  it("come when the model's places are taken, over all backends, with a time to come back", () => {
    const world = new World(two, { maxLength: 2 });
    world.ask("a");
    world.ask("b");
    assert.deepEqual([world.ask("a").said, world.ask("b").said], [[], []]);
    for (const backend of ["a", "b"]) {
      const { decisions } = world.ask(backend);
      const [refused] = decisions;
      assert(refused?.type === "refused" && refused.cause === "full");
      assert(refused.retryAfterMs > 0);
    }
  });

  it("are spread by up to a tenth, never to an earlier time", () => {
    const [least, most] = [0, 0.999].map((random) => {
      const world = new World(one, { maxLength: 1, random });
      for (const each of [1, 2]) assert.equal(world.ask("a").said.length, 2 - each);
      const [refused] = world.ask("a").decisions;
      assert(refused?.type === "refused");
      return refused.retryAfterMs;
    }) as [number, number];
    assert(most > 1.09 * least && most <= 1.1 * least, `${least} and ${most}`);
  });

  it("count places per model", () => {
    const plan = { backends: { a: {} }, models: { m: { a: 1 }, n: { a: 1 } } };
    const world = new World(plan, { maxLength: 1 });
    for (const model of ["m", "n"]) {
      world.ask("a", model);
      assert.deepEqual(world.ask("a", model).said, []);
      assert.deepEqual(world.ask("a", model).said, ["refused"]);
    }
  });

  it("come at the deadline, neither before nor later, and once", () => {
    const world = new World(one);
    const running = world.ask("a");
    const hasty = world.ask("a", "m", 3000);
    const patient = world.ask("a", "m", 5000);
    world.advance(2999);
    assert.deepEqual(hasty.said, []);
    world.advance(1);
    const [expired] = hasty.decisions;
    assert(expired?.type === "refused" && expired.cause === "expired" && expired.retryAfterMs > 0);
    assert.deepEqual([patient.said, patient.position], [[], 0]);
    world.advance(2000);
    assert.deepEqual(patient.said, ["refused"]);
    world.advance(100_000);
    assert.deepEqual([hasty.said.length, patient.said.length], [1, 1]);
    running.permit.release(SUCCESS);
    assert.deepEqual(world.usage("a"), [0, 0]);
  });

  it("come at once to whom may not wait, unless a slot is free", () => {
    const world = new World(one);
    assert.deepEqual(world.ask("a", "m", 0).said, ["granted"]);
    assert.deepEqual(world.ask("a", "m", 0).said, ["refused"]);
  });

  it("hold for deadlines beyond what a timer can count", () => {
    const world = new World(one);
    world.ask("a");
    const waiting = world.ask("a", "m", 2 ** 33);
    world.advance(2 ** 31);
    assert.deepEqual([waiting.said, waiting.position], [[], 0]);
  });
});

describe("caps that reach over backends", () => {
  it("one model's cap holds on two backends together, and what ends on one starts on the other", () => {
    const world = new World({ ...two, models: { m: { a: 4, b: 4 } }, caps: { m: 1 } });
    const running = world.ask("a");
    const waiting = world.ask("b");
    assert.deepEqual([running.said, waiting.said], [["granted"], []]);
    assert.equal(world.candidate("b")?.free, false);
    running.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["granted"]);
    waiting.permit.release(SUCCESS);
    assert.deepEqual([world.candidate("a")?.free, world.candidate("b")?.free], [true, true]);
  });

  it("does not hold another model", () => {
    const models = { m: { a: 4 }, n: { a: 4 } };
    const world = new World({ ...one, models, caps: { m: 1 } });
    world.ask("a");
    assert.deepEqual([world.ask("a").said, world.ask("a", "n").said], [[], ["granted"]]);
  });

  it("changes with the configuration: who waits starts when it is raised", () => {
    const plan = { ...two, models: { m: { a: 4, b: 4 } } };
    const world = new World({ ...plan, caps: { m: 1 } });
    world.ask("a");
    const waiting = [world.ask("a"), world.ask("b"), world.ask("b")];
    world.apply({ ...plan, caps: { m: 3 } });
    assert.equal(waiting.filter(({ said }) => said.includes("granted")).length, 2);
    world.apply(plan);
    assert(waiting.every(({ said }) => said.includes("granted")));
  });

  it("of the process: no more requests to engines than the runtime can do", () => {
    const models = { m: { a: 9 }, n: { b: 9 } };
    const world = new World({ ...two, models }, { upstreamLimit: 2 });
    const first = world.ask("a", "m");
    world.ask("b", "n");
    const waiting = world.ask("b", "n");
    assert.deepEqual(waiting.said, []);
    first.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["granted"]);
  });

  it("of a backend: all its models together", () => {
    const models = { m: { a: 2 }, n: { a: 2 } };
    const world = new World({ backends: { a: { concurrency: 2 } }, models });
    const first = world.ask("a", "m");
    world.ask("a", "m");
    const waiting = world.ask("a", "n");
    assert.deepEqual(waiting.said, []);
    first.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["granted"]);
  });
});

describe("choosing again", () => {
  it("comes when another backend has a free slot and nobody waiting", () => {
    const world = new World(two);
    world.ask("a");
    const other = world.ask("b");
    const [head, next] = [world.ask("a"), world.ask("a")];
    other.permit.release(SUCCESS);
    assert.deepEqual([head.said, next.said, next.position], [["reselect"], [], 0]);
    head.enqueue("b");
    assert.deepEqual(head.said, ["reselect", "granted"]);
  });

  it("does not come while the other has somebody of its own who waits", () => {
    const world = new World(two);
    world.ask("a");
    const other = world.ask("b");
    const [here, there] = [world.ask("a"), world.ask("b")];
    other.permit.release(SUCCESS);
    assert.deepEqual([here.said, there.said], [[], ["granted"]]);
  });

  it("does not send anybody to a backend that is unhealthy or drained", () => {
    for (const state of [{ health: "unhealthy" as const }, { drained: true }]) {
      const world = new World({ ...two, backends: { a: {}, b: state } });
      world.ask("a");
      const waiting = world.ask("a");
      world.apply({ ...two, backends: { a: {}, b: state } });
      assert.deepEqual(waiting.said, [], JSON.stringify(state));
    }
  });

  it("comes when a new backend has a slot, or one that was unhealthy", () => {
    for (const before of [
      one,
      { ...two, backends: { a: {}, b: { health: "unhealthy" as const } } },
    ]) {
      const world = new World(before);
      world.ask("a");
      const waiting = world.ask("a");
      assert.deepEqual(waiting.said, []);
      world.apply(two);
      assert.deepEqual(waiting.said, ["reselect"]);
    }
  });

  it("comes to everybody whom a new backend has a slot for", () => {
    const world = new World(one);
    world.ask("a");
    const waiting = [1, 2, 3, 4].map(() => world.ask("a"));
    world.apply({ ...two, models: { m: { a: 1, b: 3 } } });
    for (let round = 0; round < 10; round++) {
      for (const each of waiting) if (each.said.at(-1) === "reselect") each.enqueue("b");
    }
    assert.deepEqual(world.usage("b"), [3, 0], "all its slots are used");
    assert.deepEqual(world.usage("a"), [1, 1]);
  });

  it("does not go in vain to one of poorer health, least of all before somebody it helps", () => {
    const world = new World({
      backends: { a: {}, b: { health: "degraded" }, c: {}, d: {} },
      models: { m: { a: 1, b: 1 }, n: { c: 1, d: 1 } },
    });
    world.ask("a", "m");
    world.ask("c", "n");
    const other = world.ask("d", "n");
    const [vain, helped] = [world.ask("a", "m"), world.ask("c", "n")];
    other.permit.release(SUCCESS);
    assert.deepEqual([vain.said, helped.said], [[], ["reselect"]]);
  });

  it("keeps the place that one's age gives", () => {
    const world = new World(two);
    world.ask("a");
    const other = world.ask("b");
    world.advance(10);
    const older = world.ask("a");
    world.advance(10);
    const younger = world.ask("b");
    world.apply({ ...two, backends: { a: { drained: true }, b: {} } });
    assert.deepEqual(older.said, ["reselect"]);
    older.enqueue("b");
    assert.deepEqual([older.position, younger.position], [0, 1]);
    other.permit.release(SUCCESS);
    assert.deepEqual([older.said.at(-1), younger.said], ["granted", []]);
  });

  it("comes to everybody when the backend turns unhealthy, once", () => {
    const sick: Plan = { ...two, backends: { a: { health: "unhealthy" }, b: {} } };
    const world = new World(two);
    world.ask("a");
    world.ask("b");
    const waiting = [world.ask("a"), world.ask("a")];
    world.apply(sick);
    assert.deepEqual(
      waiting.map(({ said }) => said),
      [["reselect"], ["reselect"]],
    );
    assert.equal(world.candidate("a")?.failedAt, world.now);
    const [first] = waiting;
    first?.enqueue("a");
    world.apply(sick);
    assert.deepEqual(first?.said, ["reselect"], "it stays unhealthy: that is no news");
    world.apply(two);
    world.apply(sick);
    assert.deepEqual(first?.said, ["reselect", "reselect"]);
  });

  it("comes at once where there is no such backend, lane, or no right to it", () => {
    const world = new World({ ...two, backends: { a: { drained: true }, b: {} } });
    assert.deepEqual(world.ask("a").said, ["reselect"]);
    assert.deepEqual(world.ask("nobody").said, ["reselect"]);
    assert.deepEqual(world.ask("b", "unknown").said, ["reselect"]);
    assert.equal(world.ask("nobody").position, -1);
  });
});

describe("a new snapshot", () => {
  it("lets what runs on a removed backend end, and gives back what it held", () => {
    const world = new World({ ...two, models: { m: { a: 2, b: 2 } }, caps: { m: 2 } });
    const running = world.ask("a");
    world.ask("b");
    const waiting = world.ask("a");
    world.apply({ backends: { b: {} }, models: { m: { b: 2 } }, caps: { m: 2 } });
    assert.deepEqual(waiting.said, ["reselect"]);
    waiting.enqueue("b");
    assert.deepEqual(waiting.said, ["reselect"], "the model's cap is still used up");
    running.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["reselect", "granted"]);
    assert.deepEqual(
      world.fleet.usage().map(({ backend }) => backend),
      ["b"],
    );
  });

  it("keeps a backend's state while id, url and kind stay", () => {
    const world = new World(one);
    const running = world.ask("a");
    running.permit.flowed(77, 0);
    const waiting = world.ask("a");
    world.apply({ backends: { a: { weight: 9, health: "degraded" } }, models: { m: { a: 1 } } });
    assert.deepEqual([waiting.said, waiting.position], [[], 0]);
    assert.equal(world.fleet.lastChunkAt("a"), 77);
    running.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["granted"]);
  });

  for (const change of [{ url: "http://elsewhere" }, { kind: "vllm" as const }]) {
    it(`makes it another backend when ${Object.keys(change)[0]} changes`, () => {
      const world = new World(one);
      const running = world.ask("a");
      const waiting = world.ask("a");
      world.apply({ backends: { a: change }, models: { m: { a: 1 } } });
      assert.deepEqual(waiting.said, ["reselect"]);
      waiting.enqueue("a");
      const { connection, engine } = waiting.permit;
      assert.deepEqual(
        [connection.url, engine.kind],
        ["url" in change ? change.url : "http://a", "kind" in change ? change.kind : "openai"],
      );
      running.permit.release(SUCCESS);
      assert.deepEqual(world.usage("a"), [1, 0], "the old one's end is not the new one's");
    });
  }

  it("sends a model's queue elsewhere when the backend has it no more", () => {
    const plan: Plan = { backends: { a: {}, b: {} }, models: { m: { a: 1, b: 1 }, n: { a: 1 } } };
    const world = new World(plan);
    for (const model of ["m", "n"]) world.ask("a", model);
    const [m, n] = [world.ask("a", "m"), world.ask("a", "n")];
    world.apply({ ...plan, models: { m: { b: 1 }, n: { a: 1 } } });
    assert.deepEqual([m.said, n.said], [["reselect"], []]);
  });
});

describe("candidates", () => {
  it("are a model's targets, with what selection looks at", () => {
    const models = { m: { a: 2, b: 2 }, n: { a: 2 } };
    const world = new World({ backends: { a: { weight: 3 }, b: { health: "unknown" } }, models });
    for (let each = 0; each < 3; each++) world.ask("a", "n");
    for (let each = 0; each < 2; each++) world.ask("b", "m");
    const { target: _, ...a } = world.candidate("a") ?? assert.fail();
    assert.deepEqual(a, {
      health: "healthy",
      startMs: 0,
      firstTokenMs: 0,
      cachedTokens: 0,
      free: true,
      vacant: true,
      resident: true,
      familiar: false,
      late: false,
      roomy: true,
      weight: 3,
      failedAt: null,
      open: false,
      trying: false,
      barred: false,
    });
    const b = world.candidate("b");
    assert.deepEqual(
      [b?.health, b?.free, b?.startMs, b?.target.model],
      ["unknown", false, 10_000, "m@b"],
    );
  });

  it("leave out the drained", () => {
    const world = new World({ ...two, backends: { a: { drained: true }, b: {} } });
    assert.equal(world.candidate("a"), undefined);
    assert.notEqual(world.candidate("b"), undefined);
  });

  it("share the credit of their model, and only of that", () => {
    const world = new World(two);
    assert.equal(world.fleet.creditOf("m"), world.fleet.creditOf("m"));
    assert.notEqual(world.fleet.creditOf("m"), world.fleet.creditOf("n"));
  });
});

describe("usage", () => {
  it("is the slots a backend has, within its sum, and what each model uses", () => {
    const models = { m: { a: 4, b: 3 }, n: { a: 4 } };
    const world = new World({ backends: { a: { concurrency: 5 }, b: {} }, models });
    world.ask("a", "m");
    for (let times = 0; times < 6; times++) world.ask("a", "n");
    const seen = world.fleet.usage().map((each) => ({ ...each, observed: null }));
    assert.deepEqual(seen, [
      {
        backend: "a",
        slots: 5,
        running: 5,
        waiting: 2,
        observed: null,
        models: [
          { model: "m", running: 1, waiting: 0 },
          { model: "n", running: 4, waiting: 2 },
        ],
      },
      {
        backend: "b",
        slots: 3,
        running: 0,
        waiting: 0,
        observed: null,
        models: [{ model: "m", running: 0, waiting: 0 }],
      },
    ]);
  });

  it("has what the answers of each backend showed", () => {
    const world = new World(two);
    const prompt = { promptTokens: 4, cachedTokens: null };
    const speed = { ttftMs: 40, tokensPerSecond: 10 };
    const answered = { at: 5, error: null, tokens: 9, ...speed, ...prompt };
    world.ask("a").permit.release(SUCCESS, answered);
    world.ask("a").permit.release(FAILURE, { ...answered, ttftMs: null, error: "upstream_error" });
    world.ask("a").permit.release(FAILURE);
    const [a, b] = world.fleet.usage().map(({ observed }) => observed);
    assert.deepEqual(
      [a?.ttftMs(0.5), a?.tokensPerSecond, a?.lastError],
      [40, 10, { at: 5, code: "upstream_error" }],
    );
    assert.deepEqual([b?.ttftMs(0.5), b?.lastError], [null, null]);
  });
});

describe("another configuration", () => {
  it("changes the key of the next permit, and neither the backend nor a permit that is out", () => {
    let apiKey: string | null = "old";
    const snapshot = snapshotOf({ ...one, models: { m: { a: 2 } } });
    const fleet = new Fleet({
      now: () => 0,
      maxLength: 1,
      upstreamLimit: Infinity,
      breaker: BREAKER,
      random: () => 0,
      apiKeyOf: () => apiKey,
      look: () => Promise.resolve(false),
      loaded: () => {},
    });
    fleet.apply(snapshot);
    const permits: Permit[] = [];
    const ask = () =>
      fleet.enqueue(
        { ...ALIKE, id: "t", model: "m", arrivedAt: 0, deadlineAt: 9 },
        aTarget("a", "m"),
        (admission) => {
          if (admission.type === "granted") permits.push(admission.permit);
        },
      );
    ask();
    permits[0]?.flowed(7, 0);
    apiKey = "new";
    fleet.apply({ ...snapshot, version: 2 });
    ask();
    assert.deepEqual(
      permits.map(({ connection }) => connection.apiKey),
      ["old", "new"],
    );
    assert.equal(fleet.lastChunkAt("a"), 7, "what was learned of it stays");
    assert.equal(fleet.usage()[0]?.running, 2);
  });

  it("with a longer queue takes in more, for models that are known and for new ones", () => {
    const world = new World(one, { maxLength: 1 });
    world.ask("a");
    world.ask("a");
    assert.deepEqual(world.ask("a").said, ["refused"]);
    world.fleet.maxLength = 2;
    assert.deepEqual(world.ask("a").said, []);
    assert.deepEqual(world.ask("a").said, ["refused"]);
    world.apply({ ...one, models: { m: { a: 1 }, n: { a: 1 } } });
    world.ask("a", "n");
    assert.deepEqual(
      [1, 2, 3].map(() => world.ask("a", "n").said),
      [[], [], ["refused"]],
    );
  });

  it("with a shorter one throws nobody out, and takes nobody in until it is that short", () => {
    const world = new World(one, { maxLength: 3 });
    const running = world.ask("a");
    const waiting = [1, 2, 3].map(() => world.ask("a"));
    world.fleet.maxLength = 1;
    assert.deepEqual(
      waiting.map(({ said }) => said),
      [[], [], []],
    );
    running.permit.release(SUCCESS);
    assert.deepEqual(
      waiting.map(({ said }) => said),
      [["granted"], [], []],
    );
    assert.deepEqual(world.ask("a").said, ["refused"]);
    waiting[0]?.permit.release(SUCCESS);
    waiting[1]?.permit.release(SUCCESS);
    assert.deepEqual(world.ask("a").said, []);
  });
});

describe("a backend that goes and comes back", () => {
  const none: Plan = { backends: {}, models: {} };

  it("runs what it ran: its slots are not free twice", () => {
    const world = new World({ ...one, models: { m: { a: 2 } } });
    const [first, second] = [world.ask("a"), world.ask("a")];
    first.permit.flowed(11, 0);
    const waiting = world.ask("a");
    world.apply(none);
    assert.deepEqual(waiting.said, ["reselect"]);
    assert.deepEqual(world.fleet.usage(), []);
    world.apply({ ...one, models: { m: { a: 2 } } });
    assert.deepEqual(world.usage("a"), [2, 0]);
    assert.equal(world.fleet.lastChunkAt("a"), 11);
    const next = world.ask("a");
    assert.deepEqual(next.said, []);
    first.permit.release(SUCCESS);
    assert.deepEqual(next.said, ["granted"]);
    second.permit.release(SUCCESS);
    next.permit.release(SUCCESS);
    assert.deepEqual(world.usage("a"), [0, 0]);
  });

  it("does so though it went and came several times, and its model meanwhile too", () => {
    const world = new World(one);
    const running = world.ask("a");
    for (const plan of [none, one, { backends: { a: {} }, models: {} }, none, one]) {
      world.apply(plan);
    }
    assert.deepEqual(world.usage("a"), [1, 0]);
    assert.deepEqual(world.ask("a").said, []);
    running.permit.release(SUCCESS);
    assert.deepEqual(world.usage("a"), [1, 0]);
  });

  it("is another one when everything had ended, or at another place", () => {
    const world = new World(one);
    const running = world.ask("a");
    running.permit.flowed(3, 0);
    world.apply({ ...one, backends: { a: { url: "http://elsewhere" } } });
    assert.deepEqual(world.usage("a"), [0, 0]);
    assert.equal(world.fleet.lastChunkAt("a"), -Infinity);
    assert.deepEqual(world.ask("a").said, ["granted"]);
    world.apply(one);
    assert.deepEqual([world.usage("a"), world.fleet.lastChunkAt("a")], [[1, 0], 3]);
    running.permit.release(SUCCESS);
    world.apply(none);
    world.apply(one);
    assert.equal(world.fleet.lastChunkAt("a"), -Infinity, "nothing ran: it starts afresh");
  });

  it("still counts for the caps of its model while it is away", () => {
    const plan = { ...two, models: { m: { a: 2, b: 2 } }, caps: { m: 1 } };
    const world = new World(plan);
    const running = world.ask("a");
    world.apply(none);
    world.apply({ backends: { b: {} }, models: { m: { b: 2 } }, caps: { m: 1 } });
    const waiting = world.ask("b");
    assert.deepEqual(waiting.said, []);
    running.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["granted"]);
  });

  it("leaves nothing behind of models that are gone for good", () => {
    const world = new World(one);
    const credit = world.fleet.creditOf("m");
    const running = world.ask("a");
    world.apply(none);
    assert.equal(world.fleet.creditOf("m"), credit, "something of it still runs");
    running.permit.release(SUCCESS);
    world.apply(none);
    assert.notEqual(world.fleet.creditOf("m"), credit);
  });
});

describe("a breaker", () => {
  const fail = (world: World, backend: string, times: number, verdict = FAILURE, model = "m") => {
    for (let each = 0; each < times; each++) world.ask(backend, model).permit.release(verdict);
  };
  const stateOf = (world: World, backend: string, model: string | null = null) =>
    world.fleet
      .breakers()
      .find((each) => each.backend === backend && each.model === (model ?? null))?.state;
  const pick = (world: World, name = "m") => {
    const selection = select(world.candidates(name), new Map());
    return selection === null ? null : [selection.target.backend, selection.reason];
  };

  it("opens after failures in a row, not before, and not where a success comes between", () => {
    const world = new World(two);
    fail(world, "a", 2);
    fail(world, "a", 1, SUCCESS);
    fail(world, "a", 2);
    assert.deepEqual([stateOf(world, "a"), world.candidate("a")?.open], ["closed", false]);
    fail(world, "a", 1);
    assert.deepEqual([stateOf(world, "a"), world.candidate("a")?.open], ["open", true]);
    assert.deepEqual([stateOf(world, "b"), world.candidate("b")?.open], ["closed", false]);
    assert.deepEqual(pick(world), ["b", "only"]);
  });

  it("that opens sends who waits there to the others, before its slot comes free", () => {
    const world = new World(two);
    fail(world, "a", 2);
    world.ask("b");
    const running = world.ask("a");
    const waiting = [world.ask("a"), world.ask("a")];
    running.permit.release(FAILURE);
    assert.deepEqual(
      waiting.map(({ said }) => said),
      [["reselect"], ["reselect"]],
    );
    assert.deepEqual(world.usage("a"), [0, 0], "none of them was started there");
    assert.deepEqual(pick(world), ["b", "only"]);
    for (const each of waiting) each.enqueue("b");
    assert.deepEqual(
      waiting.map(({ position }) => position),
      [0, 1],
    );
  });

  it("keeps who waits elsewhere from coming, though there is room", () => {
    const world = new World(two);
    fail(world, "a", 3);
    const running = world.ask("b");
    const waiting = world.ask("b");
    assert.equal(world.candidate("a")?.free, true);
    world.advance(5000);
    world.apply(two);
    assert.deepEqual(waiting.said, [], "a trial is for who comes, not for who waits");
    running.permit.release(SUCCESS);
    assert.deepEqual(waiting.said, ["granted"]);
  });

  it("of one model leaves the others alone, in the queue as well", () => {
    const models = { m: { a: 1, b: 1 }, n: { a: 1 } };
    const world = new World({ ...two, models });
    const broken = judge("server_error");
    fail(world, "a", 2, broken);
    const [m, n] = [world.ask("a", "m"), world.ask("a", "n")];
    const [waitsM, waitsN] = [world.ask("a", "m"), world.ask("a", "n")];
    const behind = world.ask("a", "m");
    m.permit.release(broken);
    assert.deepEqual(behind.said, ["reselect"], "also whom no other backend has room for");
    assert.deepEqual([waitsM.said, waitsN.said, waitsN.position], [["reselect"], [], 0]);
    assert.deepEqual(
      [stateOf(world, "a"), stateOf(world, "a", "m"), stateOf(world, "a", "n")],
      ["closed", "open", "closed"],
    );
    assert.deepEqual([pick(world, "m"), pick(world, "n")?.[0]], [["b", "only"], "a"]);
    n.permit.release(SUCCESS);
    assert.deepEqual(waitsN.said, ["granted"]);
  });

  it("of a backend closes it for all its models", () => {
    const models = { m: { a: 1, b: 1 }, n: { a: 1, b: 1 } };
    const world = new World({ ...two, models });
    fail(world, "a", 2, FAILURE, "m");
    world.ask("a", "n");
    const waits = world.ask("a", "n");
    fail(world, "a", 1, FAILURE, "m");
    assert.deepEqual(waits.said, ["reselect"]);
    assert.deepEqual(
      [world.candidate("a", "m")?.open, world.candidate("a", "n")?.open],
      [true, true],
    );
  });

  for (const halfOpenRequests of [1, 2]) {
    it(`lets ${halfOpenRequests} at once try when its time is over, and none of them waits`, () => {
      const breaker = { ...BREAKER, halfOpenRequests };
      const world = new World({ ...two, models: { m: { a: 3, b: 1 } } }, { breaker });
      fail(world, "a", 3);
      world.advance(999);
      assert.equal(world.candidate("a")?.open, true);
      world.advance(1);
      for (let each = 0; each < halfOpenRequests; each++) {
        const { open, trying } = world.candidate("a") ?? assert.fail();
        assert.deepEqual([open, trying], [false, each > 0]);
        assert.deepEqual(world.ask("a").said, ["granted"]);
      }
      assert.equal(stateOf(world, "a"), "half_open");
      const { open, trying, free } = world.candidate("a") ?? assert.fail();
      assert.deepEqual([open, trying, free], [true, true, true]);
      assert.deepEqual(pick(world), ["b", "only"]);
    });
  }

  it("lets nobody try who would have to wait for it", () => {
    const world = new World({ ...two, models: { m: { a: 2, b: 1 } } });
    const long = world.ask("a");
    fail(world, "a", 3);
    world.advance(1000);
    assert.equal(world.candidate("a")?.open, false);
    const trial = world.ask("a");
    assert.deepEqual(trial.said, ["granted"]);
    trial.permit.release(judge("ended"));
    const other = world.ask("a");
    assert.equal(stateOf(world, "a"), "half_open");
    other.permit.release(judge("busy"));
    assert.deepEqual(
      [world.candidate("a")?.free, world.candidate("a")?.open],
      [false, true],
      "held: it is not free",
    );
    world.advance(1000);
    assert.equal(world.candidate("a")?.open, false);
    long.permit.release(SUCCESS);
  });

  it("closes on probation when the answer to a trial begins, before its end", () => {
    const world = new World({ ...one, models: { m: { a: 3 } } });
    fail(world, "a", 3);
    world.advance(1000);
    const { permit } = world.ask("a");
    assert.equal(world.candidate("a")?.open, true);
    permit.proved();
    const { open, trying } = world.candidate("a") ?? assert.fail();
    assert.deepEqual([open, trying, stateOf(world, "a")], [false, false, "closed"]);
    assert.deepEqual(world.ask("a").said, ["granted"]);
    permit.proved();
    permit.release(judge("incomplete"));
    assert.equal(stateOf(world, "a"), "open", "the next failure is enough");
    assert.equal(world.fleet.triedAgainIn(world.snapshot.models[0] ?? assert.fail()), 2000);
  });

  it("drops what comes of a request that began before it opened", () => {
    const world = new World({ ...one, models: { m: { a: 9 } } });
    const early = [1, 2, 3, 4, 5].map(() => world.ask("a"));
    fail(world, "a", 3);
    world.advance(500);
    early[0]?.permit.release(FAILURE);
    early[1]?.permit.release(SUCCESS);
    assert.equal(stateOf(world, "a"), "open", "a late success closes nothing");
    world.advance(500);
    assert.equal(world.candidate("a")?.open, false, "nor does a late failure prolong it");
    const trial = world.ask("a");
    early[2]?.permit.release(FAILURE);
    assert.equal(stateOf(world, "a"), "half_open");
    trial.permit.release(SUCCESS);
    early[3]?.permit.release(FAILURE);
    early[4]?.permit.release(FAILURE);
    assert.deepEqual(world.fleet.breakerOf("a"), { state: "closed", failures: 0, untilAt: null });
  });

  it("gives a trial's place to the next when its client leaves, without a verdict", () => {
    for (const leave of [
      (trial: Asking) => trial.permit.release(judge("ended")),
      (trial: Asking) => trial.leave(),
    ]) {
      const world = new World({ ...one, models: { m: { a: 2 } } });
      fail(world, "a", 3);
      world.advance(1000);
      for (let each = 0; each < 50; each++) {
        const trial = world.ask("a");
        assert.equal(world.candidate("a")?.open, true);
        leave(trial);
        const { open, trying } = world.candidate("a") ?? assert.fail();
        assert.deepEqual([open, trying, stateOf(world, "a")], [false, false, "half_open"]);
      }
      world.ask("a").permit.release(SUCCESS);
      assert.equal(stateOf(world, "a"), "closed");
    }
  });

  it("is tried at once when a probe succeeds after it had failed", () => {
    for (const health of ["unhealthy", "degraded"] as const) {
      const world = new World(two);
      fail(world, "a", 3);
      world.apply(two);
      assert.equal(world.candidate("a")?.open, true, "it was healthy before: that is no news");
      world.apply({ ...two, backends: { a: { health }, b: {} } });
      assert.equal(world.candidate("a")?.open, true);
      world.apply(two);
      assert.equal(world.candidate("a")?.open, false);
      assert.equal(world.fleet.triedAgainIn(world.snapshot.models[0] ?? assert.fail()), 0);
      assert.deepEqual(world.ask("a").said, ["granted"]);
      assert.equal(world.candidate("a")?.open, true, "one at a time");
    }
  });

  it("of a model is tried at once then, too", () => {
    const world = new World(two);
    fail(world, "a", 3, judge("server_error"));
    world.apply({ ...two, backends: { a: { health: "degraded" }, b: {} } });
    assert.equal(world.candidate("a")?.open, true);
    world.apply(two);
    assert.equal(world.candidate("a")?.open, false);
  });

  it("stays as it is through new snapshots, for as long as the backend does", () => {
    const world = new World(two);
    fail(world, "a", 3);
    world.apply({ ...two, backends: { a: { weight: 3, concurrency: 7 }, b: {} } });
    world.apply({ ...two, models: { m: { a: 5, b: 1 }, n: { a: 1 } } });
    assert.deepEqual([stateOf(world, "a"), world.candidate("a", "n")?.open], ["open", true]);
    world.advance(1000);
    const trial = world.ask("a");
    world.apply({ backends: { b: {} }, models: { m: { b: 1 } } });
    world.apply(two);
    assert.deepEqual(
      [stateOf(world, "a"), world.candidate("a")?.trying],
      ["half_open", true],
      "gone and back while its trial runs",
    );
    trial.permit.release(FAILURE);
    assert.equal(world.fleet.triedAgainIn(world.snapshot.models[0] ?? assert.fail()), 2000);
    world.apply({ ...two, backends: { a: { url: "http://elsewhere" }, b: {} } });
    assert.equal(stateOf(world, "a"), "closed", "at another place it is another one");
  });

  it("keeps a hold, too, while the backend is away and something still runs there", () => {
    const world = new World({ ...one, models: { m: { a: 2 } } });
    const running = world.ask("a");
    world.ask("a").permit.release(judge("busy"));
    world.apply({ backends: {}, models: {} });
    world.apply({ ...one, models: { m: { a: 2 } } });
    assert.equal(world.candidate("a")?.free, false);
    world.advance(1000);
    assert.equal(world.candidate("a")?.free, true);
    running.permit.release(SUCCESS);
  });

  it("follows a reload at its next decision", () => {
    const world = new World({ ...one, models: { m: { a: 4 } } });
    fail(world, "a", 2);
    world.fleet.breaker = { failureThreshold: 5, resetTimeoutMs: 50, halfOpenRequests: 2 };
    fail(world, "a", 2);
    assert.equal(stateOf(world, "a"), "closed");
    fail(world, "a", 1);
    assert.equal(world.fleet.triedAgainIn(world.snapshot.models[0] ?? assert.fail()), 50);
    world.advance(50);
    world.ask("a");
    assert.equal(world.candidate("a")?.open, false);
    world.ask("a");
    assert.equal(world.candidate("a")?.open, true);
  });

  it("tells when the first of a model's open backends is tried again; null where none is open", () => {
    const world = new World({ backends: { a: {}, b: {}, c: {} }, models: { m: { a: 1, b: 1 } } });
    const model = world.snapshot.models[0] ?? assert.fail();
    assert.equal(world.fleet.triedAgainIn(model), null);
    fail(world, "a", 3);
    world.advance(300);
    assert.equal(world.fleet.triedAgainIn(model), 700);
    fail(world, "b", 3);
    assert.equal(world.fleet.triedAgainIn(model), 700);
    world.advance(900);
    assert.equal(world.fleet.triedAgainIn(model), 0, "never in the past");
  });

  it("is told of by its state, its failures, and until when it is open", () => {
    const world = new World(one);
    assert.deepEqual(world.fleet.breakerOf("a"), { state: "closed", failures: 0, untilAt: null });
    assert.deepEqual(world.fleet.breakerOf("nobody"), {
      state: "closed",
      failures: 0,
      untilAt: null,
    });
    fail(world, "a", 2);
    assert.equal(world.fleet.breakerOf("a").failures, 2);
    fail(world, "a", 1);
    const before = Date.now();
    const { state, failures, untilAt } = world.fleet.breakerOf("a");
    assert.deepEqual([state, failures], ["open", 3]);
    assert(untilAt !== null && untilAt >= before + 1000 && untilAt <= Date.now() + 1001);
    world.advance(1000);
    world.ask("a");
    assert.deepEqual(world.fleet.breakerOf("a"), {
      state: "half_open",
      failures: 3,
      untilAt: null,
    });
  });

  it("lets one at a time try where nothing else is left, also before its time", () => {
    const world = new World({ ...two, models: { m: { a: 2, b: 2 } } });
    fail(world, "b", 3);
    world.advance(10);
    fail(world, "a", 3);
    assert.deepEqual(pick(world), ["b", "trial"]);
    const trial = world.ask("b");
    assert.equal(pick(world), null);
    world.advance(10);
    trial.permit.release(FAILURE);
    assert.deepEqual(pick(world), ["a", "trial"], "b has failed more recently");
    const other = world.ask("a");
    assert.equal(pick(world), null);
    other.permit.proved();
    assert.deepEqual(pick(world), ["a", "only"]);
  });

  it("takes over who waits elsewhere when it closes by the beginning of an answer", () => {
    const world = new World({ ...two, models: { m: { a: 2, b: 1 } } });
    fail(world, "a", 3);
    world.ask("b");
    const waiting = world.ask("b");
    world.advance(1000);
    const trial = world.ask("a");
    assert.deepEqual(waiting.said, []);
    trial.permit.proved();
    assert.deepEqual(waiting.said, ["reselect"]);
  });

  it("counts a request to an unhealthy backend as the one trial, whatever its breaker", () => {
    const world = new World({ ...two, backends: { a: { health: "unhealthy" }, b: {} } });
    const trial = world.ask("a");
    assert.equal(world.candidate("a")?.trying, true);
    trial.permit.proved();
    assert.equal(world.candidate("a")?.trying, false);
    trial.permit.release(SUCCESS);
    assert.equal(world.candidate("a")?.trying, false);
  });
});

describe("a stream that stands still", () => {
  it("makes its backend stuck until another one flows, or until a breaker would try again", () => {
    const world = new World(two);
    const { fleet } = world;
    assert.equal(fleet.isStuck("a"), false, "nothing has stood still yet");
    const asked = world.ask("a");
    asked.permit.flowed(world.now, 0);
    world.advance(10);
    asked.permit.stalled();
    assert.deepEqual(
      [fleet.isStuck("a"), fleet.isStuck("b"), fleet.isStuck("none")],
      [true, false, false],
    );
    world.advance(10);
    asked.permit.flowed(world.now, 0);
    assert.equal(fleet.isStuck("a"), false, "something flows");
    world.advance(10);
    asked.permit.stalled();
    world.advance(fleet.breaker.resetTimeoutMs - 1);
    assert.equal(fleet.isStuck("a"), true);
    world.advance(1);
    assert.equal(fleet.isStuck("a"), false, "it may try again");
  });
});

describe("an engine that is busy", () => {
  const busy = judge("busy");

  it("gets nothing more for a second, and that counts for nothing", () => {
    const world = new World({ ...two, models: { m: { a: 9, b: 2 } } });
    const running = [1, 2, 3, 4, 5, 6, 7, 8, 9].map(() => world.ask("a"));
    for (const each of running) each.permit.release(busy);
    const { state, failures } = world.fleet.breakerOf("a");
    assert.deepEqual([state, failures], ["closed", 0]);
    const { free, open, failedAt } = world.candidate("a") ?? assert.fail();
    assert.deepEqual([free, open, failedAt], [false, false, null]);
    assert.equal(world.candidate("b")?.free, true);
    world.advance(999);
    assert.equal(world.candidate("a")?.free, false);
    world.advance(1);
    assert.equal(world.candidate("a")?.free, true);
  });

  it("sends who waits there where there is room; where there is none they wait for its time", () => {
    const world = new World(two);
    const [running, other] = [world.ask("a"), world.ask("b")];
    const waiting = [world.ask("a"), world.ask("a")];
    running.permit.release(busy);
    assert.deepEqual(waiting[0]?.said, [], "nobody follows at once");
    other.permit.release(SUCCESS);
    assert.deepEqual(waiting[0]?.said, ["reselect"]);
    waiting[0]?.enqueue("b");
    assert.deepEqual(waiting[0]?.said, ["reselect", "granted"]);
    world.advance(999);
    assert.deepEqual(waiting[1]?.said, []);
    world.advance(1);
    assert.deepEqual(waiting[1]?.said, ["granted"]);
  });

  it("is tried before its time when one of its requests ends", () => {
    const world = new World({ ...one, models: { m: { a: 2 } } });
    const [running, back] = [world.ask("a"), world.ask("a")];
    const waits = world.ask("a");
    back.permit.release(busy);
    assert.deepEqual([waits.said, world.usage("a")], [[], [1, 1]]);
    running.permit.release(SUCCESS);
    assert.deepEqual(waits.said, ["granted"]);
  });

  it("is held anew by each that it sends back", () => {
    const world = new World({ ...one, models: { m: { a: 2 } } });
    const [first, second] = [world.ask("a"), world.ask("a")];
    const waits = world.ask("a");
    first.permit.release(busy);
    world.advance(600);
    second.permit.release(busy);
    world.advance(600);
    assert.deepEqual(waits.said, []);
    world.advance(400);
    assert.deepEqual(waits.said, ["granted"]);
  });

  it("takes over who waits elsewhere when its time is over", () => {
    const world = new World(two);
    const [running, back] = [world.ask("a"), world.ask("b")];
    const waiting = world.ask("a");
    back.permit.release(busy);
    assert.deepEqual(waiting.said, []);
    world.advance(1000);
    assert.deepEqual(waiting.said, ["reselect"]);
    running.permit.release(SUCCESS);
  });

  it("lets those who wait for it expire in time", () => {
    const world = new World(one);
    const running = world.ask("a");
    const hasty = world.ask("a", "m", 300);
    const patient = world.ask("a", "m", 5000);
    running.permit.release(busy);
    world.advance(300);
    assert.deepEqual([hasty.said, patient.said], [["refused"], []]);
    world.advance(700);
    assert.deepEqual(patient.said, ["granted"]);
  });
});

describe("close", () => {
  it("leaves no timer", () => {
    const world = new World(one);
    world.ask("a");
    const waiting = [world.ask("a", "m", 1000), world.ask("a", "m", 500)];
    world.fleet.close();
    world.advance(100_000);
    assert.deepEqual(
      waiting.map(({ said }) => said),
      [[], []],
    );
  });
});

/*
 * Any order of requests, endings and snapshots, driven as the data plane does: whoever has to
 * choose again takes a backend with room, else any; whoever ends gives up every place it had.
 */

const BACKENDS = ["a", "b", "c"];
const MODELS = ["m", "n"];
const anyPlan: fc.Arbitrary<Plan> = fc
  .record({
    backends: fc.uniqueArray(
      fc.record({
        id: fc.constantFrom(...BACKENDS),
        health: fc.constantFrom<Health>("healthy", "healthy", "unhealthy"),
        drained: fc.constantFrom(false, false, false, true),
        url: fc.constantFrom("http://1", "http://1", "http://2"),
        concurrency: fc.constantFrom(null, 1, 3),
      }),
      { selector: ({ id }) => id },
    ),
    slots: fc.array(fc.nat({ max: 3 }), { minLength: 6, maxLength: 6 }),
    caps: fc.array(fc.constantFrom(0, 1, 2), { minLength: 2, maxLength: 2 }),
  })
  .map(({ backends, slots, caps }): Plan => {
    const models = MODELS.map((model, row) => {
      const lanes = backends
        .map(({ id }, at): [string, number] => [id, slots[row * 3 + at] ?? 0])
        .filter(([, each]) => each > 0);
      return [model, Object.fromEntries(lanes)] as const;
    });
    const limits = MODELS.map((model, at) => [model, caps[at] ?? 0] as const);
    return {
      backends: Object.fromEntries(backends.map(({ id, ...more }) => [id, more])),
      models: Object.fromEntries(models),
      caps: Object.fromEntries(limits.filter(([, limit]) => limit > 0)),
    };
  });

const nat = fc.nat({ max: 50 });
const anyClaim = fc.record({
  flow: fc.constantFrom("x", "x", "y"),
  priority: fc.constantFrom<Ticket["priority"]>("interactive", "default", "default", "batch"),
});
const anyStep = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      type: fc.constant("ask" as const),
      backend: fc.constantFrom(...BACKENDS),
      model: fc.constantFrom(...MODELS),
      patience: fc.nat({ max: 500 }),
      claim: anyClaim,
    }),
  },
  { weight: 4, arbitrary: fc.record({ type: fc.constant("release" as const), pick: nat }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant("leave" as const), pick: nat }) },
  {
    weight: 2,
    arbitrary: fc.record({ type: fc.constant("advance" as const), by: fc.nat({ max: 300 }) }),
  },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("apply" as const), plan: anyPlan }) },
);
type Step = typeof anyStep extends fc.Arbitrary<infer Each> ? Each : never;

interface DriveOptions {
  /** What a request gives up when it ends; the data plane gives up all it ever waited in. */
  leaves?: "all" | "latest";
  /** Who comes takes a backend with room, where there is one, and nobody may wait beside one. */
  isSpread?: boolean;
}

/** Drives a world and keeps books of who waits and who runs. */
class Drive {
  readonly world: World;
  readonly #leaves: "all" | "latest";
  readonly #isSpread: boolean;
  asking: Asking[] = [];
  running: Asking[] = [];
  /** Whoever has ended, and how many decisions it had by then. */
  readonly ended = new Map<Asking, number>();

  constructor({ leaves = "latest", isSpread = false }: DriveOptions) {
    this.#leaves = leaves;
    this.#isSpread = isSpread;
    const open = { a: 1, b: 2 };
    const plan = { backends: { a: {}, b: {} }, models: { m: open, n: open }, caps: { n: 2 } };
    const tight = { maxLength: 3, upstreamLimit: 4 };
    this.world = new World(plan, isSpread ? { maxLength: 20 } : tight);
  }

  end(each: Asking): void {
    this.asking = this.asking.filter((other) => other !== each);
    this.running = this.running.filter((other) => other !== each);
    each.leave(this.#leaves);
    this.ended.set(each, each.decisions.length);
  }

  take(step: Step): void {
    switch (step.type) {
      case "ask":
        this.asking.push(
          this.world.ask(this.#backendFor(step), step.model, step.patience, step.claim),
        );
        break;
      case "release": {
        const each = this.running[step.pick % Math.max(1, this.running.length)];
        if (each === undefined) break;
        each.permit.release(SUCCESS);
        this.end(each);
        break;
      }
      case "leave": {
        const all = [...this.asking, ...this.running];
        const each = all[step.pick % Math.max(1, all.length)];
        if (each !== undefined) this.end(each);
        break;
      }
      case "advance":
        this.world.advance(step.by);
        break;
      case "apply":
        this.world.apply(step.plan);
    }
    this.settle();
  }

  /** Reads the decisions until there is none left to act on. */
  settle(): void {
    for (let rounds = 0; ; rounds++) {
      assert(rounds < 100, "chooses again for ever");
      const moved = this.asking.filter((each) => this.#act(each));
      if (moved.length === 0) return;
    }
  }

  #act(each: Asking): boolean {
    const decision = each.decisions[each.places.length - 1];
    assert(each.decisions.length <= each.places.length, "one decision per place");
    if (decision === undefined) return false;
    switch (decision.type) {
      case "granted":
        this.asking = this.asking.filter((other) => other !== each);
        this.running.push(each);
        break;
      case "refused":
        this.end(each);
        break;
      case "reselect":
        this.#chooseAgain(each);
    }
    return true;
  }

  #backendFor({ backend, model }: { backend: string; model: string }): string {
    const free = this.#usable(model).find((each) => each.free);
    return this.#isSpread && free !== undefined ? free.target.backend : backend;
  }

  #usable(name: string, as: Partial<Ticket> = {}) {
    const candidates = this.world.candidates(name, as);
    return candidates.filter(({ health }) => health !== "unhealthy");
  }

  #chooseAgain(each: Asking): void {
    const usable = this.#usable(each.ticket.model, each.ticket);
    const chosen = usable.find(({ free }) => free) ?? usable[0];
    if (chosen === undefined) this.end(each);
    else each.enqueue(chosen.target.backend);
  }

  check(): void {
    for (const [each, count] of this.ended) {
      assert.equal(each.decisions.length, count, "told something after its end");
    }
    for (const backend of Object.values(this.world.fleet.usage())) {
      const running = this.running.filter(({ permit }) => permit.connection.id === backend.backend);
      const used = backend.models.reduce((sum, { running: count }) => sum + count, 0);
      assert(used <= running.length, "a slot is held that nobody uses");
    }
    const usage = this.world.fleet.usage().flatMap(({ models }) => models);
    const waiting = usage.reduce((sum, each) => sum + each.waiting, 0);
    assert.equal(waiting, this.asking.length, "the queues hold who waits, and nobody else");
    for (const each of this.asking) assert(each.position >= 0, "waits nowhere");
  }

  checkSpread(): void {
    for (const { ticket } of this.asking) {
      const idle = this.#usable(ticket.model).find(({ free }) => free);
      assert(!idle, `${ticket.model} waits while ${idle?.target.backend} has room for it`);
    }
  }
}

function drive(steps: readonly Step[], options: DriveOptions = {}): Drive {
  const driven = new Drive(options);
  for (const step of steps) {
    driven.take(step);
    driven.check();
    if (options.isSpread === true) driven.checkSpread();
  }
  return driven;
}

const anySteps = fc.array(anyStep, { maxLength: 60, size: "max" });

/** Patient requests, and backends that come and go in good health. */
const busySteps = fc.array(
  fc.oneof(
    {
      weight: 5,
      arbitrary: fc.record({
        type: fc.constant("ask" as const),
        backend: fc.constant("a"),
        model: fc.constantFrom(...MODELS),
        patience: fc.constant(100_000),
        claim: anyClaim,
      }),
    },
    { weight: 2, arbitrary: fc.record({ type: fc.constant("release" as const), pick: nat }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant("leave" as const), pick: nat }) },
    {
      weight: 1,
      arbitrary: fc.record({
        type: fc.constant("apply" as const),
        plan: fc.subarray(["b", "c"]).map((more): Plan => {
          const ids = ["a", ...more];
          const slots = Object.fromEntries(ids.map((id, at) => [id, at + 1]));
          return {
            backends: Object.fromEntries(ids.map((id) => [id, {}])),
            models: { m: slots, n: slots },
          };
        }),
      }),
    },
  ),
  { maxLength: 40, size: "max" },
);

describe("any order of requests and snapshots", () => {
  it("decides once per place, and keeps its queues equal to who waits", () => {
    fc.assert(
      fc.property(anySteps, (steps) => void drive(steps)),
      { numRuns: 150 },
    );
  });

  it("does so too when whoever ends gives up its earlier places again", () => {
    fc.assert(
      fc.property(anySteps, (steps) => void drive(steps, { leaves: "all" })),
      { numRuns: 150 },
    );
  });

  it("lets nobody wait while another backend has room", () => {
    fc.assert(fc.property(busySteps, (steps) => void drive(steps, { isSpread: true })));
  });

  it("comes to rest with nothing running and nobody waiting", () => {
    fc.assert(
      fc.property(anySteps, (steps) => {
        const driven = drive(steps);
        while (driven.running.length > 0) driven.take({ type: "release", pick: 0 });
        driven.world.advance(1000);
        driven.settle();
        while (driven.running.length > 0) driven.take({ type: "release", pick: 0 });
        assert.deepEqual([driven.asking, driven.running], [[], []]);
        for (const { models } of driven.world.fleet.usage()) {
          for (const each of models) assert.deepEqual([each.running, each.waiting], [0, 0]);
        }
        // The caps that reach over backends have come back as well: the process's is 4.
        const open = { a: 2, b: 2, c: 2 };
        const plan = { backends: { a: {}, b: {}, c: {} }, models: { m: open, n: open } };
        driven.world.apply(plan);
        const all = BACKENDS.flatMap((id) => [driven.world.ask(id), driven.world.ask(id, "n")]);
        assert.equal(all.filter(({ said }) => said[0] === "granted").length, 4);
      }),
      { numRuns: 100 },
    );
  });
});

/*
 * Any order of verdicts, too: driven as the data plane does, through selection. The books are kept
 * from what the fleet says of its breakers, and from who was granted what.
 */

const FAULTS: Fault[] = [
  "unreachable",
  "unreachable",
  "server_error",
  "server_error",
  "busy",
  "incomplete",
  "timeout",
  "rejected",
  "unsupported",
  "ended",
];
const anyVerdict: fc.Arbitrary<Verdict> = fc.constantFrom(
  SUCCESS,
  SUCCESS,
  ...FAULTS.map((each) => judge(each)),
);
const guardedStep = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({
      type: fc.constant("ask" as const),
      model: fc.constantFrom(...MODELS),
      patience: fc.nat({ max: 5000 }),
      claim: anyClaim,
    }),
  },
  {
    weight: 8,
    arbitrary: fc.record({
      type: fc.constant("release" as const),
      pick: nat,
      verdict: anyVerdict,
      // The same again and again opens a breaker.
      times: fc.integer({ min: 1, max: 3 }),
    }),
  },
  { weight: 3, arbitrary: fc.record({ type: fc.constant("prove" as const), pick: nat }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant("leave" as const), pick: nat }) },
  {
    weight: 3,
    arbitrary: fc.record({ type: fc.constant("advance" as const), by: fc.nat({ max: 1500 }) }),
  },
  { weight: 2, arbitrary: fc.record({ type: fc.constant("apply" as const), plan: anyPlan }) },
  {
    weight: 1,
    arbitrary: fc.record({
      type: fc.constant("reload" as const),
      failureThreshold: fc.integer({ min: 1, max: 3 }),
      resetTimeoutMs: fc.integer({ min: 1, max: 2000 }),
    }),
  },
);
type GuardedStep = typeof guardedStep extends fc.Arbitrary<infer Each> ? Each : never;

/** Who tries what, by "backend" and "backend model". */
type Trials = Map<string, Set<Asking>>;

class Guarded {
  readonly world: World;
  readonly breaker: BreakerSettings;
  asking: Asking[] = [];
  running: Asking[] = [];
  readonly ended = new Map<Asking, number>();
  readonly #trials: Trials = new Map();

  constructor(halfOpenRequests: number) {
    this.breaker = { failureThreshold: 2, resetTimeoutMs: 500, halfOpenRequests };
    const open = { a: 3, b: 2 };
    const plan = { backends: { a: {}, b: {} }, models: { m: open, n: open } };
    const limits = { maxLength: 4, upstreamLimit: 6, breaker: this.breaker };
    this.world = new World(plan, limits);
  }

  take(step: GuardedStep): void {
    const { world } = this;
    switch (step.type) {
      case "ask":
        this.#choose(step.model, step.claim, (backend) =>
          world.ask(backend, step.model, step.patience, step.claim),
        );
        break;
      case "release":
        for (let each = 0; each < step.times; each++) this.#release(step.pick, step.verdict);
        break;
      case "prove":
        this.running[step.pick % Math.max(1, this.running.length)]?.permit.proved();
        break;
      case "leave": {
        const all = [...this.asking, ...this.running];
        const each = all[step.pick % Math.max(1, all.length)];
        if (each !== undefined) this.#end(each);
        break;
      }
      case "advance":
        world.advance(step.by);
        break;
      case "apply":
        world.apply(step.plan);
        break;
      case "reload": {
        const { type: _, ...more } = step;
        world.fleet.breaker = { ...this.breaker, ...more };
      }
    }
    this.#sync();
    this.settle();
  }

  #release(pick: number, verdict: Verdict): void {
    const each = this.running[pick % Math.max(1, this.running.length)];
    if (each === undefined) return;
    each.permit.release(verdict);
    this.#end(each);
    this.#sync();
    this.settle();
  }

  #end(each: Asking): void {
    this.asking = this.asking.filter((other) => other !== each);
    this.running = this.running.filter((other) => other !== each);
    each.leave();
    this.ended.set(each, each.decisions.length);
    this.#sync();
  }

  /** Sends a request where selection says; it is not begun where there is nowhere to go. */
  #choose(name: string, as: Partial<Ticket>, send: (backend: string) => Asking): boolean {
    const candidates = this.world.candidates(name, as);
    const selection = select(candidates, this.world.fleet.creditOf(name));
    if (selection === null) return false;
    const { backend } = selection.target;
    const chosen = candidates.find(({ target }) => target.backend === backend);
    const isTrial =
      selection.reason === "trial" || this.#states(backend, name).some((each) => each !== "closed");
    const asking = send(backend);
    this.#note(asking, backend, name);
    if (!this.asking.includes(asking)) this.asking.push(asking);
    if (isTrial) {
      assert.equal(asking.said.at(-1), "granted", "a trial starts at once");
      assert.equal(chosen?.free, true);
    }
    return true;
  }

  #states(backend: string, model: string) {
    return this.world.fleet
      .breakers()
      .filter((each) => each.backend === backend && [null, model].includes(each.model))
      .map(({ state }) => state);
  }

  /** Books a grant that made a breaker half-open, or came while it was. */
  #note(asking: Asking, backend: string, model: string): void {
    if (asking.said.at(-1) !== "granted") return;
    const [ofBackend, ofModel] = this.#states(backend, model);
    for (const [key, state] of [
      [backend, ofBackend],
      [`${backend} ${model}`, ofModel],
    ] as const) {
      if (state !== "half_open") continue;
      const trials = this.#trials.get(key) ?? new Set();
      trials.add(asking);
      this.#trials.set(key, trials);
    }
    this.#sync();
  }

  /** A transition ends all trials. */
  #sync(): void {
    const states = new Map(
      this.world.fleet
        .breakers()
        .map(({ backend, model, state }) => [
          model === null ? backend : `${backend} ${model}`,
          state,
        ]),
    );
    for (const [key, trials] of this.#trials) {
      for (const each of trials) if (this.ended.has(each)) trials.delete(each);
      if (states.get(key) !== "half_open") trials.clear();
      assert(
        trials.size <= this.breaker.halfOpenRequests,
        `${trials.size} try ${key}, ${this.breaker.halfOpenRequests} may`,
      );
    }
  }

  settle(): void {
    for (let rounds = 0; ; rounds++) {
      assert(rounds < 100, "chooses again for ever");
      if (!this.asking.some((each) => this.#act(each))) return;
    }
  }

  #act(each: Asking): boolean {
    assert(each.decisions.length <= each.places.length, "one decision per place");
    const decision = each.decisions[each.places.length - 1];
    if (decision === undefined) return false;
    if (decision.type === "granted") {
      this.asking = this.asking.filter((other) => other !== each);
      this.running.push(each);
    } else if (decision.type === "refused") {
      this.#end(each);
    } else {
      const again = (backend: string) => {
        each.enqueue(backend);
        return each;
      };
      if (!this.#choose(each.ticket.model, each.ticket, again)) this.#end(each);
    }
    return true;
  }

  check(): void {
    const { fleet } = this.world;
    for (const [each, count] of this.ended) {
      assert.equal(each.decisions.length, count, "told something after its end");
    }
    const usage = fleet.usage();
    const waiting = usage.reduce((sum, each) => sum + each.waiting, 0);
    assert.equal(waiting, this.asking.length, "the queues hold who waits, and nobody else");
    for (const { backend, model, state } of fleet.breakers()) {
      if (state === "closed") continue;
      const models = usage.find((each) => each.backend === backend)?.models ?? [];
      for (const each of models) {
        if (model !== null && model !== each.model) continue;
        assert.equal(each.waiting, 0, `somebody waits for ${each.model} at ${backend}: ${state}`);
      }
    }
    for (const model of new Set(this.asking.map(({ ticket }) => ticket.model))) {
      const idle = BACKENDS.find((id) => this.#isIdle(id, model));
      assert(!idle, `${model} waits while ${idle} has room for it`);
    }
  }

  /** Whoever waits could start there at once. */
  #isIdle(backend: string, name: string): boolean {
    const candidates = this.world.candidates(name);
    const found = candidates.find(({ target }) => target.backend === backend);
    const isClosed = this.#states(backend, name).every((state) => state === "closed");
    return found?.health === "healthy" && found.free && isClosed;
  }

  /** Ends all that runs, as often as that starts another. */
  drain(): void {
    for (let rounds = 0; this.running.length > 0; rounds++) {
      assert(rounds < 1000, "never comes to rest");
      this.take({ type: "release", pick: 0, verdict: judge("ended"), times: 1 });
    }
  }
}

const guardedSteps = fc.array(guardedStep, { maxLength: 80, size: "max" });

describe("any order of verdicts and snapshots", () => {
  it("never has more trials than may be, none that waits, and comes to rest with nothing held", () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 3 }), guardedSteps, (halfOpenRequests, steps) => {
        const driven = new Guarded(halfOpenRequests);
        for (const step of steps) {
          driven.take(step);
          driven.check();
        }
        driven.drain();
        driven.world.advance(6000);
        driven.take({ type: "advance", by: 0 });
        driven.drain();
        driven.check();
        assert.deepEqual([driven.asking, driven.running], [[], []]);
        const { world } = driven;
        for (const { running, waiting, models } of world.fleet.usage()) {
          assert.deepEqual([running, waiting], [0, 0]);
          for (const each of models) assert.deepEqual([each.running, each.waiting], [0, 0]);
        }
        // However it stands with its breakers, one good trial each is enough.
        const open = { a: 2, b: 2, c: 2 };
        const health = "healthy" as const;
        const backends = { a: { health }, b: { health }, c: { health } };
        world.apply({ backends, models: { m: open, n: open } });
        world.fleet.breaker = driven.breaker;
        world.advance(20_000);
        for (const id of BACKENDS) {
          for (const model of MODELS) {
            const { open: isOpen, trying, startMs, free } = world.candidate(id, model) ?? {};
            assert.deepEqual([isOpen, trying, startMs, free], [false, false, 0, true], id);
            world.ask(id, model).permit.release(SUCCESS);
          }
        }
        assert(world.fleet.breakers().every(({ state }) => state === "closed"));
        const all = BACKENDS.flatMap((id) =>
          MODELS.flatMap((model) => [world.ask(id, model), world.ask(id, model)]),
        );
        const granted = all.filter(({ said }) => said[0] === "granted").length;
        assert.equal(granted, 6, "the process's cap has come back as well");
      }),
      { numRuns: 400 },
    );
  });
});
