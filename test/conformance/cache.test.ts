/** Answers that are given again: which, to whom, for how long (design §4, contract §3 `x-tidegate-cache`). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, Init } from "../support/client.ts";
import { openaiChat, send, sleep, until } from "../support/client.ts";
import { QUIET, cacheOf, recordOf, sureChat } from "../support/deterministic.ts";
import type { Fault } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import { isQuiet } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };

type Fields = Record<string, unknown>;

const ENDLESS = JSON.stringify({
  object: "chat.completion",
  choices: [{ index: 0, message: { role: "assistant", content: "Once upon" } }],
  usage: { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 },
});

function header(value: string): Init {
  return { headers: { "cache-control": value } };
}

describe("the cache", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["test-model", "some-embed"], backend: QUIET } },
      { circuitBreaker: { failureThreshold: 1_000_000 } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const chat = (body: Fields, init: Init = {}): Promise<Answer> =>
    openaiChat(fleet.url, body, init);
  const asked = (): number => fleet.engines.a.inference().length;
  const lookups = (result: string): Promise<number> =>
    fleet.gateway.metric("tidegate_cache_lookups_total", { result });

  it(
    "gives an answer again: the same bytes, with their age, from no backend",
    TIMEOUT,
    async () => {
      const { gateway } = fleet;
      const hits = () => gateway.metric("tidegate_requests_total", { cache_hit: "true" });
      const counted = [await lookups("miss"), await lookups("hit"), await hits()];
      const first = await chat(sureChat("again"));
      assert.equal(cacheOf(first), "miss");
      assert.equal(first.headers.get("age"), null);
      assert.equal(first.headers.get("x-tidegate-backend"), "a");
      await sleep(1100);
      // The same request in other words.
      const { messages, model } = sureChat("again");
      const spaced = JSON.stringify(
        { user: "someone", messages, temperature: 0.0, model },
        null,
        2,
      );
      for (const body of [sureChat("again"), spaced]) {
        const again = await send(`${fleet.url}/v1/chat/completions`, body);
        assert.equal(cacheOf(again), "hit");
        assert.deepEqual(again.body, first.body);
        assert.equal(again.headers.get("content-type"), first.headers.get("content-type"));
        const age = Number(again.headers.get("age"));
        assert.ok(Number.isInteger(age) && age >= 1 && age <= 10, `${age}`);
        for (const routed of ["backend", "model", "reason", "attempts"]) {
          assert.equal(again.headers.get(`x-tidegate-${routed}`), null, routed);
        }
        const record = await recordOf(gateway, again);
        const { cache, cache_hit, backend_id, attempts, tokens_input, tokens_generated } = record;
        assert.deepEqual(
          [cache, cache_hit, backend_id, attempts, tokens_input, tokens_generated],
          ["hit", true, null, 0, null, null],
        );
        const { status, ending, cause, model: named } = record;
        assert.deepEqual([status, ending, cause, named], [200, "completed", null, "test-model"]);
      }
      assert.equal(asked(), 1);
      const now = [await lookups("miss"), await lookups("hit"), await hits()];
      assert.deepEqual(
        now.map((value, at) => value - (counted[at] ?? 0)),
        [1, 2, 2],
      );
      assert.ok((await gateway.metric("tidegate_cache_entries")) >= 1);
      assert.ok((await gateway.metric("tidegate_cache_bytes")) >= first.body.length);
      await isQuiet(gateway);
    },
  );

  it("answers on every path that samples, each for itself", TIMEOUT, async () => {
    const plain = { model: "test-model", temperature: 0 };
    const messages = [{ role: "user", content: "paths" }];
    const bodies: [string, Fields][] = [
      ["/v1/chat/completions", { messages }],
      ["/v1/completions", { prompt: "paths" }],
      ["/v1/messages", { messages, max_tokens: 9 }],
      ["/v1/responses", { input: "paths" }],
    ];
    for (const [at, [path, body]] of bodies.entries()) {
      const first = await send(fleet.url + path, { ...plain, ...body });
      assert.equal(cacheOf(first), "miss", path);
      const again = await send(fleet.url + path, { ...plain, ...body });
      assert.equal(cacheOf(again), "hit", path);
      assert.equal(again.text, first.text);
      assert.equal(asked(), at + 1);
    }
  });

  it("another question has another answer", TIMEOUT, async () => {
    const changes: Fields[] = [
      {},
      { max_tokens: 3 },
      { max_tokens: null },
      { seed: 1 },
      { stop: ["x"] },
      { messages: [{ role: "user", content: "Otherwise" }] },
      { messages: [{ role: "system", content: "otherwise" }] },
      { response_format: { type: "json_object" } },
      { tools: [{ type: "function", function: { name: "f", parameters: {} } }] },
    ];
    for (const change of changes) {
      assert.equal(cacheOf(await chat(sureChat("otherwise", change))), "miss");
    }
    assert.equal(asked(), changes.length);
    const init = { headers: { "anthropic-beta": "x" } };
    assert.equal(cacheOf(await chat(sureChat("otherwise"), init)), "miss");
    const path = `${fleet.url}/v1/chat/completions?beta=true`;
    assert.equal(cacheOf(await send(path, sureChat("otherwise"))), "miss");
    assert.equal(cacheOf(await chat(sureChat("otherwise"))), "hit");
  });

  const bypasses: [string, Fields | string, Init?][] = [
    ["stream", { stream: true }],
    ["temperature", { temperature: undefined }],
    ["temperature", { temperature: 0.1 }],
    ["temperature", { temperature: null }],
    ["n", { n: 2 }],
    ["n", { best_of: 2 }],
    ["field", { unheard_of: 1 }],
    ["field", { tools: [{ type: "web_search" }] }],
    ["number", '{"model":"test-model","temperature":0,"seed":9007199254740993,"messages":[]}'],
    ["no-store", {}, header("no-store")],
    ["no-store", {}, header("No-Store, max-age=5")],
  ];
  for (const [reason, change, init] of bypasses) {
    it(`is not asked: ${reason}, ${JSON.stringify(change)}`, TIMEOUT, async () => {
      const text = typeof change === "string" ? change.replace("[]", "[{}]") : null;
      const body = text ?? sureChat(`bypass ${reason}`, change as Fields);
      const counted = await lookups("bypass");
      for (const count of [1, 2]) {
        const answer = await send(`${fleet.url}/v1/chat/completions`, body, init);
        assert.equal(cacheOf(answer), `bypass;reason=${reason}`);
        assert.equal(answer.headers.get("x-tidegate-backend"), "a");
        assert.equal(asked(), count);
        const { cache, cache_hit } = await recordOf(fleet.gateway, answer);
        assert.deepEqual([cache, cache_hit], [`bypass;reason=${reason}`, false]);
      }
      assert.equal((await lookups("bypass")) - counted, 2);
      const only = await send(`${fleet.url}/v1/chat/completions`, body, {
        headers: { "cache-control": `only-if-cached, ${init?.headers?.["cache-control"] ?? ""}` },
      });
      const { message } = expectError(only, 504, "not_cached");
      assert.match(message, new RegExp(reason));
      assert.equal(asked(), 2);
    });
  }

  it("is not asked: endpoint", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.setModels(["test-model", "some-embed", "some-rerank"]);
    const body = { model: "test-model", messages: [{ role: "user", content: "count" }] };
    const answer = await send(`${fleet.url}/v1/messages/count_tokens`, body);
    assert.equal(cacheOf(answer), "bypass;reason=endpoint");
    a.setModels(["test-model", "some-embed"]);
  });

  it("says of what was refused before it was asked that it was", TIMEOUT, async () => {
    const counted = await lookups("bypass");
    const refused = await chat(sureChat("x", { model: "nobody" }));
    expectError(refused, 404, "model_not_found");
    assert.equal(refused.headers.get("x-tidegate-cache"), "bypass;reason=refused");
    assert.equal(await lookups("bypass"), counted);
  });

  it("no-cache: computes anew, and keeps that", TIMEOUT, async () => {
    const body = sureChat("no-cache");
    fleet.engines.a.behave({ tokens: ["old"] });
    assert.equal(cacheOf(await chat(body)), "miss");
    fleet.engines.a.behave({ tokens: ["new"] });
    assert.match((await chat(body)).text, /old/);
    const anew = await chat(body, header("no-cache"));
    assert.equal(cacheOf(anew), "miss");
    assert.match(anew.text, /new/);
    const again = await chat(body);
    assert.equal(cacheOf(again), "hit");
    assert.equal(again.text, anew.text);
    assert.equal(asked(), 2);
  });

  it("no-store: neither takes nor leaves an answer", TIMEOUT, async () => {
    const body = sureChat("no-store");
    await chat(body, header("no-store"));
    assert.equal(cacheOf(await chat(body)), "miss");
    fleet.engines.a.behave({ tokens: ["new"] });
    assert.match((await chat(body, header("no-store"))).text, /new/);
    assert.doesNotMatch((await chat(body)).text, /new/);
  });

  it("max-age: takes nothing older", TIMEOUT, async () => {
    const body = sureChat("max-age");
    const first = await chat(body, header("max-age=1"));
    assert.equal(cacheOf(first), "miss");
    assert.equal(cacheOf(await chat(body, header("max-age=60"))), "hit");
    await sleep(1100);
    assert.equal(cacheOf(await chat(body, header("max-age=60"))), "hit");
    assert.equal(cacheOf(await chat(body, header("max-age=1"))), "miss");
    const renewed = await chat(body, header("max-age=1"));
    assert.equal(cacheOf(renewed), "hit", "the new one took the old one's place");
    assert.notEqual(renewed.text, first.text);
    assert.equal(asked(), 2);
  });

  it("only-if-cached: what is there, or 504", TIMEOUT, async () => {
    const body = sureChat("only-if-cached");
    const missing = await chat(body, header("only-if-cached"));
    const error = expectError(missing, 504, "not_cached");
    assert.equal(error.type, "invalid_request_error");
    assert.equal(missing.headers.get("x-tidegate-cache"), "miss");
    assert.equal(missing.headers.get("x-tidegate-backend"), null);
    assert.equal(asked(), 0);
    const record = await recordOf(fleet.gateway, missing);
    assert.deepEqual(
      [record.status, record.ending, record.cause, record.attempts],
      [504, "failed", "not_cached", 0],
    );
    await chat(body);
    assert.equal(cacheOf(await chat(body, header("only-if-cached"))), "hit");
    assert.equal(asked(), 1);
    const none = await chat(body, header("only-if-cached, no-cache"));
    expectError(none, 504, "not_cached");
    await isQuiet(fleet.gateway);
  });

  const spoilt: [string, Fault | null, string, number][] = [
    ["an error", { kind: "answer", status: 400, body: { error: { message: "x" } } }, "stop", 400],
    [
      "an error in a 200",
      { kind: "answer", status: 200, body: { error: { message: "x" } } },
      "",
      502,
    ],
    ["what broke off", { kind: "cut", by: "reset" }, "stop", 502],
    ["a filtered answer", null, "content_filter", 200],
    ["an unheard-of end", null, "abort", 200],
    ["an answer without an end", { kind: "raw", body: ENDLESS }, "stop", 200],
  ];
  for (const [what, fault, finishReason, status] of spoilt) {
    it(`never keeps ${what}`, TIMEOUT, async () => {
      const { a } = fleet.engines;
      const body = sureChat(`spoilt: ${what}`);
      a.behave({ fault, finishReason });
      assert.equal((await chat(body)).status, status);
      assert.equal((await chat(body)).status, status);
      assert.equal(asked(), 2);
      a.behave({ fault: null, finishReason: "length" });
      assert.equal(cacheOf(await chat(body)), "miss");
      assert.equal(cacheOf(await chat(body)), "hit", "cut at its limit is as it was asked for");
      await isQuiet(fleet.gateway);
    });
  }
});

describe("the cache and its configuration", () => {
  it("cache.enabled: false asks nothing; a reload forgets what was there", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { backend: QUIET } }, { cache: { enabled: false } });
    try {
      const { gateway, url, engines } = fleet;
      const disabled = "bypass;reason=disabled";
      for (const count of [1, 2]) {
        assert.equal(cacheOf(await openaiChat(url, sureChat("x"))), disabled);
        assert.equal(engines.a.inference().length, count);
      }
      expectError(
        await openaiChat(url, sureChat("x"), header("only-if-cached")),
        504,
        "not_cached",
      );
      await fleet.reconfigure({});
      assert.equal(cacheOf(await openaiChat(url, sureChat("x"))), "miss");
      assert.equal(cacheOf(await openaiChat(url, sureChat("x"))), "hit");
      assert.equal(await gateway.metric("tidegate_cache_entries"), 1);
      await fleet.reconfigure({ cache: { enabled: false } });
      assert.equal(await gateway.metric("tidegate_cache_entries"), 0);
      assert.equal(await gateway.metric("tidegate_cache_bytes"), 0);
      assert.equal(cacheOf(await openaiChat(url, sureChat("x"))), disabled);
      await fleet.reconfigure({});
      assert.equal(cacheOf(await openaiChat(url, sureChat("x"))), "miss", "forgotten");
      // What is under way while it is switched off is not kept either.
      engines.a.behave({ headersDelayMs: Infinity });
      const under = openaiChat(url, sureChat("under way"));
      assert.ok(await until(() => engines.a.activeGenerations() === 1));
      await fleet.reconfigure({ cache: { enabled: false } });
      engines.a.release();
      assert.equal(cacheOf(await under), "miss");
      assert.equal(await gateway.metric("tidegate_cache_entries"), 0);
    } finally {
      await fleet.close();
    }
  });

  it("cache.ttlMs: no longer, also by a reload", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { backend: QUIET } }, { cache: { ttlMs: 1000 } });
    try {
      const result = async () => cacheOf(await openaiChat(fleet.url, sureChat("ttl")));
      assert.equal(await result(), "miss");
      assert.equal(await result(), "hit");
      await sleep(1100);
      assert.equal(await result(), "miss");
      await fleet.reconfigure({ cache: { ttlMs: 60_000 } });
      await sleep(1100);
      assert.equal(await result(), "hit", "as long as it says now");
      await fleet.reconfigure({ cache: { ttlMs: 300 } });
      assert.equal(await result(), "miss");
    } finally {
      await fleet.close();
    }
  });

  it("cache.maxItems: the one not used for longest goes, also by a reload", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { backend: QUIET } }, { cache: { maxItems: 2 } });
    try {
      const result = async (about: string) => cacheOf(await openaiChat(fleet.url, sureChat(about)));
      const entries = () => fleet.gateway.metric("tidegate_cache_entries");
      for (const about of ["1", "2"]) assert.equal(await result(about), "miss");
      assert.equal(await result("1"), "hit");
      assert.equal(await result("3"), "miss");
      assert.equal(await entries(), 2);
      assert.deepEqual([await result("1"), await result("3")], ["hit", "hit"]);
      await fleet.reconfigure({ cache: { maxItems: 1 } });
      assert.equal(await entries(), 1);
      assert.equal(await result("3"), "hit");
      assert.equal(await result("1"), "miss");
      assert.equal(await result("3"), "miss");
    } finally {
      await fleet.close();
    }
  });

  it("cache.maxBytes: never more, and nothing that takes most of it", TIMEOUT, async () => {
    const maxBytes = 40_000;
    const fleet = await startFleet({ a: { backend: QUIET } }, { cache: { maxBytes } });
    try {
      const { gateway, engines } = fleet;
      const result = async (about: string) => cacheOf(await openaiChat(fleet.url, sureChat(about)));
      engines.a.behave({ tokens: ["x".repeat(4000)] });
      for (let at = 0; at < 15; at++) {
        assert.equal(await result(`${at}`), "miss");
        const bytes = await gateway.metric("tidegate_cache_bytes");
        assert.ok(bytes >= 4000 && bytes <= maxBytes, `${bytes}`);
      }
      assert.equal(await result("14"), "hit");
      assert.equal(await result("0"), "miss");
      engines.a.behave({ tokens: ["x".repeat(30_000)] });
      assert.equal(await result("large"), "miss");
      assert.equal(await result("large"), "miss");
      assert.equal(await result("14"), "hit", "nothing had to go for it");
      await fleet.reconfigure({ cache: { maxBytes: 10_000 } });
      const bytes = await gateway.metric("tidegate_cache_bytes");
      assert.ok(bytes <= 10_000, `${bytes}`);
    } finally {
      await fleet.close();
    }
  });

  it("models.<name>.maxOutputTokens: another cap is another question", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { backend: QUIET } });
    try {
      const result = async (more: Fields = {}) =>
        cacheOf(await openaiChat(fleet.url, sureChat("cap", more)));
      const capped = (maxOutputTokens: number) =>
        fleet.reconfigure({ models: { "test-model": { maxOutputTokens } } });
      assert.equal(await result(), "miss");
      await capped(3);
      assert.equal(await result(), "miss");
      assert.equal(await result(), "hit");
      await capped(4);
      assert.equal(await result(), "miss");
      assert.deepEqual(
        fleet.engines.a.inference().map(({ json }) => json.max_tokens),
        [undefined, 3, 4],
      );
      await fleet.reconfigure({});
      assert.equal(await result(), "hit", "the one without a cap is still there");
    } finally {
      await fleet.close();
    }
  });

  it("a model that was pulled again is another model", TIMEOUT, async () => {
    const digests = ["1", "2"].map((digit) => digit.repeat(64));
    const model = (digest = "") => [{ name: "m:1", digest }];
    const fleet = await startFleet({
      o: { kind: "ollama", models: model(digests[0]), backend: { healthInterval: 100 } },
    });
    try {
      const { gateway, engines } = fleet;
      const result = async () =>
        cacheOf(await openaiChat(fleet.url, sureChat("d", { model: "m:1" })));
      const seen = (digest = "") =>
        until(async () => (await send(`${gateway.url}/admin/api/snapshot`)).text.includes(digest));
      assert.ok(await seen(digests[0]));
      assert.equal(await result(), "miss");
      assert.equal(await result(), "hit");
      engines.o.setModels(model(digests[1]));
      assert.ok(await seen(digests[1]));
      assert.equal(await result(), "miss");
      engines.o.setModels(model(digests[0]));
      assert.ok(await seen(digests[0]));
      assert.equal(await result(), "hit");
    } finally {
      await fleet.close();
    }
  });

  it("no tenant gets the answer of another", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: { backend: QUIET } },
      {
        auth: {
          keys: [
            { key: "k1", tenant: "one" },
            { key: "k1b", tenant: "one" },
            { key: "k2", tenant: "two" },
          ],
        },
        tenants: { one: {}, two: {} },
      },
    );
    try {
      const { a } = fleet.engines;
      const ask = (key: string) =>
        openaiChat(fleet.url, sureChat("secret"), { headers: { authorization: `Bearer ${key}` } });
      const first = await ask("k1");
      assert.equal(cacheOf(first), "miss");
      const other = await ask("k2");
      assert.equal(cacheOf(other), "miss");
      assert.notEqual(other.text, first.text);
      assert.deepEqual([(await ask("k1b")).text, (await ask("k2")).text], [first.text, other.text]);
      assert.equal(cacheOf(await ask("k1b")), "hit", "a tenant has several keys");
      // Nor while they are in the air at the same time.
      a.behave({ headersDelayMs: Infinity });
      const before = a.inference().length;
      const asking = ["k1", "k2", "k1b"].map((key) =>
        openaiChat(fleet.url, sureChat("at once"), { headers: { authorization: `Bearer ${key}` } }),
      );
      const areHere = async (): Promise<boolean> =>
        (await fleet.gateway.metric("tidegate_requests_in_flight")) === asking.length &&
        a.inference().length === before + 2;
      assert.ok(await until(areHere));
      a.release();
      const both = await Promise.all(asking);
      assert.equal(a.inference().length, before + 2);
      const [one, two, three] = both.map(({ text }) => text);
      assert.equal(one, three);
      assert.notEqual(one, two);
    } finally {
      await fleet.close();
    }
  });
});
