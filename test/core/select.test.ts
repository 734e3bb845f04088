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

  it("passes over those whose breaker is open, however healthy and idle they are", () => {
    const open = candidate("open", { open: true });
    const busy = candidate("busy", { free: false, load: 9 });
    assert.deepEqual(pick([open, busy]), ["busy", "only"]);
    const poor = candidate("poor", { health: "unknown", free: false, load: 9 });
    assert.deepEqual(pick([open, poor]), ["poor", "only"]);
    assert.deepEqual(pick([open, candidate("a", { load: 1 }), candidate("b")]), [
      "b",
      "least_busy",
    ]);
  });

  it("does not mind a trial that runs where another can be used", () => {
    const trying = candidate("trying", { open: true, trying: true, load: 1 });
    assert.deepEqual(pick([trying, candidate("a")]), ["a", "only"]);
    // Half-open, with room for a further trial: it is no worse than the others.
    const second = candidate("second", { trying: true, load: 1 });
    assert.deepEqual(pick([second]), ["second", "only"]);
  });

  it("never goes to a barred one", () => {
    const barred = candidate("barred", { barred: true });
    assert.deepEqual(pick([barred, candidate("a", { free: false, load: 5 })]), ["a", "only"]);
    assert.equal(pick([barred]), null);
    assert.equal(pick([candidate("barred", { barred: true, health: "unhealthy" })]), null);
  });

  it("chooses out of the best tier that is there; else one trial at a time, where it starts at once", () => {
    const rank: Record<Health, number> = { healthy: 0, degraded: 1, unknown: 2, unhealthy: 3 };
    const one = fc.record({
      health: fc.constantFrom<Health>("healthy", "degraded", "unknown", "unhealthy", "unhealthy"),
      free: fc.boolean(),
      load: fc.nat({ max: 5 }),
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
          assert(chosen.free || rivals.every(({ free }) => !free), "a free one was passed over");
          for (const rival of rivals.filter(({ free }) => free === chosen.free)) {
            assert(chosen.load / chosen.weight <= rival.load / rival.weight);
          }
          return;
        }
        const able = all.filter((other) => rankOf(other) === 3 && other.free);
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

  it("are not held up by what else runs there: it began when all was well", () => {
    assert.deepEqual(pick([{ ...broken("a", 10), load: 3 }]), ["a", "trial"]);
  });

  it("go only where they start at once: nobody waits for a backend that may be dead", () => {
    assert.equal(pick([{ ...open("a", 10), free: false }]), null);
    assert.deepEqual(pick([{ ...open("a", 10), free: false }, broken("b", 20)]), ["b", "trial"]);
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
    const fresh = candidate("b", { health: "unknown", load: 3 });
    assert.deepEqual(pick([broken("a", null), open("c", null), fresh]), ["b", "only"]);
  });
});
