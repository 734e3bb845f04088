import type { Kind } from "../config.ts";
import type { Fault } from "../core/outcome.ts";
import type { Residency } from "../core/snapshot.ts";
import type { Keys } from "../core/splice.ts";
import { errorWords, isRecord, numberOf, textOf, type Endpoint } from "../dialects/dialect.ts";
import { GatewayError, printable, quote } from "../errors.ts";

/** How one backend is reached. */
export interface Connection {
  id: string;
  /** Without `/v1` and without trailing slash. */
  url: string;
  apiKey: string | null;
}

/** One request as it goes out. */
export interface EngineRequest {
  /** Path and query. */
  path: string;
  headers: Record<string, string>;
  body: Uint8Array;
  /** Aborting it stops the engine. */
  signal: AbortSignal;
}

/** A model as an engine lists it. */
export interface ListedModel {
  name: string;
  digest: string | null;
  contextLength: number | null;
  capabilities: string[];
  /** Unix seconds, null where the engine does not tell. */
  createdAt: number | null;
  residency: Residency;
  /** Requests at once, null where the engine does not tell. */
  slots: number | null;
  /** In all, and of that on the GPU. */
  sizeBytes: number | null;
  vramBytes: number | null;
  /** Answered by machines elsewhere, through this engine. */
  remote: boolean;
}

/** A model of which nothing is known but what is given. */
export function modelNamed(name: string, known: Partial<ListedModel> = {}): ListedModel {
  return {
    name,
    digest: null,
    contextLength: null,
    capabilities: [],
    createdAt: null,
    residency: "loaded",
    slots: null,
    sizeBytes: null,
    vramBytes: null,
    remote: false,
    ...known,
  };
}

/** What a probe saw. `loading`: the engine is up and not ready yet, which is not a failure. */
export interface Sighting {
  loading: boolean;
  models: ListedModel[];
}

/** An engine's refusal: the verdict's key, and the error in the caller's words. */
export interface Refusal {
  fault: Fault;
  error: GatewayError;
}

/** The backend's side: only what differs per kind. Knows no plane and no request but the one given. */
export interface Engine {
  kind: Kind;
  /** Slots of a model where neither configuration nor engine says. */
  slots: number;
  /** False: this path is not worth asking this engine for. */
  speaks(path: string): boolean;
  /** Further replacements in the request body, as JSON bytes. */
  adapt(body: Uint8Array, keys: Keys): Map<string, Uint8Array>;
  /** Sends one inference request. Rejects when there was no answer at all. */
  send(connection: Connection, request: EngineRequest): Promise<Response>;
  /**
   * Asks what is there: never a completion, never with a side effect.
   * @throws Error with the reason in words.
   */
  look(connection: Connection, signal: AbortSignal): Promise<Sighting>;
}

/** Bun's `fetch` gives up after minutes of silence unless told not to. */
type FetchInit = RequestInit & { timeout: false };

/**
 * `fetch` as every call to an engine has to be made: a connection of its own (a reused one may be
 * stale, and Deno sends a POST twice when it dies), no redirects, no hidden clock.
 */
function freshFetch(url: string, init: RequestInit): Promise<Response> {
  const fresh: FetchInit = { ...init, keepalive: false, redirect: "manual", timeout: false };
  return fetch(url, fresh);
}

function authorization(connection: Connection): Record<string, string> {
  return connection.apiKey === null ? {} : { authorization: `Bearer ${connection.apiKey}` };
}

function sendByFetch(connection: Connection, request: EngineRequest): Promise<Response> {
  return freshFetch(connection.url + request.path, {
    method: "POST",
    headers: {
      ...request.headers,
      ...authorization(connection),
      connection: "close",
      "accept-encoding": "identity",
    },
    // A view of the client's bytes; `fetch` reads it at once and nobody changes it.
    body: request.body as Uint8Array<ArrayBuffer>,
    signal: request.signal,
  });
}

/** A GET of the engine's own API, its body read to the end and parsed where it is JSON. */
export async function ask(
  connection: Connection,
  path: string,
  signal: AbortSignal,
): Promise<{ status: number; server: string; body: unknown; text: string }> {
  const response = await freshFetch(connection.url + path, {
    headers: {
      accept: "application/json",
      "user-agent": "tidegate",
      connection: "close",
      "accept-encoding": "identity",
      ...authorization(connection),
    },
    signal,
  });
  const text = await response.text();
  let body: unknown = null;
  try {
    body = JSON.parse(text);
  } catch {
    // Not JSON: `text` has it.
  }
  return { status: response.status, server: response.headers.get("server") ?? "", body, text };
}

function isLoading(status: number, body: unknown): boolean {
  if (status !== 503 || !isRecord(body)) return false;
  return /loading model/i.test(errorWords(body["error"]) ?? "");
}

function listed(item: Record<string, unknown>): ListedModel[] {
  const name = textOf(item["id"]);
  if (name === null || name === "") return [];
  const meta = isRecord(item["meta"]) ? item["meta"] : {};
  const contextLength = numberOf(item["max_model_len"]) ?? numberOf(meta["n_ctx"]);
  return [modelNamed(name, { contextLength, createdAt: numberOf(item["created"]) })];
}

/** `GET /v1/models`, read leniently: `data` may be null, fields may be missing. */
async function lookAtModels(connection: Connection, signal: AbortSignal): Promise<Sighting> {
  const { status, body } = await ask(connection, "/v1/models", signal);
  if (isLoading(status, body)) return { loading: true, models: [] };
  if (status === 401 || status === 403) {
    throw new Error(`HTTP ${status} at /v1/models: set this backend's apiKey`);
  }
  if (status !== 200) throw new Error(`HTTP ${status} at /v1/models`);
  if (!isRecord(body) || !("data" in body)) throw new Error("no model list at /v1/models");
  const items = Array.isArray(body["data"]) ? body["data"].filter(isRecord) : [];
  return { loading: false, models: items.flatMap(listed) };
}

/** The plain OpenAI-compatible engine; other kinds are this one with their differences. */
export const openai: Engine = {
  kind: "openai",
  slots: 32,
  speaks: () => true,
  adapt: () => new Map(),
  send: sendByFetch,
  look: lookAtModels,
};

const CONTEXT_WORDS =
  /context (?:length|window|size)|maximum context|exceeds? the (?:available|model)|exceed_context_size|prompt is (?:too long|longer)/i;

/** The error inside whatever shape an engine gave its refusal. */
function refusalOf(text: string): { words: string; type: string | null; code: string | null } {
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch {
    return { words: text.trim(), type: null, code: null };
  }
  // Nested (OpenAI), a string (Ollama's own API), flat (SGLang), or FastAPI's `detail`.
  const inner = isRecord(body) ? (body["error"] ?? body) : body;
  const fields = isRecord(inner) ? inner : {};
  const words =
    typeof inner === "string"
      ? inner
      : (textOf(fields["message"]) ?? textOf(fields["detail"]) ?? text.trim());
  return { words, type: textOf(fields["type"]), code: textOf(fields["code"]) };
}

/** An engine's words inside our message: bounded, on one line. */
function cited(words: string): string {
  return words === "" ? "no words" : printable(words.slice(0, 500));
}

function retryAfterOf(headers: Headers): number {
  const seconds = Number(headers.get("retry-after"));
  return Number.isFinite(seconds) && seconds > 0 ? seconds * 1000 : 1000;
}

/** The core every engine has; a plain engine's 404 elsewhere means that it lacks the path. */
const CORE_PATHS = new Set(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]);

/** Turns an answer other than 2xx into a fault and the caller's error. `text` is the body, bounded. */
export function readRefusal(
  kind: Kind,
  backend: string,
  endpoint: Endpoint,
  status: number,
  headers: Headers,
  text: string,
): Refusal {
  const { words, type, code } = refusalOf(text);
  // A refusal of the request may repeat the prompt: of that the log only gets what kind it was.
  const kindOfError = `HTTP ${status} ${type ?? ""} ${code ?? ""}`.trim();
  const details = { detail: status < 500 ? kindOfError : `${kindOfError}: ${words.slice(0, 500)}` };
  const said = `backend ${quote(backend)} answered HTTP ${status}: ${cited(words)}`;
  if (status === 429 || status === 503) {
    const message = `every backend with this model is busy, try again; ${said}`;
    const retryAfterMs = retryAfterOf(headers);
    const error = new GatewayError("rate_limit_exceeded", message, { ...details, retryAfterMs });
    return { fault: "busy", error };
  }
  const missingPath =
    status === 404 &&
    kind === "openai" &&
    !CORE_PATHS.has(endpoint.path) &&
    !/model .*(?:not found|not exist)/i.test(words);
  if (status === 501 || missingPath) {
    const message = `this model's backend does not do ${endpoint.path}; ${said}`;
    return {
      fault: "unsupported",
      error: new GatewayError("unsupported_endpoint", message, details),
    };
  }
  if (status >= 500) {
    return { fault: "server_error", error: new GatewayError("upstream_error", said, details) };
  }
  if (status === 401 || status === 403 || status < 400) {
    const fix =
      status < 400
        ? "redirects are not followed: set the backend's url to where it leads"
        : "it does not accept the gateway: check this backend's apiKey";
    const error = new GatewayError("upstream_error", `${said} (${fix})`, details);
    return { fault: "misconfigured", error };
  }
  const context = `${type ?? ""} ${code ?? ""} ${words}`;
  if (
    (status === 400 || status === 422) &&
    (code === "context_length_exceeded" || CONTEXT_WORDS.test(context))
  ) {
    const error = new GatewayError("context_length_exceeded", cited(words), details);
    return { fault: "rejected", error };
  }
  const passed = { status, type: type ?? "invalid_request_error", code };
  const error = new GatewayError("invalid_parameter", cited(words), { ...details, passed });
  return { fault: "rejected", error };
}
