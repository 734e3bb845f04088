/** What a fault means for breaker and retry (design §4, contract §4). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { judge, type Fault, type Outcome, type Retry } from "../../src/core/outcome.ts";

const EXPECTED: Record<Fault, [Outcome, Retry, why: string]> = {
  unreachable: ["failure", "elsewhere", "refused, reset, or closed before headers"],
  server_error: ["failure", "elsewhere", "an engine's 5xx that is not busy"],
  busy: ["saturated", "free_slot", "busy is saturation, not a fault: another with a free slot"],
  error_in_answer: ["failure", "elsewhere", "an error in a 200, or as the first event"],
  invalid_answer: ["failure", "elsewhere", "not JSON, not an event stream"],
  incomplete: ["failure", "elsewhere", "a truncated stream, a missing end"],
  timeout: ["failure", "elsewhere", "a stall"],
  rejected: ["ignore", "no", "4xx is neutral and not retried"],
  misconfigured: ["ignore", "no", "wrong for every request alike"],
  unsupported: ["ignore", "elsewhere", "the engine cannot do it, another may"],
  ended: ["ignore", "no", "a client's abort changes nothing"],
};

describe("judge", () => {
  for (const [fault, [outcome, retry, why]] of Object.entries(EXPECTED)) {
    it(`${fault}: ${outcome}, retry ${retry} (${why})`, () => {
      assert.deepEqual(judge(fault as Fault), { outcome, retry });
    });
  }
});
