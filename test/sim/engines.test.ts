/** Virtual time and the engines in it. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { createBatch, type Speed } from "./engine-batch.ts";
import { createLlamaSwap } from "./engine-llamaswap.ts";
import { createClock } from "./clock.ts";
import { createRandom } from "../support/random.ts";
import { exponential, lognormal } from "./random.ts";
import { SMALL, small } from "./scenarios.ts";
import type { Request } from "./service.ts";
import { burst, loop, requestOf } from "./workload.ts";
import { runWorld, type Client } from "./world.ts";

const SPEED: Speed = {
  slots: 2,
  promptMs: 1,
  tokenMs: 10,
  slowdown: 0.5,
  cacheTokens: 1000,
  noticeMs: 50,
};

function once(at: number, more: Partial<Request>): Client {
  return { first: { at, request: { ...requestOf(small("a"), createRandom(1)), ...more } } };
}

function prompt(...parts: [id: string, tokens: number][]) {
  return parts.map(([id, tokens]) => ({ id, tokens }));
}

function playBatch(speed: Partial<Speed>, clients: readonly Client[]) {
  const clock = createClock();
  const engine = createBatch(clock, { ...SPEED, ...speed });
  return { engine, traces: runWorld(clock, engine, clients, 1e9) };
}

describe("virtual time", () => {
  it("does everything in the order of its time, then of asking, and nothing that was taken back", () => {
    const clock = createClock();
    const random = createRandom(1);
    const done: { at: number; order: number }[] = [];
    for (let order = 0; order < 1000; order++) {
      const at = Math.floor(random() * 100);
      const forget = clock.at(at, () => done.push({ at: clock.now(), order }));
      if (order % 10 === 0) forget();
    }
    clock.run(1e9);
    const sorted = done.toSorted((a, b) => a.at - b.at || a.order - b.order);
    assert.deepEqual(done, sorted);
    assert.equal(done.length, 900);
    assert(done.every(({ order }) => order % 10 !== 0));
  });

  it("stops where it was told to, and never goes back", () => {
    const clock = createClock();
    const seen: number[] = [];
    const tick = () => {
      seen.push(clock.now());
      clock.at(clock.now() - 5, () => seen.push(clock.now()));
      clock.at(clock.now() + 10, tick);
    };
    clock.at(10, tick);
    clock.run(25);
    assert.deepEqual(seen, [10, 10, 20, 20]);
  });
});

describe("random numbers", () => {
  it("have the mean that was asked for, and are the same for the same seed", () => {
    const draw = (seed: number) => {
      const random = createRandom(seed);
      return Array.from({ length: 20_000 }, () => [
        exponential(random, 100),
        lognormal(random, 100, 1),
      ]);
    };
    const values = draw(7);
    assert.deepEqual(values, draw(7));
    for (const which of [0, 1]) {
      const mean = values.reduce((sum, each) => sum + (each[which] ?? 0), 0) / values.length;
      assert(Math.abs(mean - 100) < 3, `mean ${mean}`);
    }
  });
});

describe("an engine with several slots", () => {
  it("reads prompts one after the other and makes answers at once, each slower for the other", () => {
    const { traces } = playBatch({}, [
      once(0, { prompt: prompt(["x", 100]), answerTokens: 10 }),
      once(0, { prompt: prompt(["y", 100]), answerTokens: 10 }),
    ]);
    const times = traces.map(({ firstTokenAt, endedAt }) => [firstTokenAt, endedAt]);
    // The first has its ten tokens when the second has read its prompt.
    assert.deepEqual(times, [
      [100, 200],
      [200, 300],
    ]);
    const both = playBatch({ promptMs: 0 }, [
      once(0, { answerTokens: 10 }),
      once(0, { answerTokens: 20 }),
    ]);
    const ends = both.traces.map(({ endedAt }) => endedAt);
    assert.deepEqual(ends, [150, 250]);
  });

  it("does not read again what it has in its prefix cache, and forgets what was unused for longest", () => {
    const system = ["system", 400] as const;
    const { engine } = playBatch({}, [
      once(0, { prompt: prompt([...system], ["a", 100]), answerId: "a1", answerTokens: 50 }),
      once(5000, { prompt: prompt([...system], ["a", 100], ["a1", 50], ["a2", 100]) }),
      once(10_000, { prompt: prompt(["other", 900]) }),
      once(15_000, { prompt: prompt([...system], ["a", 100]) }),
    ]);
    assert.equal(engine.work.promptTokens, 500 + 650 + 900 + 500);
    assert.equal(engine.work.cachedTokens, 550);
  });

  it("stops soon after a client has gone, and gives the slot to the next", () => {
    const { engine, traces } = playBatch({ slots: 1, promptMs: 0 }, [
      once(0, { answerTokens: 1000, patienceMs: 200 }),
      once(0, { answerTokens: 10 }),
      once(0, { answerTokens: 10, patienceMs: 100 }),
    ]);
    assert.deepEqual(
      traces.map(({ ending, endedAt }) => [ending, endedAt]),
      [
        ["left", 200],
        ["served", 350],
        ["left", 100],
      ],
    );
    assert.equal(Math.round(engine.work.wastedTokens), 5);
    assert.equal(Math.round(engine.work.answerTokens), 35);
  });
});

describe("llama-swap", () => {
  const setting = { speed: SMALL.speed, loadMs: 500, unloadMs: 0, limit: 10 };

  it("joins those who want the same model, and refuses more than ten of one", () => {
    const clock = createClock();
    const engine = createLlamaSwap(clock, setting);
    const kinds = ["a", "b", "c"].map(small);
    const traces = runWorld(clock, engine, burst(createRandom(1), kinds, 60, 0), 1e9);
    assert.deepEqual(engine.work.loads, ["a", "b", "c"]);
    const refused = traces.filter(({ ending }) => ending === "refused");
    assert.equal(refused.length, 30);
    assert(refused.every(({ retryAfterMs }) => retryAfterMs === 1000));
  });

  it("never serves a second model while the first is always busy", () => {
    const clock = createClock();
    const engine = createLlamaSwap(clock, setting);
    const random = createRandom(1);
    const loops = [1, 2].map(() => loop(random, small("a"), 100_000));
    const traces = runWorld(clock, engine, [...loops, once(5000, { model: "b" })], 100_000);
    assert.equal(traces.find(({ request }) => request.model === "b")?.ending, "unserved");
  });
});
