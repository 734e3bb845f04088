/** Ollama: native routes, models that come and go, names with tags (real §5.1). */
import type { Call, Handler, ModelInfo } from "./engine-call.ts";
import { digestOf, isEmbedding, isFilled } from "./engine-call.ts";
import { nativeShape } from "./engine-ollama-native.ts";
import type { About, Profile, Refused } from "./engine-profile.ts";
import { refuse } from "./engine-profile.ts";
import type { Dialect } from "./engine-routes.ts";
import {
  chat,
  completions,
  embedAs,
  generate,
  messages,
  modelOf,
  reads,
  responses,
} from "./engine-routes.ts";
import type { Style } from "./engine-shapes.ts";
import { sendBody } from "./engine-stream.ts";
import { plainStyle } from "./engine-style.ts";

const MODIFIED = "2026-08-01T12:00:00.123456789Z";
const SIZE = 4_661_224_676;

/** Ollama completes a bare name with `:latest`, nothing else (wire §1.2). */
function withTag(name: string): string {
  return name.includes(":") ? name : `${name}:latest`;
}

function details(): Record<string, unknown> {
  return {
    parent_model: "",
    format: "gguf",
    family: "llama",
    families: ["llama"],
    parameter_size: "8.0B",
    quantization_level: "Q4_0",
  };
}

function capabilities(info: ModelInfo): string[] {
  return info.capabilities ?? [isEmbedding(info) ? "embedding" : "completion"];
}

function tag(info: ModelInfo): Record<string, unknown> {
  const remote = { remote_model: info.name, remote_host: info.remoteHost };
  return {
    name: info.name,
    model: info.name,
    modified_at: MODIFIED,
    size: info.size ?? SIZE,
    digest: digestOf(info),
    // real §5.1: these two only here, not in /api/ps.
    details: { ...details(), context_length: info.contextLength ?? 8192, embedding_length: 4 },
    capabilities: capabilities(info),
    ...(info.remoteHost === undefined ? {} : remote),
  };
}

function resident(info: ModelInfo): Record<string, unknown> {
  return {
    name: info.name,
    model: info.name,
    size: info.size ?? SIZE,
    digest: digestOf(info),
    details: details(),
    expires_at: "2318-12-01T00:00:00Z",
    size_vram: info.sizeVram ?? info.size ?? SIZE,
    context_length: info.contextLength ?? 8192,
  };
}

function card(id: string): unknown {
  return { id, object: "model", created: 1_754_049_600, owned_by: "library" };
}

/** Names and origins that a loopback Ollama lets in; all others get an empty 403 (wire §1.8). */
function isForeign(headers: Record<string, string>): boolean {
  const local =
    /^(localhost|[\w-]+\.(localhost|local|internal)|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?$/i;
  if (!local.test(headers.host ?? "")) return true;
  const { origin } = headers;
  if (origin === undefined) return false;
  if (/^(app|file|tauri|vscode-webview|vscode-file):\/\//.test(origin)) return false;
  const match = /^https?:\/\/(.+)$/.exec(origin);
  return match === null || !local.test(match[1] ?? "");
}

const style: Style = {
  ...plainStyle,
  // wire §1.8: not unique.
  id: (prefix, count) => `${prefix}-${(count * 367) % 999}`,
  frame: (job, object, prefix, choices, more) => ({
    id: job.style.id(prefix, job.count),
    object,
    created: job.created,
    model: job.model,
    system_fingerprint: "fp_ollama",
    choices,
    ...more,
  }),
  firstContent: "",
  reasoning: "reasoning",
  wholeToolCalls: true,
  completionUsage: "extraChunkAndZeros",
  // real §6.10: max_completion_tokens is ignored; without max_tokens nothing ends it but itself.
  knowsCompletionLimit: false,
  dies: (shape) => shape.swallowed(),
};

/** The envelope goes by the route: Anthropic's, a string on the native ones, else OpenAI's. */
function error(
  status: number,
  message: string | ((about: About) => string),
  type = "invalid_request_error",
): (about: About) => Refused {
  return (about) => {
    const words = typeof message === "string" ? message : message(about);
    if (about.path.startsWith("/api/")) return { status, body: { error: words } };
    if (about.path === "/v1/messages") {
      const body = { type: "error", error: { type, message: words }, request_id: "req_1" };
      return { status, body };
    }
    return { status, body: { error: { message: words, type, param: null, code: null } } };
  };
}

const native = { hasDone: false, streamsByDefault: true } as const;

function nativeLimit(json: Record<string, unknown>): number {
  const { num_predict = Infinity } = (json.options ?? {}) as { num_predict?: number };
  return num_predict;
}

function nativeRoute(route: "chat" | "generate"): Handler {
  const dialect: Dialect = {
    ...native,
    shape: (job) => nativeShape(job, route),
    limit: nativeLimit,
  };
  return async (call) => {
    const info = await modelOf(call);
    if (info === null) return;
    const { json } = call.request;
    const isLoadOnly = route === "chat" ? !isFilled(json.messages) : !json.prompt;
    if (isLoadOnly) await loadOnly(call, info, route);
    else await generate(call, info, dialect);
  };
}

/** Without a prompt: load, or unload (real §5.1). Works on what is not loaded as well. */
async function loadOnly(call: Call, info: ModelInfo, route: "chat" | "generate"): Promise<void> {
  const { json } = call.request;
  const isUnload = json.keep_alive === 0 || json.keep_alive === "0";
  const done = (): Promise<void> =>
    sendBody(call.reply, 200, {
      model: info.name,
      created_at: "2026-08-01T12:00:00Z",
      ...(route === "chat" ? { message: { role: "assistant", content: "" } } : { response: "" }),
      done: true,
      done_reason: isUnload ? "unload" : "load",
    });
  if (!isUnload) return call.host.hold(call, info, done);
  call.host.residency.unload(info.name);
  await done();
}

export const ollama: Profile = {
  kind: "ollama",
  models: ["llama3:8b"],
  // NUM_PARALLEL is 1, and there is no first chunk without content (real §6.6, wire §1.3).
  behaviour: { slots: 1, roleFirst: false },
  manner: {
    headers: {},
    json: "application/json",
    stream: "text/event-stream",
    closes: "never",
    chunksAll: false,
  },
  fullName: withTag,
  slotsPer: "model",
  queueCountsRunning: false,
  abortsLoads: true,
  style,
  // No /health and no /metrics (real §5.1).
  reads: {
    "/": reads(() => "Ollama is running"),
    "/api/version": reads(() => ({ version: "0.32.15" })),
    "/api/tags": reads(({ host }) => ({ models: host.models.map(tag) })),
    // Only what is loaded: a model that is loading does not show (real §5.1).
    "/api/ps": reads(({ host: { models, residency } }) => ({
      models: models.filter(({ name }) => residency.isLoaded(name)).map(resident),
    })),
    // wire §1.2: without models it says null.
    "/v1/models": reads(({ host: { models } }) => ({
      object: "list",
      data: models.length === 0 ? null : models.map(({ name }) => card(name)),
    })),
    "/v1/models/": async (call) => {
      const name = decodeURIComponent(call.path.slice("/v1/models/".length));
      if (call.host.find(name) !== undefined) return sendBody(call.reply, 200, card(name));
      await refuse(call, "unknownModel", { model: withTag(name) });
    },
  },
  // wire §1.5: no count_tokens, no rerank.
  posts: {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": embedAs(),
    "/v1/messages": messages,
    "/v1/responses": responses,
    "/api/chat": nativeRoute("chat"),
    "/api/generate": nativeRoute("generate"),
    "/api/embed": embedAs((vectors, info) => ({ model: info.name, embeddings: vectors })),
    "/api/show": async (call) => {
      const info = await modelOf(call);
      if (info === null) return;
      const body = {
        modelfile: `FROM ${info.name}`,
        details: details(),
        model_info: {
          "general.architecture": "llama",
          "llama.context_length": info.contextLength ?? 8192,
          "llama.embedding_length": 4,
        },
        capabilities: capabilities(info),
        modified_at: MODIFIED,
      };
      await sendBody(call.reply, 200, body);
    },
  },
  control: ["/api/show"],
  gate: ({ request }) => (isForeign(request.headers) ? "foreign" : null),
  refusals: {
    // real §5.1: 403 with an empty body.
    foreign: () => ({ status: 403, body: "" }),
    noRoute: () => ({ status: 404, body: "404 page not found" }),
    wrongMethod: () => ({ status: 405, body: "405 method not allowed" }),
    // A content-encoding is not looked at (measured): what is packed is no JSON.
    badJson: error(400, "unexpected EOF"),
    noModel: error(400, "model is required"),
    unknownModel: error(404, ({ model }) => `model '${model}' not found`, "not_found_error"),
    noMessages: error(400, "[] is too short - 'messages'"),
    notChat: error(400, ({ path, model }) =>
      /chat|messages|responses/.test(path)
        ? `"${model}" does not support chat`
        : `"${model}" does not support generate`,
    ),
    // real §6.7, §5.1: a chat model cannot embed; token arrays are not understood.
    notEmbedding: error(
      501,
      "This server does not support embeddings. Start it with `--embeddings`",
      "api_error",
    ),
    noInput: error(400, "invalid input"),
    tokenInput: error(400, "invalid input type"),
    // wire §1.4: only for requests that would have to schedule a load.
    loadsFull: error(
      503,
      "server busy, please try again.  maximum pending requests exceeded",
      "api_error",
    ),
    // wire §1.7.
    loadFailed: error(
      500,
      "llama-server process has terminated: cudaMalloc failed: out of memory",
      "api_error",
    ),
    crashed: error(
      500,
      "an error was encountered while running the model: unexpected EOF",
      "api_error",
    ),
  },
};
