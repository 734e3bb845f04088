/** Budgets: nothing beyond the limit but what was reserved too low, and every wait is exact. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  book,
  keyOf,
  lengthOf,
  limitsOf,
  refusalOf,
  reserve,
  settle,
  statesOf,
  type Accounts,
  type Limit,
} from "../../src/core/budget.ts";
import { Estimates } from "../../src/core/estimate.ts";

const START = Date.UTC(2026, 10, 22, 12);
const DAY_MS = 86_400_000;

function tokens(amount: number, window: string): Limit {
  return { unit: "tokens", amount, window };
}

function requests(amount: number): Limit {
  return { unit: "requests", amount, window: "1m" };
}

function copy(accounts: Accounts): Accounts {
  return new Map([...accounts].map(([key, account]) => [key, { ...account }]));
}

/** Grants, or says for how long not. */
function ask(accounts: Accounts, limits: Limit[], cost: number, now = START): number {
  const verdict = reserve(accounts, limits, cost, now);
  return verdict.granted ? 0 : verdict.retryAfterMs;
}

describe("limits", () => {
  it("are a tenant's budgets and its rate, the tighter of two with the same window", () => {
    const budgets = [
      { tokens: 500, window: "1m" },
      { tokens: 400, window: "1m" },
      { tokens: 9000, window: "day" },
    ];
    assert.deepEqual(limitsOf({ requestsPerMinute: 3, budgets }), [
      requests(3),
      tokens(400, "1m"),
      tokens(9000, "day"),
    ]);
    assert.deepEqual(limitsOf({ budgets: [] }), []);
  });

  it("have windows that slide, and those of the calendar", () => {
    const lengths = ["90s", "5m", "1h", "day", "month"].map(lengthOf);
    assert.deepEqual(lengths, [90_000, 300_000, 3_600_000, null, null]);
  });
});

describe("a window that slides", () => {
  it("gives all of it at once, and then as fast as it forgets", () => {
    for (const amount of [1, 7, 70, 700]) {
      const accounts: Accounts = new Map();
      for (let at = 0; at < amount; at++) assert.equal(ask(accounts, [requests(amount)], 0), 0);
      assert.equal(ask(accounts, [requests(amount)], 0), Math.ceil(60_000 / amount - 0.5));
    }
  });

  it("shows what is left, in whole units", () => {
    const accounts: Accounts = new Map();
    const limits = [requests(7), tokens(1000, "1m")];
    ask(accounts, limits, 250);
    assert.deepEqual(
      statesOf(accounts, limits, START).map(({ used, remaining }) => [used, remaining]),
      [
        [1, 6],
        [250, 750],
      ],
    );
    const [, later] = statesOf(accounts, limits, START + 9000);
    assert.deepEqual([later?.used, later?.remaining, later?.resetMs], [100, 900, 6000]);
    const [, last] = statesOf(accounts, limits, START + 60_000);
    assert.deepEqual([last?.used, last?.remaining, last?.resetMs], [0, 1000, 0]);
  });

  it("admits what can never fit when nothing else is charged, and then waits for it", () => {
    const accounts: Accounts = new Map();
    const limit = tokens(1000, "1m");
    assert.equal(ask(accounts, [limit], 5000), 0);
    assert.equal(ask(accounts, [limit], 5000), 300_000);
    assert.equal(ask(accounts, [limit], 1), 240_060);
    assert.equal(ask(accounts, [limit], 5000, START + 300_000), 0);
  });

  it("keeps what was used when its amount changes", () => {
    const accounts: Accounts = new Map();
    ask(accounts, [tokens(1000, "1m")], 500);
    for (const amount of [4000, 100, 1000]) {
      assert.equal(statesOf(accounts, [tokens(amount, "1m")], START)[0]?.used, 500);
    }
    assert.equal(ask(accounts, [tokens(4000, "1m")], 3500), 0);
    assert.equal(statesOf(accounts, [tokens(1000, "1m")], START)[0]?.used, 4000);
  });
});

describe("the calendar", () => {
  const midnight = Date.UTC(2026, 10, 23);

  it("counts until its end, and from then on anew", () => {
    const accounts: Accounts = new Map();
    const limit = tokens(1000, "day");
    assert.equal(ask(accounts, [limit], 900), 0);
    assert.equal(ask(accounts, [limit], 101), midnight - START);
    assert.equal(ask(accounts, [limit], 100, midnight - 1), 0);
    assert.equal(ask(accounts, [limit], 1000, midnight), 0);
    assert.equal(statesOf(accounts, [limit], midnight)[0]?.resetMs, DAY_MS);
  });

  it("keeps what was used in a period that is over: a late refund gives nothing to the next", () => {
    const accounts: Accounts = new Map();
    const limit = tokens(1000, "day");
    ask(accounts, [limit], 900, midnight - 1000);
    ask(accounts, [limit], 300, midnight);
    settle(accounts, [limit], { tokens: 900, at: midnight - 1000 }, 100, midnight + 1);
    assert.equal(statesOf(accounts, [limit], midnight + 1)[0]?.used, 300);
    settle(accounts, [limit], { tokens: 300, at: midnight }, 100, midnight + 1);
    assert.equal(statesOf(accounts, [limit], midnight + 1)[0]?.used, 100);
  });

  it("ends where the calendar says, day and month", () => {
    const anyTime = fc.integer({ min: 0, max: Date.UTC(2500, 0) });
    fc.assert(
      fc.property(anyTime, (now) => {
        const date = new Date(now);
        const [day, month] = statesOf(new Map(), [tokens(1, "day"), tokens(1, "month")], now);
        const [year, of, on] = [date.getUTCFullYear(), date.getUTCMonth(), date.getUTCDate()];
        assert.equal(now + (day?.resetMs ?? 0), Date.UTC(year, of, on + 1));
        assert.equal(now + (month?.resetMs ?? 0), Date.UTC(year, of + 1));
      }),
      { numRuns: 5000 },
    );
    for (let year = 1970; year < 2410; year++) {
      for (const [month, day] of [
        [1, 28],
        [2, 1],
        [11, 31],
      ] as const) {
        const now = Date.UTC(year, month, day);
        const [state] = statesOf(new Map(), [tokens(1, "month")], now);
        assert.equal(now + (state?.resetMs ?? 0), Date.UTC(year, month + 1), `${year}-${month}`);
      }
    }
  });
});

describe("whatever is reserved, settled and waited for", () => {
  const anyLimit: fc.Arbitrary<Limit> = fc.record({
    unit: fc.constantFrom("requests" as const, "tokens" as const),
    amount: fc.integer({ min: 1, max: 100_000 }),
    window: fc.constantFrom("10s", "90s", "1m", "7m", "2h", "day", "month"),
  });
  const anyLimits = fc.uniqueArray(anyLimit, { selector: keyOf, minLength: 1, maxLength: 4 });
  type Event =
    | { type: "reserve"; tokens: number }
    | { type: "settle"; which: number; tokens: number }
    | { type: "wait"; ms: number };
  const cost = fc.oneof(fc.nat(2000), fc.nat(150_000));
  const event: fc.Arbitrary<Event> = fc.oneof(
    { weight: 3, arbitrary: fc.record({ type: fc.constant("reserve" as const), tokens: cost }) },
    {
      weight: 2,
      arbitrary: fc.record({
        type: fc.constant("settle" as const),
        which: fc.nat(20),
        tokens: cost,
      }),
    },
    {
      weight: 1,
      arbitrary: fc.record({
        type: fc.constant("wait" as const),
        ms: fc.oneof(fc.nat(30_000), fc.nat(3 * DAY_MS)),
      }),
    },
  );
  const events = fc.array(event, { maxLength: 120 });
  const anyStart = fc.integer({ min: Date.UTC(2020, 0), max: Date.UTC(2040, 0) });

  it("a refusal changes nothing, and its time is exact", () => {
    let refusals = 0;
    fc.assert(
      fc.property(anyLimits, events, anyStart, (limits, list, start) => {
        const accounts: Accounts = new Map();
        let now = start;
        for (const each of list) {
          if (each.type === "wait") now += each.ms;
          if (each.type !== "reserve") continue;
          const before = copy(accounts);
          const verdict = reserve(accounts, limits, each.tokens, now);
          if (verdict.granted) continue;
          refusals++;
          assert.deepEqual(accounts, before);
          assert(limits.includes(verdict.limit));
          const readyAt = now + verdict.retryAfterMs;
          assert.equal(refusalOf(accounts, limits, each.tokens, readyAt), null);
          assert.equal(refusalOf(accounts, limits, each.tokens, readyAt - 1)?.retryAfterMs, 1);
        }
      }),
      { numRuns: 1000 },
    );
    assert(refusals > 200, `only ${refusals} refusals were looked at`);
  });

  it("no more is charged than the limit over the time, and what was reserved too low", () => {
    fc.assert(
      fc.property(anyLimits, events, anyStart, (limits, list, start) => {
        const accounts: Accounts = new Map();
        const open: { tokens: number; at: number }[] = [];
        const tally = new Map(limits.map((limit) => [limit, { net: 0, tooLow: 0 }]));
        let now = start;
        for (const each of list) {
          if (each.type === "wait") now += each.ms;
          if (each.type === "reserve") {
            // What never fits is admitted on purpose, see above.
            const fits = limits.every(({ unit, amount }) =>
              unit === "tokens" ? each.tokens <= amount : true,
            );
            if (!fits || !reserve(accounts, limits, each.tokens, now).granted) continue;
            open.push({ tokens: each.tokens, at: now });
            for (const [{ unit }, sums] of tally) sums.net += unit === "tokens" ? each.tokens : 1;
          }
          if (each.type === "settle") {
            const [reserved] = open.splice(each.which % Math.max(1, open.length), 1);
            if (reserved === undefined) continue;
            settle(accounts, limits, reserved, each.tokens, now);
            for (const [{ unit }, sums] of tally) {
              if (unit === "requests") continue;
              sums.net += each.tokens - reserved.tokens;
              sums.tooLow += Math.max(0, each.tokens - reserved.tokens);
            }
          }
          for (const [{ amount, window }, { net, tooLow }] of tally) {
            const length = lengthOf(window);
            const periods =
              length === null
                ? periodsFrom(start, now, window)
                : 1 + (now - start) / length + 1 / length;
            assert(net <= amount * periods + tooLow + 1e-6, `${net} of ${amount} × ${periods}`);
          }
        }
      }),
      { numRuns: 1000 },
    );
  });

  /** Days or months that the time between touches. */
  function periodsFrom(start: number, end: number, window: string): number {
    if (window === "day") return Math.floor(end / DAY_MS) - Math.floor(start / DAY_MS) + 1;
    const months = (at: number) => new Date(at).getUTCFullYear() * 12 + new Date(at).getUTCMonth();
    return months(end) - months(start) + 1;
  }

  const reservation = fc.record({ reserved: cost, actual: cost });

  it("the order of settlements does not matter, and refunds give back all that was reserved", () => {
    const reservations = fc.array(reservation, { minLength: 1, maxLength: 12 });
    fc.assert(
      fc.property(anyLimits, reservations, fc.infiniteStream(fc.nat()), (limits, list, ranks) => {
        const accounts: Accounts = new Map();
        const granted = list.filter(({ reserved }) => ask(accounts, limits, reserved) === 0);
        const usedAfter = (order: typeof list) => {
          const own = copy(accounts);
          for (const { reserved, actual } of order) {
            settle(own, limits, { tokens: reserved, at: START }, actual, START);
          }
          return statesOf(own, limits, START).map(({ used }) => used);
        };
        const shuffled = granted
          .map((each) => ({ each, rank: ranks.next().value }))
          .toSorted((one, other) => one.rank - other.rank)
          .map(({ each }) => each);
        assert.deepEqual(usedAfter(shuffled), usedAfter(granted));
        const nothing = usedAfter(granted.map(({ reserved }) => ({ reserved, actual: 0 })));
        for (const [index, { unit }] of limits.entries()) {
          assert.equal(nothing[index], unit === "tokens" ? 0 : granted.length);
        }
      }),
      { numRuns: 1000 },
    );
  });

  it("a late refund gives no more credit than was reserved", () => {
    fc.assert(
      fc.property(anyLimit, cost, events, fc.nat(), ({ amount, window }, reserved, list, on) => {
        const limits = [tokens(amount, window)];
        const [granted, without]: [Accounts, Accounts] = [new Map(), new Map()];
        book(granted, limits, reserved, START);
        let now = START;
        for (const [index, each] of list.entries()) {
          if (each.type === "wait") now += each.ms;
          if (index === on % list.length) {
            settle(granted, limits, { tokens: reserved, at: START }, 0, now);
          }
          if (each.type !== "reserve") continue;
          if (reserve(granted, limits, each.tokens, now).granted) {
            book(without, limits, each.tokens, now);
          }
          const [one] = statesOf(granted, limits, now);
          const [other] = statesOf(without, limits, now);
          assert((one?.used ?? 0) >= (other?.used ?? 0) - reserved - 1);
        }
      }),
      { numRuns: 1000 },
    );
  });
});

/** A few clients that never rest, on a virtual clock. */
describe("20 clients at once", () => {
  interface Tally {
    settled: number;
    /** The most tokens that one reservation was too low. */
    worst: number;
    /** Likewise all that were open at the same time. */
    worstTogether: number;
  }

  /** Outputs are skewed, and the longer ones take longer: those are open in the end. */
  function simulate(limit: Limit, lastsMs: number, seed: number): Tally {
    const accounts: Accounts = new Map();
    const estimates = new Estimates();
    const tally: Tally = { settled: 0, worst: 0, worstTogether: 0 };
    const open = new Set<{ tooLow: number }>();
    const random = mulberry(seed);
    const agenda: { at: number; run: (now: number) => void }[] = [];
    const later = (at: number, run: (now: number) => void) => {
      if (at < START + lastsMs) agenda.push({ at, run });
    };
    const client = (now: number): void => {
      const prompt = { bytes: 200 + Math.floor(random() * 800), messages: 2, images: 0 };
      const reserved = estimates.prompt("m", prompt) + estimates.output("t", "m", null, null);
      const verdict = reserve(accounts, [limit], reserved, now);
      if (!verdict.granted) {
        return later(now + verdict.retryAfterMs + Math.floor(random() * 200), client);
      }
      const input = Math.ceil(prompt.bytes * 0.24) + 8;
      const output = Math.ceil(60 * Math.exp(0.6 * gauss(random)));
      const request = { tooLow: Math.max(0, input + output - reserved) };
      open.add(request);
      const together = [...open].reduce((sum, { tooLow }) => sum + tooLow, 0);
      tally.worst = Math.max(tally.worst, request.tooLow);
      tally.worstTogether = Math.max(tally.worstTogether, together);
      agenda.push({
        at: now + 200 + output * 10,
        run(end) {
          settle(accounts, [limit], { tokens: reserved, at: now }, input + output, end);
          estimates.learnPrompt("m", prompt, input);
          estimates.learnOutput("t", "m", output);
          tally.settled += input + output;
          open.delete(request);
          later(end, client);
        },
      });
    };
    for (let at = 0; at < 20; at++) later(START + at, client);
    while (agenda.length > 0) {
      const next = agenda.reduce((one, other) => (other.at < one.at ? other : one));
      agenda.splice(agenda.indexOf(next), 1);
      next.run(next.at);
    }
    return tally;
  }

  it("use 95 % of a day's budget at least, and beyond it only what the last ones were too low", () => {
    for (let seed = 1; seed <= 20; seed++) {
      const amount = 30_000;
      const { settled, worstTogether } = simulate(tokens(amount, "day"), DAY_MS / 2 - 1, seed);
      assert(settled <= amount + worstTogether, `${settled} of ${amount}, seed ${seed}`);
      assert(settled >= 0.95 * amount, `${settled} of ${amount}, seed ${seed}`);
    }
  });

  it("use 95 % of a window that slides, and no more than it lets through and one error", () => {
    for (let seed = 1; seed <= 5; seed++) {
      const windows = 10;
      const amount = 10_000;
      const { settled, worst } = simulate(tokens(amount, "1m"), windows * 60_000, seed);
      assert(settled <= amount * (windows + 1) + worst, `${settled}, seed ${seed}`);
      assert(settled >= 0.95 * amount * windows, `${settled}, seed ${seed}`);
    }
  });

  function mulberry(seed: number): () => number {
    let state = seed;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** Box and Muller. */
  function gauss(random: () => number): number {
    return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  }
});
