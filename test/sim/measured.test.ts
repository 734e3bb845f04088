/** The model of Ollama does what Ollama was seen to do; each number comes from the place that is named. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { createClock } from "./clock.ts";
import { play } from "./compare.ts";
import { createOllama, type OllamaSetting } from "./engine-ollama.ts";
import { direct, ordered, type Policy } from "./machine.ts";
import { createRandom } from "../support/random.ts";
import { LARGE, large, MEASURED_MIX, SCENARIOS, SMALL, small, type Scenario } from "./scenarios.ts";
import type { Request } from "./service.ts";
import { inOrderOfArrival } from "./swap-front.ts";
import { loop, poisson, regularly, requestOf } from "./workload.ts";
import { runWorld, type Client } from "./world.ts";

const HOUR = 3_600_000;
const SEED = 1;

function isWithin(value: number | null, expected: number, share: number, what: string) {
  const isNear = value !== null && Math.abs(value - expected) <= share * expected;
  assert(isNear, `${what}: ${value}, expected ${expected} ± ${100 * share} % (seed ${SEED})`);
}

/** Some models that fill a GPU each, 6 h of independent requests. @param load share of one's capacity. */
function mixed(count: number, load: number): Scenario {
  const models = Array.from({ length: count }, (_, at) => `m${at}`);
  return {
    about: "",
    machine: { type: "box", models, box: LARGE },
    groupBy: null,
    untilMs: 6 * HOUR,
    clients: (seed) => poisson(createRandom(seed), models.map(large), 1000 / load, 6 * HOUR),
  };
}

function world(box: Partial<OllamaSetting>, clients: readonly Client[]) {
  const clock = createClock();
  const engine = createOllama(clock, { ...SMALL, ...box });
  return { engine, traces: runWorld(clock, engine, clients, HOUR) };
}

function once(at: number, model: string, more: Partial<Request> = {}): Client {
  return { first: { at, request: { ...requestOf(small(model), createRandom(1)), ...more } } };
}

describe("Ollama's own scheduler", () => {
  it("needs 60 loads and 46 s for a burst of 60 over three models (measured on a real one)", () => {
    const { measured } = play(SCENARIOS["burst"] as Scenario, SEED, direct);
    isWithin(measured.loads, 60, 0.2, "loads");
    isWithin(measured.makespanMs, 46_000, 0.2, "makespan");
    assert.equal(measured.served, 60);
  });

  it("never serves b beside two loops on a (measured; simulated 10 280 s at p95 of 3 h)", () => {
    const scenario: Scenario = {
      about: "",
      machine: { type: "box", models: ["a", "b"], box: { ...SMALL, preloaded: ["a"] } },
      groupBy: "model",
      untilMs: HOUR,
      clients(seed) {
        const random = createRandom(seed);
        const loops = [1, 2].map(() => loop(random, small("a"), HOUR));
        return [...loops, ...regularly(random, small("b"), 60_000, HOUR)];
      },
    };
    const { measured } = play(scenario, SEED, direct);
    assert.equal(measured.groups["b"]?.served, 0);
    assert(measured.loads <= 1, "at the end, when the loops have");
  });

  it("takes 72 to 82 s for 45 s of a mix of three models, 26 to 36 s at p95 (measured on a real one)", () => {
    const runs = [1, 2, 3, 4, 5, 6].map((seed) => play(MEASURED_MIX, seed, direct).measured);
    const mean = (values: number[]) => values.reduce((sum, each) => sum + each, 0) / values.length;
    isWithin(mean(runs.map(({ makespanMs }) => makespanMs)), 77_000, 0.2, "makespan");
    isWithin(mean(runs.map(({ ttft }) => ttft.p95 ?? Infinity)), 31_000, 0.2, "p95");
  });

  it("waits as long as the first simulation of it (algorithms.md §2.3)", () => {
    const cases: [count: number, load: number, waitS: number, served: number, policy: Policy][] = [
      [2, 0.5, 12.4, 1, direct],
      [3, 0.15, 16.5, 1, direct],
      [3, 0.3, 2510, 0.77, direct],
      [3, 0.15, 885, 0.92, ordered(inOrderOfArrival)],
      [3, 0.3, 5828, 0.46, ordered(inOrderOfArrival)],
    ];
    for (const [count, load, waitS, served, policy] of cases) {
      const { measured } = play(mixed(count, load), SEED, policy);
      const what = `${count} models at ${load}`;
      isWithin(measured.wait.mean, waitS * 1000, 0.2, `${what}, mean wait`);
      isWithin(measured.served / measured.asked, served, 0.05, `${what}, share served`);
    }
  });

  it("gives up a load when its client leaves: ten clients, ten loads, none served (measured)", () => {
    const patienceMs = 0.7 * SMALL.loadMs;
    const clients = Array.from({ length: 10 }, (_, at) => once(at * 500, "a", { patienceMs }));
    const { engine, traces } = world({}, clients);
    assert.equal(engine.work.loads.length, 10);
    assert(traces.every(({ ending }) => ending === "left"));
    assert.deepEqual(engine.loaded(), []);
  });

  it("starts a load again for the second client who waits for the same model (measured)", () => {
    const clients = [once(0, "a", { patienceMs: 300 }), once(100, "a")];
    const { engine, traces } = world({}, clients);
    assert.deepEqual(engine.work.loads, ["a", "a"]);
    assert.deepEqual(
      traces.map(({ ending }) => ending),
      ["left", "served"],
    );
  });

  it("refuses beyond its queue, but nobody whose model is loaded (measured: OLLAMA_MAX_QUEUE=1)", () => {
    const busy = once(0, "a", { answerTokens: 500 });
    const others = [once(1000, "b"), once(1100, "c"), once(1200, "c"), once(1300, "a")];
    const { traces } = world({ maxQueue: 1 }, [busy, ...others]);
    const endings = traces.map(({ request, ending }) => `${request.model} ${ending}`);
    assert.deepEqual(endings, ["a served", "b served", "c served", "c refused", "a served"]);
  });

  it("serves several models at once where they fit, by number and by size", () => {
    const clients = [once(0, "a"), once(5000, "b"), once(10_000, "c"), once(15_000, "a")];
    const all = world({ maxLoaded: 3 }, clients);
    assert.deepEqual(all.engine.work.loads, ["a", "b", "c"]);
    const memory = { total: 10, sizes: { a: 4, b: 6, c: 4 } };
    const two = world({ maxLoaded: 3, memory }, clients);
    // a goes for c by its name, then b for a.
    assert.deepEqual(two.engine.work.loads, ["a", "b", "c", "a"]);
    assert.deepEqual(two.engine.loaded().toSorted(), ["a", "c"]);
  });

  it("puts a model that is in use out when it is not any more", () => {
    const clock = createClock();
    const engine = createOllama(clock, SMALL);
    const clients = [once(0, "a", { answerTokens: 100 })];
    clock.at(1000, () => engine.unload?.("a", () => {}));
    const [trace] = runWorld(clock, engine, clients, HOUR);
    clock.run(5000);
    assert.equal(trace?.ending, "served");
    assert.deepEqual(engine.loaded(), []);
  });

  it("puts a model out five minutes after its last use", () => {
    const { engine } = world({}, [once(0, "a"), once(200_000, "a"), once(510_000, "a")]);
    assert.deepEqual(engine.work.loads, ["a", "a"]);
  });
});
