/** What is read from answers, by chunks as each engine writes them (wire.md §1.6–1.8, real-engines.md §5). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { countTokens, messages } from "../../src/dialects/anthropic.ts";
import {
  emptyFacts,
  isWhole,
  readView,
  type AnswerFacts,
  type Endpoint,
} from "../../src/dialects/dialect.ts";
import {
  chatCompletions,
  completions,
  embeddings,
  rerank,
  responses,
} from "../../src/dialects/openai.ts";
import { GatewayError } from "../../src/errors.ts";

type Chunk = Record<string, unknown>;

interface Heard {
  facts: AnswerFacts;
  /** Which chunks only report usage. */
  usageAt: number[];
  /** Which chunk was the first with a token. */
  firstTokenAt: number | null;
}

function hear(endpoint: Endpoint, chunks: readonly Chunk[]): Heard {
  const facts = emptyFacts();
  const usageAt: number[] = [];
  let firstTokenAt: number | null = null;
  for (const [at, chunk] of chunks.entries()) {
    if (endpoint.readEvent(chunk, facts) === "usage") usageAt.push(at);
    if (firstTokenAt === null && facts.deltas > 0) firstTokenAt = at;
  }
  return { facts, usageAt, firstTokenAt };
}

function told(facts: AnswerFacts) {
  const { deltas, usage, finishReasons, error, id, model } = facts;
  return { deltas, usage, finishReasons, error, id, model, whole: isWhole(facts) };
}

/** A chunk of /v1/chat/completions. */
function chat(delta: object | null, finish: string | null = null, more: Chunk = {}): Chunk {
  const choices = delta === null ? [] : [{ index: 0, delta, finish_reason: finish }];
  return {
    id: "chatcmpl-7",
    object: "chat.completion.chunk",
    created: 1,
    model: "m",
    choices,
    ...more,
  };
}

const usage = (prompt: number, completion: number, details?: object) => ({
  prompt_tokens: prompt,
  completion_tokens: completion,
  total_tokens: prompt + completion,
  ...(details === undefined ? {} : { prompt_tokens_details: details }),
});

describe("/v1/chat/completions, streamed", () => {
  it("Ollama: role and first content together, finish chunk, usage chunk", () => {
    const { facts, usageAt, firstTokenAt } = hear(chatCompletions, [
      chat({ role: "assistant", content: "I" }),
      chat({ content: " am" }),
      chat({}, "stop"),
      chat(null, null, { usage: usage(11, 2) }),
    ]);
    assert.deepEqual(told(facts), {
      deltas: 2,
      usage: { input: 11, output: 2, cached: null },
      finishReasons: ["stop"],
      error: null,
      id: "chatcmpl-7",
      model: "m",
      whole: true,
    });
    assert.deepEqual([usageAt, firstTokenAt], [[3], 0]);
  });

  it("llama.cpp: a role with content null first, timings, cached tokens", () => {
    const timings = { cache_n: 8, prompt_n: 3, predicted_n: 2 };
    const { facts, usageAt, firstTokenAt } = hear(chatCompletions, [
      chat({ role: "assistant", content: null }),
      chat({ content: "I" }),
      chat({ content: " am" }),
      chat({}, "length"),
      chat(null, null, { usage: usage(11, 2, { cached_tokens: 8 }), timings }),
    ]);
    assert.deepEqual(facts.usage, { input: 11, output: 2, cached: 8 });
    assert.deepEqual([facts.deltas, facts.finishReasons], [2, ["length"]]);
    assert.deepEqual([usageAt, firstTokenAt], [[4], 1]);
  });

  it("llama.cpp without include_usage: timings on the finish chunk tell no usage", () => {
    const { facts, usageAt } = hear(chatCompletions, [
      chat({ content: "I" }),
      chat({}, "stop", { timings: { cache_n: 8, prompt_n: 3, predicted_n: 2 } }),
    ]);
    assert.deepEqual([facts.usage, usageAt], [null, []]);
  });

  it("vLLM: a role with empty content first, the finish on the last content chunk", () => {
    const { facts, usageAt, firstTokenAt } = hear(chatCompletions, [
      chat({ role: "assistant", content: "" }, null, { prompt_text: null }),
      chat({ content: "I" }),
      chat({ content: " am" }, "stop", { token_ids: null }),
      chat(null, null, { usage: usage(5, 2) }),
    ]);
    assert.deepEqual([facts.deltas, facts.finishReasons, firstTokenAt], [2, ["stop"], 1]);
    assert.deepEqual([facts.usage, usageAt], [{ input: 5, output: 2, cached: null }, [3]]);
  });

  it("vLLM with continuous_usage_stats: cumulative counts, the last one stands", () => {
    const { facts, usageAt } = hear(chatCompletions, [
      chat({ role: "assistant", content: "" }, null, { usage: usage(5, 0) }),
      chat({ content: "I" }, null, { usage: usage(5, 1) }),
      chat({ content: " am" }, "stop", { usage: usage(5, 2) }),
      chat(null, null, { usage: usage(5, 2) }),
    ]);
    assert.deepEqual(facts.usage, { input: 5, output: 2, cached: null });
    assert.deepEqual(usageAt, [3], "a chunk with content is never hidden");
  });

  it("OpenAI: usage null on every other chunk", () => {
    const { facts, usageAt } = hear(chatCompletions, [
      chat({ role: "assistant", content: "", refusal: null }, null, { usage: null }),
      chat({ content: "I" }, "stop", { usage: null, obfuscation: "xyz" }),
      chat(null, null, { usage: usage(5, 1) }),
    ]);
    assert.deepEqual([facts.usage?.output, usageAt], [1, [2]]);
  });

  it("LM Studio: reasoning_content before content", () => {
    const { facts, firstTokenAt } = hear(chatCompletions, [
      chat({ role: "assistant" }),
      chat({ reasoning_content: "hm" }),
      chat({ content: "I" }),
      chat({}, "stop"),
    ]);
    assert.deepEqual([facts.deltas, firstTokenAt], [2, 1]);
  });

  it("counts reasoning, a refusal and tool calls as tokens", () => {
    for (const delta of [
      { reasoning: "hm" },
      { reasoning_content: "hm" },
      { refusal: "no" },
      { tool_calls: [{ index: 0, function: { arguments: '{"a' } }] },
      { function_call: { arguments: "{" } },
    ]) {
      assert.equal(hear(chatCompletions, [chat(delta)]).facts.deltas, 1, JSON.stringify(delta));
    }
    for (const delta of [{}, { role: "assistant" }, { content: "" }, { tool_calls: [] }]) {
      assert.equal(hear(chatCompletions, [chat(delta)]).facts.deltas, 0, JSON.stringify(delta));
    }
  });

  it("Ollama: a whole tool call in one chunk", () => {
    const call = { id: "c", index: 0, type: "function", function: { name: "f", arguments: "{}" } };
    const { facts } = hear(chatCompletions, [
      chat({ role: "assistant", content: "", tool_calls: [call] }),
      chat({}, "tool_calls"),
    ]);
    assert.deepEqual([facts.deltas, facts.finishReasons], [1, ["tool_calls"]]);
  });

  it("Ollama: an error in mid-stream is swallowed, and the answer is not whole", () => {
    const { facts } = hear(chatCompletions, [
      chat({ role: "assistant", content: "I" }),
      chat({ content: "" }, null, { model: "" }),
    ]);
    assert.deepEqual([isWhole(facts), facts.error, facts.finishReasons], [false, null, []]);
    assert.equal(facts.model, "m", "not what the swallowed error says");
  });

  const errors: [string, Chunk, string][] = [
    [
      "vLLM",
      { error: { message: "engine died", type: "x", param: null, code: 500 } },
      "engine died",
    ],
    [
      "llama.cpp",
      { error: { code: 500, message: "slot lost", type: "server_error" } },
      "slot lost",
    ],
    ["SGLang", { error: { object: "error", message: "aborted", code: 503 } }, "aborted"],
    ["TGI", { error: { message: "too long", http_status_code: 422 } }, "too long"],
    ["a string", { error: "no words but these" }, "no words but these"],
    ["an object without a message", { error: { reason: "x" } }, '{"reason":"x"}'],
  ];
  for (const [engine, chunk, words] of errors) {
    it(`${engine}: an error in mid-stream`, () => {
      const { facts } = hear(chatCompletions, [chat({ content: "I" }), chunk]);
      assert.equal(facts.error, words);
      assert.equal(isWhole(facts), false);
    });
  }

  it("does not take error: null for an error", () => {
    const { facts } = hear(chatCompletions, [chat({ content: "I" }, "stop", { error: null })]);
    assert.deepEqual([facts.error, facts.deltas, isWhole(facts)], [null, 1, true]);
  });

  it("is whole when every choice is finished, not before", () => {
    const choice = (index: number, delta: object, finish: string | null = null): Chunk => ({
      id: "c",
      choices: [{ index, delta, finish_reason: finish }],
    });
    const chunks = [
      choice(0, { content: "a" }),
      choice(1, { content: "b" }),
      choice(1, {}, "stop"),
      choice(0, {}, "length"),
    ];
    const wholes = chunks.map((_, at) =>
      isWhole(hear(chatCompletions, chunks.slice(0, at + 1)).facts),
    );
    assert.deepEqual(wholes, [false, false, false, true]);
    assert.deepEqual(hear(chatCompletions, chunks).facts.finishReasons, ["stop", "length"]);
  });

  it("counts one finish per choice, though an engine repeats it", () => {
    const { facts } = hear(chatCompletions, [chat({}, "stop"), chat({}, "stop")]);
    assert.deepEqual(facts.finishReasons, ["stop"]);
  });

  it("reads nothing from what is odd, and does not break on it", () => {
    for (const chunk of [
      {},
      { choices: null },
      { choices: "x" },
      { choices: [null, 1, "x", []] },
      { choices: [{}] },
      { choices: [{ delta: null }] },
      { choices: [], usage: null },
      { choices: [], usage: [] },
      { usage: { prompt_tokens: "5" }, choices: [] },
      { id: 7, model: null, choices: [] },
    ]) {
      const { facts } = hear(chatCompletions, [chunk]);
      assert.deepEqual([facts.deltas, facts.usage, facts.id, facts.error], [0, null, null, null]);
    }
  });
});

describe("/v1/completions, streamed", () => {
  const text = (said: string, finish: string | null, more: Chunk = {}): Chunk => ({
    id: "cmpl-1",
    object: "text_completion",
    model: "m",
    choices: [{ index: 0, text: said, finish_reason: finish, logprobs: null }],
    ...more,
  });

  it("Ollama: zero usage on every chunk, the truth on the last", () => {
    const zero = { usage: usage(0, 0) };
    const { facts, usageAt } = hear(completions, [
      text("I", null, zero),
      text(" am", null, zero),
      text("", "stop", zero),
      { ...text("", null), choices: [], usage: usage(4, 2) },
    ]);
    assert.deepEqual([facts.usage, facts.deltas], [{ input: 4, output: 2, cached: null }, 2]);
    assert.deepEqual([usageAt, isWhole(facts)], [[3], true]);
  });

  it("llama.cpp: usage beside the last choice, in a chunk that is not only usage", () => {
    const { facts, usageAt } = hear(completions, [
      text("I", null),
      text("", "stop", { usage: usage(4, 1, { cached_tokens: 0 }) }),
    ]);
    assert.deepEqual([facts.usage, usageAt], [{ input: 4, output: 1, cached: 0 }, []]);
  });
});

describe("/v1/messages, streamed", () => {
  const start = (used: object): Chunk => ({
    type: "message_start",
    message: { id: "msg_1", type: "message", role: "assistant", model: "m", usage: used },
  });
  const delta = (more: object): Chunk => ({ type: "content_block_delta", index: 0, delta: more });
  const stop = (used: object, reason = "end_turn"): Chunk => ({
    type: "message_delta",
    delta: { stop_reason: reason, stop_sequence: null },
    usage: used,
  });

  it("Anthropic: the whole of it", () => {
    const { facts, firstTokenAt } = hear(messages, [
      start({ input_tokens: 25, cache_read_input_tokens: 0, output_tokens: 1 }),
      { type: "content_block_start", index: 0, content_block: { type: "text", text: "" } },
      { type: "ping" },
      delta({ type: "text_delta", text: "I" }),
      delta({ type: "text_delta", text: " am" }),
      { type: "content_block_stop", index: 0 },
      stop({ output_tokens: 15 }),
      { type: "message_stop" },
    ]);
    assert.deepEqual(told(facts), {
      deltas: 2,
      usage: { input: 25, output: 15, cached: 0 },
      finishReasons: ["end_turn"],
      error: null,
      id: "msg_1",
      model: "m",
      whole: true,
    });
    assert.equal(firstTokenAt, 3);
  });

  it("Ollama: the start estimates, the end knows", () => {
    const { facts } = hear(messages, [
      start({ input_tokens: 3, output_tokens: 0 }),
      delta({ type: "text_delta", text: "I" }),
      stop({ input_tokens: 11, output_tokens: 4 }),
    ]);
    assert.deepEqual(facts.usage, { input: 11, output: 4, cached: null });
  });

  it("llama.cpp: input_tokens leaves the cached ones out, ours has them", () => {
    const { facts } = hear(messages, [
      start({ input_tokens: 5, cache_read_input_tokens: 20, output_tokens: 0 }),
      stop({ output_tokens: 7 }),
    ]);
    assert.deepEqual(facts.usage, { input: 25, output: 7, cached: 20 });
  });

  it("counts thinking and tool input as tokens", () => {
    const { facts } = hear(messages, [
      delta({ type: "thinking_delta", thinking: "hm" }),
      delta({ type: "input_json_delta", partial_json: "{" }),
    ]);
    assert.equal(facts.deltas, 2);
  });

  it("is whole from its stop reason on, or by message_stop, and not before", () => {
    const before = [start({ input_tokens: 1, output_tokens: 0 }), delta({ text: "I" })];
    assert.equal(isWhole(hear(messages, before).facts), false);
    assert.equal(isWhole(hear(messages, [...before, stop({})]).facts), true);
    assert.equal(isWhole(hear(messages, [...before, { type: "message_stop" }]).facts), true);
    const running = { type: "message_delta", delta: { stop_reason: null }, usage: {} };
    assert.equal(isWhole(hear(messages, [...before, running]).facts), false);
  });

  it("hears errors, in Anthropic's envelope or another's", () => {
    const overloaded = { type: "error", error: { type: "overloaded_error", message: "busy" } };
    assert.equal(hear(messages, [overloaded]).facts.error, "busy");
    assert.equal(hear(messages, [{ error: { message: "lost" } }]).facts.error, "lost");
    assert.equal(hear(messages, [{ type: "error" }]).facts.error, "no words");
  });
});

describe("/v1/responses, streamed", () => {
  const response = (status: string, more: object = {}) => ({
    id: "resp_1",
    object: "response",
    model: "m",
    status,
    ...more,
  });
  const used = { input_tokens: 9, output_tokens: 3, input_tokens_details: { cached_tokens: 4 } };

  it("the whole of it", () => {
    const { facts, firstTokenAt } = hear(responses, [
      { type: "response.created", response: response("in_progress", { usage: null }) },
      { type: "response.output_item.added", item: {} },
      { type: "response.reasoning_text.delta", delta: "hm" },
      { type: "response.output_text.delta", delta: "I" },
      { type: "response.output_text.done", text: "I" },
      { type: "response.completed", response: response("completed", { usage: used }) },
    ]);
    assert.deepEqual(told(facts), {
      deltas: 2,
      usage: { input: 9, output: 3, cached: 4 },
      finishReasons: ["completed"],
      error: null,
      id: "resp_1",
      model: "m",
      whole: true,
    });
    assert.equal(firstTokenAt, 2);
  });

  it("incomplete is an end, too: the engine says so itself", () => {
    const event = {
      type: "response.incomplete",
      response: response("incomplete", { usage: used }),
    };
    const { facts } = hear(responses, [event]);
    assert.deepEqual([isWhole(facts), facts.finishReasons], [true, ["incomplete"]]);
    assert.equal(facts.usage?.output, 3);
  });

  it("is not whole without its last event", () => {
    assert.equal(isWhole(hear(responses, [{ type: "response.output_text.delta" }]).facts), false);
  });

  it("hears errors: failed, an error event, a bare error object", () => {
    const heard = (chunk: Chunk) => hear(responses, [chunk]).facts.error;
    const failed = response("failed", { error: { code: "server_error", message: "lost" } });
    assert.equal(heard({ type: "response.failed", response: failed }), "lost");
    assert.equal(heard({ type: "response.failed" }), "the response failed");
    assert.equal(heard({ type: "error", code: "x", message: "gone", param: null }), "gone");
    assert.equal(heard({ error: { message: "SGLang's" } }), "SGLang's");
    assert.equal(
      heard({ type: "response.created", response: response("x", { error: null }) }),
      null,
    );
  });
});

describe("answers in one piece", () => {
  function whole(endpoint: Endpoint, body: Chunk) {
    const facts = emptyFacts();
    return { isAnswer: endpoint.readWhole(body, facts), facts };
  }

  it("of chat and completions: usage, finish reasons, identity", () => {
    const body = {
      id: "c",
      model: "m",
      choices: [
        { index: 0, message: { content: "a" }, finish_reason: "stop" },
        { index: 1, message: { content: "b" }, finish_reason: "length" },
      ],
      usage: usage(5, 6, { cached_tokens: 2 }),
    };
    for (const endpoint of [chatCompletions, completions]) {
      const { isAnswer, facts } = whole(endpoint, body);
      assert.equal(isAnswer, true);
      assert.deepEqual(told(facts), {
        deltas: 0,
        usage: { input: 5, output: 6, cached: 2 },
        finishReasons: ["stop", "length"],
        error: null,
        id: "c",
        model: "m",
        whole: true,
      });
    }
  });

  it("of embeddings and rerank: the list of its kind", () => {
    const vectors = { object: "list", data: [], model: "m", usage: { prompt_tokens: 3 } };
    assert.equal(whole(embeddings, vectors).isAnswer, true);
    assert.deepEqual(whole(embeddings, vectors).facts.usage, { input: 3, output: 0, cached: null });
    assert.equal(whole(rerank, { results: [], id: "r" }).isAnswer, true);
    assert.equal(whole(rerank, vectors).isAnswer, false);
    assert.equal(whole(embeddings, { data: null }).isAnswer, false);
  });

  it("of messages, count_tokens and responses", () => {
    const message = {
      type: "message",
      id: "msg",
      model: "m",
      stop_reason: "max_tokens",
      usage: { input_tokens: 2, cache_read_input_tokens: 3, output_tokens: 4 },
    };
    const { isAnswer, facts } = whole(messages, message);
    assert.equal(isAnswer, true);
    assert.deepEqual(facts.usage, { input: 5, output: 4, cached: 3 });
    assert.deepEqual([facts.finishReasons, facts.id], [["max_tokens"], "msg"]);
    assert.equal(whole(countTokens, { input_tokens: 12 }).isAnswer, true);
    assert.equal(whole(countTokens, {}).isAnswer, false);
    const response = {
      object: "response",
      id: "r",
      status: "completed",
      usage: { input_tokens: 1, output_tokens: 2 },
    };
    assert.equal(whole(responses, response).isAnswer, true);
    assert.deepEqual(whole(responses, response).facts.usage, { input: 1, output: 2, cached: null });
  });

  it("are none when an error stands in a 200, or something else altogether", () => {
    const bodies: Chunk[] = [
      { error: "Unexpected endpoint or method. (POST /v1/chat/completions)" },
      { error: { message: "x" } },
      {},
      { choices: null },
      { object: "chat.completion" },
    ];
    for (const endpoint of [
      chatCompletions,
      completions,
      embeddings,
      messages,
      responses,
      rerank,
    ]) {
      for (const body of bodies) {
        assert.equal(
          whole(endpoint, body).isAnswer,
          false,
          `${endpoint.path} ${JSON.stringify(body)}`,
        );
      }
    }
  });
});

describe("what a relay may skip", () => {
  /** After the first token only events that match `telling` are parsed: none that tells may be missed. */
  const telling: [Endpoint, Chunk[]][] = [
    [
      chatCompletions,
      [
        chat({}, "stop"),
        chat({ content: "x" }, "length"),
        chat(null, null, { usage: usage(1, 2) }),
        { error: { message: "x" } },
        { error: "x" },
        { choices: [{ index: 1, delta: { content: "x" }, finish_reason: null }] },
      ],
    ],
    [
      messages,
      [
        { type: "message_delta", delta: { stop_reason: "end_turn" }, usage: { output_tokens: 1 } },
        { type: "message_stop" },
        { type: "error", error: { message: "x" } },
      ],
    ],
    [
      responses,
      [
        { type: "response.completed", response: {} },
        { type: "response.incomplete", response: {} },
        { type: "response.failed", response: {} },
        { type: "error", message: "x" },
        { error: { message: "x" } },
      ],
    ],
  ];
  for (const [endpoint, chunks] of telling) {
    it(`${endpoint.path}: every event that tells something matches, with spaces or without`, () => {
      for (const chunk of chunks) {
        for (const text of [
          JSON.stringify(chunk),
          JSON.stringify(chunk, null, 1).replaceAll("\n", ""),
        ]) {
          assert.match(text, endpoint.telling);
        }
      }
    });
  }

  it("a plain token matches nothing, and carries the mark by which it is counted", () => {
    const plain: [Endpoint, Chunk][] = [
      [chatCompletions, chat({ content: "x" })],
      [chatCompletions, chat({ content: "x" }, null, { usage: null })],
      [completions, { choices: [{ index: 0, text: "x", finish_reason: null }] }],
      [messages, { type: "content_block_delta", delta: { type: "text_delta", text: "x" } }],
      [responses, { type: "response.output_text.delta", delta: "x" }],
    ];
    for (const [endpoint, chunk] of plain) {
      const text = `data: ${JSON.stringify(chunk)}\n\n`;
      assert.doesNotMatch(text, endpoint.telling);
      assert(text.includes(endpoint.deltaMark), text);
    }
  });
});

describe("the view of a request", () => {
  const invalid = (body: Chunk) => {
    try {
      readView(body);
      return null;
    } catch (error) {
      assert(error instanceof GatewayError && error.code === "invalid_parameter", String(error));
      assert.equal(error.status, 400);
      return error.param;
    }
  };

  it("is what the gateway acts on", () => {
    assert.deepEqual(readView({ model: "m", messages: [] }), {
      model: "m",
      stream: false,
      includeUsage: false,
      wants: [],
      choices: 1,
      sampling: { maxTokens: undefined, temperature: undefined, topP: undefined, seed: undefined },
    });
    const full = readView({
      model: "m",
      stream: true,
      stream_options: { include_usage: true, extra: 1 },
      max_tokens: 5,
      temperature: 0,
      top_p: 0.5,
      seed: 7,
      unknown: { anything: [] },
    });
    assert.deepEqual([full.stream, full.includeUsage], [true, true]);
    assert.deepEqual(full.sampling, { maxTokens: 5, temperature: 0, topP: 0.5, seed: 7 });
  });

  it("takes null for absent, as SDKs send it", () => {
    const view = readView({ model: "m", stream: null, stream_options: null, temperature: null });
    assert.deepEqual([view.stream, view.includeUsage], [false, false]);
    assert.equal(
      readView({ model: "m", stream_options: { include_usage: null } }).includeUsage,
      false,
    );
  });

  it("names the field at fault", () => {
    assert.equal(invalid({}), "model");
    assert.equal(invalid({ model: 7 }), "model");
    assert.equal(invalid({ model: "" }), "model");
    assert.equal(invalid({ model: "m", stream: "yes" }), "stream");
    assert.equal(invalid({ model: "m", stream_options: 1 }), "stream_options");
    assert.equal(
      invalid({ model: "m", stream_options: { include_usage: 1 } }),
      "stream_options.include_usage",
    );
  });

  it("leaves to the engine what only the engine acts on", () => {
    assert.equal(invalid({ model: "m", temperature: "hot", max_tokens: "many", seed: {} }), null);
  });

  it("is in one piece on the paths that do not stream, whatever the body says", () => {
    for (const endpoint of [embeddings, rerank, countTokens]) {
      assert.equal(endpoint.view({ model: "m", stream: true }).stream, false, endpoint.path);
    }
    for (const endpoint of [chatCompletions, completions, messages, responses]) {
      assert.equal(endpoint.view({ model: "m", stream: true }).stream, true, endpoint.path);
    }
  });
});

describe("what a request wants that not every engine does", () => {
  const wants = (endpoint: Endpoint, body: Chunk) =>
    endpoint.view({ model: "m", ...body }).wants.map(({ what, param }) => `${what} in ${param}`);
  const tools = [{ type: "function", function: { name: "f" } }];
  const named = { type: "function", function: { name: "f" } };
  const says = (...content: unknown[]) => [
    { role: "system", content: "see http://host/x.png" },
    { role: "user", content },
  ];
  const REMOTE = "http://host/x.png";
  const INLINE = "data:image/png;base64,iVBORw0KGgo=";

  it("is nothing for what every engine does, or may leave out without harm", () => {
    const harmless: Chunk = {
      n: 1,
      best_of: 1,
      echo: false,
      logit_bias: {},
      tool_choice: "auto",
      tools,
      user: "u",
      metadata: { a: 1 },
      store: true,
      parallel_tool_calls: false,
      prompt: "http://host/x.png",
      input: "text",
      previous_response_id: null,
      messages: says(
        { type: "text", text: REMOTE },
        { type: "image_url", image_url: { url: INLINE } },
      ),
    };
    for (const endpoint of [
      chatCompletions,
      completions,
      embeddings,
      rerank,
      messages,
      responses,
    ]) {
      assert.deepEqual(wants(endpoint, harmless), [], endpoint.path);
    }
    for (const body of [
      { tool_choice: "none" },
      { tool_choice: "none", tools: [] },
      { tool_choice: null, tools },
      { logit_bias: null },
      { n: null },
    ]) {
      assert.deepEqual(wants(chatCompletions, body), [], JSON.stringify(body));
    }
    assert.deepEqual(wants(messages, { tool_choice: { type: "auto" }, tools }), []);
    assert.deepEqual(wants(embeddings, { input: ["a", "b"] }), []);
    assert.deepEqual(wants(countTokens, { messages: says({ source: { url: REMOTE } }) }), []);
  });

  const asked: [Endpoint, Chunk, string][] = [
    [chatCompletions, { n: 2 }, "n in n"],
    [completions, { n: 2 }, "n in n"],
    [completions, { best_of: 3 }, "best_of in best_of"],
    [completions, { echo: true }, "echo in echo"],
    [chatCompletions, { logit_bias: { "50256": -100 } }, "logit_bias in logit_bias"],
    [completions, { logit_bias: { "50256": -100 } }, "logit_bias in logit_bias"],
    [chatCompletions, { tool_choice: "required" }, "tool_choice in tool_choice"],
    [chatCompletions, { tool_choice: "none", tools }, "tool_choice in tool_choice"],
    [chatCompletions, { tool_choice: named, tools }, "tool_choice in tool_choice"],
    [messages, { tool_choice: { type: "any" } }, "tool_choice in tool_choice"],
    [messages, { tool_choice: { type: "tool", name: "f" } }, "tool_choice in tool_choice"],
    [responses, { tool_choice: { type: "function", name: "f" } }, "tool_choice in tool_choice"],
    [completions, { prompt: ["a"] }, "prompt_list in prompt"],
    [completions, { prompt: [1, 2] }, "prompt_list in prompt"],
    [embeddings, { input: [1, 2] }, "token_input in input"],
    [embeddings, { input: [[1], [2]] }, "token_input in input"],
    [
      chatCompletions,
      { messages: says({ type: "image_url", image_url: { url: REMOTE } }) },
      "image_url in messages",
    ],
    [
      chatCompletions,
      { messages: says({ type: "image_url", image_url: "HTTPS://host/x.png" }) },
      "image_url in messages",
    ],
    [
      messages,
      { messages: says({ type: "image", source: { type: "url", url: REMOTE } }) },
      "image_url in messages",
    ],
    [responses, { input: says({ type: "input_image", image_url: REMOTE }) }, "image_url in input"],
    [responses, { previous_response_id: "resp_1" }, "stored_response in previous_response_id"],
  ];
  for (const [endpoint, body, want] of asked) {
    it(`${endpoint.path}: ${JSON.stringify(body).slice(0, 60)}`, () => {
      assert.deepEqual(wants(endpoint, body), [want]);
      for (const key of Object.keys(body)) {
        assert(endpoint.keys.includes(key), `${key} twice would mean two things`);
      }
    });
  }

  it("is all of it, each once", () => {
    const body = { n: 3, logit_bias: { 1: 1 }, tool_choice: "required", tools };
    assert.deepEqual(wants(chatCompletions, body), [
      "n in n",
      "logit_bias in logit_bias",
      "tool_choice in tool_choice",
    ]);
  });

  it("is not broken by what is odd", () => {
    for (const odd of [null, 7, "x", [], [null], [[]], {}, [{ content: [null, 7, {}] }], true]) {
      const body = { n: odd, logit_bias: 7, tool_choice: odd, messages: odd, echo: odd };
      assert.doesNotThrow(() => wants(chatCompletions, body), JSON.stringify(odd));
      assert.doesNotThrow(() => wants(responses, { input: odd, tools: odd }));
      assert.doesNotThrow(() => wants(messages, { messages: odd, tool_choice: odd }));
    }
  });
});

describe("errors as each dialect writes them", () => {
  const error = new GatewayError("model_not_found", 'no "x"\nhere', { param: "model" });
  const inner = {
    message: 'no "x"\nhere',
    type: "invalid_request_error",
    param: "model",
    code: "model_not_found",
  };

  it("OpenAI: an envelope of four, the same as an event", () => {
    const { dialect } = chatCompletions;
    assert.deepEqual(dialect.errorBody(error, "id"), { error: inner });
    assert.equal(dialect.errorEvent(error, "id"), `data: ${JSON.stringify({ error: inner })}\n\n`);
  });

  it("Responses: the event has its name", () => {
    const event = responses.dialect.errorEvent(error, "id");
    assert.equal(event, `event: error\ndata: ${JSON.stringify({ error: inner })}\n\n`);
  });

  it("Anthropic: its own envelope, with the request's id", () => {
    const body = {
      type: "error",
      error: { type: "not_found_error", message: inner.message },
      request_id: "id",
    };
    assert.deepEqual(messages.dialect.errorBody(error, "id"), body);
    const event = messages.dialect.errorEvent(error, "id");
    assert.equal(event, `event: error\ndata: ${JSON.stringify(body)}\n\n`);
  });

  const types: [ConstructorParameters<typeof GatewayError>[0], string][] = [
    ["invalid_json", "invalid_request_error"],
    ["invalid_api_key", "authentication_error"],
    ["permission_denied", "permission_error"],
    ["origin_not_allowed", "permission_error"],
    ["model_not_found", "not_found_error"],
    ["method_not_allowed", "invalid_request_error"],
    ["request_too_large", "request_too_large"],
    ["unsupported_media_type", "invalid_request_error"],
    ["rate_limit_exceeded", "rate_limit_error"],
    ["internal_error", "api_error"],
    ["upstream_error", "api_error"],
    ["overloaded", "overloaded_error"],
    ["no_backend_available", "overloaded_error"],
    ["upstream_timeout", "timeout_error"],
  ];
  for (const [code, type] of types) {
    it(`Anthropic: ${code} is ${type}`, () => {
      const body = messages.dialect.errorBody(new GatewayError(code, "x"), "id");
      assert.equal((body as { error: { type: string } }).error.type, type);
    });
  }

  it("Anthropic: an engine's own status decides, too", () => {
    const passed = { status: 404, type: "NotFoundError", code: null };
    const body = messages.dialect.errorBody(
      new GatewayError("invalid_parameter", "x", { passed }),
      "id",
    );
    assert.equal((body as { error: { type: string } }).error.type, "not_found_error");
  });
});
