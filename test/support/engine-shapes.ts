/** What an answer looks like on the wire, dialect by dialect: events of a stream, or one whole body. */
import type { ToolCall } from "./engine-behaviour.ts";

export type EngineKind = "ollama" | "openai";

/** One answer's fixed part. */
export interface Job {
  kind: EngineKind;
  id: string;
  created: number;
  model: string;
  /** The client asked for usage in the stream. */
  includeUsage: boolean;
  roleFirst: boolean;
  finishOnLastToken: boolean;
  timings: boolean;
}

export interface Usage {
  input: number;
  output: number;
  cached: number | null;
}

export type Piece =
  | { text: string }
  | { reasoning: string }
  | { toolCall: ToolCall; index: number };

export interface Shape {
  contentType: string;
  open(usage: Usage): string[];
  piece(piece: Piece, isFirst: boolean, finishReason: string | null): string[];
  finish(reason: string | null, usage: Usage): string[];
  done(): string[];
  error(error: unknown): string[];
  /** What Ollama makes of an error in mid-stream. */
  swallowed(): string[];
  whole(pieces: Piece[], reason: string, usage: Usage): unknown;
}

export function sse(data: unknown, event?: string): string {
  const name = event === undefined ? "" : `event: ${event}\n`;
  return `${name}data: ${typeof data === "string" ? data : JSON.stringify(data)}\n\n`;
}

export function join(pieces: Piece[]): { text: string; reasoning: string; toolCalls: ToolCall[] } {
  const joined = { text: "", reasoning: "", toolCalls: [] as ToolCall[] };
  for (const piece of pieces) {
    if ("text" in piece) joined.text += piece.text;
    else if ("reasoning" in piece) joined.reasoning += piece.reasoning;
    else joined.toolCalls.push(piece.toolCall);
  }
  return joined;
}

function usageObject(usage: Usage): Record<string, unknown> {
  const object: Record<string, unknown> = {
    prompt_tokens: usage.input,
    completion_tokens: usage.output,
    total_tokens: usage.input + usage.output,
  };
  if (usage.cached !== null) object.prompt_tokens_details = { cached_tokens: usage.cached };
  return object;
}

/** wire §1.6: `prompt_n` counts the new prompt tokens only, `cache_n` the others. */
function timingsObject(usage: Usage): Record<string, number> {
  const cached = usage.cached ?? 0;
  return {
    cache_n: cached,
    prompt_n: usage.input - cached,
    prompt_ms: 12.5,
    predicted_n: usage.output,
    predicted_ms: 84.25,
  };
}

/** wire §1.8: Ollama `reasoning`, llama.cpp and LM Studio `reasoning_content`. */
function reasoningField(kind: EngineKind): string {
  return kind === "ollama" ? "reasoning" : "reasoning_content";
}

export function chatShape(job: Job): Shape {
  const isOllama = job.kind === "ollama";
  const chunk = (choices: unknown[], more: Record<string, unknown> = {}): string =>
    sse({
      id: job.id,
      object: "chat.completion.chunk",
      created: job.created,
      model: job.model,
      system_fingerprint: isOllama ? "fp_ollama" : "b0-unknown",
      choices,
      ...more,
    });
  const delta = (fields: Record<string, unknown>, reason: string | null = null): string =>
    chunk([{ index: 0, delta: fields, finish_reason: reason }]);
  return {
    contentType: "text/event-stream",
    // real §6.6: Ollama's first chunk is the first token.
    open: () =>
      job.roleFirst ? [delta({ role: "assistant", content: isOllama ? "" : null })] : [],
    piece(piece, isFirst, reason) {
      const role = isFirst && !job.roleFirst ? { role: "assistant" } : {};
      if ("text" in piece) return [delta({ ...role, content: piece.text }, reason)];
      if ("reasoning" in piece) {
        const content = isOllama ? { content: "" } : {};
        return [
          delta({ ...role, ...content, [reasoningField(job.kind)]: piece.reasoning }, reason),
        ];
      }
      const { toolCall, index } = piece;
      const id = `call_${index}abcdefg`;
      // wire §1.8: Ollama sends whole calls, the others fragments by index.
      if (isOllama) {
        const call = { id, index, type: "function", function: toolCall };
        return [delta({ ...role, content: "", tool_calls: [call] }, reason)];
      }
      const start = {
        index,
        id,
        type: "function",
        function: { name: toolCall.name, arguments: "" },
      };
      const fragments = toolCall.arguments.match(/.{1,6}/gs) ?? [];
      return [
        delta({ ...role, tool_calls: [start] }),
        ...fragments.map((fragment, at) =>
          delta(
            { tool_calls: [{ index, function: { arguments: fragment } }] },
            at === fragments.length - 1 ? reason : null,
          ),
        ),
      ];
    },
    finish(reason, usage) {
      const timings = job.timings ? { timings: timingsObject(usage) } : {};
      const frames: string[] = [];
      if (!job.finishOnLastToken) {
        const choices = [{ index: 0, delta: {}, finish_reason: reason }];
        frames.push(chunk(choices, job.includeUsage ? {} : timings));
      }
      if (job.includeUsage) frames.push(chunk([], { usage: usageObject(usage), ...timings }));
      return frames;
    },
    done: () => [sse("[DONE]")],
    error: (error) => [sse({ error })],
    swallowed: () => [
      sse({
        id: job.id,
        object: "chat.completion.chunk",
        created: job.created,
        model: "",
        system_fingerprint: "fp_ollama",
        choices: [{ index: 0, delta: { role: "assistant", content: "" }, finish_reason: null }],
      }),
    ],
    whole(pieces, reason, usage) {
      const { text, reasoning, toolCalls } = join(pieces);
      const message: Record<string, unknown> = { role: "assistant", content: text };
      if (reasoning !== "") message[reasoningField(job.kind)] = reasoning;
      if (toolCalls.length > 0) {
        message.tool_calls = toolCalls.map((call, index) => ({
          id: `call_${index}abcdefg`,
          index,
          type: "function",
          function: call,
        }));
      }
      return {
        id: job.id,
        object: "chat.completion",
        created: job.created,
        model: job.model,
        system_fingerprint: isOllama ? "fp_ollama" : "b0-unknown",
        choices: [{ index: 0, message, finish_reason: reason }],
        usage: usageObject(usage),
        ...(job.timings ? { timings: timingsObject(usage) } : {}),
      };
    },
  };
}

export function completionsShape(job: Job): Shape {
  const base = { id: job.id.replace("chatcmpl", "cmpl"), object: "text_completion" };
  const isOllama = job.kind === "ollama";
  // wire §1.6: with include_usage Ollama puts a zero usage on every chunk, the real one on the last.
  const zero =
    isOllama && job.includeUsage
      ? { usage: { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0 } }
      : {};
  const chunk = (choices: unknown[], more: Record<string, unknown> = zero): string =>
    sse({ ...base, created: job.created, model: job.model, choices, ...more });
  return {
    contentType: "text/event-stream",
    open: () => [],
    piece: (piece, _isFirst, reason) =>
      "text" in piece ? [chunk([{ text: piece.text, index: 0, finish_reason: reason }])] : [],
    finish(reason, usage) {
      const frames: string[] = [];
      if (!job.finishOnLastToken)
        frames.push(chunk([{ text: "", index: 0, finish_reason: reason }]));
      if (job.includeUsage) frames.push(chunk([], { usage: usageObject(usage) }));
      return frames;
    },
    done: () => [sse("[DONE]")],
    error: (error) => [sse({ error })],
    swallowed: () => [
      sse({
        ...base,
        created: job.created,
        model: "",
        choices: [{ text: "", index: 0, finish_reason: null }],
      }),
    ],
    whole: (pieces, reason, usage) => ({
      ...base,
      created: job.created,
      model: job.model,
      choices: [{ text: join(pieces).text, index: 0, finish_reason: reason }],
      usage: usageObject(usage),
    }),
  };
}

const stopReasons: Record<string, string> = {
  stop: "end_turn",
  length: "max_tokens",
  tool_calls: "tool_use",
};

/** Anthropic's Messages: named events, no [DONE]; `message_stop` is the end. */
export function messagesShape(job: Job): Shape {
  const id = `msg_${job.id.replace(/\W/g, "")}`;
  let index = -1;
  let openBlock: "text" | "thinking" | null = null;
  const event = (type: string, fields: Record<string, unknown> = {}): string =>
    sse({ type, ...fields }, type);
  const close = (): string[] => {
    if (openBlock === null) return [];
    openBlock = null;
    return [event("content_block_stop", { index })];
  };
  const enter = (type: "text" | "thinking"): string[] => {
    if (openBlock === type) return [];
    const frames = close();
    openBlock = type;
    index += 1;
    frames.push(event("content_block_start", { index, content_block: { type, [type]: "" } }));
    return frames;
  };
  return {
    contentType: "text/event-stream",
    open: () => [
      event("message_start", {
        message: {
          id,
          type: "message",
          role: "assistant",
          model: job.model,
          content: [],
          stop_reason: null,
          stop_sequence: null,
          // real §5.1: Ollama's is an estimate here, the truth comes at the end.
          usage: { input_tokens: 3, output_tokens: 0 },
        },
      }),
    ],
    piece(piece) {
      if ("text" in piece) {
        const delta = { type: "text_delta", text: piece.text };
        return [...enter("text"), event("content_block_delta", { index, delta })];
      }
      if ("reasoning" in piece) {
        const delta = { type: "thinking_delta", thinking: piece.reasoning };
        return [...enter("thinking"), event("content_block_delta", { index, delta })];
      }
      const frames = close();
      index += 1;
      const { name, arguments: json } = piece.toolCall;
      return [
        ...frames,
        event("content_block_start", {
          index,
          content_block: { type: "tool_use", id: `toolu_${index}`, name, input: {} },
        }),
        event("content_block_delta", {
          index,
          delta: { type: "input_json_delta", partial_json: json },
        }),
        event("content_block_stop", { index }),
      ];
    },
    finish: (reason, usage) => [
      ...close(),
      event("message_delta", {
        delta: {
          stop_reason: reason === null ? null : (stopReasons[reason] ?? reason),
          stop_sequence: null,
        },
        usage: { input_tokens: usage.input, output_tokens: usage.output },
      }),
    ],
    done: () => [event("message_stop")],
    error: (error) => {
      const message = (error as { message?: string }).message ?? String(error);
      return [event("error", { error: { type: "api_error", message } })];
    },
    swallowed: () => [],
    whole(pieces, reason, usage) {
      const { text, reasoning, toolCalls } = join(pieces);
      const content: unknown[] = [];
      if (reasoning !== "") content.push({ type: "thinking", thinking: reasoning });
      if (text !== "") content.push({ type: "text", text });
      for (const [at, call] of toolCalls.entries()) {
        const input: unknown = JSON.parse(call.arguments);
        content.push({ type: "tool_use", id: `toolu_${at}`, name: call.name, input });
      }
      return {
        id,
        type: "message",
        role: "assistant",
        model: job.model,
        content,
        stop_reason: stopReasons[reason] ?? reason,
        stop_sequence: null,
        usage: { input_tokens: usage.input, output_tokens: usage.output },
      };
    },
  };
}

/** OpenAI's Responses: named, numbered events, no [DONE]; `response.completed` is the end. */
export function responsesShape(job: Job): Shape {
  const id = `resp_${job.id.replace(/\W/g, "")}`;
  const itemId = `msg_${job.id.replace(/\W/g, "")}`;
  let sequence = 0;
  let text = "";
  let completed: Record<string, unknown> = {};
  const event = (type: string, fields: Record<string, unknown>): string =>
    sse({ type, sequence_number: sequence++, ...fields }, type);
  const response = (
    status: string,
    output: unknown[],
    usage: unknown,
  ): Record<string, unknown> => ({
    id,
    object: "response",
    created_at: job.created,
    status,
    model: job.model,
    output,
    error: null,
    usage,
  });
  const item = (status: string, content: unknown[]): Record<string, unknown> => ({
    id: itemId,
    type: "message",
    status,
    role: "assistant",
    content,
  });
  const part = (value: string): Record<string, unknown> => ({
    type: "output_text",
    text: value,
    annotations: [],
  });
  const usageOf = (usage: Usage): Record<string, unknown> => ({
    input_tokens: usage.input,
    input_tokens_details: { cached_tokens: usage.cached ?? 0 },
    output_tokens: usage.output,
    output_tokens_details: { reasoning_tokens: 0 },
    total_tokens: usage.input + usage.output,
  });
  const place = { item_id: itemId, output_index: 0, content_index: 0 };
  return {
    contentType: "text/event-stream",
    open: () => [
      event("response.created", { response: response("in_progress", [], null) }),
      event("response.in_progress", { response: response("in_progress", [], null) }),
      event("response.output_item.added", { output_index: 0, item: item("in_progress", []) }),
      event("response.content_part.added", { ...place, part: part("") }),
    ],
    piece(piece) {
      if ("reasoning" in piece) {
        return [
          event("response.reasoning_summary_text.delta", { ...place, delta: piece.reasoning }),
        ];
      }
      if (!("text" in piece)) return [];
      text += piece.text;
      return [event("response.output_text.delta", { ...place, delta: piece.text })];
    },
    finish(reason, usage) {
      if (reason === null) return [];
      const done = item("completed", [part(text)]);
      completed = response("completed", [done], usageOf(usage));
      return [
        event("response.output_text.done", { ...place, text }),
        event("response.content_part.done", { ...place, part: part(text) }),
        event("response.output_item.done", { output_index: 0, item: done }),
      ];
    },
    done: () => [event("response.completed", { response: completed })],
    error: (error) => {
      const { message = String(error), code = null } = error as {
        message?: string;
        code?: unknown;
      };
      return [
        event("error", {
          code: typeof code === "number" ? String(code) : null,
          message,
          param: null,
        }),
      ];
    },
    swallowed: () => [],
    whole: (pieces, _reason, usage) =>
      response("completed", [item("completed", [part(join(pieces).text)])], usageOf(usage)),
  };
}
