/** Answers in Redis: what goes in comes out, and everything else is a miss. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import type { Redis } from "ioredis";
import type { Answer } from "../../src/stores/answers.ts";
import { RedisAnswers } from "../../src/stores/redis-answers.ts";

/** A Redis that keeps buffers, behind a link that may be away. */
function setUp() {
  const values = new Map<string, Buffer>();
  const ttls = new Map<string, number>();
  const state = { isUp: true, asked: 0 };
  const get = (key: string): Buffer | null => values.get(key) ?? null;
  const redis = {
    getBuffer: async (key: string) => get(key),
    mgetBuffer: async (keys: string[]) => keys.map(get),
    set: async (key: string, value: Buffer, _: "PX", ttlMs: number) => {
      values.set(key, value);
      ttls.set(key, ttlMs);
      return "OK" as const;
    },
  } as unknown as Redis;
  const answers = new RedisAnswers({
    prefix: "p:",
    ask: async (command) => {
      state.asked++;
      return state.isUp ? await command(redis) : null;
    },
  });
  return { answers, values, ttls, state };
}

const anyAnswer: fc.Arbitrary<Answer> = fc.record(
  {
    storedAt: fc.nat(),
    contentType: fc.string({ unit: "grapheme" }),
    cacheControl: fc.option(fc.string()),
    body: fc.uint8Array({ maxLength: 300 }),
    model: fc.string({ unit: "grapheme" }),
  },
  { noNullPrototype: true },
);

describe("answers in Redis", () => {
  it("come out as they went in, byte for byte", async () => {
    await fc.assert(
      fc.asyncProperty(anyAnswer, async (answer) => {
        const { answers, ttls } = setUp();
        answers.set("key", answer, 1234);
        assert.deepEqual(await answers.get("key"), answer);
        assert.deepEqual([...ttls], [["p:answer:key", 1234]]);
      }),
    );
  });

  it("come several at once, in order, for one question", async () => {
    const { answers, state } = setUp();
    const [one, other] = fc.sample(anyAnswer, 2);
    assert(one !== undefined && other !== undefined);
    answers.set("one", one, 1000);
    answers.set("other", other, 1000);
    state.asked = 0;
    assert.deepEqual(await answers.getMany(["other", "none", "one"]), [other, null, one]);
    assert.equal(state.asked, 1);
    assert.deepEqual(await answers.getMany([]), []);
    assert.equal(state.asked, 1);
  });

  it("are misses while Redis is away", async () => {
    const { answers, state } = setUp();
    state.isUp = false;
    const [answer] = fc.sample(anyAnswer, 1);
    assert(answer !== undefined);
    answers.set("key", answer, 1000);
    assert.equal(await answers.get("key"), null);
    assert.deepEqual(await answers.getMany(["key", "other"]), [null, null]);
  });

  it("are not kept beyond 1 MiB", async () => {
    const { answers, values } = setUp();
    const head = { storedAt: 0, contentType: "", cacheControl: null, model: "" };
    answers.set("large", { ...head, body: new Uint8Array(1024 * 1024 + 1) }, 1000);
    answers.set("small", { ...head, body: new Uint8Array(1024 * 1024) }, 1000);
    assert.deepEqual([...values.keys()], ["p:answer:small"]);
  });

  it("are misses where somebody has changed or cut them", async () => {
    await fc.assert(
      fc.asyncProperty(anyAnswer, fc.nat(), fc.uint8Array(), async (answer, at, other) => {
        const { answers, values } = setUp();
        answers.set("key", answer, 1000);
        const whole = values.get("p:answer:key") ?? Buffer.alloc(0);
        values.set("p:answer:key", whole.subarray(0, at % whole.length));
        assert.equal(await answers.get("key"), null);
        values.set("p:answer:key", Buffer.concat([whole, Buffer.from("x")]));
        assert.equal(await answers.get("key"), null);
        values.set("p:answer:key", Buffer.from([2, ...whole.subarray(1)]));
        assert.equal(await answers.get("key"), null);
        values.set("p:answer:key", Buffer.from(other));
        assert.equal(await answers.get("key"), null);
      }),
    );
  });
});
