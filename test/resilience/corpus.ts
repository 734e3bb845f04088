/** Whole streams in every dialect, worded as each kind of engine words them. */
import type { BackendKind } from "../support/engine-call.ts";
import { profiles } from "../support/engine-kinds.ts";
import { messagesShape } from "../support/engine-messages.ts";
import { responsesShape } from "../support/engine-responses.ts";
import type { Job, Piece, Shape } from "../support/engine-shapes.ts";
import { chatShape, completionsShape, sse } from "../support/engine-shapes.ts";

export type Path = "/v1/chat/completions" | "/v1/completions" | "/v1/messages" | "/v1/responses";
export type Kind = Exclude<BackendKind, "openai">;

export interface WholeStream {
  name: string;
  kind: Kind;
  path: Path;
  /** What was asked for. */
  request: Record<string, unknown>;
  /** Comments and pings are frames of their own. */
  frames: string[];
  /** How many frames make it whole: the last one has the last choice's end. */
  finished: number;
  /** How many frames have its end marker in them. */
  ended: number;
  /** The client did not ask for the frame that has only usage. */
  hidesUsage: boolean;
}

export const kinds: readonly Kind[] = ["ollama", "llamacpp", "vllm", "lmstudio", "sglang"];

const shapes: Record<Path, (job: Job) => Shape> = {
  "/v1/chat/completions": chatShape,
  "/v1/completions": completionsShape,
  "/v1/messages": messagesShape,
  "/v1/responses": responsesShape,
};
export const paths = Object.keys(shapes) as Path[];

/** What the last frame of an answer has, apart from what may follow it. */
const finishes: Record<Path, RegExp> = {
  "/v1/chat/completions": /"finish_reason":"/,
  "/v1/completions": /"finish_reason":"/,
  "/v1/messages": /"type":"message_delta"/,
  "/v1/responses": /"type":"response.completed"/,
};
const markers = /data: \[DONE\]|"type":"(?:message_stop|response\.completed)"/;

const words: Piece[] = [{ text: 'a\n"finish_reason":"x"' }, { text: " \u{1f30a}" }];
const thoughts: Piece[] = [{ reasoning: "hm" }, { text: "b" }];
const calls: Piece[] = [
  { text: "c" },
  { toolCall: { name: "f", arguments: '{"p":"message_stop"}' }, index: 0 },
  { toolCall: { name: "g", arguments: "{}" }, index: 1 },
];

interface Variant {
  pieces?: Piece[];
  reason?: string;
  job?: Partial<Job>;
  asksUsage?: boolean;
}

function jobOf(kind: Kind, more: Partial<Job> = {}): Job {
  const { style, behaviour } = profiles[kind];
  return {
    style,
    count: 1,
    created: 1,
    model: "m",
    includeUsage: true,
    roleFirst: behaviour.roleFirst ?? true,
    finishOnLastToken: behaviour.finishOnLastToken ?? false,
    timings: behaviour.timings ?? false,
    ...more,
  };
}

const usage = { input: 4, output: 2, cached: 1 };

function framesOf(kind: Kind, path: Path, { pieces = words, reason = "stop", job }: Variant) {
  const full = jobOf(kind, job);
  const shape = shapes[path](full);
  const body = pieces.flatMap((piece, index) => {
    const isLast = index === pieces.length - 1 && full.finishOnLastToken;
    return shape.piece(piece, index === 0, isLast ? reason : null);
  });
  return [...shape.open(usage), ...body, ...shape.finish(reason, usage), ...shape.done()];
}

/** Two answers at once, their chunks mixed; vLLM, llama.cpp and SGLang do it so. */
function twoChoices(kind: Kind): string[] {
  const job = jobOf(kind);
  const { style } = job;
  const chunk = (index: number, fields: Record<string, unknown>, reason: string | null): string => {
    const choice = { ...style.choice({ delta: style.delta(fields) }, reason), index };
    return sse(style.frame(job, "chat.completion.chunk", "chatcmpl", [choice], {}));
  };
  return [
    chunk(0, { role: "assistant", content: "" }, null),
    chunk(1, { role: "assistant", content: "" }, null),
    chunk(1, { content: "x" }, null),
    chunk(0, { content: "y" }, null),
    chunk(0, {}, "length"),
    chunk(1, { content: "z" }, null),
    chunk(1, {}, "stop"),
    sse(style.frame(job, "chat.completion.chunk", "chatcmpl", [], { usage: style.usage(usage) })),
    sse("[DONE]"),
  ];
}

function requestOf(path: Path, asksUsage: boolean): Record<string, unknown> {
  const plain = { model: "m", stream: true };
  const options = asksUsage ? { stream_options: { include_usage: true } } : {};
  const messages = [{ role: "user", content: "x" }];
  if (path === "/v1/chat/completions") return { ...plain, messages, ...options };
  if (path === "/v1/completions") return { ...plain, prompt: "x", ...options };
  if (path === "/v1/messages") return { ...plain, messages, max_tokens: 9 };
  return { ...plain, input: "x" };
}

function wholeStream(
  name: string,
  kind: Kind,
  path: Path,
  frames: string[],
  asksUsage = true,
): WholeStream {
  return {
    name: `${kind} ${path}: ${name}`,
    kind,
    path,
    request: requestOf(path, asksUsage),
    frames,
    finished: frames.findLastIndex((frame) => finishes[path].test(frame)) + 1,
    ended: frames.findLastIndex((frame) => markers.test(frame)) + 1,
    hidesUsage: !asksUsage,
  };
}

function variant(name: string, kind: Kind, path: Path, how: Variant = {}): WholeStream {
  return wholeStream(name, kind, path, framesOf(kind, path, how), how.asksUsage);
}

/** The plain stream of a dialect, for who needs only one. */
export function plainStream(path: Path): WholeStream {
  return variant("plain", "llamacpp", path);
}

/** Every frame once with another line end, or with something between the frames. */
function remade(stream: WholeStream, name: string, remake: (frame: string) => string[]) {
  const frames = stream.frames.flatMap(remake);
  return wholeStream(name, stream.kind, stream.path, frames);
}

const ping = 'event: ping\ndata: {"type":"ping"}\n\n';

export function corpus(): WholeStream[] {
  const chat = "/v1/chat/completions";
  const streams: WholeStream[] = [];
  for (const kind of kinds) {
    for (const path of paths) streams.push(variant("words", kind, path));
    streams.push(variant("reasoning", kind, chat, { pieces: thoughts, reason: "length" }));
    streams.push(variant("tools", kind, chat, { pieces: calls, reason: "tool_calls" }));
    streams.push(variant("usage not asked for", kind, chat, { asksUsage: false }));
  }
  for (const kind of ["llamacpp", "vllm", "sglang"] as const) {
    streams.push(wholeStream("n=2", kind, chat, twoChoices(kind)));
  }
  for (const path of [chat, "/v1/completions"] as const) {
    const job = { finishOnLastToken: true, includeUsage: false };
    streams.push(variant("finish on the last token", "lmstudio", path, { job }));
    streams.push(variant("no tokens", "ollama", path, { pieces: [] }));
  }
  for (const [kind, path] of [
    ["ollama", "/v1/messages"],
    ["vllm", "/v1/messages"],
    ["ollama", "/v1/responses"],
  ] as const) {
    streams.push(variant("reasoning", kind, path, { pieces: thoughts }));
  }
  streams.push(
    variant("tools", "llamacpp", "/v1/messages", { pieces: calls, reason: "tool_calls" }),
  );
  for (const path of paths) {
    const plain = plainStream(path);
    streams.push(remade(plain, "CRLF", (frame) => [frame.replaceAll("\n", "\r\n")]));
    streams.push(remade(plain, "comments", (frame) => [":\n\n", `: keep-alive\n${frame}`]));
    streams.push(remade(plain, "pings", (frame) => [frame, ping]));
  }
  return streams;
}
