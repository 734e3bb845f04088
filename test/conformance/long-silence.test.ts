/**
 * Six minutes without a word: longer than a client of HTTP waits by itself (Bun's `fetch` gives up after five
 * to six). It takes as long as it says: only with `TIDEGATE_SLOW=1`.
 */
import assert from "node:assert/strict";
import process from "node:process";
import { after, before, describe, it } from "node:test";
import { chatBody, connect, postBytes, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";
import { runtime } from "../support/gateway.ts";

const SILENT_MS = 390_000;
const ALLOWED_MS = 600_000;
/** Model -> how it is silent. */
const WAYS = {
  before: { headersDelayMs: SILENT_MS },
  "after-headers": { firstTokenDelayMs: SILENT_MS },
  within: { stallAfterTokens: 2, stallMs: SILENT_MS },
  whole: { headersDelayMs: SILENT_MS },
};

function longSilence(): void {
  let fleet: Fleet<"a">;
  before(async () => {
    // Without heartbeats, which would hide what is tested here.
    fleet = await startFleet(
      { a: { models: Object.keys(WAYS) } },
      { queue: { heartbeatMs: 0 }, timeouts: { firstByteMs: ALLOWED_MS, idleMs: ALLOWED_MS } },
    );
    for (const [model, how] of Object.entries(WAYS)) fleet.engines.a.behaveFor(model, how);
  });
  after(() => fleet.close());

  async function ask(model: string): Promise<void> {
    const client = await connect(fleet.gateway.port);
    const began = performance.now();
    const body = chatBody({ model, stream: model !== "whole" });
    client.write(postBytes("/v1/chat/completions", body));
    await until(() => client.body() !== null || client.isClosed(), ALLOWED_MS - 30_000);
    const waited = performance.now() - began;
    console.log(
      `silence: ${model} on ${runtime}: ${client.status()} in ${(waited / 1000).toFixed(1)} s`,
    );
    client.leave("close");
    assert.equal(client.status(), 200, client.received());
    assert.match(client.body() ?? "", model === "whole" ? /word4/ : /word4[^]*\[DONE\]/);
    assert(waited >= SILENT_MS, "it was silent");
  }

  it(
    "passes: before the headers, before the first token, in mid-stream, before a whole answer",
    { timeout: ALLOWED_MS },
    async () => void (await Promise.all(Object.keys(WAYS).map(ask))),
  );
}

if (process.env.TIDEGATE_SLOW === "1") describe("six minutes of silence", longSilence);
else console.log("skipped: six minutes of silence: opt-in, TIDEGATE_SLOW=1");
