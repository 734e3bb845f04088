/** What of a request is the text of its prompt, and which session it belongs to. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { chainOf } from "../../src/core/prefix.ts";
import { conversationOf, sessionOf } from "../../src/dialects/conversation.ts";

type Body = Record<string, unknown>;

const CHAT = "/v1/chat/completions";
const COMPLETIONS = "/v1/completions";
const MESSAGES = "/v1/messages";
const RESPONSES = "/v1/responses";
const OLLAMA_CHAT = "/api/chat";
const OLLAMA_GENERATE = "/api/generate";
const PATHS = [CHAT, COMPLETIONS, MESSAGES, RESPONSES, OLLAMA_CHAT, OLLAMA_GENERATE];

/** Readable: what marks the beginning of a message is a `|`. */
function said(path: string, body: Body): string {
  return conversationOf(path, body).join("").replaceAll("\u0000", "|");
}

describe("the text of a prompt", () => {
  it("is tools, then messages (OpenAI)", () => {
    const body = {
      model: "m",
      temperature: 1,
      messages: [
        { role: "system", content: "be brief" },
        {
          role: "user",
          name: "ann",
          content: [
            { type: "text", text: "a" },
            { type: "text", text: "b" },
          ],
        },
        {
          role: "assistant",
          content: null,
          reasoning_content: "hm",
          tool_calls: [
            { id: "c1", type: "function", function: { name: "f", arguments: '{"x":1}' } },
          ],
        },
        { role: "tool", tool_call_id: "c1", content: "42" },
      ],
      tools: [
        { type: "function", function: { name: "f", parameters: { n: 1, b: true, z: null } } },
      ],
    };
    assert.equal(
      said(CHAT, body),
      "[[type:function,function:[name:f,parameters:[n:1,b:true,z:" +
        "|system|be brief|user|abann,|assistant|hm" +
        '[[id:c1,type:function,function:[name:f,arguments:{"x":1},' +
        "|tool|42",
    );
  });

  it("is the prompt, of text or tokens (completions)", () => {
    assert.equal(said(COMPLETIONS, { prompt: "once" }), "once");
    assert.equal(said(COMPLETIONS, { prompt: ["once", "twice"] }), "oncetwice");
    assert.equal(said(COMPLETIONS, { prompt: [1, 22, 333] }), "1,22,333");
    assert.equal(said(COMPLETIONS, { prompt: [[1, 2], [3]] }), "1,23");
  });

  it("is system, tools, then messages (Anthropic)", () => {
    const body = {
      system: [{ type: "text", text: "be brief", cache_control: { type: "ephemeral" } }],
      tools: [{ name: "f", input_schema: {}, cache_control: { type: "ephemeral" } }],
      messages: [
        { role: "user", content: "hi" },
        {
          role: "assistant",
          content: [
            { type: "thinking", thinking: "hm", signature: "s" },
            { type: "text", text: "wait" },
            { type: "tool_use", id: "t1", name: "f", input: { x: 1 } },
          ],
        },
        {
          role: "user",
          content: [
            { type: "tool_result", tool_use_id: "t1", content: [{ type: "text", text: "42" }] },
            { type: "tool_result", tool_use_id: "t2", content: "43" },
          ],
        },
      ],
    };
    assert.equal(
      said(MESSAGES, body),
      "be brief[[name:f,input_schema:[" +
        "|user|hi|assistant||thinking|hmwait|tool_use|f,[x:1," +
        "|user||tool_result|42|tool_result|43",
    );
  });

  it("is instructions, tools, then input (Responses)", () => {
    const body = {
      input: [
        { role: "user", content: "hi" },
        {
          type: "reasoning",
          summary: [{ type: "summary_text", text: "hm" }],
          encrypted_content: "x",
        },
        { type: "function_call", call_id: "c1", name: "f", arguments: "{}" },
        { type: "function_call_output", call_id: "c1", output: "42" },
        {
          type: "message",
          id: "m1",
          role: "assistant",
          content: [{ type: "output_text", text: "so" }],
        },
      ],
      instructions: "be brief",
      tools: [{ type: "function", name: "f" }],
    };
    assert.equal(
      said(RESPONSES, body),
      "be brief[[type:function,name:f," +
        "|user|hi|reasoning|hm|function_call|f,{},|function_call_output|42|assistant|so",
    );
    assert.equal(said(RESPONSES, { input: "hi", previous_response_id: "r" }), "hi");
  });

  it("is what Ollama's own API calls so", () => {
    const messages = [
      { role: "user", content: "see", images: ["abc"] },
      {
        role: "assistant",
        content: "",
        tool_calls: [{ function: { name: "f", arguments: { x: 1 } } }],
      },
    ];
    assert.equal(
      said(OLLAMA_CHAT, { messages, tools: [{ type: "function" }] }),
      "[[type:function,|user|see[abc,|assistant|[[function:[name:f,arguments:[x:1,",
    );
    const generate = { prompt: "go on", system: "be brief", context: [1, 2], images: ["abc"] };
    assert.equal(said(OLLAMA_GENERATE, generate), "be brief1,2[abc,go on");
  });

  it("is nothing where nothing is generated", () => {
    const body = { input: ["a"], prompt: "b", messages: [{ role: "user", content: "c" }] };
    for (const path of [
      "/v1/embeddings",
      "/v1/messages/count_tokens",
      "/api/embed",
      "/v1/rerank",
    ]) {
      assert.deepEqual(conversationOf(path, body), []);
    }
  });

  it("does not depend on how a client wraps a text, or where it wants it cached", () => {
    const text = { type: "text", text: "hi" };
    const cached = { ...text, cache_control: { type: "ephemeral" } };
    const image = { type: "image", source: { type: "base64", data: "abc" } };
    const ask = (content: unknown) => said(MESSAGES, { messages: [{ role: "user", content }] });
    assert.equal(ask([text]), ask("hi"));
    assert.equal(ask([cached]), ask("hi"));
    assert.equal(ask([{ ...image, cache_control: { type: "ephemeral" } }]), ask([image]));
    assert.notEqual(ask([image]), ask("hi"));
  });

  it("depends on who says what, and in which order", () => {
    const one = { role: "user", content: "a".repeat(300) };
    const two = { role: "assistant", content: "a".repeat(300) };
    const chain = (...messages: object[]) =>
      chainOf("m", conversationOf(CHAT, { messages })).blocks;
    assert.notDeepEqual(chain(one, two), chain(two, one));
    assert.notDeepEqual(chain(one, two), chain(one, one));
    assert.notEqual(chain(one, two)[0], chain(two, one)[0]);
  });

  it("has of an image what tells it from others, and no more", () => {
    const shapes = (data: string): object[] => [
      { type: "image_url", image_url: { url: `data:image/png;base64,${data}` } },
      { type: "input_image", image_url: `data:image/png;base64,${data}` },
      { type: "image", source: { type: "base64", media_type: "image/png", data } },
      { type: "input_audio", input_audio: { data, format: "wav" } },
      { type: "something_new", it: [{ data }] },
    ];
    const ask = (content: unknown) => said(CHAT, { messages: [{ role: "user", content }] });
    const data = "A".repeat(50_000);
    const otherEnd = `${data.slice(0, -9)}B${data.slice(-8)}`;
    const otherMiddle = `${data.slice(0, 25_030)}B${data.slice(25_031)}`;
    for (const [at, shape] of shapes(data).entries()) {
      assert(ask([shape]).length < 300, ask([shape]));
      for (const other of [otherEnd, otherMiddle, `${data}A`]) {
        assert.notEqual(ask([shapes(other)[at]]), ask([shape]));
      }
    }
    const images = (image: string) =>
      said(OLLAMA_CHAT, { messages: [{ role: "user", content: "see", images: [image] }] });
    assert(images(data).length < 300);
    assert.notEqual(images(data), images(otherEnd));
  });

  it("has all of what a tool is given and gives", () => {
    const long = "A".repeat(5000);
    const other = `${"A".repeat(1000)}B${"A".repeat(3999)}`;
    const ask = (part: object) => said(MESSAGES, { messages: [{ role: "user", content: [part] }] });
    const use = (text: string) => ask({ type: "tool_use", name: "write", input: { text } });
    const result = (content: string) => ask({ type: "tool_result", content });
    assert.notEqual(use(long), use(other));
    assert.notEqual(result(long), result(other));
  });
});

describe("a turn", () => {
  const text = fc.string({ maxLength: 400, size: "max" });
  const part = fc.oneof(
    fc.record({ type: fc.constantFrom("text", "input_text", "output_text"), text }),
    fc.record({ type: fc.constant("image"), source: fc.record({ data: text }) }),
    fc.record({ type: fc.constant("tool_use"), name: text, input: fc.jsonValue() }),
    fc.record({ type: fc.constant("tool_result"), content: text }),
  );
  const message = fc.oneof(
    fc.record(
      {
        role: fc.constantFrom("system", "user", "assistant", "tool"),
        content: fc.oneof(text, fc.array(part), fc.constant(null)),
        tool_calls: fc.jsonValue(),
        images: fc.array(text),
      },
      { requiredKeys: ["role"] },
    ),
    fc.record({ type: fc.constant("function_call"), name: text, arguments: text }),
    fc.record({
      type: fc.constant("function_call_output"),
      output: fc.oneof(text, fc.array(part)),
    }),
  );
  const talk = fc.array(message, { maxLength: 12 });
  const before = fc.record({ tools: fc.array(fc.jsonValue()), system: text, instructions: text });

  it("begins with the turn before it", () => {
    for (const [path, field] of [
      [CHAT, "messages"],
      [MESSAGES, "messages"],
      [RESPONSES, "input"],
      [OLLAMA_CHAT, "messages"],
    ] as const) {
      fc.assert(
        fc.property(before, talk, talk, (head, earlier, later) => {
          const first = conversationOf(path, { ...head, [field]: earlier });
          const next = conversationOf(path, { ...head, [field]: [...earlier, ...later] });
          assert(next.join("").startsWith(first.join("")));
          const { blocks } = chainOf("m", first);
          assert.deepEqual(chainOf("m", next).blocks.slice(0, blocks.length), blocks);
        }),
        { numRuns: 25 },
      );
    }
  });

  it("begins with the tokens before it", () => {
    const tokens = fc.array(fc.nat(150_000), { minLength: 1, maxLength: 400, size: "max" });
    fc.assert(
      fc.property(tokens, tokens, (earlier, later) => {
        const { blocks } = chainOf("m", conversationOf(COMPLETIONS, { prompt: earlier }));
        const next = chainOf("m", conversationOf(COMPLETIONS, { prompt: [...earlier, ...later] }));
        assert.deepEqual(next.blocks.slice(0, blocks.length), blocks);
      }),
    );
  });
});

describe("a body of any shape", () => {
  it("is read without a throw, into strings", () => {
    const fields = ["messages", "input", "prompt", "system", "tools", "instructions", "context"];
    const any = fc.anything({ withBigInt: true, withNullPrototype: true, maxDepth: 2 });
    const member = fc.dictionary(
      fc.constantFrom("role", "type", "text", "content", "tool_calls", "images", "name", "source"),
      any,
    );
    const value = fc.oneof(any, member, fc.array(fc.oneof(any, member)));
    const body = fc.dictionary(fc.constantFrom(...fields), value);
    fc.assert(
      fc.property(fc.constantFrom(...PATHS), body, (path, read) => {
        for (const piece of conversationOf(path, read)) assert.equal(typeof piece, "string");
      }),
      { numRuns: 100 },
    );
  });

  it("is not followed as deep as it goes", () => {
    let list: unknown = "deep";
    let record: unknown = "deep";
    let part: unknown = "deep";
    for (let level = 0; level < 200_000; level++) {
      list = [list];
      record = { a: record };
      part = { type: "tool_result", content: [part] };
    }
    for (const value of [list, record, part]) {
      const role = { role: "user", content: value, tool_calls: value, images: value };
      const body = {
        messages: [role, value],
        input: value,
        prompt: value,
        tools: [value],
        system: value,
      };
      for (const path of PATHS) {
        assert(!said(path, body).includes("deep"));
        assert(conversationOf(path, body).length < 2000);
      }
    }
  });

  it("is cut where it has more parts than any prompt", () => {
    const many = Array.from({ length: 150_000 }, () => "");
    for (const body of [
      { messages: many },
      { messages: many.map(() => ({})) },
      { tools: many },
      { tools: [Object.fromEntries(many.map((_, at) => [at, 1]))] },
      { messages: [{ role: "user", content: [{ type: "image", source: many }] }] },
    ]) {
      const { length } = conversationOf(CHAT, body);
      assert(length >= 100_000 && length < 100_100, `${length}`);
    }
  });
});

describe("a session", () => {
  const ask = (headers: Record<string, string>, body: Body = {}) =>
    sessionOf(new Headers(headers), body);

  it("is the first that is named", () => {
    const headers = { "x-session-id": "a", "x-claude-code-session-id": "b", "session-id": "c" };
    const body = { prompt_cache_key: "d" };
    assert.equal(ask(headers, body), "a");
    assert.equal(ask({ ...headers, "x-session-id": " " }, body), "b");
    assert.equal(ask({ "session-id": "c" }, body), "c");
    assert.equal(ask({}, body), "d");
    assert.equal(ask({}), null);
  });

  it("is trimmed, and cut after 200 characters", () => {
    assert.equal(ask({}, { prompt_cache_key: "  d\n" }), "d");
    assert.equal(ask({}, { prompt_cache_key: `  ${"d".repeat(300)}` }), "d".repeat(200));
    for (const value of ["", " ", 7, null, ["d"], {}]) {
      assert.equal(ask({}, { prompt_cache_key: value }), null);
    }
  });
});
