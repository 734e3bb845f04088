/** The routes that every kind has, in that kind's wording. */
import type { Call, Handler, ModelInfo } from "./engine-call.ts";
import { isEmbedding, isFilled, isJsonObject, isReranker } from "./engine-call.ts";
import { messagesShape } from "./engine-messages.ts";
import { contextOf, refuse } from "./engine-profile.ts";
import { responsesShape } from "./engine-responses.ts";
import type { Job, Piece, Shape, Usage } from "./engine-shapes.ts";
import { chatShape, completionsShape } from "./engine-shapes.ts";
import type { Answer } from "./engine-stream.ts";
import { sendBody, sendWhole, streamAnswer } from "./engine-stream.ts";

type Json = Record<string, unknown>;

/** One way of asking for a generation. */
export interface Dialect {
  shape: (job: Job) => Shape;
  hasDone: boolean;
  /** Without `stream` in the body. */
  streamsByDefault: boolean;
  limit: (json: Json, knowsCompletionLimit: boolean) => unknown;
}

const openaiLimit: Dialect["limit"] = (json, knowsCompletionLimit) =>
  knowsCompletionLimit ? (json.max_completion_tokens ?? json.max_tokens) : json.max_tokens;

const plain = { streamsByDefault: false, limit: openaiLimit };
const chatDialect: Dialect = { ...plain, shape: chatShape, hasDone: true };

/** A body on its way to a model, without what it may be refused for first. */
export async function modelOf(call: Call): Promise<ModelInfo | null> {
  const { request, host, model } = call;
  const { "content-type": type = "", "content-encoding": encoding } = request.headers;
  const isJson = /^application\/json *(;|$)/i.test(type);
  if (!isJson && (await refuse(call, "contentType"))) return null;
  if (encoding !== undefined && (await refuse(call, "encoded"))) return null;
  if (!isJsonObject(request.body) && (await refuse(call, "badJson"))) return null;
  if (model === "" && (await refuse(call, "noModel"))) return null;
  const named = host.find(model);
  if (named !== undefined) return named;
  if (model !== "" && (await refuse(call, "unknownModel"))) return null;
  // Whoever does not look at the name serves what it has (wire §1.7).
  return host.models[0] ?? { name: model };
}

export const chat: Handler = async (call) => {
  const info = await modelOf(call);
  if (info === null) return;
  if (!isFilled(call.request.json.messages) && (await refuse(call, "noMessages"))) return;
  await generate(call, info, chatDialect);
};

function generateAs(dialect: Dialect): Handler {
  return async (call) => {
    const info = await modelOf(call);
    if (info !== null) await generate(call, info, dialect);
  };
}

export const completions = generateAs({ ...plain, shape: completionsShape, hasDone: true });
const messagesDialect: Dialect = { ...plain, shape: messagesShape, hasDone: false };

export const messages: Handler = async (call) => {
  const info = await modelOf(call);
  if (info === null) return;
  if (!("messages" in call.request.json) && (await refuse(call, "noMessages"))) return;
  await generate(call, info, messagesDialect);
};

export const responses = generateAs({
  shape: responsesShape,
  hasDone: false,
  streamsByDefault: false,
  limit: (json) => json.max_output_tokens,
});

export async function generate(call: Call, info: ModelInfo, dialect: Dialect): Promise<void> {
  const { request, reply, keep, behaviour, host } = call;
  const { json } = request;
  if (isEmbedding(info) && (await refuse(call, "notChat"))) return;
  const tokens = behaviour.promptTokens ?? countWords(json);
  const limit = contextOf(info, behaviour);
  if (tokens > limit && (await refuse(call, "tooLong", { tokens, limit }))) return;
  await host.hold(call, info, async () => {
    const cached = await readPrompt(call);
    const answer = answerOf(call, info, dialect, cached);
    const isStream = dialect.streamsByDefault ? json.stream !== false : json.stream === true;
    if (isStream && behaviour.fault?.kind !== "unstreamed") {
      await host.delay(behaviour.headersDelayMs, reply.left);
      if (!reply.left.aborted) await streamAnswer(reply, behaviour, answer, keep);
      return;
    }
    const { headersDelayMs, firstTokenDelayMs, tokenDelayMs, stallAfterTokens, stallMs } =
      behaviour;
    const stall = stallAfterTokens === null ? 0 : stallMs;
    const generating = tokenDelayMs * Math.max(0, answer.pieces.length - 1) + stall;
    await host.delay(headersDelayMs + firstTokenDelayMs + generating, reply.left);
    if (reply.left.aborted) return;
    if (behaviour.fault?.kind === "dies" && (await refuse(call, "crashed"))) return;
    await sendWhole(reply, behaviour, answer, keep);
  });
}

/** Takes as long as that does; tells how much of it was known. */
async function readPrompt({ behaviour, host, request, reply }: Call): Promise<number | null> {
  const { prefill, cachedTokens } = behaviour;
  if (prefill === null) return cachedTokens;
  const words = wordsOf(request.json);
  const cached = prefill.keeps ? host.read(words) : 0;
  await host.delay((words.length - cached) * prefill.msPerToken, reply.left);
  return cached;
}

function jobOf(call: Call, info: ModelInfo): Job {
  const { host, behaviour, model, request } = call;
  const { style } = host.profile;
  const options = request.json.stream_options as { include_usage?: boolean } | undefined;
  return {
    style,
    count: host.nextAnswer(),
    created: Math.floor(Date.now() / 1000),
    model: style.answersOwnName || model === "" ? info.name : model,
    includeUsage: options?.include_usage === true,
    roleFirst: behaviour.roleFirst,
    finishOnLastToken: behaviour.finishOnLastToken,
    timings: behaviour.timings,
  };
}

function answerOf(call: Call, info: ModelInfo, dialect: Dialect, cached: number | null): Answer {
  const { behaviour, request } = call;
  const job = jobOf(call, info);
  const words = Array.isArray(behaviour.tokens)
    ? behaviour.tokens
    : Array.from(
        { length: behaviour.tokens },
        (_, index) => `${index === 0 ? "" : " "}word${index}`,
      );
  // llama.cpp's own name goes before all others.
  const own = call.host.profile.kind === "llamacpp" ? request.json.n_predict : null;
  const asked = own ?? dialect.limit(request.json, job.style.knowsCompletionLimit);
  const limit = Number((behaviour.ignoresLimit ? null : asked) ?? Number.POSITIVE_INFINITY);
  const spoken = words.slice(0, limit < 0 ? Number.POSITIVE_INFINITY : limit);
  const pieces: Piece[] = [
    ...behaviour.reasoning.map((reasoning) => ({ reasoning })),
    ...spoken.map((text) => ({ text })),
    ...behaviour.toolCalls.map((toolCall, index) => ({ toolCall, index })),
  ];
  const natural = behaviour.toolCalls.length > 0 ? "tool_calls" : behaviour.finishReason;
  const usage: Usage = {
    input: seenTokens(call),
    output: pieces.length,
    cached,
  };
  const reason = spoken.length < words.length ? "length" : natural;
  const { style } = job;
  return { shape: dialect.shape(job), style, hasDone: dialect.hasDone, pieces, reason, usage };
}

/** real §5.1: what is too long and was not refused has been cut, to somewhat more than half. */
function seenTokens({ behaviour, request }: Call): number {
  const tokens = behaviour.promptTokens ?? countWords(request.json);
  const { contextLength } = behaviour;
  return contextLength === null || tokens <= contextLength ? tokens : contextLength / 2 + 2;
}

/** `/v1/embeddings`; `format` for those that have a format of their own elsewhere. */
export function embedAs(format?: (vectors: number[][], info: ModelInfo) => unknown): Handler {
  return async (call) => {
    const info = await modelOf(call);
    if (info === null) return;
    const { request, reply, behaviour, host, keep } = call;
    const { style } = host.profile;
    const { input, encoding_format: wanted, dimensions } = request.json;
    if (!isEmbedding(info) && (await refuse(call, "notEmbedding"))) return;
    if (input === undefined && (await refuse(call, "noInput"))) return;
    const inputs = Array.isArray(input) ? (input as unknown[]) : [input];
    const areStrings = inputs.every((each) => typeof each === "string");
    if (!areStrings && (await refuse(call, "tokenInput"))) return;
    const tokens = countWords(request.json);
    const limit = contextOf(info, behaviour);
    if (tokens > limit && (await refuse(call, "inputTooLong", { tokens, limit }))) return;
    const isTokens = inputs.length > 0 && inputs.every((each) => typeof each === "number");
    const items = isTokens ? [inputs] : inputs;
    await host.hold(call, info, async () => {
      await host.delay(behaviour.headersDelayMs, reply.left);
      if (reply.left.aborted) return;
      const length = Math.min(behaviour.vectorLength, Number(dimensions ?? Infinity));
      const vectors = items
        .filter((item) => format === undefined || item !== "")
        .map((item) => vectorOf(item).slice(0, length));
      const written = behaviour.vectors === "asked" ? wanted : behaviour.vectors;
      const isBase64 = written === "base64" && style.knowsBase64;
      const body =
        format?.(vectors, info) ??
        style.embeddings(
          isBase64 ? vectors.map(base64Of) : vectors,
          { ...jobOf(call, info), model: call.model === "" ? info.name : call.model },
          tokens,
          isBase64,
        );
      await sendBody(reply, 200, body, {}, keep);
    });
  };
}

export const rerank: Handler = async (call) => {
  const info = await modelOf(call);
  if (info === null) return;
  if (!isReranker(info) && (await refuse(call, "notRerank"))) return;
  const { documents } = call.request.json;
  const scores = (Array.isArray(documents) ? (documents as unknown[]) : [])
    .map((document, index) => ({ index, document, score: vectorOf(document)[0] ?? 0 }))
    .toSorted((a, b) => b.score - a.score);
  await call.host.hold(call, info, async () => {
    const body = call.host.profile.style.rerank(scores, jobOf(call, info));
    await sendBody(call.reply, 200, body, {}, call.keep);
  });
};

export const countTokens: Handler = async (call) => {
  if ((await modelOf(call)) === null) return;
  const body = { input_tokens: countWords(call.request.json) };
  await sendBody(call.reply, 200, body, {}, call.keep);
};

/** A GET with an answer that depends on nothing but the engine. */
export function reads(body: (call: Call) => unknown): Handler {
  return async (call) => {
    const isHead = call.request.method === "HEAD";
    const content = body(call);
    await sendBody(call.reply, 200, isHead ? "" : content, {}, call.keep);
  };
}

/** Handler of a path that is there only to be refused. */
export function refuses(problem: Parameters<typeof refuse>[1]): Handler {
  return async (call) => void (await refuse(call, problem));
}

function countWords(json: Json): number {
  return wordsOf(json).length;
}

function wordsOf(json: Json): string[] {
  const texts = JSON.stringify(json.messages ?? json.prompt ?? json.input ?? "");
  return texts.match(/\w+/g) ?? [];
}

/** Four numbers that depend on the input and fit a float32. */
function vectorOf(input: unknown): number[] {
  const text = JSON.stringify(input) ?? "";
  let state = text.length;
  for (const char of text) state = (Math.imul(state, 31) + char.charCodeAt(0)) >>> 0;
  return [0, 8, 16, 24].map((shift) => Math.fround(((state >>> shift) & 255) / 256));
}

/** Little-endian float32 (wire §2.1). */
function base64Of(vector: number[]): string {
  return Buffer.from(new Float32Array(vector).buffer).toString("base64");
}
