/** The waiting rule, against a server that answers, is silent, refuses, or is not there. */
import assert from "node:assert/strict";
import net from "node:net";
import { describe, it } from "node:test";
import { RedisLink } from "../../src/stores/redis.ts";
import { sleep, until } from "../support/client.ts";

const TIMEOUT_MS = 50;
/** For a machine that does many other things. */
const SLACK_MS = 1000;

type Mood = "answers" | "silent" | "errors";

/** Answers a number to every command; a silent one does so later, like one that was frozen. */
async function startServer() {
  /** With the answers they are still owed. */
  const sockets = new Map<net.Socket, number>();
  const state = { mood: "answers" as Mood, commands: 0, peers: 1 };
  const server = net.createServer((socket) => {
    sockets.set(socket, 0);
    socket.on("error", () => {});
    socket.on("close", () => sockets.delete(socket));
    socket.on("data", (bytes: Buffer) => {
      const commands = bytes.toString("latin1").match(/^\*\d+\r$/gm)?.length ?? 0;
      state.commands += commands;
      if (state.mood === "silent") {
        sockets.set(socket, (sockets.get(socket) ?? 0) + commands);
        return;
      }
      const reply = state.mood === "errors" ? "-OOM nothing left\r\n" : `:${state.peers}\r\n`;
      socket.write(reply.repeat(commands));
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as net.AddressInfo;
  return {
    state,
    url: `redis://127.0.0.1:${port}`,
    wake: () => {
      state.mood = "answers";
      for (const [socket, owed] of sockets) {
        socket.write(`:${state.peers}\r\n`.repeat(owed));
        sockets.set(socket, 0);
      }
    },
    cut: () => {
      for (const socket of sockets.keys()) socket.destroy();
    },
    stop: async () => {
      for (const socket of sockets.keys()) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

async function withLink(
  run: (
    link: RedisLink,
    server: Awaited<ReturnType<typeof startServer>>,
    changes: boolean[],
  ) => Promise<void>,
): Promise<void> {
  const server = await startServer();
  const changes: boolean[] = [];
  const settings = { url: server.url, timeoutMs: TIMEOUT_MS, prefix: "p:" };
  const link = new RedisLink(settings, (isUp) => changes.push(isUp));
  try {
    assert.equal(link.isUp, false);
    assert(await until(() => link.isUp));
    await run(link, server, changes);
  } finally {
    await link.close();
    await server.stop();
  }
}

function ask(link: RedisLink): Promise<number | null> {
  return link.ask((redis) => redis.incr("key"));
}

describe("the link to Redis", () => {
  it("answers while Redis does", () =>
    withLink(async (link, _, changes) => {
      assert.equal(await ask(link), 1);
      const { longestMs, ...counts } = link.counts;
      assert.deepEqual(counts, { waits: 1, timeouts: 0, errors: 0, skipped: 0 });
      assert(longestMs > 0);
      assert.deepEqual(changes, [true]);
    }));

  it("waits three times for a silent one, then not at all, until it answers again", () =>
    withLink(async (link, { state, wake }, changes) => {
      state.mood = "silent";
      // Pings count as failures as well.
      while (link.isUp) assert.equal(await ask(link), null);
      assert(link.counts.timeouts <= 3);
      assert.equal(link.counts.waits, link.counts.timeouts);
      const { waits } = link.counts;
      for (let at = 0; at < 1000; at++) assert.equal(await ask(link), null);
      assert.deepEqual([link.counts.waits, link.counts.skipped], [waits, 1000]);
      assert(link.counts.longestMs < TIMEOUT_MS + SLACK_MS, `${link.counts.longestMs} ms`);
      wake();
      assert(await until(() => link.isUp));
      assert.equal(await ask(link), 1);
      assert.deepEqual(changes, [true, false, true]);
    }));

  it("keeps no more than one ping in a silent connection, and gives it up in the end", () =>
    withLink(async (link, { state }) => {
      state.mood = "silent";
      while (link.isUp) await ask(link);
      const { commands } = state;
      await sleep(1500);
      assert(state.commands <= commands + 1);
      assert(await until(() => state.commands > commands + 1), "tried a new connection");
    }));

  it("does not wait for one that only makes mistakes", () =>
    withLink(async (link, { state }) => {
      state.mood = "errors";
      while (link.isUp) assert.equal(await ask(link), null);
      assert(link.counts.errors >= 1 && link.counts.errors <= 3);
      assert.equal(link.counts.timeouts, 0);
    }));

  it("knows at once when the connection breaks, and comes back", () =>
    withLink(async (link, server) => {
      server.cut();
      assert(await until(() => !link.isUp));
      assert.equal(await ask(link), null);
      assert.equal(link.counts.waits, 0);
      assert(await until(() => link.isUp));
    }));

  it("forgets failures at a success", () =>
    withLink(async (link, { state, wake }) => {
      for (let round = 0; round < 5; round++) {
        state.mood = "silent";
        assert.equal(await ask(link), null);
        wake();
        assert.equal(await ask(link), 1);
      }
      assert.equal(link.isUp, true);
    }));

  it("takes a command that throws for a failure", () =>
    withLink(async (link) => {
      const reply = await link.ask(() => {
        throw new Error("a mistake of ours");
      });
      assert.equal(reply, null);
      assert.equal(link.counts.errors, 1);
    }));

  it("counts its peers, tells who listens, and remembers them while Redis is away", () =>
    withLink(async (link, { state, wake }) => {
      let pings = 0;
      link.onPing(() => pings++);
      state.peers = 3;
      assert(await until(() => link.peers === 3));
      assert(pings >= 1);
      state.mood = "silent";
      while (link.isUp) await ask(link);
      assert.equal(link.peers, 3);
      state.peers = 1;
      wake();
      assert(await until(() => link.isUp));
      assert.equal(link.peers, 3, "the others are only just coming back");
    }));

  it("does not mind a Redis that is not there", async () => {
    const server = await startServer();
    await server.stop();
    const link = new RedisLink({ url: server.url, timeoutMs: TIMEOUT_MS, prefix: "p:" });
    await sleep(300);
    assert.equal(await ask(link), null);
    assert.deepEqual([link.isUp, link.peers, link.counts.skipped], [false, 1, 1]);
    await link.close();
  });

  it("can be closed before it has begun", async () => {
    const link = new RedisLink({ url: "redis://127.0.0.1:1", timeoutMs: 20, prefix: "p:" });
    await link.close();
    assert.equal(await ask(link), null);
  });
});
