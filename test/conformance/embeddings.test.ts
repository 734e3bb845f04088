/** Embeddings are kept input by input: only what is missing is computed (design §4, Cache). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import OpenAI from "openai";
import type { Answer, Init } from "../support/client.ts";
import { send, sleep, until } from "../support/client.ts";
import { QUIET, cacheOf, inFlight, recordOf } from "../support/deterministic.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { Fault } from "../support/engine-behaviour.ts";
import type { BackendKind } from "../support/engine-call.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import { isQuiet } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };
const MODEL = "some-embed";

type Fields = Record<string, unknown>;

function embed(url: string, input: unknown, more: Fields = {}, init: Init = {}): Promise<Answer> {
  return send(`${url}/v1/embeddings`, { model: MODEL, input, ...more }, init);
}

/** The numbers of an answer as 32-bit floats, however they are written; in the order of their index. */
function vectorsOf({ json, status, text }: Answer): number[][] {
  assert.equal(status, 200, text);
  const { object, data, model } = json() as { object: string; data: Fields[]; model: string };
  assert.deepEqual([object, model], ["list", MODEL]);
  return data.map(({ object: kind, index, embedding }, at) => {
    assert.deepEqual([kind, index], ["embedding", at]);
    if (typeof embedding !== "string") return (embedding as number[]).map(Math.fround);
    const bytes = new Uint8Array(Buffer.from(embedding, "base64"));
    return [...new Float32Array(bytes.buffer)];
  });
}

function encodingOf({ json }: Answer): string {
  const { data } = json() as { data: Fields[] };
  const [encoding, ...others] = new Set(data.map(({ embedding }) => typeof embedding));
  assert.deepEqual(others, []);
  return encoding === "string" ? "base64" : "float";
}

function usageOf({ json }: Answer): unknown {
  return json().usage;
}

function tokens(count: number): Fields {
  return { prompt_tokens: count, total_tokens: count };
}

describe("embeddings", () => {
  let fleet: Fleet<"a">;
  /** Beside the gateway: what an engine answers that is asked for all at once. */
  let plain: FakeEngine;
  before(async () => {
    plain = await startEngine({ models: [MODEL] });
    fleet = await startFleet(
      { a: { models: [MODEL], backend: QUIET } },
      { circuitBreaker: { failureThreshold: 1_000_000 } },
    );
  });
  afterEach(() => {
    fleet.reset();
    plain.reset();
  });
  after(async () => {
    await plain.close();
    await fleet.close();
  });

  const ask = (input: unknown, more: Fields = {}, init: Init = {}): Promise<Answer> =>
    embed(fleet.url, input, more, init);
  const inputs = (): unknown[] => fleet.engines.a.inference().map(({ json }) => json.input);

  it("asks for what is missing only, each once, and keeps the order", TIMEOUT, async () => {
    const first = await ask(["one two", "three"]);
    assert.equal(cacheOf(first), "miss");
    assert.deepEqual(inputs(), [["one two", "three"]]);
    assert.deepEqual(first.body, fleet.engines.a.inference()[0]?.sent(), "as the engine said it");
    assert.deepEqual(usageOf(first), tokens(3));
    const wanted = ["four five", "three", "six", "one two", "six", "three"];
    const second = await ask(wanted);
    assert.equal(cacheOf(second), "miss");
    assert.deepEqual(inputs().slice(1), [["four five", "six"]]);
    assert.deepEqual(vectorsOf(second), vectorsOf(await embed(plain.url, wanted)));
    const record = await recordOf(fleet.gateway, second);
    const { tokens_input, cache_hit, attempts, backend_id } = record;
    assert.deepEqual([tokens_input, cache_hit, attempts, backend_id], [3, false, 1, "a"]);

    const third = await ask(wanted);
    assert.equal(cacheOf(third), "hit");
    assert.match(third.headers.get("age") ?? "", /^\d+$/);
    assert.equal(third.headers.get("x-tidegate-backend"), null);
    assert.equal(third.headers.get("content-type"), "application/json");
    assert.deepEqual(third.body, second.body);
    const hit = await recordOf(fleet.gateway, third);
    assert.deepEqual(
      [hit.cache_hit, hit.attempts, hit.tokens_input, hit.backend_id],
      [true, 0, null, null],
    );
    const alone = await ask("six");
    assert.equal(cacheOf(alone), "hit");
    assert.deepEqual(vectorsOf(alone), [vectorsOf(second)[2]]);
    assert.equal(inputs().length, 2);
    await isQuiet(fleet.gateway);
  });

  it("sums up what all its inputs cost", TIMEOUT, async () => {
    const costs = new Map([
      ["a", 1],
      ["bb bb", 2],
      ["ccc ccc ccc", 3],
    ]);
    for (const [input, count] of costs) assert.deepEqual(usageOf(await ask(input)), tokens(count));
    const all = [...costs.keys(), "ccc ccc ccc", "dddd dddd dddd dddd"];
    assert.deepEqual(usageOf(await ask(all)), tokens(1 + 2 + 3 + 3 + 4));
    assert.deepEqual(inputs().at(-1), ["dddd dddd dddd dddd"]);
    assert.equal(
      await fleet.gateway.metric("tidegate_tokens_total", { type: "input" }),
      3 + 3 + 10,
    );
  });

  for (const client of ["float", "base64"]) {
    for (const engine of ["float", "base64"] as const) {
      it(`the client wants ${client}, the engine says ${engine}`, TIMEOUT, async () => {
        const words = ["w", "v", "u"].map((word) => `${word} ${client} ${engine}`);
        const exact = vectorsOf(await embed(plain.url, words));
        fleet.engines.a.behave({ vectors: engine });
        const format = { encoding_format: client };
        const first = await ask(words.slice(0, 1), format);
        assert.equal(cacheOf(first), "miss");
        assert.equal(encodingOf(first), client);
        assert.deepEqual(vectorsOf(first), exact.slice(0, 1));
        const part = await ask(words, format);
        assert.equal(cacheOf(part), "miss");
        const whole = await ask(words, format);
        assert.equal(cacheOf(whole), "hit");
        const other = await ask(words, {
          encoding_format: client === "float" ? "base64" : "float",
        });
        assert.equal(cacheOf(other), "hit", "one vector for both");
        for (const answer of [part, whole]) assert.equal(encodingOf(answer), client);
        assert.notEqual(encodingOf(other), client);
        for (const answer of [part, whole, other]) assert.deepEqual(vectorsOf(answer), exact);
        assert.deepEqual(inputs(), [words.slice(0, 1), words.slice(1)]);
      });
    }
  }

  it("the official client reads what was put together", TIMEOUT, async () => {
    const openai = new OpenAI({ baseURL: `${fleet.url}/v1`, apiKey: "none", maxRetries: 0 });
    const read = async (input: string[]) => {
      const { data } = await openai.embeddings.create({ model: MODEL, input });
      return data.map(({ embedding }) => [...embedding]);
    };
    const words = ["official 1", "official 2", "official 3"];
    const exact = vectorsOf(await embed(plain.url, words));
    assert.deepEqual(await read(words.slice(1)), exact.slice(1));
    assert.deepEqual(await read(words), exact);
    assert.deepEqual(await read(words), exact);
    assert.equal(inputs().length, 2);
  });

  it("takes tokens for what they are", TIMEOUT, async () => {
    const exact = vectorsOf(await embed(plain.url, [[1, 2, 3], [4], [5, 6]]));
    assert.deepEqual(vectorsOf(await ask([1, 2, 3])), exact.slice(0, 1), "one input of tokens");
    assert.deepEqual(vectorsOf(await ask([[1, 2, 3], [4]])), exact.slice(0, 2));
    assert.deepEqual(inputs(), [[1, 2, 3], [[4]]]);
    assert.equal(cacheOf(await ask([[4], [1, 2, 3]])), "hit");
    assert.equal(cacheOf(await ask([4])), "hit");
    assert.equal(cacheOf(await ask("4")), "miss", "a text is no token");
    assert.equal(cacheOf(await ask(["[4]"])), "miss");
  });

  it("what changes a vector makes it another one", TIMEOUT, async () => {
    assert.equal(cacheOf(await ask("changed")), "miss");
    for (const more of [{ dimensions: 2 }, { dimensions: 3 }, { input_type: "query" }]) {
      const answer = await ask(["changed"], more);
      assert.equal(cacheOf(answer), "miss", JSON.stringify(more));
      assert.equal(cacheOf(await ask("changed", more)), "hit");
      const { dimensions = 4 } = more as { dimensions?: number };
      assert.equal(vectorsOf(answer)[0]?.length, dimensions);
    }
    assert.equal(inputs().length, 4);
    assert.equal(cacheOf(await ask("changed", { user: "x", encoding_format: "base64" })), "hit");
  });

  const bypasses: [string, unknown, Fields, Init?][] = [
    ["field", "x", { unheard_of: 1 }],
    ["field", "x", { encoding_format: "int8" }],
    ["field", ["x", [1]], {}],
    ["field", { text: "x" }, {}],
    ["no-store", "x", {}, { headers: { "cache-control": "no-store" } }],
  ];
  for (const [reason, input, more, init] of bypasses) {
    it(`is not asked: ${reason}, ${JSON.stringify([input, more])}`, TIMEOUT, async () => {
      for (const count of [1, 2]) {
        const answer = await ask(input, more, init);
        assert.equal(answer.headers.get("x-tidegate-cache"), `bypass;reason=${reason}`);
        assert.equal(inputs().length, count);
      }
    });
  }

  it("Cache-Control: no-cache, max-age, only-if-cached", TIMEOUT, async () => {
    const control = (value: string): Init => ({ headers: { "cache-control": value } });
    const missing = await ask(["k1", "k2"], {}, control("only-if-cached"));
    expectError(missing, 504, "not_cached");
    await ask("k1");
    const partly = await ask(["k1", "k2"], {}, control("only-if-cached"));
    expectError(partly, 504, "not_cached");
    assert.equal(cacheOf(await ask("k1", {}, control("only-if-cached"))), "hit");
    assert.deepEqual(inputs(), ["k1"]);
    await sleep(1100);
    assert.equal(cacheOf(await ask("k1", {}, control("max-age=1"))), "miss");
    assert.equal(cacheOf(await ask("k1", {}, control("max-age=1"))), "hit");
    assert.equal(cacheOf(await ask(["k1", "k2"], {}, control("no-cache"))), "miss");
    assert.deepEqual(inputs().slice(1), ["k1", ["k1", "k2"]]);
    assert.equal(cacheOf(await ask(["k2", "k1"])), "hit");
  });

  it("those who ask for the same share one computation", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    await ask("shared 0");
    const input = ["shared 0", "shared 1", "shared 1"];
    a.freeze();
    const answers = [ask(input)];
    assert.ok(await inFlight(gateway, 1));
    for (let at = 1; at < 8; at++) answers.push(ask(input));
    assert.ok(await inFlight(gateway, 8));
    // Who wants all of it young does not get what the others have from before.
    await sleep(20);
    const young = ask(input, {}, { headers: { "cache-control": "max-age=0" } });
    assert.ok(await inFlight(gateway, 9));
    a.thaw();
    const done = await Promise.all(answers);
    assert.deepEqual(done.map(cacheOf), ["miss", ...Array<string>(7).fill("joined")]);
    const exact = vectorsOf(await embed(plain.url, input));
    for (const answer of done) assert.deepEqual(vectorsOf(answer), exact);
    assert.equal(cacheOf(await young), "miss");
    const asked = inputs()
      .slice(1)
      .map((each) => JSON.stringify(each));
    assert.deepEqual(asked.toSorted(), ['["shared 0","shared 1"]', '["shared 1"]']);
    await isQuiet(gateway);
  });

  const numbers = [0.5, 0.71828182];
  const right = [0, 1].map((index) => ({ object: "embedding", index, embedding: numbers }));
  const wrong: [string, unknown][] = [
    ["too few", { data: right.slice(1) }],
    ["too many", { data: [...right, right[0]] }],
    ["an index twice", { data: [right[0], { ...right[1], index: 0 }] }],
    ["an index that nobody asked for", { data: [right[0], { ...right[1], index: 2 }] }],
    ["another length", { data: [right[0], { ...right[1], embedding: [0.5] }] }],
    ["nothing", { data: [right[0], { ...right[1], embedding: [] }] }],
    ["words", { data: [right[0], { ...right[1], embedding: ["x", "y"] }] }],
    ["half a float", { data: [right[0], { ...right[1], embedding: "AAA=" }] }],
    ["null", { data: [right[0], { ...right[1], embedding: [null, 1] }] }],
    ["no list", { data: {} }],
  ];
  for (const [what, body] of wrong) {
    it(`${what} is no part of an answer, and nothing to keep`, TIMEOUT, async () => {
      const { gateway, engines } = fleet;
      const answered: Fields = { object: "list", ...(body as Fields) };
      const fault: Fault = { kind: "answer", status: 200, body: answered };
      await ask(`${what} 0`);
      const missing = [`${what} 1`, `${what} 2`];
      const input = [`${what} 0`, ...missing];
      engines.a.behave({ fault });
      const answer = await ask(input);
      expectError(answer, 502, "upstream_invalid_response");
      const record = await recordOf(gateway, answer);
      const { status, ending, cause, backend_id, attempts } = record;
      assert.deepEqual(
        [status, ending, cause, backend_id, attempts],
        [502, "failed", "upstream_invalid_response", "a", 1],
      );
      assert.doesNotMatch(gateway.stdout(), /71828182/, "no answer in the log");
      // Asked for as it is, the answer is the client's to judge: a vector per token is one of these.
      if (Array.isArray(answered.data)) {
        const direct = await ask(missing);
        assert.equal(cacheOf(direct), "miss");
        assert.equal(direct.text, JSON.stringify(answered));
      }
      engines.a.behave({ fault: null });
      assert.equal(cacheOf(await ask(input)), "miss", "nothing of it is kept");
      assert.deepEqual(inputs().at(-1), missing);
      await isQuiet(gateway);
    });
  }

  it("takes an answer in any order", TIMEOUT, async () => {
    const body = { object: "list", data: right.toReversed(), model: MODEL, usage: tokens(2) };
    body.data[0] = { object: "embedding", index: 1, embedding: [2, 3] };
    fleet.engines.a.behave({ fault: { kind: "answer", status: 200, body } });
    await ask(["order 0", "order 1"]);
    const again = await ask(["order 0", "order 1"]);
    assert.equal(cacheOf(again), "hit");
    assert.deepEqual(vectorsOf(again), [numbers.map(Math.fround), [2, 3]]);
  });

  it("a part is no answer: the error of what is missing", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    await ask("there");
    for (const [fault, status, code] of [
      [{ kind: "drop", by: "reset" }, 502, "upstream_unreachable"],
      [{ kind: "answer", status: 500, body: { error: { message: "x" } } }, 502, "upstream_error"],
      [{ kind: "answer", status: 400, body: { error: { message: "too long" } } }, 400, undefined],
    ] as const) {
      engines.a.behave({ fault });
      const answer = await ask(["there", "missing"]);
      expectError(answer, status, code);
      assert.equal(answer.headers.get("x-tidegate-cache"), "miss");
      assert.equal(cacheOf(await ask("there")), "hit");
    }
    assert.deepEqual(inputs().slice(1), [["missing"], ["missing"], ["missing"]]);
    await isQuiet(gateway);
  });

  it("stops the engine when nobody waits any more", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    engines.a.behave({ headersDelayMs: Number.POSITIVE_INFINITY });
    const leaving = new AbortController();
    const gone = ask(["gone"], {}, { signal: leaving.signal }).catch(() => null);
    assert.ok(await until(() => engines.a.activeGenerations() === 1));
    leaving.abort();
    await gone;
    assert.ok(await until(() => engines.a.inference()[0]?.closedByClient === true));
    await isQuiet(gateway);
  });

  it("a model that has become another one is asked for everything again", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const input = ["turned 1", "turned 2"];
    await ask(input[0]);
    engines.a.behave({ vectorLength: 2 });
    const answer = await ask(input);
    assert.deepEqual(
      vectorsOf(answer).map(({ length }) => length),
      [2, 2],
    );
    assert.deepEqual(inputs(), ["turned 1", ["turned 2"], input]);
    assert.equal(cacheOf(await ask(input)), "hit");
    // The same where both are known, of the old model and of the new one.
    engines.a.behave({ vectorLength: 4 });
    await ask("turned 3");
    const mixed = await ask(["turned 1", "turned 3"]);
    assert.deepEqual(
      vectorsOf(mixed).map(({ length }) => length),
      [4, 4],
    );
    await isQuiet(gateway);
  });
});

describe("embeddings: batches", () => {
  const sizes: [BackendKind, number][] = [
    ["openai", 32],
    ["llamacpp", 256],
    ["vllm", 2048],
    ["ollama", 64],
  ];
  for (const [kind, size] of sizes) {
    it(`${kind}: ${size} at a time`, TIMEOUT, async () => {
      const name = kind === "ollama" ? "some-embed:latest" : MODEL;
      const models = [{ name, contextLength: 1e6 }];
      const plain = await startEngine({ kind, models });
      const fleet = await startFleet({ a: { kind, models, backend: QUIET } });
      try {
        const more = { model: name, encoding_format: "base64" };
        const { gateway, engines, url } = fleet;
        const words = Array.from({ length: 2 * size + 3 }, (_, at) => `word${at}`);
        const answer = await embed(url, words, more);
        const inputs = engines.a.inference().map(({ json }) => json.input as string[]);
        assert.deepEqual(
          inputs.map(({ length }) => length),
          [size, size, 3],
        );
        assert.deepEqual(inputs.flat(), words);
        const { data } = answer.json() as { data: Fields[] };
        const exact = (await embed(plain.url, words, more)).json() as { data: Fields[] };
        assert.deepEqual(
          data.map(({ embedding }) => embedding),
          exact.data.map(({ embedding }) => embedding),
        );
        assert.deepEqual(usageOf(answer), tokens(words.length));
        const record = await recordOf(gateway, answer);
        assert.deepEqual([record.attempts, record.tokens_input], [3, words.length]);
        assert.equal(await gateway.metric("tidegate_tokens_total"), words.length);
        await isQuiet(gateway);
      } finally {
        await plain.close();
        await fleet.close();
      }
    });
  }

  it("what was computed before one failed is not computed again", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { models: [MODEL], backend: QUIET } });
    try {
      const { engines, url, gateway } = fleet;
      const words = Array.from({ length: 70 }, (_, at) => `word${at}`);
      engines.a.behave({ headersDelayMs: Infinity });
      const failing = embed(url, words);
      assert.ok(await until(() => engines.a.inference().length === 1));
      // The first batch goes on, the second one waits.
      engines.a.release();
      engines.a.behave({ headersDelayMs: Infinity });
      assert.ok(await until(() => engines.a.inference().length === 2));
      engines.a.behave({ fault: { kind: "drop", by: "reset" }, faultTimes: 1 });
      engines.a.release();
      expectError(await failing, 502, "upstream_unreachable");
      await isQuiet(gateway);
      assert.equal(cacheOf(await embed(url, words)), "miss");
      const lengths = engines.a.inference().map(({ json }) => (json.input as string[]).length);
      assert.deepEqual(lengths, [32, 32, 6, 6]);
    } finally {
      await fleet.close();
    }
  });

  it("an answer that is too large to hold, and one that breaks off there", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: { models: [MODEL], backend: QUIET } },
      { limits: { bufferBytes: 300 } },
    );
    try {
      const { engines, url, gateway } = fleet;
      const words = Array.from({ length: 30 }, (_, at) => `word${at}`);
      const whole = await embed(url, words);
      assert.equal(vectorsOf(whole).length, 30);
      assert.equal((await recordOf(gateway, whole)).tokens_input, 30);
      assert.equal(cacheOf(await embed(url, words)), "hit");
      // The connection breaks off; or it ends well, and the JSON does not.
      for (const length of [undefined, 4000]) {
        const body = whole.text.slice(0, 1500).replace(/[\]}]+$/, "");
        const fault: Fault = { kind: "answer", status: 200, body, contentType: "application/json" };
        engines.a.behave({ fault: length === undefined ? fault : { ...fault, length } });
        expectError(await embed(url, [`broken ${length}`]), 502, "upstream_incomplete");
      }
      await isQuiet(gateway);
    } finally {
      await fleet.close();
    }
  });

  it(
    "backends that answer with vectors of different models are no backends of one",
    TIMEOUT,
    async () => {
      const fleet = await startFleet({
        a: { models: [MODEL], backend: { ...QUIET, concurrency: 1 } },
        b: { models: [MODEL], backend: { ...QUIET, concurrency: 1 } },
      });
      try {
        const { engines, url, gateway } = fleet;
        engines.b.behave({ vectorLength: 2 });
        const words = Array.from({ length: 70 }, (_, at) => `word${at}`);
        const answer = await embed(url, words);
        expectError(answer, 502, "upstream_invalid_response");
        const count = engines.a.inference().length + engines.b.inference().length;
        assert.ok(count <= 12, `${count} requests`);
        await isQuiet(gateway);
      } finally {
        await fleet.close();
      }
    },
  );

  it("budgets count what was computed, once", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: { models: [MODEL], backend: QUIET } },
      {
        auth: { keys: [{ key: "k", tenant: "t" }] },
        tenants: { t: { concurrency: 1, budgets: [{ tokens: 1000, window: "1h" }] } },
      },
    );
    try {
      const { engines, url } = fleet;
      const init = { headers: { authorization: "Bearer k" } };
      const used = async () => {
        const tenants = (await send(`${url}/admin/api/tenants`)).json() as unknown as {
          id: string;
          budgets: { used: number; reserved: number }[];
        }[];
        const budget = tenants.find(({ id }) => id === "t")?.budgets[0];
        return [budget?.used, budget?.reserved];
      };
      const words = Array.from({ length: 70 }, (_, at) => `word${at}`);
      assert.equal((await embed(url, words, {}, init)).status, 200);
      assert.ok(await until(async () => Math.round((await used())[0] ?? 0) === 70));
      assert.equal(cacheOf(await embed(url, words, {}, init)), "hit");
      // All of it a second time, since the model has changed: still one place, and what it cost.
      engines.a.behave({ vectorLength: 2 });
      const turned = await embed(url, [...words.slice(0, 10), "new"], {}, init);
      assert.equal(turned.status, 200, turned.text);
      const isSettled = async () => {
        const [spent = 0, reserved] = await used();
        return Math.round(spent) === 70 + 12 && reserved === 0;
      };
      assert.ok(await until(isSettled), JSON.stringify(await used()));
    } finally {
      await fleet.close();
    }
  });
});
