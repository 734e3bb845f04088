/** Requests that wait move to where they would start sooner: they get there, and do not wander about. */
import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import fc from "fast-check";
import type { Ticket } from "../../src/core/lanes.ts";
import { judge, SUCCESS } from "../../src/core/outcome.ts";
import { chainOf } from "../../src/core/prefix.ts";
import { select } from "../../src/core/select.ts";
import type { Health, Snapshot } from "../../src/core/snapshot.ts";
import { Fleet } from "../../src/fleet/fleet.ts";
import type { Admission, Permit, Place } from "../../src/fleet/permit.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";

const IDS = ["a", "b", "c"] as const;
const TOPICS = ["x", "y", "z"];

interface Asking {
  ticket: Ticket;
  /** The last that was said, and has not been acted on. */
  said: Admission | null;
  backend: string;
  place: Place | null;
  permit: Permit | null;
  grantedAt: number;
}

/** A fleet under a clock of its own, with requests that choose again as the data plane does. */
class World {
  now = 1000;
  asking: Asking[] = [];
  /** How often somebody was told to choose again. */
  moves = 0;
  snapshot: Snapshot;
  readonly fleet: Fleet;
  /** Per token and per answer. */
  readonly #paces: readonly number[];
  #random: number;
  #tickets = 0;

  constructor(slots: readonly number[], paces: readonly number[], random = 0) {
    this.#paces = paces;
    this.#random = random;
    const ids = IDS.slice(0, slots.length);
    this.snapshot = aSnapshot(
      ids.map((id) => aBackend(id)),
      ["m", "n"].map((name) =>
        aModel(
          name,
          ids.map((id, at) => aTarget(id, name, { slots: slots[at] as number })),
        ),
      ),
    );
    this.fleet = new Fleet({
      now: () => this.now,
      maxLength: 100,
      upstreamLimit: Infinity,
      breaker: { failureThreshold: 3, resetTimeoutMs: 1000, halfOpenRequests: 1 },
      random: () => this.#random,
      apiKeyOf: () => null,
      look: () => Promise.resolve(false),
      loaded: () => {},
    });
    this.fleet.apply(this.snapshot);
  }

  ask(model: string, topic: string, blocks: number, more: Partial<Ticket> = {}): Asking {
    this.#tickets++;
    const chain = chainOf(model, [topic.repeat(256 * blocks)]);
    const ticket: Ticket = {
      id: `t${this.#tickets}`,
      model,
      flow: topic,
      priority: "default",
      weight: 1,
      tokens: 10,
      barred: new Set(),
      arrivedAt: this.now,
      deadlineAt: this.now + 1e6,
      prompt: { tokens: 64 * blocks, chain, session: null, shows: true },
      ...more,
    };
    const one: Asking = {
      ticket,
      said: null,
      backend: "",
      place: null,
      permit: null,
      grantedAt: 0,
    };
    this.asking.push(one);
    this.#choose(one);
    this.settle();
    return one;
  }

  #choose(one: Asking): void {
    const model = this.snapshot.models.find(({ name }) => name === one.ticket.model);
    assert(model !== undefined);
    const candidates = this.fleet.candidates(this.snapshot, model, one.ticket);
    const selection = select(candidates, this.fleet.creditOf(model.name));
    assert(selection !== null);
    one.said = null;
    one.backend = selection.target.backend;
    // What it is told may come before the place does.
    one.place = this.fleet.enqueue(one.ticket, selection.target, (said) => (one.said = said));
  }

  /** Does what each was told, until nobody has been told anything new. */
  settle(): void {
    const most = 4 * (this.asking.length + 1);
    for (let rounds = 0; ; rounds++) {
      assert(rounds <= most, `${this.asking.length} requests choose again for ever`);
      const told = this.asking.filter(({ said, permit }) => said !== null && permit === null);
      if (told.length === 0) return;
      for (const one of told) {
        if (one.said?.type === "reselect") {
          this.moves++;
          this.#choose(one);
        } else if (one.said?.type === "granted") {
          one.permit = one.said.permit;
          one.grantedAt = this.now;
          this.#random = (this.#random + 0.37) % 1;
        } else this.#forget(one);
      }
    }
  }

  #forget(one: Asking): void {
    this.asking = this.asking.filter((other) => other !== one);
  }

  /** Ends one that runs, with what it has shown of its backend. */
  end(pick: number, isGood = true): void {
    const running = this.asking.filter(({ permit }) => permit !== null);
    const one = running[pick % Math.max(1, running.length)];
    if (one?.permit == null) return;
    this.#forget(one);
    const { tokens } = one.ticket.prompt ?? { tokens: 0 };
    const pace = this.#paces[IDS.indexOf(one.backend as "a")] ?? 1;
    if (isGood) one.permit.proved();
    const answered = {
      at: this.now,
      ttftMs: tokens * pace,
      promptTokens: tokens,
      cachedTokens: pick % 3 === 0 ? 0 : null,
      tokensPerSecond: null,
      error: null,
      tokens: tokens + 10,
    };
    one.permit.release(isGood ? SUCCESS : judge("busy"), answered);
    this.settle();
  }

  turn(id: string, health: Health): void {
    const backends = this.snapshot.backends.map((each) =>
      each.id === id ? { ...each, health } : each,
    );
    this.snapshot = { ...this.snapshot, backends };
    this.fleet.apply(this.snapshot);
    this.settle();
  }

  advance(by: number): void {
    this.now += by;
    mock.timers.tick(by);
    this.settle();
  }

  get waiting(): Asking[] {
    return this.asking.filter(({ permit }) => permit === null);
  }
}

beforeEach(() => mock.timers.enable({ apis: ["setTimeout"] }));
afterEach(() => mock.timers.reset());

describe("a request that waits", () => {
  /** Its prompt has been read by a, which is busy and usually takes a second. */
  function waitingAt(blocks: number): { world: World; waits: Asking; busy: Asking } {
    const world = new World([1, 1], [1, 1]);
    // Both are measured, then a reads it.
    for (let each = 0; each < 2; each++) {
      const [one, other] = [world.ask("m", "q", 8), world.ask("m", "r", 8)];
      world.advance(1000);
      for (const _ of [one, other]) world.end(1);
    }
    const reads = world.ask("m", "x", blocks);
    world.advance(1000);
    world.end(1);
    const busy = world.ask("m", "x", blocks);
    assert.equal(busy.backend, reads.backend, "it is back where it has been read");
    const waits = world.ask("m", "x", blocks);
    return { world, waits, busy };
  }

  it("stays with its prompt where to read it elsewhere takes longer, and is not sent to and fro", () => {
    const { world, waits, busy } = waitingAt(100);
    assert.deepEqual([waits.backend, waits.permit], [busy.backend, null]);
    for (let each = 0; each < 20; each++) world.advance(40);
    assert.equal(world.moves, 0);
    world.end(1);
    assert(waits.permit !== null);
    assert.equal(waits.backend, busy.backend);
  });

  it("goes elsewhere at once where that takes less", () => {
    const { waits, busy } = waitingAt(8);
    assert(waits.permit !== null && waits.backend !== busy.backend);
  });

  it("goes where there is room for its prompt as soon as it can, however quick the other is", () => {
    const world = new World([1, 1], [0.01, 5]);
    for (let each = 0; each < 4; each++) {
      world.ask("m", `q${each}`, 64);
      world.ask("m", `r${each}`, 64);
      world.advance(100);
      world.end(1);
      world.end(1);
    }
    world.turn("b", "unhealthy");
    world.ask("m", "y", 64);
    const waits = world.ask("m", "z", 64, { cramped: new Set(["a"]) });
    assert.deepEqual([waits.backend, waits.permit], ["a", null], "better than nothing");
    world.turn("b", "healthy");
    assert.equal(waits.backend, "b");
    assert(waits.permit !== null);
    const other = world.ask("m", "z", 64, { cramped: new Set(["a"]) });
    world.end(0);
    assert.deepEqual([other.backend, other.permit], ["b", null], "a is free, and too small");
  });
});

const step = fc.oneof(
  fc.record({
    type: fc.constant("ask" as const),
    model: fc.constantFrom("m", "n"),
    topic: fc.constantFrom(...TOPICS),
    blocks: fc.constantFrom(0, 1, 8, 64),
    session: fc.option(fc.constantFrom("s", "t"), { nil: null }),
    cramped: fc.subarray([...IDS]),
    priority: fc.constantFrom("interactive" as const, "default" as const, "batch" as const),
  }),
  fc.record({ type: fc.constant("end" as const), pick: fc.nat(), isGood: fc.boolean() }),
  fc.record({ type: fc.constant("end" as const), pick: fc.nat(), isGood: fc.constant(true) }),
  fc.record({ type: fc.constant("advance" as const), by: fc.constantFrom(1, 50, 400, 3000) }),
);

describe("any order of requests with prompts, sessions and contexts", () => {
  it("comes to rest after each of them, with nobody waiting for ever", () => {
    const slots = fc.array(fc.integer({ min: 1, max: 2 }), { minLength: 2, maxLength: 3 });
    const paces = fc.array(fc.constantFrom(0.01, 0.2, 1, 5), { minLength: 3, maxLength: 3 });
    const steps = fc.array(step, { maxLength: 80, size: "max" });
    fc.assert(
      fc.property(slots, paces, steps, fc.double({ min: 0, max: 0.99, noNaN: true }), (...all) => {
        const [sizes, speeds, taken, random] = all;
        const world = new World(sizes, speeds, random);
        for (const each of taken) {
          if (each.type === "advance") world.advance(each.by);
          else if (each.type === "end") world.end(each.pick, each.isGood);
          else {
            const { model, topic, blocks, session, priority } = each;
            const chain = chainOf(model, [topic.repeat(256 * blocks)]);
            const prompt = { tokens: 64 * blocks, chain, session, shows: true };
            const cramped = new Set(each.cramped);
            world.ask(model, topic, blocks, { prompt, priority, cramped });
          }
        }
        for (let rounds = 0; world.asking.length > 0; rounds++) {
          assert(rounds < 1000, "comes to rest");
          world.advance(1000);
          world.end(0);
          const running = world.asking.length - world.waiting.length;
          assert(running > 0 || world.waiting.length === 0, "nobody runs, and somebody waits");
        }
        for (const { running, waiting } of world.fleet.usage()) {
          assert.deepEqual([running, waiting], [0, 0]);
        }
      }),
      { numRuns: 400 },
    );
  });
});
