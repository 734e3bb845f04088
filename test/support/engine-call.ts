/** What a request at a fake engine is, and what the routes of every kind may ask of the engine. */
import type { Behaviour } from "./engine-behaviour.ts";
import type { Profile } from "./engine-profile.ts";
import type { Residency } from "./engine-residency.ts";
import type { Reply } from "./engine-socket.ts";

/** As a gateway's configuration names it. */
export type BackendKind = "ollama" | "openai" | "llamacpp" | "vllm" | "lmstudio" | "sglang";

/** A llama-server started without a model is a router: another server under the same name. */
export type EngineKind = BackendKind | "llamacpp-router";

export interface ModelInfo {
  name: string;
  digest?: string;
  size?: number;
  /** Less than `size`: spilled to the CPU; 0 on a machine without GPU (real §5.1). */
  sizeVram?: number;
  contextLength?: number;
  /** "embedding" and "rerank" make such a model; without them the name decides. */
  capabilities?: string[];
  remoteHost?: string;
}

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

export interface Call {
  host: Host;
  request: EngineRequest;
  reply: Reply;
  keep: (bytes: Uint8Array) => void;
  /** Without the query. */
  path: string;
  query: URLSearchParams;
  /** The model as asked for; empty where none was. */
  model: string;
  behaviour: Behaviour;
}

export type Handler = (call: Call) => Promise<void>;

/** The engine as its routes see it. */
export interface Host {
  profile: Profile;
  models: ModelInfo[];
  residency: Residency;
  find(name: string): ModelInfo | undefined;
  /** Runs the work with the model loaded and a slot held; without headers until then (wire §1.4). */
  hold(call: Call, info: ModelInfo, work: () => Promise<void>): Promise<void>;
  /** Before the headers: until it is over, the client has left, or nothing is delayed any more. */
  delay(ms: number, left: AbortSignal): Promise<void>;
  /** Counts as a generation while it works, with or without a slot. */
  count(work: () => Promise<void>): Promise<void>;
  /** Loads or wakes the model; `false`: refused, or nobody is there any more. */
  ensure(call: Call, info: ModelInfo, isPinned?: boolean): Promise<boolean>;
  /** Begins a load that no request waits for. */
  preload(call: Call, info: ModelInfo): void;
  running(): number;
  waiting(): number;
  /** Of these words so many have been read before, as the beginning of a prompt; from now on all have. */
  read(words: readonly string[]): number;
  /** Counts the answers. */
  nextAnswer(): number;
}

function has(info: ModelInfo, capability: string, name: RegExp): boolean {
  return info.capabilities === undefined
    ? name.test(info.name)
    : info.capabilities.includes(capability);
}

export function isEmbedding(info: ModelInfo): boolean {
  return has(info, "embedding", /embed|minilm/i);
}

export function isReranker(info: ModelInfo): boolean {
  return has(info, "rerank", /rerank/i);
}

/** The same name has the same digest, another one another. */
export function digestOf(info: ModelInfo): string {
  let hash = 0x811c9dc5;
  for (const char of info.name) hash = Math.imul(hash ^ char.charCodeAt(0), 0x01000193);
  return info.digest ?? (hash >>> 0).toString(16).padStart(8, "0").repeat(8);
}

export function isFilled(value: unknown): boolean {
  return Array.isArray(value) && value.length > 0;
}

export function isJsonObject(body: string): boolean {
  try {
    const value: unknown = JSON.parse(body);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}
