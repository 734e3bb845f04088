/** A request that waits for a slow answer knows nothing of what a reload does to its backend. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { openaiChat, send, until } from "../support/client.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { Gateway } from "../support/gateway.ts";
import { startGateway } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };

describe("a backend that leaves while an answer is awaited", () => {
  let slow: FakeEngine;
  let other: FakeEngine;
  let gateway: Gateway;

  const configured = (url: string | null): object => ({
    // Long before the answer comes it is asked whether anybody is there.
    timeouts: { connectMs: 300 },
    backends: [
      ...(url === null ? [] : [{ id: "slow", kind: "openai", url, models: ["m"] }]),
      { id: "other", kind: "openai", url: other.url, models: ["n"] },
    ],
  });

  before(async () => {
    slow = await startEngine({ models: ["m"], behaviour: { headersDelayMs: 1200 } });
    other = await startEngine({ models: ["m", "n"] });
    gateway = await startGateway({ config: configured(slow.url) });
  });
  after(async () => {
    await gateway.stop();
    await slow.close();
    await other.close();
  });
  afterEach(async () => {
    slow.reset();
    await gateway.writeConfig(configured(slow.url));
    await send(`${gateway.url}/admin/api/reload`, "");
  });

  for (const stream of [false, true]) {
    for (const [name, url] of [
      ["gone", () => null],
      ["moved", () => other.url],
    ] as const) {
      it(
        `${name}: the answer comes all the same${stream ? ", streamed" : ""}`,
        TIMEOUT,
        async () => {
          const answer = openaiChat(gateway.url, { model: "m", stream });
          assert(await until(() => slow.inference().length === 1));
          await gateway.writeConfig(configured(url()));
          assert.equal((await send(`${gateway.url}/admin/api/reload`, "")).status, 200);
          const { status, headers, text } = await answer;
          assert.equal(status, 200, text);
          assert.equal(headers.get("x-tidegate-attempts"), "1");
        },
      );
    }
  }
});
