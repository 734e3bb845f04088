/** What the answers of one backend have shown: percentiles, speed, the last error. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { Observed, type Answered } from "../../src/fleet/observed.ts";

function answered(more: Partial<Answered> = {}): Answered {
  const prompt = { promptTokens: 0, cachedTokens: null };
  return {
    at: 1,
    ttftMs: null,
    tokensPerSecond: null,
    error: null,
    tokens: null,
    ...prompt,
    ...more,
  };
}

function afterTtfts(ttfts: readonly number[]): Observed {
  const observed = new Observed();
  for (const ttftMs of ttfts) observed.add(answered({ ttftMs }));
  return observed;
}

describe("ttft", () => {
  it("is null before the first stream, however many answers there were", () => {
    const observed = new Observed();
    observed.add(answered());
    observed.add(answered({ tokensPerSecond: 3 }));
    assert.equal(observed.ttftMs(0.5), null);
  });

  it("is by nearest rank: one of those that were measured", () => {
    const observed = afterTtfts([15, 20, 35, 40, 50]);
    const shares = [0, 0.05, 0.3, 0.4, 0.5, 0.95, 1];
    assert.deepEqual(
      shares.map((share) => observed.ttftMs(share)),
      [15, 15, 20, 20, 35, 50, 50],
    );
    assert.equal(afterTtfts([100, 9]).ttftMs(1), 100, "by number, not by text");
  });

  it("is over the last 200, and no share of them exceeds its percentile", () => {
    const ttfts = fc.array(fc.integer({ min: 0, max: 1000 }), { minLength: 1, maxLength: 450 });
    fc.assert(
      fc.property(ttfts, fc.constantFrom(0.5, 0.95, 0.99, 1), (all, share) => {
        const observed = afterTtfts(all);
        const last = all.slice(-200).toSorted((a, b) => a - b);
        const value = observed.ttftMs(share) ?? -1;
        const within = last.filter((each) => each <= value).length;
        const below = last.filter((each) => each < value).length;
        assert(last.includes(value));
        assert(within >= share * last.length && below < share * last.length);
      }),
    );
  });
});

describe("speed", () => {
  it("begins with the first answer and follows the next by a fifth", () => {
    const observed = new Observed();
    assert.equal(observed.tokensPerSecond, null);
    observed.add(answered({ tokensPerSecond: 100 }));
    assert.equal(observed.tokensPerSecond, 100);
    observed.add(answered({ tokensPerSecond: 50 }));
    assert.equal(observed.tokensPerSecond, 90);
    observed.add(answered());
    assert.equal(observed.tokensPerSecond, 90, "an answer without one changes nothing");
  });
});

describe("the last error", () => {
  it("is none at first, and is remembered after a success", () => {
    const observed = new Observed();
    assert.equal(observed.lastError, null);
    observed.add(answered({ at: 5, error: "upstream_timeout" }));
    observed.add(answered({ at: 7, error: "rate_limit_exceeded" }));
    observed.add(answered({ at: 9 }));
    assert.deepEqual(observed.lastError, { at: 7, code: "rate_limit_exceeded" });
  });
});
