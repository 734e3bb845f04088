/** Where a request goes: tiers of health, room, load, weight; and trials where all is broken. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { select, type Candidate, type Credit } from "../../src/core/select.ts";
import type { Health } from "../../src/core/snapshot.ts";
import { aTarget } from "../support/snapshot.ts";

function candidate(backend: string, more: Partial<Omit<Candidate, "target">> = {}): Candidate {
  return {
    target: aTarget(backend, "m", { slots: 4 }),
    health: "healthy",
    free: true,
    load: 0,
    weight: 1,
    failedAt: null,
    ...more,
  };
}

const pick = (candidates: readonly Candidate[], credit: Credit = new Map()) => {
  const selection = select(candidates, credit);
  return selection === null ? null : [selection.target.backend, selection.reason];
};

describe("select", () => {
  it("takes the only one, and nobody when there is nobody", () => {
    assert.deepEqual(pick([candidate("a", { load: 99, free: false })]), ["a", "only"]);
    assert.equal(pick([]), null);
  });

  it("goes to the healthy, then the degraded, then the unknown, however busy they are", () => {
    const healths: Health[] = ["unhealthy", "unknown", "degraded", "healthy"];
    const tiers = healths.map((health) =>
      candidate(health, { health, free: health === "unhealthy", load: healths.indexOf(health) }),
    );
    assert.deepEqual(pick(tiers), ["healthy", "only"]);
    assert.deepEqual(pick(tiers.slice(0, 3)), ["degraded", "only"]);
    assert.deepEqual(pick(tiers.slice(0, 2)), ["unknown", "only"]);
  });

  it("prefers one that starts at once to one with less load per weight", () => {
    const full = candidate("full", { free: false, load: 1, weight: 100 });
    const free = candidate("free", { load: 3 });
    assert.deepEqual(pick([full, free]), ["free", "least_busy"]);
  });

  it("chooses the least load per weight", () => {
    const small = candidate("small", { load: 1, weight: 1 });
    const big = candidate("big", { load: 3, weight: 4 });
    assert.deepEqual(pick([small, big]), ["big", "least_busy"]);
    const fuller = candidate("big", { load: 5, weight: 4 });
    assert.deepEqual(pick([small, fuller]), ["small", "least_busy"]);
  });

  it("compares those that are full by the same measure when none is free", () => {
    const long = candidate("long", { free: false, load: 9 });
    const short = candidate("short", { free: false, load: 4 });
    assert.deepEqual(pick([long, short]), ["short", "least_busy"]);
  });

  it("lets weights decide among equals, evenly spread and not in bursts", () => {
    const credit: Credit = new Map();
    const three = [
      candidate("a", { weight: 5 }),
      candidate("b", { weight: 1 }),
      candidate("c", { weight: 1 }),
    ];
    const order = Array.from({ length: 7 }, () => pick(three, credit)?.[0]).join("");
    // The order nginx documents for 5, 1, 1.
    assert.equal(order, "aabacaa");
    assert.deepEqual(pick(three, credit), ["a", "weight"]);
  });

  it("has a memory per credit: two models do not disturb each other", () => {
    const both = [candidate("a"), candidate("b")];
    const [one, other]: [Credit, Credit] = [new Map(), new Map()];
    assert.equal(pick(both, one)?.[0], "a");
    assert.equal(pick(both, other)?.[0], "a");
    assert.equal(pick(both, one)?.[0], "b");
  });

  it("does not touch the credit where load or health has decided", () => {
    const credit: Credit = new Map();
    pick([candidate("a", { load: 1 }), candidate("b")], credit);
    pick([candidate("a", { health: "degraded" }), candidate("b")], credit);
    pick([candidate("a", { health: "unhealthy" })], credit);
    assert.deepEqual(
      [...credit.values()].filter((each) => each !== 0),
      [],
    );
  });

  it("spreads idle picks exactly by weight over each round, and within one at any time", () => {
    const weights = fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 2, maxLength: 6 });
    fc.assert(
      fc.property(weights, fc.nat({ max: 60 }), (each, extra) => {
        const all = each.map((weight, at) => candidate(`b${at}`, { weight }));
        const total = each.reduce((sum, weight) => sum + weight, 0);
        const credit: Credit = new Map();
        const counts = new Map<string, number>();
        const rounds = 4;
        for (let n = 1; n <= rounds * total + extra; n++) {
          const chosen = String(pick(all, credit)?.[0]);
          counts.set(chosen, (counts.get(chosen) ?? 0) + 1);
          for (const { target, weight } of all) {
            const count = counts.get(target.backend) ?? 0;
            const fair = (n * weight) / total;
            assert(Math.abs(count - fair) < all.length, `${target.backend}: ${count} for ${fair}`);
            if (n % total === 0) assert.equal(count, fair, `after ${n} picks`);
          }
        }
      }),
    );
  });

  it("spreads by weight as well when the weights are no whole numbers", () => {
    const two = [candidate("a", { weight: 0.5 }), candidate("b", { weight: 1.5 })];
    const credit: Credit = new Map();
    const picks = Array.from({ length: 400 }, () => pick(two, credit)?.[0]);
    assert.equal(picks.filter((each) => each === "a").length, 100);
  });

  it("settles by weight under load too: the running requests divide like the weights", () => {
    const two = [candidate("a", { weight: 1 }), candidate("b", { weight: 3 })];
    const credit: Credit = new Map();
    for (let n = 0; n < 40; n++) {
      const chosen = pick(two, credit)?.[0];
      for (const each of two) if (each.target.backend === chosen) each.load++;
    }
    assert.deepEqual(
      two.map((each) => each.load),
      [10, 30],
    );
  });

  it("always chooses out of the best tier that is there, and only null without a target to use", () => {
    const rank: Record<Health, number> = { healthy: 0, degraded: 1, unknown: 2, unhealthy: 3 };
    const one = fc.record({
      health: fc.constantFrom<Health>("healthy", "degraded", "unknown", "unhealthy"),
      free: fc.boolean(),
      load: fc.nat({ max: 5 }),
      weight: fc.integer({ min: 1, max: 4 }),
      failedAt: fc.option(fc.nat({ max: 100 })),
    });
    fc.assert(
      fc.property(fc.array(one, { maxLength: 6 }), (each) => {
        const all = each.map((more, at) => candidate(`b${at}`, more));
        const selection = select(all, new Map());
        const best = Math.min(...all.map(({ health }) => rank[health]));
        if (selection === null) {
          const isTrialRunning = best === 3 && all.some(({ load }) => load > 0);
          assert(all.length === 0 || isTrialRunning);
          return;
        }
        const chosen = all.find(({ target }) => target === selection.target);
        assert(chosen !== undefined && rank[chosen.health] === best);
        const rivals = all.filter(({ health }) => rank[health] === best);
        if (best === 3) return;
        assert(chosen.free || rivals.every(({ free }) => !free), "a free one was passed over");
        for (const rival of rivals.filter(({ free }) => free === chosen.free)) {
          assert(chosen.load / chosen.weight <= rival.load / rival.weight);
        }
      }),
      { numRuns: 300 },
    );
  });
});

describe("trials", () => {
  const broken = (backend: string, failedAt: number | null, load = 0) =>
    candidate(backend, { health: "unhealthy", failedAt, load });

  it("go to the least recently failed", () => {
    assert.deepEqual(pick([broken("a", 30), broken("b", 10), broken("c", 20)]), ["b", "trial"]);
  });

  it("go to one that never failed first", () => {
    assert.deepEqual(pick([broken("a", 10), broken("b", null)]), ["b", "trial"]);
  });

  it("are one at a time: while one is in flight, anywhere, nobody else goes", () => {
    assert.equal(pick([broken("a", 10, 1), broken("b", 20)]), null);
    assert.equal(pick([broken("a", 10), broken("b", 20, 1)]), null);
    assert.deepEqual(pick([broken("a", 10), broken("b", 20)]), ["a", "trial"]);
  });

  it("rotate: each failure puts that backend last", () => {
    const all = [broken("a", 1), broken("b", 2), broken("c", 3)];
    const order = Array.from({ length: 6 }, (_, at) => {
      const chosen = pick(all)?.[0];
      for (const each of all) if (each.target.backend === chosen) each.failedAt = 10 + at;
      return chosen;
    });
    assert.equal(order.join(""), "abcabc");
  });

  it("are not needed while a backend of unknown health is there", () => {
    const fresh = candidate("b", { health: "unknown", load: 3 });
    assert.deepEqual(pick([broken("a", null), fresh]), ["b", "only"]);
  });
});
