/** Where a prompt fits, and when it fits nowhere beyond doubt (issue: above 1.5 × of the largest). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { contextFor } from "../../src/core/context.ts";

const places = (...lengths: (number | null)[]) =>
  lengths.map((contextLength, id) => ({ id, contextLength }));

function ids(lengths: (number | null)[], prompt: number, output = 0): number[] {
  return contextFor(places(...lengths), prompt, output).preferred.map(({ id }) => id);
}

describe("what is preferred", () => {
  it("is wherever prompt and answer have room, in their order", () => {
    assert.deepEqual(ids([4096, 8192, 2048], 2000), [0, 1, 2]);
    assert.deepEqual(ids([4096, 8192, 2048], 2000, 2096), [0, 1]);
    assert.deepEqual(ids([4096, 8192, 2048], 2000, 2097), [1]);
  });

  it("is what has the most room, where none has enough", () => {
    assert.deepEqual(ids([4096, 8192, 8192, 2048], 8000, 4000), [1, 2]);
  });

  it("is all of whom nothing is known", () => {
    assert.deepEqual(ids([null, 2048, null], 1e9), [0, 2]);
    assert.deepEqual(ids([null, 2048], 2000), [0, 1]);
  });
});

describe("a prompt is too long", () => {
  const exceeded = (lengths: (number | null)[], prompt: number, output = 0) =>
    contextFor(places(...lengths), prompt, output).exceeded;

  it("above one and a half times the largest context, and not at it", () => {
    assert.equal(exceeded([1000, 4000], 6000), null);
    assert.equal(exceeded([1000, 4000], 6001), 4000);
    assert.equal(exceeded([1000, 4000], 1501), null, "the larger one may hold it");
  });

  it("for no answer, however long", () => assert.equal(exceeded([4000], 6000, 1e9), null));

  it("for nobody of whom nothing is known", () => {
    assert.equal(exceeded([1000, null], 1e9), null);
    assert.equal(exceeded([], 1e9), null);
  });
});

it("somebody is preferred wherever there is anybody, and never one with less room than another", () => {
  const length = fc.option(fc.integer({ min: 1, max: 10_000 }));
  const tokens = fc.integer({ min: 0, max: 20_000 });
  fc.assert(
    fc.property(fc.array(length, { maxLength: 5 }), tokens, tokens, (lengths, prompt, output) => {
      const all = places(...lengths);
      const { preferred, exceeded } = contextFor(all, prompt, output);
      assert.equal(preferred.length > 0, all.length > 0);
      const roomOf = (each: { contextLength: number | null }) => each.contextLength ?? Infinity;
      const least = Math.min(...preferred.map(roomOf));
      for (const each of all) assert(preferred.includes(each) || roomOf(each) < least);
      if (exceeded !== null) assert(lengths.every((each) => each !== null && each * 1.5 < prompt));
    }),
  );
});
