/** How long an answer takes to begin: learned, and less and less believed. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  beginsIn,
  createPace,
  FIRST_PACE,
  learnPace,
  measuredPace,
  median,
  NO_PACE,
  type Pace,
} from "../../src/core/pace.ts";

function near(actual: number | null, expected: number, share = 0.01): void {
  assert(actual !== null && Math.abs(actual - expected) <= share * expected, `${actual}`);
}

/** @param answers tokens and milliseconds. */
function learned(answers: readonly (readonly [number, number])[], at = 0): Pace {
  const pace = createPace();
  for (const [tokens, ttftMs] of answers) learnPace(pace, tokens, ttftMs, at);
  return pace;
}

describe("pace", () => {
  it("is what is guessed before anything has been measured", () => {
    const pace = createPace();
    assert.deepEqual(measuredPace(pace), { baseMs: null, perTokenMs: null });
    assert.equal(beginsIn(pace, 4000, FIRST_PACE, 1000), 4000);
    assert.equal(beginsIn(pace, 4000, NO_PACE, 1000), 0);
    assert.equal(beginsIn(pace, 100, { baseMs: 70, perTokenMs: 0.5 }, 1000), 120);
  });

  it("learns from short prompts what all take, from long ones what each token adds", () => {
    const pace = learned([
      [20, 200],
      [4000, 200 + 4000 * 0.5],
    ]);
    assert.deepEqual(measuredPace(pace), { baseMs: 200, perTokenMs: 0.5 });
    assert.equal(beginsIn(pace, 2000, FIRST_PACE, 0), 1200);
    assert.equal(beginsIn(pace, 0, FIRST_PACE, 0), 200);
  });

  it("takes the one without the other: a guess stands for what is missing", () => {
    const short = learned([[20, 200]]);
    assert.equal(beginsIn(short, 1000, FIRST_PACE, 0), 200 + 1000);
    assert.equal(beginsIn(short, 1000, NO_PACE, 0), 200);
    const long = learned([[2000, 3000]]);
    assert.equal(beginsIn(long, 1000, NO_PACE, 0), 1500);
  });

  it("never says that a token takes less than nothing", () => {
    const pace = learned([
      [20, 5000],
      [1000, 100],
    ]);
    assert.equal(measuredPace(pace).perTokenMs, 0);
  });

  it("follows an engine that becomes slower, the longer the prompts the sooner", () => {
    const pace = learned([[16_384, 8192]]);
    near(measuredPace(pace).perTokenMs, 0.5);
    learnPace(pace, 16_384, 16_384 * 2, 0);
    // The old half as much as the new.
    near(measuredPace(pace).perTokenMs, (0.5 * 0.5 + 2) / 1.5);
    for (let each = 0; each < 10; each++) learnPace(pace, 16_384, 16_384 * 2, 0);
    near(measuredPace(pace).perTokenMs, 2);
    const base = learned([[10, 100]]);
    for (let each = 0; each < 20; each++) learnPace(base, 10, 600, 0);
    near(measuredPace(base).baseMs, 600, 0.02);
  });

  it("goes back to what is guessed where nothing is measured any more: half of the way a minute", () => {
    const pace = learned(
      [
        [10, 1000],
        [1000, 1000 + 8000],
      ],
      5000,
    );
    const peers = { baseMs: 200, perTokenMs: 2 };
    assert.equal(beginsIn(pace, 100, peers, 5000), 1000 + 800);
    assert.equal(beginsIn(pace, 100, peers, 65_000), 600 + 500);
    near(beginsIn(pace, 100, peers, 5000 + 1_200_000), 400);
    learnPace(pace, 10, 1000, 1_300_000);
    assert.equal(beginsIn(pace, 0, peers, 1_300_000), 1000, "news counts in full");
  });

  it("is finite, at least 0, and never falls with the length of the prompt", () => {
    const answers = fc.array(
      fc.tuple(fc.nat({ max: 100_000 }), fc.double({ min: 0, max: 1e6, noNaN: true })),
    );
    const sizes = fc.tuple(fc.nat({ max: 1_000_000 }), fc.nat({ max: 1_000_000 }));
    fc.assert(
      fc.property(answers, sizes, fc.nat({ max: 10_000_000 }), (all, [one, other], now) => {
        const pace = learned(all);
        for (const guess of [FIRST_PACE, NO_PACE]) {
          const [low, high] = [Math.min(one, other), Math.max(one, other)];
          const less = beginsIn(pace, low, guess, now);
          const more = beginsIn(pace, high, guess, now);
          assert(Number.isFinite(more) && less >= 0 && more >= less);
        }
      }),
    );
  });
});

describe("median", () => {
  it("is the middle one, of two the mean, of none nothing", () => {
    assert.equal(median([]), null);
    assert.equal(median([4]), 4);
    assert.equal(median([9, 1]), 5);
    assert.equal(median([9, 1, 2]), 2);
    assert.equal(median([4, 1, 100, 2]), 3);
  });
});
