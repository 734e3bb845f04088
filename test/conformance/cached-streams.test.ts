/** Streams that are kept once they are whole, and played again (contract §1, cache.streamCacheDisabled). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import OpenAI from "openai";
import type { Answer, Init } from "../support/client.ts";
import { connect, openaiChat, postBytes, send, until } from "../support/client.ts";
import { QUIET, cacheOf, recordOf, sureChat } from "../support/deterministic.ts";
import type { Behaviour, Fault } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import { isQuiet } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };

type Fields = Record<string, unknown>;

function header(value: string): Init {
  return { headers: { "cache-control": value } };
}

describe("streams that are kept (cache.streamCacheDisabled: false)", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: QUIET } },
      {
        cache: { streamCacheDisabled: false },
        limits: { bufferBytes: 20_000 },
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const stream = (about: string, more: Fields = {}, init: Init = {}): Promise<Answer> =>
    openaiChat(fleet.url, sureChat(about, { stream: true, ...more }), init);
  const asked = (): number => fleet.engines.a.inference().length;

  for (const [path, body] of [
    ["/v1/chat/completions", { messages: [{ role: "user", content: "stream" }] }],
    ["/v1/completions", { prompt: "stream" }],
    ["/v1/messages", { messages: [{ role: "user", content: "stream" }], max_tokens: 99 }],
    ["/v1/responses", { input: "stream" }],
  ] as const) {
    it(`${path}: played again, byte for byte`, TIMEOUT, async () => {
      const { gateway } = fleet;
      const ask = () =>
        send(fleet.url + path, { model: "test-model", temperature: 0, stream: true, ...body });
      const first = await ask();
      assert.equal(cacheOf(first), "miss");
      const again = await ask();
      assert.equal(cacheOf(again), "hit");
      assert.deepEqual(again.body, first.body);
      assert.equal(asked(), 1);
      assert.match(again.headers.get("content-type") ?? "", /^text\/event-stream/);
      assert.equal(again.headers.get("cache-control"), "no-cache");
      assert.equal(again.headers.get("x-accel-buffering"), "no");
      assert.match(again.headers.get("age") ?? "", /^\d+$/);
      assert.equal(again.headers.get("x-tidegate-backend"), null);
      const record = await recordOf(gateway, again);
      const { stream: isStream, cache_hit, ending, status, ttft, tokens_generated } = record;
      assert.deepEqual([isStream, cache_hit, ending, status], [true, true, "completed", 200]);
      assert.deepEqual([ttft, tokens_generated], [null, null]);
      await isQuiet(gateway);
    });
  }

  it("stream_options make it another stream", TIMEOUT, async () => {
    const usage = { stream_options: { include_usage: true } };
    const plain = await stream("options");
    const told = await stream("options", usage);
    assert.deepEqual([cacheOf(plain), cacheOf(told)], ["miss", "miss"]);
    assert.doesNotMatch(plain.text, /"usage":\{/);
    assert.match(told.text, /"usage":\{/);
    assert.equal((await stream("options")).text, plain.text);
    assert.equal((await stream("options", usage)).text, told.text);
    const whole = await openaiChat(fleet.url, sureChat("options"));
    assert.equal(cacheOf(whole), "miss", "an answer in one piece is none of them");
    assert.equal(asked(), 3);
  });

  it("nothing of how the first one waited is played again", TIMEOUT, async () => {
    const own = await startFleet(
      { a: { backend: QUIET } },
      { cache: { streamCacheDisabled: false }, queue: { heartbeatMs: 60 } },
    );
    try {
      own.engines.a.behave({ headersDelayMs: 1000 });
      const ask = () => openaiChat(own.url, sureChat("heartbeats", { stream: true }));
      const first = await ask();
      assert.match(first.text, /^: tidegate \{/);
      const again = await ask();
      assert.equal(cacheOf(again), "hit");
      assert.doesNotMatch(again.text, /tidegate/);
      assert.equal(again.text, first.text.slice(first.text.indexOf("data:")));
    } finally {
      await own.close();
    }
  });

  it("the official client reads what is played", TIMEOUT, async () => {
    const openai = new OpenAI({ baseURL: `${fleet.url}/v1`, apiKey: "none", maxRetries: 0 });
    const read = async () => {
      const chunks = await openai.chat.completions.create({
        model: "test-model",
        temperature: 0,
        stream: true,
        messages: [{ role: "user", content: "official" }],
      });
      let text = "";
      let reason = null;
      for await (const { choices } of chunks) {
        text += choices[0]?.delta.content ?? "";
        reason = choices[0]?.finish_reason ?? reason;
      }
      return { text, reason };
    };
    const first = await read();
    assert.deepEqual(first, { text: "word0 word1 word2 word3 word4", reason: "stop" });
    assert.deepEqual(await read(), first);
    assert.equal(asked(), 1);
  });

  const spoilt: [string, Fault | null, Partial<Behaviour>][] = [
    ["broke off", { kind: "cut", afterTokens: 2, by: "reset" }, {}],
    ["ended early", { kind: "cut", afterTokens: 2, by: "eof" }, {}],
    ["failed", { kind: "error", afterTokens: 2, ends: "done" }, {}],
    [
      "failed behind its finish reason",
      { kind: "error", afterTokens: 5, ends: "eof" },
      { finishOnLastToken: true },
    ],
    ["was filtered", null, { finishReason: "content_filter" }],
    ["is too large to hold", null, { tokens: Array<string>(100).fill("x".repeat(500)) }],
  ];
  for (const [what, fault, behaviour] of spoilt) {
    it(`none is kept that ${what}`, TIMEOUT, async () => {
      const { a } = fleet.engines;
      a.behave({ fault, ...behaviour });
      for (const count of [1, 2]) {
        assert.equal(cacheOf(await stream(what)), "miss");
        assert.equal(asked(), count);
      }
      fleet.reset();
      assert.equal(cacheOf(await stream(what)), "miss");
      assert.equal(cacheOf(await stream(what)), "hit");
    });
  }

  it("none is kept whose client left", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    engines.a.behave({ tokens: 50, tokenDelayMs: 20 });
    const client = await connect(gateway.port);
    client.write(postBytes("/v1/chat/completions", sureChat("left", { stream: true })));
    assert.ok(await until(() => client.received().includes("word3")));
    client.leave("reset");
    assert.ok(await until(() => engines.a.inference()[0]?.closedByClient === true));
    await isQuiet(gateway);
    fleet.reset();
    assert.equal(cacheOf(await stream("left")), "miss");
  });

  it("Cache-Control holds for streams", TIMEOUT, async () => {
    const missing = await stream("control", {}, header("only-if-cached"));
    expectError(missing, 504, "not_cached");
    assert.equal(missing.headers.get("x-tidegate-cache"), "miss");
    const first = await stream("control");
    assert.equal(cacheOf(await stream("control", {}, header("only-if-cached"))), "hit");
    const anew = await stream("control", {}, header("no-cache"));
    assert.equal(cacheOf(anew), "miss");
    assert.notEqual(anew.text, first.text);
    assert.equal((await stream("control")).text, anew.text);
    assert.equal(
      cacheOf(await stream("control", {}, header("no-store"))),
      "bypass;reason=no-store",
    );
    assert.equal(asked(), 3);
  });

  it("a reload switches it", TIMEOUT, async () => {
    const own = await startFleet({ a: { backend: QUIET } });
    try {
      const ask = () => openaiChat(own.url, sureChat("switched", { stream: true }));
      assert.equal(cacheOf(await ask()), "bypass;reason=stream");
      await own.reconfigure({ cache: { streamCacheDisabled: false } });
      assert.deepEqual([cacheOf(await ask()), cacheOf(await ask())], ["miss", "hit"]);
      await own.reconfigure({});
      assert.equal(cacheOf(await ask()), "bypass;reason=stream");
    } finally {
      await own.close();
    }
  });
});
