/** A client that does not read must cost neither memory nor the engine's whole output. */
import assert from "node:assert/strict";
import test from "node:test";
import { sleep, until } from "../support/client.ts";
import { startGateway } from "../support/gateway.ts";
import {
  ask,
  chat,
  chunk,
  delta,
  runNaive,
  startUpstream,
  STREAM_HEAD,
  type UpstreamRequest,
} from "./rig.ts";

const FLOOD_BYTES = 100_000_000;
const BOUND_BYTES = 30_000_000;

/** Sends up to 100 MB of events, half a megabyte a time, as fast as the socket takes them; counts what it took. */
async function startFlood() {
  const event = chunk(delta("x".repeat(8000)).repeat(64));
  let taken = 0;
  async function flood({ socket, isClosed }: UpstreamRequest): Promise<void> {
    taken = 0;
    socket.write(STREAM_HEAD);
    while (taken < FLOOD_BYTES && !isClosed()) {
      if (!socket.write(event)) await until(() => !socket.writableNeedDrain || isClosed(), 30_000);
      taken += event.length;
    }
  }
  const upstream = await startUpstream(flood);
  return { upstream, taken: () => taken };
}

for (const form of ["push", "tee"]) {
  test(
    `a ${form} relay swallows 100 MB for a client that does not read`,
    { timeout: 60_000 },
    async () => {
      const { upstream, taken } = await startFlood();
      const naive = await runNaive("push-relay", upstream.url, { args: [form] });
      try {
        const client = await ask(naive.port, chat(true));
        client.pause();
        assert.ok(await until(() => taken() >= FLOOD_BYTES, 25_000), `took ${taken()} bytes`);
        client.leave("close");
      } finally {
        await naive.stop();
        await upstream.stop();
      }
    },
  );
}

test("the gateway takes less than 30 MB for it", { timeout: 60_000 }, async () => {
  const { upstream, taken } = await startFlood();
  const gateway = await startGateway({
    config: { backends: [{ id: "raw", kind: "openai", url: upstream.url, models: ["m"] }] },
  });
  try {
    const client = await ask(gateway.port, chat(true));
    client.pause();
    assert.ok(await until(() => taken() > 1_000_000), `took ${taken()} bytes`);
    let last = -1;
    while (last !== taken() && taken() < BOUND_BYTES) {
      last = taken();
      await sleep(1500);
    }
    assert.ok(taken() < BOUND_BYTES, `took ${taken()} bytes`);
    client.leave("close");
    assert.ok(await until(() => upstream.posts[0]?.isClosed() === true));
  } finally {
    await gateway.stop("SIGKILL");
    await upstream.stop();
  }
});
