/** How many tokens a request may need: learned, bounded, never absurd. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { Estimates, type PromptSize } from "../../src/core/estimate.ts";

function text(bytes: number, messages = 1): PromptSize {
  return { bytes, messages, images: 0 };
}

describe("a prompt", () => {
  it("is a share of its bytes, and something for each message and image", () => {
    const estimates = new Estimates();
    assert.equal(estimates.prompt("m", text(1000)), 284);
    assert.equal(estimates.prompt("m", text(0, 3)), 12);
    assert.equal(estimates.prompt("m", { bytes: 1000, messages: 1, images: 2 }), 2284);
  });

  it("is learned for each model by itself", () => {
    const estimates = new Estimates();
    for (let at = 0; at < 100; at++) estimates.learnPrompt("dense", text(10_000), 5004);
    const learned = estimates.prompt("dense", text(10_000));
    assert(Math.abs(learned - 5004) < 50, `${learned}`);
    assert.equal(estimates.prompt("other", text(1000)), 284);
  });

  it("is not learned from what a template adds to a short one", () => {
    const estimates = new Estimates();
    for (let at = 0; at < 20; at++) estimates.learnPrompt("m", text(2), 40);
    assert(estimates.prompt("m", text(10_000)) < 3200);
  });

  it("follows a model that changes", () => {
    const estimates = new Estimates();
    for (let at = 0; at < 100; at++) estimates.learnPrompt("m", text(10_000), 5000);
    for (let at = 0; at < 30; at++) estimates.learnPrompt("m", text(10_000), 2500);
    assert(estimates.prompt("m", text(10_000)) < 2700);
  });

  it("stays within what tokenizers do, whatever an engine reports", () => {
    const size = fc.record({ bytes: fc.nat(1e6), messages: fc.nat(50), images: fc.nat(1) });
    const report = fc.record({ size, tokens: fc.oneof(fc.nat(1e6), fc.nat()) });
    fc.assert(
      fc.property(fc.array(report, { maxLength: 50 }), (reports) => {
        const estimates = new Estimates();
        for (const { size: of, tokens } of reports) estimates.learnPrompt("m", of, tokens);
        const tokens = estimates.prompt("m", text(100_000, 0));
        assert(tokens >= 9_999 && tokens <= 100_001, `${tokens}`);
      }),
    );
  });
});

describe("an output", () => {
  it("is 1000 until ten were seen, then the 90th percentile of the last ones", () => {
    const estimates = new Estimates();
    for (let tokens = 1; tokens <= 10; tokens++) {
      assert.equal(estimates.output("t", "m", null, null), 1000);
      estimates.learnOutput("t", "m", tokens * 10);
    }
    assert.equal(estimates.output("t", "m", null, null), 90);
    for (let at = 0; at < 64; at++) estimates.learnOutput("t", "m", 7);
    assert.equal(estimates.output("t", "m", null, null), 7);
  });

  it("is never more than was asked for, nor than the cap, nor less than one", () => {
    const estimates = new Estimates();
    assert.equal(estimates.output("t", "m", 300, null), 300);
    assert.equal(estimates.output("t", "m", 300, 200), 200);
    assert.equal(estimates.output("t", "m", 5000, 4000), 1000);
    for (let at = 0; at < 10; at++) estimates.learnOutput("t", "m", 0);
    assert.equal(estimates.output("t", "m", null, null), 1);
  });

  it("is that of this tenant and this model", () => {
    const estimates = new Estimates();
    for (let at = 0; at < 10; at++) estimates.learnOutput("t", "m", 5);
    assert.equal(estimates.output("t", "n", null, null), 1000);
    assert.equal(estimates.output("u", "m", null, null), 1000);
  });

  it("is forgotten where nobody asked for longest, after a thousand others", () => {
    const estimates = new Estimates();
    const learn = (model: string) => {
      for (let at = 0; at < 10; at++) estimates.learnOutput("t", model, 5);
    };
    learn("first");
    learn("kept");
    for (let at = 0; at < 998; at++) learn(`m${at}`);
    learn("kept");
    learn("one more");
    assert.equal(estimates.output("t", "first", null, null), 1000);
    assert.equal(estimates.output("t", "kept", null, null), 5);
  });
});
