/**
 * Two real llama-servers: conversations go where they are cached. `TIDEGATE_ALONE=1` runs it;
 * `bun run prefix` has the times.
 */
import assert from "node:assert/strict";
import process from "node:process";
import test from "node:test";
import { cachedIn, converse } from "./conversations.ts";
import { missing } from "./support.ts";

const skip =
  process.env.TIDEGATE_ALONE === "1" ? missing("llama-server") : "needs TIDEGATE_ALONE=1";

test("real llama-servers, conversations", { skip, timeout: 900_000 }, async () => {
  const byTurns = cachedIn(await converse("round robin", 1, 0));
  const ours = cachedIn(await converse("gateway", 1, 0));
  console.log(`cached tokens: ${byTurns} by turns, ${ours} through the gateway`);
  // Twice as many over several seeds is the target; with one, on a busy machine, luck decides the rest.
  assert.ok(ours >= 1.5 * byTurns, `${ours} instead of 1.5 times ${byTurns}`);
});
