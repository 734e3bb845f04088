/** Silence is no end: idle limits of the runtimes must not cut what only takes its time (runtimes §0.6, §c). */
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { dataOf, openaiChat, parseSse, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";

/** Bun.serve closes at 10 s unless told otherwise, its clock ticking every 4 s. */
const SILENT_MS = 15_000;
/** Beyond the 60 s that many a clock is set to. */
const LONG_MS = 65_000;

describe("silence", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    // Without heartbeats, which would hide what is tested here.
    fleet = await startFleet(
      { a: { models: ["before", "within", "after-headers", "whole"] } },
      { queue: { heartbeatMs: 0 } },
    );
    const { a } = fleet.engines;
    a.behaveFor("before", { headersDelayMs: SILENT_MS });
    a.behaveFor("after-headers", { firstTokenDelayMs: SILENT_MS });
    a.behaveFor("within", { stallAfterTokens: 2, stallMs: SILENT_MS });
    a.behaveFor("whole", { headersDelayMs: LONG_MS });
  });
  after(() => fleet.close());

  it(
    "passes: before the headers, before the first token, in mid-stream, before a whole answer",
    { timeout: LONG_MS + 30_000 },
    async () => {
      const streamed = ["before", "after-headers", "within"].map(async (model) => {
        const { status, text } = await openaiChat(fleet.url, { model, stream: true });
        assert.equal(status, 200, model);
        const words = dataOf(text).flatMap(
          ({ choices }) => choices as { delta: { content?: string } }[],
        );
        assert.equal(
          words.map(({ delta }) => delta.content ?? "").join(""),
          "word0 word1 word2 word3 word4",
          model,
        );
        assert.equal(parseSse(text).events.at(-1)?.data, "[DONE]", model);
      });
      const whole = openaiChat(fleet.url, { model: "whole" }).then(({ status, json }) => {
        assert.equal(status, 200);
        assert.equal((json().choices as unknown[]).length, 1);
      });
      await Promise.all([...streamed, whole]);
      assert.ok(fleet.engines.a.inference().every(({ completed }) => completed));
      assert.ok(await until(() => fleet.gateway.records().length === 4));
    },
  );
});
