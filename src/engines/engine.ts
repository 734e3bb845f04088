import type { Kind } from "../config.ts";
import type { Residency } from "../core/snapshot.ts";
import type { Keys } from "../core/splice.ts";
import { errorWords, isRecord, numberOf, textOf, type Want } from "../dialects/dialect.ts";
import { LIMIT_FIELDS, type LimitFields } from "./cap.ts";
import { NOTHING_WITHHELD, type Withheld } from "./withhold.ts";

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

/** An engine's own words about a request that it did not serve. */
export interface Said {
  /** Of the answer; 200 where the error came in the place of one. */
  status: number;
  words: string;
  type: string | null;
  code: string | null;
  /** The endpoint's. */
  path: string;
}

/**
 * What those words mean, where their status does not tell: this engine or this model does not do
 * the endpoint; the request is longer than the context; there is something in it that the model
 * cannot take; the model has to be loaded first, by a person; the engine itself has failed.
 */
export type Meaning = "unsupported" | "too_long" | "unsupported_input" | "not_loaded" | "broken";

/** The engine itself says that a model cannot be loaded; the message is its reason. */
export class LoadFailed extends Error {}

/** The backend's side: only what differs per kind. Knows no plane and no request but the one given. */
export interface Engine {
  kind: Kind;
  /** Slots of a model where neither configuration nor engine says. */
  slots: number;
  /** False: this path is not worth asking this engine for. */
  speaks(path: string): boolean;
  /** Why it cannot do what a request wants, to be read after its kind; null when it can. */
  cannot(want: Want): string | null;
  /** It loads models when they are asked for, and tells which are loaded. */
  tellsResidency: boolean;
  /** Do the capabilities of its models say which can use tools, and which see? */
  tellsAbilities: boolean;
  /** It serves the one model it has under whatever name it is asked for. */
  takesAnyName: boolean;
  /** Would a model of that name be answered by machines elsewhere? */
  isRemote(model: string): boolean;
  /** What of a request body it is not to get, since that would change the engine for everybody. */
  withhold(body: Uint8Array, keys: Keys): Withheld;
  /** Further replacements in the request body, as JSON bytes. */
  adapt(body: Uint8Array, keys: Keys): Map<string, Uint8Array>;
  /** Inputs that one request for embeddings may have. */
  embedBatch: number;
  /** Where the number of an answer's tokens can be limited. */
  limitFields: LimitFields;
  /** Sends one inference request. Rejects when there was no answer at all. */
  send(connection: Connection, request: EngineRequest): Promise<Response>;
  /**
   * Asks what is there: never a completion, never with a side effect.
   * @throws Error with the reason in words.
   */
  look(connection: Connection, signal: AbortSignal): Promise<Sighting>;
  /**
   * Loads a model, whatever it takes: until it is there or the signal is aborted. Null: it has all it
   * has in memory, or cannot be told.
   *
   * @returns false when the engine did not say whether it is there: a request will find out.
   * @throws LoadFailed; any other error when there was no answer.
   */
  load: ((connection: Connection, model: string, signal: AbortSignal) => Promise<boolean>) | null;
  /** Puts a model out of memory. Nothing may run on it. */
  unload: ((connection: Connection, model: string, signal: AbortSignal) => Promise<void>) | null;
  /** What a refusal means where the rules for all engines would misread it, else null. */
  meaning(said: Said): Meaning | null;
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

/**
 * A question to the engine's own API, its answer read to the end and parsed where it is JSON.
 *
 * @param question sent as JSON by POST; without one it is a GET
 */
export async function ask(
  connection: Connection,
  path: string,
  signal: AbortSignal,
  question?: object,
): Promise<{ status: number; server: string; body: unknown; text: string }> {
  const headers = {
    accept: "application/json",
    "user-agent": "tidegate",
    connection: "close",
    "accept-encoding": "identity",
    ...authorization(connection),
  };
  const posted = {
    method: "POST",
    headers: { ...headers, "content-type": "application/json" },
    body: JSON.stringify(question),
  };
  const init = question === undefined ? { headers } : posted;
  const response = await freshFetch(connection.url + path, { ...init, signal });
  const text = await response.text();
  let body: unknown = null;
  try {
    body = JSON.parse(text);
  } catch {
    // Not JSON: `text` has it.
  }
  return { status: response.status, server: response.headers.get("server") ?? "", body, text };
}

/** The same for what a probe can do without: an object, or null whatever went wrong. */
export async function askAside(
  connection: Connection,
  path: string,
  signal: AbortSignal,
  question?: object,
): Promise<Record<string, unknown> | null> {
  const answer = await ask(connection, path, signal, question).catch(() => null);
  return answer?.status === 200 && isRecord(answer.body) ? answer.body : null;
}

/** What an engine says of a load that it did not do: a failure, or nothing about the model at all. */
export function readLoadRefusal(status: number, body: unknown, text: string): false {
  const words = (isRecord(body) ? errorWords(body["error"]) : null) ?? text.slice(0, 200);
  // Not there, not allowed, too busy: whoever asks for an answer is told so in better words.
  if ([401, 403, 404, 405, 429, 503].includes(status)) return false;
  throw new LoadFailed(`HTTP ${status}: ${words}`);
}

function isLoading(status: number, body: unknown): boolean {
  if (status !== 503 || !isRecord(body)) return false;
  return /loading model/i.test(errorWords(body["error"]) ?? "");
}

/** What an engine lists at a path of its own, by the key that holds the list. */
export interface Listing {
  loading: boolean;
  items: Record<string, unknown>[];
}

/**
 * A list of models, read leniently: it may be null, and what is no object in it is left out.
 *
 * @throws Error with the reason in words.
 */
export async function list(
  connection: Connection,
  path: string,
  key: string,
  signal: AbortSignal,
): Promise<Listing> {
  const { status, body } = await ask(connection, path, signal);
  if (isLoading(status, body)) return { loading: true, items: [] };
  if (status === 401 || status === 403) {
    throw new Error(`HTTP ${status} at ${path}: set this backend's apiKey`);
  }
  if (status !== 200) throw new Error(`HTTP ${status} at ${path}`);
  if (!isRecord(body) || !(key in body)) throw new Error(`no model list at ${path}`);
  const items = Array.isArray(body[key]) ? body[key].filter(isRecord) : [];
  return { loading: false, items };
}

/** A number that counts something: engines say 0 where they do not know. */
export function countOf(value: unknown): number | null {
  const number = numberOf(value);
  return number === null || number < 1 ? null : Math.floor(number);
}

/** One item of `/v1/models`, in any of the ways that engines write it; none without a name. */
export function fromCard(card: Record<string, unknown>): ListedModel[] {
  const name = textOf(card["id"]);
  if (name === null || name === "") return [];
  const meta = isRecord(card["meta"]) ? card["meta"] : {};
  const contextLength =
    countOf(card["max_model_len"]) ??
    countOf(meta["n_ctx"]) ??
    countOf(card["context_length"]) ??
    countOf(card["context_window"]) ??
    countOf(card["max_context_length"]);
  return [modelNamed(name, { contextLength, createdAt: countOf(card["created"]) })];
}

async function lookAtModels(connection: Connection, signal: AbortSignal): Promise<Sighting> {
  const { loading, items } = await list(connection, "/v1/models", "data", signal);
  return { loading, models: items.flatMap(fromCard) };
}

/** The core every engine has; a 404 elsewhere means that it lacks the path. */
const CORE_PATHS = new Set(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]);

/** Something named in the request is missing, and not the path. */
const NAMED_MISSING = /\b(?:model|response)\b.*(?:not found|not exist)/i;

function plainMeaning({ status, words, path }: Said): Meaning | null {
  const lacking = status === 404 && !CORE_PATHS.has(path) && !NAMED_MISSING.test(words);
  return lacking ? "unsupported" : null;
}

/** What the routers of FastAPI, gin, llama.cpp and LM Studio (in a 200) say of a path they lack. */
const NO_SUCH_PATH =
  /^(?:not found|404 page not found|file not found|unexpected endpoint or method\b.*)$/i;

/** The rule of the plain engine, and for engines of a known kind what their routers say of any path. */
export function knownMeaning(said: Said): Meaning | null {
  const isRouters = said.status === 404 || said.status === 200;
  if (isRouters && NO_SUCH_PATH.test(said.words.trim())) return "unsupported";
  return plainMeaning(said);
}

/** The plain OpenAI-compatible engine; other kinds are this one with their differences. */
export const openai: Engine = {
  kind: "openai",
  slots: 32,
  speaks: () => true,
  cannot: () => null,
  tellsResidency: false,
  tellsAbilities: false,
  takesAnyName: false,
  isRemote: () => false,
  withhold: () => NOTHING_WITHHELD,
  adapt: () => new Map(),
  // Text Embeddings Inference refuses more (`--max-client-batch-size`), and speaks plain OpenAI.
  embedBatch: 32,
  limitFields: LIMIT_FIELDS,
  send: sendByFetch,
  look: lookAtModels,
  load: null,
  unload: null,
  meaning: plainMeaning,
};
