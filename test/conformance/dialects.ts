/** One engine of every kind, and in front of them a gateway that is told the kinds and one that finds them. */
import type { Answer } from "../support/client.ts";
import { chatBody, parseSse, send } from "../support/client.ts";
import type { Behaviour } from "../support/engine-behaviour.ts";
import { faults } from "../support/engine-behaviour.ts";
import type { EngineKind } from "../support/engine-call.ts";
import type { FakeEngine } from "../support/engine.ts";
import type { Fleet, Member } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";
import type { Gateway } from "../support/gateway.ts";
import { startGateway } from "../support/gateway.ts";

export const chatPath = "/v1/chat/completions";
const countPath = "/v1/messages/count_tokens";

export interface Dialect {
  /** Paths this kind does not have, or not for a model that chats. */
  lacks: string[];
  /** What makes the next request one too many. */
  busy: Partial<Behaviour>;
  /** What makes any prompt too long; `null`: this kind cuts it (real §6.5). */
  overflow: Partial<Behaviour> | null;
  /** Its stream that fails says so itself; else we have to (wire §1.7). */
  tellsItsDeath: boolean;
  base64: boolean;
  /** It can be started with a key. */
  hasKey: boolean;
  /** Its models come and go. */
  loads: boolean;
}

const plain = {
  lacks: [] as string[],
  busy: { fault: faults.busyFor(3) },
  overflow: { contextLength: 2 },
  tellsItsDeath: true,
  base64: true,
  hasKey: true,
  loads: false,
};
const lacksRerank = ["/v1/rerank", "/v1/embeddings"];

export const dialects: Record<EngineKind, Dialect> = {
  openai: { ...plain, hasKey: false, overflow: { fault: faults.vllmContext } },
  ollama: {
    ...plain,
    lacks: [countPath, ...lacksRerank],
    busy: { maxQueue: 0, loadMs: 1 },
    overflow: null,
    tellsItsDeath: false,
    hasKey: false,
    loads: true,
  },
  llamacpp: { ...plain, lacks: lacksRerank, busy: { loading: true } },
  "llamacpp-router": {
    ...plain,
    lacks: lacksRerank,
    busy: { fault: faults.loadingModel },
    tellsItsDeath: false,
    loads: true,
  },
  vllm: { ...plain, lacks: lacksRerank, busy: { maxQueued: 0 } },
  lmstudio: { ...plain, lacks: [countPath, "/v1/rerank"], base64: false, loads: true },
  sglang: { ...plain, lacks: lacksRerank, busy: { maxQueued: 0, slots: 0 }, base64: false },
};

export const kinds = Object.keys(dialects) as EngineKind[];

/** These serve one model per process, so what embeds or ranks needs another one. */
export const single: EngineKind[] = ["llamacpp", "vllm", "sglang"];

/** Ollama completes names with a tag. */
export function chatModel(kind: EngineKind): string {
  return kind === "ollama" ? "chat-ollama:8b" : `chat-${kind}`;
}

export function embedModel(kind: EngineKind): string {
  return kind === "ollama" ? "embed-ollama:latest" : `embed-${kind}`;
}

export function rankModel(kind: EngineKind): string {
  return `rerank-${kind}`;
}

/** A body for every path, about the model that chats. */
export function bodyFor(path: string, kind: EngineKind): Record<string, unknown> {
  const model = chatModel(kind);
  if (path === "/v1/completions") return { model, prompt: "Say something" };
  if (path === "/v1/embeddings" || path === "/v1/responses") return { model, input: "Say it" };
  if (path === "/v1/rerank") return { model, query: "it", documents: ["a", "b"] };
  return chatBody({ model, max_tokens: 99 });
}

export type Way = "named" | "found";

export interface House {
  fleet: Fleet<string>;
  gateways: Record<Way, Gateway>;
  engine(kind: EngineKind, does?: "embed" | "rerank"): FakeEngine;
  ask(way: Way, kind: EngineKind, path: string, more?: object): Promise<Answer>;
  /** What the engine sent last. */
  sent(kind: EngineKind): string;
  close(): Promise<void>;
}

export const ways: Way[] = ["named", "found"];

export async function startHouse(own: Record<string, unknown> = {}): Promise<House> {
  // Engines that fail in one case after the other are the subject here, not what is left alone for it.
  // What stands in the cache says nothing of an engine.
  const config = {
    circuitBreaker: { failureThreshold: 1_000_000 },
    cache: { enabled: false },
    ...own,
  };
  const backend = { healthInterval: 60_000 };
  const members: Record<string, Member> = {};
  for (const kind of kinds) {
    const isSingle = single.includes(kind);
    const models = isSingle ? [chatModel(kind)] : [chatModel(kind), embedModel(kind)];
    members[kind] = { kind, models, backend };
    if (!isSingle) continue;
    members[`${kind}-embed`] = { kind, models: [embedModel(kind)], backend };
    members[`${kind}-rerank`] = { kind, models: [rankModel(kind)], backend };
  }
  const fleet = await startFleet(members, config);
  const engines = fleet.engines as Record<string, FakeEngine>;
  const unnamed = Object.entries(engines).map(([id, { url }]) => ({ id, url, ...backend }));
  const found = await startGateway({ config: { ...config, backends: unnamed } });
  const gateways = { named: fleet.gateway, found };
  const engine = (kind: EngineKind, does?: "embed" | "rerank"): FakeEngine => {
    const id = does !== undefined && single.includes(kind) ? `${kind}-${does}` : kind;
    const wanted = engines[id];
    if (wanted === undefined) throw new Error(`no engine ${id}`);
    return wanted;
  };
  return {
    fleet,
    gateways,
    engine,
    ask: (way, kind, path, more = {}) =>
      send(gateways[way].url + path, { ...bodyFor(path, kind), ...more }),
    sent: (kind) => engine(kind).inference().at(-1)?.sent().toString() ?? "",
    async close() {
      await found.stop();
      await fleet.close();
    },
  };
}

/** What the client gets that did not ask for usage (wire §1.6). */
export function withoutUsage(sent: string): string {
  const { events } = parseSse(sent);
  const isUsage = (data: string | null): boolean => /"choices":\[\]/.test(data ?? "");
  return events
    .filter(({ data }) => !isUsage(data))
    .map(({ raw }) => raw)
    .join("");
}
