/** How much text of a request surely goes into its prompt: what a refusal may go by. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { textBytesOf } from "../../src/dialects/prompt-size.ts";

/** 1000 bytes. */
const LONG = "x".repeat(1000);
const says = (content: unknown, more: object = {}) => ({
  messages: [{ role: "user", content, ...more }],
});

describe("textBytesOf", () => {
  const counted: [what: string, body: Record<string, unknown>][] = [
    ["a message", says(LONG)],
    ["a part of one", says([{ type: "text", text: LONG }])],
    [
      "a result of a tool",
      says([{ type: "tool_result", content: [{ type: "text", text: LONG }] }]),
    ],
    ["a system prompt", { system: [{ type: "text", text: LONG }] }],
    ["instructions and input", { instructions: "", input: LONG }],
    ["a prompt", { prompt: LONG }],
    ["a tool", { tools: [{ type: "function", function: { name: "f", description: LONG } }] }],
  ];
  for (const [what, body] of counted) {
    it(`counts ${what}`, () => {
      const bytes = textBytesOf(body);
      assert(bytes >= 1000 && bytes < 1050, String(bytes));
    });
  }

  const left: [what: string, body: Record<string, unknown>][] = [
    ["images", says([{ type: "image_url", image_url: { url: LONG } }])],
    ["images by another name", says([{ type: "input_image", image_url: LONG }])],
    ["data URLs wherever they stand", says([{ type: "odd", x: `data:image/png;base64,${LONG}` }])],
    ["sound", says([{ type: "input_audio", input_audio: { data: LONG } }])],
    ["files", says([{ type: "input_file", file_data: LONG }])],
    ["documents", says([{ type: "document", source: { data: LONG } }])],
    ["thoughts", says([{ type: "thinking", thinking: LONG, signature: LONG }])],
    ["thoughts beside a message", says("", { reasoning_content: LONG })],
    ["thoughts that only their author reads", { input: [{ type: "reasoning", x: LONG }] }],
    ["fields beside the prompt", { metadata: { x: LONG }, grammar: LONG, input_ids: [LONG] }],
    ["what is buried too deep", says(JSON.parse(`${"[".repeat(500)}"${LONG}"${"]".repeat(500)}`))],
    ["nothing", {}],
  ];
  for (const [what, body] of left) {
    it(`leaves out ${what}`, () => assert(textBytesOf(body) < 20, String(textBytesOf(body))));
  }

  it("counts letters as UTF-8, however they were written", () => {
    assert.equal(textBytesOf({ prompt: JSON.parse(String.raw`"\u4f60\u00e9a"`) }), 3 + 2 + 1);
  });
});
