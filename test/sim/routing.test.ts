/** Which of several servers a request goes to. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { createBatch, type Speed } from "./engine-batch.ts";
import { createClock } from "./clock.ts";
import { play } from "./compare.ts";
import { createGateway, DEFAULTS } from "./gateway.ts";
import { policiesFor } from "./machine.ts";
import { createRandom } from "../support/random.ts";
import { SCENARIOS, type Scenario } from "./scenarios.ts";
import { requestOf } from "./workload.ts";
import { runWorld } from "./world.ts";

const SPEED: Speed = {
  slots: 4,
  promptMs: 1,
  tokenMs: 10,
  slowdown: 0.05,
  cacheTokens: 0,
  noticeMs: 50,
};

describe("several servers", () => {
  it("share idle time by their weights, 1 to 2", () => {
    const clock = createClock();
    const backends = [1, 2].map((weight) => {
      return { id: `server-${weight}`, engine: createBatch(clock, SPEED), slots: 4, weight };
    });
    const gateway = createGateway(clock, { ...DEFAULTS, backends, models: ["a"] });
    const random = createRandom(1);
    const kind = { model: "a", flow: "x", promptTokens: 20, answerTokens: 10, spread: 0 };
    const clients = Array.from({ length: 300 }, (_, at) => {
      return { first: { at: at * 1000, request: requestOf(kind, random) } };
    });
    const traces = runWorld(clock, gateway, clients, 1e9);
    assert(traces.every(({ ending }) => ending === "served"));
    const shares = backends.map(({ engine }) => engine.work.promptTokens / 20);
    assert(Math.abs((shares[0] ?? 0) - 100) <= 3, `${shares[0]} of 300`);
    assert(Math.abs((shares[1] ?? 0) - 200) <= 3, `${shares[1]} of 300`);
  });

  it("are used by their speed, where by turns the slow one drowns", () => {
    const scenario = SCENARIOS["unequal"] as Scenario;
    for (const seed of [1]) {
      const ttft: Record<string, number> = {};
      for (const [name, policy] of Object.entries(policiesFor(scenario.machine))) {
        ttft[name] = play(scenario, seed, policy).measured.ttft.mean ?? Infinity;
      }
      const { ours = Infinity } = ttft;
      assert(ours < 0.2 * (ttft["round robin"] ?? 0), `${JSON.stringify(ttft)}, seed ${seed}`);
      assert(ours < (ttft["least busy"] ?? 0), `${JSON.stringify(ttft)}, seed ${seed}`);
    }
  });
});
