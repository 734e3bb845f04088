/** What every answer carries, our own endpoints, the record and the metrics (contract §3, §5, §6). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, connect, openaiChat, postBytes, send, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectAnthropicError, expectError, startFleet } from "../support/fleet.ts";
import { sumOf } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };
const RECORD_FIELDS = [
  "time level msg request_id client_request_id trace_id tenant endpoint model asked_model backend_id",
  "stream cache_hit cache ttft tokens_generated tokens_input tokens_estimated latency_ms status ending",
  "cause attempts reason queue_ms load_ms",
]
  .join(" ")
  .split(" ");

describe("surface", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet({ a: { models: ["test-model"] } });
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const recordOf = (headers: Headers): Promise<Record<string, unknown>> =>
    fleet.gateway.record(headers.get("x-request-id") ?? "");

  it("says what it is, that it lives, that it is ready", TIMEOUT, async () => {
    assert.equal((await send(fleet.url)).status, 200);
    const head = await send(fleet.url, undefined, { method: "HEAD" });
    assert.deepEqual([head.status, head.text], [200, ""]);
    const health = (await send(`${fleet.url}/health`)).json();
    assert.equal(health.status, "ok");
    assert.equal(typeof health.version, "string");
    assert.equal(typeof health.uptime_s, "number");
    const ready = (await send(`${fleet.url}/ready`)).json() as {
      ready: boolean;
      backends: unknown;
    };
    assert.equal(ready.ready, true);
    assert.deepEqual(ready.backends, [{ id: "a", health: "healthy", drained: false }]);
  });

  it("answers 404 for an unknown URL, 405 with the methods that are allowed", TIMEOUT, async () => {
    expectError(await send(`${fleet.url}/nope`), 404, "unknown_url");
    expectError(await send(`${fleet.url}/v1/nope`, chatBody()), 404, "unknown_url");
    const wrong = await send(`${fleet.url}/v1/chat/completions`);
    expectError(wrong, 405, "method_not_allowed");
    assert.match(wrong.headers.get("allow") ?? "", /\bPOST\b/);
    assert.doesNotMatch(wrong.headers.get("allow") ?? "", /\bGET\b/);
    const deleted = await send(`${fleet.url}/v1/models`, undefined, { method: "DELETE" });
    expectError(deleted, 405, "method_not_allowed");
    assert.match(deleted.headers.get("allow") ?? "", /\bGET\b/);
    const anthropic = await send(`${fleet.url}/v1/messages`);
    expectAnthropicError(anthropic, 405, "invalid_request_error");
  });

  it("gives every answer an id of its own", TIMEOUT, async () => {
    const ids = new Set<string>();
    for (const path of ["/", "/health", "/ready", "/metrics", "/v1/models", "/nope"]) {
      for (let count = 0; count < 2; count += 1) {
        const { headers } = await send(fleet.url + path, undefined, {
          headers: { "x-request-id": "chosen-by-the-client" },
        });
        const id = headers.get("x-request-id") ?? "";
        assert.match(id, /^[a-z0-9-]{16,36}$/, path);
        ids.add(id);
      }
    }
    assert.equal(ids.size, 12);
  });

  it("tells in the headers of an answer where it came from", TIMEOUT, async () => {
    const { headers } = await openaiChat(fleet.url);
    assert.equal(headers.get("x-tidegate-backend"), "a");
    assert.equal(headers.get("x-tidegate-model"), "test-model");
    assert.equal(headers.get("x-tidegate-reason"), "only");
    assert.equal(headers.get("x-tidegate-attempts"), "1");
    assert.equal(headers.get("x-tidegate-cache"), "bypass;reason=temperature");
    const timing = headers.get("server-timing") ?? "";
    for (const phase of ["accept", "queue", "connect", "generate"]) {
      assert.match(timing, new RegExp(`(^|, ?)${phase};dur=\\d+(\\.\\d+)?`), timing);
    }
    assert.doesNotMatch(timing, /first_token/);
    assert.equal(headers.get("content-type"), "application/json");
    assert.equal(headers.get("request-id"), null, "only on Anthropic's routes");
  });

  it(
    "marks a stream as one, and passes nothing of the engine's but its type",
    TIMEOUT,
    async () => {
      fleet.engines.a.behave({
        headers: { "Set-Cookie": "a=b", Server: "uvicorn", "X-Engine": "secret" },
      });
      const { headers } = await openaiChat(fleet.url, { stream: true });
      assert.match(headers.get("content-type") ?? "", /^text\/event-stream/);
      assert.equal(headers.get("cache-control"), "no-cache");
      assert.equal(headers.get("x-accel-buffering"), "no");
      for (const name of ["set-cookie", "server", "x-engine"])
        assert.equal(headers.get(name), null, name);
      assert.match(headers.get("server-timing") ?? "", /queue;dur=\d/);
      assert.equal(headers.get("x-tidegate-backend"), "a");
    },
  );

  it("writes one record per request, with every field of the contract", TIMEOUT, async () => {
    const before = fleet.gateway.records().length;
    const { headers } = await openaiChat(
      fleet.url,
      { stream: true },
      { headers: { "x-request-id": "client-42" } },
    );
    const record = await recordOf(headers);
    for (const field of RECORD_FIELDS) assert.ok(field in record, `record without ${field}`);
    assert.equal(fleet.gateway.records().length, before + 1);
    assert.equal(record.client_request_id, "client-42");
    assert.equal(record.endpoint, "/v1/chat/completions");
    assert.deepEqual(
      [record.model, record.asked_model, record.backend_id, record.stream, record.status],
      ["test-model", "test-model", "a", true, 200],
    );
    assert.deepEqual([record.ending, record.cause, record.attempts], ["completed", null, 1]);
    assert.deepEqual([record.cache_hit, record.cache], [false, "bypass;reason=stream"]);
    // The engine's own count, asked for behind the client's back: five tokens, five words of prompt.
    assert.deepEqual(
      [record.tokens_generated, record.tokens_input, record.tokens_estimated],
      [5, 5, false],
    );
    assert.ok(typeof record.ttft === "number" && record.ttft >= 0);
    assert.ok(typeof record.latency_ms === "number" && record.latency_ms >= record.ttft);
    assert.ok(!Number.isNaN(Date.parse(String(record.time))) || typeof record.time === "number");
  });

  it("serves one request after the other on a connection", TIMEOUT, async () => {
    const client = await connect(fleet.gateway.port);
    for (const count of [1, 2, 3]) {
      const bytes = postBytes("/v1/chat/completions", chatBody({ stream: count === 2 }));
      client.write(bytes);
      const answers = (): number => client.received().split("HTTP/1.1 200").length - 1;
      const ends = (): boolean => /(word4"[^]*\}|0\r\n\r\n)$/.test(client.received());
      assert.ok(await until(() => answers() === count && ends()), client.received());
    }
    client.leave("close");
    assert.ok(await until(() => fleet.engines.a.inference().every(({ completed }) => completed)));
    assert.ok(
      fleet.gateway
        .records()
        .slice(-3)
        .every(({ ending }) => ending === "completed"),
    );
  });

  it("has no ttft for an answer in one piece", TIMEOUT, async () => {
    const { headers } = await openaiChat(fleet.url);
    const record = await recordOf(headers);
    assert.deepEqual([record.ttft, record.stream, record.tokens_generated], [null, false, 5]);
  });

  it("never writes down what was said", TIMEOUT, async () => {
    fleet.engines.a.behave({ tokens: ["the-answer-9317"] });
    const messages = [{ role: "user", content: "the-prompt-4711" }];
    const { headers } = await openaiChat(fleet.url, { messages });
    await recordOf(headers);
    assert.doesNotMatch(
      fleet.gateway.stdout() + fleet.gateway.stderr(),
      /the-prompt-4711|the-answer-9317/,
    );
  });

  it("counts deltas where the engine does not, and says so", TIMEOUT, async () => {
    const chunk = (content: string, reason: string | null): string =>
      `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content }, finish_reason: reason }] })}\n\n`;
    const body = `${chunk("a", null)}${chunk("b", null)}${chunk("c", "stop")}data: [DONE]\n\n`;
    fleet.engines.a.behave({ fault: { kind: "raw", body } });
    const { headers, text } = await openaiChat(fleet.url, { stream: true });
    assert.equal(text, body);
    const record = await recordOf(headers);
    assert.deepEqual([record.tokens_generated, record.tokens_estimated], [3, true]);
  });

  it("answers Anthropic's routes with request-id", TIMEOUT, async () => {
    const answer = await send(`${fleet.url}/v1/messages`, chatBody({ max_tokens: 9 }));
    assert.equal(answer.status, 200);
    assert.equal(answer.json().type, "message");
    assert.equal(answer.headers.get("request-id"), answer.headers.get("x-request-id"));
    const record = await recordOf(answer.headers);
    assert.deepEqual([record.endpoint, record.tokens_generated], ["/v1/messages", 5]);
    const count = await send(`${fleet.url}/v1/messages/count_tokens`, chatBody());
    assert.equal(count.json().input_tokens, 5);
  });

  it("serves completions, embeddings and responses as the engine does", TIMEOUT, async () => {
    const { engines } = fleet;
    const bodies: Record<string, unknown> = {
      "/v1/completions": { model: "test-model", prompt: "a b" },
      "/v1/embeddings": { model: "test-model", input: ["a", "b"] },
      "/v1/responses": { model: "test-model", input: "a b" },
    };
    for (const [path, body] of Object.entries(bodies)) {
      const answer = await send(fleet.url + path, body);
      assert.equal(answer.status, 200, answer.text);
      assert.deepEqual(answer.body, engines.a.requests.at(-1)?.sent(), path);
      const record = await recordOf(answer.headers);
      assert.deepEqual([record.endpoint, record.status], [path, 200]);
    }
  });

  it("has the metrics of the contract, consistent with what happened", TIMEOUT, async () => {
    const before = await fleet.gateway.metrics();
    await openaiChat(fleet.url, { stream: true });
    await openaiChat(fleet.url);
    await openaiChat(fleet.url, { model: "nope" });
    const grown = async (name: string, labels: Record<string, string> = {}): Promise<number> =>
      sumOf(await fleet.gateway.metrics(), name, labels) - sumOf(before, name, labels);
    assert.ok(await until(async () => (await grown("tidegate_requests_total")) === 3));
    const ok = { model: "test-model", backend_id: "a", cache_hit: "false", status: "200" };
    assert.equal(await grown("tidegate_requests_total", ok), 2);
    assert.equal(await grown("tidegate_requests_total", { model: "none", status: "404" }), 1);
    assert.equal(
      await grown("tidegate_attempts_total", { backend_id: "a", outcome: "success" }),
      2,
    );
    assert.equal(await grown("tidegate_endings_total", { ending: "completed" }), 2);
    assert.equal(await grown("tidegate_tokens_total", { type: "output" }), 10);
    assert.equal(await grown("tidegate_tokens_total", { type: "input" }), 10);
    assert.equal(await grown("tidegate_ttft_seconds_count"), 1, "streams only");
    assert.equal(
      await grown("tidegate_request_duration_seconds_count", { model: "test-model" }),
      2,
    );
    assert.equal(await grown("tidegate_queue_wait_seconds_count"), 2);
    const text = await fleet.gateway.metrics();
    for (const gauge of [
      "tidegate_requests_in_flight",
      "tidegate_queue_requests",
      "tidegate_slots_in_use",
      "tidegate_held_body_bytes",
    ]) {
      assert.ok(new RegExp(`^# TYPE ${gauge} gauge$`, "m").test(text), gauge);
      assert.equal(sumOf(text, gauge), 0, gauge);
    }
    for (const name of [
      "tidegate_slots",
      "tidegate_backend_health",
      "tidegate_build_info",
      "tidegate_event_loop_delay_seconds",
      "process_resident_memory_bytes",
      "process_cpu_seconds_total",
      "process_start_time_seconds",
    ]) {
      assert.ok(new RegExp(`^${name}(\\{.*\\})? \\S+$`, "m").test(text), name);
    }
    assert.equal(sumOf(text, "tidegate_backend_health", { backend_id: "a", state: "healthy" }), 1);
    assert.equal(
      sumOf(text, "tidegate_backend_health", { backend_id: "a", state: "unhealthy" }),
      0,
    );
    for (const bound of ["0.005", "10", "600", "+Inf"]) {
      assert.ok(
        text.includes(`tidegate_ttft_seconds_bucket{le="${bound}"`) ||
          text.includes(`le="${bound}"`),
      );
    }
    const names = [...text.matchAll(/^# TYPE (\S+)/gm)].map(([, name]) => name ?? "");
    assert.deepEqual(
      names.filter((name) => name.endsWith("requests_total")),
      ["tidegate_requests_total"],
    );
    assert.doesNotMatch(text, /nope/, "no label from a client");
  });

  it("serves metrics as text", TIMEOUT, async () => {
    const metrics = await send(`${fleet.url}/metrics`);
    assert.match(metrics.headers.get("content-type") ?? "", /^text\/plain/);
  });
});

describe("surface: configured otherwise", () => {
  it("puts metrics elsewhere with other labels, or nowhere", TIMEOUT, async () => {
    const moved = await startFleet(
      { a: {} },
      { metrics: { endpoint: "/internal/metrics", labels: ["endpoint"] } },
    );
    try {
      await openaiChat(moved.url);
      const { text } = await send(`${moved.url}/internal/metrics`);
      assert.match(text, /^tidegate_requests_total\{endpoint="\/v1\/chat\/completions"\} 1$/m);
      expectError(await send(`${moved.url}/metrics`), 404, "unknown_url");
    } finally {
      await moved.close();
    }
    const off = await startFleet({ a: {} }, { metrics: { enabled: false } });
    try {
      expectError(await send(`${off.url}/metrics`), 404, "unknown_url");
    } finally {
      await off.close();
    }
  });
});
