/** SGLang (wire §1; what is called seen stands in http_server.py 0025436e and serving_chat.py). */
import type { Call, Handler, ModelInfo } from "./engine-call.ts";
import type { About, Profile, Refused } from "./engine-profile.ts";
import { isEmbedding } from "./engine-call.ts";
import { contextOf, hasKey, refuse } from "./engine-profile.ts";
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
import { sse } from "./engine-shapes.ts";
import { pause } from "./engine-socket.ts";
import { sendBody } from "./engine-stream.ts";
import { notAllowed, notFound, unauthorized, vllm } from "./engine-vllm.ts";
import { plainStyle } from "./engine-style.ts";

/** wire §1.1: it sleeps so long before it looks for the first time. */
const HEALTH_MS = 1000;

const style: Style = {
  ...plainStyle,
  // Seen: 32 hex digits without a prefix.
  id: (_prefix, count) => count.toString(16).padStart(32, "0"),
  // Seen: every chunk says that it has no usage.
  frame: (job, object, prefix, choices, more) => ({
    id: job.style.id(prefix, job.count),
    object,
    created: job.created,
    model: job.model,
    choices,
    usage: null,
    ...more,
  }),
  choice: (content, reason) => ({
    index: 0,
    ...content,
    logprobs: null,
    finish_reason: reason,
    matched_stop: null,
  }),
  // Seen: every field in every delta, null where it says nothing.
  delta: (fields) => ({
    role: null,
    content: null,
    reasoning_content: null,
    tool_calls: null,
    ...fields,
  }),
  message: (fields) => ({ reasoning_content: null, tool_calls: null, ...fields }),
  wholeMore: { metadata: { weight_version: "default" } },
  firstContent: "",
  usage: ({ input, output, cached }) => ({
    prompt_tokens: input,
    total_tokens: input + output,
    completion_tokens: output,
    prompt_tokens_details: cached === null ? null : { cached_tokens: cached },
    reasoning_tokens: 0,
  }),
  // Seen: encoding_format is not looked at.
  knowsBase64: false,
  // Seen: a bare list.
  rerank: (scores) => scores.map((each) => ({ ...each, meta_info: {} })),
  dies: (shape, hasDone) => [
    ...shape.error({
      object: "error",
      message: "Generation aborted.",
      type: "INTERNAL_SERVER_ERROR",
      param: null,
      code: 500,
    }),
    ...(hasDone ? [sse("[DONE]")] : []),
  ],
};

/** Flat up to 0.5.16; wrapped on /v1/responses and in streams (wire §1.7). */
function error(
  status: number,
  message: string | ((about: About) => string),
  type: string,
): (about: About) => Refused {
  return (about) => {
    const words = typeof message === "string" ? message : message(about);
    const flat = { object: "error", message: words, type, param: null, code: status };
    if (about.path.startsWith("/v1/messages")) {
      return { status, body: { type: "error", error: { type, message: words } } };
    }
    if (about.path === "/v1/responses") {
      return { status, body: { error: { message: words, type, param: null, code: status } } };
    }
    return { status, body: flat };
  };
}

function card(info: ModelInfo, call: Call): unknown {
  return {
    id: info.name,
    object: "model",
    created: 1_754_049_600,
    owned_by: "sglang",
    root: info.name,
    parent: null,
    max_model_len: contextOf(info, call.behaviour),
  };
}

/** wire §1.1: a probe that queues a real generation of one token; 503 while Starting. */
const health: Handler = async (call) => {
  if (call.behaviour.loading) return sendBody(call.reply, 503, "");
  await call.host.count(() => pause(HEALTH_MS, call.reply.left));
  await sendBody(call.reply, 200, "");
};

const modelInfo = ({ host }: Call): unknown => ({
  model_path: `/models/${host.models[0]?.name}`,
  tokenizer_path: `/models/${host.models[0]?.name}`,
  is_generation: !host.models.some(isEmbedding),
  preferred_sampling_params: null,
  weight_version: "default",
});

const serverInfo = (call: Call): unknown => ({
  model_path: `/models/${call.host.models[0]?.name}`,
  served_model_name: call.host.models[0]?.name,
  context_length: call.behaviour.contextLength,
  is_embedding: call.host.models.some(isEmbedding),
  // Infinity becomes null, as where the flag was not given.
  max_running_requests: call.behaviour.slots,
  max_total_num_tokens: 100_000,
  internal_states: [{ last_gen_throughput: 0, memory_usage: { weight: 12.5, kvcache: 20.1 } }],
  version: "0.5.16",
});

export const sglang: Profile = {
  kind: "sglang",
  models: ["qwen"],
  behaviour: { contextLength: 4096 },
  manner: vllm.manner,
  fullName: (name) => name,
  slotsPer: "server",
  queueCountsRunning: false,
  abortsLoads: true,
  style,
  reads: {
    "/": reads(() => JSON.stringify("SGLang is running")),
    "/health": health,
    "/health_generate": health,
    "/ping": reads(() => ""),
    "/get_model_info": reads(modelInfo),
    "/get_server_info": reads(serverInfo),
    "/get_load": reads(({ host }) => [
      { dp_rank: 0, num_reqs: host.running(), num_waiting_reqs: host.waiting(), num_tokens: 0 },
    ]),
    // wire §1.1: Ollama's API as well, which is no reason to take it for Ollama.
    "/api/tags": reads(({ host }) => ({
      models: host.models.map(({ name }) => ({ name, model: name, size: 0, digest: "" })),
    })),
    "/v1/models": reads((call) => ({
      object: "list",
      data: call.host.models.map((info) => card(info, call)),
    })),
    "/v1/models/": async (call) => {
      const name = decodeURIComponent(call.path.slice("/v1/models/".length));
      const info = call.host.find(name);
      if (info !== undefined) return sendBody(call.reply, 200, card(info, call));
      await refuse(call, "notLoaded", { model: name });
    },
  },
  posts: {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": embedAs(),
    "/v1/messages": messages,
    "/v1/messages/count_tokens": countTokens,
    "/v1/responses": responses,
    "/v1/rerank": rerank,
  },
  control: [],
  // Seen: everything but health and metrics needs the key.
  gate: (call) =>
    /^\/(health|metrics)/.test(call.path) || hasKey(call, ["authorization"])
      ? null
      : "unauthorized",
  refusals: {
    unauthorized,
    noRoute: notFound,
    wrongMethod: notAllowed,
    contentType: error(
      400,
      "[{'loc': ['header', 'content-type'], 'msg': \"Unsupported Media Type: Only 'application/json' is allowed\", 'type': 'value_error'}]",
      "Bad Request",
    ),
    // wire §1.7: 400 where FastAPI has 422.
    badJson: error(400, "[{'type': 'json_invalid', 'msg': 'JSON decode error'}]", "Bad Request"),
    noMessages: error(400, "Messages cannot be empty.", "BadRequestError"),
    // Of /v1/models/ID; a request's model name is not looked at (wire §1.7).
    notLoaded: ({ model }) => ({
      status: 404,
      body: {
        error: {
          message: `The model '${model}' does not exist`,
          type: "invalid_request_error",
          param: "model",
          code: "model_not_found",
        },
      },
    }),
    notEmbedding: error(
      400,
      "This model does not appear to be an embedding model by default. Please add `--is-embedding` when launching the server or try another model.",
      "BadRequestError",
    ),
    notRerank: error(
      400,
      "This model does not appear to be an embedding model by default. Please add `--is-embedding` when launching the server or try another model.",
      "BadRequestError",
    ),
    tooLong: error(
      400,
      ({ tokens, limit }) =>
        `The input (${tokens} tokens) is longer than the model's context length (${limit} tokens).`,
      "BadRequestError",
    ),
    inputTooLong: error(
      400,
      ({ tokens, limit }) =>
        `The input (${tokens} tokens) is longer than the model's context length (${limit} tokens).`,
      "BadRequestError",
    ),
    // wire §1.4: a stream has been answered 200 by then; the abort is its only event.
    busy: (about) => {
      const message = "The request queue is full.";
      if (!about.stream || about.path.startsWith("/v1/messages"))
        return error(503, message, "503")(about);
      const aborted = {
        object: "error",
        message,
        type: "SERVICE_UNAVAILABLE",
        param: null,
        code: 503,
      };
      const body = sse({ error: aborted }) + sse("[DONE]");
      return { status: 200, body, contentType: "text/event-stream; charset=utf-8" };
    },
    crashed: error(500, "Internal server error: Generation aborted.", "InternalServerError"),
  },
};
