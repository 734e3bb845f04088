/** One request's way to a permit: chosen, waited for, chosen again, given up. */
import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import { schema } from "../../src/config.ts";
import { judge, SUCCESS } from "../../src/core/outcome.ts";
import type { Backend, Snapshot } from "../../src/core/snapshot.ts";
import { admit, waitingOf, type AdmitOptions } from "../../src/data/admit.ts";
import { Exchange } from "../../src/data/exchange.ts";
import { prepareAccess } from "../../src/data/identify.ts";
import type { Plane } from "../../src/data/plane.ts";
import { readView, type Endpoint } from "../../src/dialects/dialect.ts";
import { chatCompletions, rerank } from "../../src/dialects/openai.ts";
import { GatewayError } from "../../src/errors.ts";
import { Fleet } from "../../src/fleet/fleet.ts";
import { Log } from "../../src/telemetry/log.ts";
import { untraced } from "../../src/telemetry/tracing.ts";
import { emptyPlane } from "../support/plane.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";

const FAILURE = judge("unreachable");

function snapshotOf(models: Record<string, string[]>, more: Partial<Backend> = {}): Snapshot {
  const ids = [...new Set(Object.values(models).flat())].toSorted((a, b) => (a < b ? -1 : 1));
  return aSnapshot(
    ids.map((id) => aBackend(id, { kind: "ollama", ...more })),
    Object.entries(models).map(([name, backends]) =>
      aModel(
        name,
        backends.map((backend) => aTarget(backend, name)),
      ),
    ),
  );
}

function withKinds(snapshot: Snapshot, kinds: Record<string, string>): Snapshot {
  const backends = snapshot.backends.map((each) => ({
    ...each,
    kind: kinds[each.id] ?? each.kind,
  }));
  return { ...snapshot, backends };
}

/** Everything around a request but the request: one slot per model and backend, a clock of its own. */
class House {
  now = 1000;
  snapshot: Snapshot;
  readonly fleet: Fleet;
  readonly plane: Plane;
  /** How often somebody looked at the newest snapshot: to choose again for ever would hang the test. */
  #looks = 0;

  constructor(models: Record<string, string[]>, more: Partial<Backend> = {}) {
    const config = schema.parse({ queue: { maxWaitMs: 5000, maxLength: 2 } });
    const now = () => this.now;
    this.fleet = new Fleet({
      now,
      maxLength: 2,
      upstreamLimit: Infinity,
      breaker: config.circuitBreaker,
      random: () => 0,
      apiKeyOf: () => null,
      look: () => Promise.resolve(false),
      loaded: () => {},
    });
    this.snapshot = snapshotOf(models, more);
    this.fleet.apply(this.snapshot);
    this.plane = {
      ...emptyPlane(config),
      config,
      access: prepareAccess(config, []),
      fleet: this.fleet,
      log: new Log({ level: "error", json: true, colour: false, write: () => {} }),
      tracing: untraced,
      now,
      snapshot: () => {
        this.#looks++;
        assert(this.#looks < 100, "chooses again for ever");
        return this.snapshot;
      },
      probe: () => Promise.resolve(false),
    };
  }

  apply(models: Record<string, string[]>, more: Partial<Backend> = {}): void {
    this.snapshot = snapshotOf(models, more);
    this.fleet.apply(this.snapshot);
  }

  advance(by: number): void {
    this.now += by;
    mock.timers.tick(by);
  }

  request(
    model: string,
    headers: Record<string, string> = {},
    endpoint: Endpoint = chatCompletions,
  ) {
    const request = new Request(`http://localhost${endpoint.path}`, { method: "POST", headers });
    const exchange = new Exchange(this.plane, endpoint, request);
    exchange.identified("default");
    exchange.view = readView({ model });
    return exchange;
  }

  admit(exchange: Exchange, options: Partial<AdmitOptions> = {}) {
    const none = new Set<string>();
    const all = { tried: none, busy: none, mayWait: () => true, ...options };
    return admit(exchange, this.plane, all);
  }

  /** Running and waiting in all backends together. */
  get usage(): [running: number, waiting: number] {
    const all = this.fleet.usage().flatMap(({ models }) => models);
    const sum = (key: "running" | "waiting") => all.reduce((total, each) => total + each[key], 0);
    return [sum("running"), sum("waiting")];
  }
}

async function refusal(admission: Promise<unknown>): Promise<GatewayError> {
  const error: unknown = await admission.then(
    () => assert.fail("was granted"),
    (reason: unknown) => reason,
  );
  assert(error instanceof GatewayError, String(error));
  return error;
}

/** Lets every promise that can go on go on, without a timer. */
async function settle(): Promise<void> {
  for (let turns = 0; turns < 500; turns++) await Promise.resolve();
}

/** What a promise brings that no timer holds up. */
async function soon<T>(promise: Promise<T>): Promise<T> {
  return await Promise.race([promise, settle().then((): never => assert.fail("still waits"))]);
}

beforeEach(() => mock.timers.enable({ apis: ["setTimeout"] }));
afterEach(() => mock.timers.reset());

describe("admit", () => {
  it("grants at once where a slot is free, and says where and why", async () => {
    const house = new House({ "m:latest": ["a"] });
    const exchange = house.request("m");
    const permit = await house.admit(exchange);
    assert.equal(permit.target.backend, "a");
    const { model, backend_id, reason, queue_ms } = exchange.record;
    assert.deepEqual([model, backend_id, reason, queue_ms], ["m:latest", "a", "only", 0]);
    assert.equal(waitingOf(exchange), null);
  });

  it("waits for a slot, in its place, and says how long", async () => {
    const house = new House({ m: ["a"] });
    const first = await house.admit(house.request("m"));
    const exchange = house.request("m");
    const other = house.request("m");
    const [admission, behind] = [house.admit(exchange), house.admit(other)];
    assert.deepEqual([waitingOf(exchange)?.position, waitingOf(other)?.position], [0, 1]);
    house.advance(700);
    first.release(SUCCESS);
    assert.equal((await admission).target.backend, "a");
    assert.equal(exchange.record.queue_ms, 700);
    assert.deepEqual([waitingOf(exchange), waitingOf(other)?.position], [null, 0]);
    other.cancel();
    await refusal(behind);
  });

  it("spreads over the targets that are free, then over all", async () => {
    const house = new House({ m: ["a", "b"] });
    const permits = [await house.admit(house.request("m")), await house.admit(house.request("m"))];
    assert.deepEqual(permits.map(({ target }) => target.backend).toSorted(), ["a", "b"]);
  });

  it("gives up at queue.maxWaitMs, or earlier where the client does", async () => {
    const house = new House({ m: ["a"] });
    await house.admit(house.request("m"));
    const patient = house.admit(house.request("m"));
    const hasty = house.admit(house.request("m", { "x-stainless-timeout": "2" }));
    house.advance(2000);
    const early = await refusal(hasty);
    assert.deepEqual([early.code, early.status], ["rate_limit_exceeded", 429]);
    assert((early.retryAfterMs ?? 0) > 0);
    assert.deepEqual(house.usage, [1, 1]);
    house.advance(3000);
    assert.equal((await refusal(patient)).code, "rate_limit_exceeded");
    assert.deepEqual(house.usage, [1, 0]);
  });

  it("lets everything else run, were it told to choose again without end", async () => {
    const house = new House({ m: ["a"] });
    const nowhere = { position: () => -1, reason: () => "", etaMs: () => 0, leave: () => {} };
    house.fleet.enqueue = (_ticket, _target, decide) => {
      decide({ type: "reselect" });
      return nowhere;
    };
    const exchange = house.request("m");
    const admission = refusal(house.admit(exchange));
    await new Promise((resolve) => setImmediate(resolve));
    exchange.cancel();
    house.advance(1);
    assert.equal((await admission).code, "client_closed_request");
  });

  it("refuses when the queue is full, with a time to come back", async () => {
    const house = new House({ m: ["a"] });
    await house.admit(house.request("m"));
    const waiting = [house.request("m"), house.request("m")];
    const admissions = waiting.map((each) => house.admit(each));
    const error = await refusal(house.admit(house.request("m")));
    assert.equal(error.code, "rate_limit_exceeded");
    assert.match(error.message, /full/);
    assert((error.retryAfterMs ?? 0) > 0);
    for (const each of waiting) each.cancel();
    await Promise.all(admissions.map(refusal));
  });

  it("leaves the queue when the client leaves", async () => {
    const house = new House({ m: ["a"] });
    const first = await house.admit(house.request("m"));
    const exchange = house.request("m");
    const admission = house.admit(exchange);
    exchange.cancel();
    assert.equal((await refusal(admission)).code, "client_closed_request");
    assert.deepEqual(house.usage, [1, 0]);
    first.release(SUCCESS);
    assert.deepEqual(house.usage, [0, 0]);
    assert.equal(exchange.record.cause, "queued");
  });

  it("gives back what is granted in the moment the client leaves", async () => {
    const house = new House({ m: ["a"] });
    const first = await house.admit(house.request("m"));
    const exchange = house.request("m");
    const admission = house.admit(exchange);
    first.release(SUCCESS);
    exchange.cancel();
    await refusal(admission);
    assert.deepEqual(house.usage, [0, 0]);
  });

  it("chooses again in the newest snapshot when its backend goes", async () => {
    const house = new House({ m: ["a"] });
    await house.admit(house.request("m"));
    const exchange = house.request("m");
    const admission = house.admit(exchange);
    house.apply({ m: ["b"] });
    assert.equal((await admission).target.backend, "b");
    assert.equal(exchange.record.backend_id, "b");
    assert.equal(exchange.snapshot, house.snapshot);
  });

  it("leaves the queue it has chosen again when the client leaves", async () => {
    const house = new House({ m: ["a", "b"] });
    for (let each = 0; each < 2; each++) await house.admit(house.request("m"));
    const exchange = house.request("m");
    const admission = house.admit(exchange);
    const [there] = house.fleet.usage().filter(({ models }) => models[0]?.waiting === 0);
    assert(there !== undefined);
    house.apply({ m: [there.backend] });
    await settle();
    assert.deepEqual([exchange.record.backend_id, house.usage], [there.backend, [1, 1]]);
    exchange.cancel();
    await refusal(admission);
    assert.deepEqual(house.usage, [1, 0]);
  });

  for (const backend of ["a", "b"]) {
    it(`follows its name to another model on ${backend === "a" ? "its" : "another"} backend`, async () => {
      const house = new House({ "qwen:7b": ["a"] });
      await house.admit(house.request("qwen"));
      const exchange = house.request("qwen");
      const admission = house.admit(exchange);
      assert.equal(exchange.record.model, "qwen:7b");
      house.apply({ "qwen:14b": [backend] });
      const permit = await soon(admission);
      assert.equal(permit.target.model, "qwen:14b");
      assert.equal(exchange.record.model, "qwen:14b");
    });
  }

  it("says that the model has gone when it has", async () => {
    const house = new House({ m: ["a"] });
    await house.admit(house.request("m"));
    const admission = house.admit(house.request("m"));
    house.apply({ other: ["a"] });
    assert.equal((await refusal(admission)).code, "model_not_found");
  });

  it("knows no such model, and guesses what was meant", async () => {
    const house = new House({ "llama3:8b": ["a"] });
    const error = await refusal(house.admit(house.request("lama3:8b")));
    assert.deepEqual([error.code, error.status, error.param], ["model_not_found", 404, "model"]);
    assert.match(error.message, /llama3:8b/);
  });

  it("says so when no backend of the model does this endpoint", async () => {
    const house = new House({ m: ["a"] });
    const error = await refusal(house.admit(house.request("m", {}, rerank)));
    assert.deepEqual([error.code, error.status], ["unsupported_endpoint", 501]);
  });

  describe("of what not every engine can do", () => {
    const several = (house: House, body: object = { n: 2 }, endpoint = chatCompletions) => {
      const exchange = house.request("m", {}, endpoint);
      exchange.view = endpoint.view({ model: "m", ...body });
      return exchange;
    };

    it("says which parameter it is, which engine, and what to do", async () => {
      const house = new House({ m: ["a", "b"] });
      const error = await refusal(house.admit(several(house)));
      assert.deepEqual(
        [error.code, error.status, error.param],
        ["unsupported_parameter", 400, "n"],
      );
      assert.match(error.message, /"m".*\bn\b.*ollama.*leave it out/);
      assert.deepEqual(house.usage, [0, 0]);
    });

    it("goes where it can be done, and waits there while others are idle", async () => {
      const house = new House({ m: ["a", "b"] });
      house.snapshot = withKinds(house.snapshot, { b: "vllm" });
      house.fleet.apply(house.snapshot);
      const first = await house.admit(several(house));
      assert.equal(first.target.backend, "b");
      const waits = house.admit(several(house));
      await settle();
      assert.deepEqual(house.usage, [1, 1]);
      const plain = await house.admit(house.request("m"));
      assert.equal(plain.target.backend, "a");
      plain.release(SUCCESS);
      await settle();
      assert.deepEqual(house.usage, [1, 1], "an idle engine that cannot is no place to go");
      first.release(SUCCESS);
      assert.equal((await soon(waits)).target.backend, "b");
    });

    it("is not retried where it cannot be done", async () => {
      const house = new House({ m: ["a", "b"] });
      house.snapshot = withKinds(house.snapshot, { b: "vllm" });
      house.fleet.apply(house.snapshot);
      const error = await refusal(house.admit(several(house), { tried: new Set(["b"]) }));
      assert.equal(error.code, "no_backend_available");
    });

    it("speaks of the path first: a parameter matters only where the path is spoken", async () => {
      const house = new House({ m: ["a"] });
      const exchange = several(house, {}, rerank);
      exchange.view = chatCompletions.view({ model: "m", n: 2 });
      assert.equal((await refusal(house.admit(exchange))).code, "unsupported_endpoint");
    });

    it("chooses again among those that can when they change", async () => {
      const house = new House({ m: ["a", "b"] });
      house.snapshot = withKinds(house.snapshot, { b: "vllm" });
      house.fleet.apply(house.snapshot);
      await house.admit(several(house));
      const waits = house.admit(several(house));
      house.apply({ m: ["a"] });
      assert.equal((await refusal(waits)).code, "unsupported_parameter");
    });
  });

  it("sends one trial at a time where all are unhealthy, and refuses the others", async () => {
    const sick = { health: "unhealthy" as const, reason: "connection refused" };
    const house = new House({ m: ["a", "b"] }, sick);
    const exchange = house.request("m");
    const trial = await house.admit(exchange);
    assert.equal(exchange.record.reason, "trial");
    const error = await refusal(house.admit(house.request("m")));
    assert.deepEqual([error.code, error.status], ["no_backend_available", 503]);
    assert((error.retryAfterMs ?? 0) > 0);
    assert.match(error.message, /connection refused/);
    house.now++;
    trial.release(FAILURE);
    const next = await house.admit(house.request("m"));
    assert.notEqual(next.target.backend, trial.target.backend);
  });

  it("retries elsewhere, as long as there is an elsewhere", async () => {
    const house = new House({ m: ["a", "b"] });
    const exchange = house.request("m");
    const permit = await house.admit(exchange, { tried: new Set(["a"]) });
    assert.deepEqual([permit.target.backend, exchange.record.reason], ["b", "retry"]);
    permit.release(FAILURE);
    await refusal(house.admit(house.request("m"), { tried: new Set(["a", "b"]) }));
  });

  it("sends one trial at a time, also for a retry", async () => {
    const house = new House({ m: ["a", "b"] }, { health: "unhealthy" });
    const trial = await house.admit(house.request("m"), { tried: new Set(["b"]) });
    assert.equal(trial.target.backend, "a");
    await refusal(house.admit(house.request("m"), { tried: new Set(["a"]) }));
    await refusal(house.admit(house.request("m"), { busy: new Set(["a"]) }));
    trial.release(FAILURE);
    const next = await house.admit(house.request("m"), { tried: new Set(["a"]) });
    assert.equal(next.target.backend, "b");
  });

  describe("of a second attempt", () => {
    const never = () => assert.fail("was asked whether it may wait");
    const ids = (...backends: string[]) => new Set(backends);

    it("takes a free slot elsewhere without asking whether it may wait", async () => {
      const house = new House({ m: ["a", "b"] });
      for (const options of [{ tried: ids("a") }, { busy: ids("a") }]) {
        const exchange = house.request("m");
        const permit = await house.admit(exchange, { ...options, mayWait: never });
        assert.deepEqual([permit.target.backend, exchange.record.reason], ["b", "retry"]);
        permit.release(SUCCESS);
      }
    });

    it("waits only where it may, and is asked once", async () => {
      const house = new House({ m: ["a", "b"] });
      const first = await house.admit(house.request("m"), { tried: ids("a") });
      let asked = 0;
      const mayWait = (may: boolean) => () => {
        asked++;
        return may;
      };
      const refused = house.admit(house.request("m"), {
        tried: ids("a"),
        mayWait: mayWait(false),
      });
      assert.equal((await refusal(refused)).code, "no_backend_available");
      assert.deepEqual([asked, house.usage], [1, [1, 0]]);
      const admission = house.admit(house.request("m"), {
        tried: ids("a"),
        mayWait: mayWait(true),
      });
      await settle();
      assert.deepEqual([asked, house.usage], [2, [1, 1]]);
      first.release(SUCCESS);
      assert.equal((await soon(admission)).target.backend, "b");
    });

    it("after a busy engine goes anywhere else first, and waits there if nowhere is room", async () => {
      const house = new House({ m: ["a", "b"] });
      const other = await house.admit(house.request("m"), { busy: ids("a") });
      assert.equal(other.target.backend, "b");
      // All are busy, or full: whichever comes first, the busy one as well.
      const waits = house.admit(house.request("m"), { busy: ids("a", "b") });
      assert.equal((await soon(waits)).target.backend, "a");
      await refusal(house.admit(house.request("m"), { busy: ids("a", "b"), mayWait: () => false }));
    });

    it("comes back to the engine that was busy when its hold is over, alone as it may be", async () => {
      const house = new House({ m: ["a"] });
      const first = await house.admit(house.request("m"));
      first.release(judge("busy"));
      const again = house.admit(house.request("m"), { busy: ids("a") });
      await settle();
      assert.deepEqual(house.usage, [0, 1], "held");
      house.advance(999);
      await settle();
      assert.deepEqual(house.usage, [0, 1]);
      house.advance(1);
      assert.equal((await soon(again)).target.backend, "a");
    });

    it("never goes back where it failed, not even as the only hope", async () => {
      for (const health of ["healthy", "unhealthy"] as const) {
        const house = new House({ m: ["a"] }, { health });
        const error = await refusal(house.admit(house.request("m"), { tried: ids("a") }));
        assert.equal(error.code, "no_backend_available");
      }
    });

    it("does not ask for a wait where nobody is well: it is the one trial, or refused", async () => {
      const house = new House({ m: ["a", "b"] }, { health: "unhealthy" });
      const trial = await house.admit(house.request("m"), { tried: ids("a"), mayWait: never });
      assert.equal(trial.target.backend, "b");
      const options = { tried: ids("b"), mayWait: never };
      await refusal(house.admit(house.request("m"), options));
    });
  });

  describe("of breakers", () => {
    const fail = async (house: House, times: number, verdict = FAILURE) => {
      const seen: string[] = [];
      for (let each = 0; each < times; each++) {
        const permit = await house.admit(house.request("m"));
        seen.push(permit.target.backend);
        permit.release(verdict);
      }
      return seen;
    };

    it("leaves an open one alone while there is another", async () => {
      const house = new House({ m: ["a", "b"] });
      const toA = { tried: new Set(["b"]) };
      for (let each = 0; each < 3; each++) {
        (await house.admit(house.request("m"), toA)).release(FAILURE);
      }
      assert.equal(house.fleet.breakerOf("a").state, "open");
      const exchange = house.request("m");
      const permit = await house.admit(exchange);
      assert.deepEqual([permit.target.backend, exchange.record.reason], ["b", "only"]);
      const waits = house.admit(house.request("m"));
      await settle();
      assert.deepEqual(house.usage, [1, 1], "rather waits for one that works");
      permit.release(SUCCESS);
      await soon(waits);
    });

    it("sends whoever waits there to another", async () => {
      const house = new House({ m: ["a"] });
      await fail(house, 2);
      const running = await house.admit(house.request("m"));
      const waits = house.admit(house.request("m"));
      const exchange = house.request("m");
      const also = house.admit(exchange);
      house.apply({ m: ["a", "b"] });
      await settle();
      running.release(FAILURE);
      for (const each of [waits, also]) {
        const permit = await soon(each);
        assert.equal(permit.target.backend, "b");
        permit.release(SUCCESS);
      }
    });

    it("refuses with the time of the next trial where one is under way and all are open", async () => {
      const house = new House({ m: ["a"] });
      await fail(house, 3);
      const exchange = house.request("m");
      const trial = await house.admit(exchange);
      assert.equal(exchange.record.reason, "trial");
      const during = await refusal(house.admit(house.request("m")));
      assert.deepEqual([during.code, during.retryAfterMs], ["no_backend_available", 5000]);
      trial.release(FAILURE);
      house.now += 5000;
      const held = await house.admit(house.request("m"));
      const error = await refusal(house.admit(house.request("m")));
      assert.equal(error.code, "no_backend_available");
      held.release(SUCCESS);
      (await house.admit(house.request("m"))).release(SUCCESS);
    });

    it("tells when the first open one is tried again", async () => {
      const house = new House({ m: ["a"] });
      await fail(house, 3);
      house.now += 4000;
      const error = await refusal(house.admit(house.request("m"), { tried: new Set(["a"]) }));
      assert.deepEqual([error.code, error.retryAfterMs], ["no_backend_available", 6000]);
    });

    it("leaves other models on that backend alone when one model fails there", async () => {
      const house = new House({ m: ["a", "b"], n: ["a"] });
      const toA = { tried: new Set(["b"]) };
      for (let each = 0; each < 3; each++) {
        (await house.admit(house.request("m"), toA)).release(judge("server_error"));
      }
      assert.equal((await house.admit(house.request("n"))).target.backend, "a");
      assert.equal((await house.admit(house.request("m"))).target.backend, "b");
    });
  });
});
