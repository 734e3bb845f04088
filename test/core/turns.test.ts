/** The turn queue: which model is in memory when not all of them fit, and for how long. */
import assert from "node:assert/strict";
import process from "node:process";
import { describe, it } from "node:test";
import fc from "fast-check";
import { step } from "../../src/core/scheduler.ts";
import { turnLength } from "../../src/core/turns.ts";
import { TurnWorld, type Setting } from "./turn-world.ts";

const ABC = ["a", "b", "c"];
const BASE: Setting = {
  models: ABC,
  fits: 1,
  slots: 1,
  serviceMs: 170,
  loadMs: 550,
  turnMs: "auto",
};

function waits(world: TurnWorld, model?: string): number[] {
  return [...world.jobs.values()]
    .filter(({ ticket }) => model === undefined || ticket.model === model)
    .map(({ ticket, startedAt }) => (startedAt ?? Infinity) - ticket.arrivedAt);
}

function makespan(world: TurnWorld): number {
  return Math.max(...[...world.jobs.values()].map(({ endedAt }) => endedAt ?? 0));
}

describe("turnLength", () => {
  it("is twelve times what a change costs, within 2 s and 60 s", () => {
    assert.equal(turnLength("auto", 550, 170, 1), 6600);
    assert.equal(turnLength("auto", 50, 10, 1), 2000);
    assert.equal(turnLength("auto", 6000, 4000, 4), 60_000);
    assert.equal(turnLength("auto", 1000, 4000, 4), 48_000);
  });

  it("is 30 s until a load has been measured, and never below four loads", () => {
    assert.equal(turnLength("auto", null, 170, 1), 30_000);
    assert.equal(turnLength("auto", 30_000, null, 1), 120_000);
    assert.equal(turnLength(1000, 550, 170, 1), 2200);
    assert.equal(turnLength(5000, 550, 170, 1), 5000);
    assert.equal(turnLength(0, null, null, 1), 0);
  });
});

describe("turns", () => {
  it("serves a burst of 60 over three models with three loads", () => {
    const world = new TurnWorld(BASE);
    for (let at = 0; at < 60; at++) world.arrive(at, ABC[at % 3] as string);
    world.run();
    assert.equal(world.loads.length, 3);
    assert.equal(makespan(world), 3 * 550 + 60 * 170);
  });

  it("serves a user of B beside a batch on A within turn, drain and load", () => {
    const world = new TurnWorld({ ...BASE, models: ["a", "b"], loaded: ["a"] });
    for (const at of [0, 1]) world.loop(at, "a");
    for (let at = 5000; at < 120_000; at += 20_000) world.arrive(at, "b");
    world.run(120_000);
    const turn = turnLength("auto", 550, 170, 1);
    for (const wait of waits(world, "b").slice(0, 5)) {
      assert(wait <= turn + 170 + 550 + 170, `waited ${wait} ms`);
    }
    const served = world.order.filter((model) => model === "a").length;
    assert(served * 170 >= 0.85 * 120_000, `A got ${served * 170} ms of service`);
  });

  for (const patienceMs of [0, 1000, 9000]) {
    it(`loads a model for who waits for ${patienceMs} ms only, where a load takes 10 s`, () => {
      const world = new TurnWorld({ ...BASE, models: ["a"], loadMs: 10_000 });
      world.learn();
      world.obey(0, "a", patienceMs);
      world.run(60_000);
      const endings = [...world.jobs.values()].map(({ ending }) => ending);
      assert.equal(endings.at(-1), "done", endings.join());
      assert(endings.length <= 3, endings.join());
      assert.equal(world.loads.length, 1);
    });
  }

  it("serves a user of B beside a batch on A also where a turn is longer than anybody waits", () => {
    const setting = { ...BASE, models: ["a", "b"], loaded: ["a"], loadMs: 40_000, serviceMs: 2000 };
    const world = new TurnWorld(setting);
    world.learn();
    for (let at = 0; at < 6; at++) world.loop(at, "a");
    const hour = 3_600_000;
    for (let at = 5000; at < hour; at += 5000) world.arrive(at, "b", "default", at + 120_000);
    world.obey(7000, "b", 120_000);
    world.run(hour);
    const served = [...world.jobs.values()].filter(({ ending }) => ending === "done");
    const ofB = served.filter(({ ticket }) => ticket.model === "b").length;
    assert(ofB >= 200, `${ofB} of b in an hour`);
    assert(served.length * 2000 >= 0.6 * hour, `${served.length} in all`);
    const turn = turnLength("auto", 40_000, 2000, 1);
    assert(world.loads.length <= 2 * (hour / turn) + 2, `${world.loads.length} loads`);
  });

  it("serves a user of B who leaves before the turn is over and comes back, again and again", () => {
    const play = (pauseMs: number) => {
      const world = new TurnWorld({ ...BASE, models: ["a", "b"], loaded: ["a"], loadMs: 5000 });
      world.learn();
      for (const at of [0, 1]) world.loop(at, "a");
      for (let at = 10_000; at < 600_000; at += 20_000 + pauseMs) {
        world.cancel(at + 20_000 - 1, world.arrive(at, "b"));
      }
      world.run(600_000);
      const ofB = [...world.jobs.values()].filter(({ ticket }) => ticket.model === "b");
      return { served: ofB.filter(({ ending }) => ending === "done").length, loads: world.loads };
    };
    const { served, loads } = play(1000);
    assert(served >= 5, `${served} of b`);
    assert(loads.length <= 2 * (600_000 / 60_000) + 2, `${loads.length} loads`);
    assert.equal(play(100_000).served, 0, "long ago is another one's wish");
  });

  it("asks an engine once to put a model out, whether it does or not", () => {
    const world = new TurnWorld({ ...BASE, models: ["a"], loaded: ["a"] });
    const { state } = world;
    const [effect] = step(state, { type: "unload", model: "a" }, 0);
    assert.deepEqual(effect, { type: "load", model: null, unload: ["a"] });
    const kept = { type: "loaded", loadMs: null, loaded: new Set(["a"]) } as const;
    assert.deepEqual(step(state, kept, 10), []);
    world.arrive(20, "a");
    world.run();
    assert.deepEqual(world.order, ["a"]);
  });

  it("lets a better class wait for four loads only where the turn's work is all of a lower one", () => {
    const first = (priority: "default" | "batch") => {
      const world = new TurnWorld({ ...BASE, models: ["a", "b"], turnMs: 60_000 });
      world.arrive(0, "a", priority);
      world.arrive(1, "b", "default");
      // Both loads are measured, and what does not fit is known.
      for (let at = 2000; at < 40_000; at += 100) world.arrive(at, "a", priority);
      const user = world.arrive(10_000, "b");
      world.run(100_000);
      return (world.jobs.get(user)?.startedAt ?? Infinity) - 10_000;
    };
    assert(first("batch") <= 4 * 550 + 170 + 550, `waited ${first("batch")}`);
    assert(first("default") > 20_000);
  });

  it("goes on serving what fits beside a model that is being loaded", () => {
    const world = new TurnWorld({ ...BASE, fits: 3, loaded: ["a"], loadMs: 5000 });
    world.arrive(0, "b");
    world.arrive(10_000, "c");
    world.run();
    // All three have been seen together. Then c goes without us, and comes back.
    world.loaded.delete("c");
    const { state } = world;
    world.foreign(20_000, "a");
    world.run();
    assert.equal(state.lanes.get("c")?.stay.residency, "cold");
    const started = world.order.length;
    world.arrive(20_001, "c");
    for (let at = 20_100; at < 25_000; at += 200) world.arrive(at, "a");
    world.run(25_000);
    assert(world.order.length - started >= 24, "a is served while c is loaded");
  });

  it("learns that two of three fit, and puts out only one of them", () => {
    const world = new TurnWorld({ ...BASE, fits: 2, loaded: ["a", "b"] });
    world.arrive(0, "c");
    world.run();
    assert.deepEqual([...world.loaded].sort(), ["b", "c"]);
    const started = world.order.length;
    world.arrive(10_000, "a");
    for (let at = 10_001; at < 10_500; at += 100) world.arrive(at, "b");
    world.run();
    assert.deepEqual([...world.loaded].sort(), ["a", "b"]);
    assert.equal(world.order[started], "b", "b is served while a is loaded");
  });

  it("goes on when those for whom a turn was held have left", () => {
    const world = new TurnWorld({ ...BASE, models: ["a", "b"] });
    const held = [1, 2, 3, 4].map((at) => world.arrive(at, "a"));
    world.arrive(5, "b");
    for (const each of held) world.cancel(600, each);
    world.run();
    assert.equal(world.loads.length, 2);
    assert.equal(makespan(world), 1 + 550 + 170 + 550 + 170);
  });

  it("finishes a load though whoever wanted it has left", () => {
    const world = new TurnWorld({ ...BASE, models: ["a", "b"], loaded: ["a"] });
    world.cancel(100, world.arrive(0, "b"));
    world.run();
    assert.deepEqual([...world.loaded], ["b"]);
    assert.equal(world.state.turns.change, null);
  });

  it("refuses only the queue of a model that cannot be loaded, and leaves it alone for longer each time", () => {
    const world = new TurnWorld({ ...BASE, models: ["a", "b"], loaded: ["a"] });
    world.broken.add("b");
    const other = world.arrive(100, "a");
    for (const at of [0, 1, 11_200, 31_800]) world.arrive(at, "b");
    const late = world.arrive(11_000, "b");
    world.arrive(31_700, "b");
    world.run();
    assert.equal(world.jobs.get(other)?.ending, "done");
    assert.deepEqual(
      world.loads.filter(({ model }) => model === "b").map(({ at }) => at),
      // The second try, with a put out, shows that it was not for want of room.
      [0, 550, 11_200, 31_800],
    );
    assert.equal(world.jobs.get(late)?.ending, "refused", "11 s are still within the first 10");
  });

  it("takes a change of residency without it for a new turn", () => {
    const world = new TurnWorld({ ...BASE, models: ["a", "b"], loaded: ["a"] });
    world.foreign(1000, "b");
    world.run();
    assert.equal(world.state.lanes.get("a")?.stay.residency, "cold");
    assert.equal(world.state.lanes.get("b")?.stay.since, 1000);
    world.arrive(2000, "a");
    world.run();
    assert.equal(world.loads.length, 1);
  });
});

const workload = fc.record({
  models: fc.integer({ min: 2, max: 6 }),
  fits: fc.integer({ min: 1, max: 4 }),
  slots: fc.integer({ min: 1, max: 4 }),
  serviceMs: fc.integer({ min: 10, max: 5000 }),
  loadMs: fc.integer({ min: 10, max: 21_000 }),
  turnMs: fc.oneof(fc.constant("auto" as const), fc.integer({ min: 0, max: 65_000 })),
  arrivals: fc.array(
    fc.record({
      at: fc.integer({ min: 0, max: 300_000 }),
      model: fc.nat(5),
      leaves: fc.option(fc.integer({ min: 0, max: 60_000 }), { freq: 5 }),
    }),
    { minLength: 1, maxLength: 60 },
  ),
  foreign: fc.array(fc.record({ at: fc.integer({ min: 0, max: 300_000 }), model: fc.nat(5) }), {
    maxLength: 3,
  }),
  broken: fc.option(fc.nat(5), { freq: 5 }),
});

function build(plan: typeof workload extends fc.Arbitrary<infer T> ? T : never): TurnWorld {
  const models = Array.from({ length: plan.models }, (_, at) => `m${at}`);
  const named = (at: number) => models[at % models.length] as string;
  const { fits, slots, serviceMs, loadMs, turnMs } = plan;
  const world = new TurnWorld({ models, fits, slots, serviceMs, loadMs, turnMs });
  for (const { at, model, leaves } of plan.arrivals) {
    const ticket = world.arrive(at, named(model));
    if (leaves !== null) world.cancel(at + leaves, ticket);
  }
  for (const { at, model } of plan.foreign) world.foreign(at, named(model));
  if (plan.broken !== null) world.broken.add(named(plan.broken));
  return world;
}

/** `RUNS=10000 bun test --timeout=3600000 test/core/turns.test.ts` runs more. */
const RUNS = process.env.RUNS === undefined ? null : Number(process.env.RUNS);

describe("any workload", () => {
  it("is served to the last request, one load at a time, each turn its gate, and comes to rest", () => {
    fc.assert(
      fc.property(workload, (plan) => {
        // The world itself checks every effect.
        const world = build(plan);
        world.run();
        for (const { ending } of world.jobs.values())
          assert.notEqual(ending, null, "nobody is lost");
        assert.equal(world.state.waiting, 0);
        assert.equal(world.state.backend.used, 0);
        assert.equal(world.state.turns.change, null);
      }),
      { numRuns: RUNS ?? 1000 },
    );
  });

  it("is served to the last also where others load what we could not", () => {
    const arrivals = [
      { at: 0, model: 0, leaves: null },
      { at: 10_010, model: 0, leaves: null },
      { at: 10_022, model: 1, leaves: null },
      { at: 10_022, model: 0, leaves: null },
    ];
    const times = { serviceMs: 10, loadMs: 10, turnMs: 0 };
    const foreign = [{ at: 10_021, model: 0 }];
    const world = build({ models: 2, fits: 1, slots: 1, ...times, arrivals, foreign, broken: 0 });
    world.run();
    for (const { ending } of world.jobs.values()) assert.notEqual(ending, null);
  });

  it("waits no longer than the other models' turns, drains and loads (algorithms.md §2.4)", () => {
    fc.assert(
      fc.property(workload, (plan) => {
        const turnMs = plan.turnMs === "auto" ? 30_000 : plan.turnMs;
        const world = build({ ...plan, turnMs, foreign: [], broken: null });
        world.run();
        const { serviceMs, loadMs } = plan;
        const gate = (world.longest + 1) * serviceMs;
        const turn = Math.max(turnMs, 4 * loadMs, gate) + serviceMs + loadMs;
        const bound = plan.models * turn + loadMs + gate;
        for (const { ticket, startedAt, ending } of world.jobs.values()) {
          if (ending !== "done") continue;
          const wait = (startedAt ?? Infinity) - ticket.arrivedAt;
          assert(wait <= bound, `waited ${wait} of at most ${bound}`);
        }
      }),
      { numRuns: RUNS ?? 500 },
    );
  });

  it("starts exactly as without turns where everything is loaded", () => {
    fc.assert(
      fc.property(workload, (plan) => {
        const models = Array.from({ length: plan.models }, (_, at) => `m${at}`);
        const { slots, serviceMs, loadMs, turnMs } = plan;
        const setting = { models, fits: 6, slots, serviceMs, loadMs, turnMs, loaded: models };
        const world = new TurnWorld(setting);
        for (const { at, model } of plan.arrivals) {
          world.arrive(at, models[model % models.length] as string);
        }
        world.run();
        assert.equal(world.loads.length, 0);
        for (const model of models) {
          const own = [...world.jobs.values()].filter(({ ticket }) => ticket.model === model);
          const free = Array.from({ length: slots }, () => 0);
          for (const { ticket, startedAt } of own.toSorted(
            (a, b) => a.ticket.arrivedAt - b.ticket.arrivedAt,
          )) {
            const at = free.indexOf(Math.min(...free));
            const direct = Math.max(ticket.arrivedAt, free[at] as number);
            free[at] = direct + serviceMs;
            assert.equal(startedAt, direct);
          }
        }
      }),
      { numRuns: RUNS ?? 200 },
    );
  });
});
