/** `circuitBreaker`: when a backend, or a model there, is left alone, for how long, and who may try again. */
import assert from "node:assert/strict";
import { expectError } from "../../support/fleet.ts";
import { eventually, type KeyTests, type Rig } from "./rig.ts";

const BROKEN = { error: { message: "cannot do it", type: "server_error", code: 500 } };

/** Backend a answers everything with a 500. */
function breakA(rig: Rig): void {
  rig.engines.a.behave({ fault: { kind: "answer", status: 500, body: BROKEN } });
}

/** Requests that backend a has been sent. */
function sent(rig: Rig): number {
  return rig.engines.a.inference().length;
}

/** Chats until backend a has been sent one more; b answers what a cannot. */
async function untilSent(rig: Rig): Promise<void> {
  const before = sent(rig);
  await eventually("a is sent one more", async () => {
    assert.equal((await rig.chat()).status, 200);
    return sent(rig) > before;
  });
}

async function isLeftAlone(rig: Rig): Promise<void> {
  const before = sent(rig);
  for (let each = 0; each < 6; each++) assert.equal((await rig.chat()).status, 200);
  assert.equal(sent(rig), before, "a is left alone");
}

/** What is known of backend a is forgotten: the other tests know nothing of it. */
function forgetting(test: (rig: Rig) => Promise<void>) {
  return async (rig: Rig): Promise<void> => {
    try {
      await test(rig);
      const notes = /circuitBreaker\S*: accepted/;
      assert.doesNotMatch(rig.gateway.stdout() + rig.gateway.stderr(), notes, "it is in effect");
    } finally {
      await rig.change({ backends: { a: { kind: "vllm" } } });
    }
  };
}

export const breakerKeys: KeyTests = {
  "circuitBreaker.failureThreshold": forgetting(async (rig) => {
    breakA(rig);
    await rig.change({ circuitBreaker: { failureThreshold: 1000 } });
    for (let each = 0; each < 5; each++) await untilSent(rig);
    await rig.change({ circuitBreaker: { failureThreshold: 1 } });
    await untilSent(rig);
    await isLeftAlone(rig);
  }),

  "circuitBreaker.resetTimeoutMs": forgetting(async (rig) => {
    breakA(rig);
    await rig.change({ circuitBreaker: { failureThreshold: 1, resetTimeoutMs: 1 } });
    for (let each = 0; each < 4; each++) await untilSent(rig);
    await rig.change({ circuitBreaker: { failureThreshold: 1, resetTimeoutMs: 600_000 } });
    await untilSent(rig);
    await isLeftAlone(rig);
  }),

  "circuitBreaker.halfOpenRequests": forgetting(async (rig) => {
    const { a } = rig.engines;
    const alone = { model: "only-a" };
    const settings = { failureThreshold: 1, resetTimeoutMs: 1 };
    await rig.change({ circuitBreaker: settings });
    breakA(rig);
    expectError(await rig.chat(alone), 502, "upstream_error");
    a.reset();
    a.behave({ headersDelayMs: 100_000 });
    for (const halfOpenRequests of [1, 2]) {
      await rig.change({ circuitBreaker: { ...settings, halfOpenRequests } });
      void rig.hold(alone);
      await eventually("it tries", () => sent(rig) === halfOpenRequests);
      expectError(await rig.chat(alone), 503, "no_backend_available");
      assert.equal(sent(rig), halfOpenRequests);
    }
  }),
};
