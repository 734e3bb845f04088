/** Which models have come up, and are to be asked for once. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import type { Backend, Snapshot } from "../../src/core/snapshot.ts";
import { comingUp } from "../../src/core/warm.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";

/** Backends a and b with model m; a has n as well. */
function fleet(a: Partial<Backend> = {}, b: Partial<Backend> = {}): Snapshot {
  return aSnapshot(
    [aBackend("a", a), aBackend("b", b)],
    [aModel("m", [aTarget("a", "m"), aTarget("b", "m")]), aModel("n", [aTarget("a", "n")])],
  );
}

/** What comes up from one snapshot to the next, as `backend model`. */
function follow(...snapshots: Snapshot[]): string[][] {
  let before: ReadonlySet<string> = new Set();
  return snapshots.map((snapshot) => {
    const { up, arrived } = comingUp(snapshot, ["m", "elsewhere"], before);
    before = up;
    return arrived.map(({ backend, model }) => `${backend} ${model}`);
  });
}

describe("comingUp", () => {
  it("names each healthy backend with the model once", () => {
    assert.deepEqual(follow(fleet(), fleet(), fleet()), [["a m", "b m"], [], []]);
  });

  it("waits for a backend that is away, or is not known yet", () => {
    for (const health of ["unknown", "degraded", "unhealthy"] as const) {
      const away = fleet({ health });
      assert.deepEqual(follow(away, away, fleet(), fleet()), [["b m"], [], ["a m"], []], health);
    }
  });

  it("names one again that was away", () => {
    assert.deepEqual(follow(fleet(), fleet({}, { health: "degraded" }), fleet()), [
      ["a m", "b m"],
      [],
      ["b m"],
    ]);
  });

  it("takes one that is drained for away", () => {
    assert.deepEqual(follow(fleet({ drained: true }), fleet()), [["b m"], ["a m"]]);
  });

  it("names a model that its backend did not have before", () => {
    const without = aSnapshot([aBackend("a")], [aModel("n", [aTarget("a", "n")])]);
    const withIt = aSnapshot([aBackend("a")], [aModel("m", [aTarget("a", "m")])]);
    assert.deepEqual(follow(without, withIt, without, withIt), [[], ["a m"], [], ["a m"]]);
  });

  it("does not ask what is loaded: who puts a model out does not want it back at once", () => {
    const cold = aSnapshot(
      [aBackend("a")],
      [aModel("m", [aTarget("a", "m", { residency: "cold" })])],
    );
    const loaded = aSnapshot([aBackend("a")], [aModel("m", [aTarget("a", "m")])]);
    assert.deepEqual(follow(cold, loaded, cold), [["a m"], [], []]);
  });
});
