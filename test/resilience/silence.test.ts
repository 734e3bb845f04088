/** How long an attempt may bring nothing: a load is waited for, a dead engine is not, whenever it dies. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { openaiChat, until } from "../support/client.ts";
import { expectError, startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const FIRST_BYTE_MS = 1200;
const backend = { healthInterval: 150, timeout: 600 };

describe("silence before the first byte", () => {
  let fleet: Fleet<"loads">;
  before(async () => {
    fleet = await startFleet(
      { loads: { kind: "ollama", models: ["a:1", "b:1"], backend } },
      { timeouts: { firstByteMs: FIRST_BYTE_MS }, circuitBreaker: { failureThreshold: 1_000_000 } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  it("is counted from when the model is loaded", TIMEOUT, async () => {
    fleet.engines.loads.behave({ maxLoaded: 1, loadMs: 3 * FIRST_BYTE_MS });
    const { status, text } = await openaiChat(fleet.url, { model: "a:1", stream: true });
    assert.equal(status, 200, text);
    assert.match(text, /\[DONE\]/);
    assert.equal(fleet.engines.loads.loads.length, 1);
  });

  it("is a fault where the model is loaded", TIMEOUT, async () => {
    fleet.engines.loads.behave({ maxLoaded: 1, loadMs: 10 });
    await openaiChat(fleet.url, { model: "b:1" });
    fleet.engines.loads.behave({ headersDelayMs: 10 * FIRST_BYTE_MS });
    expectError(
      await openaiChat(fleet.url, { model: "b:1", stream: true }),
      504,
      "upstream_timeout",
    );
  });
});

describe("an engine that dies while an answer is awaited", () => {
  let fleet: Fleet<"first" | "second">;
  before(async () => {
    const behaviour = { headersDelayMs: 6000 };
    fleet = await startFleet(
      {
        first: { models: ["m"], behaviour, backend: { ...backend, weight: 1000 } },
        second: { models: ["m"], backend },
      },
      { timeouts: { connectMs: 300 } },
    );
  });
  after(() => fleet.close());

  for (const stream of [false, true]) {
    it(`is noticed long after the first look${stream ? ", streamed" : ""}`, TIMEOUT, async () => {
      const { first, second } = fleet.engines;
      first.thaw();
      assert(
        await until(
          async () =>
            (await fleet.gateway.metric("tidegate_backend_health", {
              backend_id: "first",
              state: "healthy",
            })) === 1,
        ),
      );
      const before = first.inference().length;
      const answer = openaiChat(fleet.url, { model: "m", stream });
      assert(await until(() => first.inference().length > before), "its weight is a thousand");
      await new Promise((resolve) => setTimeout(resolve, 700));
      first.freeze();
      const { status, headers } = await answer;
      assert.equal(status, 200);
      assert.equal(headers.get("x-tidegate-backend"), "second");
      assert.equal(headers.get("x-tidegate-attempts"), "2");
      assert(second.inference().length > 0);
    });
  }
});

describe("a backend whose streams stand still", () => {
  it("is taken out of use though it answers its probes, and may try again", TIMEOUT, async () => {
    const fleet = await startFleet(
      { stands: { models: ["m"], backend } },
      { timeouts: { idleMs: 300 }, circuitBreaker: { resetTimeoutMs: 1500 } },
    );
    const isHealthy = async (): Promise<boolean> =>
      (await fleet.gateway.metric("tidegate_backend_health", {
        backend_id: "stands",
        state: "healthy",
      })) === 1;
    try {
      fleet.engines.stands.behave({ stallAfterTokens: 2, stallMs: Infinity });
      const { text } = await openaiChat(fleet.url, { model: "m", stream: true });
      assert.match(text, /upstream_timeout/);
      assert(await until(async () => !(await isHealthy())), "out of use");
      assert(await until(isHealthy), "in use again");
    } finally {
      await fleet.close();
    }
  });
});
