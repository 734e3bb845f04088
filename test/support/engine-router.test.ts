/** The fake router of llama-servers against the facts of wire §1, real §5.2 and what `test/real/fakes.test.ts` measures. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer } from "./client.ts";
import { chatBody, connect, openaiChat, parseSse, postBytes, send, until } from "./client.ts";
import type { FakeEngine } from "./engine.ts";
import { startEngine } from "./engine.ts";

const TIMEOUT = { timeout: 60_000 };

interface Card {
  id: string;
  status: { value: string; failed?: boolean };
}

function errorOf(answer: Answer): Record<string, unknown> {
  return answer.json().error as Record<string, unknown>;
}

describe("fake engine: llamacpp-router", () => {
  let engine: FakeEngine;
  before(async () => {
    engine = await startEngine({ kind: "llamacpp-router", models: ["a", "b"] });
  });
  afterEach(() => engine.reset());
  after(() => engine.close());

  const get = (path: string): Promise<Answer> => send(engine.url + path);
  const chat = (model: string, more: object = {}): Promise<Answer> =>
    openaiChat(engine.url, { model, ...more });
  const states = async (): Promise<string> => {
    const { data } = (await get("/models")).json() as { data: Card[] };
    return data.map(({ id, status }) => `${id} ${status.value}`).join();
  };
  const ask = (what: "load" | "unload", model: string): Promise<Answer> =>
    send(`${engine.url}/models/${what}`, { model });

  it("says who it is, and loads nothing by being looked at", TIMEOUT, async () => {
    assert.equal(engine.kind, "llamacpp", "as a configuration names it");
    const props = (await get("/props")).json();
    assert.deepEqual([props.role, props.max_instances], ["router", 4]);
    assert.equal((await get("/health")).status, 200);
    assert.equal((await get("/v1/models")).text, (await get("/models")).text);
    assert.equal((await get("/metrics")).status, 400);
    for (const path of ["/props", "/slots", "/metrics"]) {
      const answer = await get(`${path}?model=a&autoload=false`);
      assert.deepEqual([answer.status, errorOf(answer).message], [400, "model is not loaded"]);
    }
    assert.equal(await states(), "a unloaded,b unloaded");
    assert.equal(engine.loads.length, 0);
  });

  it("loads by any GET that names a model", TIMEOUT, async () => {
    for (const path of ["/props?model=a", "/slots?model=b"]) {
      assert.equal((await get(path)).status, 200);
      assert.equal(engine.loads.at(-1)?.by, `GET ${path}`);
    }
    assert.equal((await get("/metrics?model=a")).status, 501, "passed on to the model's server");
    assert.equal((await get("/props?model=nope")).status, 400);
    assert.equal(await states(), "a loaded,b loaded");
    assert.deepEqual(engine.resident(), ["a", "b"]);
  });

  it("evicts the idle one that was used least", TIMEOUT, async () => {
    engine.behave({ maxLoaded: 1 });
    assert.equal((await chat("a")).status, 200);
    engine.behave({ loadMs: 800 });
    assert.equal(await states(), "a loaded,b unloaded");
    const loading = chat("b");
    assert.ok(await until(async () => (await states()) === "a unloaded,b loading"));
    const aside = await get("/props?model=b&autoload=false");
    assert.deepEqual([aside.status, errorOf(aside).message], [503, "Loading model"]);
    assert.equal((await loading).json().model, "b");
    assert.equal(await states(), "a unloaded,b loaded");
  });

  it("waits for a busy one, and loads nothing beside it", TIMEOUT, async () => {
    engine.behave({ maxLoaded: 1, headersDelayMs: Infinity });
    const busy = chat("a");
    assert.ok(await until(() => engine.activeGenerations() === 1));
    const waiting = chat("b");
    assert.ok(await until(() => engine.inference().length === 2));
    assert.equal(await states(), "a loaded,b unloaded");
    const refused = await ask("load", "b");
    assert.deepEqual(
      [refused.status, errorOf(refused).message],
      [500, "model limit reached, try again later"],
    );
    engine.release();
    assert.deepEqual([(await busy).status, (await waiting).status], [200, 200]);
  });

  it("goes on loading without the client that wanted it", TIMEOUT, async () => {
    engine.behave({ loadMs: 500 });
    const client = await connect(engine.port);
    client.write(postBytes("/v1/chat/completions", chatBody({ model: "a" })));
    assert.ok(await until(() => engine.loads.length === 1));
    client.leave("close");
    assert.ok(await until(async () => (await states()) === "a loaded,b unloaded"));
    assert.equal(engine.loads[0]?.result, "loaded");
  });

  it("loads and unloads when told", TIMEOUT, async () => {
    engine.behave({ loadMs: 800 });
    assert.equal((await ask("load", "a")).text, '{"success":true}');
    assert.equal(await states(), "a loading,b unloaded");
    assert.equal(errorOf(await ask("load", "a")).message, "model is already running");
    assert.ok(await until(async () => (await states()) === "a loaded,b unloaded"));
    assert.equal((await ask("unload", "a")).text, '{"success":true}');
    assert.equal(await states(), "a unloaded,b unloaded");
    assert.equal(errorOf(await ask("unload", "a")).message, "model is not running");
    assert.equal(errorOf(await ask("unload", "nope")).message, "model is not found");
    assert.equal((await ask("load", "nope")).status, 404);
    assert.deepEqual(engine.inference(), [], "none of these is inference");
  });

  it("refuses unknown, missing and failed models", TIMEOUT, async () => {
    const unknown = await chat("nope");
    assert.deepEqual([unknown.status, errorOf(unknown).message], [400, "model 'nope' not found"]);
    assert.equal(
      errorOf(await openaiChat(engine.url, { model: undefined })).message,
      "model name is missing from the request",
    );
    const cold = await send(`${engine.url}/v1/chat/completions?autoload=false`, {
      ...chatBody(),
      model: "a",
    });
    assert.equal(errorOf(cold).message, "model is not loaded");
    engine.behave({ loadFails: true });
    const failed = await chat("a");
    assert.deepEqual(
      [failed.status, errorOf(failed).message],
      [500, "model name=a failed to load"],
    );
    const { data } = (await get("/models")).json() as { data: Card[] };
    assert.equal(data[0]?.status.failed, true);
  });

  it("shows a sleeper, wakes it by a task", TIMEOUT, async () => {
    await chat("a");
    engine.behave({ sleeping: true });
    assert.equal(await states(), "a sleeping,b unloaded");
    await chat("a");
    assert.equal(await states(), "a loaded,b unloaded");
    assert.equal(engine.loads.length, 2);
  });

  it("ends a stream with words that are no event when a model's server dies", TIMEOUT, async () => {
    engine.behave({ fault: { kind: "dies", afterTokens: 2 } });
    const { text } = await chat("a", { stream: true });
    const { events, rest } = parseSse(text);
    assert.equal(rest, "proxy error: Failed to read connection");
    assert.equal(events.length, 3);
    assert.doesNotMatch(text, /\[DONE\]|"error"/);
  });

  it("passes on without a length", TIMEOUT, async () => {
    const client = await connect(engine.port);
    client.write(postBytes("/v1/chat/completions", chatBody({ model: "a" })));
    assert.ok(await until(() => client.body() !== null));
    assert.equal(client.header("transfer-encoding"), "chunked");
    assert.equal(client.header("content-length"), null);
    assert.equal(client.header("x-accel-buffering"), "no");
    client.leave("close");
  });
});
