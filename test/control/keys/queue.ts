/** `queue`, `timeouts`, `limits`: how long and how much. */
import assert from "node:assert/strict";
import type { Answer } from "../../support/client.ts";
import { chatBody, connect, dataOf, postBytes, readEvents } from "../../support/client.ts";
import { expectError } from "../../support/fleet.ts";
import { eventually, type KeyTests, type Patch, type Rig } from "./rig.ts";

/** One request at once at backend a, which alone has the model. */
const NARROW: Patch = { backends: { a: { concurrency: 1 } } };
const ALONE = { model: "only-a", stream: true };

async function eventuallyQueued(rig: Rig, count: number): Promise<void> {
  await eventually(`${count} wait`, async () => (await rig.backends())["a"]?.queued === count);
}

/** Occupies the only slot of backend a. */
async function occupy(rig: Rig): Promise<void> {
  rig.engines.a.behave({ stallAfterTokens: 1 });
  void rig.hold(ALONE);
  await eventually("it runs", () => rig.engines.a.activeGenerations() === 1);
}

/** A chat with so many bytes in its body, at least. */
function large(rig: Rig, bytes: number): Promise<Answer> {
  return rig.chat({ model: "only-a", user: "x".repeat(bytes) });
}

export const queueKeys: KeyTests = {
  async "queue.maxWaitMs"(rig) {
    await rig.change(NARROW);
    await occupy(rig);
    void rig.hold(ALONE);
    await eventuallyQueued(rig, 1);
    await rig.change({ ...NARROW, queue: { maxWaitMs: 50 } });
    expectError(await rig.chat(ALONE), 429, "rate_limit_exceeded");
    await eventuallyQueued(rig, 1);
  },

  async "queue.maxLength"(rig) {
    await rig.change({ ...NARROW, queue: { maxLength: 1 } });
    await occupy(rig);
    void rig.hold(ALONE);
    await eventuallyQueued(rig, 1);
    expectError(await rig.chat(ALONE), 429, "rate_limit_exceeded");
    await rig.change({ ...NARROW, queue: { maxLength: 2 } });
    void rig.hold(ALONE);
    await eventuallyQueued(rig, 2);
    expectError(await rig.chat(ALONE), 429, "rate_limit_exceeded");
  },

  async "queue.heartbeatMs"(rig) {
    rig.engines.a.behave({ headersDelayMs: 100_000 });
    await rig.change({ queue: { heartbeatMs: 50 } });
    for await (const { comment } of readEvents(await rig.hold(ALONE))) {
      assert.match(comment ?? "", /^tidegate \{"position":null/);
      break;
    }
  },
};

export const timeoutKeys: KeyTests = {
  async "timeouts.connectMs"(rig) {
    const slow = { backends: { a: { timeout: 100 } } };
    await rig.change(slow);
    rig.engines.a.behave({ fault: { kind: "hang" }, probeFault: { kind: "hang" } });
    await rig.change({ ...slow, timeouts: { connectMs: 100 } });
    expectError(await rig.chat({ model: "only-a" }), 502, "upstream_unreachable");
  },

  async "timeouts.firstByteMs"(rig) {
    rig.engines.a.behave({ headersDelayMs: 100_000 });
    await rig.change({ timeouts: { firstByteMs: 100 } });
    expectError(await rig.chat(ALONE), 504, "upstream_timeout");
  },

  async "timeouts.idleMs"(rig) {
    rig.engines.a.behave({ stallAfterTokens: 2 });
    await rig.change({ timeouts: { idleMs: 100 } });
    const { status, text } = await rig.chat(ALONE);
    assert.equal(status, 200);
    const { error } = dataOf(text).at(-1) as { error: { code: string } };
    assert.equal(error.code, "upstream_timeout");
    // Only a stream that flows shows that it is well again: the next test wants it so.
    rig.engines.a.behave({ stallAfterTokens: null });
    assert.equal((await rig.chat(ALONE)).status, 200);
  },

  async "timeouts.clientMs"(rig) {
    const { a } = rig.engines;
    // More than the kernel's buffers hold.
    a.behave({ flood: { bytes: 100_000_000 } });
    await rig.change({ timeouts: { clientMs: 100 } });
    const client = await connect(rig.gateway.port);
    client.pause();
    client.write(postBytes("/v1/chat/completions", chatBody(ALONE)));
    await eventually("it is left", () => a.inference()[0]?.closedByClient === true);
    client.leave("reset");
    const record = await rig.gateway.record(({ cause }) => cause === "streaming");
    assert.equal(record["ending"], "cancelled");
  },

  async "timeouts.totalMs"(rig) {
    rig.engines.a.behave({ headersDelayMs: 100_000 });
    await rig.change({ timeouts: { totalMs: 100 } });
    expectError(await rig.chat({ model: "only-a" }), 504, "upstream_timeout");
  },
};

export const limitKeys: KeyTests = {
  async "limits.bodyBytes"(rig) {
    assert.equal((await large(rig, 2000)).status, 200);
    await rig.change({ limits: { bodyBytes: 1000 } });
    expectError(await large(rig, 2000), 413, "request_too_large");
    assert.equal((await rig.chat()).status, 200);
  },

  async "limits.heldBytes"(rig) {
    rig.engines.a.behave({ headersDelayMs: 100_000 });
    const body = { model: "only-a", user: "x".repeat(2000) };
    const arrived = () => rig.engines.a.inference().length;
    void rig.hold(body);
    void rig.hold(body);
    await eventually("both are there", () => arrived() === 2);
    await rig.change({ limits: { heldBytes: 5000 } });
    expectError(await rig.chat(body), 503, "overloaded");
    assert.equal((await rig.chat({ model: "only-b" })).status, 200, "a small one still fits");
  },

  async "limits.bufferBytes"(rig) {
    const { a } = rig.engines;
    a.behave({ tokens: ["x".repeat(100_000)], wholePauseMs: 100_000 });
    await rig.change({ limits: { bufferBytes: 1000 } });
    const { status } = await rig.hold({ model: "only-a" });
    assert.equal(status, 200, "what is not held is passed on");
    assert.equal(a.inference()[0]?.completed, false, "while it is being made");
  },
};
