/** What the shared ledger does while Redis is away, or does not say whether it has heard. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import type { Redis } from "ioredis";
import type { Limit } from "../../src/core/budget.ts";
import type { Booking, Reservation } from "../../src/stores/ledger.ts";
import { RedisLedger, RESERVE, SETTLE } from "../../src/stores/redis-ledger.ts";

const START = Date.UTC(2026, 10, 22, 12);
const MIDNIGHT = Date.UTC(2026, 10, 23);
const rate: Limit = { unit: "requests", amount: 10, window: "1m" };
const perMinute: Limit = { unit: "tokens", amount: 1000, window: "1m" };
const perDay: Limit = { unit: "tokens", amount: 5000, window: "day" };
const limits = [rate, perMinute, perDay];

interface Call {
  script: "reserve" | "settle" | "other";
  record: string;
  first: number;
  costs: number[];
}

/** A link whose Redis notes what it is asked, and says what it is told to say. */
function setUp(peers = 2) {
  const calls: Call[] = [];
  const listeners: (() => void)[] = [];
  const state = {
    isUp: false,
    clock: START,
    /** Answers of the server; null: too late. */
    answer: (): unknown => [1, START, ...limits.flatMap(() => ["0", "0"])],
  };
  const redis = {
    evalsha: async (sha: string, count: number, ...rest: (string | number)[]) => {
      const args = rest.slice(count).map(Number);
      calls.push({
        script: sha === RESERVE.sha ? "reserve" : sha === SETTLE.sha ? "settle" : "other",
        record: String(rest[0]),
        first: args[0] ?? 0,
        costs: args.filter((_, index) => index > 0 && index % 4 === 0),
      });
      return state.answer();
    },
  } as unknown as Redis;
  const link = {
    prefix: "p:",
    peers,
    get isUp() {
      return state.isUp;
    },
    onPing: (listener: () => void) => void listeners.push(listener),
    ask: async <Reply>(command: (redis: Redis) => Promise<Reply>): Promise<Reply | null> =>
      state.isUp ? await command(redis) : null,
  };
  const ledger = new RedisLedger(link, () => state.clock);
  const ping = async () => {
    state.isUp = true;
    for (const listener of listeners) listener();
    await settled();
  };
  return { ledger, calls, state, ping };
}

/** Lets what nobody waits for happen. */
function settled(): Promise<void> {
  return new Promise((resolve) => void setTimeout(resolve, 5));
}

function granted(booking: Booking): Reservation {
  assert(booking.granted);
  return booking.reservation;
}

/** An account of each limit, in the words of the script. */
function accounts(rateUntil: number, minuteUntil: number, usedToday: number): unknown[] {
  return [String(rateUntil), "0", String(minuteUntil), "0", String(MIDNIGHT), String(usedToday)];
}

describe("while Redis is away", () => {
  it("a gateway hands out its share, without waiting", () => {
    const { ledger } = setUp();
    const booking = ledger.reserve("t", limits, 500);
    assert(!(booking instanceof Promise));
    assert(booking.granted);
    const refusal = ledger.reserve("t", limits, 1);
    assert(!(refusal instanceof Promise) && !refusal.granted);
    assert.deepEqual([refusal.limit.window, refusal.limit.amount], ["1m", 500]);
    assert.equal(refusal.retryAfterMs, 120);
  });

  it("a share is one at least", () => {
    const { ledger } = setUp(50);
    const few = [{ ...rate, amount: 3 }];
    assert.equal((ledger.reserve("t", few, 1) as Booking).granted, true);
    assert.equal((ledger.reserve("t", few, 1) as Booking).granted, false);
  });

  it("its share is one of what was left", async () => {
    const { ledger, state } = setUp();
    state.isUp = true;
    // 400 of the minute's, 4001 of the day's are used, by whomever.
    state.answer = () => [1, START, ...accounts(0, START + 24_000, 4001)];
    granted(await ledger.reserve("t", limits, 100));
    state.isUp = false;
    const refusal = await ledger.reserve("t", limits, 301);
    assert(!refusal.granted);
    assert.deepEqual([refusal.limit.window, refusal.retryAfterMs], ["1m", 120]);
    granted(await ledger.reserve("t", limits, 300));
    state.clock += 60_000;
    assert((await ledger.reserve("t", limits, 199)).granted);
    const [, today] = (await ledger.reserve("t", limits, 1)).states.slice(1);
    assert.deepEqual([today?.used, today?.remaining], [2500, 0]);
  });

  it("what was taken is owed, and paid once Redis is back", async () => {
    const { ledger, calls, state, ping } = setUp();
    const first = granted(await ledger.reserve("t", limits, 100));
    const open = granted(await ledger.reserve("t", limits, 50));
    ledger.settle(first, 80);
    state.clock += 1000;
    await ping();
    // Requests and the minute have gone on at the share's pace: 5 and 500 a minute.
    assert.deepEqual(
      calls.map(({ script, costs }) => [script, costs]),
      [["settle", [2, 122, 130]]],
    );
    ledger.settle(open, 70);
    await settled();
    assert.deepEqual(calls[1]?.costs, [0, 20, 20], "the debt had the estimate");
    await ping();
    assert.equal(calls.length, 2);
  });

  it("what Redis has granted is settled when it is back", async () => {
    const { ledger, calls, state, ping } = setUp();
    state.isUp = true;
    const reservation = granted(await ledger.reserve("t", limits, 100));
    state.isUp = false;
    ledger.settle(reservation, 60);
    ledger.settle(reservation, 0);
    await settled();
    await ping();
    assert.equal(calls.length, 2);
    assert.deepEqual([calls[1]?.script, calls[1]?.costs], ["settle", [1, 60, 60]]);
    assert.equal(calls[0]?.record, calls[1]?.record);
  });
});

describe("an answer that does not come in time", () => {
  it("is granted by the share, and settled under its id with all that it took", async () => {
    const { ledger, calls, state } = setUp();
    state.isUp = true;
    state.answer = () => null;
    const reservation = granted(await ledger.reserve("t", limits, 100));
    const refusal = await ledger.reserve("t", limits, 401);
    assert(!refusal.granted);
    state.answer = () => [1, START, ...limits.flatMap(() => ["0", "0"])];
    ledger.settle(reservation, 60);
    await settled();
    const [reserved, refused, cancelled, settlement] = calls;
    assert.deepEqual([reserved?.first, reserved?.costs], [100, [1, 100, 100]]);
    assert.equal(refused?.record, cancelled?.record);
    assert.deepEqual([cancelled?.script, cancelled?.costs], ["settle", [0, 0, 0]]);
    assert.equal(reserved?.record, settlement?.record);
    assert.deepEqual(settlement?.costs, [1, 60, 60]);
  });

  it("to a settlement makes it come again, in pieces, until it is answered", async () => {
    const { ledger, calls, state, ping } = setUp();
    const one: Limit[] = [{ ...perDay, amount: 1e6 }];
    state.isUp = true;
    state.answer = () => [1, START, "0", "0"];
    const reservations = await Promise.all(
      Array.from({ length: 250 }, async () => granted(await ledger.reserve("t", one, 1))),
    );
    state.answer = () => null;
    for (const reservation of reservations) ledger.settle(reservation, 2);
    await settled();
    calls.length = 0;
    await ping();
    assert.equal(calls.length, 100, "one piece is enough to see that there is no answer");
    calls.length = 0;
    state.answer = () => [1, START, "0", "0"];
    await ping();
    assert.equal(calls.length, 250);
    assert.equal(new Set(calls.map(({ record }) => record)).size, 250);
    await ping();
    assert.equal(calls.length, 250);
  });
});

describe("while Redis answers", () => {
  it("its refusal is passed on, with the time that core/budget.ts says", async () => {
    const { ledger, state } = setUp();
    state.isUp = true;
    state.answer = () => [0, START, ...accounts(0, START + 60_000, 10)];
    const refusal = await ledger.reserve("t", limits, 100);
    assert(!refusal.granted);
    assert.deepEqual([refusal.limit, refusal.retryAfterMs], [perMinute, 6000]);
  });

  it("keys say what they are for, in one slot for each tenant", async () => {
    const { ledger, calls, state } = setUp();
    state.isUp = true;
    await ledger.reserve("t", limits, 100);
    assert.match(calls[0]?.record ?? "", /^p:budget:\{t\}:reservation:[0-9a-f-]{36}$/);
  });

  it("is not asked where there is no limit", async () => {
    const { ledger, calls, state } = setUp();
    state.isUp = true;
    const reservation = granted(await ledger.reserve("t", [], 100));
    ledger.settle(reservation, 5);
    await settled();
    assert.deepEqual(calls, []);
  });

  it("a report has its accounts, and this gateway's reservations", async () => {
    const { ledger, state } = setUp();
    state.isUp = true;
    granted(await ledger.reserve("t", limits, 100));
    granted(await ledger.reserve("other", limits, 100));
    state.answer = () => [1, START, ...accounts(0, START + 15_000, 900)];
    assert.deepEqual(await ledger.report("t", limits), [
      { window: "1m", limit: 1000, used: 150, reserved: 100, resetAt: START + 15_000 },
      { window: "day", limit: 5000, used: 800, reserved: 100, resetAt: MIDNIGHT },
    ]);
    state.isUp = false;
    const [, today] = await ledger.report("t", limits);
    assert.deepEqual([today?.limit, today?.used], [2500, 450]);
  });
});
