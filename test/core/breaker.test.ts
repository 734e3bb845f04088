/** The circuit breaker: failures in a row open it, a trial closes it, nothing else changes anything. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  admits,
  begin,
  createBreaker,
  prove,
  retryNow,
  settle,
  type Breaker,
  type BreakerSettings,
  type Pass,
} from "../../src/core/breaker.ts";
import type { Outcome } from "../../src/core/outcome.ts";

const settings: BreakerSettings = {
  failureThreshold: 3,
  resetTimeoutMs: 1000,
  halfOpenRequests: 1,
};

/** One request from beginning to end. */
function one(breaker: Breaker, outcome: Outcome, now = 0, random = 0): void {
  settle(breaker, begin(breaker), outcome, settings, now, random);
}

function opened(): Breaker {
  const breaker = createBreaker();
  for (let at = 0; at < 3; at++) one(breaker, "failure");
  assert.equal(breaker.state, "open");
  return breaker;
}

describe("closed", () => {
  it("opens after as many failures in a row as it is told, not before", () => {
    const breaker = createBreaker();
    for (const expected of ["closed", "closed", "open"]) {
      one(breaker, "failure");
      assert.equal(breaker.state, expected);
    }
    assert.equal(admits(breaker, settings, 999), null);
    assert.equal(admits(breaker, settings, 1000), "trial");
  });

  it("forgets failures at a success, and nothing at neutral outcomes", () => {
    const breaker = createBreaker();
    for (const outcome of ["failure", "failure", "ignore", "saturated"] as const)
      one(breaker, outcome);
    assert.deepEqual([breaker.state, breaker.failures], ["closed", 2]);
    one(breaker, "success");
    one(breaker, "failure");
    assert.deepEqual([breaker.state, breaker.failures], ["closed", 1]);
  });

  it("never opens by a rate: every other request may fail for ever", () => {
    const breaker = createBreaker();
    for (let at = 0; at < 1000; at++) one(breaker, at % 2 === 0 ? "failure" : "success");
    assert.equal(breaker.state, "closed");
  });
});

describe("open", () => {
  it("lasts longer each time, up to eight times as long, shortened by up to a fifth", () => {
    for (const [random, share] of [
      [0, 1],
      [0.999_999, 0.8],
    ] as const) {
      const breaker = createBreaker();
      const lasted: number[] = [];
      let now = 0;
      for (let at = 0; at < 3; at++) one(breaker, "failure", now, random);
      for (let at = 0; at < 6; at++) {
        lasted.push(Math.round(breaker.untilAt - now));
        now = breaker.untilAt;
        one(breaker, "failure", now, random);
      }
      assert.deepEqual(
        lasted,
        [1, 2, 4, 8, 8, 8].map((times) => times * 1000 * share),
      );
    }
  });

  it("ends at once when a probe succeeds that had failed", () => {
    const breaker = opened();
    retryNow(breaker, 10);
    assert.equal(admits(breaker, settings, 10), "trial");
  });

  it("lets a trial through before its time where the caller has nothing better", () => {
    const breaker = opened();
    const pass = begin(breaker);
    assert.deepEqual([pass.trial, breaker.state], [true, "half_open"]);
  });
});

describe("half-open", () => {
  it("admits as many trials as it is told", () => {
    const breaker = opened();
    const two = { ...settings, halfOpenRequests: 2 };
    begin(breaker);
    assert.equal(admits(breaker, two, 1000), "trial");
    begin(breaker);
    assert.equal(admits(breaker, two, 1000), null);
  });

  it("closes by a success and opens by a failure", () => {
    const good = opened();
    one(good, "success", 1000);
    assert.deepEqual([good.state, good.failures, good.opened], ["closed", 0, 0]);
    const bad = opened();
    one(bad, "failure", 1000);
    assert.deepEqual([bad.state, bad.untilAt], ["open", 3000]);
  });

  it("keeps its place for the next trial when one ends without a verdict", () => {
    const breaker = opened();
    for (let at = 0; at < 100; at++) one(breaker, at % 2 === 0 ? "ignore" : "saturated", 1000);
    assert.equal(breaker.state, "half_open");
    assert.equal(admits(breaker, settings, 1000), "trial");
  });

  it("closes on probation when the answer begins: the next failure opens it, for longer", () => {
    const breaker = opened();
    const pass = begin(breaker);
    prove(breaker, pass, settings);
    assert.deepEqual([breaker.state, admits(breaker, settings, 1000)], ["closed", "any"]);
    settle(breaker, pass, "failure", settings, 1000, 0);
    assert.deepEqual([breaker.state, breaker.untilAt], ["open", 3000]);
  });

  it("is as good as new when the answer that began is whole in the end", () => {
    const breaker = opened();
    const pass = begin(breaker);
    prove(breaker, pass, settings);
    settle(breaker, pass, "success", settings, 1000, 0);
    assert.deepEqual([breaker.state, breaker.failures, breaker.opened], ["closed", 0, 0]);
  });
});

describe("what began before a transition", () => {
  it("says nothing after it", () => {
    const breaker = createBreaker();
    const early = Array.from({ length: 10 }, () => begin(breaker));
    for (let at = 0; at < 3; at++) one(breaker, "failure");
    const { untilAt } = breaker;
    for (const pass of early) settle(breaker, pass, "failure", settings, 500, 0);
    assert.deepEqual([breaker.state, breaker.untilAt, breaker.failures], ["open", untilAt, 3]);
    const trial = begin(breaker);
    settle(breaker, trial, "success", settings, 1000, 0);
    for (const pass of early) settle(breaker, pass, "failure", settings, 1000, 0);
    assert.deepEqual([breaker.state, breaker.failures], ["closed", 0]);
  });
});

describe("in any order of events", () => {
  const outcomes: Outcome[] = ["success", "failure", "saturated", "ignore"];
  type Event =
    | { type: "begin"; forced: boolean }
    | { type: "prove" | "settle"; which: number; outcome: Outcome }
    | { type: "probe" }
    | { type: "wait"; ms: number };
  const which = fc.nat(20);
  const outcome = fc.constantFrom(...outcomes);
  const event: fc.Arbitrary<Event> = fc.oneof(
    fc.record({ type: fc.constant("begin" as const), forced: fc.boolean() }),
    fc.record({ type: fc.constantFrom("prove" as const, "settle" as const), which, outcome }),
    fc.record({ type: fc.constant("probe" as const) }),
    fc.record({ type: fc.constant("wait" as const), ms: fc.nat(5000) }),
  );
  const anySettings = fc.record({
    failureThreshold: fc.integer({ min: 1, max: 5 }),
    resetTimeoutMs: fc.nat(3000),
    halfOpenRequests: fc.integer({ min: 1, max: 3 }),
  });

  it("there are never more trials than allowed, none is lost, and neutral outcomes change no state", () => {
    fc.assert(
      fc.property(anySettings, fc.array(event, { maxLength: 200 }), (own, events) => {
        const breaker = createBreaker();
        const running: Pass[] = [];
        let now = 0;
        for (const each of events) {
          const before = breaker.state;
          if (each.type === "wait") now += each.ms;
          if (each.type === "probe") retryNow(breaker, now);
          if (each.type === "begin") {
            const allowed = admits(breaker, own, now);
            // Before its time only the fleet's one trial, which asks an open breaker.
            if (allowed !== null || (each.forced && before === "open"))
              running.push(begin(breaker));
          }
          if (each.type === "prove" || each.type === "settle") {
            const [pass] = running.splice(each.which % Math.max(1, running.length), 1);
            if (pass === undefined) continue;
            if (each.type === "prove") {
              prove(breaker, pass, own);
              running.push(pass);
            } else {
              settle(breaker, pass, each.outcome, own, now, 0.5);
              const isNeutral = each.outcome === "ignore" || each.outcome === "saturated";
              if (isNeutral) assert.equal(breaker.state, before);
            }
          }
          const live = running.filter(({ trial, epoch }) => trial && epoch === breaker.epoch);
          assert.equal(breaker.trials, live.length, "every trial is held by somebody");
          assert(breaker.trials <= own.halfOpenRequests);
          assert(breaker.state !== "closed" || breaker.failures < own.failureThreshold);
        }
        // Whatever has happened, one good trial is enough.
        for (const pass of running) settle(breaker, pass, "ignore", own, now, 0);
        now = Math.max(now, breaker.untilAt);
        assert.notEqual(admits(breaker, own, now), null);
        settle(breaker, begin(breaker), "success", own, now, 0);
        assert.equal(breaker.state, "closed");
      }),
      { numRuns: 2000 },
    );
  });
});
