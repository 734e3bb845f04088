/** Where a request goes: tiers of health, room, load, weight; and trials where all is broken. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { select, type Candidate, type Credit } from "../../src/core/select.ts";
import type { Health } from "../../src/core/snapshot.ts";
import { aTarget } from "../support/snapshot.ts";

/** Without more words vacant where it is free, and its first token comes when it starts. */
function candidate(backend: string, more: Partial<Omit<Candidate, "target">> = {}): Candidate {
  const { free = true, startMs = free ? 0 : 1000 } = more;
  return {
    target: aTarget(backend, "m", { slots: 4 }),
    health: "healthy",
    startMs,
    firstTokenMs: startMs,
    cachedTokens: 0,
    free,
    vacant: free,
    resident: true,
    familiar: false,
    late: false,
    roomy: true,
    weight: 1,
    failedAt: null,
    open: false,
    trying: false,
    ...more,
  };
}

const pick = (candidates: readonly Candidate[], credit: Credit = new Map()) => {
  const selection = select(candidates, credit);
  return selection === null ? null : [selection.target.backend, selection.reason];
};

describe("select", () => {
  it("takes the only one, and nobody when there is nobody", () => {
    assert.deepEqual(pick([candidate("a", { startMs: 1e9, free: false })]), ["a", "only"]);
    assert.equal(pick([]), null);
  });

  it("goes to the healthy, then the degraded, then the unknown, however busy they are", () => {
    const healths: Health[] = ["unhealthy", "unknown", "degraded", "healthy"];
    const tiers = healths.map((health) =>
      candidate(health, { health, startMs: 10_000 * healths.indexOf(health) }),
    );
    assert.deepEqual(pick(tiers), ["healthy", "only"]);
    assert.deepEqual(pick(tiers.slice(0, 3)), ["degraded", "only"]);
    assert.deepEqual(pick(tiers.slice(0, 2)), ["unknown", "only"]);
  });

  it("goes where the first token comes first, not where it starts first", () => {
    const full = candidate("full", { free: false, startMs: 400, firstTokenMs: 500 });
    const slow = candidate("slow", { firstTokenMs: 3000 });
    assert.deepEqual(pick([slow, full]), ["full", "least_busy"]);
  });

  it("takes as equals what is within 50 ms or a tenth of the first, and of those who starts at once", () => {
    const best = candidate("best", { free: false, startMs: 40, firstTokenMs: 40 });
    assert.deepEqual(pick([best, candidate("free", { firstTokenMs: 90 })]), ["free", "least_busy"]);
    assert.deepEqual(pick([best, candidate("free", { firstTokenMs: 91 })]), ["best", "least_busy"]);
    const late = candidate("late", { free: false, startMs: 10_000, firstTokenMs: 10_000 });
    assert.equal(pick([late, candidate("free", { firstTokenMs: 11_000 })])?.[0], "free");
    assert.equal(pick([late, candidate("free", { firstTokenMs: 11_001 })])?.[0], "late");
  });

  it("leaves out who would start too late, unless all would", () => {
    const late = candidate("late", { free: false, startMs: 500, firstTokenMs: 600, late: true });
    const slow = candidate("slow", { firstTokenMs: 3000 });
    assert.equal(pick([late, slow])?.[0], "slow");
    assert.equal(pick([late, { ...slow, late: true }])?.[0], "late");
    assert.equal(
      pick([late, { ...slow, roomy: false }])?.[0],
      "late",
      "the prompt has to fit first",
    );
  });

  it("says that a prefix has decided, or what is loaded", () => {
    const knows = candidate("knows", { cachedTokens: 5000, firstTokenMs: 100 });
    assert.deepEqual(pick([knows, candidate("b", { firstTokenMs: 5000 })]), ["knows", "prefix"]);
    const cold = candidate("cold", { resident: false, free: false, startMs: 10_000 });
    assert.deepEqual(pick([cold, candidate("b")]), ["b", "resident"]);
  });

  it("goes back among equals to the one that knows the session, and only there", () => {
    const credit: Credit = new Map();
    const known = candidate("b", { familiar: true });
    for (let n = 0; n < 3; n++) assert.deepEqual(pick([candidate("a"), known], credit)?.[0], "b");
    const busy = candidate("b", { familiar: true, free: false });
    assert.deepEqual(pick([candidate("a"), busy]), ["a", "least_busy"]);
  });

  it("prefers the context that is large enough; where none is any may try", () => {
    const small = candidate("small", { roomy: false });
    const large = candidate("large", { free: false, startMs: 60_000 });
    assert.deepEqual(pick([small, large]), ["large", "only"]);
    assert.deepEqual(pick([small]), ["small", "only"]);
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
    pick([candidate("a", { firstTokenMs: 60 }), candidate("b")], credit);
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

  it("passes over those whose breaker is open, however healthy and idle they are", () => {
    const open = candidate("open", { open: true });
    const busy = candidate("busy", { free: false, startMs: 9000 });
    assert.deepEqual(pick([open, busy]), ["busy", "only"]);
    const poor = candidate("poor", { health: "unknown", free: false, startMs: 9000 });
    assert.deepEqual(pick([open, poor]), ["poor", "only"]);
    assert.deepEqual(pick([open, candidate("a", { firstTokenMs: 100 }), candidate("b")]), [
      "b",
      "least_busy",
    ]);
  });

  it("does not mind a trial that runs where another can be used", () => {
    const trying = candidate("trying", { open: true, trying: true });
    assert.deepEqual(pick([trying, candidate("a")]), ["a", "only"]);
    // Half-open, with room for a further trial: it is no worse than the others.
    const second = candidate("second", { trying: true });
    assert.deepEqual(pick([second]), ["second", "only"]);
  });

  it("never goes to a barred one", () => {
    const barred = candidate("barred", { barred: true });
    assert.deepEqual(pick([barred, candidate("a", { free: false })]), ["a", "only"]);
    assert.equal(pick([barred]), null);
    assert.equal(pick([candidate("barred", { barred: true, health: "unhealthy" })]), null);
  });

  it("chooses out of the best tier that is there; else one trial at a time, where it starts at once", () => {
    const rank: Record<Health, number> = { healthy: 0, degraded: 1, unknown: 2, unhealthy: 3 };
    const one = fc.record({
      health: fc.constantFrom<Health>("healthy", "degraded", "unknown", "unhealthy", "unhealthy"),
      free: fc.boolean(),
      firstTokenMs: fc.nat({ max: 300 }),
      weight: fc.integer({ min: 1, max: 4 }),
      failedAt: fc.option(fc.integer({ min: 1, max: 100 })),
      open: fc.boolean(),
      trying: fc.constantFrom(false, false, false, true),
      barred: fc.constantFrom(false, false, true),
    });
    const rankOf = ({ health, open, barred }: Candidate) => {
      if (barred) return 4;
      return open ? 3 : rank[health];
    };
    fc.assert(
      fc.property(fc.array(one, { maxLength: 6 }), (each) => {
        const all = each.map((more, at) => candidate(`b${at}`, more));
        const selection = select(all, new Map());
        const best = Math.min(4, ...all.map(rankOf));
        const chosen = all.find(({ target }) => target === selection?.target);
        if (best < 3) {
          assert(chosen !== undefined && rankOf(chosen) === best);
          assert.notEqual(selection?.reason, "trial");
          const rivals = all.filter((other) => rankOf(other) === best);
          const first = Math.min(...rivals.map(({ firstTokenMs }) => firstTokenMs));
          const latest = first + Math.max(50, first / 10);
          assert(chosen.firstTokenMs <= latest, "it is as good as the best");
          const better = rivals.filter(({ free, firstTokenMs }) => free && firstTokenMs <= latest);
          assert(chosen.free || better.length === 0, "a free one was passed over");
          return;
        }
        const able = all.filter((other) => rankOf(other) === 3 && other.vacant);
        const isTaken = all.some(({ trying }) => trying);
        assert.equal(selection === null, isTaken || able.length === 0);
        if (chosen === undefined) return;
        assert.equal(selection?.reason, "trial");
        assert(able.includes(chosen));
        const failedAt = chosen.failedAt ?? 0;
        for (const other of able) assert(failedAt <= (other.failedAt ?? 0), "failed more recently");
      }),
      { numRuns: 1000 },
    );
  });
});

describe("trials", () => {
  const broken = (backend: string, failedAt: number | null, trying = false) =>
    candidate(backend, { health: "unhealthy", failedAt, trying });
  const open = (backend: string, failedAt: number | null, trying = false) =>
    candidate(backend, { open: true, failedAt, trying });

  it("go to the least recently failed, be it unhealthy or open", () => {
    assert.deepEqual(pick([broken("a", 30), broken("b", 10), broken("c", 20)]), ["b", "trial"]);
    assert.deepEqual(pick([open("a", 30), open("b", 10), open("c", 20)]), ["b", "trial"]);
    assert.deepEqual(pick([broken("a", 30), open("b", 10)]), ["b", "trial"]);
    assert.deepEqual(pick([broken("a", 10), open("b", 30)]), ["a", "trial"]);
  });

  it("go to one that never failed first", () => {
    assert.deepEqual(pick([broken("a", 10), broken("b", null)]), ["b", "trial"]);
  });

  it("are one at a time: while one is in flight, anywhere, nobody else goes", () => {
    for (const kind of [broken, open]) {
      assert.equal(pick([kind("a", 10, true), broken("b", 20)]), null);
      assert.equal(pick([broken("a", 10), kind("b", 20, true)]), null);
      assert.equal(pick([open("a", 10), { ...kind("b", 20, true), barred: true }]), null);
      assert.deepEqual(pick([kind("a", 10), broken("b", 20)]), ["a", "trial"]);
    }
  });

  it("go only where they start at once: nobody waits for a backend that may be dead", () => {
    assert.equal(pick([{ ...open("a", 10), vacant: false }]), null);
    assert.deepEqual(pick([{ ...open("a", 10), vacant: false }, broken("b", 20)]), ["b", "trial"]);
  });

  it("rotate: each failure puts that backend last", () => {
    const all = [broken("a", 1), open("b", 2), broken("c", 3)];
    const order = Array.from({ length: 6 }, (_, at) => {
      const chosen = pick(all)?.[0];
      for (const each of all) if (each.target.backend === chosen) each.failedAt = 10 + at;
      return chosen;
    });
    assert.equal(order.join(""), "abcabc");
  });

  it("are not needed while a backend of unknown health is there", () => {
    const fresh = candidate("b", { health: "unknown" });
    assert.deepEqual(pick([broken("a", null), open("c", null), fresh]), ["b", "only"]);
  });
});
