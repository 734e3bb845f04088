/**
 * Seeded runs of the whole data plane in virtual time: engines that fail in every way, clients that leave,
 * backends that come, go and move, second attempts. Whatever happens, nothing is lost and nothing is left.
 *
 * `RUNS=10000 bun test test/resilience/virtual.test.ts` runs more; `SEED` repeats a run.
 */
import assert from "node:assert/strict";
import process from "node:process";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import { schema } from "../../src/config.ts";
import type { Health, Snapshot } from "../../src/core/snapshot.ts";
import { prepareAccess } from "../../src/data/identify.ts";
import { serve } from "../../src/data/pipeline.ts";
import type { Plane } from "../../src/data/plane.ts";
import { chatCompletions } from "../../src/dialects/openai.ts";
import { Fleet } from "../../src/fleet/fleet.ts";
import { Log } from "../../src/telemetry/log.ts";
import { untraced } from "../../src/telemetry/tracing.ts";
import type { Random } from "../support/client.ts";
import { seeded } from "../support/client.ts";
import { emptyPlane } from "../support/plane.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";

const RUNS = Number(process.env.RUNS ?? 300);
const REQUESTS = 12;
/** Deno's time-out of a test runs on the clock that is mocked here. */
const OPTIONS = process.versions.bun === undefined ? {} : { timeout: 600_000 };
const IDS = ["a", "b", "c"];
const encoder = new TextEncoder();

const WAYS = [
  "whole",
  "whole",
  "whole",
  "slow",
  "refuses",
  "500",
  "busy",
  "400",
  "hangs",
  "cut",
  "reset",
  "error first",
  "error later",
] as const;
type Way = (typeof WAYS)[number];

function chunk(text: string, finish: string | null = null): Uint8Array {
  const choices = [{ index: 0, delta: { content: text }, finish_reason: finish }];
  return encoder.encode(`data: ${JSON.stringify({ id: "x", choices })}\n\n`);
}

function sleep(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason as Error);
    });
  });
}

/** Every engine at once, in the place of `fetch`. */
class Engines {
  /** Calls that neither ended nor were closed. */
  open = 0;
  /** Attempts under way by request id, and the most at once. */
  readonly running = new Map<string, number>();
  most = 0;
  /** Backends asked by request id, but for those that were busy. */
  readonly attempts = new Map<string, string[]>();
  calls = 0;
  readonly #random: Random;

  constructor(random: Random) {
    this.#random = random;
  }

  async fetch(url: string, init: RequestInit): Promise<Response> {
    const way = this.#random.pick(WAYS);
    const signal = init.signal ?? undefined;
    const id = new Headers(init.headers).get("x-request-id") ?? "";
    const backend = new URL(url).hostname.replace("-moved", "");
    if (way !== "busy") this.attempts.set(id, [...(this.attempts.get(id) ?? []), backend]);
    this.calls++;
    this.#count(id, 1);
    let ended = false;
    const end = () => {
      if (ended) return;
      ended = true;
      this.#count(id, -1);
    };
    signal?.addEventListener("abort", end);
    try {
      const isStream = String(new TextDecoder().decode(init.body as Uint8Array)).includes(
        '"stream":true',
      );
      return await this.#answer(way, isStream, signal, end);
    } catch (error) {
      end();
      throw error;
    }
  }

  #count(id: string, by: number) {
    this.open += by;
    const running = (this.running.get(id) ?? 0) + by;
    this.running.set(id, running);
    this.most = Math.max(this.most, running);
  }

  async #answer(way: Way, isStream: boolean, signal: AbortSignal | undefined, end: () => void) {
    if (way === "refuses") throw new TypeError("connection refused");
    await sleep(
      way === "hangs" ? 1e9 : this.#random.between(0, way === "slow" ? 900 : 120),
      signal,
    );
    const refuse = (status: number) => {
      end();
      return Response.json({ error: { message: "no", type: "x", code: null } }, { status });
    };
    if (way === "500") return refuse(500);
    if (way === "busy") return refuse(503);
    if (way === "400") return refuse(400);
    const error = encoder.encode(`data: {"error":{"message":"broken"}}\n\n`);
    const pieces: (Uint8Array | "reset")[] = [chunk("one"), chunk("two"), chunk("", "stop")];
    if (way === "cut") pieces.splice(this.#random.between(0, 2));
    if (way === "reset") pieces.splice(this.#random.between(0, 2), 3, "reset");
    if (way === "error first") pieces.splice(0, 3, error);
    if (way === "error later") pieces.splice(1, 2, error);
    if (!isStream) {
      const isWhole = pieces.length === 3 && way !== "error later";
      const whole = `{"id":"x","choices":[{"index":0,"message":{"content":"one two"},"finish_reason":"stop"}]}`;
      pieces.splice(0, 9, encoder.encode(isWhole ? whole : whole.slice(0, 30)));
    } else if (way === "whole" || way === "slow") pieces.push(encoder.encode("data: [DONE]\n\n"));
    const random = this.#random;
    const body = new ReadableStream<Uint8Array>({
      async pull(controller) {
        const piece = pieces.shift();
        await sleep(random.between(0, 30), signal);
        if (piece === undefined) {
          end();
          controller.close();
        } else if (piece === "reset") {
          end();
          controller.error(new TypeError("reset"));
        } else controller.enqueue(piece);
      },
      cancel: end,
    });
    return new Response(body, {
      headers: { "content-type": isStream ? "text/event-stream" : "application/json" },
    });
  }
}

describe("the data plane in virtual time", () => {
  const original = globalThis.fetch;
  beforeEach(() => mock.timers.enable({ apis: ["setTimeout"] }));
  afterEach(() => {
    globalThis.fetch = original;
    mock.timers.reset();
  });

  function snapshotOf(random: Random, ids: readonly string[]): Snapshot {
    const backends = ids.map((id) => {
      const health = random.pick<Health>([
        "healthy",
        "healthy",
        "healthy",
        "degraded",
        "unhealthy",
      ]);
      const moved = random.next() < 0.1 ? "-moved" : "";
      return aBackend(id, { health, url: `http://${id}${moved}`, drained: random.next() < 0.05 });
    });
    const targets = ids.map((id) => aTarget(id, "m", { slots: 2 }));
    return aSnapshot(backends, ids.length === 0 ? [] : [aModel("m", targets)]);
  }

  /** One turn of the event loop for everything that waits for no timer. */
  const turn = () => new Promise<void>((resolve) => setImmediate(resolve));

  async function run(random: Random) {
    const engines = new Engines(random);
    globalThis.fetch = ((url: string, init: RequestInit) =>
      engines.fetch(url, init)) as typeof fetch;
    let clock = 1000;
    const now = () => clock;
    const config = schema.parse({
      queue: { maxWaitMs: 3000, maxLength: 6, heartbeatMs: random.pick([0, 200]) },
      timeouts: { connectMs: 400, firstByteMs: 1200, idleMs: 500, clientMs: 800, totalMs: 2500 },
      circuitBreaker: { failureThreshold: random.between(1, 4), resetTimeoutMs: 300 },
    });
    let snapshot = snapshotOf(random, IDS);
    const fleet = new Fleet({
      now,
      maxLength: config.queue.maxLength,
      upstreamLimit: Infinity,
      breaker: config.circuitBreaker,
      random: () => random.next(),
      apiKeyOf: () => null,
      look: () => Promise.resolve(false),
      loaded: () => {},
    });
    fleet.apply(snapshot);
    const records: string[] = [];
    const plane: Plane = {
      ...emptyPlane(config),
      config,
      access: prepareAccess(config, []),
      fleet,
      log: new Log({
        level: "debug",
        json: true,
        colour: false,
        write: (line) => {
          if (line.includes('"msg":"request"')) records.push(line);
        },
      }),
      tracing: untraced,
      now,
      snapshot: () => snapshot,
      probe: () => Promise.resolve(random.next() < 0.5),
    };
    let answered = 0;
    const clients = Array.from({ length: REQUESTS }, async () => {
      await sleep(random.between(0, 1500), undefined);
      const leave = new AbortController();
      const stream = random.next() < 0.5;
      if (random.next() < 0.35) setTimeout(() => leave.abort(), random.between(0, 1500));
      const body = JSON.stringify({ model: "m", messages: [], stream });
      const url = "http://localhost/v1/chat/completions";
      const request = new Request(url, { method: "POST", body, signal: leave.signal });
      const response = await serve(request, chatCompletions, plane);
      const reader = response.body?.getReader();
      leave.signal.addEventListener("abort", () => void reader?.cancel().catch(() => {}));
      let text = "";
      try {
        for (;;) {
          const result = await reader?.read();
          if (result === undefined || result.done) break;
          text += new TextDecoder().decode(result.value);
        }
      } catch {
        // A client that left, or an answer in one piece that broke off.
      }
      answered++;
      if (leave.signal.aborted || response.status !== 200 || !stream) return;
      const isWhole = text.includes('"finish_reason":"stop"');
      assert.notEqual(isWhole, text.includes('"error"'), `one ending, and a true one: ${text}`);
    });
    for (let at = 0; at < 400 && answered < REQUESTS; at++) {
      await turn();
      const by = random.between(5, 60);
      clock += by;
      mock.timers.tick(by);
      if (random.next() < 0.1) {
        const ids = IDS.filter(() => random.next() < 0.8);
        snapshot = { ...snapshotOf(random, ids), version: snapshot.version + 1 };
        fleet.apply(snapshot);
      }
    }
    await Promise.race([Promise.all(clients), turn().then(turn).then(turn)]);
    for (let at = 0; at < 4; at++) await turn();
    assert.equal(answered, REQUESTS, "somebody waits for ever");
    assert.equal(plane.exchanges.size, 0);
    assert.equal(plane.heldBytes, 0);
    assert.equal(records.length, REQUESTS, "each request has one record");
    assert.equal(engines.open, 0, "an upstream was left open");
    assert(engines.most <= 1, "two attempts of one request at once");
    for (const attempts of engines.attempts.values()) {
      // Beside those that were busy there is one more at most, and elsewhere.
      assert(attempts.length <= 2 && new Set(attempts).size === attempts.length, attempts.join());
    }
    for (const { running, waiting } of fleet.usage()) assert.deepEqual([running, waiting], [0, 0]);
    fleet.close();
    return engines.calls;
  }

  it(`${RUNS} runs of ${REQUESTS} requests`, OPTIONS, async () => {
    const random = seeded("virtual");
    let attempts = 0;
    for (let at = 0; at < RUNS; at++) attempts += await run(random);
    console.log(`virtual: ${RUNS} runs, ${RUNS * REQUESTS} requests, ${attempts} attempts`);
    assert(attempts > RUNS);
  });
});
