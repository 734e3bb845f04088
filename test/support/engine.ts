/**
 * A scriptable fake engine on a real socket. It speaks as Ollama or as a plain OpenAI-compatible server,
 * with their true faults: a fake kinder than the real thing proves nothing.
 */
import type { Behaviour } from "./engine-behaviour.ts";
import { calm, faults } from "./engine-behaviour.ts";
import type { LoadRecord, ModelInfo } from "./engine-ollama.ts";
import {
  isEmbedding,
  isForeign,
  nativeShape,
  pause,
  ps,
  Residency,
  show,
  tags,
  withTag,
} from "./engine-ollama.ts";
import type { EngineKind, Job, Piece, Shape, Usage } from "./engine-shapes.ts";
import { chatShape, completionsShape, messagesShape, responsesShape } from "./engine-shapes.ts";
import type { Reply, WireRequest } from "./engine-socket.ts";
import { ClientLeft, WireServer } from "./engine-socket.ts";
import { answerFault, sendJson, sendText, sendWhole, streamAnswer } from "./engine-stream.ts";

/** What is kept of an answer: enough to compare, not a flood. */
const KEPT_BYTES = 4 * 1024 * 1024;

export interface EngineRequest {
  method: string;
  /** Path and query as they came. */
  path: string;
  headers: Record<string, string>;
  rawHeaders: [name: string, value: string][];
  body: string;
  bodyBytes: Buffer;
  /** The body as JSON, `{}` where it is none. */
  json: Record<string, unknown>;
  arrivedAt: number;
  status: number | null;
  bytesSent: number;
  /** Body bytes as sent, without chunk framing; cut at 4 MiB. */
  sent(): Buffer;
  closedByClient: boolean;
  closedAt: number | null;
  completed: boolean;
}

export interface FakeEngine {
  url: string;
  port: number;
  kind: EngineKind;
  /** Every request, probes too, oldest first. */
  requests: EngineRequest[];
  /** Inference requests: POSTs, without those that only load a model. */
  inference(): EngineRequest[];
  /** Loads of models, oldest first (Ollama). */
  loads: LoadRecord[];
  behave(changes: Partial<Behaviour>): void;
  /** As {@link behave}, for requests that name this model; stronger than it. */
  behaveFor(model: string, changes: Partial<Behaviour>): void;
  setModels(models: (string | ModelInfo)[]): void;
  /** Behaviour and records as at the start; nothing is loaded. */
  reset(): void;
  openConnections(): number;
  /** Requests that hold a slot. */
  activeGenerations(): number;
  /** Requests that wait for one. */
  waiting(): number;
  /** New connections are refused, idle ones closed; what runs goes on. */
  stopListening(): void;
  listenAgain(): Promise<void>;
  close(): Promise<void>;
}

export interface EngineOptions {
  kind?: EngineKind;
  models?: (string | ModelInfo)[];
  port?: number;
  behaviour?: Partial<Behaviour>;
}

export async function startEngine(options: EngineOptions = {}): Promise<FakeEngine> {
  const engine = new Engine(options);
  await engine.server.listen(options.port ?? 0);
  return engine.face();
}

interface Slots {
  running: number;
  waiting: (() => void)[];
}

class Engine {
  readonly kind: EngineKind;
  readonly requests: EngineRequest[] = [];
  readonly residency = new Residency();
  readonly server: WireServer;
  readonly initial: Behaviour;
  models: ModelInfo[] = [];
  behaviour: Behaviour;
  perModel = new Map<string, Partial<Behaviour>>();
  active = 0;
  served = 0;
  #slots = new Map<string, Slots>();

  constructor({ kind = "openai", models, behaviour }: EngineOptions) {
    this.kind = kind;
    // NUM_PARALLEL is 1, and there is no first chunk without content (real §6.6, wire §1.3).
    const own: Partial<Behaviour> = kind === "ollama" ? { slots: 1, roleFirst: false } : {};
    this.initial = { ...calm, ...own, ...behaviour };
    this.behaviour = { ...this.initial };
    this.setModels(models ?? [kind === "ollama" ? "llama3:8b" : "test-model"]);
    this.server = new WireServer((request, reply) => void this.#serve(request, reply));
  }

  setModels(models: (string | ModelInfo)[]): void {
    const infos = models.map((model) =>
      typeof model === "string" ? { name: model } : { ...model },
    );
    this.models =
      this.kind === "ollama" ? infos.map((info) => ({ ...info, name: withTag(info.name) })) : infos;
  }

  face(): FakeEngine {
    const { server } = this;
    const port = server.port;
    return {
      url: `http://127.0.0.1:${port}`,
      port,
      kind: this.kind,
      requests: this.requests,
      inference: () =>
        this.requests.filter(({ method, path, json }) => {
          const isLoad = path.startsWith("/api/") && !json.prompt && !isFilled(json.messages);
          return method === "POST" && path !== "/api/show" && !isLoad;
        }),
      loads: this.residency.loads,
      behave: (changes) => void Object.assign(this.behaviour, changes),
      behaveFor: (model, changes) =>
        void this.perModel.set(model, { ...this.perModel.get(model), ...changes }),
      setModels: (models) => this.setModels(models),
      reset: () => {
        this.behaviour = { ...this.initial };
        this.perModel.clear();
        this.requests.length = 0;
        this.residency.clear();
      },
      openConnections: () => server.openConnections(),
      activeGenerations: () => this.active,
      waiting: () =>
        [...this.#slots.values()].reduce((sum, { waiting }) => sum + waiting.length, 0),
      stopListening: () => server.stopListening(),
      listenAgain: () => server.listen(port),
      close: () => {
        server.stopListening();
        server.destroyConnections();
        return Promise.resolve();
      },
    };
  }

  info(name: string): ModelInfo | undefined {
    const wanted = this.kind === "ollama" ? withTag(name) : name;
    return this.models.find((info) => info.name === wanted);
  }

  /** The behaviour for one request, with a fault that strikes only so many times. */
  behaviourFor(model: string, isInference: boolean): Behaviour {
    const own = this.perModel.get(model);
    const merged: Behaviour = { ...this.behaviour, ...own };
    if (merged.fault === null || !isInference) return { ...merged, fault: null };
    if (merged.faultTimes <= 0) return { ...merged, fault: null };
    const home = own?.faultTimes === undefined ? this.behaviour : own;
    home.faultTimes = merged.faultTimes - 1;
    return merged;
  }

  async #serve(request: WireRequest, reply: Reply): Promise<void> {
    const record = recordOf(request, reply);
    this.requests.push(record.request);
    reply.left.addEventListener("abort", () => {
      record.request.closedByClient = true;
      record.request.closedAt = Date.now();
    });
    try {
      await this.#route(record.request, reply, record.keep);
      record.request.completed = !reply.left.aborted;
    } catch (error) {
      if (!(error instanceof ClientLeft)) throw error;
    }
  }

  async #route(
    request: EngineRequest,
    reply: Reply,
    keep: (bytes: Uint8Array) => void,
  ): Promise<void> {
    const path = request.path.split("?")[0] ?? "/";
    const isRead = request.method === "GET" || request.method === "HEAD";
    // real §5.1: foreign Host or Origin, 403 with an empty body.
    if (this.kind === "ollama" && isForeign(request.headers)) return sendText(reply, 403, "");
    if (isRead) {
      if (await answerFault(reply, this.behaviour.probeFault, keep)) return;
      return this.#read(request, path, reply);
    }
    if (request.method !== "POST") return this.#unknown(reply, 405);
    const model = typeof request.json.model === "string" ? request.json.model : "";
    const behaviour = this.behaviourFor(model, path !== "/api/show");
    const early = behaviour.fault?.kind;
    if (early === "hang" || early === "drop" || early === "answer") {
      await pause(behaviour.headersDelayMs, reply.left);
      if (!reply.left.aborted) await answerFault(reply, behaviour.fault, keep);
      return;
    }
    if (behaviour.without.includes(path)) return this.#unknown(reply, 404);
    return this.#post(request, path, model, behaviour, reply, keep);
  }

  /** real §5.1: unknown path and wrong method are text/plain at gin; plain servers vary, this one does as gin. */
  #unknown(reply: Reply, status: 404 | 405): Promise<void> {
    return sendText(
      reply,
      status,
      status === 404 ? "404 page not found" : "405 method not allowed",
    );
  }

  async #read(request: EngineRequest, path: string, reply: Reply): Promise<void> {
    const isHead = request.method === "HEAD";
    if (path.startsWith("/v1/models/")) {
      const info = this.info(decodeURIComponent(path.slice("/v1/models/".length)));
      if (info === undefined) return sendJson(reply, 404, this.#noModel(path.slice(11)));
      return sendJson(reply, 200, this.#card(info));
    }
    if (path === "/v1/models") {
      const cards = this.models.map((info) => this.#card(info));
      // wire §1.2: an Ollama without models says null.
      const data = this.kind === "ollama" && cards.length === 0 ? null : cards;
      return sendJson(reply, 200, { object: "list", data });
    }
    if (this.kind === "ollama") {
      if (path === "/") return sendText(reply, 200, "Ollama is running", isHead);
      if (path === "/api/version") return sendJson(reply, 200, { version: "0.32.15" });
      if (path === "/api/tags") return sendJson(reply, 200, tags(this.models));
      if (path === "/api/ps") return sendJson(reply, 200, ps(this.models, this.residency));
      if (path in ollamaRoutes || path in routes) return this.#unknown(reply, 405);
    }
    return this.#unknown(reply, 404);
  }

  #card(info: ModelInfo): unknown {
    const owner = this.kind === "ollama" ? "library" : "organization-owner";
    return { id: info.name, object: "model", created: 1_754_049_600, owned_by: owner };
  }

  #noModel(name: string): unknown {
    const error =
      this.kind === "ollama"
        ? { message: `model '${name}' not found`, type: "not_found_error", param: null, code: null }
        : {
            message: `The model \`${name}\` does not exist.`,
            type: "NotFoundError",
            param: "model",
            code: 404,
          };
    return { error };
  }

  async #post(
    request: EngineRequest,
    path: string,
    model: string,
    behaviour: Behaviour,
    reply: Reply,
    keep: (bytes: Uint8Array) => void,
  ): Promise<void> {
    const isNative = path.startsWith("/api/");
    const refuse = (
      status: number,
      message: string,
      type = "invalid_request_error",
    ): Promise<void> => {
      const error = { message, type, param: null, code: this.kind === "ollama" ? null : status };
      if (path === "/v1/messages") {
        return sendJson(reply, status, {
          type: "error",
          error: { type, message },
          request_id: "req_1",
        });
      }
      return sendJson(reply, status, { error: isNative ? message : error });
    };
    const known =
      this.kind === "ollama" ? { ...routes, ...ollamaRoutes } : { ...routes, ...plainRoutes };
    const route = known[path];
    if (route === undefined) return this.#unknown(reply, 404);
    // real §5.1: request bodies are not decoded.
    if (request.headers["content-encoding"] !== undefined) return refuse(400, "unexpected EOF");
    if (!isJsonObject(request.body)) return refuse(400, "unexpected EOF");
    const info = this.info(model);
    if (info === undefined) return refuse(404, noModelMessage(this.kind, model), "not_found_error");
    const { json } = request;
    if (path === "/api/show") return sendJson(reply, 200, show(info));
    if (path === "/v1/messages/count_tokens") {
      return sendJson(reply, 200, { input_tokens: countWords(json) });
    }
    if (route === "embeddings")
      return this.#embed(json, path, info, behaviour, reply, keep, refuse);
    if (this.kind === "ollama" && isEmbedding(info)) {
      return refuse(400, `"${info.name}" does not support chat`);
    }
    if (path === "/v1/chat/completions" && !isFilled(json.messages)) {
      return refuse(400, "[] is too short - 'messages'");
    }
    const isLoadOnly = isNative && (path === "/api/chat" ? !isFilled(json.messages) : !json.prompt);
    if (isLoadOnly) return this.#loadOnly(json, path, info, behaviour, reply, refuse);
    await this.#holding(info, behaviour, reply, refuse, async () => {
      const answer = this.#answer(route, json, info, model, behaviour);
      const isStream = isNative ? json.stream !== false : json.stream === true;
      if (isStream && behaviour.fault?.kind !== "unstreamed") {
        await pause(behaviour.headersDelayMs, reply.left);
        if (!reply.left.aborted) await streamAnswer(reply, behaviour, answer, keep);
        return;
      }
      const { headersDelayMs, firstTokenDelayMs, tokenDelayMs, stallAfterTokens, stallMs } =
        behaviour;
      const stall = stallAfterTokens === null ? 0 : stallMs;
      const generating = tokenDelayMs * Math.max(0, answer.pieces.length - 1) + stall;
      await pause(headersDelayMs + firstTokenDelayMs + generating, reply.left);
      if (!reply.left.aborted) await sendWhole(reply, behaviour, answer, keep);
    });
  }

  /** With model and slot; without headers until then (wire §1.4). */
  async #holding(
    info: ModelInfo,
    behaviour: Behaviour,
    reply: Reply,
    refuse: (status: number, message: string, type?: string) => Promise<void>,
    work: () => Promise<void>,
  ): Promise<void> {
    const entered = await this.residency.enter(info.name, behaviour, reply.left);
    if (entered === "left") return;
    // wire §1.4: the 503 is only for requests that would have to schedule a load.
    if (entered === "full") return void (await answerFault(reply, faults.ollamaBusy, () => {}));
    if (entered === "failed") {
      return refuse(
        500,
        "llama-server process has terminated: cudaMalloc failed: out of memory",
        "api_error",
      );
    }
    const name = this.kind === "ollama" ? info.name : "";
    const slots = this.#slots.get(name) ?? { running: 0, waiting: [] };
    this.#slots.set(name, slots);
    try {
      while (slots.running >= behaviour.slots && !reply.left.aborted) {
        await this.#untilFree(slots, reply.left);
      }
      if (reply.left.aborted) return;
      slots.running += 1;
      this.active += 1;
      try {
        await work();
      } finally {
        slots.running -= 1;
        this.active -= 1;
        slots.waiting.shift()?.();
      }
    } finally {
      this.residency.leave(info.name);
    }
  }

  #untilFree(slots: Slots, left: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const settle = (): void => {
        left.removeEventListener("abort", settle);
        const place = slots.waiting.indexOf(settle);
        if (place >= 0) slots.waiting.splice(place, 1);
        resolve();
      };
      slots.waiting.push(settle);
      left.addEventListener("abort", settle);
    });
  }

  async #loadOnly(
    json: Record<string, unknown>,
    path: string,
    info: ModelInfo,
    behaviour: Behaviour,
    reply: Reply,
    refuse: (status: number, message: string, type?: string) => Promise<void>,
  ): Promise<void> {
    const isUnload = json.keep_alive === 0 || json.keep_alive === "0";
    if (isUnload) this.residency.unload(info.name);
    else {
      const entered = await this.residency.enter(info.name, behaviour, reply.left);
      if (entered === "left") return;
      if (entered === "full") return void (await answerFault(reply, faults.ollamaBusy, () => {}));
      if (entered === "failed")
        return refuse(500, "llama-server process has terminated", "api_error");
      this.residency.leave(info.name);
    }
    await sendJson(reply, 200, {
      model: info.name,
      created_at: "2026-08-01T12:00:00Z",
      ...(path === "/api/chat"
        ? { message: { role: "assistant", content: "" } }
        : { response: "" }),
      done: true,
      done_reason: isUnload ? "unload" : "load",
    });
  }

  #answer(
    route: Route,
    json: Record<string, unknown>,
    info: ModelInfo,
    model: string,
    behaviour: Behaviour,
  ): { shape: Shape; pieces: Piece[]; reason: string; usage: Usage } {
    const isOllama = this.kind === "ollama";
    const options = json.stream_options as { include_usage?: boolean } | undefined;
    this.served += 1;
    const job: Job = {
      kind: this.kind,
      // wire §1.8: Ollama's ids are not unique.
      id: isOllama
        ? `chatcmpl-${(this.served * 367) % 999}`
        : `chatcmpl-${this.served.toString(16).padStart(24, "0")}`,
      created: Math.floor(Date.now() / 1000),
      model: model === "" ? info.name : model,
      includeUsage: options?.include_usage === true,
      roleFirst: behaviour.roleFirst,
      finishOnLastToken: behaviour.finishOnLastToken,
      timings: behaviour.timings,
    };
    const words = Array.isArray(behaviour.tokens)
      ? behaviour.tokens
      : Array.from(
          { length: behaviour.tokens },
          (_, index) => `${index === 0 ? "" : " "}word${index}`,
        );
    const limit = outputLimit(route, json, isOllama);
    const spoken = words.slice(0, limit);
    const pieces: Piece[] = [
      ...behaviour.reasoning.map((reasoning) => ({ reasoning })),
      ...spoken.map((text) => ({ text })),
      ...behaviour.toolCalls.map((toolCall, index) => ({ toolCall, index })),
    ];
    const natural = behaviour.toolCalls.length > 0 ? "tool_calls" : behaviour.finishReason;
    const usage: Usage = {
      input: behaviour.promptTokens ?? countWords(json),
      output: pieces.length,
      cached: behaviour.cachedTokens,
    };
    const reason = spoken.length < words.length ? "length" : natural;
    return { shape: shapeOf(route, job), pieces, reason, usage };
  }

  async #embed(
    json: Record<string, unknown>,
    path: string,
    info: ModelInfo,
    behaviour: Behaviour,
    reply: Reply,
    keep: (bytes: Uint8Array) => void,
    refuse: (status: number, message: string, type?: string) => Promise<void>,
  ): Promise<void> {
    const inputs = Array.isArray(json.input) ? (json.input as unknown[]) : [json.input];
    if (this.kind === "ollama") {
      // real §6.7, §5.1: a chat model cannot embed; token arrays are not understood.
      if (!isEmbedding(info))
        return refuse(501, "this model does not support embeddings", "api_error");
      if (inputs.some((input) => typeof input !== "string"))
        return refuse(400, "invalid input type");
    }
    const isTokens = inputs.length > 0 && inputs.every((input) => typeof input === "number");
    const items = isTokens ? [inputs] : inputs;
    await this.#holding(info, behaviour, reply, refuse, async () => {
      await pause(behaviour.headersDelayMs, reply.left);
      if (reply.left.aborted) return;
      if (path === "/api/embed") {
        const embeddings = items.filter((item) => item !== "").map(vectorOf);
        return sendJson(reply, 200, { model: info.name, embeddings }, {}, keep);
      }
      const isBase64 = json.encoding_format === "base64";
      const data = items.map((item, index) => ({
        object: "embedding",
        embedding: isBase64 ? base64Of(vectorOf(item)) : vectorOf(item),
        index,
      }));
      const input = countWords(json);
      const usage = { prompt_tokens: input, total_tokens: input };
      await sendJson(reply, 200, { object: "list", data, model: json.model, usage }, {}, keep);
    });
  }
}

type Route =
  | "chat"
  | "completions"
  | "messages"
  | "responses"
  | "embeddings"
  | "nativeChat"
  | "nativeGenerate"
  | "other";

const routes: Record<string, Route> = {
  "/v1/chat/completions": "chat",
  "/v1/completions": "completions",
  "/v1/embeddings": "embeddings",
  "/v1/messages": "messages",
  "/v1/responses": "responses",
};

const ollamaRoutes: Record<string, Route> = {
  "/api/chat": "nativeChat",
  "/api/generate": "nativeGenerate",
  "/api/embed": "embeddings",
  "/api/show": "other",
};

/** wire §1.5: Ollama has no count_tokens. */
const plainRoutes: Record<string, Route> = { "/v1/messages/count_tokens": "other" };

function shapeOf(route: Route, job: Job): Shape {
  switch (route) {
    case "completions":
      return completionsShape(job);
    case "messages":
      return messagesShape(job);
    case "responses":
      return responsesShape(job);
    case "nativeChat":
      return nativeShape(job, "chat");
    case "nativeGenerate":
      return nativeShape(job, "generate");
    case "chat":
    case "embeddings":
    case "other":
      return chatShape(job);
  }
}

/** real §6.10: Ollama does not know max_completion_tokens; without max_tokens nothing ends it but itself. */
function outputLimit(route: Route, json: Record<string, unknown>, isOllama: boolean): number {
  if (route === "responses") return Number(json.max_output_tokens ?? Infinity);
  if (route === "nativeChat" || route === "nativeGenerate") {
    const { num_predict = Infinity } = (json.options ?? {}) as { num_predict?: number };
    return num_predict < 0 ? Infinity : num_predict;
  }
  const asked = isOllama ? json.max_tokens : (json.max_completion_tokens ?? json.max_tokens);
  return Number(asked ?? Infinity);
}

function noModelMessage(kind: EngineKind, name: string): string {
  return kind === "ollama" ? `model '${name}' not found` : `The model \`${name}\` does not exist.`;
}

function isFilled(value: unknown): boolean {
  return Array.isArray(value) && value.length > 0;
}

function isJsonObject(body: string): boolean {
  try {
    const value: unknown = JSON.parse(body);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}

function countWords(json: Record<string, unknown>): number {
  const texts = JSON.stringify(json.messages ?? json.prompt ?? json.input ?? "");
  return (texts.match(/\w+/g) ?? []).length;
}

/** Four numbers that depend on the input and fit a float32. */
function vectorOf(input: unknown): number[] {
  const text = JSON.stringify(input);
  let state = text.length;
  for (const char of text) state = (Math.imul(state, 31) + char.charCodeAt(0)) >>> 0;
  return [0, 8, 16, 24].map((shift) => Math.fround(((state >>> shift) & 255) / 256));
}

function base64Of(vector: number[]): string {
  return Buffer.from(new Float32Array(vector).buffer).toString("base64");
}

function recordOf(
  { method, target, headers, rawHeaders, body }: WireRequest,
  reply: Reply,
): { request: EngineRequest; keep: (bytes: Uint8Array) => void } {
  const parts: Uint8Array[] = [];
  let kept = 0;
  const text = body.toString();
  const request: EngineRequest = {
    method,
    path: target,
    headers,
    rawHeaders,
    body: text,
    bodyBytes: body,
    json: isJsonObject(text) ? (JSON.parse(text) as Record<string, unknown>) : {},
    arrivedAt: Date.now(),
    get status() {
      return reply.status;
    },
    get bytesSent() {
      return reply.bytesSent;
    },
    sent: () => Buffer.concat(parts),
    closedByClient: false,
    closedAt: null,
    completed: false,
  };
  const keep = (bytes: Uint8Array): void => {
    if (kept >= KEPT_BYTES) return;
    parts.push(bytes);
    kept += bytes.length;
  };
  return { request, keep };
}
