/** What makes one kind of engine different from the others, as data; and how it refuses. */
import type { Behaviour } from "./engine-behaviour.ts";
import type { BackendKind, Call, Handler, ModelInfo } from "./engine-call.ts";
import type { Style } from "./engine-shapes.ts";
import type { Manner } from "./engine-socket.ts";
import { sendBody } from "./engine-stream.ts";

/** Why a request is not served. */
export type Problem =
  | "foreign"
  | "loading"
  | "unauthorized"
  | "noRoute"
  | "wrongMethod"
  | "contentType"
  | "encoded"
  | "badJson"
  | "noModel"
  | "unknownModel"
  | "notLoaded"
  | "noMessages"
  | "notChat"
  | "notEmbedding"
  | "notRerank"
  | "noMetrics"
  | "noInput"
  | "tokenInput"
  | "tooLong"
  | "inputTooLong"
  | "busy"
  | "loadsFull"
  | "loadFailed"
  | "alreadyLoaded"
  | "noRoom"
  | "crashed";

/** What the words of a refusal may speak of. */
export interface About {
  method: string;
  path: string;
  model: string;
  /** Names of all models here. */
  names: string[];
  stream: boolean;
  json: Record<string, unknown>;
  tokens: number;
  limit: number;
}

export interface Refused {
  status: number;
  /** A string goes out as it is, anything else as JSON. */
  body: unknown;
  contentType?: string;
  headers?: Record<string, string>;
}

/** `null`: not this time. What is missing here, this kind never refuses. */
export type Refusals = { [Each in Problem]?: (about: About) => Refused | null };

export interface Profile {
  kind: BackendKind;
  /** Served where a test names none. */
  models: string[];
  /** What this kind has of its own in {@link Behaviour}. */
  behaviour: Partial<Behaviour>;
  manner: Manner;
  /** A model's full name. */
  fullName: (name: string) => string;
  slotsPer: "model" | "server";
  /** Whether requests that run count for `maxQueued`. */
  queueCountsRunning: boolean;
  /** Leaving aborts the load one has caused. */
  abortsLoads: boolean;
  style: Style;
  /** GET and HEAD by path; a path that ends in "/" stands for all below it. */
  reads: Record<string, Handler>;
  posts: Record<string, Handler>;
  /** POSTs that are no inference. */
  control: string[];
  /** What stops a request before its path is looked at. */
  gate: (call: Call) => Problem | null;
  refusals: Refusals;
}

function aboutOf(call: Call, more: Partial<About> = {}): About {
  const { request, host, path, model } = call;
  return {
    method: request.method,
    path,
    model,
    names: host.models.map(({ name }) => name),
    stream: request.json.stream === true,
    json: request.json,
    tokens: 0,
    limit: 0,
    ...more,
  };
}

/** Whether it was refused: an engine that does not know a problem serves in spite of it. */
export async function refuse(
  call: Call,
  problem: Problem,
  more: Partial<About> = {},
): Promise<boolean> {
  const refused = call.host.profile.refusals[problem]?.(aboutOf(call, more)) ?? null;
  if (refused === null) return false;
  const { status, body, contentType, headers = {} } = refused;
  const type = contentType === undefined ? {} : { "Content-Type": contentType };
  await sendBody(call.reply, status, body, { ...type, ...headers }, call.keep);
  return true;
}

export function contextOf(info: ModelInfo, behaviour: Behaviour): number {
  return info.contextLength ?? behaviour.contextLength ?? 4096;
}

/** Whether one of the two headers carries the key that was asked for. */
export function hasKey(call: Call, headers: string[]): boolean {
  const { apiKey } = call.behaviour;
  if (apiKey === null) return true;
  return headers.some((name) => {
    const value = call.request.headers[name] ?? "";
    return (name === "authorization" ? value.replace(/^Bearer /i, "") : value) === apiKey;
  });
}
