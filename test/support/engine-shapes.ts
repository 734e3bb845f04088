/** What an answer looks like on the wire: what every kind shares, and chat and completions of each. */
import type { ToolCall } from "./engine-behaviour.ts";

/** One answer's fixed part. */
export interface Job {
  style: Style;
  /** How many answers this engine has given. */
  count: number;
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
  /** Where it is no event stream. */
  contentType?: string;
  open(usage: Usage): string[];
  piece(piece: Piece, isFirst: boolean, finishReason: string | null): string[];
  finish(reason: string | null, usage: Usage): string[];
  done(): string[];
  error(error: unknown): string[];
  /** What Ollama makes of an error in mid-stream. */
  swallowed(): string[];
  whole(pieces: Piece[], reason: string, usage: Usage): unknown;
}

type Fields = Record<string, unknown>;

/** How one kind words its answers. */
export interface Style {
  /** An answer's id; `prefix` is "chatcmpl", "cmpl", "msg", "resp" or "embd". */
  id(prefix: string, count: number): string;
  /** The answer says the engine's own name for the model, not the one asked for. */
  answersOwnName: boolean;
  /** One chunk, or one whole answer. */
  frame(job: Job, object: string, prefix: string, choices: unknown[], more: Fields): Fields;
  choice(content: Fields, reason: string | null): Fields;
  delta(fields: Fields): Fields;
  message(fields: Fields): Fields;
  /** Only on whole answers. */
  wholeMore: Fields;
  /** In a first chunk that has only the role. */
  firstContent: "" | null;
  reasoning: "reasoning" | "reasoning_content";
  wholeToolCalls: boolean;
  usage(usage: Usage): Fields;
  /** Where usage stands in streamed completions. */
  completionUsage: "extraChunk" | "extraChunkAndZeros" | "lastChoice";
  /** Whether `max_completion_tokens` means anything. */
  knowsCompletionLimit: boolean;
  /** Numbers and places in the events of the Responses API. */
  numbersEvents: boolean;
  messagesUsage(usage: Usage, at: "start" | "end" | "whole"): Fields;
  embeddings(vectors: unknown[], job: Job, tokens: number, isBase64: boolean): unknown;
  knowsBase64: boolean;
  rerank(scores: { index: number; document: unknown; score: number }[], job: Job): unknown;
  /** The engine's own end of a stream that fails: what it still says, in one shape's words. */
  dies(shape: Shape, hasDone: boolean): string[];
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

export function chatShape(job: Job): Shape {
  const { style } = job;
  const chunk = (choices: unknown[], more: Fields = {}): string =>
    sse(style.frame(job, "chat.completion.chunk", "chatcmpl", choices, more));
  const delta = (fields: Fields, reason: string | null = null): string =>
    chunk([style.choice({ delta: style.delta(fields) }, reason)]);
  return {
    // real §6.6: Ollama's first chunk is the first token.
    open: () => (job.roleFirst ? [delta({ role: "assistant", content: style.firstContent })] : []),
    piece(piece, isFirst, reason) {
      const role = isFirst && !job.roleFirst ? { role: "assistant" } : {};
      if ("text" in piece) return [delta({ ...role, content: piece.text }, reason)];
      // wire §1.8: Ollama sends an empty content along.
      const content = style.wholeToolCalls ? { content: "" } : {};
      if ("reasoning" in piece) {
        return [delta({ ...role, ...content, [style.reasoning]: piece.reasoning }, reason)];
      }
      const { toolCall, index } = piece;
      const id = `call_${index}abcdefg`;
      // wire §1.8: Ollama sends whole calls, the others fragments by index.
      if (style.wholeToolCalls) {
        const call = { id, index, type: "function", function: toolCall };
        return [delta({ ...role, ...content, tool_calls: [call] }, reason)];
      }
      const named = { name: toolCall.name, arguments: "" };
      const start = { index, id, type: "function", function: named };
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
        const choices = [style.choice({ delta: style.delta({}) }, reason)];
        frames.push(chunk(choices, job.includeUsage ? {} : timings));
      }
      if (job.includeUsage) frames.push(chunk([], { usage: style.usage(usage), ...timings }));
      return frames;
    },
    done: () => [sse("[DONE]")],
    error: (error) => [sse({ error })],
    swallowed: () => {
      const choice = style.choice({ delta: { role: "assistant", content: "" } }, null);
      const nameless = { ...job, model: "" };
      return [sse(style.frame(nameless, "chat.completion.chunk", "chatcmpl", [choice], {}))];
    },
    whole(pieces, reason, usage) {
      const { text, reasoning, toolCalls } = join(pieces);
      const fields: Fields = { role: "assistant", content: text };
      if (reasoning !== "") fields[style.reasoning] = reasoning;
      if (toolCalls.length > 0) {
        fields.tool_calls = toolCalls.map((call, index) => ({
          id: `call_${index}abcdefg`,
          index,
          type: "function",
          function: call,
        }));
      }
      const choices = [style.choice({ message: style.message(fields) }, reason)];
      const timings = job.timings ? { timings: timingsObject(usage) } : {};
      const more = { usage: style.usage(usage), ...style.wholeMore, ...timings };
      return style.frame(job, "chat.completion", "chatcmpl", choices, more);
    },
  };
}

export function completionsShape(job: Job): Shape {
  const { style } = job;
  const frame = (choices: unknown[], more: Fields): Fields =>
    style.frame(job, "text_completion", "cmpl", choices, more);
  const nothing = { input: 0, output: 0, cached: null };
  // wire §1.6: with include_usage Ollama puts a zero usage on every chunk, the real one on the last.
  const zero =
    style.completionUsage === "extraChunkAndZeros" && job.includeUsage
      ? { usage: style.usage(nothing) }
      : {};
  const text = (value: string, reason: string | null, more: Fields = zero): string =>
    sse(frame([style.choice({ text: value }, reason)], more));
  return {
    open: () => [],
    piece: (piece, _isFirst, reason) => ("text" in piece ? [text(piece.text, reason)] : []),
    finish(reason, usage) {
      // Measured, llama.cpp: always on the finish chunk, never a chunk of its own.
      if (style.completionUsage === "lastChoice") {
        const timings = job.timings ? { timings: timingsObject(usage) } : {};
        return [text("", reason, { usage: style.usage(usage), ...timings })];
      }
      const frames: string[] = [];
      if (!job.finishOnLastToken) frames.push(text("", reason));
      if (job.includeUsage) frames.push(sse(frame([], { usage: style.usage(usage) })));
      return frames;
    },
    done: () => [sse("[DONE]")],
    error: (error) => [sse({ error })],
    swallowed: () => {
      const choice = style.choice({ text: "" }, null);
      return [sse(style.frame({ ...job, model: "" }, "text_completion", "cmpl", [choice], {}))];
    },
    whole(pieces, reason, usage) {
      const timings = job.timings ? { timings: timingsObject(usage) } : {};
      const more = { usage: style.usage(usage), ...style.wholeMore, ...timings };
      return frame([style.choice({ text: join(pieces).text }, reason)], more);
    },
  };
}
