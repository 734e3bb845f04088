/** How many second attempts may wait: a share of what came lately, and always a few. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { RetryBudget } from "../../src/core/retries.ts";

/** How many may wait now, one after the other. */
function takeAll(budget: RetryBudget, now: number): number {
  let taken = 0;
  while (taken < 10_000 && budget.take(now)) taken++;
  return taken;
}

function count(budget: RetryBudget, times: number, now: number): void {
  for (let each = 0; each < times; each++) budget.count(now);
}

describe("retries that may wait", () => {
  it("are never fewer than ten, though nothing has come", () => {
    for (const now of [0, 1, 999, 123_456_789.5]) {
      const budget = new RetryBudget();
      assert.equal(takeAll(budget, now), 10, `at ${now}`);
      assert.equal(budget.take(now), false);
    }
  });

  it("are a fifth of the requests of the last ten seconds where that is more", () => {
    const budget = new RetryBudget();
    count(budget, 500, 1000);
    assert.equal(takeAll(budget, 1000), 100);
    count(budget, 50, 5000);
    assert.equal(takeAll(budget, 5000), 10, "only those that came since are left");
    assert.equal(takeAll(budget, 9999), 0);
  });

  it("come back when what was counted is ten seconds old, step by step", () => {
    const budget = new RetryBudget();
    count(budget, 100, 0);
    assert.equal(takeAll(budget, 0), 20);
    count(budget, 100, 5000);
    assert.equal(takeAll(budget, 5000), 20);
    // The first hundred and its twenty leave together.
    assert.equal(takeAll(budget, 10_000), 0);
    assert.equal(takeAll(budget, 15_000), 10, "all is forgotten");
  });

  it("are forgotten whole after a long silence, however long", () => {
    for (const silence of [10_000, 10_001, 25_000, 86_400_000 * 365]) {
      const budget = new RetryBudget();
      count(budget, 1000, 7);
      takeAll(budget, 7);
      assert.equal(takeAll(budget, 7 + silence), 10, `after ${silence}`);
    }
  });

  it("that were refused do not count", () => {
    const budget = new RetryBudget();
    takeAll(budget, 0);
    for (let each = 0; each < 100; each++) assert.equal(budget.take(9000), false);
    assert.equal(takeAll(budget, 10_000), 10);
  });

  it("are as many as a list of all that happened allows, whatever happens when", () => {
    const happening = fc.record({
      type: fc.constantFrom("count" as const, "count" as const, "take" as const),
      times: fc.integer({ min: 1, max: 60 }),
      later: fc.oneof(fc.nat({ max: 1500 }), fc.nat({ max: 30_000 }), fc.constant(0)),
    });
    const start = fc.nat({ max: 1_000_000 });
    fc.assert(
      fc.property(start, fc.array(happening, { maxLength: 60 }), (startAt, happenings) => {
        const budget = new RetryBudget();
        const requests: number[] = [];
        const waits: number[] = [];
        let now = startAt;
        const step = (at: number) => Math.floor(at / 1000);
        const lately = (all: readonly number[]) =>
          all.filter((at) => step(at) > step(now) - 10).length;
        for (const { type, times, later } of happenings) {
          now += later;
          for (let each = 0; each < times; each++) {
            if (type === "count") {
              budget.count(now);
              requests.push(now);
              continue;
            }
            const may = lately(waits) < Math.max(10, 0.2 * lately(requests));
            assert.equal(budget.take(now), may);
            if (may) waits.push(now);
            assert(lately(waits) <= Math.max(10, Math.ceil(0.2 * requests.length)));
          }
        }
      }),
      { numRuns: 500 },
    );
  });
});
