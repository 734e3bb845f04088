/** The client leaves: what a runtime does not say, forgets, or says too late. */
import assert from "node:assert/strict";
import test from "node:test";
import { sleep, until } from "../support/client.ts";
import { GC_PRELOAD, startGateway } from "../support/gateway.ts";
import {
  ANSWER,
  ask,
  chat,
  chunk,
  delta,
  isDeno,
  LAST_CHUNK,
  runNaive,
  startUpstream,
  STREAM_HEAD,
  type UpstreamRequest,
  whole,
  WHOLE_STREAM,
} from "./rig.ts";

const LONG = "x".repeat(4000);

/** Starts a stream and keeps it going for as long as somebody listens. */
async function streamForever({ socket, isClosed }: UpstreamRequest): Promise<void> {
  socket.write(STREAM_HEAD);
  while (!isClosed()) {
    socket.write(chunk(delta("more ")));
    await sleep(50);
  }
}

// Bun.serve reports it within 30 ms: workshop.md §6.
if (isDeno) {
  test(
    "Deno: Deno.serve misses a POST client that leaves before the answer, the gateway does not",
    { timeout: 60_000 },
    async () => {
      const upstream = await startUpstream(() => {});
      const naive = await runNaive("deno-serve", upstream.url);
      const gateway = await startGateway({
        config: { backends: [{ id: "raw", kind: "openai", url: upstream.url, models: ["m"] }] },
      });
      try {
        const unseen = await ask(naive.port, chat(true, LONG), { pauses: true });
        assert.ok(await until(() => upstream.posts.length === 1));
        unseen.leave("close");
        await sleep(2000);
        assert.equal(upstream.posts[0]?.isClosed(), false);
        assert.doesNotMatch(naive.output(), /signal fired/);

        for (const [at, stream] of [true, false].entries()) {
          const seen = await ask(gateway.port, chat(stream, LONG), { pauses: true });
          assert.ok(await until(() => upstream.posts.length === at + 2));
          await sleep(200);
          assert.equal(upstream.posts[at + 1]?.isClosed(), false);
          seen.leave("close");
          assert.ok(await until(() => upstream.posts[at + 1]?.isClosed() === true));
        }
        assert.ok(await until(() => gateway.records().length === 2));
        for (const record of gateway.records()) assert.equal(record.ending, "cancelled");
      } finally {
        await gateway.stop("SIGKILL");
        await naive.stop();
        await upstream.stop();
      }
    },
  );
}

// Bun keeps the link: runtimes.md §a, table "GC and signals".
if (isDeno) {
  test(
    "Deno: abort() is forgotten with the Response, the gateway closes the upstream all the same",
    { timeout: 60_000 },
    async () => {
      const upstream = await startUpstream(streamForever);
      const naive = await runNaive("drops-response", upstream.url, {
        listens: false,
        runtimeArgs: ["--v8-flags=--expose-gc"],
      });
      try {
        assert.ok(await until(() => naive.output().includes("aborted")), naive.output());
        await sleep(2000);
        assert.equal(upstream.posts[0]?.isClosed(), false);
      } finally {
        await naive.stop();
        await upstream.stop();
      }
    },
  );
}

test(
  "under constant garbage collection a client that leaves mid-stream closes the upstream",
  { timeout: 60_000 },
  async () => {
    const upstream = await startUpstream(streamForever);
    const gateway = await startGateway({
      config: {
        backends: [{ id: "raw", kind: "openai", url: upstream.url, models: ["m"] }],
      },
      preload: GC_PRELOAD,
    });
    try {
      for (let round = 0; round < 3; round += 1) {
        const client = await ask(gateway.port, chat(true));
        assert.ok(await until(() => client.received().includes("more")), client.received());
        await sleep(500);
        assert.equal(upstream.posts[round]?.isClosed(), false);
        client.leave("close");
        assert.ok(await until(() => upstream.posts[round]?.isClosed() === true));
      }
    } finally {
      await gateway.stop("SIGKILL");
      await upstream.stop();
    }
  },
);

/** Answers one streamed and one whole request; the client leaves, or not, when it has everything. */
async function answerThenLeave(
  leavesAtOnce: boolean,
  answer: (request: UpstreamRequest) => Promise<void>,
): Promise<void> {
  const upstream = await startUpstream(answer);
  const gateway = await startGateway({
    config: { backends: [{ id: "raw", kind: "openai", url: upstream.url, models: ["m"] }] },
  });
  try {
    for (const stream of [true, false]) {
      const client = await ask(gateway.port, chat(stream));
      const end = stream ? "data: [DONE]\n\n" : '"total_tokens":2}}';
      assert.ok(await until(() => client.received().includes(end)), client.received());
      if (!leavesAtOnce) await sleep(500);
      client.leave("close");
      await gateway.record((record) => record.stream === stream);
    }
    assert.deepEqual(
      gateway.records().map(({ ending, status, cause }) => [ending, status, cause]),
      [
        ["completed", 200, null],
        ["completed", 200, null],
      ],
    );
  } finally {
    await gateway.stop("SIGKILL");
    await upstream.stop();
  }
}

async function answerAtOnce({ body, socket }: UpstreamRequest): Promise<void> {
  socket.write(body.includes('"stream":true') ? WHOLE_STREAM : whole(200, ANSWER));
  socket.end();
}

// On Bun the signal of an answered request stays quiet: there is no naive variant to fail.
if (isDeno) {
  test(
    "Deno: request.signal fires after every answer of Deno.serve",
    { timeout: 60_000 },
    async () => {
      const naive = await runNaive("trusts-signal", "");
      try {
        const client = await ask(naive.port, chat(false));
        assert.ok(await until(() => client.received().includes("whole answer")));
        assert.ok(await until(() => naive.output().includes("ending: cancelled")));
        client.leave("close");
      } finally {
        await naive.stop();
      }
    },
  );
}

test(
  "an answered request is completed, though its client closes the kept connection at once",
  { timeout: 60_000 },
  () => answerThenLeave(true, answerAtOnce),
);

test("an answered request is completed while its connection is kept", { timeout: 60_000 }, () =>
  answerThenLeave(false, answerAtOnce),
);

// The official OpenAI SDK cancels the body as soon as it has read the end marker.
test(
  "a streamed answer is completed for a client that leaves at the end marker, before the engine closes",
  { timeout: 60_000 },
  () =>
    answerThenLeave(true, async ({ body, socket }) => {
      if (!body.includes('"stream":true')) {
        socket.end(whole(200, ANSWER));
        return;
      }
      socket.write(WHOLE_STREAM.slice(0, -LAST_CHUNK.length));
      await sleep(1000);
      socket.end(LAST_CHUNK);
    }),
);
