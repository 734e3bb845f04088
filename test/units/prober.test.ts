/** How probes make health (contract §1): what was seen, what is said of it, and when nobody asks. */
import assert from "node:assert/strict";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import type { BackendConfig } from "../../src/config.ts";
import { Prober } from "../../src/control/probe.ts";
import { unseen, type Seen } from "../../src/control/registry.ts";

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
  /** Health and reason as last reported. */
  last(): [string | undefined, string | undefined];
  flows: boolean;
  askedFlowing: [string, number][];
}

function watch(...backends: Partial<BackendConfig>[]): Watch {
  const seen = new Map<string, Seen>();
  const wanted = backends.map((each, at): BackendConfig => {
    return { id: `b${at}`, weight: 1, healthInterval: 5000, timeout: 2000, ...each };
  });
  const watched: Watch = {
    reports: [],
    flows: false,
    askedFlowing: [],
    last() {
      const report = this.reports.at(-1);
      return [report?.health, report?.reason];
    },
    prober: new Prober(wanted, {
      report(id, each) {
        seen.set(id, each);
        watched.reports.push(each);
      },
      seen: (id) => seen.get(id),
      flowing(id, withinMs) {
        watched.askedFlowing.push([id, withinMs]);
        return watched.flows;
      },
    }),
  };
  return watched;
}

describe("health", () => {
  const engine = new Engine();
  beforeEach(async () => {
    engine.answer = lists("m");
    engine.asked.length = 0;
    await engine.start();
  });
  afterEach(() => engine.stop());

  const openai = (more: Partial<BackendConfig> = {}) =>
    watch({ kind: "openai", url: engine.url, ...more });

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
      models: [{ name: "m", digest: null, contextLength: 4096, capabilities: [], createdAt: 5 }],
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
    const watched = watch({ url: engine.url });
    engine.answer = json({ data: [{ id: "m", owned_by: "vllm" }] });
    await watched.prober.check("b0");
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

  it("is degraded while the engine loads, which is no failure", async () => {
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
    await engine.stop();
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
          details: { context_length: 8192 },
          capabilities: ["completion", "tools"],
        },
        { model: "only-model" },
        {},
      ],
    });
    const watched = watch({ kind: "ollama", url: engine.url });
    assert.equal(await watched.prober.check("b0"), true);
    assert.deepEqual(engine.asked, ["GET /api/tags"]);
    assert.deepEqual(watched.reports[0]?.kind, "ollama");
    assert.deepEqual(watched.reports[0]?.models, [
      {
        name: "llama3:8b",
        digest: "abc",
        contextLength: 8192,
        capabilities: ["completion", "tools"],
        createdAt: Date.parse("2026-11-22T00:00:00Z") / 1000,
      },
      { name: "only-model", digest: null, contextLength: null, capabilities: [], createdAt: null },
    ]);
  });

  it("finds out the kind where none is configured, and takes openai until then", async () => {
    await engine.stop();
    const watched = watch({ url: engine.url });
    await watched.prober.check("b0");
    assert.equal(watched.reports[0]?.kind, "openai");
    await engine.start();
    engine.answer = json({ data: [{ id: "m", owned_by: "vllm" }] });
    await watched.prober.check("b0");
    assert.deepEqual([watched.reports[1]?.kind, watched.reports[1]?.health], ["vllm", "healthy"]);
  });

  it("does not know who is not configured", async () => {
    const watched = openai();
    assert.equal(await watched.prober.check("nobody"), false);
    assert.deepEqual(watched.reports, []);
  });

  it("needs no server for the demo engine", async () => {
    const watched = watch({ kind: "demo", url: "" });
    assert.equal(await watched.prober.check("b0"), true);
    assert.deepEqual(
      watched.reports[0]?.models.map(({ name }) => name),
      ["demo"],
    );
  });
});

/** Lets every promise that can go on go on, without a timer. */
async function settle(): Promise<void> {
  for (let turns = 0; turns < 50; turns++) await Promise.resolve();
}

describe("the loop", () => {
  const original = globalThis.fetch;
  /** Probes under way, in order of their beginning. */
  const probes: { url: string; answer: (ids: string[]) => void; fail: () => void }[] = [];
  let most = 0;
  let running = 0;

  beforeEach(() => {
    probes.length = 0;
    most = 0;
    running = 0;
    mock.timers.enable({ apis: ["setTimeout"] });
    globalThis.fetch = ((url: string) => {
      running++;
      most = Math.max(most, running);
      return new Promise<Response>((resolve, reject) => {
        probes.push({
          url,
          answer(ids) {
            running--;
            resolve(Response.json({ data: ids.map((id) => ({ id })) }));
          },
          fail() {
            running--;
            reject(new TypeError("connection refused"));
          },
        });
      });
    }) as typeof fetch;
  });
  afterEach(() => {
    globalThis.fetch = original;
    mock.timers.reset();
  });

  const backend = { kind: "openai" as const, url: "http://127.0.0.1:1" };

  it("never has two probes of one backend under way", async () => {
    const { prober, reports } = watch({ ...backend, timeout: 60_000, healthInterval: 100 });
    const [one, other] = [prober.check("b0"), prober.check("b0")];
    const round = prober.start();
    await settle();
    mock.timers.tick(5000);
    await settle();
    assert.equal(probes.length, 1, "the interval is long over, the probe is not");
    probes[0]?.answer(["m"]);
    assert.deepEqual(await Promise.all([one, other]), [true, true]);
    await round;
    assert.equal(reports.length, 1, "one probe, one report");
    const next = prober.check("b0");
    await settle();
    assert.equal(probes.length, 2);
    probes[1]?.answer(["m"]);
    await next;
    assert.equal(most, 1);
    prober.stop();
  });

  it("probes again an interval after the last probe ended", async () => {
    const { prober } = watch({ ...backend, healthInterval: 1000 });
    const round = prober.start();
    await settle();
    probes[0]?.answer(["m"]);
    await round;
    mock.timers.tick(999);
    await settle();
    assert.equal(probes.length, 1);
    mock.timers.tick(1);
    await settle();
    assert.equal(probes.length, 2);
    probes[1]?.fail();
    await settle();
    mock.timers.tick(1000);
    await settle();
    assert.equal(probes.length, 3, "a failed probe does not end the loop");
    probes[2]?.answer([]);
    await settle();
    prober.stop();
  });

  it("has a pace per backend, and its first round is done when all have been looked at", async () => {
    const slow = { ...backend, url: "http://127.0.0.1:2", healthInterval: 5000 };
    const { prober } = watch({ ...backend, healthInterval: 1000 }, slow);
    let isDone = false;
    const round = prober.start().then(() => {
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
      mock.timers.tick(1000);
      await settle();
      probes.at(-1)?.answer(["m"]);
      await settle();
    }
    const asked = probes.map(({ url }) => new URL(url).port);
    assert.deepEqual(asked, ["1", "2", "1", "1", "1", "1"]);
    prober.stop();
  });

  it("gives up on a probe after its timeout, which may be longer than the interval", async () => {
    const watched = watch({ ...backend, timeout: 3000, healthInterval: 100 });
    const aborted: unknown[] = [];
    globalThis.fetch = ((_: string, init: RequestInit) =>
      new Promise((_resolve, reject) => {
        init.signal?.addEventListener("abort", () => {
          aborted.push(init.signal?.reason);
          reject(init.signal?.reason as Error);
        });
      })) as typeof fetch;
    const probe = watched.prober.check("b0");
    await settle();
    mock.timers.tick(2999);
    await settle();
    assert.equal(aborted.length, 0);
    mock.timers.tick(1);
    assert.equal(await probe, false);
    assert.equal(aborted.length, 1);
    assert.deepEqual(watched.last(), ["degraded", "no answer within 3000 ms"]);
  });

  it("stops: no further probe, though one is under way", async () => {
    const { prober, reports } = watch({ ...backend, healthInterval: 1000 });
    const round = prober.start();
    await settle();
    prober.stop();
    probes[0]?.answer(["m"]);
    await round;
    mock.timers.tick(100_000);
    await settle();
    assert.deepEqual([probes.length, reports.length], [1, 1]);
    const again = watch({ ...backend, healthInterval: 1000 });
    const first = again.prober.start();
    await settle();
    probes[1]?.answer(["m"]);
    await first;
    again.prober.stop();
    mock.timers.tick(100_000);
    await settle();
    assert.equal(probes.length, 2);
  });
});

describe("unseen", () => {
  it("is unknown, of the configured kind", () => {
    const backend = { id: "a", weight: 1, healthInterval: 1, timeout: 1 };
    assert.deepEqual(unseen({ ...backend, kind: "vllm" }), {
      kind: "vllm",
      health: "unknown",
      reason: "not probed yet",
      checkedAt: null,
      models: [],
    });
  });
});
