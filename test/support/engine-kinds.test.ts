/** The fake vLLM, SGLang and LM Studio against the facts of wire §1 and real §5.3. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer } from "./client.ts";
import { connect, dataOf, openaiChat, parseSse, postBytes, send, until } from "./client.ts";
import type { FakeEngine } from "./engine.ts";
import { startEngine } from "./engine.ts";

const TIMEOUT = { timeout: 60_000 };
const USAGE = { stream_options: { include_usage: true } };

interface Chunk {
  choices: { delta: Record<string, unknown>; finish_reason: string | null }[];
  usage?: object | null;
}

function chunksOf(answer: Answer): Chunk[] {
  return dataOf(answer.text) as unknown as Chunk[];
}

function errorOf(answer: Answer): Record<string, unknown> {
  return answer.json().error as Record<string, unknown>;
}

describe("fake engine: vllm", () => {
  let engine: FakeEngine;
  before(async () => {
    engine = await startEngine({ kind: "vllm", models: ["tiny"] });
  });
  afterEach(() => engine.reset());
  after(() => engine.close());

  const get = (path: string): Promise<Answer> => send(engine.url + path);
  const chat = (more: Record<string, unknown> = {}): Promise<Answer> =>
    openaiChat(engine.url, { model: "tiny", ...more });

  it("says who it is", TIMEOUT, async () => {
    for (const path of ["/health", "/ping"]) {
      const answer = await get(path);
      assert.deepEqual([answer.status, answer.text], [200, ""], path);
    }
    assert.equal((await get("/version")).text, '{"version":"0.32.0"}');
    assert.match((await get("/metrics")).text, /^vllm:num_requests_waiting\{.*\} 0$/m);
    const { data } = (await get("/v1/models")).json() as { data: Record<string, unknown>[] };
    assert.deepEqual(
      data.map(({ id, owned_by, max_model_len }) => [id, owned_by, max_model_len]),
      [["tiny", "vllm", 4096]],
    );
    for (const path of ["/nope", "/", "/props", "/is_sleeping", "/api/tags"]) {
      const answer = await get(path);
      assert.deepEqual([answer.status, answer.text], [404, '{"detail":"Not Found"}'], path);
    }
    const wrong = await get("/v1/chat/completions");
    assert.deepEqual([wrong.status, wrong.text], [405, '{"detail":"Method Not Allowed"}']);
    assert.equal((await send(`${engine.url}/v1/embeddings`, { input: "x" })).status, 404);
  });

  it("streams: role with an empty content, the reason on the last token", TIMEOUT, async () => {
    const plain = chunksOf(await chat({ stream: true }));
    assert.deepEqual(plain[0]?.choices[0]?.delta, { role: "assistant", content: "" });
    assert.equal(plain.length, 6);
    const [last] = plain.at(-1)?.choices ?? [];
    assert.deepEqual([last?.delta, last?.finish_reason], [{ content: " word4" }, "stop"]);
    assert.ok(plain.every((chunk) => !("usage" in chunk)));
    assert.deepEqual(chunksOf(await chat({ stream: true, ...USAGE })).at(-1)?.choices, []);
    engine.behave({ reasoning: ["hm"] });
    assert.match((await chat({ stream: true })).text, /"reasoning":"hm"/);
  });

  it("says that it is done after an error, too", TIMEOUT, async () => {
    for (const afterTokens of [0, 2]) {
      engine.behave({ fault: { kind: "dies", afterTokens } });
      const { events } = parseSse((await chat({ stream: true })).text);
      assert.match(events.at(-2)?.data ?? "", /^\{"error":.*"code":500\}\}$/);
      assert.equal(events.at(-1)?.data, "[DONE]");
    }
    assert.equal((await chat()).status, 500);
  });

  it("refuses in its own words", TIMEOUT, async () => {
    const unknown = await chat({ model: "nope" });
    assert.equal(unknown.status, 404);
    assert.deepEqual(errorOf(unknown), {
      message: "The model `nope` does not exist. Valid aliases: tiny.",
      type: "NotFoundError",
      param: "model",
      code: 404,
    });
    assert.equal((await chat({ model: "" })).status, 200, "an empty name is accepted");
    const untyped = await openaiChat(engine.url, {}, { headers: { "content-type": "text/plain" } });
    assert.deepEqual([untyped.status, errorOf(untyped).type], [400, "Bad Request"]);
    const bad = await send(`${engine.url}/v1/chat/completions`, "{bad");
    assert.deepEqual([bad.status, errorOf(bad).type], [400, "Bad Request"]);
    engine.behave({ contextLength: 2 });
    const long = await chat();
    assert.deepEqual([long.status, errorOf(long).type], [400, "BadRequestError"]);
    const anthropic = await send(`${engine.url}/v1/messages`, { model: "nope", messages: [] });
    assert.equal(anthropic.json().type, "error");
  });

  it(
    "is busy from the first beyond --max-num-queued-reqs, running ones counted",
    TIMEOUT,
    async () => {
      engine.behave({ slots: 1, maxQueued: 1, headersDelayMs: Infinity });
      const first = chat();
      assert.ok(await until(() => engine.activeGenerations() === 1));
      for (const stream of [false, true]) {
        const second = await chat({ stream });
        assert.deepEqual([second.status, errorOf(second).type], [503, "Service Unavailable"]);
        assert.equal(second.headers.get("retry-after"), null);
      }
      engine.release();
      assert.equal((await first).status, 200);
      assert.equal((await chat()).status, 200);
    },
  );

  it("guards only /v1 with --api-key", TIMEOUT, async () => {
    engine.behave({ apiKey: "k" });
    assert.equal((await get("/health")).status, 200);
    assert.deepEqual((await get("/v1/models")).json(), { error: "Unauthorized" });
  });

  it("embeds where the model does, and does nothing else there", TIMEOUT, async () => {
    const pooling = await startEngine({ kind: "vllm", models: ["bge-embed"] });
    try {
      const body = { model: "bge-embed", input: [[1, 2]], encoding_format: "base64" };
      const answer = await send(`${pooling.url}/v1/embeddings`, body);
      const [first] = answer.json().data as { embedding: string }[];
      assert.equal(Buffer.from(first?.embedding ?? "", "base64").length, 16);
      const { text } = await openaiChat(pooling.url, { model: "bge-embed" });
      assert.equal(text, '{"detail":"Not Found"}');
    } finally {
      await pooling.close();
    }
  });
});

describe("fake engine: sglang", () => {
  let engine: FakeEngine;
  before(async () => {
    engine = await startEngine({ kind: "sglang", models: ["qwen"] });
  });
  afterEach(() => engine.reset());
  after(() => engine.close());

  const get = (path: string): Promise<Answer> => send(engine.url + path);
  const chat = (more: Record<string, unknown> = {}): Promise<Answer> =>
    openaiChat(engine.url, { model: "qwen", ...more });

  it("says who it is, and that it could be Ollama", TIMEOUT, async () => {
    assert.equal((await get("/get_server_info")).json().version, "0.5.16");
    assert.equal((await get("/get_model_info")).json().is_generation, true);
    assert.ok(Array.isArray((await get("/api/tags")).json().models));
    const { data } = (await get("/v1/models")).json() as { data: Record<string, unknown>[] };
    assert.deepEqual(
      data.map(({ id, owned_by, max_model_len }) => [id, owned_by, max_model_len]),
      [["qwen", "sglang", 4096]],
    );
    assert.equal(errorOf(await get("/v1/models/nope")).code, "model_not_found");
    assert.equal((await get("/nope")).text, '{"detail":"Not Found"}');
  });

  it("generates a token for /health, and takes its second", TIMEOUT, async () => {
    const startedAt = performance.now();
    const health = get("/health");
    assert.ok(await until(() => engine.activeGenerations() === 1));
    assert.equal((await health).status, 200);
    assert.ok(performance.now() - startedAt >= 990);
    assert.equal(engine.activeGenerations(), 0);
    engine.behave({ loading: true });
    assert.equal((await get("/health")).status, 503);
    assert.equal((await get("/get_model_info")).status, 200);
  });

  it("serves any name; says null for all it does not say", TIMEOUT, async () => {
    assert.equal((await chat({ model: "whatever" })).json().model, "whatever");
    const chunks = chunksOf(await chat({ stream: true }));
    assert.equal(chunks.length, 7);
    assert.ok(chunks.every(({ usage }) => usage === null));
    const nothing = { role: null, content: null, reasoning_content: null, tool_calls: null };
    assert.deepEqual(chunks[0]?.choices[0]?.delta, { ...nothing, role: "assistant", content: "" });
    assert.deepEqual(chunks[1]?.choices[0]?.delta, { ...nothing, content: "word0" });
    const [last] = chunks.at(-1)?.choices ?? [];
    assert.deepEqual([last?.delta, last?.finish_reason], [nothing, "stop"]);
    assert.deepEqual(chunksOf(await chat({ stream: true, ...USAGE })).at(-1)?.choices, []);
  });

  it("refuses flat, but wrapped in streams and on /v1/responses", TIMEOUT, async () => {
    engine.behave({ contextLength: 2 });
    const long = await chat();
    assert.equal(long.status, 400);
    assert.deepEqual(Object.keys(long.json()), ["object", "message", "type", "param", "code"]);
    const response = await send(`${engine.url}/v1/responses`, { input: "a b c d" });
    assert.equal(errorOf(response).code, 400);
    engine.reset();
    engine.behave({ fault: { kind: "dies", afterTokens: 1 } });
    const { events } = parseSse((await chat({ stream: true })).text);
    assert.match(events.at(-2)?.data ?? "", /^\{"error":\{"object":"error"/);
    assert.equal(events.at(-1)?.data, "[DONE]");
    const embeddings = await send(`${engine.url}/v1/embeddings`, { input: "x" });
    assert.deepEqual([embeddings.status, embeddings.json().object], [400, "error"]);
  });

  it("is busy by a 503, and in a stream after its 200", TIMEOUT, async () => {
    engine.behave({ slots: 1, maxQueued: 0, headersDelayMs: Infinity });
    const first = chat();
    assert.ok(await until(() => engine.activeGenerations() === 1));
    const whole = await chat();
    assert.deepEqual([whole.status, whole.json().message], [503, "The request queue is full."]);
    const streamed = await chat({ stream: true });
    assert.equal(streamed.status, 200);
    assert.deepEqual(
      parseSse(streamed.text).events.map(({ data }) => data?.slice(0, 8)),
      ['{"error"', "[DONE]"],
    );
    engine.release();
    assert.equal((await first).status, 200);
  });

  it("ranks as a bare list", TIMEOUT, async () => {
    const ranker = await startEngine({ kind: "sglang", models: ["bge-rerank"] });
    const body = { model: "bge-rerank", query: "q", documents: ["a", "b"] };
    const answer = await send(`${ranker.url}/v1/rerank`, body);
    assert.ok(Array.isArray(JSON.parse(answer.text)));
    await ranker.close();
  });
});

describe("fake engine: lmstudio", () => {
  let engine: FakeEngine;
  before(async () => {
    engine = await startEngine({ kind: "lmstudio", models: ["qwen", "phi", "nomic-embed"] });
  });
  afterEach(() => engine.reset());
  after(() => engine.close());

  const get = (path: string): Promise<Answer> => send(engine.url + path);
  const chat = (model: string, more: Record<string, unknown> = {}): Promise<Answer> =>
    openaiChat(engine.url, { model, ...more });
  const loaded = async (): Promise<unknown[]> => {
    const { models } = (await get("/api/v1/models")).json() as {
      models: { key: string; loaded_instances: { config: object }[] }[];
    };
    return models.flatMap(({ key, loaded_instances }) =>
      loaded_instances.map(({ config }) => [key, config]),
    );
  };

  it("says who it is, and 200 to everything", TIMEOUT, async () => {
    const { data } = (await get("/v1/models")).json() as { data: object[] };
    assert.deepEqual(data[0], { id: "qwen", object: "model", owned_by: "organization_owner" });
    assert.equal(data.length, 3, "all that is downloaded");
    const unexpected = [
      ["GET", "/health"],
      ["GET", "/nope"],
      ["GET", "/v1/chat/completions"],
      ["POST", "/chat/completions"],
      ["POST", "/v1/messages/count_tokens"],
      ["POST", "/v1/rerank"],
    ] as const;
    for (const [method, path] of unexpected) {
      const body = method === "POST" ? {} : undefined;
      const answer = await send(engine.url + path, body);
      const error = `Unexpected endpoint or method. (${method} ${path})`;
      assert.deepEqual([answer.status, answer.json()], [200, { error }]);
    }
    assert.equal((await get("/v1/models")).headers.get("x-powered-by"), "Express");
  });

  it(
    "loads what is asked for and evicts what came so, not what was loaded by name",
    TIMEOUT,
    async () => {
      engine.behave({ loadMs: 10 });
      assert.deepEqual(await loaded(), []);
      const config = { context_length: 4096, parallel: 4, flash_attention: true };
      await chat("qwen");
      assert.deepEqual(await loaded(), [["qwen", config]]);
      const { data } = (await get("/api/v0/models")).json() as { data: Record<string, unknown>[] };
      assert.deepEqual(
        data.map(({ state }) => state),
        ["loaded", "not-loaded", "not-loaded"],
      );
      await chat("phi");
      assert.deepEqual(await loaded(), [["phi", config]]);
      const answer = await send(`${engine.url}/api/v1/models/load`, { model: "qwen" });
      assert.equal(answer.json().status, "loaded");
      await send(`${engine.url}/v1/embeddings`, { model: "nomic-embed", input: "x" });
      assert.deepEqual(await loaded(), [
        ["qwen", config],
        ["nomic-embed", { context_length: 4096 }],
      ]);
      await send(`${engine.url}/api/v1/models/unload`, { instance_id: "qwen" });
      assert.equal((await loaded()).length, 1);
      assert.deepEqual(
        engine.loads.map(({ model, by }) => `${model} ${by}`),
        [
          "qwen POST /v1/chat/completions",
          "phi POST /v1/chat/completions",
          "qwen POST /api/v1/models/load",
          "nomic-embed POST /v1/embeddings",
        ],
      );
      assert.equal(engine.inference().length, 3);
    },
  );

  it("streams with the role in every delta", TIMEOUT, async () => {
    const chunks = chunksOf(await chat("qwen", { stream: true }));
    assert.deepEqual(chunks[0]?.choices[0]?.delta, { role: "assistant", content: "word0" });
    assert.deepEqual(chunks[4]?.choices[0]?.delta, { role: "assistant", content: " word4" });
    assert.deepEqual(chunks.at(-1)?.choices[0]?.delta, {});
    assert.deepEqual(chunksOf(await chat("qwen", { stream: true, ...USAGE })).at(-1)?.choices, []);
  });

  it("fails by a named event, and without a stream by a 400", TIMEOUT, async () => {
    engine.behave({ fault: { kind: "dies", afterTokens: 2 } });
    const { events } = parseSse((await chat("qwen", { stream: true })).text);
    assert.equal(events.at(-1)?.event, "error");
    assert.match(events.at(-1)?.data ?? "", /^\{"error":\{"message":"The model has crashed/);
    const whole = await chat("qwen");
    assert.deepEqual([whole.status, typeof whole.json().error], [400, "string"]);
  });

  it("refuses in its own words", TIMEOUT, async () => {
    const unknown = await chat("nope");
    assert.deepEqual([unknown.status, errorOf(unknown).code], [400, "model_not_found"]);
    assert.equal((await chat("nomic-embed")).status, 400);
    engine.behave({ contextLength: 2 });
    const long = await chat("qwen");
    assert.equal(long.status, 400);
    assert.match(String(long.json().error), /n_keep: 5>= n_ctx: 2/);
    const streamed = await chat("qwen", { stream: true });
    assert.equal(streamed.status, 200);
    assert.equal(parseSse(streamed.text).events[0]?.event, "error");
    engine.reset();
    engine.behave({ apiKey: "k" });
    assert.equal((await get("/v1/models")).status, 401);
  });

  it("gives every loaded model its own slots", TIMEOUT, async () => {
    engine.behave({ slots: 1, maxLoaded: 2, headersDelayMs: Infinity });
    const both = [chat("qwen"), chat("phi")];
    assert.ok(await until(() => engine.activeGenerations() === 2));
    const client = await connect(engine.port);
    client.write(postBytes("/v1/chat/completions", { model: "qwen", messages: [{}] }));
    assert.ok(await until(() => engine.waiting() === 1));
    client.leave("close");
    engine.release();
    for (const answer of await Promise.all(both)) assert.equal(answer.status, 200);
  });
});
