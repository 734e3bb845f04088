/** A smaller model answers where the one that was asked for cannot now (contract §1 fallback, §3). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, SseEvent } from "../support/client.ts";
import { chatBody, dataOf, open, openaiChat, parseSse, send, until } from "../support/client.ts";
import { QUIET, cacheOf, inFlight, recordOf, sureChat } from "../support/deterministic.ts";
import type { FakeEngine } from "../support/engine.ts";
import { faults } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { checkEnvelope, expectError, startFleet } from "../support/fleet.ts";
import { withSink } from "../support/sink.ts";
import { by, isQuiet, tenantOf, withKeys } from "../support/tenants.ts";

const TIMEOUT = { timeout: 20_000 };
const NEVER = { headers: { "x-tidegate-degrade": "never" } };
const HELLO = [{ role: "user", content: "hello" }];
const PIXEL = { url: "data:image/png;base64,iVBORw0KGgo=" };
const PATHS = {
  "/v1/chat/completions": { messages: HELLO },
  "/v1/completions": { prompt: "hello" },
  "/v1/messages": { messages: HELLO, max_tokens: 9 },
  "/v1/responses": { input: "hello" },
};

/** Requests under way. Their answers too: a runtime may abort what nobody can read any more. */
let held: { controller: AbortController; response: Promise<Response> }[] = [];

/** A request that goes on until `leave`. @returns lets this one leave. */
function hold(url: string, path: string, body: Record<string, unknown>, headers = {}): () => void {
  const controller = new AbortController();
  const response = open(url + path, body, { headers, signal: controller.signal });
  response.catch(() => {});
  held.push({ controller, response });
  return () => controller.abort();
}

function leave(): void {
  for (const { controller } of held) controller.abort();
  held = [];
}

async function clear(fleet: Fleet<string>): Promise<void> {
  leave();
  assert.ok(await inFlight(fleet.gateway, 0), "nothing is under way any more");
  const engines = Object.values(fleet.engines);
  assert.ok(await until(() => engines.every((engine) => engine.activeGenerations() === 0)));
  fleet.reset();
}

/** Takes the only slot of a model, and so many places of its queue. */
async function occupy(fleet: Fleet<string>, engine: FakeEngine, model: string, waiting: number) {
  engine.behave({ stallAfterTokens: 1 });
  for (let at = 0; at <= waiting; at++) {
    hold(fleet.url, "/v1/chat/completions", chatBody({ model, stream: true }));
    assert.ok(await until(() => engine.activeGenerations() === 1));
    const queued = () => fleet.gateway.metric("tidegate_queue_requests", { model });
    assert.ok(await until(async () => (await queued()) === at));
  }
}

function told({ headers }: Answer) {
  return ["degraded", "model", "backend", "reason"].map((name) =>
    headers.get(`x-tidegate-${name}`),
  );
}

async function expectDegraded(
  fleet: Fleet<string>,
  answer: Answer,
  wanted: { asked?: string; served?: string; reason?: string; backend?: string },
) {
  const { asked = "big", served = "small", reason = "busy" } = wanted;
  const { backend = served } = wanted;
  assert.equal(answer.status, 200, answer.text);
  const why = `asked=${asked};reason=${reason}`;
  assert.deepEqual(told(answer), [why, served, backend, "degraded"]);
  const record = await recordOf(fleet.gateway, answer);
  assert.deepEqual([record.model, record.backend_id, record.reason], [served, backend, "degraded"]);
  assert.deepEqual([record.ending, record.cause], ["completed", null]);
  return record;
}

/** It is as if there were no smaller models. */
async function expectOwnError(fleet: Fleet<string>, answer: Answer, code = "rate_limit_exceeded") {
  expectError(answer, code === "rate_limit_exceeded" ? 429 : 503, code);
  assert.match(String((answer.json().error as { message: string }).message), /"big"/);
  assert.ok(Number(answer.headers.get("retry-after")) >= 1);
  const record = await recordOf(fleet.gateway, answer);
  assert.equal(answer.headers.get("x-tidegate-degraded"), null);
  assert.deepEqual([record.model, record.cause], ["big", code]);
  const { backend_id } = record;
  assert.ok(backend_id === null || backend_id === "big", String(backend_id));
  assert.notEqual(record.reason, "degraded");
}

function drain(fleet: Fleet<string>, id: string, how: "drain" | "resume" = "drain") {
  return send(`${fleet.url}/admin/api/backends/${id}/${how}`, "");
}

describe("a queue that is full", () => {
  let fleet: Fleet<"big" | "small" | "tiny">;
  before(async () => {
    const backend = { ...QUIET, concurrency: 1 };
    fleet = await startFleet(
      {
        big: { kind: "vllm", models: ["big", "embed-big"], backend },
        small: {
          kind: "vllm",
          models: ["small-v2", "embed-small"],
          backend: {
            ...backend,
            models: [{ name: "small", upstream: "small-v2" }, "embed-small"],
          },
        },
        // Found by asking, so that there may be names of which nobody knows whether they exist.
        tiny: { kind: "vllm", models: ["tiny", "further"], backend },
      },
      {
        queue: { maxLength: 1 },
        models: {
          // Itself by both its names, and others twice: a chain comes to its end all the same.
          big: {
            aliases: ["default"],
            fallback: ["default", "gone", "little", "small", "big", "tiny", "little", "tiny"],
          },
          small: { aliases: ["little"], maxOutputTokens: 7 },
          tiny: { fallback: "further" },
          "embed-big": { fallback: "embed-small" },
        },
      },
    );
  });
  afterEach(async () => {
    for (const id of ["small", "tiny"]) await drain(fleet, id, "resume");
    await clear(fleet);
  });
  after(() => fleet.close());

  for (const [path, body] of Object.entries(PATHS)) {
    it(`${path}: the next model answers, and says so`, TIMEOUT, async () => {
      const { big, small } = fleet.engines;
      await occupy(fleet, big, "big", 1);
      const labels = { model: "big", served: "small" };
      const counted = await fleet.gateway.metric("tidegate_degraded_total", labels);
      for (const stream of [true, false]) {
        const answer = await send(fleet.url + path, { model: "default", stream, ...body });
        const record = await expectDegraded(fleet, answer, {});
        assert.deepEqual([record.asked_model, record.stream], ["default", stream]);
        assert.deepEqual([record.attempts, record.status], [1, 200]);
        const sent = small.inference().at(-1);
        assert.deepEqual([sent?.path, sent?.json.model], [path, "small-v2"]);
        const bytes = sent?.sent().toString() ?? "";
        // But for the usage that nobody asked for.
        for (const { raw } of parseSse(answer.text).events) assert.ok(bytes.includes(raw), raw);
        if (!stream) assert.equal(answer.text, bytes);
      }
      const limit = path === "/v1/responses" ? "max_output_tokens" : "max_tokens";
      assert.equal(small.inference()[0]?.json[limit], 7, "the smaller model's own cap");
      assert.equal(small.inference().length, 2);
      assert.equal(big.inference().length, 1);
      const now = await fleet.gateway.metric("tidegate_degraded_total", labels);
      assert.equal(now - counted, 2);
      const requests = { model: "small", backend_id: "small", status: "200" };
      assert.ok((await fleet.gateway.metric("tidegate_requests_total", requests)) >= 2);
    });
  }

  it("nobody is degraded who can wait, or who is served", TIMEOUT, async () => {
    const { big, small } = fleet.engines;
    const answer = await openaiChat(fleet.url, { model: "big" });
    assert.deepEqual(told(answer), [null, "big", "big", "only"]);
    await occupy(fleet, big, "big", 0);
    const waiting = openaiChat(fleet.url, { model: "big" });
    await until(async () => (await fleet.gateway.metric("tidegate_queue_requests")) === 1);
    big.behave({ stallAfterTokens: null });
    leave();
    assert.deepEqual(told(await waiting), [null, "big", "big", "only"]);
    assert.equal(small.inference().length, 0);
  });

  it("never: the original error; anything else is a mistake", TIMEOUT, async () => {
    const { big, small, tiny } = fleet.engines;
    await occupy(fleet, big, "big", 1);
    for (const stream of [true, false]) {
      const body = { model: "big", stream };
      await expectOwnError(fleet, await openaiChat(fleet.url, body, NEVER));
      const init = { headers: { "x-tidegate-degrade": "always" } };
      const error = expectError(await openaiChat(fleet.url, body, init), 400, "invalid_parameter");
      assert.equal(error.param, "x-tidegate-degrade");
      assert.match(error.message, /always.*never/);
    }
    assert.deepEqual([small.inference().length, tiny.inference().length], [0, 0]);
  });

  it(
    "down the chain: the first one that can, for the reason of the first that cannot",
    TIMEOUT,
    async () => {
      const { big, small } = fleet.engines;
      await occupy(fleet, big, "big", 1);
      await drain(fleet, "small");
      const answer = await openaiChat(fleet.url, { model: "big" });
      await expectDegraded(fleet, answer, { served: "tiny" });
      assert.equal(small.inference().length, 0);
      assert.ok((await fleet.gateway.metric("tidegate_degraded_total", { served: "tiny" })) >= 1);
    },
  );

  it(
    "no further than the chain: the error is that of the model that was asked for",
    TIMEOUT,
    async () => {
      const { big, tiny } = fleet.engines;
      await occupy(fleet, big, "big", 1);
      await occupy(fleet, tiny, "tiny", 1);
      await drain(fleet, "small");
      for (const stream of [true, false]) {
        await expectOwnError(fleet, await openaiChat(fleet.url, { model: "big", stream }));
      }
      assert.deepEqual(
        tiny.inference().map(({ json }) => json.model),
        ["tiny"],
      );
      // It would have answered.
      await drain(fleet, "small", "resume");
      await expectDegraded(fleet, await openaiChat(fleet.url, { model: "big" }), {});
    },
  );

  it("a smaller one that fails is no answer either", TIMEOUT, async () => {
    const { big, small, tiny } = fleet.engines;
    await occupy(fleet, big, "big", 1);
    small.behave({ fault: faults.vllmContext });
    await expectOwnError(fleet, await openaiChat(fleet.url, { model: "big" }));
    // Not what was held before and arrived after its client had gone.
    const asked = [small, tiny].map((engine) => {
      return engine.inference().filter(({ json }) => json["stream"] !== true).length;
    });
    assert.deepEqual(asked, [1, 0]);
  });

  it("embeddings: never", TIMEOUT, async () => {
    const { big, small } = fleet.engines;
    await occupy(fleet, big, "big", 0);
    hold(fleet.url, "/v1/embeddings", { model: "embed-big", input: "waits" });
    const queued = () => fleet.gateway.metric("tidegate_queue_requests", { model: "embed-big" });
    assert.ok(await until(async () => (await queued()) === 1));
    const ask = (model: string, control = "") =>
      send(
        `${fleet.url}/v1/embeddings`,
        { model, input: "some text" },
        { headers: { "cache-control": control } },
      );
    for (const control of ["", "no-store"]) {
      expectError(await ask("embed-big", control), 429, "rate_limit_exceeded");
    }
    assert.equal(small.inference().length, 0);
    assert.equal((await ask("embed-small")).status, 200, "it could have");
  });

  it("deterministic: all of a flight are told, and nothing is kept", TIMEOUT, async () => {
    const { big, small } = fleet.engines;
    await occupy(fleet, big, "big", 1);
    small.behave({ headersDelayMs: 400 });
    const body = sureChat("the same", { model: "big" });
    const first = openaiChat(fleet.url, body);
    assert.ok(await until(() => small.inference().length === 1));
    const joined = [1, 2].map(() => openaiChat(fleet.url, body));
    const strict = await openaiChat(fleet.url, body, NEVER);
    await expectOwnError(fleet, strict);
    const answers = [await first, ...(await Promise.all(joined))];
    assert.deepEqual(answers.map(cacheOf), ["miss", "joined", "joined"]);
    for (const answer of answers) await expectDegraded(fleet, answer, {});
    assert.equal(small.inference().length, 1);
    small.behave({ headersDelayMs: 0 });
    const again = await openaiChat(fleet.url, body);
    assert.equal(cacheOf(again), "miss");
    await expectDegraded(fleet, again, {});
    assert.equal(small.inference().length, 2);
    // Under the smaller model's own name it is another question.
    assert.equal(cacheOf(await openaiChat(fleet.url, { ...body, model: "small" })), "miss");
    await clear(fleet);
    const itself = await openaiChat(fleet.url, body);
    assert.equal(cacheOf(itself), "miss");
    assert.deepEqual(told(itself), [null, "big", "big", "only"]);
    assert.equal(cacheOf(await openaiChat(fleet.url, body)), "hit");
  });

  it("a flight for which nothing can: everybody has the original error", TIMEOUT, async () => {
    const { big } = fleet.engines;
    await occupy(fleet, big, "big", 1);
    for (const id of ["small", "tiny"]) await drain(fleet, id);
    const body = sureChat("nobody", { model: "big" });
    await expectOwnError(fleet, await openaiChat(fleet.url, body));
  });

  it("who leaves while a smaller one is waited for has left the queue", TIMEOUT, async () => {
    const { big, small } = fleet.engines;
    big.behave({ fault: faults.ollamaLoadFailed });
    await occupy(fleet, small, "small", 0);
    const go = hold(fleet.url, "/v1/chat/completions", chatBody({ model: "big" }));
    const queued = () => fleet.gateway.metric("tidegate_queue_requests", { model: "small" });
    assert.ok(await until(async () => (await queued()) === 1));
    go();
    const record = await fleet.gateway.record(({ asked_model, model, ending }) => {
      return asked_model === "big" && model === "small" && ending === "cancelled";
    });
    assert.equal(record.attempts, 1);
    assert.deepEqual([record.ending, record.cause], ["cancelled", "queued"]);
  });
});

describe("a deadline", () => {
  let fleet: Fleet<"big" | "small">;
  before(async () => {
    const backend = { ...QUIET, concurrency: 1 };
    fleet = await startFleet(
      { big: { models: ["big"], backend }, small: { models: ["small"], backend } },
      {
        queue: { maxWaitMs: 400, heartbeatMs: 100 },
        models: { big: { fallback: "small" } },
      },
    );
  });
  afterEach(() => clear(fleet));
  after(() => fleet.close());

  // First: nothing has been measured yet.
  it("that has come: a free slot of the smaller model", TIMEOUT, async () => {
    const { big, small } = fleet.engines;
    await occupy(fleet, big, "big", 0);
    const startedAt = performance.now();
    const answer = await openaiChat(fleet.url, { model: "big" });
    assert.ok(performance.now() - startedAt >= 390, "it waited for the model itself");
    const record = await expectDegraded(fleet, answer, {});
    assert.ok(Number(record.queue_ms) >= 300, String(record.queue_ms));
    assert.equal(small.inference().length, 1);
    await occupy(fleet, small, "small", 0);
    await expectOwnError(fleet, await openaiChat(fleet.url, { model: "big" }));
  });

  it("of a flight: that of all who are in it", TIMEOUT, async () => {
    const { big, small } = fleet.engines;
    await occupy(fleet, big, "big", 0);
    const body = sureChat("until the end", { model: "big" });
    const answers = await Promise.all([1, 2, 3].map(() => openaiChat(fleet.url, body)));
    for (const answer of answers) await expectDegraded(fleet, answer, {});
    assert.equal(small.inference().length, 1);
  });

  it("of one in a flight whose others wait on: the original error", TIMEOUT, async () => {
    const { big } = fleet.engines;
    await occupy(fleet, big, "big", 0);
    const body = sureChat("some longer", { model: "big" });
    const init = { headers: { "x-stainless-timeout": "0.1" } };
    const patient = openaiChat(fleet.url, body);
    await inFlight(fleet.gateway, 2);
    const hasty = await openaiChat(fleet.url, body, init);
    assert.ok([429, 504].includes(hasty.status), hasty.text);
    assert.equal(hasty.headers.get("x-tidegate-degraded"), null);
    await expectDegraded(fleet, await patient, {});
  });

  it("of a stream that is open: its comment says so", TIMEOUT, async () => {
    const { big } = fleet.engines;
    await occupy(fleet, big, "big", 0);
    const answer = await openaiChat(fleet.url, { model: "big", stream: true });
    assert.deepEqual(told(answer), [null, "big", "big", "only"], "opened before that");
    const comments = parseSse(answer.text).events.flatMap(({ comment }: SseEvent) => comment ?? []);
    assert.ok(comments.length >= 3, answer.text);
    const routed = JSON.parse(comments.at(-1)?.slice("tidegate ".length) ?? "") as object;
    const { "x-tidegate-degraded": why, ...others } = routed as Record<string, string>;
    assert.equal(why, "asked=big;reason=busy");
    assert.deepEqual(
      [others["x-tidegate-model"], others["x-tidegate-backend"], others["x-tidegate-reason"]],
      ["small", "small", "degraded"],
    );
    assert.equal(dataOf(answer.text).length, 7);
    assert.ok(answer.text.endsWith("data: [DONE]\n\n"));
    const [error] = dataOf(
      (await openaiChat(fleet.url, { model: "big", stream: true }, NEVER)).text,
    );
    assert.equal(checkEnvelope(error?.error).code, "rate_limit_exceeded");
  });

  it("that would be missed, as measured: at once", TIMEOUT, async () => {
    const { big } = fleet.engines;
    big.behave({ headersDelayMs: 2000 });
    assert.equal((await openaiChat(fleet.url, { model: "big" })).status, 200);
    big.behave({ headersDelayMs: 0 });
    await occupy(fleet, big, "big", 0);
    const answer = await openaiChat(fleet.url, { model: "big" });
    const record = await expectDegraded(fleet, answer, {});
    assert.ok(Number(record.queue_ms) < 200, String(record.queue_ms));
    const init = { headers: { "x-slo-ttft-ms": "50" } };
    await expectDegraded(fleet, await openaiChat(fleet.url, { model: "big" }, init), {});
  });
});

describe("a model that cannot be loaded", () => {
  for (const [reason, behaviour] of [
    ["memory", { loadFails: true, loadMs: 20 }],
    ["load", { loadMs: 60_000 }],
  ] as const) {
    it(`reason=${reason}, now and while it is left alone`, TIMEOUT, async () => {
      const fleet = await startFleet(
        {
          big: { kind: "ollama", models: ["big:1"], behaviour: { maxLoaded: 1 }, backend: QUIET },
          small: { models: ["small"], backend: QUIET },
        },
        { timeouts: { loadMs: 200 }, models: { "big:1": { fallback: "small" } } },
      );
      try {
        const { big, small } = fleet.engines;
        big.behave(behaviour);
        const wanted = { asked: "big:1", reason };
        for (const stream of [true, false]) {
          const answer = await openaiChat(fleet.url, { model: "big", stream });
          const record = await expectDegraded(fleet, answer, wanted);
          assert.equal(record.attempts, 1);
        }
        assert.equal(big.loads.length, 1, "it is left alone after that");
        assert.equal(small.inference().length, 2);
        const strict = await openaiChat(fleet.url, { model: "big" }, NEVER);
        expectError(strict, 503, "model_load_failed");
        assert.equal(strict.headers.get("x-tidegate-model"), null);
      } finally {
        await fleet.close();
      }
    });
  }
});

describe("a model that is down", () => {
  const start = (
    big: Record<string, unknown>,
    circuitBreaker: Record<string, unknown> = { failureThreshold: 2 },
    more: Record<string, unknown> = {},
    env: Record<string, string> = {},
  ) =>
    startFleet(
      {
        big: { models: ["big"], backend: { models: ["big"], ...big } },
        small: { models: ["small"], backend: { ...QUIET, models: ["small"] } },
      },
      { circuitBreaker, models: { big: { fallback: "small" } }, ...more },
      { env },
    );

  it("by its breaker, from the failure on that opens it", TIMEOUT, async () => {
    const fleet = await start(QUIET);
    try {
      const { big, small } = fleet.engines;
      big.behave({ fault: { kind: "drop", by: "reset" } });
      const failed = await openaiChat(fleet.url, { model: "big" });
      expectError(failed, 502, "upstream_unreachable");
      assert.equal(
        small.inference().length,
        0,
        "a failure alone is none of a smaller model's business",
      );
      for (const stream of [true, false, true]) {
        const answer = await openaiChat(fleet.url, { model: "big", stream });
        const record = await expectDegraded(fleet, answer, { reason: "down" });
        assert.equal(record.attempts, 2, "one found out whether it works again");
      }
      const strict = await openaiChat(fleet.url, { model: "big" }, NEVER);
      expectError(strict, 502, "upstream_unreachable");
      assert.equal(strict.headers.get("x-tidegate-model"), "big");
      // One at a time finds out, and the others do not wait for it.
      big.behave({ headersDelayMs: 500 });
      const all = await Promise.all([1, 2, 3].map(() => openaiChat(fleet.url, { model: "big" })));
      const records = await Promise.all(all.map((answer) => recordOf(fleet.gateway, answer)));
      const attempts = records.map((record) => Number(record.attempts));
      assert.deepEqual(
        attempts.toSorted((a, b) => a - b),
        [1, 1, 2],
      );
      big.behave({ fault: null, headersDelayMs: 0 });
      assert.deepEqual(told(await openaiChat(fleet.url, { model: "big" })), [
        null,
        "big",
        "big",
        "trial",
      ]);
    } finally {
      await fleet.close();
    }
  });

  it("by its health, or by hand; and back again", TIMEOUT, async () => {
    const fleet = await start({ healthInterval: 100 }, { failureThreshold: 1000 });
    try {
      const { big } = fleet.engines;
      const health = () =>
        fleet.gateway.metric("tidegate_backend_health", { backend_id: "big", state: "unhealthy" });
      big.stopListening();
      assert.ok(await until(async () => (await health()) === 1));
      const answer = await openaiChat(fleet.url, { model: "big" });
      await expectDegraded(fleet, answer, { reason: "down" });
      await big.listenAgain();
      assert.ok(await until(async () => (await health()) === 0));
      assert.deepEqual(told(await openaiChat(fleet.url, { model: "big" }))[0], null);
      await drain(fleet, "big");
      const by = await openaiChat(fleet.url, { model: "big" });
      await expectDegraded(fleet, by, { reason: "down" });
      await expectOwnError(
        fleet,
        await openaiChat(fleet.url, { model: "big" }, NEVER),
        "no_backend_available",
      );
    } finally {
      await fleet.close();
    }
  });

  it("by what its engine says of its memory", TIMEOUT, async () => {
    const fleet = await start(QUIET);
    try {
      fleet.engines.big.behave({ fault: faults.ollamaLoadFailed });
      for (const stream of [true, false]) {
        const answer = await openaiChat(fleet.url, { model: "big", stream });
        await expectDegraded(fleet, answer, { reason: "memory" });
      }
    } finally {
      await fleet.close();
    }
  });

  it("as its trace tells", TIMEOUT, () =>
    withSink(async (sink) => {
      const telemetry = { otlpEndpoint: sink.url };
      const env = { OTEL_BSP_SCHEDULE_DELAY: "50" };
      const fleet = await start(QUIET, {}, { telemetry }, env);
      try {
        fleet.engines.big.behave({ fault: faults.ollamaLoadFailed });
        // By its length it is the event, and not the word in a header.
        const isTold = await until(async () => {
          const answer = await openaiChat(fleet.url, { model: "big" });
          await expectDegraded(fleet, answer, { reason: "memory" });
          return sink.has("\u0007degrade");
        });
        assert.ok(isTold);
      } finally {
        await fleet.close();
      }
      for (const text of ["asked", "served", "memory"]) assert.ok(sink.has(text), text);
    }),
  );
});

describe("a smaller model that does not fit", () => {
  let fleet: Fleet<"big" | "known" | "unknown" | "plain">;
  before(async () => {
    const backend = { ...QUIET, concurrency: 1 };
    const long = { contextLength: 8000 };
    fleet = await startFleet(
      {
        big: { models: ["big", "brief"], backend },
        known: {
          kind: "ollama",
          models: [
            { name: "plain:1", capabilities: ["completion"], ...long },
            { name: "able:1", capabilities: ["completion", "tools", "vision"], ...long },
            { name: "short:1", capabilities: ["completion"], contextLength: 200 },
          ],
          backend: QUIET,
        },
        // Says that its model completes, and of tools and images nothing.
        unknown: { kind: "sglang", models: ["unknown"], backend: QUIET },
        // Says nothing at all.
        plain: { models: ["plain"], backend: QUIET },
      },
      {
        queue: { maxLength: 1 },
        models: {
          big: { fallback: ["plain:1", "able:1"] },
          brief: { fallback: ["short:1", "plain:1", "unknown", "plain"] },
          "short:1": { maxOutputTokens: 150 },
        },
      },
    );
    for (const model of ["plain:1", "able:1", "short:1"]) {
      assert.equal((await openaiChat(fleet.url, { model })).status, 200);
    }
    fleet.reset();
  });
  afterEach(() => clear(fleet));
  after(() => fleet.close());

  const tool = { type: "function", function: { name: "f", parameters: { type: "object" } } };
  const seen = [{ role: "user", content: [{ type: "image_url", image_url: PIXEL }] }];
  const words = (count: number) => [{ role: "user", content: "word ".repeat(count) }];

  for (const [model, what, body, served, backend] of [
    ["big", "nothing special", {}, "plain:1", "known"],
    ["big", "tools", { tools: [tool] }, "able:1", "known"],
    ["big", "no tools", { tools: [] }, "plain:1", "known"],
    ["big", "an image", { messages: seen }, "able:1", "known"],
    ["brief", "a short prompt", {}, "short:1", "known"],
    ["brief", "a long prompt", { messages: words(200) }, "plain:1", "known"],
    ["brief", "a long answer, which is capped", { max_tokens: 5000 }, "short:1", "known"],
    ["brief", "tools", { tools: [tool] }, "unknown", "unknown"],
    ["brief", "an image", { messages: seen }, "unknown", "unknown"],
    ["brief", "a very long prompt", { messages: words(9000) }, "plain", "plain"],
  ] as const) {
    it(`${model}, with ${what}: ${served}`, TIMEOUT, async () => {
      await occupy(fleet, fleet.engines.big, model, 1);
      const answer = await openaiChat(fleet.url, { model, ...body });
      await expectDegraded(fleet, answer, { asked: model, served, backend });
    });
  }

  it("none that fits: the original error", TIMEOUT, async () => {
    await occupy(fleet, fleet.engines.big, "big", 1);
    const body = { model: "big", messages: words(9000) };
    await expectOwnError(fleet, await openaiChat(fleet.url, body));
  });
});

describe("tenants", () => {
  it("get no model that they may not use, and pay once", TIMEOUT, async () => {
    const budgets = [{ tokens: 100_000, window: "day" }];
    const models = ["big", "small"];
    const backend = { ...QUIET, concurrency: 1 };
    const fleet = await startFleet(
      { big: { models: ["big"], backend }, small: { models: ["small"], backend } },
      {
        queue: { maxLength: 1 },
        models: { big: { fallback: "small" } },
        ...withKeys({ all: { models, budgets }, few: { models: ["big"] }, other: {} }),
      },
    );
    try {
      const { big, small } = fleet.engines;
      big.behave({ stallAfterTokens: 1 });
      for (const user of ["runs", "waits"]) {
        const body = chatBody({ model: "big", stream: true, user });
        hold(fleet.url, "/v1/chat/completions", body, by("other").headers);
        assert.ok(await until(() => big.activeGenerations() === 1));
      }
      const queued = () => fleet.gateway.metric("tidegate_queue_requests");
      assert.ok(await until(async () => (await queued()) === 1));

      await expectOwnError(fleet, await openaiChat(fleet.url, { model: "big" }, by("few")));
      assert.equal(small.inference().length, 0);

      small.behave({ promptTokens: 11, tokens: 5, headersDelayMs: 200 });
      const under = openaiChat(fleet.url, { model: "big" }, by("all"));
      assert.ok(await until(() => small.inference().length === 1));
      const [held] = (await tenantOf(fleet.url, "all")).budgets;
      const once = 1000 + Math.ceil(JSON.stringify(chatBody({ model: "big" })).length * 0.28 + 4);
      assert.ok(held !== undefined && Math.abs(held.reserved - once) < 20, `${held?.reserved}`);
      await expectDegraded(fleet, await under, {});
      leave();
      await isQuiet(fleet.gateway);
      const { budgets: settled, tokens } = await tenantOf(fleet.url, "all");
      assert.deepEqual([settled[0]?.used, settled[0]?.reserved], [16, 0]);
      assert.deepEqual([tokens.input, tokens.output], [11, 5]);
      const spent = await fleet.gateway.metric("tidegate_tokens_total", { model: "small" });
      assert.equal(spent, 16);
    } finally {
      await fleet.close();
    }
  });
});

describe("a promise is for the model that was asked for", () => {
  let fleet: Fleet<"big" | "small">;
  before(async () => {
    const backend = { ...QUIET, concurrency: 1 };
    fleet = await startFleet(
      {
        big: { kind: "vllm", models: ["big"], backend },
        small: { kind: "vllm", models: ["small"], backend },
      },
      { queue: { maxLength: 1 }, models: { big: { fallback: "small" } } },
    );
  });
  afterEach(() => clear(fleet));
  after(() => fleet.close());

  it("and for nobody whom a smaller one has served", TIMEOUT, async () => {
    // Nothing of it has been measured: an answer counts as 10 s.
    await occupy(fleet, fleet.engines.big, "big", 1);
    for (let each = 0; each < 10; each++) {
      await expectDegraded(fleet, await openaiChat(fleet.url, { model: "big" }), {});
    }
    const refused = await openaiChat(fleet.url, { model: "big" }, NEVER);
    expectError(refused, 429, "rate_limit_exceeded");
    const seconds = Number(refused.headers.get("retry-after"));
    assert.ok(seconds <= 22, `${seconds} s, and ten were served elsewhere`);
  });

  it("and not for the smaller one that refused it as well", TIMEOUT, async () => {
    await occupy(fleet, fleet.engines.big, "big", 1);
    await occupy(fleet, fleet.engines.small, "small", 1);
    const ask = (model: string) => openaiChat(fleet.url, { model });
    const answers = [];
    for (let each = 0; each < 10; each++) answers.push(await ask("big"));
    const secondsOf = ({ headers }: Answer) => Number(headers.get("retry-after"));
    for (const answer of answers) expectError(answer, 429, "rate_limit_exceeded");
    assert.ok(secondsOf(answers.at(-1) as Answer) >= 50, "each is told a later time");
    const small = await ask("small");
    expectError(small, 429, "rate_limit_exceeded");
    assert.ok(secondsOf(small) <= 22, `${secondsOf(small)} s, and they come back for big`);
  });
});
