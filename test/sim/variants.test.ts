/** Schedulers that look right and are not: they must fail here as they do elsewhere. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { play } from "./compare.ts";
import { ordered, ours, type Policy } from "./machine.ts";
import { createRandom } from "../support/random.ts";
import { LARGE, large, type Scenario } from "./scenarios.ts";
import { grouped, inOrderOfArrival, type SwapOrder } from "./swap-front.ts";
import { poisson } from "./workload.ts";

const HOUR = 3_600_000;
const SEED = 1;

/** Two models, one request at a time of 4 s, a load of 6 s: 710 requests an hour, 78 % of what one can do. */
const TWO: Scenario = {
  about: "",
  machine: {
    type: "box",
    models: ["a", "b"],
    box: { ...LARGE, speed: { ...LARGE.speed, slots: 1 } },
  },
  groupBy: null,
  untilMs: 6 * HOUR,
  clients: (seed) => poisson(createRandom(seed), [large("a"), large("b")], HOUR / 710, 6 * HOUR),
};

/** What is loaded, unless somebody else has waited for too long. */
function maxWait(ms: number): SwapOrder {
  return (view) => {
    for (const [model, since] of view.waiting) {
      if (!view.resident.has(model) && view.now - since > ms) return model;
    }
    return grouped(view);
  };
}

/** What is loaded, until so much time has passed and anybody else waits. */
function quantum(ms: number): SwapOrder {
  return (view) => {
    if (view.now - view.since < ms) return grouped(view);
    const others = [...view.waiting].filter(([model]) => !view.resident.has(model));
    return others[0]?.[0] ?? grouped(view);
  };
}

function run(policy: Policy) {
  const { measured } = play(TWO, SEED, policy, { maxWaitMs: Infinity, maxLength: 100_000 });
  return {
    perHour: measured.served / 6,
    waitS: (measured.wait.mean ?? Infinity) / 1000,
    loads: measured.loads / measured.served,
  };
}

const OURS = run(ours);

describe("with two models at 78 % of the capacity", () => {
  it("ours serves all, as the order without any bound does", () => {
    const free = run(ordered(grouped));
    assert(OURS.perHour >= 0.98 * free.perHour, `${OURS.perHour} of ${free.perHour} per hour`);
    assert(OURS.waitS <= 1.25 * free.waitS, `waits ${OURS.waitS} s, without a bound ${free.waitS}`);
  });

  it("a bound on waiting and nothing else swaps without serving", () => {
    const { perHour, loads } = run(ordered(maxWait(30_000)));
    assert(perHour < 150, `${perHour} per hour: it should live lock`);
    assert(loads > 3, `${loads} loads for each that is served`);
  });

  it("a quantum loses capacity", () => {
    const { perHour, waitS } = run(ordered(quantum(12_000)));
    assert(perHour < 0.95 * OURS.perHour, `${perHour} of ${OURS.perHour} per hour`);
    assert(waitS > 4 * OURS.waitS, `waits ${waitS} s, ours ${OURS.waitS}`);
  });

  it("the order of arrival swaps for every other request", () => {
    const { perHour } = run(ordered(inOrderOfArrival));
    assert(perHour < 0.8 * OURS.perHour, `${perHour} of ${OURS.perHour} per hour`);
  });
});
