/**
 * LM Studio 0.4 (wire §1; closed source: nothing here was seen by us, wire §6). What is called reported
 * stands in its documentation or its bug tracker.
 */
import type { Call, Handler, ModelInfo } from "./engine-call.ts";
import { isEmbedding } from "./engine-call.ts";
import type { About, Profile, Refused } from "./engine-profile.ts";
import { contextOf, hasKey, refuse } from "./engine-profile.ts";
import { chat, completions, embedAs, messages, reads, responses } from "./engine-routes.ts";
import type { Style } from "./engine-shapes.ts";
import { sse } from "./engine-shapes.ts";
import { sendBody } from "./engine-stream.ts";
import { plainStyle } from "./engine-style.ts";

const MAX_CONTEXT = 131_072;
const CRASHED = "The model has crashed without additional information. (Exit code: null)";

const style: Style = {
  ...plainStyle,
  id: (prefix, count) => `${prefix}-${count.toString(36).padStart(22, "x")}`,
  frame: (job, object, prefix, choices, more) => ({
    id: job.style.id(prefix, job.count),
    object,
    created: job.created,
    model: job.model,
    system_fingerprint: job.model,
    choices,
    ...more,
  }),
  choice: (content, reason) => ({ index: 0, ...content, logprobs: null, finish_reason: reason }),
  // Reported: the role in every delta.
  delta: (fields) => (Object.keys(fields).length === 0 ? {} : { role: "assistant", ...fields }),
  message: (fields) => ({ ...fields, tool_calls: fields.tool_calls ?? [] }),
  wholeMore: { stats: {} },
  knowsBase64: false,
  // wire §1.6: usage 0.
  embeddings: (vectors, job) => ({
    object: "list",
    data: vectors.map((embedding, index) => ({ object: "embedding", embedding, index })),
    model: job.model,
    usage: { prompt_tokens: 0, total_tokens: 0 },
  }),
  // Reported: a named event, then the end.
  dies: () => [sse({ error: { message: CRASHED } }, "error")],
};

function instances(info: ModelInfo, call: Call): unknown[] {
  if (!call.host.residency.isLoaded(info.name)) return [];
  const context_length = contextOf(info, call.behaviour);
  const config = isEmbedding(info)
    ? { context_length }
    : { context_length, parallel: call.behaviour.slots, flash_attention: true };
  return [{ id: info.name, config }];
}

/** wire §1.2, native v1. */
function native(info: ModelInfo, call: Call): unknown {
  const llm = {
    architecture: "llama",
    capabilities: { vision: false, trained_for_tool_use: false },
    description: null,
  };
  return {
    type: isEmbedding(info) ? "embedding" : "llm",
    publisher: "lmstudio-community",
    key: info.name,
    display_name: info.name,
    quantization: { name: "Q4_K_M", bits_per_weight: 4 },
    size_bytes: info.size ?? 4_920_000_000,
    params_string: "8B",
    loaded_instances: instances(info, call),
    max_context_length: MAX_CONTEXT,
    format: "gguf",
    ...(isEmbedding(info) ? {} : llm),
  };
}

/** wire §1.2, the old one. */
function oldCard(info: ModelInfo, call: Call): unknown {
  const isLoaded = call.host.residency.isLoaded(info.name);
  return {
    id: info.name,
    object: "model",
    type: isEmbedding(info) ? "embeddings" : "llm",
    publisher: "lmstudio-community",
    arch: "llama",
    compatibility_type: "gguf",
    quantization: "Q4_K_M",
    state: isLoaded ? "loaded" : "not-loaded",
    max_context_length: MAX_CONTEXT,
    ...(isLoaded ? { loaded_context_length: contextOf(info, call.behaviour) } : {}),
  };
}

function error(
  status: number,
  message: string,
  code: string | null,
  param: string | null,
): Refused {
  return { status, body: { error: { message, type: "invalid_request_error", param, code } } };
}

/** Reported: the same for a name it does not have and for a model of the other type. */
function unknownModel({ model, names }: About): Refused {
  const message = `Invalid model identifier "${model}". Please specify a valid downloaded model (e.g. ${names.join(", ")}).`;
  return error(400, message, "model_not_found", "model");
}

/** wire §1.1, trap 1: HTTP 200 for what is not there, whatever the method. */
function unexpected({ method, path }: About): Refused {
  return { status: 200, body: { error: `Unexpected endpoint or method. (${method} ${path})` } };
}

const load: Handler = async (call) => {
  const info = call.host.find(call.model);
  if (info === undefined) return void (await refuse(call, "unknownModel"));
  const startedAt = Date.now();
  if (!(await call.host.ensure(call, info, true))) return;
  await sendBody(call.reply, 200, {
    type: isEmbedding(info) ? "embedding" : "llm",
    instance_id: info.name,
    load_time_seconds: (Date.now() - startedAt) / 1000,
    status: "loaded",
  });
};

const unload: Handler = async (call) => {
  const { instance_id: id } = call.request.json;
  const name = typeof id === "string" ? id : "";
  if (!call.host.residency.isLoaded(name)) {
    return void (await refuse(call, "unknownModel", { model: name }));
  }
  call.host.residency.unload(name);
  await sendBody(call.reply, 200, { instance_id: name });
};

export const lmstudio: Profile = {
  kind: "lmstudio",
  models: ["qwen3-8b", "text-embedding-nomic"],
  // wire §1.3: Auto-Evict keeps at most one model that came by itself. wire §1.2: parallel is 4.
  behaviour: { slots: 4, maxLoaded: 1, contextLength: 4096, roleFirst: false },
  manner: {
    headers: { "X-Powered-By": "Express" },
    json: "application/json; charset=utf-8",
    stream: "text/event-stream",
    closes: "never",
    chunksAll: false,
  },
  fullName: (name) => name,
  slotsPer: "model",
  queueCountsRunning: false,
  abortsLoads: false,
  style,
  reads: {
    // wire §1.2: all that is downloaded, which says nothing about what is loaded. No `created`.
    "/v1/models": reads(({ host }) => ({
      data: host.models.map(({ name }) => ({
        id: name,
        object: "model",
        owned_by: "organization_owner",
      })),
      object: "list",
    })),
    "/api/v1/models": reads((call) => ({
      models: call.host.models.map((info) => native(info, call)),
    })),
    "/api/v0/models": reads((call) => ({
      object: "list",
      data: call.host.models.map((info) => oldCard(info, call)),
    })),
  },
  // wire §1.5: no count_tokens, no rerank.
  posts: {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": embedAs(),
    "/v1/messages": messages,
    "/v1/responses": responses,
    "/api/v1/models/load": load,
    "/api/v1/models/unload": unload,
  },
  control: ["/api/v1/models/load", "/api/v1/models/unload"],
  // wire §1.1: off by default.
  gate: (call) => (hasKey(call, ["authorization", "x-api-key"]) ? null : "unauthorized"),
  refusals: {
    unauthorized: () => ({
      status: 401,
      body: {
        error: {
          message: "An LM Studio API token is required to make requests to this server",
          type: "invalid_request_error",
          code: "invalid_api_key",
          param: null,
        },
      },
    }),
    noRoute: unexpected,
    wrongMethod: unexpected,
    badJson: () => ({ status: 400, body: { error: "Unexpected token in JSON at position 1" } }),
    noMessages: () => ({ status: 400, body: { error: "'messages' field is required" } }),
    unknownModel,
    notChat: unknownModel,
    notEmbedding: unknownModel,
    // Reported: a string, and in a stream after the 200.
    tooLong: ({ tokens, limit, stream }) => {
      const message = `The number of tokens to keep from the initial prompt is greater than the context length (n_keep: ${tokens}>= n_ctx: ${limit}). Try to load the model with a larger context length, or provide a shorter input.`;
      if (!stream) return { status: 400, body: { error: message } };
      const body = sse({ error: { message } }, "error");
      return { status: 200, body, contentType: "text/event-stream" };
    },
    loadFailed: ({ model }) => ({
      status: 400,
      body: {
        error: `Failed to load model "${model}". Error: Model loading was stopped due to insufficient system resources.`,
      },
    }),
    // Reported: a 400, though it is the engine's fault.
    crashed: () => ({ status: 400, body: { error: CRASHED } }),
  },
};
