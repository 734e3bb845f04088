/** What a fault means for the breakers, the metrics and a second attempt (design §4, contract §4). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import {
  judge,
  SUCCESS,
  type Fault,
  type Outcome,
  type Retry,
  type Verdict,
} from "../../src/core/outcome.ts";

type Row = [outcome: Outcome, backend: Outcome, model: Outcome, retry: Retry, why: string];

const EXPECTED: Record<Fault, Row> = {
  unreachable: ["failure", "failure", "ignore", "elsewhere", "nobody there, whatever the model"],
  server_error: ["failure", "success", "failure", "elsewhere", "it answered: reached, but failing"],
  busy: ["saturated", "saturated", "saturated", "elsewhere", "no room is not a fault"],
  error_in_answer: ["failure", "success", "failure", "elsewhere", "an error in a 200"],
  invalid_answer: ["failure", "success", "failure", "elsewhere", "not JSON, no event stream"],
  incomplete: ["failure", "failure", "ignore", "elsewhere", "truncated, or without its end"],
  timeout: ["failure", "ignore", "failure", "elsewhere", "another model may still speak there"],
  rejected: ["ignore", "ignore", "ignore", "no", "4xx is neutral and not retried"],
  misconfigured: ["ignore", "ignore", "ignore", "elsewhere", "another one may be set up right"],
  unsupported: ["ignore", "ignore", "ignore", "elsewhere", "another engine may be able to"],
  ended: ["ignore", "ignore", "ignore", "no", "a client's abort changes nothing"],
};

describe("judge", () => {
  for (const [fault, [outcome, backend, model, retry, why]] of Object.entries(EXPECTED)) {
    it(`${fault}: ${outcome}; backend ${backend}, model ${model}, retry ${retry} (${why})`, () => {
      assert.deepEqual(judge(fault as Fault), { outcome, backend, model, retry });
    });
  }

  it("blames a failure on the backend or on the model, never on both", () => {
    for (const fault of Object.keys(EXPECTED)) {
      const { outcome, backend, model } = judge(fault as Fault);
      const blamed = [backend, model].filter((each) => each === "failure").length;
      assert.equal(blamed, outcome === "failure" ? 1 : 0, fault);
    }
  });
});

describe("a whole answer", () => {
  it("speaks for the backend and for the model, and wants no second attempt", () => {
    const whole: Verdict = {
      outcome: "success",
      backend: "success",
      model: "success",
      retry: "no",
    };
    assert.deepEqual(SUCCESS, whole);
  });
});
