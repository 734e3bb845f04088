/** The fake llama-server against the facts of wire §1, real §5.2 and what `test/real/fakes.test.ts` measures. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer } from "./client.ts";
import {
  chatBody,
  connect,
  dataOf,
  open,
  openaiChat,
  parseSse,
  postBytes,
  readEvents,
  send,
  until,
} from "./client.ts";
import type { FakeEngine } from "./engine.ts";
import { startEngine } from "./engine.ts";

const TIMEOUT = { timeout: 60_000 };
const USAGE = { stream_options: { include_usage: true } };

interface Chunk {
  choices: { delta: Record<string, unknown>; text?: string; finish_reason: string | null }[];
  usage?: { prompt_tokens: number };
  timings?: object;
}

interface Card {
  id: string;
  owned_by: string;
  meta: { n_ctx: number };
}

function errorOf(answer: Answer): Record<string, unknown> {
  return answer.json().error as Record<string, unknown>;
}

describe("fake engine: llamacpp", () => {
  let engine: FakeEngine;
  before(async () => {
    engine = await startEngine({ kind: "llamacpp", models: ["smol"] });
  });
  afterEach(() => engine.reset());
  after(() => engine.close());

  const get = (path: string, headers: Record<string, string> = {}): Promise<Answer> =>
    send(engine.url + path, undefined, { headers });
  const chat = (more: Record<string, unknown> = {}): Promise<Answer> =>
    openaiChat(engine.url, { model: "smol", ...more });

  it("says who it is", TIMEOUT, async () => {
    assert.equal(engine.kind, "llamacpp");
    const health = await get("/health");
    assert.equal(health.text, '{"status":"ok"}');
    assert.equal(health.headers.get("server"), "llama.cpp");
    const props = (await get("/props")).json();
    const { n_ctx } = props.default_generation_settings as { n_ctx: number };
    assert.deepEqual([props.total_slots, n_ctx, props.is_sleeping], [4, 4096, false]);
    const { data } = (await get("/v1/models")).json() as { data: Card[] };
    assert.deepEqual(
      data.map(({ id, owned_by, meta }) => [id, owned_by, meta.n_ctx]),
      [["smol", "llamacpp", 4096]],
    );
    const client = await connect(engine.port);
    client.write("GET /nope HTTP/1.1\r\nHost: localhost\r\n\r\n");
    await client.closed;
    assert.equal(client.header("connection"), "close", "errors close");
    const lacking = ["/", "/nope", "/version", "/v1/models/smol", "/v1/chat/completions"];
    for (const path of lacking) {
      const { code, type } = errorOf(await get(path));
      assert.deepEqual([code, type], [404, "not_found_error"], path);
    }
    const wrong = await send(`${engine.url}/v1/models`, {}, { method: "DELETE" });
    assert.equal(wrong.status, 404, "a wrong method is an unknown path");
    assert.equal((await get("/metrics")).status, 501);
  });

  it("answers 503 everywhere while it loads", TIMEOUT, async () => {
    engine.behave({ loading: true });
    for (const path of ["/health", "/v1/models", "/props", "/nope"]) {
      const answer = await get(path);
      assert.equal(answer.status, 503, path);
      assert.equal(errorOf(answer).message, "Loading model");
    }
    assert.equal((await chat()).status, 503);
  });

  it("guards all but its health with --api-key", TIMEOUT, async () => {
    engine.behave({ apiKey: "k" });
    assert.equal((await get("/health")).status, 200);
    assert.equal((await get("/")).status, 404);
    for (const path of ["/v1/models", "/models", "/props", "/nope"]) {
      assert.equal((await get(path)).status, 401, path);
    }
    assert.equal((await get("/v1/models", { authorization: "Bearer k" })).status, 200);
    assert.equal((await get("/v1/models", { "x-api-key": "k" })).status, 200);
    assert.equal((await get("/v1/models", { "x-api-key": "x" })).status, 401);
  });

  it("serves any name, and says its own", TIMEOUT, async () => {
    for (const model of ["smol", "whatever", undefined]) {
      const answer = await chat({ model });
      assert.equal(answer.json().model, "smol", String(model));
      assert.ok(answer.json().timings !== undefined);
    }
  });

  it(
    "streams: role with null, finish apart, timings and usage where they belong",
    TIMEOUT,
    async () => {
      const plain = dataOf((await chat({ stream: true })).text) as unknown as Chunk[];
      assert.deepEqual(plain[0]?.choices[0]?.delta, { role: "assistant", content: null });
      assert.deepEqual(plain.at(-1)?.choices[0]?.delta, {});
      assert.ok(plain.at(-1)?.timings !== undefined && plain.at(-1)?.usage === undefined);
      const asked = dataOf((await chat({ stream: true, ...USAGE })).text) as unknown as Chunk[];
      assert.equal(asked.at(-2)?.timings, undefined);
      assert.ok(asked.at(-1)?.timings !== undefined && asked.at(-1)?.usage !== undefined);
      assert.deepEqual(asked.at(-1)?.choices, []);
      engine.behave({ reasoning: ["hm"] });
      assert.match((await chat({ stream: true })).text, /"reasoning_content":"hm"/);
    },
  );

  it(
    "puts the usage of a streamed completion on its finish chunk, asked or not",
    TIMEOUT,
    async () => {
      for (const more of [{}, USAGE]) {
        const body = { prompt: "a b", stream: true, ...more };
        const { text } = await send(`${engine.url}/v1/completions`, body);
        const chunks = dataOf(text) as unknown as Chunk[];
        assert.equal(chunks.length, 6);
        assert.deepEqual(
          chunks.map(({ usage }) => usage?.prompt_tokens),
          [undefined, undefined, undefined, undefined, undefined, 2],
        );
        assert.equal(chunks.at(-1)?.choices.length, 1);
      }
    },
  );

  it("fails in mid-stream without [DONE]", TIMEOUT, async () => {
    engine.behave({ fault: { kind: "dies", afterTokens: 2 } });
    const { events, rest } = parseSse((await chat({ stream: true })).text);
    assert.equal(rest, "");
    assert.match(events.at(-1)?.data ?? "", /^\{"error":\{"code":500/);
    assert.equal((await chat()).status, 500);
  });

  it("refuses in its own words", TIMEOUT, async () => {
    engine.behave({ contextLength: 2 });
    const { code, type, n_prompt_tokens, n_ctx } = errorOf(await chat());
    assert.deepEqual(
      [code, type, n_prompt_tokens, n_ctx],
      [400, "exceed_context_size_error", 5, 2],
    );
    engine.reset();
    const bad = await send(`${engine.url}/v1/chat/completions`, "{bad");
    assert.deepEqual([bad.status, errorOf(bad).type], [400, "invalid_request_error"]);
    assert.equal((await send(`${engine.url}/v1/chat/completions`, {})).status, 400);
    assert.equal((await send(`${engine.url}/v1/messages`, {})).status, 500);
    const packed = await send(
      `${engine.url}/v1/completions`,
      {},
      {
        headers: { "content-encoding": "gzip" },
      },
    );
    assert.deepEqual([packed.status, packed.text], [415, ""]);
    for (const path of ["/v1/embeddings", "/v1/rerank"]) {
      const answer = await send(engine.url + path, { input: "x", documents: ["x"] });
      assert.deepEqual([answer.status, errorOf(answer).type], [501, "not_supported_error"]);
    }
  });

  it("embeds floats, base64 and tokens, and calls its limit a server error", TIMEOUT, async () => {
    const embedder = await startEngine({ kind: "llamacpp", models: ["minilm"] });
    try {
      const embed = (body: object): Promise<Answer> =>
        send(`${embedder.url}/v1/embeddings`, { model: "q", ...body });
      const [float] = (await embed({ input: "a" })).json().data as { embedding: number[] }[];
      const [packed] = (await embed({ input: "a", encoding_format: "base64" })).json().data as {
        embedding: string;
        encoding_format: string;
      }[];
      assert.equal(packed?.encoding_format, "base64");
      const bytes = Buffer.from(packed?.embedding ?? "", "base64");
      assert.deepEqual(
        [0, 4, 8, 12].map((at) => bytes.readFloatLE(at)),
        float?.embedding,
      );
      assert.equal((await embed({ input: [[1, 2], [3]] })).json().model, "q");
      embedder.behave({ contextLength: 2 });
      const long = await embed({ input: "a b c" });
      assert.deepEqual([long.status, errorOf(long).type], [500, "server_error"]);
      assert.equal((await openaiChat(embedder.url)).status, 500);
    } finally {
      await embedder.close();
    }
  });

  it("is woken by a task and by /slots, not by a look", TIMEOUT, async () => {
    const isSleeping = async (): Promise<unknown> => (await get("/props")).json().is_sleeping;
    engine.behave({ sleeping: true });
    await get("/v1/models");
    await get("/health");
    assert.equal(await isSleeping(), true);
    assert.equal(engine.loads.length, 0);
    await get("/slots");
    assert.equal(await isSleeping(), false);
    engine.behave({ sleeping: true, loadMs: 20 });
    assert.equal((await chat()).status, 200);
    assert.deepEqual(
      engine.loads.map(({ by, result }) => `${by} ${result}`),
      ["GET /slots loaded", "POST /v1/chat/completions loaded"],
    );
  });

  it("queues beyond its slots, without headers", TIMEOUT, async () => {
    engine.behave({ slots: 1, headersDelayMs: Infinity });
    const first = chat();
    assert.ok(await until(() => engine.activeGenerations() === 1));
    const client = await connect(engine.port);
    client.write(postBytes("/v1/chat/completions", chatBody()));
    assert.ok(await until(() => engine.waiting() === 1));
    assert.equal(client.status(), null);
    client.leave("reset");
    assert.ok(await until(() => engine.waiting() === 0));
    engine.release();
    await first;
  });

  it("freezes as after kill -STOP, and goes on", TIMEOUT, async () => {
    engine.behave({ tokens: 50, tokenDelayMs: 5 });
    const response = await open(`${engine.url}/v1/chat/completions`, chatBody({ stream: true }));
    const events = readEvents(response);
    await events.next();
    engine.freeze();
    const seen = engine.requests.length;
    const client = await connect(engine.port);
    client.write("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    const sent = engine.requests[0]?.bytesSent;
    await new Promise((resolve) => setTimeout(resolve, 60));
    assert.deepEqual(
      [client.status(), engine.requests.length],
      [null, seen],
      "accepts, says nothing",
    );
    assert.equal(engine.requests[0]?.bytesSent, sent, "a stream stops where it is");
    engine.thaw();
    assert.ok(await until(() => client.status() === 200));
    let last = "";
    for await (const { data } of events) last = data ?? last;
    assert.equal(last, "[DONE]");
    client.leave("close");
  });

  it("comes back on its port", TIMEOUT, async () => {
    const first = await startEngine({ kind: "vllm" });
    await first.close();
    await assert.rejects(send(`${first.url}/health`));
    const second = await startEngine({ kind: "llamacpp", port: first.port });
    assert.equal((await send(`${first.url}/health`)).text, '{"status":"ok"}');
    await second.close();
  });
});
