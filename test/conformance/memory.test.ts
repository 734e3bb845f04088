/** Bounded memory: an engine that is faster than its clients fills no buffers (design §1.2; runtimes §b). */
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import type { RawClient } from "../support/client.ts";
import { chatBody, connect, postBytes, sleep, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";
import { runtime } from "../support/gateway.ts";

const MIB = 1024 * 1024;
const STREAM_BYTES = 200 * MIB;
const CLIENTS = 8;
const MOST_GROWTH = (runtime === "bun" ? 64 : 128) * MIB;

describe("memory", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet({ a: { behaviour: { flood: { bytes: STREAM_BYTES } } } });
  });
  after(() => fleet.close());

  const inMib = (bytes: number): string => `${Math.round(bytes / MIB)} MiB`;

  async function startReaderThatStops(): Promise<RawClient> {
    const client = await connect(fleet.gateway.port);
    client.write(postBytes("/v1/chat/completions", chatBody({ stream: true })));
    assert.ok(await until(() => client.received().length > 10_000));
    client.pause();
    return client;
  }
  const taken = (): number =>
    fleet.engines.a.inference().reduce((sum, { bytesSent }) => sum + bytesSent, 0);
  /** Until no engine byte has moved for a while. */
  async function untilStill(): Promise<void> {
    for (let last = -1; last !== taken();) {
      last = taken();
      await sleep(700);
    }
  }

  it(
    `${CLIENTS} clients that stop reading cost at most ${inMib(MOST_GROWTH)}`,
    { timeout: 60_000 },
    async () => {
      // Warm: code is compiled, the heap has its size.
      const warm = await startReaderThatStops();
      await untilStill();
      warm.leave("reset");
      assert.ok(await until(() => fleet.engines.a.activeGenerations() === 0));
      await sleep(500);

      const before = await fleet.gateway.residentBytes();
      const clients = await Promise.all(Array.from({ length: CLIENTS }, startReaderThatStops));
      let peak = 0;
      const watch = setInterval(() => {
        void fleet.gateway.residentBytes().then((bytes) => (peak = Math.max(peak, bytes)));
      }, 50);
      await untilStill();
      clearInterval(watch);
      // What is held, not what was garbage on the way there.
      let held = 0;
      for (let count = 0; count < 5; count += 1) {
        held = Math.max(held, await fleet.gateway.residentBytes());
        await sleep(100);
      }
      const growth = held - before;
      console.log(
        `memory: ${inMib(before)} grew by ${inMib(growth)} (peak ${inMib(peak - before)}), engine sent ${inMib(taken())}`,
      );
      assert.equal(fleet.engines.a.activeGenerations(), CLIENTS, "all of them still stream");
      assert.ok(taken() < (CLIENTS * STREAM_BYTES) / 4, "the engine was held back");
      assert.ok(growth <= MOST_GROWTH, `grew by ${inMib(growth)}`);

      for (const client of clients) client.leave("reset");
      assert.ok(await until(() => fleet.engines.a.activeGenerations() === 0));
      assert.ok(
        await until(async () => (await fleet.gateway.metric("tidegate_requests_in_flight")) === 0),
      );
    },
  );
});
