/**
 * The runs of algorithms.md §2.4 (a to d) on a real Ollama with three models and room for one of them:
 * each asks one address, Ollama's own or the gateway's. `turns.test.ts` and `bench/turns.ts` play them.
 */
import assert from "node:assert/strict";
import { open, randomOf, readEvents, send, sleep, until } from "../support/client.ts";
import { startGateway, type Gateway } from "../support/gateway.ts";
import { knownOf, startOllamaOfThree, STORY, type Service } from "./support.ts";

export const MODELS = ["smol-a", "smol-b", "smol-c"] as const;
const [A, B] = MODELS;
/** Service of 0.17 s on a quiet machine, where a load takes 0.55 s. */
const MAX_TOKENS = 12;
/** What Ollama writes of each load of a model. */
const LOAD = /msg="starting llama-server"/g;
/** Nobody waits longer, whatever is wrong. */
const PATIENCE_MS = 900_000;

export interface World {
  ollama: Service;
  gateway: Gateway;
  /** How often Ollama has loaded a model so far. */
  loads: () => number;
  stop: () => Promise<void>;
}

/** One request. Times are milliseconds since it was asked. */
export interface Asked {
  model: string;
  ending: "served" | "left" | "failed";
  /** Null where nothing came. */
  ttftMs: number | null;
  tookMs: number;
  /** What was wrong, of a failed one. */
  problem: string | null;
}

/**
 * A gateway with the default turn. It has loaded each of the three once, so it knows what a load takes
 * and that they do not fit together.
 */
export async function startWorld(): Promise<World> {
  const ollama = await startOllamaOfThree();
  const stopAll: (() => Promise<unknown>)[] = [ollama.stop];
  try {
    const backends = [{ id: "real", kind: "ollama", url: ollama.url, healthInterval: 1000 }];
    const gateway = await startGateway({ config: { backends } });
    stopAll.unshift(() => gateway.stop());
    for (const model of MODELS) await mustAsk(gateway.url, model);
    return {
      ollama,
      gateway,
      loads: () => ollama.output().match(LOAD)?.length ?? 0,
      async stop() {
        for (const each of stopAll) await each();
      },
    };
  } catch (error) {
    for (const each of stopAll) await each();
    throw error;
  }
}

/** Puts every model out, and waits until the gateway has seen it. */
export async function unloadAll({ ollama, gateway }: World): Promise<void> {
  for (const model of MODELS) await native(ollama, { model, keep_alive: 0 });
  const isOut = async () => {
    const known = await knownOf(gateway.url, "real");
    return [...known.values()].every(({ residency }) => residency === "cold");
  };
  assert.ok(await until(isOut, 20_000), "models stay loaded");
}

/** Medians, straight from Ollama: a service with the model loaded, and a load with the one before it put out. */
export async function measure(world: World): Promise<{ serviceMs: number; loadMs: number }> {
  await native(world.ollama, { model: B });
  const loads: number[] = [];
  const services: number[] = [];
  for (const model of MODELS) {
    const startedAt = performance.now();
    await native(world.ollama, { model });
    loads.push(performance.now() - startedAt);
    // The first computes the prompt.
    await mustAsk(world.ollama.url, model);
    for (let each = 0; each < 2; each++) {
      services.push((await mustAsk(world.ollama.url, model)).tookMs);
    }
  }
  return { serviceMs: quantile(services, 0.5) ?? 0, loadMs: quantile(loads, 0.5) ?? 0 };
}

async function native(ollama: Service, body: object): Promise<void> {
  const answer = await send(`${ollama.url}/api/generate`, body);
  assert.equal(answer.status, 200, answer.text);
}

async function mustAsk(url: string, model: string): Promise<Asked> {
  const asked = await ask(url, model);
  assert.equal(asked.ending, "served", asked.problem ?? asked.ending);
  return asked;
}

/** Asks for one short stream. */
async function ask(url: string, model: string, leaving?: AbortSignal): Promise<Asked> {
  const startedAt = performance.now();
  const elapsed = () => performance.now() - startedAt;
  const controller = new AbortController();
  const leave = () => controller.abort();
  leaving?.addEventListener("abort", leave);
  const timer = setTimeout(leave, PATIENCE_MS);
  let ttftMs: number | null = null;
  const end = (ending: Asked["ending"], problem: string | null = null): Asked => {
    return { model, ending, ttftMs, tookMs: elapsed(), problem };
  };
  try {
    const body = {
      model,
      messages: STORY,
      max_tokens: MAX_TOKENS,
      temperature: 0.7,
      stream: true,
    };
    const { signal } = controller;
    const response = await open(`${url}/v1/chat/completions`, body, { signal });
    if (response.status !== 200)
      return end("failed", `${response.status} ${await response.text()}`);
    let last = "";
    for await (const { data } of readEvents(response)) {
      if (data === null) continue;
      if (data.includes('"error"')) return end("failed", data);
      ttftMs ??= elapsed();
      last = data;
    }
    return last === "[DONE]" ? end("served") : end("failed", `the stream ends with ${last}`);
  } catch (error) {
    return leaving?.aborted === true ? end("left") : end("failed", String(error));
  } finally {
    clearTimeout(timer);
    leaving?.removeEventListener("abort", leave);
  }
}

/** What one run has shown at one address. */
export interface Shown {
  loads: number;
  tookMs: number;
  asked: Asked[];
}

async function shown(world: World, work: () => Promise<Asked[]>): Promise<Shown> {
  const before = world.loads();
  const startedAt = performance.now();
  const asked = await work();
  return { loads: world.loads() - before, tookMs: performance.now() - startedAt, asked };
}

/** When who asks, seeded: independent requests for the three models. */
function arrivals(seed: number, perSecond: number, ms: number): { at: number; model: string }[] {
  const random = randomOf(seed);
  const all: { at: number; model: string }[] = [];
  for (let at = 0; ;) {
    at += (-Math.log(1 - random.next()) / perSecond) * 1000;
    if (at >= ms) return all;
    all.push({ at, model: random.pick(MODELS) });
  }
}

/** (a) Independent requests for three models, so many a second, for so long. */
export function mix(
  world: World,
  url: string,
  seed: number,
  perSecond: number,
  ms: number,
): Promise<Shown> {
  return shown(world, () =>
    Promise.all(
      arrivals(seed, perSecond, ms).map(async ({ at, model }) => {
        await sleep(at);
        return ask(url, model);
      }),
    ),
  );
}

/** (c) As many at once, for the three models by turns. */
export function burst(world: World, url: string, count: number): Promise<Shown> {
  return shown(world, () =>
    Promise.all(Array.from({ length: count }, (_, at) => ask(url, MODELS[at % 3] as string))),
  );
}

export interface Beside extends Shown {
  /** Of A, as long as the loops were to go on. */
  done: number;
}

export interface Besides {
  /** B is asked for so often, for so long. */
  everyMs: number;
  askForMs: number;
  /** The loops end then. */
  endMs: number;
  /** Or as soon as everybody who asked for B has an answer. */
  endsWhenServed?: boolean;
}

/**
 * (b) Two loops on A; beside them somebody asks for B now and then. Whoever still waits when the loops
 * end leaves: without them B would be served at once.
 */
export async function beside(world: World, url: string, options: Besides): Promise<Beside> {
  const { everyMs, askForMs, endMs, endsWhenServed = false } = options;
  await mustAsk(url, A);
  const before = world.loads();
  const startedAt = performance.now();
  const elapsed = () => performance.now() - startedAt;
  const asked: Asked[] = [];
  let done = 0;
  let isOver = false;
  const goesOn = () => !isOver && elapsed() < endMs;
  const loop = async () => {
    while (goesOn()) {
      const one = await ask(url, A);
      asked.push(one);
      if (goesOn() && one.ending === "served") done++;
    }
  };
  const controller = new AbortController();
  const users: Promise<Asked>[] = [];
  const user = async () => {
    for (let at = Math.min(everyMs, 5000); at <= askForMs; at += everyMs) {
      await sleep(Math.max(0, at - elapsed()));
      users.push(ask(url, B, controller.signal));
    }
    if (!endsWhenServed) return;
    void Promise.all(users).then(() => (isOver = true));
  };
  const loops = Promise.all([loop(), loop()]);
  await user();
  await loops;
  const loads = world.loads() - before;
  controller.abort();
  asked.push(...(await Promise.all(users)));
  return { loads, tookMs: elapsed(), asked, done };
}

export interface Leavers extends Shown {
  /** B was loaded when the last of them had left, at once or soon after. */
  resident: boolean;
}

/**
 * (d) With A loaded ten clients ask for B, one after the other, each for so long only; then one who stays.
 * The one who stays is the last of `asked`.
 */
export async function leavers(world: World, url: string, patienceMs: number): Promise<Leavers> {
  await mustAsk(url, A);
  let resident = false;
  const result = await shown(world, async () => {
    const asked: Asked[] = [];
    for (let each = 0; each < 10; each++) {
      const controller = new AbortController();
      const timer = setTimeout(() => controller.abort(), patienceMs);
      asked.push(await ask(url, B, controller.signal));
      clearTimeout(timer);
    }
    resident = await until(() => isLoaded(world.ollama, B), 3000);
    asked.push(await ask(url, B));
    return asked;
  });
  return { ...result, resident };
}

async function isLoaded(ollama: Service, model: string): Promise<boolean> {
  const { models } = (await send(`${ollama.url}/api/ps`)).json() as { models: { name: string }[] };
  return models.some(({ name }) => name === `${model}:latest`);
}

/** By rank; null where there are none. */
export function quantile(values: readonly number[], share: number): number | null {
  const sorted = values.toSorted((one, other) => one - other);
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] ?? null;
}
