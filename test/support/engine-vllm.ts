/** vLLM: one model per process, FastAPI's manners (real §5.3). Refuses connections while it starts. */
import type { Call, ModelInfo } from "./engine-call.ts";
import type { About, Profile, Refused } from "./engine-profile.ts";
import { contextOf, hasKey } from "./engine-profile.ts";
import {
  chat,
  completions,
  countTokens,
  embedAs,
  messages,
  reads,
  rerank,
  responses,
} from "./engine-routes.ts";
import type { Style } from "./engine-shapes.ts";
import { engineDied, plainStyle } from "./engine-style.ts";

const CREATED = 1_754_049_600;

const style: Style = {
  ...plainStyle,
  // Measured: 16 hex digits; /v1/messages too has "chatcmpl-".
  id: (prefix, count) =>
    `${prefix === "msg" ? "chatcmpl" : prefix}-${count.toString(16).padStart(16, "0")}`,
  // real §5.3: fields of its own that have to pass through. Measured: the fingerprint ends a stream.
  frame: (job, object, prefix, choices, more) => {
    const [choice] = choices as { finish_reason: unknown }[];
    const isLast = choice === undefined || (choice.finish_reason !== null && !job.includeUsage);
    return {
      id: job.style.id(prefix, job.count),
      object,
      created: job.created,
      model: job.model,
      choices,
      ...more,
      ...(isLast ? { system_fingerprint: "vllm-0.32.0-39ed4f61" } : {}),
    };
  },
  choice: (content, reason) => ({
    index: 0,
    ...content,
    logprobs: null,
    finish_reason: reason,
    ...(reason !== null || "text" in content ? { stop_reason: null } : {}),
    token_ids: null,
  }),
  message: (fields) => ({
    ...fields,
    refusal: null,
    annotations: null,
    audio: null,
    function_call: null,
    reasoning: fields.reasoning ?? null,
  }),
  wholeMore: { service_tier: null, kv_transfer_params: null, metrics: null },
  firstContent: "",
  // wire §1.8.
  reasoning: "reasoning",
  usage: ({ input, output, cached }) => ({
    prompt_tokens: input,
    total_tokens: input + output,
    completion_tokens: output,
    ...(cached === null ? {} : { prompt_tokens_details: { cached_tokens: cached } }),
  }),
  messagesUsage: ({ input, output }, at) => ({
    input_tokens: input,
    output_tokens: at === "start" ? 0 : output,
  }),
  embeddings: (vectors, job, tokens) => ({
    id: job.style.id("embd", job.count),
    object: "list",
    created: job.created,
    model: job.model,
    data: vectors.map((embedding, index) => ({ index, object: "embedding", embedding })),
    usage: {
      prompt_tokens: tokens,
      total_tokens: tokens,
      completion_tokens: 0,
      prompt_tokens_details: null,
    },
  }),
};

function card(info: ModelInfo, call: Call): unknown {
  return {
    id: info.name,
    object: "model",
    created: CREATED,
    owned_by: "vllm",
    root: `/models/${info.name}`,
    parent: null,
    max_model_len: contextOf(info, call.behaviour),
    permission: [{ id: "modelperm-1", object: "model_permission", allow_sampling: true }],
  };
}

function metrics({ host }: Call): string {
  const gauge = (name: string, value: number): string =>
    `# TYPE vllm:${name} gauge\nvllm:${name}{engine="0",model_name="${host.models[0]?.name}"} ${value}\n`;
  return (
    gauge("num_requests_running", host.running()) +
    gauge("num_requests_waiting", host.waiting()) +
    gauge("kv_cache_usage_perc", 0)
  );
}

/** wire §1.7; the Anthropic routes turn it into their envelope, types as they are. */
function error(
  status: number,
  message: string | ((about: About) => string),
  type: string,
  param: string | null = null,
): (about: About) => Refused {
  return (about) => {
    const words = typeof message === "string" ? message : message(about);
    if (about.path.startsWith("/v1/messages")) {
      return { status, body: { type: "error", error: { type, message: words } } };
    }
    return { status, body: { error: { message: words, type, param, code: status } } };
  };
}

/** What FastAPI finds itself has this envelope on every route (measured). */
function invalid(message: string, param: string | null): () => Refused {
  const words = `1 validation error:\n  ${message}`;
  const body = { error: { message: words, type: "Bad Request", param, code: 400 } };
  return () => ({ status: 400, body });
}

/** real §5.3: an unknown route has FastAPI's own words. */
export const notFound = (): Refused => ({ status: 404, body: { detail: "Not Found" } });
export const notAllowed = (): Refused => ({ status: 405, body: { detail: "Method Not Allowed" } });
export const unauthorized = (): Refused => ({ status: 401, body: { error: "Unauthorized" } });

export const vllm: Profile = {
  kind: "vllm",
  models: ["tiny"],
  behaviour: { finishOnLastToken: true, contextLength: 4096 },
  manner: {
    headers: { server: "uvicorn" },
    json: "application/json",
    stream: "text/event-stream; charset=utf-8",
    closes: "never",
    chunksAll: false,
  },
  fullName: (name) => name,
  slotsPer: "server",
  // real §5.3: the running request counts.
  queueCountsRunning: true,
  abortsLoads: true,
  style,
  // /is_sleeping is there in dev mode only; /load answers even without its flag (real §5.3).
  reads: {
    "/health": reads(() => ""),
    "/ping": reads(() => ""),
    "/version": reads(() => ({ version: "0.32.0" })),
    "/load": reads(() => ({ server_load: 0 })),
    "/metrics": reads(metrics),
    "/v1/models": reads((call) => ({
      object: "list",
      data: call.host.models.map((info) => card(info, call)),
    })),
  },
  posts: {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": embedAs(),
    "/v1/messages": messages,
    "/v1/messages/count_tokens": countTokens,
    "/v1/responses": responses,
    "/rerank": rerank,
    "/v1/rerank": rerank,
    "/v2/rerank": rerank,
  },
  control: [],
  // Its --api-key guards what is below /v1 and nothing else.
  gate: (call) =>
    call.path.startsWith("/v1") && !hasKey(call, ["authorization"]) ? "unauthorized" : null,
  refusals: {
    unauthorized,
    noRoute: notFound,
    wrongMethod: notAllowed,
    contentType: invalid("Unsupported Media Type: Only 'application/json' is allowed", null),
    badJson: invalid(
      "{'type': 'json_invalid', 'loc': 'body.1', 'msg': 'JSON decode error'}",
      "body.1",
    ),
    noMessages: (about) =>
      "messages" in about.json
        ? error(
            400,
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
            "BadRequestError",
          )(about)
        : invalid("{'type': 'missing', 'loc': 'body.messages'}", "body.messages")(),
    unknownModel: error(
      404,
      ({ model, names }) =>
        `The model \`${model}\` does not exist. Valid aliases: ${names.join(", ")}.`,
      "NotFoundError",
      "model",
    ),
    // real §5.3: what the model cannot do is a route that is not there.
    notChat: notFound,
    notEmbedding: notFound,
    notRerank: notFound,
    tooLong: error(
      400,
      ({ tokens, limit }) =>
        `This model's maximum context length is ${limit} tokens. However, your request has ${tokens} input tokens. Please reduce the length of the input messages.`,
      "BadRequestError",
    ),
    inputTooLong: error(
      400,
      ({ tokens, limit }) =>
        `This model's maximum context length is ${limit} tokens. However, your request has ${tokens} input tokens.`,
      "BadRequestError",
    ),
    // real §5.3: no Retry-After.
    busy: error(
      503,
      "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.",
      "Service Unavailable",
    ),
    crashed: error(500, engineDied.message, engineDied.type),
  },
};
