import type { Speed } from "./engine-batch.ts";
import type { Box, Machine, Server } from "./machine.ts";
import { createRandom } from "../support/random.ts";
import type { Random } from "./random.ts";
import {
  burst,
  impatient,
  loop,
  poisson,
  regularly,
  repeated,
  talkers,
  type Kind,
} from "./workload.ts";
import type { Client } from "./world.ts";

/** A machine, who asks it for what, and how the result is read. */
export interface Scenario {
  /** For the table. */
  about: string;
  machine: Machine;
  /** Measured apart; null: all together only. */
  groupBy: "model" | "flow" | null;
  /** The run is over then, milliseconds; whoever still waits has not been served. */
  untilMs: number;
  clients(seed: number): Client[];
}

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;

/** One request at a time, its whole time in the answer. */
const ONE: Speed = {
  slots: 1,
  promptMs: 0,
  tokenMs: 10,
  slowdown: 0,
  cacheTokens: 0,
  noticeMs: 50,
};

/** Three small models on a CPU, as measured: 0.17 s for an answer, 0.55 s for a load. */
export const SMALL: Box = { speed: ONE, maxLoaded: 1, loadMs: 550, unloadMs: 50, maxQueue: 512 };
const SMALL_TOKENS = 17;

/** Models that fill a GPU: 4 s for an answer, 6 s for a load. */
export const LARGE: Box = {
  speed: { ...ONE, slots: 4, tokenMs: 20 },
  maxLoaded: 1,
  loadMs: 6000,
  unloadMs: 0,
  maxQueue: 100_000,
};
const LARGE_TOKENS = 200;

const ABC = ["a", "b", "c"];

function kindOf(model: string, answerTokens: number, spread: number): Kind {
  return { model, flow: "default", promptTokens: 0, answerTokens, spread };
}

export function small(model: string): Kind {
  return kindOf(model, SMALL_TOKENS, 0);
}

/** Lognormal with a standard deviation equal to its mean. */
export function large(model: string): Kind {
  return kindOf(model, LARGE_TOKENS, 1);
}

function on(box: Box, models: readonly string[]): Machine {
  return { type: "box", models, box };
}

const FAST: Server = {
  speed: {
    slots: 8,
    promptMs: 1 / 3,
    tokenMs: 1000 / 60,
    slowdown: 0.05,
    cacheTokens: 60_000,
    noticeMs: 50,
  },
  weight: 1,
};
const SLOW: Server = {
  speed: { ...FAST.speed, slots: 4, promptMs: 1.25, tokenMs: 50, cacheTokens: 30_000 },
  weight: 1,
};
const CHAT = {
  model: "chat",
  systemTokens: 1500,
  turns: 8,
  userTokens: 120,
  answerTokens: 250,
  thinkMs: 15_000,
};

/** The flood of one flow, and the few questions of another. */
const FLOOD: Kind = {
  model: "a",
  flow: "flood",
  promptTokens: 3000,
  answerTokens: 1500,
  spread: 0.3,
};
const LIGHT: Kind = {
  model: "a",
  flow: "light",
  promptTokens: 300,
  answerTokens: 100,
  spread: 0.3,
};
const FLOOD_BOX: Box = {
  speed: { slots: 4, promptMs: 0.5, tokenMs: 17, slowdown: 0, cacheTokens: 0, noticeMs: 50 },
  maxLoaded: 1,
  preloaded: ["a"],
  loadMs: 6000,
  unloadMs: 0,
  maxQueue: 512,
};

/** As a real Ollama was measured with it: with 4.2 requests a second it takes as long as that one did. */
export const MEASURED_MIX: Scenario = {
  about:
    "three small models, memory for one: independent requests for 45 s at 71 % of what one can do",
  machine: on(SMALL, ABC),
  groupBy: null,
  untilMs: HOUR,
  clients: (seed) => poisson(createRandom(seed), ABC.map(small), 1000 / 4.2, 45_000),
};

/** @param hasFlood false: the light flow alone. */
export function floodScenario(hasFlood: boolean): Scenario {
  return {
    about: "12 loops with long answers, and somebody who asks a short question every 2 s: 4 slots",
    machine: on(FLOOD_BOX, ["a"]),
    groupBy: "flow",
    untilMs: 40 * MINUTE,
    clients(seed) {
      const random = createRandom(seed);
      const light = poisson(random, [LIGHT], 2000, 30 * MINUTE);
      const flood = Array.from({ length: hasFlood ? 12 : 0 }, () => {
        return loop(random, FLOOD, 30 * MINUTE);
      });
      return [...light, ...flood];
    },
  };
}

function besideClients(random: Random, a: Kind, b: Kind, everyMs: number, untilMs: number) {
  const loops = [1, 2].map(() => loop(random, a, untilMs));
  return [...loops, ...regularly(random, b, everyMs, untilMs)];
}

export const SCENARIOS: Readonly<Record<string, Scenario>> = {
  fits: {
    about: "three models, memory for all: independent requests at 60 % of what they can do",
    machine: on({ ...LARGE, maxLoaded: 3 }, ABC),
    groupBy: null,
    untilMs: 2 * HOUR,
    clients: (seed) => poisson(createRandom(seed), ABC.map(large), 4000 / 4 / 3 / 0.6, HOUR / 2),
  },
  mix: {
    about: "three models, memory for one: independent requests at 30 % of what one can do",
    machine: on(LARGE, ABC),
    groupBy: null,
    untilMs: 2 * HOUR,
    clients: (seed) => poisson(createRandom(seed), ABC.map(large), 4000 / 4 / 0.3, HOUR),
  },
  beside: {
    about: "two loops on a, a user of b every 20 s: memory for one model",
    machine: on({ ...SMALL, preloaded: ["a"] }, ["a", "b"]),
    groupBy: "model",
    untilMs: 10 * MINUTE,
    clients(seed) {
      return besideClients(createRandom(seed), small("a"), small("b"), 20_000, 10 * MINUTE);
    },
  },
  burst: {
    about: "60 requests at once over three models: memory for one",
    machine: on(SMALL, ABC),
    groupBy: "model",
    untilMs: 10 * MINUTE,
    clients: (seed) => burst(createRandom(seed), ABC.map(small), 60, 0),
  },
  flood: floodScenario(true),
  leavers: {
    about: "clients that leave after half a minute or so, and requests repeated word by word",
    machine: on(LARGE, ABC),
    groupBy: null,
    untilMs: 2 * HOUR,
    clients(seed) {
      const random = createRandom(seed);
      const all = poisson(random, ABC.map(large), 5000, HOUR);
      return repeated(random, impatient(random, all, 30_000), 0.2, 10);
    },
  },
  chats: {
    about: "60 people with conversations over three equal servers",
    machine: { type: "servers", models: ["chat"], servers: [FAST, FAST, FAST] },
    groupBy: null,
    untilMs: HOUR,
    clients: (seed) => talkers(seed, 60, CHAT, 30 * MINUTE),
  },
  unequal: {
    about: "40 people with conversations over two fast servers and a slow one",
    machine: { type: "servers", models: ["chat"], servers: [FAST, FAST, SLOW] },
    groupBy: null,
    untilMs: HOUR,
    clients: (seed) => talkers(seed, 40, CHAT, 30 * MINUTE),
  },
  agents: {
    about: "8 agents with long contexts and quick tools over three equal servers",
    machine: { type: "servers", models: ["chat"], servers: [FAST, FAST, FAST] },
    groupBy: null,
    untilMs: HOUR,
    clients(seed) {
      const agent = { ...CHAT, systemTokens: 6000, turns: 20, userTokens: 800, thinkMs: 1500 };
      return talkers(seed, 8, agent, 30 * MINUTE);
    },
  },
};
