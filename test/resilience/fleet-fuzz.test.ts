/**
 * Random fleets in virtual time: requests come, wait, leave and try again while backends are reconfigured,
 * drained, taken out and put back, crash, fail to load, and share a GPU. Whatever happens, nobody is
 * forgotten, and in the end everything is as it was.
 *
 * `RUNS=10000 bun test --timeout=3600000 test/resilience/fleet-fuzz.test.ts` runs more; `SEED` is that of
 * the first run, and the next run has the next one.
 */
import assert from "node:assert/strict";
import process from "node:process";
import { describe, it } from "node:test";
import type { Place } from "../../src/fleet/permit.ts";
import { randomOf, seeded } from "../support/client.ts";
import { effort } from "../support/effort.ts";
import { FleetWorld, MODELS, UNMEASURED, type Machine } from "./fleet-world.ts";

const RUNS = Number(process.env.RUNS ?? effort(60));
const REQUESTS = 150;
/** Deno's time-out of a test runs on the clock that is replaced here. */
const OPTIONS = process.versions.bun === undefined ? {} : { timeout: 3_600_000 };

type Incident = (machine: Machine, world: FleetWorld) => void;

/** What happens beside requests, and of a hundred things how many are that. */
const INCIDENTS: [often: number, happen: Incident][] = [
  [5, crashOrReturn],
  [3, failLoadsOrStop],
  [7, (_, world) => world.probe()],
  [2, takeOutOrPutBack],
  [2, drainOrStop],
  [2, shareGpuOrStop],
  [2, changeSlots],
  [2, replaceModels],
  [2, loseMemory],
  [5, mend],
];

function crashOrReturn(machine: Machine, { random }: FleetWorld) {
  machine.up = !machine.up || random.next() < 0.7;
  if (!machine.up) machine.memory = [];
}

function failLoadsOrStop(machine: Machine, { random }: FleetWorld) {
  machine.failsLoads = !machine.failsLoads && random.next() < 0.3;
}

function takeOutOrPutBack(machine: Machine, world: FleetWorld) {
  machine.present = !machine.present || world.random.next() < 0.6;
  world.publish();
}

function drainOrStop(machine: Machine, world: FleetWorld) {
  machine.drained = !machine.drained && world.random.next() < 0.4;
  world.publish();
}

function shareGpuOrStop(machine: Machine, world: FleetWorld) {
  machine.gpu = machine.gpu === null ? "g" : null;
  world.publish();
}

function changeSlots(machine: Machine, world: FleetWorld) {
  machine.slots = world.random.between(1, 3);
  if (machine.concurrency !== null) machine.concurrency = machine.slots;
  world.publish();
}

function replaceModels(machine: Machine, world: FleetWorld) {
  machine.models = MODELS.filter(() => world.random.next() < 0.85);
  world.publish();
}

/** As when somebody else has put everything out. */
function loseMemory(machine: Machine, world: FleetWorld) {
  machine.memory = [];
  world.probe([machine]);
}

function mend(machine: Machine, world: FleetWorld) {
  Object.assign(machine, { up: true, failsLoads: false, present: true, drained: false });
  world.probe([machine]);
}

/** One thing more, and how it is called. */
function happen(world: FleetWorld): string {
  const machine = world.random.pick(world.machines);
  let left = world.random.between(0, 99);
  for (const [often, incident] of INCIDENTS) {
    left -= often;
    if (left >= 0) continue;
    incident(machine, world);
    return incident.name || "probe";
  }
  void world.request();
  return "request";
}

/** What holds at any time, as soon as everything that waits for no timer has happened. */
function check(world: FleetWorld, after: string) {
  assert.equal(world.endless, null, `somebody chooses again and again, after ${after}`);
  for (const { id, mostLoads } of world.machines) {
    assert(mostLoads <= 1, `${id} was to load ${mostLoads} models at once, after ${after}`);
  }
  checkCounters(world, after);
  checkNudged(world, after);
}

/** What is counted is what there is: nothing is counted twice, and nothing below zero. */
function checkCounters(world: FleetWorld, after: string) {
  for (const { backend, running, waiting, models } of world.fleet.usage()) {
    const there = models.map(({ model }) => ({
      model,
      running: world.count(backend, model, "runs"),
      waiting: world.count(backend, model, "waits"),
    }));
    assert.deepEqual(models, there, `what ${backend} counts of its models, after ${after}`);
    const sum = (doing: "running" | "waiting") => there.reduce((all, each) => all + each[doing], 0);
    const sums = [sum("running"), sum("waiting")];
    assert.deepEqual([running, waiting], sums, `what ${backend} counts, after ${after}`);
  }
}

/** Settings that are set already change nothing: whatever begins by that could have begun before. */
function checkNudged(world: FleetWorld, after: string) {
  const { grants } = world;
  const loads = world.loadsAwaited();
  world.fleet.turnMs = "auto";
  assert.equal(world.grants, grants, `somebody waited who might start, after ${after}`);
  assert.deepEqual(world.loadsAwaited(), loads, `a load was due and not begun, after ${after}`);
}

/** Everything works again, until everybody is answered and the last timer has fired. */
async function comeToRest(world: FleetWorld) {
  for (const machine of world.machines) mend(machine, world);
  for (let second = 0; second < 400 && world.requests.size > 0; second += 5) {
    await world.clock.pass(5000);
    world.probe();
    check(world, "the end");
  }
  const waiting = [...world.requests].map(({ id, model, at }) => ({ id, model, at }));
  assert.deepEqual(waiting, [], "somebody is never answered");
  // Of those who have left a timer may remain until they would have had to give up.
  await world.clock.pass(120_000);
  assert.equal(world.clock.timers, 0, "a timer is left");
}

/** At rest nothing is under way, and all there is can be had, as in a fleet that is new. */
function checkRest(world: FleetWorld) {
  for (const machine of world.machines) {
    machine.models = [...MODELS, UNMEASURED];
    machine.memory = [...machine.models];
  }
  world.probe();
  for (const { firstTokenMs, target } of world.candidates(UNMEASURED)) {
    // Unmeasured, each token that is being computed is taken for a millisecond.
    assert.equal(firstTokenMs, 0, `${target.backend} is still computing`);
  }
  const all = [...MODELS, UNMEASURED];
  for (const { open, target } of all.flatMap((model) => world.candidates(model))) {
    assert(!open, `a breaker's trial of ${target.model} in ${target.backend} has never ended`);
  }
  // So that each request is a trial, and nobody is sent elsewhere.
  for (const machine of world.machines) machine.health = "unhealthy";
  world.publish();
  for (const model of all) checkRoom(world, model);
}

/** Takes all slots, then all places of one model, and gives them back. */
function checkRoom(world: FleetWorld, model: string) {
  const { machines, caps, maxLength } = world;
  const asked: Place[] = [];
  const askWhile = (wanted: "granted" | "waits", { id }: Machine) => {
    for (let count = 0; ; count++) {
      const { place, told } = world.ask(id, model);
      if (told === wanted) {
        asked.push(place);
        continue;
      }
      place.leave();
      return count;
    }
  };
  const trying = () => world.candidates(model).map((candidate) => candidate.trying);
  assert(!trying().includes(true), "a trial has never ended");
  const started = machines.map((machine) => askWhile("granted", machine));
  const tried = started.map((count) => count > 0);
  assert.deepEqual(trying(), tried, "trials under way");
  const slots = machines.reduce((sum, machine) => sum + machine.slots, 0);
  const most = Math.min(slots, caps.get(model) ?? Infinity);
  const running = started.reduce((sum, count) => sum + count);
  assert.equal(running, most, `slots of ${model}`);
  assert.equal(askWhile("waits", machines[0] as Machine), maxLength, `places of ${model}`);
  for (const place of asked) place.leave();
}

/** @param seed of this run alone. */
async function run(seed: number): Promise<FleetWorld> {
  const world = new FleetWorld(randomOf(seed));
  try {
    let requests = 0;
    while (requests < REQUESTS) {
      const after = happen(world);
      requests += after === "request" ? 1 : 0;
      await world.clock.pass(world.random.between(0, world.random.pick([300, 300, 300, 5000])));
      check(world, after);
    }
    await comeToRest(world);
    checkRest(world);
    world.fleet.close();
    assert.equal(world.clock.timers, 0, "a timer is left of a fleet that is closed");
  } finally {
    world.close();
  }
  return world;
}

describe("any fleet", () => {
  it(`forgets nobody and nothing in ${RUNS} runs of ${REQUESTS} requests`, OPTIONS, async () => {
    const { seed } = seeded("fleets");
    let answered = 0;
    for (let at = seed; at < seed + RUNS; at++) {
      try {
        answered += (await run(at)).answered;
      } catch (error) {
        console.log(`again: RUNS=1 SEED=${at} bun test test/resilience/fleet-fuzz.test.ts`);
        throw error;
      }
    }
    console.log(`fleets: ${RUNS} runs, ${RUNS * REQUESTS} requests, ${answered} whole answers`);
    assert(answered > RUNS, "most fleets serve");
  });
});
