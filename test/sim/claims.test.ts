/** What the gateway's scheduler promises in front of an engine that swaps models. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { median } from "../../src/core/pace.ts";
import { play } from "./compare.ts";
import { direct, ours, type Box, type Machine } from "./machine.ts";
import { floodScenario, MEASURED_MIX, SCENARIOS, SMALL, type Scenario } from "./scenarios.ts";

const SEEDS = [1, 2, 3];

function scenarioOf(name: string): Scenario {
  return SCENARIOS[name] as Scenario;
}

function boxOf({ machine }: Scenario): Box {
  assert.equal(machine.type, "box");
  return (machine as Extract<Machine, { type: "box" }>).box;
}

/** An answer of the small models, and a load with the unloading of the one before; a decision of Ollama's. */
const SERVICE_MS = 170;
const LOAD_MS = SMALL.loadMs + SMALL.unloadMs + 20;

describe("the gateway before an Ollama", () => {
  it("costs nothing where all models are in memory", () => {
    const cold = scenarioOf("fits");
    const box = { ...boxOf(cold), preloaded: ["a", "b", "c"] };
    const warm: Scenario = { ...cold, machine: { ...cold.machine, type: "box", box } };
    for (const seed of SEEDS) {
      const before = play(warm, seed, direct).measured;
      const after = play(warm, seed, ours).measured;
      assert.equal(after.loads, 0);
      assert(after.servedPerHour >= 0.98 * before.servedPerHour, `throughput, seed ${seed}`);
      const [wait, least] = [after.wait.mean ?? Infinity, before.wait.mean ?? 0];
      assert(wait <= 1.05 * least, `waits ${wait} ms in the mean, direct ${least}, seed ${seed}`);
    }
  });

  it("loads each model once where all fit, though it has to find that out", () => {
    for (const seed of SEEDS) {
      const before = play(scenarioOf("fits"), seed, direct).measured;
      const after = play(scenarioOf("fits"), seed, ours).measured;
      assert.equal(after.waste.reloads, 0, `seed ${seed}`);
      assert(after.servedPerHour >= 0.98 * before.servedPerHour, `throughput, seed ${seed}`);
    }
  });

  it("serves a user of b beside a batch on a within turn, drain and load, at 0.89 of the throughput", () => {
    for (const seed of SEEDS) {
      const before = play(scenarioOf("beside"), seed, direct).measured;
      const after = play(scenarioOf("beside"), seed, ours).measured;
      assert.equal(before.groups["b"]?.served, 0, `direct, seed ${seed}`);
      const { asked = 0, served = 0, unserved = 0, ttft } = after.groups["b"] ?? {};
      // The last may have come just before the end.
      assert(served >= asked - 1 && served + unserved === asked, `${served} of ${asked}`);
      const most = 12 * LOAD_MS + SERVICE_MS + LOAD_MS;
      assert((ttft?.p95 ?? Infinity) <= most, `p95 ${ttft?.p95} ms of ${most}, seed ${seed}`);
      const share = after.servedPerHour / before.servedPerHour;
      assert(share >= 0.89, `throughput ${share.toFixed(3)}, seed ${seed}`);
    }
  });

  it("serves a light flow beside a flood within 1.2 of its time alone and one service", () => {
    for (const seed of SEEDS) {
      const alone = play(floodScenario(false), seed, ours).measured.groups["light"];
      const { measured, traces } = play(floodScenario(true), seed, ours);
      const flood = traces.filter(({ request, ending }) => {
        return request.flow === "flood" && ending === "served";
      });
      const held = flood.map(({ startedAt, endedAt }) => (endedAt ?? 0) - (startedAt ?? 0));
      const serviceMs = held.reduce((sum, each) => sum + each, 0) / held.length;
      const p95 = measured.groups["light"]?.ttft.p95 ?? Infinity;
      const most = 1.2 * (alone?.ttft.p95 ?? 0) + serviceMs;
      assert(p95 <= most, `p95 ${p95} ms of ${most}, seed ${seed}`);
      const engine = play(floodScenario(true), seed, direct).measured.groups["light"];
      assert((engine?.ttft.p95 ?? 0) > 2 * most, "the flood would hurt without it");
    }
  });

  it("serves a burst of 60 over three models with three loads", () => {
    for (const seed of SEEDS) {
      const { measured } = play(scenarioOf("burst"), seed, ours);
      assert.equal(measured.loads, 3);
      assert.equal(measured.served, 60);
      const most = 1.1 * (3 * SMALL.loadMs + 60 * SERVICE_MS);
      assert(measured.makespanMs <= most, `${measured.makespanMs} ms of ${most}`);
    }
  });

  it("keeps a mix of three models going that drowns the engine by itself", () => {
    for (const seed of SEEDS) {
      const before = play(scenarioOf("mix"), seed, direct).measured;
      const after = play(scenarioOf("mix"), seed, ours).measured;
      assert.equal(after.served, after.asked, `seed ${seed}`);
      assert(after.loads < before.loads, `loads, seed ${seed}`);
      const [wait, without] = [after.wait.mean ?? Infinity, before.wait.mean ?? 0];
      assert(wait < 0.1 * without, `waits ${wait} ms in the mean, direct ${without}, seed ${seed}`);
    }
  });

  it("is done with 45 s of a mix within 48 s, 5 s at p95, at the speed of the machine that was measured", () => {
    const runs = Array.from({ length: 20 }, (_, at) => play(MEASURED_MIX, at + 1, ours).measured);
    assert(runs.every(({ served, asked }) => served === asked));
    const middle = (values: number[]) => median(values) ?? Infinity;
    const makespanMs = middle(runs.map((run) => run.makespanMs));
    const p95Ms = middle(runs.map(({ ttft }) => ttft.p95 ?? Infinity));
    assert(makespanMs <= 48_000, `makespan ${makespanMs}`);
    assert(p95Ms <= 5000, `p95 ${p95Ms}`);
  });

  it("finishes a load whoever leaves", () => {
    const scenario = scenarioOf("burst");
    const impatient: Scenario = {
      ...scenario,
      clients: () => {
        return scenario.clients(1).map(({ first }, at) => {
          const request = { ...first.request, model: "a", patienceMs: 0.7 * SMALL.loadMs };
          return { first: { at: at * 500, request } };
        });
      },
    };
    const { measured } = play(impatient, 1, ours);
    assert.equal(measured.loads, 1);
    assert.equal(measured.left, 1, "only the one who asked before");
    assert.equal(measured.served, 59);
    assert.equal(play(impatient, 1, direct).measured.served, 0);
  });
});
