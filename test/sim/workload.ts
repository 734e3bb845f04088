import type { Priority } from "../../src/core/fairness.ts";
import { createRandom } from "../support/random.ts";
import { exponential, fork, lognormal, pick, type Random } from "./random.ts";
import type { Request, Segment } from "./service.ts";
import type { Client, Wish } from "./world.ts";

/** What requests of one kind are like. */
export interface Kind {
  model: string;
  flow: string;
  priority?: Priority;
  promptTokens: number;
  /** Mean, and standard deviation per mean. */
  answerTokens: number;
  spread: number;
}

let made = 0;

/** One request of a kind, with a prompt of its own. */
export function requestOf(kind: Kind, random: Random): Request {
  const { model, flow, priority = "default", promptTokens, answerTokens, spread } = kind;
  return {
    model,
    flow,
    priority,
    prompt: [{ id: `prompt ${made++}`, tokens: promptTokens }],
    answerTokens: lognormal(random, answerTokens, spread),
    answerId: null,
    patienceMs: Infinity,
    sameAs: null,
  };
}

/** Independent requests, `everyMs` apart in the mean, each of one of these kinds. */
export function poisson(
  random: Random,
  kinds: readonly Kind[],
  everyMs: number,
  untilMs: number,
): Client[] {
  const clients: Client[] = [];
  const own = fork(random);
  let at = exponential(own, everyMs);
  for (; at < untilMs; at += exponential(own, everyMs)) {
    clients.push({ first: { at, request: requestOf(pick(own, kinds), own) } });
  }
  return clients;
}

/** Whoever was refused comes back when it was told to, in whole seconds as the header has it. */
function whenToldTo(endedAt: number, retryAfterMs: number | null): number {
  return endedAt + Math.ceil((retryAfterMs ?? 1000) / 1000) * 1000;
}

/** Asks again whenever it has its answer and `thinkMs` have passed. */
export function loop(random: Random, kind: Kind, untilMs: number, thinkMs = 0): Client {
  const own = fork(random);
  const startsAt = own() * (thinkMs + 1);
  return {
    first: { at: startsAt, request: requestOf(kind, own) },
    next({ endedAt, ending, retryAfterMs }) {
      const ended = endedAt ?? Infinity;
      const at = ending === "refused" ? whenToldTo(ended, retryAfterMs) : ended + thinkMs;
      return at < untilMs ? { at, request: requestOf(kind, own) } : null;
    },
  };
}

/** Asks every so often, whether the last one has been answered or not. */
export function regularly(random: Random, kind: Kind, everyMs: number, untilMs: number): Client[] {
  const own = fork(random);
  const clients: Client[] = [];
  for (let at = own() * everyMs; at < untilMs; at += everyMs) {
    clients.push({ first: { at, request: requestOf(kind, own) } });
  }
  return clients;
}

/** So many at once, the kinds by turns. */
export function burst(random: Random, kinds: readonly Kind[], count: number, at: number): Client[] {
  const own = fork(random);
  return Array.from({ length: count }, (_, each) => {
    return { first: { at, request: requestOf(kinds[each % kinds.length] as Kind, own) } };
  });
}

/** Comes back when it was told to, with the same request, until it is served. */
export function obedient(client: Client): Client {
  const { request } = client.first;
  return {
    first: client.first,
    next({ ending, endedAt, retryAfterMs }): Wish | null {
      if (ending !== "refused") return null;
      return { at: whenToldTo(endedAt ?? 0, retryAfterMs), request };
    },
  };
}

/** Their clients do not wait for longer than about so many milliseconds. */
export function impatient(random: Random, clients: readonly Client[], meanMs: number): Client[] {
  const own = fork(random);
  return clients.map(({ first }) => {
    const patienceMs = exponential(own, meanMs);
    return { first: { ...first, request: { ...first.request, patienceMs } } };
  });
}

/** Of these requests a share are the same few, deterministic ones. */
export function repeated(
  random: Random,
  clients: readonly Client[],
  share: number,
  distinct: number,
): Client[] {
  const own = fork(random);
  return clients.map((client) => {
    const { at, request } = client.first;
    if (own() >= share) return client;
    const sameAs = `same ${Math.floor(own() * distinct)}`;
    return { first: { at, request: { ...request, sameAs } } };
  });
}

/** What conversations are like. */
export interface Chat {
  model: string;
  /** Before every conversation, the same for all of them. */
  systemTokens: number;
  turns: number;
  userTokens: number;
  answerTokens: number;
  /** Between an answer and the next turn, mean milliseconds: people read, agents call a tool. */
  thinkMs: number;
}

/** Somebody who has one conversation after the other, each turn with everything said before. */
function talker(random: Random, name: string, chat: Chat, untilMs: number): Client {
  const own = fork(random);
  let history: Segment[] = [];
  let talks = 0;
  let turns = 0;

  function ask(): Request {
    if (turns === chat.turns || history.length === 0) {
      turns = 0;
      talks++;
      history = [{ id: `system ${chat.model}`, tokens: chat.systemTokens }];
    }
    turns++;
    const tokens = lognormal(own, chat.userTokens, 1);
    history.push({ id: `${name} ${talks}.${turns}`, tokens });
    return {
      model: chat.model,
      flow: name,
      priority: "default",
      prompt: [...history],
      answerTokens: lognormal(own, chat.answerTokens, 0.7),
      answerId: `answer ${name} ${talks}.${turns}`,
      patienceMs: Infinity,
      sameAs: null,
    };
  }

  return {
    first: { at: own() * chat.thinkMs, request: ask() },
    next({ request, tokens, endedAt }) {
      const at = (endedAt ?? Infinity) + exponential(own, chat.thinkMs);
      if (at >= untilMs) return null;
      history.push({ id: request.answerId ?? "", tokens });
      return { at, request: ask() };
    },
  };
}

export function talkers(seed: number, count: number, chat: Chat, untilMs: number): Client[] {
  const random = createRandom(seed);
  return Array.from({ length: count }, (_, at) => talker(random, `user ${at}`, chat, untilMs));
}
