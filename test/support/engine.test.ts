/** The fake engine against the facts: what it does wrong, it has to do wrong in the way of the real ones. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import {
  chatBody,
  connect,
  dataOf,
  open,
  openaiChat,
  parseSse,
  postBytes,
  send,
  sleep,
  until,
} from "./client.ts";
import type { FakeEngine } from "./engine.ts";
import { startEngine } from "./engine.ts";
import { faults } from "./engine-behaviour.ts";

const TIMEOUT = { timeout: 60_000 };
const DONE = "data: [DONE]\n\n";

function user(model: string, more: Record<string, unknown> = {}): Record<string, unknown> {
  return chatBody({ model, ...more });
}

/** Reads until the end or the break; says which, and what came. */
async function readAll(response: Response): Promise<{ text: string; isBroken: boolean }> {
  const reader = response.body?.getReader();
  let text = "";
  try {
    for (;;) {
      const part = await reader?.read();
      if (part === undefined || part.done) return { text, isBroken: false };
      text += Buffer.from(part.value).toString();
    }
  } catch {
    return { text, isBroken: true };
  }
}

describe("fake engine: ollama", () => {
  let engine: FakeEngine;
  before(async () => {
    engine = await startEngine({
      kind: "ollama",
      models: ["llama3:8b", "mistral:7b", "nomic-embed"],
    });
  });
  afterEach(() => engine.reset());
  after(() => engine.close());

  it("answers as wire §1.1 and real §5.1 say", TIMEOUT, async () => {
    assert.equal((await send(engine.url)).text, "Ollama is running");
    assert.equal((await send(`${engine.url}/health`)).headers.get("content-type"), "text/plain");
    assert.equal((await send(`${engine.url}/health`)).status, 404);
    assert.equal((await send(`${engine.url}/v1/chat/completions`)).status, 405);
    const { models } = (await send(`${engine.url}/api/tags`)).json() as {
      models: Record<string, unknown>[];
    };
    assert.deepEqual(
      models.map(({ name }) => name),
      ["llama3:8b", "mistral:7b", "nomic-embed:latest"],
    );
    assert.match(String(models[0]?.digest), /^[0-9a-f]{64}$/);
    engine.setModels([]);
    assert.equal((await send(`${engine.url}/v1/models`)).text, '{"object":"list","data":null}');
    engine.setModels(["llama3:8b", "mistral:7b", "nomic-embed"]);
    assert.equal((await send(engine.url, undefined, { method: "HEAD" })).status, 200);
  });

  it("refuses a foreign Host and Origin with an empty 403", TIMEOUT, async () => {
    const answer = await send(`${engine.url}/api/tags`, undefined, {
      headers: { origin: "http://evil.example" },
    });
    assert.deepEqual([answer.status, answer.text], [403, ""]);
    const own = await send(`${engine.url}/api/tags`, undefined, {
      headers: { origin: "http://localhost:3000" },
    });
    assert.equal(own.status, 200);
    const client = await connect(engine.port);
    client.write("GET /api/tags HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert.ok(await until(() => client.status() === 403));
    client.leave("close");
  });

  it("streams role and first token in one chunk, usage only when asked", TIMEOUT, async () => {
    const plain = await openaiChat(engine.url, user("llama3:8b", { stream: true }));
    const [first, ...others] = dataOf(plain.text) as { choices: { delta: unknown }[] }[];
    assert.deepEqual(first?.choices[0]?.delta, { role: "assistant", content: "word0" });
    assert.deepEqual(others.at(-1)?.choices[0]?.delta, {});
    assert.ok(plain.text.endsWith(DONE));
    const asked = await openaiChat(
      engine.url,
      user("llama3:8b", { stream: true, stream_options: { include_usage: true } }),
    );
    const last = dataOf(asked.text).at(-1) as { choices: unknown[]; usage: object };
    assert.deepEqual(last.choices, []);
    assert.deepEqual(last.usage, { prompt_tokens: 5, completion_tokens: 5, total_tokens: 10 });
  });

  it("puts a zero usage on every chunk of a completion, the real one last", TIMEOUT, async () => {
    const body = { model: "llama3:8b", prompt: "a b", stream: true };
    const answer = await send(`${engine.url}/v1/completions`, {
      ...body,
      stream_options: { include_usage: true },
    });
    const usages = dataOf(answer.text).map(
      ({ usage }) => (usage as { total_tokens: number }).total_tokens,
    );
    assert.deepEqual(usages, [0, 0, 0, 0, 0, 0, 7]);
  });

  it("ignores max_completion_tokens, knows max_tokens", TIMEOUT, async () => {
    engine.behave({ tokens: 9 });
    const ignored = await openaiChat(engine.url, user("llama3:8b", { max_completion_tokens: 3 }));
    const usage = ignored.json().usage as { completion_tokens: number };
    assert.equal(usage.completion_tokens, 9);
    const obeyed = await openaiChat(engine.url, user("llama3:8b", { max_tokens: 3 }));
    const [choice] = obeyed.json().choices as { finish_reason: string }[];
    assert.equal(choice?.finish_reason, "length");
  });

  it("embeds strings only, with embedding models only", TIMEOUT, async () => {
    const embed = (model: string, input: unknown, format?: string): ReturnType<typeof send> =>
      send(`${engine.url}/v1/embeddings`, { model, input, encoding_format: format });
    assert.equal((await embed("nomic-embed", ["a", "b"])).status, 200);
    assert.equal((await embed("nomic-embed", [[1, 2]])).status, 400);
    assert.equal((await embed("llama3:8b", "a")).status, 501);
    const float = (await embed("nomic-embed", "a")).json().data as { embedding: number[] }[];
    const base64 = (await embed("nomic-embed", "a", "base64")).json().data as {
      embedding: string;
    }[];
    const bytes = Buffer.from(base64[0]?.embedding ?? "", "base64");
    assert.deepEqual(
      [0, 4, 8, 12].map((at) => bytes.readFloatLE(at)),
      float[0]?.embedding,
    );
  });

  it("swallows an error: model is empty, EOF is clean", TIMEOUT, async () => {
    engine.behave({ fault: faults.ollamaSwallowed(2), faultTimes: 1 });
    const answer = await openaiChat(engine.url, user("llama3:8b", { stream: true }));
    const chunks = dataOf(answer.text);
    assert.equal(chunks.length, 3);
    assert.equal(chunks.at(-1)?.model, "");
    assert.doesNotMatch(answer.text, /\[DONE\]|"finish_reason":"|error/);
    assert.equal((await openaiChat(engine.url, user("llama3:8b"))).status, 200, "once only");
  });

  it("makes a second request for the same model wait without headers", TIMEOUT, async () => {
    engine.behave({ headersDelayMs: Infinity });
    const first = openaiChat(engine.url, user("llama3:8b"));
    assert.ok(await until(() => engine.activeGenerations() === 1));
    const client = await connect(engine.port);
    client.write(postBytes("/v1/chat/completions", user("llama3:8b")));
    assert.ok(await until(() => engine.waiting() === 1));
    assert.equal(client.status(), null);
    client.leave("close");
    assert.ok(await until(() => engine.waiting() === 0));
    engine.release();
    await first;
    assert.ok(await until(() => engine.activeGenerations() === 0));
    assert.equal(engine.requests.at(-1)?.closedByClient, true);
  });

  it("loads one model at a time, and a client that leaves aborts the load", TIMEOUT, async () => {
    engine.behave({ maxLoaded: 1 });
    await openaiChat(engine.url, user("llama3:8b"));
    engine.behave({ loadMs: 1500 });
    const client = await connect(engine.port);
    client.write(postBytes("/v1/chat/completions", user("mistral:7b")));
    assert.ok(await until(() => engine.loads.length === 2));
    assert.equal(
      (await send(`${engine.url}/api/ps`)).text,
      '{"models":[]}',
      "loading does not show",
    );
    const patient = openaiChat(engine.url, user("mistral:7b"));
    await until(() => engine.inference().length === 3);
    client.leave("close");
    assert.equal((await patient).status, 200);
    assert.deepEqual(
      engine.loads.map(({ model, result }) => `${model} ${result}`),
      ["llama3:8b loaded", "mistral:7b aborted", "mistral:7b loaded"],
    );
    const [resident] = (await send(`${engine.url}/api/ps`)).json().models as { name: string }[];
    assert.equal(resident?.name, "mistral:7b");
  });

  it("refuses when the queue of loads is full", TIMEOUT, async () => {
    engine.behave({ maxLoaded: 1, loadMs: 1000, maxQueue: 1 });
    const first = openaiChat(engine.url, user("llama3:8b"));
    await until(() => engine.loads.length === 1);
    const second = await openaiChat(engine.url, user("mistral:7b"));
    assert.equal(second.status, 503);
    assert.match(
      second.text,
      /server busy, please try again\. {2}maximum pending requests exceeded/,
    );
    assert.equal(second.headers.get("retry-after"), null);
    await first;
  });

  it("loads, unloads and streams lines on its native routes", TIMEOUT, async () => {
    const generate = (body: object): ReturnType<typeof send> =>
      send(`${engine.url}/api/generate`, { model: "llama3:8b", ...body });
    assert.equal((await generate({})).json().done_reason, "load");
    assert.equal((await generate({ keep_alive: 0 })).json().done_reason, "unload");
    const { text } = await send(`${engine.url}/api/chat`, user("llama3:8b"));
    const lines = text
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line) as Record<string, unknown>);
    assert.equal(lines.length, 6);
    assert.equal(lines.at(-1)?.eval_count, 5);
    const unknown = await send(`${engine.url}/api/chat`, user("nope"));
    assert.deepEqual([unknown.status, unknown.text], [404, `{"error":"model 'nope' not found"}`]);
  });
});

describe("fake engine: openai", () => {
  let engine: FakeEngine;
  before(async () => {
    engine = await startEngine();
  });
  afterEach(() => engine.reset());
  after(() => engine.close());

  const stream = (more: Record<string, unknown> = {}): Promise<Response> =>
    open(`${engine.url}/v1/chat/completions`, chatBody({ stream: true, ...more }));

  it("sends a first chunk without content, timings, fragments of tool calls", TIMEOUT, async () => {
    engine.behave({
      tokens: 0,
      timings: true,
      toolCalls: [{ name: "f", arguments: '{"a":"bcdef"}' }],
    });
    const { text } = await readAll(await stream());
    const chunks = dataOf(text) as {
      choices: { delta: Record<string, unknown> }[];
      timings?: object;
    }[];
    assert.deepEqual(chunks[0]?.choices[0]?.delta, { role: "assistant", content: null });
    const fragments = chunks
      .flatMap(
        ({ choices }) =>
          (choices[0]?.delta.tool_calls ?? []) as { function: { arguments: string } }[],
      )
      .map((call) => call.function.arguments);
    assert.equal(fragments.join(""), '{"a":"bcdef"}');
    assert.ok(chunks.at(-1)?.timings !== undefined);
  });

  it("splits the same bytes as asked", TIMEOUT, async () => {
    for (const chunking of ["event", "once", 1, 7] as const) {
      engine.behave({ chunking, lineEnd: "\r\n", pings: "comment" });
      const { text } = await readAll(await stream());
      assert.equal(text, engine.requests.at(-1)?.sent().toString());
      const { events, rest } = parseSse(text);
      assert.equal(rest, "");
      assert.equal(events.filter(({ comment }) => comment !== null).length, 5);
      assert.equal(events.at(-1)?.data, "[DONE]");
    }
  });

  it("breaks where and how it is told", TIMEOUT, async () => {
    for (const by of ["reset", "fin", "eof"] as const) {
      engine.behave({ fault: { kind: "cut", afterTokens: 2, by } });
      const cut = await readAll(await stream());
      assert.equal(cut.isBroken, by !== "eof", by);
      assert.equal(dataOf(engine.requests.at(-1)?.sent().toString() ?? "").length, 3);
      engine.behave({ fault: { kind: "cut", afterBytes: 100, by } });
      const client = await connect(engine.port);
      client.write(postBytes("/v1/chat/completions", chatBody({ stream: true })));
      assert.ok(await until(() => /\r\n64\r\n.{100}\r\n/s.test(client.received())));
      const chunk = /\r\n\r\n64\r\n(.{100})\r\n/s.exec(client.received())?.[1] ?? "";
      assert.equal(chunk.length, 100);
      if (by === "eof") await sleep(100);
      else await until(() => client.isClosed());
      assert.equal(client.isClosed(), by !== "eof");
      client.leave("close");
    }
    engine.behave({ fault: { kind: "drop", by: "reset" } });
    await assert.rejects(stream());
    engine.behave({ fault: { kind: "drop", by: "fin" } });
    await assert.rejects(stream());
  });

  it("ends a body before the length it declared", TIMEOUT, async () => {
    engine.behave({ fault: { kind: "cut", by: "fin" } });
    const response = await open(`${engine.url}/v1/chat/completions`, chatBody());
    const declared = Number(response.headers.get("content-length"));
    const { text } = await readAll(response);
    assert.ok(text.length < declared, `${text.length} of ${declared}`);
  });

  it("reports errors in a 200 the way vLLM and llama.cpp do", TIMEOUT, async () => {
    engine.behave({ fault: faults.vllmFirstEvent });
    const first = await readAll(await stream());
    assert.deepEqual(
      parseSse(first.text).events.map(({ data }) => data?.slice(0, 8)),
      ['{"error"', "[DONE]"],
    );
    engine.behave({ fault: faults.llamacppMidStream(1) });
    const mid = await readAll(await stream());
    assert.match(mid.text, /"error"[^\n]*\n\n$/);
    engine.behave({ fault: { kind: "endless", finish: true } });
    assert.match((await readAll(await stream())).text, /"finish_reason":"stop"[^\n]*\n\n$/);
  });

  it("speaks Messages and Responses with their own ends", TIMEOUT, async () => {
    const messages = await send(
      `${engine.url}/v1/messages`,
      chatBody({ stream: true, max_tokens: 9 }),
    );
    const names = parseSse(messages.text).events.map(({ event }) => event);
    assert.deepEqual(names.slice(0, 3), [
      "message_start",
      "content_block_start",
      "content_block_delta",
    ]);
    assert.deepEqual(names.slice(-3), ["content_block_stop", "message_delta", "message_stop"]);
    const responses = await send(`${engine.url}/v1/responses`, {
      model: "test-model",
      input: "hi",
      stream: true,
    });
    const events = parseSse(responses.text).events;
    assert.equal(events[0]?.event, "response.created");
    assert.equal(events.at(-1)?.event, "response.completed");
    assert.doesNotMatch(messages.text + responses.text, /\[DONE\]/);
    const count = await send(`${engine.url}/v1/messages/count_tokens`, chatBody());
    assert.equal(typeof count.json().input_tokens, "number");
  });

  it("floods no faster than the client reads, and sees it leave", TIMEOUT, async () => {
    engine.behave({ flood: { bytes: 200_000_000 } });
    const client = await connect(engine.port);
    client.pause();
    client.write(postBytes("/v1/chat/completions", chatBody({ stream: true })));
    const sent = (): number => engine.requests.at(-1)?.bytesSent ?? 0;
    assert.ok(await until(() => sent() > 100_000));
    let last = -1;
    await until(async () => {
      const isStill = last === sent();
      last = sent();
      await new Promise((resolve) => setTimeout(resolve, 100));
      return isStill;
    });
    assert.ok(sent() < 50_000_000, `${sent()} bytes`);
    client.leave("reset");
    assert.ok(await until(() => engine.activeGenerations() === 0));
    assert.equal(engine.requests.at(-1)?.closedByClient, true);
  });

  it("can go away and come back on its port", TIMEOUT, async () => {
    engine.stopListening();
    await assert.rejects(send(`${engine.url}/v1/models`));
    await engine.listenAgain();
    assert.equal((await send(`${engine.url}/v1/models`)).status, 200);
  });
});
