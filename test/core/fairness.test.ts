/** Who is next: classes, flows and their shares, and that nobody waits for ever. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { AGING_MS, CLASSES, MOST_PASSED, type Priority } from "../../src/core/fairness.ts";
import {
  createScheduler,
  hasRoom,
  nextOf,
  positionOf,
  type Cap,
  type Ticket,
} from "../../src/core/lanes.ts";
import { step, type SchedulerEffect, type SchedulerEvent } from "../../src/core/scheduler.ts";

let tickets = 0;

function ticket(flow: string, more: Partial<Ticket> = {}): Ticket {
  tickets++;
  return {
    id: `${flow}${tickets}`,
    model: "m",
    flow,
    priority: "default",
    weight: 1,
    tokens: 100,
    arrivedAt: 0,
    deadlineAt: Infinity,
    barred: new Set(),
    ...more,
  };
}

interface Limits {
  slots?: number;
  concurrency?: number;
  models?: readonly string[];
  places?: Cap;
}

/** One backend, and who was granted, in order. */
class House {
  now = 0;
  readonly state = createScheduler();
  readonly granted: Ticket[] = [];
  readonly running: Ticket[] = [];

  constructor({ slots = 1, concurrency = Infinity, models = ["m"], places }: Limits = {}) {
    const room = places ?? { limit: Infinity, used: 0 };
    const lanes = models.map((model) => ({ model, slots, shared: [], places: room }));
    this.send({ type: "configure", available: true, concurrency, lanes });
  }

  send(event: SchedulerEvent): SchedulerEffect[] {
    const effects = step(this.state, event, this.now);
    for (const effect of effects) {
      if (effect.type !== "grant") continue;
      this.granted.push(effect.ticket);
      this.running.push(effect.ticket);
    }
    return effects;
  }

  arrive(...those: Ticket[]): void {
    for (const each of those) this.send({ type: "arrive", ticket: each });
  }

  /** @param tokens what it really was */
  complete(of: Ticket, tokens: number | null = null): SchedulerEffect[] {
    this.running.splice(this.running.indexOf(of), 1);
    return this.send({ type: "complete", ticket: of, serviceMs: 1, tokens, heldUntil: null });
  }

  /** Ends all that runs, the oldest grant first, until nothing does. */
  drain(): Ticket[] {
    const from = this.granted.length;
    for (let [first] = this.running; first !== undefined; [first] = this.running) {
      this.complete(first);
    }
    return this.granted.slice(from);
  }

  get flows(): number {
    const lines = [...this.state.lanes.values()].map(({ line }) => line);
    return lines.flatMap(({ classes }) => classes).reduce((sum, each) => sum + each.flows.size, 0);
  }
}

const flowsOf = (those: readonly Ticket[]) => those.map(({ flow }) => flow).join("");
const of = (count: number, flow: string, more: Partial<Ticket> = {}) =>
  Array.from({ length: count }, () => ticket(flow, more));

/** A house whose one slot is taken by somebody else. */
function busy(limits: Limits = {}): House {
  const house = new House(limits);
  house.arrive(ticket("-"));
  return house;
}

describe("flows", () => {
  it("take turns, whoever came first and however many come", () => {
    const house = busy();
    house.arrive(...of(5, "a"), ...of(2, "b"), ...of(1, "c"));
    assert.equal(flowsOf(house.drain()), "abcabaaa");
  });

  it("get tokens by their weight", () => {
    const house = busy();
    house.arrive(...of(8, "a", { weight: 3 }), ...of(4, "b"));
    assert.equal(flowsOf(house.drain().slice(0, 8)), "abaaabaa");
  });

  it("with long requests get fewer of them", () => {
    const house = busy();
    house.arrive(...of(4, "a", { tokens: 400 }), ...of(9, "b"));
    assert.equal(flowsOf(house.drain()), "abbbbabbbbab" + "a");
  });

  it("are charged what a request really was, once that is known", () => {
    const house = busy();
    const [first, ...more] = of(9, "a", { tokens: 800 });
    assert(first);
    house.arrive(first, ...more, ...of(3, "b"));
    house.complete(house.running[0] as Ticket);
    assert.equal(house.running[0], first);
    house.complete(first, 50);
    const second = house.running[0] as Ticket;
    assert.equal(second.flow, "b", "it has had nothing yet");
    house.complete(second);
    assert.equal(house.running[0]?.flow, "a", "50 and not 800: less than the other's 100");
  });

  it("that wait get back what was too much, though others have gone on meanwhile", () => {
    const house = new House({ slots: 2 });
    const long = ticket("a", { tokens: 1000 });
    house.arrive(long, ...of(12, "b"), ...of(12, "a", { arrivedAt: 1 }));
    const others = () => house.running.filter((each) => each !== long);
    for (let each = 0; each < 9; each++) house.complete(others()[0] as Ticket);
    assert.equal(flowsOf(house.granted), "abbbbbbbbbb");
    house.complete(long, 100);
    house.granted.length = 0;
    for (let each = 0; each < 9; each++) house.complete(house.running[0] as Ticket);
    assert.equal(flowsOf(house.granted), "aaaaaaaab", "level again");
  });

  it("are charged nothing for a grant that is given back unused", () => {
    const house = busy();
    const first = ticket("a");
    house.arrive(first, ...of(2, "a", { arrivedAt: 1 }), ...of(2, "b", { arrivedAt: 2 }));
    house.complete(house.running[0] as Ticket);
    assert.equal(house.running[0], first);
    // The engine was too busy for it; it comes back as old as it was.
    house.running.length = 0;
    house.send({ type: "complete", ticket: first, serviceMs: null, tokens: 0, heldUntil: 50 });
    house.arrive(first);
    house.now = 50;
    house.send({ type: "timer" });
    assert.equal(house.running[0], first, "as if it had never been granted");
    assert.equal(flowsOf(house.drain()), "baba");
  });

  it("earn nothing by asking for nothing", () => {
    const house = busy();
    house.arrive(...of(100, "a"));
    for (let each = 0; each < 50; each++) house.complete(house.running[0] as Ticket);
    house.arrive(...of(4, "b", { arrivedAt: 1 }));
    assert.equal(flowsOf(house.drain().slice(0, 8)), "babababa");
  });

  it("earn nothing by it where nobody had to wait either", () => {
    const house = new House({ slots: 2 });
    for (let each = 0; each < 50; each++) {
      house.arrive(ticket("a"), ticket("a"));
      house.drain();
    }
    house.arrive(...of(3, "a"));
    house.arrive(...of(5, "b", { arrivedAt: 1 }), ...of(4, "a", { arrivedAt: 1 }));
    const order = flowsOf(house.drain());
    assert.match(order, /^b?ab?ab?ab/, order);
  });

  it("earn nothing while one of theirs runs and no other waits", () => {
    const house = new House({ slots: 2 });
    const long = ticket("b");
    house.arrive(long, ...of(60, "a"));
    const others = () => house.running.filter((each) => each !== long);
    for (let each = 0; each < 50; each++) house.complete(others()[0] as Ticket);
    house.arrive(...of(3, "b", { arrivedAt: 1 }));
    house.granted.length = 0;
    for (let each = 0; each < 6; each++) house.complete(others()[0] as Ticket);
    assert.equal(flowsOf(house.granted), "bababa");
  });

  it("keep what they had before the others, though they ask for one at a time", () => {
    const house = new House();
    house.arrive(ticket("a", { tokens: 400 }), ...of(20, "b"));
    for (let each = 0; each < 15; each++) {
      const [first] = house.running;
      house.complete(first as Ticket);
      if (first?.flow === "a") house.arrive(ticket("a", { tokens: 400, arrivedAt: 1 }));
    }
    assert.equal(flowsOf(house.granted), "abbbbbabbbbabbbb");
  });

  it("that have gone are forgotten", () => {
    const house = busy();
    for (let tenant = 0; tenant < 200; tenant++) {
      house.arrive(
        ticket(`t${tenant}`, { arrivedAt: tenant }),
        ticket("always", { arrivedAt: 200 }),
      );
      house.complete(house.running[0] as Ticket);
      house.complete(house.running[0] as Ticket);
      assert(house.flows <= 6, `${house.flows} flows`);
    }
    house.drain();
    assert.equal(house.flows, 0, "nobody waits, nobody runs");
  });

  it("that come once each are forgotten, also where somebody always runs or waits", () => {
    for (const waiting of [0, 1]) {
      const house = busy();
      for (let each = 0; each < waiting; each++) house.arrive(ticket("w", { arrivedAt: 1e9 }));
      for (let session = 0; session < 2000; session++) {
        house.arrive(ticket(`s${session}`, { arrivedAt: session }));
        house.complete(house.running[0] as Ticket);
        assert(house.flows <= 300, `${house.flows} flows`);
      }
    }
  });

  it("are those of one model: another model's requests are another account", () => {
    const house = new House({ models: ["m", "n"] });
    house.arrive(ticket("a"), ticket("-", { model: "n" }));
    house.arrive(...of(2, "a", { model: "n" }), ...of(2, "b", { model: "n" }));
    const order = house.drain().filter(({ model }) => model === "n");
    assert.equal(flowsOf(order), "abab");
  });
});

describe("classes", () => {
  const batch = (more: Partial<Ticket> = {}) => ticket("B", { priority: "batch", ...more });
  const interactive = (more: Partial<Ticket> = {}) =>
    ticket("I", { priority: "interactive", ...more });

  it("go before each other, also within one flow", () => {
    const house = busy();
    const mixed = (["batch", "default", "interactive"] as const).flatMap((priority) =>
      of(2, "a", { priority }),
    );
    house.arrive(...mixed);
    const order = house.drain().map(({ priority }) => priority);
    assert.deepEqual(
      order,
      CLASSES.flatMap((each) => [each, each]),
    );
  });

  it("go before each other across models, where the backend's sum is what holds them", () => {
    const house = new House({ concurrency: 1, models: ["m", "n"] });
    house.arrive(ticket("-"));
    house.arrive(batch({ model: "m", arrivedAt: 1 }), interactive({ model: "n", arrivedAt: 2 }));
    assert.equal(flowsOf(house.drain()), "IB");
  });

  it("are each fair for themselves: waiting in a low one is no credit in a high one", () => {
    const house = busy();
    house.arrive(...of(9, "b", { priority: "batch" }), ...of(50, "a", { priority: "interactive" }));
    for (let each = 0; each < 30; each++) house.complete(house.running[0] as Ticket);
    house.arrive(...of(3, "b", { priority: "interactive", arrivedAt: 1 }));
    assert.equal(flowsOf(house.drain().slice(0, 6)), "bababa");
  });

  it("let a lower one have every fourth start when it has waited for a minute", () => {
    const house = busy();
    house.arrive(...of(5, "B", { priority: "batch" }), ...of(40, "I", { priority: "interactive" }));
    house.now = AGING_MS - 1;
    for (let each = 0; each < 8; each++) house.complete(house.running[0] as Ticket);
    assert.equal(flowsOf(house.granted.slice(1)), "IIIIIIII");
    house.now = AGING_MS;
    const order = flowsOf(house.drain());
    assert.equal(order.slice(0, 20), "BIIIBIIIBIIIBIIIBIII");
  });

  it("do so across models as well, the one that has waited longest first", () => {
    const house = new House({ concurrency: 1, models: ["m", "n", "o"] });
    house.arrive(ticket("-"));
    house.arrive(...of(2, "B", { priority: "batch", model: "m", arrivedAt: 2 }));
    house.arrive(...of(2, "D", { priority: "default", model: "n", arrivedAt: 1 }));
    house.arrive(...of(20, "I", { priority: "interactive", model: "o", arrivedAt: 3 }));
    house.now = AGING_MS + 2;
    for (let each = 0; each < 3; each++) house.complete(house.running[0] as Ticket);
    house.granted.length = 0;
    assert.equal(flowsOf(house.drain()), "DIIIDIIIBIIIBIIIIIIIII".slice(0, house.granted.length));
  });

  it("never starve a low one, however much of the high one comes", () => {
    const SERVICE_MS = 700;
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 4 }),
        fc.integer({ min: 1, max: 6 }),
        fc.array(fc.integer({ min: 1, max: 2000 }), { minLength: 10, maxLength: 10 }),
        (slots, ahead, lengths) => {
          const house = new House({ slots });
          const flood = () => {
            const tokens = lengths[tickets % lengths.length] as number;
            const more = { priority: "interactive", tokens, arrivedAt: house.now } as const;
            house.arrive(ticket(`I${tickets % 3}`, more));
          };
          for (let each = 0; each < slots + 8; each++) flood();
          const low = of(ahead, "B", { priority: "batch" });
          house.arrive(...low);
          const last = low.at(-1) as Ticket;
          let after = 0;
          while (!house.granted.includes(last)) {
            house.now += SERVICE_MS / slots;
            flood();
            house.complete(house.running[0] as Ticket);
            if (house.now >= AGING_MS) after++;
            assert(after <= (MOST_PASSED + 1) * ahead, `still waits after ${after} starts`);
          }
          assert(house.now >= AGING_MS, "and not before its time");
        },
      ),
      { numRuns: 40 },
    );
  });
});

describe("a full queue", () => {
  const full = () => busy({ places: { limit: 4, used: 0 } });
  const refusedBy = (house: House, newcomer: Ticket): Ticket[] =>
    house
      .send({ type: "arrive", ticket: newcomer })
      .flatMap((effect) => (effect.type === "refuse" ? [effect.ticket] : []));

  it("refuses who comes where all that wait are of the same flow", () => {
    const house = full();
    house.arrive(...of(4, "a"));
    const newcomer = ticket("a");
    assert.deepEqual(refusedBy(house, newcomer), [newcomer]);
  });

  it("of one flow gives the place of its youngest to another flow, until both have as many", () => {
    const house = full();
    const waiting = of(4, "a");
    house.arrive(...waiting);
    assert.deepEqual(refusedBy(house, ticket("b")), [waiting[3]]);
    assert.deepEqual(refusedBy(house, ticket("b")), [waiting[2]]);
    const third = ticket("b");
    assert.deepEqual(refusedBy(house, third), [third]);
    assert.equal(flowsOf(house.drain()), "abab");
  });

  it("gives the place of a lower class to a higher one, and never the other way", () => {
    const house = full();
    const waiting = of(4, "a", { priority: "batch" });
    house.arrive(...waiting);
    assert.deepEqual(refusedBy(house, ticket("a", { priority: "interactive" })), [waiting[3]]);
    const low = ticket("b", { priority: "batch" });
    assert.deepEqual(refusedBy(house, low), [waiting[2]]);
    house.arrive(...of(2, "a", { priority: "interactive" }));
    const late = ticket("c", { priority: "batch" });
    assert.deepEqual(refusedBy(house, late), [late]);
  });

  it("has nothing for who may not wait", () => {
    const house = full();
    house.arrive(...of(4, "a"));
    const newcomer = ticket("b", { deadlineAt: 0 });
    const effects = house.send({ type: "arrive", ticket: newcomer });
    assert.deepEqual(
      effects.map(({ type }) => type),
      ["expire"],
    );
    assert.equal(house.state.waiting, 4);
  });
});

/*
 * Any order of events, with books that are kept from the effects alone.
 */

const FLOWS = ["a", "b", "c"] as const;
const MODELS = ["m", "n"] as const;
const WEIGHTS: Record<string, number> = { a: 1, b: 2.5, c: 0.5 };

const nat = (max: number) => fc.nat({ max });
const anyRequest = fc.record({
  flow: fc.constantFrom(...FLOWS),
  model: fc.constantFrom(...MODELS),
  priority: fc.constantFrom<Priority>("interactive", "default", "default", "batch"),
  tokens: fc.integer({ min: 1, max: 5000 }),
  age: nat(90_000),
});
const anyEvent = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({ type: fc.constant("arrive" as const), request: anyRequest }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      type: fc.constant("complete" as const),
      pick: nat(50),
      tokens: fc.option(nat(8000)),
    }),
  },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("cancel" as const), pick: nat(50) }) },
  {
    weight: 1,
    arbitrary: fc.record({
      type: fc.constant("configure" as const),
      slots: fc.integer({ min: 1, max: 3 }),
      concurrency: fc.constantFrom(1, 2, 4, Infinity),
    }),
  },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("elsewhere" as const), pick: nat(1) }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant("advance" as const), by: nat(40_000) }) },
);
type Happening = typeof anyEvent extends fc.Arbitrary<infer Event> ? Event : never;

class Books {
  now = 100_000;
  readonly state = createScheduler();
  readonly places: Cap = { limit: 12, used: 0 };
  slots = 2;
  concurrency = 3;
  waiting: Ticket[] = [];
  running: Ticket[] = [];
  readonly decided = new Set<Ticket>();

  constructor() {
    this.configure();
  }

  configure(): void {
    const { slots, concurrency, places } = this;
    const lanes = MODELS.map((model) => ({ model, slots, shared: [], places }));
    this.send({ type: "configure", available: true, concurrency, lanes });
  }

  couldStart(model: string): boolean {
    const inLane = this.running.filter((each) => each.model === model).length;
    return inLane < this.slots && this.running.length < this.concurrency;
  }

  send(event: SchedulerEvent): void {
    if (event.type === "arrive") this.waiting.push(event.ticket);
    for (const effect of step(this.state, event, this.now)) this.#book(effect);
  }

  #book(effect: SchedulerEffect): void {
    if (effect.type === "timer") return;
    assert(effect.type !== "load", "loads nothing where everything counts as loaded");
    const { ticket: each } = effect;
    assert(this.waiting.includes(each), "decides only on who waits");
    assert(!this.decided.has(each), "and once");
    this.decided.add(each);
    if (effect.type === "grant") {
      assert(this.couldStart(each.model), "grants only what may start");
      this.#checkOrder(each);
      this.running.push(each);
    }
    this.waiting = this.waiting.filter((other) => other !== each);
  }

  /** In its flow and class it is the oldest, and nobody better could have started instead. */
  #checkOrder(each: Ticket): void {
    for (const other of this.waiting) {
      const isSame = other.flow === each.flow && other.priority === each.priority;
      if (isSame && other.model === each.model) {
        assert(other.arrivedAt >= each.arrivedAt, "first come, first served within a flow");
      }
      const isBetter = CLASSES.indexOf(other.priority) < CLASSES.indexOf(each.priority);
      if (!isBetter || !this.couldStart(other.model)) continue;
      const isAged = this.waiting.some(
        ({ model, priority, arrivedAt }) =>
          model === each.model && priority === each.priority && this.now - arrivedAt >= AGING_MS,
      );
      assert(isAged, "passes over a better class only for age");
    }
  }

  check(): void {
    assert.equal(this.state.waiting, this.waiting.length, "nobody is lost");
    assert.equal(this.places.used, this.waiting.length);
    for (const model of MODELS) {
      const queue = this.waiting.filter((each) => each.model === model);
      assert.equal(hasRoom(this.state, model), queue.length === 0 && this.couldStart(model));
      assert(
        queue.length === 0 || !this.couldStart(model),
        "a slot is idle that somebody could use",
      );
      const positions = queue.map((each) => positionOf(this.state, each)).toSorted((a, b) => a - b);
      assert.deepEqual(positions, [...queue.keys()], "every position is somebody's");
      const next = nextOf(this.state, model);
      assert.equal(
        next === undefined ? -1 : positionOf(this.state, next),
        queue.length > 0 ? 0 : -1,
      );
    }
  }
}

function happen(books: Books, event: Happening): void {
  switch (event.type) {
    case "arrive": {
      const { age, ...more } = event.request;
      const weight = WEIGHTS[more.flow] as number;
      const arrivedAt = books.now - age;
      books.send({ type: "arrive", ticket: ticket(more.flow, { ...more, weight, arrivedAt }) });
      break;
    }
    case "complete": {
      const chosen = books.running[event.pick % Math.max(1, books.running.length)];
      if (chosen === undefined) break;
      books.running = books.running.filter((each) => each !== chosen);
      const { tokens } = event;
      books.send({ type: "complete", ticket: chosen, serviceMs: 1, tokens, heldUntil: null });
      break;
    }
    case "cancel": {
      const chosen = books.waiting[event.pick % Math.max(1, books.waiting.length)];
      if (chosen === undefined) break;
      books.waiting = books.waiting.filter((each) => each !== chosen);
      books.send({ type: "cancel", ticket: chosen });
      break;
    }
    case "configure":
      books.slots = event.slots;
      books.concurrency = event.concurrency;
      books.configure();
      break;
    case "elsewhere":
      books.send({ type: "elsewhere", model: MODELS[event.pick] as string });
      break;
    case "advance":
      books.now += event.by;
  }
}

describe("any order of events", () => {
  it("keeps the order, decides once on each, and leaves no slot idle that somebody could use", () => {
    fc.assert(
      fc.property(fc.array(anyEvent, { maxLength: 120, size: "max" }), (events) => {
        const books = new Books();
        for (const event of events) {
          happen(books, event);
          books.check();
        }
        // Whoever still waits is served when nobody else comes.
        for (let rounds = 0; books.running.length > 0; rounds++) {
          assert(rounds < 1000, "never comes to rest");
          happen(books, { type: "complete", pick: 0, tokens: null });
          books.check();
        }
        assert.deepEqual(books.waiting, []);
        for (const { line } of books.state.lanes.values()) {
          assert.deepEqual([line.waiting, line.running], [0, 0]);
          for (const { flows } of line.classes)
            assert.equal(flows.size, 0, "flows are left behind");
        }
      }),
      { numRuns: 300 },
    );
  });

  it("positions are the order of the grants where nothing else happens", () => {
    fc.assert(
      fc.property(fc.array(anyRequest, { minLength: 1, maxLength: 40 }), (requests) => {
        const house = busy();
        const waiting = requests.map(({ age, tokens, ...more }) => {
          const weight = WEIGHTS[more.flow] as number;
          // Some alike in age and length; and young enough that nobody goes first for age.
          const same = { model: "m", arrivedAt: -(age % 4), tokens: 100 + (tokens % 2) * 150 };
          return ticket(more.flow, { ...more, ...same, weight });
        });
        house.arrive(...waiting);
        const foretold = waiting
          .map((each) => ({ each, at: positionOf(house.state, each) }))
          .toSorted((a, b) => a.at - b.at)
          .map(({ each }) => each);
        assert.deepEqual(
          house.drain().map(({ id }) => id),
          foretold.map(({ id }) => id),
        );
      }),
    );
  });

  it("gives flows that both wait their share, within their largest requests", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 4 }),
        fc.record({ a: fc.constantFrom(1, 3), b: fc.constantFrom(0.5, 1, 2), c: fc.constant(1) }),
        fc.array(
          fc.record({
            // Each has one who waits at any time; the third comes and goes.
            act: fc.constantFrom("serve", "serve", "serve", "third"),
            a: fc.integer({ min: 1, max: 4000 }),
            b: fc.integer({ min: 1, max: 300 }),
            pick: nat(3),
          }),
          { minLength: 1, maxLength: 200, size: "max" },
        ),
        fc.integer({ min: 0, max: 50 }),
        (slots, weights, steps, head) => {
          const house = new House({ slots });
          const ask = (flow: "a" | "b" | "c", tokens: number) =>
            house.arrive(ticket(flow, { tokens, weight: weights[flow], arrivedAt: tickets }));
          for (let each = 0; each < slots; each++) ask("c", 10);
          // One of them has the house to itself for a while.
          for (let each = 0; each < head; each++) {
            ask("a", 4000);
            house.complete(house.running[0] as Ticket);
          }
          ask("a", 1);
          ask("b", 1);
          house.granted.length = 0;
          const waits = (flow: string) => [...queued(house)].some((each) => each.flow === flow);
          const most = 4000 / weights.a + 300 / weights.b;
          for (const { act, a, b, pick } of steps) {
            if (act === "third") ask("c", b);
            if (!waits("a")) ask("a", a);
            if (!waits("b")) ask("b", b);
            ask("a", a);
            ask("b", b);
            house.complete(house.running[pick % house.running.length] as Ticket);
            const had = (flow: "a" | "b") =>
              house.granted
                .filter((each) => each.flow === flow)
                .reduce((sum, { tokens }) => sum + tokens, 0) / weights[flow];
            const difference = had("a") - had("b");
            assert(Math.abs(difference) <= most + 1e-6, `${difference} apart, ${most} may be`);
          }
        },
      ),
      { numRuns: 150 },
    );
  });
});

function* queued({ state }: House): Generator<Ticket> {
  for (const { line } of state.lanes.values()) {
    for (const { flows } of line.classes) for (const { waiting } of flows.values()) yield* waiting;
  }
}
