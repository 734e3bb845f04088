/** Bun's process-wide limit of 256 fetches in flight. */
import assert from "node:assert/strict";
import test from "node:test";
import { type RawClient, sleep, until } from "../support/client.ts";
import { startGateway } from "../support/gateway.ts";
import { ANSWER, ask, chat, isBun, runNaive, startUpstream, whole } from "./rig.ts";

const MANY = 300;

async function crowd(port: number): Promise<RawClient[]> {
  const clients: RawClient[] = [];
  for (let i = 0; i < MANY; i += 1) clients.push(await ask(port, chat(false, `number ${i}`)));
  return clients;
}

/** Holds every POST until `release`, then answers those and all later ones. */
async function startHolding() {
  let released = false;
  const upstream = await startUpstream(async ({ socket }) => {
    await until(() => released, 60_000);
    socket.write(whole(200, ANSWER));
    socket.end();
  });
  /** How many are held once so many are, and no more have come for half a second. */
  async function settled(expected: number): Promise<number> {
    await until(() => upstream.posts.length >= expected);
    let last = -1;
    while (last !== upstream.posts.length) {
      last = upstream.posts.length;
      await sleep(500);
    }
    return last;
  }
  return { upstream, settled, release: () => (released = true) };
}

// The limit is Bun's alone: runtimes.md, ten facts no. 5.
if (isBun) {
  test("Bun: 300 fetches reach the upstream as 256", { timeout: 60_000 }, async () => {
    const { upstream, settled, release } = await startHolding();
    const naive = await runNaive("many-fetches", upstream.url, {
      listens: false,
      args: [String(MANY)],
    });
    try {
      assert.equal(await settled(256), 256);
      release();
      assert.ok(await until(() => naive.output().includes("all 300 answered")));
    } finally {
      await naive.stop();
      await upstream.stop();
    }
  });

  test(
    "Bun: with BUN_CONFIG_MAX_HTTP_REQUESTS the gateway sends all 300",
    { timeout: 60_000 },
    async () => {
      const { upstream, settled, release } = await startHolding();
      const gateway = await startGateway({
        config: {
          backends: [
            { id: "raw", kind: "openai", url: upstream.url, models: ["m"], concurrency: 1000 },
          ],
        },
        env: { BUN_CONFIG_MAX_HTTP_REQUESTS: "16384" },
      });
      try {
        const clients = await crowd(gateway.port);
        assert.equal(await settled(MANY), MANY);
        release();
        assert.ok(
          await until(() => clients.every((client) => client.received().includes(" 200 ")), 20_000),
        );
      } finally {
        await gateway.stop("SIGKILL");
        await upstream.stop();
      }
    },
  );

  test(
    "Bun: without it the gateway sends at most 200, says so, and serves the rest after them",
    { timeout: 60_000 },
    async () => {
      const { upstream, settled, release } = await startHolding();
      const gateway = await startGateway({
        config: {
          backends: [
            { id: "raw", kind: "openai", url: upstream.url, models: ["m"], concurrency: 1000 },
          ],
        },
        env: { BUN_CONFIG_MAX_HTTP_REQUESTS: undefined },
      });
      try {
        const clients = await crowd(gateway.port);
        const held = await settled(100);
        assert.ok(held <= 200, `${held} at once`);
        assert.ok(held >= 100, `only ${held} at once`);
        assert.match(gateway.stderr() + gateway.stdout(), /BUN_CONFIG_MAX_HTTP_REQUESTS/);
        release();
        assert.ok(
          await until(() => clients.every((client) => client.received().includes(" 200 ")), 20_000),
        );
        assert.equal(upstream.posts.length, MANY);
      } finally {
        await gateway.stop("SIGKILL");
        await upstream.stop();
      }
    },
  );
}
