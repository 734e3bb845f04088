/** The engine breaks in the middle of an answer, or answers with an error that never ends. */
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
  type Upstream,
  type UpstreamRequest,
} from "./rig.ts";

/** Two events, then a reset. */
async function breaks({ socket }: UpstreamRequest): Promise<void> {
  socket.write(STREAM_HEAD + chunk(delta("one ")));
  await sleep(100);
  socket.write(chunk(delta("two ")));
  await sleep(200);
  socket.resetAndDestroy();
}

/** What the gateway does with an upstream that breaks: the same for every naive variant. */
async function gatewayTellsTheTruth(upstream: Upstream): Promise<void> {
  const gateway = await startGateway({
    config: { backends: [{ id: "raw", kind: "openai", url: upstream.url, models: ["m"] }] },
  });
  try {
    for (let round = 1; round <= 2; round += 1) {
      const client = await ask(gateway.port, chat(true));
      assert.ok(await until(() => /^0\r$/m.test(client.received())), client.received());
      assert.match(client.received(), /two /);
      assert.match(client.received(), /^data: \{"error":\{.*"code":"upstream_incomplete"/m);
      assert.doesNotMatch(client.received(), /\[DONE\]/);
      client.leave("close");
      assert.ok(await until(() => gateway.records().length === round));
      assert.equal(gateway.records().at(-1)?.ending, "failed");
    }
  } finally {
    await gateway.stop("SIGKILL");
  }
}

test(
  "a pipeTo nobody awaits ends the process when the engine resets, the gateway lives and says so",
  { timeout: 60_000 },
  async () => {
    const upstream = await startUpstream(breaks);
    const naive = await runNaive("floating-pipe", upstream.url);
    try {
      const client = await ask(naive.port, chat(true));
      assert.ok(await until(() => naive.exit() !== undefined), "expected to die");
      assert.notEqual(naive.exit(), 0);
      client.leave("close");
      await gatewayTellsTheTruth(upstream);
    } finally {
      await naive.stop();
      await upstream.stop();
    }
  },
);

for (const helper of ["stream", "streamSSE"]) {
  test(
    `Hono's ${helper}() turns an engine's crash into a clean end, the gateway into an error event`,
    { timeout: 60_000 },
    async () => {
      const upstream = await startUpstream(breaks);
      const naive = await runNaive("hono-stream", upstream.url, { args: [helper] });
      try {
        const client = await ask(naive.port, chat(true));
        assert.ok(
          await until(() => client.received().endsWith("\r\n0\r\n\r\n")),
          client.received(),
        );
        assert.match(client.received(), /two /);
        assert.doesNotMatch(client.received(), /"error"/);
        client.leave("close");
        await gatewayTellsTheTruth(upstream);
      } finally {
        await naive.stop();
        await upstream.stop();
      }
    },
  );
}

for (const [after, flood] of Object.entries({ "goes silent": false, "never stops": true })) {
  test(
    `an error body that ${after} holds its connection when given up, the gateway cancels it`,
    { timeout: 60_000 },
    async () => {
      const upstream = await startUpstream(async ({ socket, isClosed }) => {
        socket.write(STREAM_HEAD.replace("200 OK", "500 Broken"));
        socket.write(chunk('{"error":{"message":"out of '));
        while (flood && !isClosed()) {
          socket.write(chunk("memory ".repeat(100)));
          await sleep(10);
        }
      });
      const naive = await runNaive("abandons-error-body", upstream.url);
      const gateway = await startGateway({
        config: { backends: [{ id: "raw", kind: "openai", url: upstream.url, models: ["m"] }] },
      });
      try {
        const first = await ask(naive.port, chat(true));
        assert.ok(await until(() => first.received().includes("upstream said 500")));
        await sleep(2000);
        assert.equal(upstream.posts[0]?.isClosed(), false);
        first.leave("close");

        const clients = [await ask(gateway.port, chat(true)), await ask(gateway.port, chat(false))];
        for (const client of clients) {
          assert.ok(await until(() => client.body() !== null), client.received());
          assert.equal(client.status(), 502);
          assert.match(client.body() ?? "", /"code":"upstream_error"/);
        }
        const open = () => upstream.posts.filter((request) => !request.isClosed()).length;
        assert.ok(await until(() => open() === 1), `${open()} connections are open`);
        for (const client of clients) client.leave("close");
      } finally {
        await gateway.stop("SIGKILL");
        await naive.stop();
        await upstream.stop();
      }
    },
  );
}
