/** What an attempt tells of its backend when it ends: the tokens that fairness counts. */
import assert from "node:assert/strict";
import { it } from "node:test";
import { judge, SUCCESS, type Verdict } from "../../src/core/outcome.ts";
import { UpstreamAttempt } from "../../src/data/attempt.ts";
import type { Plane } from "../../src/data/plane.ts";
import type { AnswerFacts } from "../../src/dialects/dialect.ts";
import type { Permit } from "../../src/fleet/permit.ts";
import type { Answered } from "../../src/fleet/observed.ts";
import { aTarget } from "../support/snapshot.ts";

function toldBy(facts: Partial<AnswerFacts>, verdict: Verdict, response?: Response): number | null {
  const told: Answered[] = [];
  const permit = {
    target: aTarget("a", "m"),
    release: (_: Verdict, answered: Answered) => void told.push(answered),
  } as unknown as Permit;
  const plane = { now: () => 0, metrics: null } as unknown as Plane;
  const trace = { headers: {}, end: () => {} };
  const attempt = new UpstreamAttempt(plane, permit, trace as never);
  attempt.promptTokens = 300;
  Object.assign(attempt.facts, facts);
  if (response !== undefined) attempt.hold(response);
  attempt.end(verdict, null);
  attempt.end(SUCCESS, null);
  assert.equal(told.length, 1);
  return told[0]?.tokens ?? null;
}

const LEFT = judge("ended");

it("is what the engine says, where it does", () => {
  const usage = { input: 40, output: 7, cached: 30 };
  assert.equal(toldBy({ usage, deltas: 6 }, SUCCESS), 47);
});

it("is what has flowed where the answer was not heard to its end", () => {
  assert.equal(toldBy({ deltas: 25 }, LEFT), 325);
  assert.equal(toldBy({ deltas: 25 }, judge("incomplete")), 325);
  // Anthropic's `message_start` has the prompt and one token of an answer.
  const usage = { input: 40, output: 1, cached: null };
  assert.equal(toldBy({ usage, deltas: 25 }, LEFT), 65);
});

it("is nothing where the engine has not served it", () => {
  for (const fault of ["unreachable", "busy", "server_error", "timeout", "unsupported"] as const) {
    assert.equal(toldBy({}, judge(fault)), 0, fault);
  }
  assert.equal(toldBy({}, judge("rejected"), new Response("", { status: 400 })), 0);
});

it("is not known, and stands as expected, where nobody tells", () => {
  assert.equal(toldBy({}, SUCCESS), null);
  assert.equal(toldBy({}, LEFT, new Response("")), null, "left before an answer in one piece");
  assert.equal(toldBy({}, LEFT), null);
});
