/** The breakers of one backend: one for all of it, one for each model there. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import type { BreakerSettings, BreakerState } from "../../src/core/breaker.ts";
import { judge, SUCCESS, type Fault, type Verdict } from "../../src/core/outcome.ts";
import { Guard, type Passage } from "../../src/fleet/guard.ts";

const settings: BreakerSettings = {
  failureThreshold: 2,
  resetTimeoutMs: 1000,
  halfOpenRequests: 1,
};

/** One request from beginning to end: which breakers opened by it. */
function one(guard: Guard, model: string, verdict: Verdict, now = 0) {
  return guard.settle(guard.begin(model), verdict, settings, now, 0);
}

function states(guard: Guard, ...models: string[]): BreakerState[] {
  return [guard.backend.state, ...models.map((each) => guard.models.get(each)?.state ?? "closed")];
}

/** Its backend's breaker is open until 1000, or that of model x. */
function opened(what: "backend" | "x"): Guard {
  const guard = new Guard();
  const verdict = judge(what === "backend" ? "unreachable" : "server_error");
  for (let each = 0; each < 2; each++) one(guard, "x", verdict);
  assert.deepEqual(
    states(guard, "x"),
    what === "backend" ? ["open", "closed"] : ["closed", "open"],
  );
  return guard;
}

describe("a guard", () => {
  it("lets everybody through where nothing is known", () => {
    const guard = new Guard();
    assert.equal(guard.admits("x", settings, 0), "any");
    assert.equal(guard.untilAt("x"), null);
  });

  it("of a backend that is not reached closes it for all models, known or not", () => {
    const guard = opened("backend");
    for (const model of ["x", "y"]) {
      assert.equal(guard.admits(model, settings, 999), null);
      assert.equal(guard.admits(model, settings, 1000), "trial");
      assert.equal(guard.untilAt(model), 1000);
    }
  });

  it("of a model that fails leaves the others alone", () => {
    const guard = opened("x");
    assert.equal(guard.admits("x", settings, 999), null);
    assert.equal(guard.admits("x", settings, 1000), "trial");
    assert.equal(guard.admits("y", settings, 999), "any");
    assert.deepEqual([guard.untilAt("x"), guard.untilAt("y")], [1000, null]);
  });

  it("adds up the failures of all models where they are the backend's", () => {
    const guard = new Guard();
    one(guard, "x", judge("unreachable"));
    assert.deepEqual(one(guard, "y", judge("incomplete")), { backend: true, model: false });
    assert.deepEqual(states(guard, "x", "y"), ["open", "closed", "closed"]);
  });

  it("adds up the failures of each model on its own, and takes each as a sign of life", () => {
    const guard = new Guard();
    one(guard, "x", judge("unreachable"));
    assert.deepEqual(one(guard, "x", judge("server_error")), { backend: false, model: false });
    assert.deepEqual(one(guard, "y", judge("error_in_answer")), { backend: false, model: false });
    assert.equal(guard.backend.failures, 0, "whoever answers 500 is there");
    assert.deepEqual(one(guard, "y", judge("timeout")), { backend: false, model: true });
    assert.deepEqual(states(guard, "x", "y"), ["closed", "closed", "open"]);
  });

  it("learns nothing from silence about the backend, and nothing at all from what is neutral", () => {
    const guard = opened("backend");
    const trial = guard.begin("x");
    guard.settle(trial, judge("timeout"), settings, 1000, 0);
    assert.deepEqual(states(guard, "x"), ["half_open", "closed"]);
    for (const fault of ["busy", "rejected", "misconfigured", "unsupported", "ended"] as const) {
      assert.deepEqual(one(guard, "x", judge(fault), 1000), { backend: false, model: false });
      assert.deepEqual(states(guard, "x"), ["half_open", "closed"], fault);
      assert.equal(guard.admits("x", settings, 1000), "trial", `${fault} gives its place back`);
    }
  });

  it("says which has opened by a verdict, once", () => {
    const guard = new Guard();
    const early = [1, 2, 3].map(() => guard.begin("x"));
    const said = early.map((each) => guard.settle(each, judge("unreachable"), settings, 0, 0));
    assert.deepEqual(
      said.map(({ backend }) => backend),
      [false, true, false],
    );
    assert.deepEqual(one(guard, "x", judge("unreachable"), 5), { backend: true, model: false });
  });

  it("wants a trial where either breaker does, and lets nobody through where either does not", () => {
    const guard = opened("x");
    for (let each = 0; each < 2; each++) one(guard, "y", judge("unreachable"), 500);
    assert.deepEqual(states(guard, "x", "y"), ["open", "open", "closed"]);
    assert.equal(guard.untilAt("x"), 1500, "the later of the two");
    assert.equal(guard.admits("x", settings, 1000), null);
    assert.equal(guard.admits("x", settings, 1500), "trial");
    const trial = guard.begin("y");
    assert.deepEqual(states(guard, "x", "y"), ["half_open", "open", "closed"]);
    assert.equal(guard.admits("x", settings, 1500), null);
    guard.settle(trial, SUCCESS, settings, 1500, 0);
    assert.deepEqual(states(guard, "x", "y"), ["closed", "open", "closed"]);
    assert.equal(guard.admits("x", settings, 1500), "trial", "x has still to show that it works");
  });

  it("closes what was in doubt when an answer begins: on probation", () => {
    for (const what of ["backend", "x"] as const) {
      const guard = opened(what);
      const trial = guard.begin("x");
      assert.equal(guard.admits("x", settings, 1000), null);
      guard.prove(trial, settings);
      assert.equal(guard.admits("x", settings, 1000), "any");
      const verdict = judge(what === "backend" ? "incomplete" : "error_in_answer");
      const said = guard.settle(trial, verdict, settings, 1000, 0);
      assert.deepEqual(said, { backend: what === "backend", model: what === "x" });
      assert.equal(guard.untilAt("x"), 3000, "twice as long");
    }
  });

  it("tries all again at once when a probe succeeds", () => {
    const guard = opened("x");
    for (let each = 0; each < 2; each++) one(guard, "y", judge("unreachable"), 0);
    guard.retryNow(10);
    for (const model of ["x", "y"]) assert.equal(guard.admits(model, settings, 10), "trial");
  });

  it("never holds more trials than allowed, and gets all of them back", () => {
    const faults: Fault[] = ["unreachable", "server_error", "timeout", "busy", "ended"];
    const verdicts = [SUCCESS, ...faults.map((each) => judge(each))];
    const happening = fc.record({
      type: fc.constantFrom("begin", "begin", "prove", "settle", "settle", "probe", "wait"),
      model: fc.constantFrom("x", "y"),
      pick: fc.nat(20),
      verdict: fc.constantFrom(...verdicts),
      ms: fc.nat(3000),
    });
    const anySettings = fc.record({
      failureThreshold: fc.integer({ min: 1, max: 3 }),
      resetTimeoutMs: fc.nat(2000),
      halfOpenRequests: fc.integer({ min: 1, max: 3 }),
    });
    fc.assert(
      fc.property(anySettings, fc.array(happening, { maxLength: 100 }), (own, happenings) => {
        const guard = new Guard();
        let running: Passage[] = [];
        let now = 0;
        for (const { type, model, pick, verdict, ms } of happenings) {
          const chosen = running[pick % Math.max(1, running.length)];
          if (type === "wait") now += ms;
          if (type === "probe") guard.retryNow(now);
          if (type === "begin" && guard.admits(model, own, now) !== null) {
            running.push(guard.begin(model));
          }
          if (type === "prove" && chosen !== undefined) guard.prove(chosen, own);
          if (type === "settle" && chosen !== undefined) {
            running = running.filter((each) => each !== chosen);
            guard.settle(chosen, verdict, own, now, 0.5);
          }
          const all = [guard.backend, ...guard.models.values()];
          for (const { trials } of all) assert(trials >= 0 && trials <= own.halfOpenRequests);
        }
        for (const each of running) guard.settle(each, judge("ended"), own, now, 0);
        for (const { trials } of [guard.backend, ...guard.models.values()]) assert.equal(trials, 0);
        now += 100_000;
        for (const model of ["x", "y"]) {
          assert.notEqual(guard.admits(model, own, now), null);
          guard.settle(guard.begin(model), SUCCESS, own, now, 0);
          assert.equal(guard.admits(model, own, now), "any");
        }
      }),
      { numRuns: 1000 },
    );
  });
});
