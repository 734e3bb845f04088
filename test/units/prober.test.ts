/** How probes make health (contract §1): what was seen, what is said of it, and when nobody asks. */
import assert from "node:assert/strict";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import fc from "fast-check";
import { Prober, untilProbe } from "../../src/control/probe.ts";
import { unseen, type Seen, type Wanted } from "../../src/control/registry.ts";
import { modelNamed } from "../../src/engines/engine.ts";

type Answer = (request: IncomingMessage, response: ServerResponse) => void;

const json =
  (body: unknown, status = 200): Answer =>
  (_, response) => {
    response.writeHead(status, { "content-type": "application/json" });
    response.end(JSON.stringify(body));
  };
const lists = (...ids: string[]) => json({ object: "list", data: ids.map((id) => ({ id })) });
const LOADING = json({ error: { message: "Loading model", code: 503 } }, 503);
const silent: Answer = () => {};
const hangsUp: Answer = (request) => void request.socket.destroy();

/** One engine whose answer can be changed, and which can go away and come back. */
class Engine {
  answer: Answer = lists("m");
  readonly asked: string[] = [];
  #server: Server | null = null;
  #port = 0;

  async start(): Promise<void> {
    const server = createServer((request, response) => {
      this.asked.push(`${request.method} ${request.url}`);
      this.answer(request, response);
    });
    this.#server = server;
    await new Promise<void>((resolve) => server.listen(this.#port, "127.0.0.1", resolve));
    this.#port = (server.address() as AddressInfo).port;
  }

  async stop(): Promise<void> {
    const server = this.#server;
    this.#server = null;
    if (server === null) return;
    await new Promise((resolve) => {
      server.close(resolve);
      server.closeAllConnections();
    });
  }

  get url(): string {
    return `http://127.0.0.1:${this.#port}`;
  }
}

interface Watch {
  prober: Prober;
  reports: Seen[];
  /** Takes these backends instead, as a reload does. */
  configure: (...backends: Partial<Wanted>[]) => Promise<void>;
  /** Health and reason as last reported. */
  last(): [string | undefined, string | undefined];
  seen: Map<string, Seen>;
  /** As a first look before this one: these need no probe now. */
  looked: Map<string, Seen>;
  flows: boolean;
  stuck: boolean;
  waits: boolean;
  askedFlowing: [string, number][];
}

function backendsOf(backends: Partial<Wanted>[]): Wanted[] {
  const defaults = { weight: 1, healthInterval: 600_000, timeout: 2000, allowCloud: false };
  return backends.map((each, at) => ({ id: `b${at}`, ...defaults, ...each }));
}

function watch(clock: { now: number } = { now: 0 }, random = 0): Watch {
  const watched: Watch = {
    reports: [],
    seen: new Map(),
    looked: new Map(),
    flows: false,
    stuck: false,
    waits: false,
    askedFlowing: [],
    configure: (...backends) => watched.prober.configure(backendsOf(backends), watched.looked),
    last() {
      const report = this.reports.at(-1);
      return [report?.health, report?.reason];
    },
    prober: new Prober({
      report(id, each) {
        watched.seen.set(id, each);
        watched.reports.push(each);
      },
      seen: (id) => watched.seen.get(id),
      flowing(id, withinMs) {
        watched.askedFlowing.push([id, withinMs]);
        return watched.flows;
      },
      stuck: () => watched.stuck,
      waitedFor: () => watched.waits,
      now: () => clock.now,
      random: () => random,
    }),
  };
  watches.push(watched);
  return watched;
}

const watches: Watch[] = [];
afterEach(() => {
  for (const { prober } of watches.splice(0)) prober.stop();
});

describe("health", () => {
  const engine = new Engine();
  beforeEach(async () => {
    engine.answer = lists("m");
    engine.asked.length = 0;
    await engine.start();
  });
  afterEach(() => engine.stop());

  /** Watched, and not probed before the test says so. */
  function resting(backend: Partial<Wanted>): Watch {
    const watched = watch();
    const [wanted] = backendsOf([backend]) as [Wanted];
    watched.looked.set("b0", unseen(wanted));
    void watched.configure(backend);
    return watched;
  }
  const openai = (more: Partial<Wanted> = {}) =>
    resting({ kind: "openai", url: engine.url, ...more });

  it("is healthy after one good probe, with what it listed", async () => {
    engine.answer = json({
      data: [{ id: "m", created: 5, max_model_len: 4096 }, { id: "" }, { id: 7 }, null],
    });
    const watched = openai();
    const before = Date.now();
    assert.equal(await watched.prober.check("b0"), true);
    const [report] = watched.reports;
    assert(report !== undefined && watched.reports.length === 1);
    const { checkedAt, ...rest } = report;
    assert(checkedAt !== null && checkedAt >= before && checkedAt <= Date.now());
    assert.deepEqual(rest, {
      kind: "openai",
      health: "healthy",
      reason: "",
      models: [modelNamed("m", { contextLength: 4096, createdAt: 5 })],
    });
  });

  it("falls to degraded, then to unhealthy, and is healthy again with the first good probe", async () => {
    const watched = openai();
    const { prober } = watched;
    assert.equal(await prober.check("b0"), true);
    await engine.stop();
    const away = "connection refused";
    assert.equal(await prober.check("b0"), false);
    assert.deepEqual(watched.last(), ["degraded", away]);
    assert.equal(await prober.check("b0"), false);
    assert.deepEqual(watched.last(), ["unhealthy", away]);
    assert.equal(await prober.check("b0"), false);
    assert.deepEqual(watched.last(), ["unhealthy", away]);
    await engine.start();
    assert.equal(await prober.check("b0"), true);
    assert.deepEqual(watched.last(), ["healthy", ""]);
    await engine.stop();
    await prober.check("b0");
    assert.deepEqual(watched.last(), ["degraded", away], "two in a row count, not two in all");
  });

  it("keeps the models and the kind of an engine that is away", async () => {
    const watched = watch();
    engine.answer = json({ data: [{ id: "m", owned_by: "vllm" }] });
    await watched.configure({ url: engine.url });
    await engine.stop();
    await watched.prober.check("b0");
    await watched.prober.check("b0");
    const report = watched.reports.at(-1);
    assert.deepEqual([report?.kind, report?.health], ["vllm", "unhealthy"]);
    assert.deepEqual(
      report?.models.map(({ name }) => name),
      ["m"],
    );
  });

  it("takes a new list with every good probe", async () => {
    const watched = openai();
    await watched.prober.check("b0");
    engine.answer = lists("n", "o");
    await watched.prober.check("b0");
    assert.deepEqual(
      watched.reports.at(-1)?.models.map(({ name }) => name),
      ["n", "o"],
    );
  });

  it("is degraded while the engine loads, which is no failure, and keeps its models", async () => {
    const watched = openai();
    await watched.prober.check("b0");
    await engine.stop();
    await watched.prober.check("b0");
    await engine.start();
    engine.answer = LOADING;
    for (let times = 0; times < 3; times++) {
      assert.equal(await watched.prober.check("b0"), true);
      const report = watched.reports.at(-1);
      assert.equal(report?.health, "degraded");
      assert.match(report?.reason ?? "", /loading/);
      assert.equal(report?.models.length, 1, "what it served before");
    }
    await engine.stop();
    await watched.prober.check("b0");
    assert.equal(watched.last()[0], "degraded", "the first failure since it answered");
  });

  it("does not fall while tokens flow from it", async () => {
    const watched = openai({ timeout: 1500 });
    await watched.prober.check("b0");
    engine.answer = json({ error: "x" }, 500);
    watched.flows = true;
    for (let times = 0; times < 3; times++) {
      assert.equal(await watched.prober.check("b0"), true);
    }
    assert.deepEqual(watched.last(), ["healthy", ""]);
    assert.deepEqual(watched.askedFlowing[0], ["b0", 1500]);
    watched.flows = false;
    assert.equal(await watched.prober.check("b0"), false);
    assert.equal(watched.last()[0], "degraded");
  });

  it("falls while its streams stand still, however well it answers, and rises when they do not", async () => {
    const watched = openai();
    for (const health of ["healthy", "degraded", "unhealthy", "healthy"] as const) {
      watched.stuck = health === "degraded" || health === "unhealthy";
      assert.equal(await watched.prober.check("b0"), true);
      assert.equal(watched.last()[0], health);
      if (watched.stuck) assert.match(String(watched.last()[1]), /stand still/);
    }
  });

  it("falls when nobody listens any more, whatever flowed a moment ago", async () => {
    const watched = openai();
    await watched.prober.check("b0");
    await engine.stop();
    watched.flows = true;
    assert.equal(await watched.prober.check("b0"), false);
    assert.deepEqual(watched.last(), ["degraded", "connection refused"]);
  });

  it("does not ask whether tokens flow when the probe was good", async () => {
    const watched = openai();
    await watched.prober.check("b0");
    assert.deepEqual(watched.askedFlowing, []);
  });

  const reasons: [what: string, answer: Answer, reason: RegExp][] = [
    ["500", json({ error: "x" }, 500), /^HTTP 500 at \/v1\/models$/],
    ["503 that is not loading", json({ error: "x" }, 503), /^HTTP 503 at \/v1\/models$/],
    ["404", json({ detail: "Not Found" }, 404), /^HTTP 404 at \/v1\/models$/],
    ["401", json({}, 401), /^HTTP 401 at \/v1\/models: set this backend's apiKey$/],
    ["403", json({}, 403), /^HTTP 403 at \/v1\/models: set this backend's apiKey$/],
    ["no list", json({ error: "Unexpected endpoint" }), /^no model list at \/v1\/models$/],
    ["no JSON", (_, response) => void response.end("<html>"), /^no model list at \/v1\/models$/],
    ["a closed connection", hangsUp, /^connection closed without an answer$/],
  ];
  for (const [what, answer, reason] of reasons) {
    it(`says why it fell: ${what}`, async () => {
      engine.answer = answer;
      const watched = openai();
      assert.equal(await watched.prober.check("b0"), false);
      assert.match(String(watched.last()[1]), reason);
    });
  }

  it("says why it fell: no answer in time", async () => {
    engine.answer = silent;
    const watched = openai({ timeout: 100 });
    assert.equal(await watched.prober.check("b0"), false);
    assert.deepEqual(watched.last(), ["degraded", "no answer within 100 ms"]);
  });

  it("is good with an empty list, also with data null", async () => {
    for (const data of [[], null]) {
      engine.answer = json({ object: "list", data });
      const watched = openai();
      assert.equal(await watched.prober.check("b0"), true);
      assert.deepEqual([watched.last()[0], watched.reports[0]?.models], ["healthy", []]);
    }
  });

  it("asks each kind by its own API, and takes the configured kind for true", async () => {
    engine.answer = json({
      models: [
        {
          name: "llama3:8b",
          model: "llama3:8b",
          modified_at: "2026-11-22T00:00:00Z",
          digest: "abc",
          size: 5_000_000,
          details: { context_length: 8192 },
          capabilities: ["completion", "tools"],
        },
        { model: "only-model" },
        {},
      ],
    });
    const watched = resting({ kind: "ollama", url: engine.url });
    assert.equal(await watched.prober.check("b0"), true);
    assert.deepEqual(engine.asked.toSorted(), ["GET /api/ps", "GET /api/tags"]);
    assert.deepEqual(watched.reports[0]?.kind, "ollama");
    const [llama, other] = watched.reports[0]?.models ?? [];
    assert.deepEqual(
      [llama?.name, llama?.digest, llama?.contextLength, llama?.capabilities, llama?.createdAt],
      [
        "llama3:8b",
        "abc",
        8192,
        ["completion", "tools"],
        Date.parse("2026-11-22T00:00:00Z") / 1000,
      ],
    );
    assert.equal(llama?.sizeBytes, 5_000_000);
    assert.deepEqual([other?.name, other?.digest, other?.createdAt], ["only-model", null, null]);
  });

  it("does not know who is not configured, or no longer", async () => {
    const watched = openai();
    assert.equal(await watched.prober.check("nobody"), false);
    await watched.configure();
    assert.equal(await watched.prober.check("b0"), false);
    assert.deepEqual(watched.reports, []);
  });

  it("needs no server for the demo engine", async () => {
    const watched = watch();
    await watched.configure({ kind: "demo", url: "" });
    assert.deepEqual(
      watched.reports[0]?.models.map(({ name }) => name),
      ["demo"],
    );
  });

  describe("the kind, where none is configured", () => {
    const vllm = json({ data: [{ id: "m", owned_by: "vllm" }] });
    /** What only the fingerprint asks for. */
    const PROPS = "GET /props";

    it("is openai until it answers, and then what it shows", async () => {
      await engine.stop();
      const watched = watch();
      await watched.configure({ url: engine.url });
      assert.equal(watched.reports[0]?.kind, "openai");
      await engine.start();
      engine.answer = vllm;
      await watched.prober.check("b0");
      assert.deepEqual([watched.reports[1]?.kind, watched.reports[1]?.health], ["vllm", "healthy"]);
    });

    it("is kept while it answers, and found out again after it did not", async () => {
      engine.answer = vllm;
      const watched = watch();
      await watched.configure({ url: engine.url });
      engine.asked.length = 0;
      engine.answer = lists("m");
      await watched.prober.check("b0");
      assert(!engine.asked.includes(PROPS), "a busy engine is not asked again what it is");
      assert.equal(watched.reports.at(-1)?.kind, "vllm");
      await engine.stop();
      await watched.prober.check("b0");
      assert.equal(watched.reports.at(-1)?.kind, "vllm", "as long as nobody says otherwise");
      await engine.start();
      await watched.prober.check("b0");
      assert.equal(watched.reports.at(-1)?.kind, "openai");
    });

    it("is not settled by tokens that flow from an engine nobody has asked yet", async () => {
      await engine.stop();
      const watched = watch();
      watched.flows = true;
      await watched.configure({ url: engine.url });
      assert.equal(watched.reports.at(-1)?.kind, "openai");
      await engine.start();
      engine.answer = vllm;
      await watched.prober.check("b0");
      assert.equal(watched.reports.at(-1)?.kind, "vllm");
    });

    it("is that of the first look, where there was one", async () => {
      const watched = watch();
      const [wanted] = backendsOf([{ url: engine.url }]) as [Wanted];
      const sight: Seen = { ...unseen(wanted), kind: "vllm", health: "healthy" };
      watched.looked.set("b0", sight);
      watched.seen.set("b0", sight);
      await watched.configure({ url: engine.url });
      assert.equal(watched.reports.length, 0, "it has just been looked at");
      await watched.prober.check("b0");
      assert(!engine.asked.includes(PROPS));
      assert.equal(watched.reports.at(-1)?.kind, "vllm");
    });
  });
});

/** Lets every promise that can go on go on, without a timer. */
async function settle(): Promise<void> {
  for (let turns = 0; turns < 50; turns++) await Promise.resolve();
}

describe("the loop", () => {
  const original = globalThis.fetch;
  /** Probes under way, in order of their beginning. */
  const probes: {
    url: string;
    authorization: string | undefined;
    answer: (ids: string[]) => void;
    fail: () => void;
    loads: () => void;
  }[] = [];
  const clock = { now: 0 };
  let most = 0;
  let running = 0;

  beforeEach(() => {
    probes.length = 0;
    most = 0;
    running = 0;
    clock.now = 0;
    mock.timers.enable({ apis: ["setTimeout"] });
    globalThis.fetch = ((url: string, init: RequestInit) => {
      running++;
      most = Math.max(most, running);
      const { authorization } = init.headers as Record<string, string | undefined>;
      return new Promise<Response>((resolve, reject) => {
        const done = (response: Response) => {
          running--;
          resolve(response);
        };
        const fail = (error: Error) => {
          running--;
          reject(error);
        };
        init.signal?.addEventListener("abort", () => fail(init.signal?.reason as Error));
        probes.push({
          url,
          authorization,
          answer: (ids) => done(Response.json({ data: ids.map((id) => ({ id })) })),
          fail: () => fail(new TypeError("connection refused")),
          loads: () =>
            done(Response.json({ error: { message: "Loading model" } }, { status: 503 })),
        });
      });
    }) as typeof fetch;
  });
  afterEach(() => {
    globalThis.fetch = original;
    mock.timers.reset();
  });

  const backend = { kind: "openai" as const, url: "http://127.0.0.1:1", healthInterval: 1000 };

  /** In steps, so that a timer that is set on the way begins at about its own time. */
  async function pass(ms: number): Promise<void> {
    for (let left = ms; left > 0; left -= 1000) {
      const step = Math.min(left, 1000);
      clock.now += step;
      mock.timers.tick(step);
      await settle();
    }
  }

  /** Watched, and its first probe answered. */
  async function healthy(more: Partial<Wanted> = {}, random = 0): Promise<Watch> {
    const watched = watch(clock, random);
    const round = watched.configure({ ...backend, ...more });
    await settle();
    probes[0]?.answer(["m"]);
    await round;
    return watched;
  }

  it("never has two probes of one backend under way", async () => {
    const { prober, reports, configure } = watch(clock);
    const round = configure({ ...backend, timeout: 60_000, healthInterval: 100 });
    const [one, other] = [prober.check("b0"), prober.check("b0")];
    await settle();
    await pass(5000);
    assert.equal(probes.length, 1, "the interval is long over, the probe is not");
    probes[0]?.answer(["m"]);
    assert.deepEqual(await Promise.all([one, other]), [true, true]);
    await round;
    assert.equal(reports.length, 1, "one probe, one report");
    const next = prober.check("b0");
    await settle();
    assert.equal(probes.length, 2);
    await pass(5000);
    assert.equal(probes.length, 2, "the loop waits for whoever asked in between");
    probes[1]?.answer(["m"]);
    assert.equal(await next, true);
    assert.equal(most, 1);
  });

  it("probes an interval after the last probe began, however long that took", async () => {
    await healthy();
    await pass(999);
    assert.equal(probes.length, 1);
    await pass(1);
    assert.equal(probes.length, 2);
    await pass(700);
    probes[1]?.fail();
    await settle();
    await pass(299);
    assert.equal(probes.length, 2);
    await pass(1);
    assert.equal(probes.length, 3, "a failed probe does not end the loop");
    await pass(1800);
    probes[2]?.answer([]);
    await settle();
    await pass(1);
    assert.equal(probes.length, 4, "one that took longer than the interval is followed at once");
  });

  it("comes up to a tenth of the interval early, and never late", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }),
        fc.integer({ min: 100, max: 1_000_000 }),
        async (random, healthInterval) => {
          probes.length = 0;
          const watched = await healthy({ healthInterval }, random);
          const begin = clock.now;
          await pass(Math.floor(0.9 * healthInterval) - 1);
          assert.equal(probes.length, 1);
          while (probes.length === 1 && clock.now - begin < 2 * healthInterval) {
            await pass(Math.max(1, Math.floor(healthInterval / 100)));
          }
          assert.equal(probes.length, 2);
          const late = Math.max(1, healthInterval / 100);
          const due = healthInterval * (1 - 0.1 * random);
          assert(Math.abs(clock.now - begin - due) <= late + 1, `${clock.now - begin} for ${due}`);
          watched.prober.stop();
        },
      ),
      { numRuns: 30 },
    );
  });

  describe("while requests wait", () => {
    const often = { healthInterval: 60_000 };

    /** Answers the newest probe as soon as it comes, for so long; says when each came. */
    async function watchFor(ms: number): Promise<number[]> {
      const times: number[] = [];
      let seen = probes.length;
      for (let passed = 100; passed <= ms; passed += 100) {
        await pass(100);
        if (probes.length === seen) continue;
        seen = probes.length;
        times.push(clock.now);
        probes.at(-1)?.answer(["m"]);
        await settle();
      }
      return times;
    }

    it("probes every two seconds, and at its own pace when nobody waits any more", async () => {
      const watched = await healthy(often);
      watched.waits = true;
      assert.deepEqual(await watchFor(7000), [2000, 4000, 6000]);
      watched.waits = false;
      assert.deepEqual(await watchFor(61_000), [66_000]);
    });

    it("begins to within two seconds of the first that waits", async () => {
      const watched = await healthy(often);
      assert.deepEqual(await watchFor(4500), []);
      watched.waits = true;
      assert.deepEqual(await watchFor(4000), [6000, 8000]);
    });

    it("keeps an interval that is shorter than that", async () => {
      const watched = await healthy({ healthInterval: 500 });
      watched.waits = true;
      assert.deepEqual(await watchFor(2000), [500, 1000, 1500, 2000]);
    });

    it("has one probe under way at most, however long it takes", async () => {
      const watched = await healthy({ ...often, timeout: 30_000 });
      watched.waits = true;
      await pass(2000);
      for (let second = 0; second < 20; second++) await pass(1000);
      assert.deepEqual([probes.length, most], [2, 1]);
    });
  });

  it("has a pace per backend, and its first round is done when all have been looked at", async () => {
    const slow = { ...backend, url: "http://127.0.0.1:2", healthInterval: 5000 };
    const { configure } = watch(clock);
    let isDone = false;
    const round = configure(backend, slow).then(() => {
      isDone = true;
    });
    await settle();
    assert.equal(probes.length, 2, "side by side");
    probes[0]?.answer(["m"]);
    await settle();
    assert.equal(isDone, false);
    probes[1]?.fail();
    await round;
    for (let second = 0; second < 4; second++) {
      await pass(1000);
      probes.at(-1)?.answer(["m"]);
      await settle();
    }
    const asked = probes.map(({ url }) => new URL(url).port);
    assert.deepEqual(asked, ["1", "2", "1", "1", "1", "1"]);
  });

  it("gives up on a probe after its timeout, which may be longer than the interval", async () => {
    const watched = watch(clock);
    const round = watched.configure({ ...backend, timeout: 3000, healthInterval: 100 });
    await settle();
    await pass(2999);
    assert.deepEqual(watched.reports, []);
    await pass(1);
    await round;
    assert.deepEqual(watched.last(), ["degraded", "no answer within 3000 ms"]);
    assert.equal(running, 0, "and hangs up");
  });

  it("stops: no further probe and no further report, though one is under way", async () => {
    const { prober, reports, configure } = watch(clock);
    const round = configure(backend);
    await settle();
    prober.stop();
    probes[0]?.answer(["m"]);
    await round;
    await pass(1_000_000);
    assert.deepEqual([probes.length, reports.length], [1, 0]);
    probes.length = 0;
    const again = await healthy();
    again.prober.stop();
    await pass(1_000_000);
    assert.deepEqual([probes.length, again.reports.length], [1, 1]);
  });

  describe("knowledge that is too old", () => {
    it("is none: unknown, with the models it had, until the next probe", async () => {
      const watched = await healthy({ healthInterval: 10_000, staleAfterMs: 4000 });
      await pass(3999);
      assert.deepEqual(watched.last(), ["healthy", ""]);
      await pass(1);
      assert.deepEqual(watched.last(), ["unknown", "last looked at 4000 ms ago"]);
      assert.equal(watched.reports.at(-1)?.models.length, 1);
      await pass(6000);
      probes[1]?.answer(["m"]);
      await settle();
      assert.deepEqual(watched.last(), ["healthy", ""]);
      assert.equal(watched.reports.length, 3);
    });

    it("is not to be had from a probe that hangs, where nothing is configured", async () => {
      const watched = await healthy({ timeout: 500_000 });
      await pass(1000);
      await pass(499_999);
      assert.equal(watched.last()[0], "healthy");
      await pass(1);
      assert.equal(watched.last()[0], "degraded");
      await pass(1);
      await pass(500_000);
      assert.equal(watched.last()[0], "unhealthy");
      assert(watched.reports.every(({ health }) => health !== "unknown"));
    });

    it("counts from the last probe that was over, also one that failed", async () => {
      const watched = await healthy({ staleAfterMs: 1500 });
      await pass(1000);
      probes[1]?.fail();
      await settle();
      await pass(999);
      assert.equal(watched.last()[0], "degraded");
      assert.equal(watched.reports.length, 2);
    });
  });

  describe("another configuration", () => {
    it("leaves alone what has not changed", async () => {
      const watched = await healthy();
      await pass(600);
      await watched.configure(backend);
      assert.equal(probes.length, 1);
      await pass(400);
      assert.equal(probes.length, 2, "its pace goes on");
    });

    it("probes at once what has changed, by what is configured now", async () => {
      const watched = await healthy();
      await pass(500);
      const round = watched.configure({ ...backend, healthInterval: 4000, apiKey: "secret" });
      await settle();
      assert.deepEqual([probes.length, probes[1]?.authorization], [2, "Bearer secret"]);
      probes[1]?.answer(["m"]);
      await round;
      await pass(3999);
      assert.equal(probes.length, 2, "the old pace is over");
      await pass(1);
      assert.equal(probes.length, 3);
    });

    it("counts failures on, where it is still the same place", async () => {
      const watched = await healthy();
      await pass(1000);
      probes[1]?.fail();
      await settle();
      const round = watched.configure({ ...backend, timeout: 1000 });
      await settle();
      probes[2]?.fail();
      await round;
      assert.equal(watched.last()[0], "unhealthy");
    });

    it("forgets them for another place", async () => {
      const watched = await healthy();
      await pass(1000);
      probes[1]?.fail();
      await settle();
      const round = watched.configure({ ...backend, url: "http://127.0.0.1:2" });
      await settle();
      assert.equal(probes[2]?.url, "http://127.0.0.1:2/v1/models");
      probes[2]?.fail();
      await round;
      assert.equal(watched.last()[0], "degraded");
    });

    it("waits for a probe that is under way at the same place", async () => {
      const watched = await healthy({ timeout: 60_000 });
      await pass(1000);
      const round = watched.configure({ ...backend, timeout: 60_000, apiKey: "new" });
      await settle();
      assert.equal(probes.length, 2, "probes of one backend never overlap");
      probes[1]?.answer(["m"]);
      await settle();
      assert.deepEqual([probes.length, probes[2]?.authorization], [3, "Bearer new"]);
      probes[2]?.answer(["m"]);
      await round;
      assert.equal(most, 1);
      await pass(999);
      assert.equal(probes.length, 3);
      await pass(1);
      assert.equal(probes.length, 4, "one loop, not two");
      probes[3]?.answer(["m"]);
      await settle();
      await pass(1000);
      assert.equal(probes.length, 5);
    });

    it("hears nothing more of a backend that went, or moved, while a probe was under way", async () => {
      const watched = await healthy();
      await pass(1000);
      void watched.configure();
      probes[1]?.fail();
      await settle();
      await pass(100_000);
      assert.deepEqual([probes.length, watched.reports.length], [2, 1]);
      probes.length = 0;
      const moved = await healthy();
      await pass(1000);
      const round = moved.configure({ ...backend, url: "http://127.0.0.1:2" });
      await settle();
      probes[1]?.fail();
      await settle();
      assert.equal(moved.reports.length, 1);
      probes[2]?.answer(["n"]);
      await round;
      assert.deepEqual(
        moved.reports.at(-1)?.models.map(({ name }) => name),
        ["n"],
      );
    });

    it("lets a backend that went grow stale no more", async () => {
      const watched = await healthy({ staleAfterMs: 100 });
      await watched.configure();
      await pass(100_000);
      assert.equal(watched.reports.length, 1);
    });

    it("probes what has just been looked at after its interval, and lets it grow stale", async () => {
      const watched = watch(clock);
      const [wanted] = backendsOf([backend]) as [Wanted];
      const sight: Seen = { ...unseen(wanted), health: "healthy", models: [modelNamed("m")] };
      watched.looked.set("b0", { ...sight, health: "degraded", models: [] });
      // What the registry made of the look.
      watched.seen.set("b0", sight);
      await watched.configure({ ...backend, staleAfterMs: 500 });
      assert.equal(probes.length, 0);
      await pass(500);
      assert.deepEqual(
        watched.reports.map(({ health, models }) => [health, models.length]),
        [["unknown", 1]],
      );
      await pass(500);
      assert.equal(probes.length, 1);
    });
  });
});

describe("untilProbe", () => {
  it("is never longer than what is left, never more than two seconds, and 0 when it is due", () => {
    fc.assert(
      fc.property(
        fc.double({ min: 0, max: 200_000, noNaN: true }),
        fc.double({ min: 90, max: 100_000, noNaN: true }),
        fc.boolean(),
        (elapsed, interval, isWaitedFor) => {
          const left = untilProbe(elapsed, interval, isWaitedFor);
          const due = isWaitedFor ? Math.min(2000, interval) : interval;
          assert.equal(left === 0, elapsed >= due);
          assert(left <= 2000 && left <= Math.max(0, due - elapsed));
          assert(left >= Math.min(2000, due - elapsed));
        },
      ),
    );
  });
});

describe("unseen", () => {
  it("is unknown, of the configured kind", () => {
    const [backend] = backendsOf([{ kind: "vllm" }]) as [Wanted];
    assert.deepEqual(unseen(backend), {
      kind: "vllm",
      health: "unknown",
      reason: "not probed yet",
      checkedAt: null,
      models: [],
    });
  });
});
