/** The scheduler of one backend: what each event does, and what no order of events may break. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  createScheduler,
  hasRoom,
  positionOf,
  type Cap,
  type SchedulerState,
  type Ticket,
} from "../../src/core/lanes.ts";
import {
  step,
  type LanePlan,
  type SchedulerEffect,
  type SchedulerEvent,
} from "../../src/core/scheduler.ts";
import { ALIKE } from "../support/ticket.ts";

let tickets = 0;

function ticket(model = "m", arrivedAt = 0, deadlineAt = 1000): Ticket {
  tickets++;
  return { ...ALIKE, id: `t${tickets}`, model, arrivedAt, deadlineAt };
}

interface Limits {
  slots?: number;
  concurrency?: number;
  available?: boolean;
  models?: readonly string[];
  shared?: readonly Cap[];
  places?: Cap;
}

function configuration(limits: Limits): Extract<SchedulerEvent, { type: "configure" }> {
  const { slots = 1, concurrency = Infinity, available = true, models = ["m"] } = limits;
  const { shared = [], places } = limits;
  const lanes = models.map((model): LanePlan => {
    return { model, slots, shared, places: places ?? { limit: 10, used: 0 } };
  });
  return { type: "configure", available, concurrency, lanes };
}

function scheduler(limits: Limits = {}): SchedulerState {
  const state = createScheduler();
  assert.deepEqual(step(state, configuration(limits), 0), []);
  return state;
}

const arrive = (state: SchedulerState, of: Ticket, now = 0) =>
  step(state, { type: "arrive", ticket: of }, now);
const complete = (state: SchedulerState, of: Ticket, serviceMs: number | null = 100, now = 0) =>
  step(state, { type: "complete", ticket: of, serviceMs, tokens: null, heldUntil: null }, now);
/** Ends because the engine is too busy: nobody follows before `heldUntil`, unless somebody ends. */
const sentBack = (state: SchedulerState, of: Ticket, heldUntil: number, now = 0) =>
  step(state, { type: "complete", ticket: of, serviceMs: null, tokens: 0, heldUntil }, now);

/** The effects of one kind, by ticket. */
function those(effects: readonly SchedulerEffect[], type: SchedulerEffect["type"]): Ticket[] {
  return effects.flatMap((effect) =>
    effect.type === type && "ticket" in effect ? [effect.ticket] : [],
  );
}

function decided(effects: readonly SchedulerEffect[]): [string, Ticket][] {
  return effects.flatMap((effect) =>
    "ticket" in effect ? [[effect.type, effect.ticket] as [string, Ticket]] : [],
  );
}

function retryAfterOf(effects: readonly SchedulerEffect[]): number {
  const [effect] = effects;
  assert(effect?.type === "refuse" || effect?.type === "expire", `got ${effect?.type}`);
  return effect.retryAfterMs;
}

describe("arrive", () => {
  it("grants while there are slots, then queues and asks for a timer at the deadline", () => {
    const state = scheduler({ slots: 2 });
    const [a, b, c] = [ticket(), ticket(), ticket("m", 1, 700)];
    assert.deepEqual(arrive(state, a), [{ type: "grant", ticket: a }]);
    assert.deepEqual(arrive(state, b), [{ type: "grant", ticket: b }]);
    assert.deepEqual(arrive(state, c, 1), [{ type: "timer", at: 700 }]);
    assert.equal(positionOf(state, a), -1);
    assert.equal(positionOf(state, c), 0);
    assert.equal(state.waiting, 1);
  });

  it("sends away what it has no lane for", () => {
    const state = scheduler();
    const stranger = ticket("other");
    assert.deepEqual(arrive(state, stranger), [{ type: "reselect", ticket: stranger }]);
  });

  it("sends everybody away while the backend is not available", () => {
    const state = scheduler({ available: false });
    const one = ticket();
    assert.deepEqual(arrive(state, one), [{ type: "reselect", ticket: one }]);
    assert.equal(state.backend.used, 0);
  });

  it("refuses when the places of the model are taken, wherever they are taken", () => {
    const places = { limit: 1, used: 0 };
    const here = scheduler({ places });
    const there = scheduler({ places });
    for (const state of [here, there]) arrive(state, ticket());
    arrive(there, ticket());
    assert.equal(places.used, 1);
    const late = ticket();
    assert.deepEqual(decided(arrive(here, late)), [["refuse", late]]);
    assert.equal(places.used, 1);
    assert.equal(here.waiting, 0);
  });

  it("does not count a request that starts at once as a place", () => {
    const places = { limit: 1, used: 1 };
    const state = scheduler({ places });
    const one = ticket();
    assert.deepEqual(decided(arrive(state, one)), [["grant", one]]);
    assert.equal(places.used, 1);
  });

  it("expires at once what may not wait, but grants it where a slot is free", () => {
    const state = scheduler();
    const impatient = ticket("m", 5, 5);
    assert.deepEqual(decided(arrive(state, impatient, 5)), [["grant", impatient]]);
    const second = ticket("m", 5, 5);
    assert.deepEqual(decided(arrive(state, second, 5)), [["expire", second]]);
    assert.equal(state.waiting, 0);
  });

  it("gives a request that comes from elsewhere the place of its age", () => {
    const state = scheduler();
    const running = ticket();
    arrive(state, running);
    const young = ticket("m", 30);
    const middle = ticket("m", 20);
    const old = ticket("m", 10);
    const twin = ticket("m", 20);
    for (const each of [young, old, middle, twin]) arrive(state, each, 40);
    assert.deepEqual(
      [old, middle, twin, young].map((each) => positionOf(state, each)),
      [0, 1, 2, 3],
    );
  });

  it("lets nobody overtake the queue through a slot that others share", () => {
    const process: Cap = { limit: 1, used: 1 };
    const state = scheduler({ slots: 4, shared: [process] });
    const first = ticket();
    arrive(state, first);
    process.used = 0;
    const second = ticket("m", 1);
    assert.deepEqual(decided(arrive(state, second, 1)), []);
    assert.deepEqual(decided(step(state, { type: "room" }, 1)), [["grant", first]]);
  });
});

describe("cancel", () => {
  it("takes a waiting request out, and says nothing", () => {
    const places = { limit: 5, used: 0 };
    const state = scheduler({ places });
    const [running, gone, next] = [ticket(), ticket(), ticket()];
    for (const each of [running, gone, next]) arrive(state, each);
    assert.deepEqual(step(state, { type: "cancel", ticket: gone }, 0), []);
    assert.equal(places.used, 1);
    assert.equal(state.waiting, 1);
    assert.deepEqual(decided(complete(state, running)), [["grant", next]]);
  });

  it("does nothing for one that does not wait here", () => {
    const state = scheduler();
    const running = ticket();
    arrive(state, running);
    for (const stranger of [running, ticket(), ticket("other")]) {
      assert.deepEqual(step(state, { type: "cancel", ticket: stranger }, 0), []);
    }
    assert.equal(state.backend.used, 1);
    assert.equal(state.waiting, 0);
  });
});

describe("complete", () => {
  it("hands the slot to the head of the queue", () => {
    const state = scheduler();
    const [a, b, c] = [ticket(), ticket("m", 1), ticket("m", 2)];
    for (const each of [a, b, c]) arrive(state, each);
    assert.deepEqual(decided(complete(state, a)), [["grant", b]]);
    assert.deepEqual(decided(complete(state, b)), [["grant", c]]);
    assert.deepEqual(decided(complete(state, c)), []);
    assert.equal(state.backend.used, 0);
  });

  it("goes to the oldest of all lanes when the backend's sum was what held them", () => {
    const state = scheduler({ slots: 5, concurrency: 1, models: ["x", "y", "z"] });
    const running = ticket("x");
    const [x, y, z] = [ticket("x", 3), ticket("y", 1), ticket("z", 2)];
    for (const each of [running, x, y, z]) arrive(state, each);
    assert.deepEqual(decided(complete(state, running)), [["grant", y]]);
    assert.deepEqual(decided(complete(state, y)), [["grant", z]]);
    assert.deepEqual(decided(complete(state, z)), [["grant", x]]);
  });

  it("passes over an older head whose own lane is full", () => {
    const state = createScheduler();
    const places = { limit: 10, used: 0 };
    const lanes = [
      { model: "x", slots: 1, shared: [], places },
      { model: "y", slots: 2, shared: [], places },
    ];
    step(state, { type: "configure", available: true, concurrency: 2, lanes }, 0);
    const [x, y] = [ticket("x"), ticket("y")];
    arrive(state, x);
    arrive(state, y);
    const [older, younger] = [ticket("x", 1), ticket("y", 2)];
    arrive(state, older);
    arrive(state, younger);
    assert.deepEqual(decided(complete(state, y)), [["grant", younger]]);
  });

  it("learns how long a request holds its slot, for the retry-after of later refusals", () => {
    const places = { limit: 0, used: 0 };
    const state = scheduler({ places, slots: 2 });
    const refused = (now = 0) => retryAfterOf(arrive(state, ticket("m", now, now + 1000), now));
    const [a, b, c] = [ticket(), ticket(), ticket()];
    arrive(state, a);
    arrive(state, b);
    assert.equal(refused(), 10_000, "until measured");
    complete(state, a, 1000, 20_000);
    arrive(state, c, 20_000);
    assert.equal(refused(20_000), 250, "b is overdue: as long as an overdue one takes");
    complete(state, b, 2000, 30_000);
    arrive(state, ticket(), 30_000);
    assert.equal(refused(30_000), 375, "c is, of 1500");
  });

  it("takes the mean of the first twenty, then follows the last ones", () => {
    const state = scheduler({ slots: 1 });
    const serve = (serviceMs: number) => {
      const one = ticket();
      arrive(state, one);
      complete(state, one, serviceMs);
      return state.lanes.get("m")?.serviceMs ?? 0;
    };
    for (let each = 0; each < 10; each++) serve(1000);
    for (let each = 0; each < 9; each++) serve(2000);
    assert.equal(Math.round(serve(2000)), 1500);
    for (let each = 0; each < 19; each++) serve(3000);
    assert(serve(3000) > 2400, "one in three of what is left is old");
  });

  it("makes the retry-after grow with the queue where it may not wait for long", () => {
    const state = scheduler({ places: { limit: 2, used: 0 } });
    arrive(state, ticket());
    arrive(state, ticket());
    arrive(state, ticket());
    assert.equal(retryAfterOf(arrive(state, ticket())), 29_000);
  });

  it("tells one who may wait when there is a place again", () => {
    const state = scheduler({ places: { limit: 2, used: 0 } });
    for (let at = 0; at < 3; at++) arrive(state, ticket("m", 0, 60_000));
    assert.equal(retryAfterOf(arrive(state, ticket("m", 0, 60_000))), 10_000);
  });

  it("keeps its promises: each counts as one that waits until its time has passed", () => {
    const state = scheduler({ places: { limit: 0, used: 0 } });
    arrive(state, ticket());
    const refused = (now: number) => retryAfterOf(arrive(state, ticket("m", now, now + 1000), now));
    assert.deepEqual([refused(0), refused(0), refused(0)], [10_000, 20_000, 30_000]);
    assert.equal(refused(5000), 35_000);
    assert.equal(refused(12_000), 32_500, "one has passed, one of ten seconds is overdue");
  });

  it("refuses at once who would start too late, and says when it would not", () => {
    const state = scheduler();
    const first = ticket();
    arrive(state, first);
    complete(state, first, 10_000);
    arrive(state, ticket());
    const patient = ticket("m", 0, 10_000);
    assert.deepEqual(decided(arrive(state, patient)), [], "it starts just in time");
    const late = ticket("m", 0, 15_000);
    assert.deepEqual(arrive(state, late), [
      { type: "refuse", ticket: late, cause: "late", retryAfterMs: 5000 },
    ]);
  });

  it("learns nothing of one that tells nothing of how long answers take", () => {
    const places = { limit: 0, used: 0 };
    const state = scheduler({ places });
    const [a, b, c] = [ticket(), ticket(), ticket()];
    const refused = () => retryAfterOf(arrive(state, ticket()));
    arrive(state, a);
    complete(state, a, null);
    arrive(state, b);
    assert.equal(refused(), 10_000, "still unmeasured");
    complete(state, b, 2000);
    arrive(state, c);
    complete(state, c, null);
    arrive(state, ticket());
    assert.equal(refused(), 4000, "as it was, behind one who was told the same");
  });

  it("gives a retry-after above zero though requests have taken no time", () => {
    const state = scheduler({ places: { limit: 0, used: 0 } });
    const first = ticket();
    arrive(state, first);
    complete(state, first, 0);
    arrive(state, ticket());
    assert(retryAfterOf(arrive(state, ticket())) > 0);
  });
});

describe("configure", () => {
  it("grants to who waits when slots are added", () => {
    const state = scheduler({ slots: 1 });
    const [a, b, c, d] = [ticket(), ticket(), ticket(), ticket()];
    for (const each of [a, b, c, d]) arrive(state, each);
    const effects = step(state, configuration({ slots: 3 }), 0);
    assert.deepEqual(decided(effects), [
      ["grant", b],
      ["grant", c],
    ]);
  });

  it("lets what runs above a lowered limit end, and starts nothing until it has", () => {
    const state = scheduler({ slots: 3 });
    const running = [ticket(), ticket(), ticket()];
    const waiting = ticket();
    for (const each of [...running, waiting]) arrive(state, each);
    assert.deepEqual(decided(step(state, configuration({ slots: 1 }), 0)), []);
    const ends = running.map((each) => those(complete(state, each), "grant"));
    assert.deepEqual(ends, [[], [], [waiting]]);
  });

  it("sends a removed lane's queue elsewhere, oldest first, and keeps the others'", () => {
    const state = scheduler({ models: ["x", "y"] });
    const [x1, x2, x3] = [ticket("x"), ticket("x", 1), ticket("x", 2)];
    const [y1, y2] = [ticket("y"), ticket("y", 1)];
    for (const each of [x1, y1, x2, x3, y2]) arrive(state, each);
    const effects = step(state, configuration({ models: ["y"] }), 0);
    assert.deepEqual(decided(effects), [
      ["reselect", x2],
      ["reselect", x3],
    ]);
    assert.equal(positionOf(state, y2), 0);
  });

  it("counts what still runs in a lane that was removed and came back", () => {
    const shared = { limit: 9, used: 0 };
    const state = scheduler({ slots: 2, shared: [shared] });
    const running = ticket();
    arrive(state, running);
    step(state, configuration({ models: [] }), 0);
    assert.equal(state.backend.used, 1);
    step(state, configuration({ slots: 2, shared: [shared] }), 0);
    const [second, third] = [ticket(), ticket()];
    assert.deepEqual(decided(arrive(state, second)), [["grant", second]]);
    assert.deepEqual(decided(arrive(state, third)), [], "the old one still holds a slot");
    assert.deepEqual(decided(complete(state, running)), [["grant", third]]);
    complete(state, second);
    complete(state, third);
    assert.deepEqual([state.backend.used, shared.used], [0, 0]);
  });

  it("gives back what a removed lane's last request held, and forgets the lane", () => {
    const shared = { limit: 9, used: 0 };
    const state = scheduler({ shared: [shared] });
    const running = ticket();
    arrive(state, running);
    step(state, configuration({ models: [] }), 0);
    complete(state, running);
    assert.deepEqual([state.backend.used, shared.used], [0, 0]);
    step(state, configuration({ models: [] }), 0);
    assert.equal(state.lanes.size, 0);
  });

  it("lets nobody queue in a lane that is gone and only waits for its last request", () => {
    const state = scheduler();
    arrive(state, ticket());
    step(state, configuration({ models: [] }), 0);
    const late = ticket();
    assert.deepEqual(decided(arrive(state, late)), [["reselect", late]]);
  });

  it("sends everybody elsewhere when the backend is drained, and lets what runs end", () => {
    const state = scheduler();
    const [running, waiting] = [ticket(), ticket()];
    arrive(state, running);
    arrive(state, waiting);
    const effects = step(state, configuration({ available: false }), 0);
    assert.deepEqual(decided(effects), [["reselect", waiting]]);
    assert.deepEqual(decided(complete(state, running)), []);
    assert.equal(state.backend.used, 0);
  });

  it("grants up to the backend's sum when that is raised", () => {
    const state = scheduler({ slots: 9, concurrency: 1 });
    const all = [ticket(), ticket(), ticket(), ticket()];
    for (const each of all) arrive(state, each);
    const effects = step(state, configuration({ slots: 9, concurrency: 3 }), 0);
    assert.deepEqual(those(effects, "grant"), all.slice(1, 3));
  });
});

describe("elsewhere, recall, room", () => {
  it("elsewhere sends the head of that model's queue to choose again", () => {
    const state = scheduler({ models: ["x", "y"] });
    for (const model of ["x", "y"]) arrive(state, ticket(model));
    const [head, next, other] = [ticket("x", 1), ticket("x", 2), ticket("y", 0)];
    for (const each of [head, next, other]) arrive(state, each);
    const effects = step(state, { type: "elsewhere", model: "x" }, 5);
    assert.deepEqual(decided(effects), [["reselect", head]]);
    assert.equal(positionOf(state, next), 0);
    for (const model of ["none", "x", "x"]) step(state, { type: "elsewhere", model }, 5);
    assert.equal(state.waiting, 1);
    assert.equal(positionOf(state, other), 0);
  });

  it("recall sends everybody who waits to choose again", () => {
    const places = { limit: 9, used: 0 };
    const state = scheduler({ models: ["x", "y"], places });
    const running = [ticket("x"), ticket("y")];
    const waiting = [ticket("x", 1), ticket("x", 2), ticket("y", 1)];
    for (const each of [...running, ...waiting]) arrive(state, each);
    const effects = step(state, { type: "recall" }, 5);
    assert.deepEqual(those(effects, "reselect"), waiting);
    assert.deepEqual([state.waiting, places.used, state.backend.used], [0, 0, 2]);
  });

  it("recall of one model leaves the others' queues alone", () => {
    const state = scheduler({ models: ["x", "y"] });
    for (const model of ["x", "y"]) arrive(state, ticket(model));
    const [x1, y1, x2] = [ticket("x", 1), ticket("y", 2), ticket("x", 3)];
    for (const each of [x1, y1, x2]) arrive(state, each);
    const effects = step(state, { type: "recall", model: "x" }, 5);
    assert.deepEqual(decided(effects), [
      ["reselect", x1],
      ["reselect", x2],
    ]);
    assert.deepEqual([positionOf(state, y1), state.waiting], [0, 1]);
    assert.deepEqual(step(state, { type: "recall", model: "none" }, 5), []);
  });

  it("room grants as far as the shared cap goes", () => {
    const cap: Cap = { limit: 3, used: 3 };
    const state = scheduler({ slots: 9, shared: [cap] });
    const waiting = [ticket(), ticket("m", 1), ticket("m", 2)];
    for (const each of waiting) arrive(state, each);
    assert.deepEqual(decided(step(state, { type: "room" }, 0)), []);
    cap.used = 1;
    assert.deepEqual(those(step(state, { type: "room" }, 0), "grant"), waiting.slice(0, 2));
    assert.equal(cap.used, 3);
  });
});

describe("timer", () => {
  it("expires what is due, in every lane, and asks for the next deadline", () => {
    const state = scheduler({ models: ["x", "y"] });
    for (const model of ["x", "y"]) arrive(state, ticket(model));
    const due = [ticket("x", 1, 100), ticket("y", 2, 200)];
    const later = [ticket("x", 0, 300), ticket("y", 3, 201)];
    for (const each of [...due, ...later]) arrive(state, each, 50);
    const effects = step(state, { type: "timer" }, 200);
    assert.deepEqual(those(effects, "expire"), due);
    assert.deepEqual(effects.at(-1), { type: "timer", at: 201 });
    assert.equal(state.waiting, 2);
  });

  it("asks again when it came early, and for nothing when nobody waits", () => {
    const state = scheduler();
    arrive(state, ticket());
    const waiting = ticket("m", 0, 100);
    arrive(state, waiting);
    assert.deepEqual(step(state, { type: "timer" }, 99), [{ type: "timer", at: 100 }]);
    assert.deepEqual(decided(step(state, { type: "timer" }, 100)), [["expire", waiting]]);
    assert.deepEqual(step(state, { type: "timer" }, 101), []);
  });
});

describe("hasRoom", () => {
  it("is true exactly where an arrival would be granted", () => {
    const cap: Cap = { limit: 2, used: 0 };
    const state = scheduler({ slots: 1, models: ["x", "y"], concurrency: 9, shared: [cap] });
    assert.equal(hasRoom(state, "x"), true);
    assert.equal(hasRoom(state, "none"), false);
    arrive(state, ticket("x"));
    assert.deepEqual([hasRoom(state, "x"), hasRoom(state, "y")], [false, true]);
    cap.used = 2;
    assert.equal(hasRoom(state, "y"), false, "the shared cap is full");
    arrive(state, ticket("y"));
    cap.used = 1;
    assert.equal(hasRoom(state, "y"), false, "somebody waits already");
  });
});

describe("a held backend", () => {
  /** One still runs, two wait, and the engine has just sent back the fourth. */
  function held(limits: Limits = { slots: 2 }) {
    const state = scheduler(limits);
    const [runs, back] = [ticket(), ticket()];
    const waiting = [ticket("m", 1, 5000), ticket("m", 2, 6000)];
    for (const each of [runs, back, ...waiting]) arrive(state, each, 10);
    const effects = sentBack(state, back, 1000, 10);
    return { state, runs, waiting, effects };
  }

  it("starts nobody though slots are free, and asks for a timer at the end of the hold", () => {
    const { state, waiting, effects } = held();
    assert.deepEqual(effects, [{ type: "timer", at: 1000 }]);
    assert.equal(state.backend.used, 1);
    assert.equal(hasRoom(state, "m"), false);
    assert.deepEqual(step(state, { type: "room" }, 500), []);
    const late = ticket("m", 500, 800);
    assert.deepEqual(arrive(state, late, 500), [{ type: "timer", at: 800 }]);
    assert.deepEqual(decided(step(state, configuration({ slots: 9 }), 600)), []);
    assert.deepEqual(
      [...waiting, late].map((each) => positionOf(state, each)),
      [0, 1, 2],
    );
  });

  it("starts an arrival neither, where nobody waits", () => {
    const state = scheduler({ slots: 2 });
    const back = ticket();
    arrive(state, back);
    assert.deepEqual(sentBack(state, back, 1000), [{ type: "timer", at: 1000 }]);
    assert.equal(hasRoom(state, "m"), false);
    const next = ticket("m", 1, 9000);
    assert.deepEqual(arrive(state, next, 1), [{ type: "timer", at: 1000 }]);
    assert.deepEqual(decided(step(state, { type: "timer" }, 1000)), [["grant", next]]);
  });

  it("starts again when the timer comes, not when it comes early", () => {
    const { state, waiting } = held();
    assert.deepEqual(decided(step(state, { type: "timer" }, 999)), []);
    assert.deepEqual(step(state, { type: "timer" }, 999), [{ type: "timer", at: 1000 }]);
    const effects = step(state, { type: "timer" }, 1000);
    assert.deepEqual(those(effects, "grant"), waiting.slice(0, 1));
    assert.equal(state.heldUntil, null);
  });

  it("starts again when one that runs there ends, before the time", () => {
    const { state, runs, waiting } = held();
    assert.deepEqual(those(complete(state, runs, 100, 20), "grant"), waiting);
    assert.equal(state.heldUntil, null);
  });

  it("is held again, from then on, when the one that ends was sent back as well", () => {
    const { state, runs, waiting } = held();
    assert.deepEqual(sentBack(state, runs, 1500, 500), [{ type: "timer", at: 1500 }]);
    assert.deepEqual(decided(step(state, { type: "timer" }, 1000)), [], "the old time is void");
    assert.deepEqual(those(step(state, { type: "timer" }, 1500), "grant"), waiting);
  });

  it("lets whoever waits expire, leave, and be sent elsewhere", () => {
    const state = scheduler({ slots: 1, models: ["m", "n"] });
    const back = ticket();
    arrive(state, back);
    const due = ticket("m", 1, 300);
    const [leaves, head, recalled] = [2, 3, 4].map((at) => ticket("m", at, 9000));
    assert(leaves && head && recalled);
    for (const each of [due, leaves, head, recalled]) arrive(state, each, 5);
    assert.deepEqual(sentBack(state, back, 1000, 10), [{ type: "timer", at: 300 }]);
    const effects = step(state, { type: "timer" }, 300);
    assert.deepEqual(decided(effects), [["expire", due]]);
    assert.deepEqual(effects.at(-1), { type: "timer", at: 1000 }, "the hold has still to end");
    assert.deepEqual(step(state, { type: "cancel", ticket: leaves }, 310), []);
    const sent = step(state, { type: "elsewhere", model: "m" }, 320);
    assert.deepEqual(decided(sent), [["reselect", head]]);
    assert.deepEqual(decided(step(state, { type: "recall" }, 330)), [["reselect", recalled]]);
    assert.deepEqual(decided(step(state, { type: "timer" }, 1000)), []);
    assert.equal(hasRoom(state, "m"), true);
  });

  it("expires at once whom it would have granted, where it may not wait", () => {
    const { state } = held({ slots: 9, places: { limit: 10, used: 0 } });
    const impatient = ticket("m", 20, 20);
    assert.deepEqual(decided(arrive(state, impatient, 20)), [["expire", impatient]]);
  });

  it("asks for its timer again when it is configured anew", () => {
    const { state } = held();
    const out = configuration({ available: false, concurrency: 0, models: [] });
    step(state, out, 20);
    const effects = step(state, configuration({ slots: 2 }), 2000);
    assert.deepEqual(effects, [{ type: "timer", at: 1000 }], "what is past fires at once");
    step(state, { type: "timer" }, 2000);
    assert.equal(hasRoom(state, "m"), true);
  });

  it("holds all its models, and no other backend", () => {
    const shared: Cap = { limit: 9, used: 0 };
    const here = scheduler({ models: ["x", "y"], shared: [shared] });
    const there = scheduler({ models: ["x", "y"], shared: [shared] });
    const back = ticket("x");
    arrive(here, back);
    sentBack(here, back, 1000);
    assert.deepEqual([hasRoom(here, "x"), hasRoom(here, "y")], [false, false]);
    assert.deepEqual([hasRoom(there, "x"), hasRoom(there, "y")], [true, true]);
    assert.equal(shared.used, 0);
  });
});

/*
 * Any order of events. A world of several schedulers that share caps, driven as the fleet drives
 * them, beside books that are kept from the effects alone.
 */

const MODELS = ["x", "y", "z"] as const;
const BACKENDS = 3;

interface Entry {
  ticket: Ticket;
  at: number;
  /** Order of entering a queue: the tie-break of equal ages. */
  turn: number;
}

interface Site {
  state: SchedulerState;
  plan: Extract<SchedulerEvent, { type: "configure" }>;
  waiting: Entry[];
  running: Ticket[];
  timerAt: number | null;
  /** By the books: no start before then. */
  heldUntil: number | null;
}

class World {
  now = 1000;
  readonly caps = new Map(MODELS.map((model) => [model as string, { limit: Infinity, used: 0 }]));
  readonly places = new Map(MODELS.map((model) => [model as string, { limit: 4, used: 0 }]));
  readonly process: Cap;
  readonly sites: Site[];
  /** Asked to choose again and not yet arrived anywhere. */
  readonly homeless: Ticket[] = [];
  /** Decisions per ticket and arrival still owed; a cancelled one is owed none. */
  readonly owed = new Map<Ticket, number>();
  #turn = 0;

  constructor(processLimit: number) {
    this.process = { limit: processLimit, used: 0 };
    this.sites = Array.from({ length: BACKENDS }, () => ({
      state: createScheduler(),
      plan: { type: "configure" as const, available: true, concurrency: Infinity, lanes: [] },
      waiting: [],
      running: [],
      timerAt: null,
      heldUntil: null,
    }));
  }

  site(at: number): Site {
    return this.sites[at % BACKENDS] as Site;
  }

  capOf(model: string): Cap {
    return this.caps.get(model) as Cap;
  }

  placesOf(model: string): Cap {
    return this.places.get(model) as Cap;
  }

  runningOf(site: Site, model: string): number {
    return site.running.filter((each) => each.model === model).length;
  }

  runningAnywhere(model?: string): number {
    return this.sites
      .flatMap((site) => site.running)
      .filter((each) => model === undefined || each.model === model).length;
  }

  waitingOf(site: Site, model: string): Entry[] {
    return site.waiting
      .filter((each) => each.ticket.model === model)
      .toSorted((a, b) => a.ticket.arrivedAt - b.ticket.arrivedAt || a.turn - b.turn);
  }

  /** By the books: could one more request of this model start here? */
  couldStart(site: Site, model: string): boolean {
    const lane = site.plan.lanes.find((each) => each.model === model);
    return (
      lane !== undefined &&
      site.plan.available &&
      site.heldUntil === null &&
      this.runningOf(site, model) < lane.slots &&
      site.running.length < site.plan.concurrency &&
      this.runningAnywhere(model) < this.capOf(model).limit &&
      this.runningAnywhere() < this.process.limit
    );
  }

  send(site: Site, event: SchedulerEvent): void {
    const arrival = event.type === "arrive" ? event.ticket : null;
    if (event.type === "configure") site.plan = event;
    if (event.type === "timer") {
      site.timerAt = null;
      if (site.heldUntil !== null && site.heldUntil <= this.now) site.heldUntil = null;
    }
    if (event.type === "cancel") {
      site.waiting = site.waiting.filter((each) => each.ticket !== event.ticket);
      this.owed.set(event.ticket, 0);
    }
    if (event.type === "complete") {
      site.running = site.running.filter((each) => each !== event.ticket);
      site.heldUntil = event.heldUntil;
    }
    const effects = step(site.state, event, this.now);
    for (const effect of effects) this.#book(site, event, effect);
    if (arrival !== null && !decided(effects).some(([, each]) => each === arrival)) {
      this.#turn++;
      site.waiting.push({ ticket: arrival, at: this.now, turn: this.#turn });
    }
  }

  #book(site: Site, event: SchedulerEvent, effect: SchedulerEffect): void {
    if (effect.type === "timer") {
      site.timerAt = effect.at;
      return;
    }
    assert(effect.type !== "load", "loads nothing where everything counts as loaded");
    const { ticket: of } = effect;
    const isArrival = event.type === "arrive" && event.ticket === of;
    const entry = site.waiting.find((each) => each.ticket === of);
    assert.equal(isArrival, entry === undefined, "decides only on who waits or just came");
    assert.equal(this.owed.get(of), 1, `${of.id} had its decision already`);
    this.owed.set(of, 0);
    const queue = this.waitingOf(site, of.model);
    switch (effect.type) {
      case "grant":
        assert(this.couldStart(site, of.model), "grants only what may start");
        if (isArrival) assert.equal(queue.length, 0, "overtakes nobody of its model");
        else this.#checkTurn(site, of, queue);
        site.running.push(of);
        break;
      case "refuse": {
        const places = this.placesOf(of.model);
        const taken = this.sites.flatMap((each) => this.waitingOf(each, of.model)).length;
        assert(isArrival, "refuses only arrivals");
        if (effect.cause === "late") assert(!this.couldStart(site, of.model) || queue.length > 0);
        else assert(taken >= places.limit, "only when full");
        assert(effect.retryAfterMs > 0 && Number.isFinite(effect.retryAfterMs));
        break;
      }
      case "expire":
        assert(of.deadlineAt <= this.now, "expires only at the deadline");
        assert(event.type === "arrive" || event.type === "timer");
        assert(effect.retryAfterMs > 0 && Number.isFinite(effect.retryAfterMs));
        break;
      case "reselect":
        assert(["arrive", "configure", "recall", "elsewhere"].includes(event.type));
        if (event.type === "recall") assert([undefined, of.model].includes(event.model));
        this.homeless.push(of);
    }
    site.waiting = site.waiting.filter((each) => each.ticket !== of);
  }

  /** The oldest of its lane, and of all lanes whose head could start. */
  #checkTurn(site: Site, of: Ticket, queue: readonly Entry[]): void {
    assert.equal(queue[0]?.ticket, of, "first come, first served within a model");
    for (const model of MODELS) {
      const [head] = this.waitingOf(site, model);
      if (head === undefined || !this.couldStart(site, model)) continue;
      assert(of.arrivedAt <= head.ticket.arrivedAt, "the oldest head goes first");
    }
  }

  arrive(site: Site, of: Ticket): void {
    this.owed.set(of, 1);
    this.send(site, { type: "arrive", ticket: of });
  }

  /** As the fleet does after everything that may have freed a shared cap. */
  offerRoom(): void {
    for (const site of this.sites) this.send(site, { type: "room" });
  }

  advance(by: number): void {
    this.now += by;
    for (const site of this.sites) {
      while (site.timerAt !== null && site.timerAt <= this.now) this.send(site, { type: "timer" });
    }
  }

  check(): void {
    for (const site of this.sites) {
      const { state } = site;
      assert.equal(state.waiting, site.waiting.length, "waiting is the length of the queues");
      assert.equal(state.backend.used, site.running.length);
      for (const model of MODELS) {
        const lane = state.lanes.get(model);
        const queue = this.waitingOf(site, model).map((each) => each.ticket);
        assert.equal(lane?.line.waiting ?? 0, queue.length);
        assert.equal(lane?.slots.used ?? 0, this.runningOf(site, model));
        for (const [at, each] of queue.entries()) {
          assert.equal(positionOf(state, each), at, "the queue is in order of age");
        }
        assert.equal(hasRoom(state, model), queue.length === 0 && this.couldStart(site, model));
        const stuck = queue.length > 0 && this.couldStart(site, model);
        assert(!stuck, `${model} waits though it could start`);
      }
      const deadline = Math.min(...site.waiting.map((each) => each.ticket.deadlineAt));
      if (site.waiting.length > 0) {
        assert(site.timerAt !== null && site.timerAt <= deadline, "somebody waits without a timer");
        assert(deadline > this.now, "somebody waits beyond the deadline");
      }
      assert.equal(state.heldUntil, site.heldUntil);
      if (site.heldUntil !== null) {
        assert(site.timerAt !== null && site.timerAt <= site.heldUntil, "held without a timer");
        assert(site.heldUntil > this.now, "held beyond its time");
      }
    }
    for (const model of MODELS) {
      const waiting = this.sites.flatMap((site) => this.waitingOf(site, model));
      assert.equal(this.placesOf(model).used, waiting.length);
      assert.equal(this.capOf(model).used, this.runningAnywhere(model));
    }
    assert.equal(this.process.used, this.runningAnywhere());
    const owing = [...this.owed].filter(([, count]) => count === 1).map(([of]) => of);
    const waiting = this.sites.flatMap((site) => site.waiting.map((each) => each.ticket));
    assert.deepEqual(new Set(owing), new Set(waiting), "whoever has no decision yet waits");
  }
}

const nat = (max: number) => fc.nat({ max });

const anyEvent = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({
      type: fc.constant("arrive" as const),
      site: nat(BACKENDS - 1),
      model: fc.constantFrom(...MODELS),
      age: nat(300),
      patience: nat(800),
    }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      type: fc.constant("complete" as const),
      pick: nat(50),
      serviceMs: fc.option(fc.integer({ min: 1, max: 5000 })),
      /** The engine is too busy, for so long. */
      holdMs: fc.option(fc.integer({ min: 1, max: 1000 }), { freq: 2 }),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({ type: fc.constant("cancel" as const), pick: nat(50) }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      type: fc.constant("configure" as const),
      site: nat(BACKENDS - 1),
      available: fc.boolean().map((drained) => !drained),
      concurrency: fc.constantFrom(0, 1, 2, 4, Infinity),
      lanes: fc.subarray([...MODELS]),
      slots: fc.array(fc.integer({ min: 1, max: 3 }), { minLength: 3, maxLength: 3 }),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      type: fc.constant("cap" as const),
      model: fc.constantFrom(...MODELS),
      limit: fc.constantFrom(1, 2, 5, Infinity),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      type: fc.constant("recall" as const),
      site: nat(2),
      model: fc.option(fc.constantFrom(...MODELS)),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      type: fc.constant("elsewhere" as const),
      site: nat(2),
      model: fc.constantFrom(...MODELS),
    }),
  },
  {
    weight: 4,
    arbitrary: fc.record({ type: fc.constant("settle" as const), pick: nat(50), site: nat(2) }),
  },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("timer" as const), site: nat(2) }) },
  { weight: 4, arbitrary: fc.record({ type: fc.constant("advance" as const), by: nat(400) }) },
);
type Happening = typeof anyEvent extends fc.Arbitrary<infer Event> ? Event : never;

function happen(world: World, event: Happening): void {
  switch (event.type) {
    case "arrive": {
      const arrivedAt = world.now - event.age;
      const of = ticket(event.model, arrivedAt, arrivedAt + event.patience);
      world.arrive(world.site(event.site), of);
      break;
    }
    case "complete": {
      const all = world.sites.flatMap((site) => site.running.map((of) => ({ site, of })));
      const chosen = all[event.pick % Math.max(1, all.length)];
      if (chosen === undefined) break;
      const { serviceMs, holdMs } = event;
      const heldUntil = holdMs === null ? null : world.now + holdMs;
      const tokens = serviceMs;
      const ticket = chosen.of;
      world.send(chosen.site, { type: "complete", ticket, serviceMs, tokens, heldUntil });
      break;
    }
    case "cancel": {
      const all = world.sites.flatMap((site) => site.waiting.map((each) => ({ site, each })));
      const chosen = all[event.pick % Math.max(1, all.length)];
      if (chosen === undefined) break;
      world.send(chosen.site, { type: "cancel", ticket: chosen.each.ticket });
      break;
    }
    case "configure": {
      const { available, concurrency } = event;
      const lanes = event.lanes.map((model, at): LanePlan => {
        const shared = [world.capOf(model), world.process];
        return { model, slots: event.slots[at] ?? 1, shared, places: world.placesOf(model) };
      });
      world.send(world.site(event.site), { type: "configure", available, concurrency, lanes });
      break;
    }
    case "cap":
      world.capOf(event.model).limit = event.limit;
      break;
    case "recall": {
      const { model } = event;
      world.send(world.site(event.site), { type: "recall", ...(model === null ? {} : { model }) });
      break;
    }
    case "timer":
      world.send(world.site(event.site), { type: "timer" });
      break;
    case "elsewhere":
      world.send(world.site(event.site), { type: "elsewhere", model: event.model });
      break;
    case "settle": {
      const [of] = world.homeless.splice(event.pick % Math.max(1, world.homeless.length), 1);
      if (of !== undefined) world.arrive(world.site(event.site), of);
      break;
    }
    case "advance":
      world.advance(event.by);
  }
  world.offerRoom();
}

/** Lanes for everybody, so that a run does not begin with nothing but reselections. */
function openWorld(processLimit: number): World {
  const world = new World(processLimit);
  for (const site of world.sites) {
    const lanes = MODELS.map((model): LanePlan => {
      const shared = [world.capOf(model), world.process];
      return { model, slots: 2, shared, places: world.placesOf(model) };
    });
    world.send(site, { type: "configure", available: true, concurrency: 4, lanes });
  }
  return world;
}

const processLimits = fc.constantFrom(1, 3, 6, Infinity);

describe("any order of events", () => {
  it("keeps every cap, decides once on each arrival, serves in order, leaves nobody stuck", () => {
    fc.assert(
      fc.property(
        processLimits,
        fc.array(anyEvent, { maxLength: 80, size: "max" }),
        (processLimit, events) => {
          const world = openWorld(processLimit);
          for (const event of events) {
            happen(world, event);
            world.check();
          }
        },
      ),
      { numRuns: 300 },
    );
  });

  it("comes to rest with every counter at zero", () => {
    fc.assert(
      fc.property(
        processLimits,
        fc.array(anyEvent, { maxLength: 60, size: "max" }),
        (processLimit, events) => {
          const world = openWorld(processLimit);
          for (const event of events) happen(world, event);
          // Whatever waits is served or expires; whatever runs ends.
          for (let round = 0; world.runningAnywhere() > 0; round++) {
            assert(round < 1000, "never comes to rest");
            happen(world, { type: "complete", pick: 0, serviceMs: 10, holdMs: null });
          }
          world.advance(10_000);
          while (world.runningAnywhere() > 0) {
            happen(world, { type: "complete", pick: 0, serviceMs: 10, holdMs: null });
          }
          world.check();
          const caps = [...world.caps.values(), ...world.places.values(), world.process];
          assert.deepEqual(
            caps.map((cap) => cap.used),
            caps.map(() => 0),
          );
          for (const { state } of world.sites) {
            assert.deepEqual([state.waiting, state.backend.used], [0, 0]);
            for (const lane of state.lanes.values()) {
              const { running, waiting } = lane.line;
              assert.deepEqual([lane.slots.used, running, waiting], [0, 0, 0]);
            }
          }
          assert.deepEqual(
            [...world.owed.values()].filter((count) => count !== 0),
            [],
          );
        },
      ),
      { numRuns: 150 },
    );
  });

  it("does the same again for the same events", () => {
    fc.assert(
      fc.property(fc.array(anyEvent, { maxLength: 40, size: "max" }), (events) => {
        const run = () => {
          tickets = 0;
          const world = openWorld(3);
          for (const event of events) happen(world, event);
          return world.sites.map(({ waiting, running, timerAt }) => ({
            waiting: waiting.map((each) => each.ticket.id),
            running: running.map((each) => each.id),
            timerAt,
          }));
        };
        assert.deepEqual(run(), run());
      }),
    );
  });
});
