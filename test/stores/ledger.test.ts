/** The ledger in memory: reserve, settle, report, and nothing left over. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import type { Limit } from "../../src/core/budget.ts";
import { MemoryLedger, type Booking, type Reservation } from "../../src/stores/ledger.ts";

const START = Date.UTC(2026, 10, 22, 12);
const limits: Limit[] = [
  { unit: "requests", amount: 100, window: "1m" },
  { unit: "tokens", amount: 1000, window: "1m" },
  { unit: "tokens", amount: 5000, window: "day" },
];

function setUp() {
  const clock = { now: START };
  return { clock, ledger: new MemoryLedger(() => clock.now) };
}

function granted(booking: Booking): Reservation {
  assert(booking.granted);
  return booking.reservation;
}

describe("the ledger in memory", () => {
  it("reserves and settles", () => {
    const { ledger } = setUp();
    const booking = ledger.reserve("t", limits, 600);
    const left = booking.states.map(({ remaining }) => remaining);
    assert.deepEqual(left, [99, 400, 4400]);
    const refusal = ledger.reserve("t", limits, 500);
    assert(!refusal.granted);
    assert.deepEqual([refusal.limit, refusal.retryAfterMs], [limits[1], 6000]);
    ledger.settle(granted(booking), 100);
    assert(ledger.reserve("t", limits, 500).granted);
  });

  it("keeps tenants apart", () => {
    const { ledger } = setUp();
    assert(ledger.reserve("t", limits, 1000).granted);
    assert(ledger.reserve("u", limits, 1000).granted);
    assert(!ledger.reserve("t", limits, 1).granted);
  });

  it("settles once", () => {
    const { ledger } = setUp();
    const reservation = granted(ledger.reserve("t", limits, 600));
    ledger.settle(reservation, 500);
    ledger.settle(reservation, 0);
    assert.equal(ledger.report("t", limits)[0]?.used, 500);
  });

  it("reports token budgets: used, reserved, and when they are whole again", () => {
    const { ledger, clock } = setUp();
    const reservation = granted(ledger.reserve("t", limits, 600));
    ledger.settle(granted(ledger.reserve("t", limits, 300)), 200);
    const midnight = Date.UTC(2026, 10, 23);
    assert.deepEqual(ledger.report("t", limits), [
      { window: "1m", limit: 1000, used: 200, reserved: 600, resetAt: START + 48_000 },
      { window: "day", limit: 5000, used: 200, reserved: 600, resetAt: midnight },
    ]);
    clock.now += 36_000;
    assert.deepEqual(
      ledger.report("t", limits).map(({ used, reserved }) => [used, reserved]),
      [
        [0, 200],
        [200, 600],
      ],
    );
    ledger.settle(reservation, 600);
    const unused = { window: "day", limit: 5000, used: 0, reserved: 0, resetAt: midnight };
    assert.deepEqual(ledger.report("u", limits)[1], unused);
  });

  it("takes over what somebody else has counted", () => {
    const { ledger } = setUp();
    granted(ledger.reserve("t", limits, 600));
    const counted = new Map([["tokens:day", { until: START + 1000, used: 4900, amount: 5000 }]]);
    ledger.learn("t", limits, counted);
    assert.deepEqual(
      ledger.reserve("t", limits, 101).states.map(({ used }) => used),
      [0, 0, 4900],
    );
  });

  it("grants where there is no limit", () => {
    const { ledger } = setUp();
    const booking = ledger.reserve("t", [], 1e9);
    assert.deepEqual(booking.states, []);
    ledger.settle(granted(booking), 5);
  });

  it("forgets, and loses nothing by it", () => {
    const { ledger, clock } = setUp();
    const [, minute, day] = limits;
    assert(minute !== undefined && day !== undefined);
    for (let at = 0; at < 1000; at++) granted(ledger.reserve(`t${at}`, [minute], 10));
    const open = granted(ledger.reserve("open", [minute, day], 900));
    clock.now += 600_000;
    granted(ledger.reserve("open", [minute, day], 900));
    ledger.settle(open, 1000);
    assert.deepEqual(
      ledger.report("open", [minute, day]).map(({ used, reserved }) => used + reserved),
      [1000, 1900],
    );
  });
});
