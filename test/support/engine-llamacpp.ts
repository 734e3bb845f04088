/** llama-server with one model. What is called measured was seen on b11434 beside real §5.2. */
import type { Call, Handler, ModelInfo } from "./engine-call.ts";
import { isEmbedding } from "./engine-call.ts";
import type { About, Problem, Profile, Refusals, Refused } from "./engine-profile.ts";
import { contextOf, hasKey } from "./engine-profile.ts";
import {
  chat,
  completions,
  countTokens,
  embedAs,
  messages,
  reads,
  refuses,
  rerank,
  responses,
} from "./engine-routes.ts";
import type { Style } from "./engine-shapes.ts";
import type { Manner } from "./engine-socket.ts";
import { plainStyle } from "./engine-style.ts";
import { sendBody } from "./engine-stream.ts";

const CREATED = 1_754_049_600;

/** `Server` on everything, errors close (real §5.2); the Origin is mirrored, here there is none. */
export const manner: Manner = {
  headers: { Server: "llama.cpp", "Access-Control-Allow-Origin": "" },
  json: "application/json; charset=utf-8",
  stream: "text/event-stream",
  closes: "onError",
  chunksAll: false,
};

export const style: Style = {
  ...plainStyle,
  // Measured: "chatcmpl-" on every route, 32 letters.
  id: (prefix, count) =>
    `${prefix === "resp" || prefix === "msg" ? prefix : "chatcmpl"}-${count.toString(36).padStart(32, "x")}`,
  // wire §1.8: any name is served, the answer says the own one.
  answersOwnName: true,
  // Measured: choices first.
  frame: (job, object, prefix, choices, more) => ({
    choices,
    created: job.created,
    id: job.style.id(prefix, job.count),
    model: job.model,
    system_fingerprint: "b0-unknown",
    object,
    ...more,
  }),
  choice: (content, reason) => ({ finish_reason: reason, index: 0, ...content }),
  usage: ({ input, output, cached }) => ({
    completion_tokens: output,
    prompt_tokens: input,
    total_tokens: input + output,
    prompt_tokens_details: { cached_tokens: cached ?? 0 },
  }),
  completionUsage: "lastChoice",
  numbersEvents: false,
  // real §5.2: `input_tokens` without the cached ones; measured: at the end only the output.
  messagesUsage: ({ input, output, cached }, at) => {
    if (at === "end") return { output_tokens: output };
    const fresh = input - (cached ?? 0);
    const counted = at === "start" ? 0 : output;
    return {
      cache_read_input_tokens: cached ?? 0,
      input_tokens: fresh,
      output_tokens: counted,
    };
  },
  embeddings: (vectors, job, tokens, isBase64) => ({
    model: job.model,
    object: "list",
    usage: { prompt_tokens: tokens, total_tokens: tokens },
    data: vectors.map((embedding, index) => ({
      embedding,
      index,
      object: "embedding",
      ...(isBase64 ? { encoding_format: "base64" } : {}),
    })),
  }),
  rerank: (scores, job) => ({
    model: job.model,
    object: "list",
    usage: { prompt_tokens: scores.length, total_tokens: scores.length },
    results: scores.map(({ index, score }) => ({ index, relevance_score: score })),
  }),
  // wire §1.7: its error, then the end without [DONE].
  dies: (shape) =>
    shape.error({ code: 500, message: "context shift is disabled", type: "server_error" }),
};

export function metaOf(info: ModelInfo, call: Call): Record<string, unknown> {
  return {
    // Measured: 3, WordPiece, for what embeds.
    vocab_type: isEmbedding(info) ? 3 : 2,
    n_vocab: 49_152,
    n_ctx: contextOf(info, call.behaviour),
    n_ctx_train: 8192,
    n_embd: 576,
    n_params: 134_515_008,
    size: info.size ?? 96_576_768,
    ftype: "Q4_1",
  };
}

/** Further names are aliases of the one model. */
function list(call: Call): unknown {
  const names = call.host.models.map(({ name }) => name);
  const [info = { name: "none" }] = call.host.models;
  const likeOllama = {
    name: info.name,
    model: info.name,
    modified_at: "",
    size: "",
    digest: "",
    type: "model",
    description: "",
    tags: [""],
    // Measured: "completion" also where it embeds.
    capabilities: ["completion"],
    parameters: "",
    details: { parent_model: "", format: "gguf", family: "", families: [""] },
  };
  const card = {
    id: info.name,
    aliases: names,
    tags: [],
    object: "model",
    architecture: { input_modalities: ["text"], output_modalities: ["text"] },
    created: CREATED,
    owned_by: "llamacpp",
    meta: metaOf(info, call),
  };
  return { models: [likeOllama], object: "list", data: [card] };
}

export function propsOf(info: ModelInfo, call: Call): Record<string, unknown> {
  return {
    default_generation_settings: {
      params: { temperature: 0.8, max_tokens: -1, stream: false },
      n_ctx: contextOf(info, call.behaviour),
    },
    total_slots: call.behaviour.slots,
    model_alias: info.name,
    model_ftype: "Q4_1",
    model_path: `/models/${info.name}.gguf`,
    modalities: { vision: false, video: false, audio: false },
    endpoint_slots: true,
    endpoint_props: false,
    endpoint_metrics: false,
    chat_template: "{{ messages }}",
    build_info: "b0-unknown",
    is_sleeping: call.behaviour.sleeping,
  };
}

export function slotsOf(info: ModelInfo, call: Call): unknown[] {
  const { slots } = call.behaviour;
  const busy = call.host.running();
  return Array.from({ length: slots }, (_, id) => ({
    id,
    n_ctx: contextOf(info, call.behaviour),
    speculative: false,
    is_processing: id < busy,
  }));
}

export function error(status: number, message: string, type: string): Refused {
  return { status, body: { error: { code: status, message, type } } };
}

function invalid(message: string): () => Refused {
  return () => error(400, message, "invalid_request_error");
}

/** real §5.2. */
export const refusals: Refusals = {
  loading: () => http(503, "Loading model", "unavailable_error"),
  unauthorized: () => http(401, "Invalid API Key", "authentication_error"),
  noRoute: () => http(404, "File Not Found", "not_found_error"),
  wrongMethod: () => http(404, "File Not Found", "not_found_error"),
  // Measured, without zlib.
  encoded: () => ({ status: 415, body: "" }),
  badJson: invalid(
    "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error while parsing object key",
  ),
  // Measured: an empty list is served; only a missing one is refused, and by /v1/messages as a 500.
  noMessages: ({ json, path }) => {
    if ("messages" in json) return null;
    const isMessages = path === "/v1/messages";
    return isMessages
      ? error(500, "'messages' is required", "server_error")
      : error(400, "'messages' is required", "invalid_request_error");
  },
  // real §5.2: 500 for chat on an embeddings server.
  notChat: () =>
    error(500, "the current context does not support logits computation. skipping", "server_error"),
  notEmbedding: () => notSupported("embeddings", "--embeddings"),
  noInput: invalid('"input" or "content" must be provided'),
  notRerank: () => notSupported("reranking", "--reranking"),
  // wire §1.4.
  noMetrics: () => notSupported("metrics endpoint", "--metrics"),
  tooLong: ({ tokens, limit }: About) => ({
    status: 400,
    body: {
      error: {
        code: 400,
        message: `request (${tokens} tokens) exceeds the available context size (${limit} tokens), try increasing it`,
        type: "exceed_context_size_error",
        n_prompt_tokens: tokens,
        n_ctx: limit,
      },
    },
  }),
  // real §6.1: a client's fault that comes as a 500.
  inputTooLong: ({ tokens, limit }) =>
    error(
      500,
      `input (${tokens} tokens) is too large to process. increase the physical batch size (current batch size: ${limit})`,
      "server_error",
    ),
  crashed: () => error(500, "Invalid input batch.", "server_error"),
};

/** Errors of the HTTP layer have their keys in another order (measured). */
function http(status: number, message: string, type: string): Refused {
  return { status, body: { error: { message, type, code: status } } };
}

function notSupported(what: string, flag: string): Refused {
  return error(
    501,
    `This server does not support ${what}. Start it with \`${flag}\``,
    "not_supported_error",
  );
}

/** real §6.2: only these are open; "/" is so for a web UI that is not there (real §6.3). */
const OPEN = ["/health", "/v1/health", "/"];

export function gate(call: Call): Problem | null {
  if (call.behaviour.loading) return "loading";
  const isOpen = OPEN.includes(call.path);
  return isOpen || hasKey(call, ["authorization", "x-api-key"]) ? null : "unauthorized";
}

const only = (call: Call): ModelInfo => call.host.models[0] ?? { name: "none" };

/** With and without /v1; /embeddings without it is another format, /completion another API (wire §1.1). */
export const posts: Record<string, Handler> = {
  "/v1/chat/completions": chat,
  "/chat/completions": chat,
  "/v1/completions": completions,
  "/v1/embeddings": embedAs(),
  "/embeddings": embedAs((vectors) =>
    vectors.map((vector, index) => ({ index, embedding: [vector] })),
  ),
  "/v1/messages": messages,
  "/v1/messages/count_tokens": countTokens,
  "/v1/responses": responses,
  "/responses": responses,
  "/v1/rerank": rerank,
  "/rerank": rerank,
};

export const llamacpp: Profile = {
  kind: "llamacpp",
  models: ["smol-a"],
  behaviour: { slots: 4, timings: true, contextLength: 4096 },
  manner,
  fullName: (name) => name,
  slotsPer: "server",
  queueCountsRunning: false,
  abortsLoads: true,
  style,
  // No /v1/models/ID, and / is 404 without the web UI (real §6.3, measured).
  reads: {
    "/health": reads(() => ({ status: "ok" })),
    "/v1/health": reads(() => ({ status: "ok" })),
    "/v1/models": reads(list),
    "/models": reads(list),
    "/props": reads((call) => propsOf(only(call), call)),
    // wire §1.3, measured: this one wakes a sleeper.
    "/slots": async (call) => {
      if (!(await call.host.ensure(call, only(call)))) return;
      await sendBody(call.reply, 200, slotsOf(only(call), call));
    },
    "/metrics": refuses("noMetrics"),
  },
  posts,
  control: [],
  gate,
  refusals,
};
