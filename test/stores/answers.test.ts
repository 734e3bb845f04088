/** The cache in memory: bounded in items and bytes whatever happens, and the oldest goes first. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { Answers, type Answer } from "../../src/stores/answers.ts";

function answer(bytes: number, storedAt = 0): Answer {
  return {
    storedAt,
    contentType: "application/json",
    cacheControl: null,
    body: new Uint8Array(bytes),
    model: "m",
  };
}

describe("answers", () => {
  it("are given again until they are too old", () => {
    const answers = new Answers({ maxItems: 10, maxBytes: 1000, ttlMs: 100 });
    const stored = answer(10);
    answers.set("key", stored, 0);
    assert.deepEqual(answers.get("key", 99), stored);
    assert.equal(answers.get("other", 99), null);
    assert.equal(answers.bytes, 13);
    assert.equal(answers.get("key", 100), null);
    assert.deepEqual([answers.entries, answers.bytes], [0, 0]);
  });

  it("are not kept where one takes more than an eighth, nor where it is old already", () => {
    const answers = new Answers({ maxItems: 10, maxBytes: 800, ttlMs: 100 });
    answers.set("large", answer(96), 0);
    answers.set("old", answer(1), 100);
    assert.equal(answers.entries, 0);
    answers.set("large", answer(95), 0);
    assert.equal(answers.bytes, 100);
    answers.set("large", answer(500), 0);
    assert.deepEqual([answers.entries, answers.bytes], [0, 0], "the new one is the answer now");
  });

  it("are copies, where the body is a piece of a larger buffer", () => {
    const answers = new Answers({ maxItems: 10, maxBytes: 8000, ttlMs: 100 });
    const whole = Buffer.alloc(100_000, "x");
    answers.set("key", { ...answer(0), body: whole.subarray(10, 20) }, 0);
    const { body } = answers.get("key", 0) ?? answer(0);
    assert.equal(Buffer.from(body).toString(), "xxxxxxxxxx");
    assert.equal(body.buffer.byteLength, 10);
  });

  it("go in the order in which they were used last", () => {
    const answers = new Answers({ maxItems: 3, maxBytes: 1000, ttlMs: 100 });
    for (const key of ["a", "b", "c"]) answers.set(key, answer(1), 0);
    answers.get("a", 0);
    answers.set("b", answer(2), 0);
    answers.set("d", answer(1), 0);
    const kept = ["a", "b", "c", "d"].filter((key) => answers.get(key, 0) !== null);
    assert.deepEqual(kept, ["a", "b", "d"]);
  });

  it("stay at a reload as far as they fit, the ones used last", () => {
    const answers = new Answers({ maxItems: 10, maxBytes: 1000, ttlMs: 100 });
    for (const key of "abcdefgh") answers.set(key, answer(9), 0);
    answers.configure({ maxItems: 20, maxBytes: 1000, ttlMs: 100 });
    assert.equal(answers.entries, 8);
    answers.configure({ maxItems: 5, maxBytes: 1000, ttlMs: 100 });
    assert.deepEqual([answers.entries, answers.bytes], [5, 50]);
    answers.configure({ maxItems: 5, maxBytes: 20, ttlMs: 100 });
    assert.deepEqual([answers.entries, answers.bytes], [2, 20]);
    assert.notEqual(answers.get("h", 0), null);
    assert.notEqual(answers.get("g", 0), null);
    answers.configure({ maxItems: 5, maxBytes: 20, ttlMs: 10 });
    assert.equal(answers.get("h", 10), null);
  });
});

describe("whatever is stored, used and reloaded", () => {
  type Event =
    | { type: "set"; key: string; bytes: number }
    | { type: "get"; key: string }
    | { type: "wait"; ms: number }
    | { type: "configure"; maxItems: number; maxBytes: number; ttlMs: number };
  const key = fc.integer({ min: 0, max: 30 }).map((index) => `key-${index}`);
  const bounds = {
    maxItems: fc.integer({ min: 1, max: 12 }),
    maxBytes: fc.integer({ min: 1, max: 2000 }),
    ttlMs: fc.integer({ min: 1, max: 1000 }),
  };
  const event: fc.Arbitrary<Event> = fc.oneof(
    {
      weight: 8,
      arbitrary: fc.record({ type: fc.constant("set" as const), key, bytes: fc.nat(200) }),
    },
    { weight: 8, arbitrary: fc.record({ type: fc.constant("get" as const), key }) },
    { weight: 2, arbitrary: fc.record({ type: fc.constant("wait" as const), ms: fc.nat(300) }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant("configure" as const), ...bounds }) },
  );

  it("the bounds hold, and what is there is what a plain list would have", () => {
    fc.assert(
      fc.property(fc.record(bounds), fc.array(event, { maxLength: 150 }), (first, events) => {
        let own = first;
        const answers = new Answers(first);
        /** In order of use. */
        let model: { key: string; size: number; storedAt: number }[] = [];
        let now = 0;
        const fit = (room: number, more: number) => {
          const size = () => model.reduce((sum, each) => sum + each.size, 0);
          while (model.length > own.maxItems - more || size() > own.maxBytes - room) model.shift();
        };
        for (const each of events) {
          if (each.type === "wait") now += each.ms;
          if (each.type === "configure") {
            own = each;
            answers.configure(each);
            fit(0, 0);
          }
          if (each.type === "set") {
            answers.set(each.key, answer(each.bytes, now), now);
            const size = each.key.length + each.bytes;
            model = model.filter((other) => other.key !== each.key);
            if (size <= own.maxBytes / 8) {
              fit(size, 1);
              model.push({ key: each.key, size, storedAt: now });
            }
          }
          if (each.type === "get") {
            const expected = model.find((other) => other.key === each.key);
            model = model.filter((other) => other !== expected);
            const isThere = expected !== undefined && now - expected.storedAt < own.ttlMs;
            if (isThere) model.push(expected);
            assert.equal(answers.get(each.key, now) !== null, isThere);
          }
          const size = model.reduce((sum, { size: bytes }) => sum + bytes, 0);
          assert.deepEqual([answers.entries, answers.bytes], [model.length, size]);
          assert(answers.entries <= own.maxItems && answers.bytes <= own.maxBytes);
        }
      }),
      { numRuns: 1000 },
    );
  });
});
