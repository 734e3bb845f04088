import { LoadFailed } from "../engines/engine.ts";
import type { Connection } from "../engines/engine.ts";
import type { Live, Load } from "./live.ts";

/** What became of putting some models out of memory and one into it. */
export interface Changed {
  /** Null: the engine did not say, and a request will find out. */
  loaded: boolean | null;
  /** Why it failed, in words for people; empty when it did not. */
  reason: string;
}

/** One load of a model, by the gateway. */
export interface Loaded extends Changed {
  backend: string;
  model: string;
  ms: number;
}

/** An engine that puts a model out once nothing runs there may learn late that a client has gone. */
const GONE_LOOK_MS = 10;
const GONE_MS = 5000;

/** A model in one backend, by its public name. */
export interface Spot {
  live: Live;
  connection: Connection;
  model: string;
}

/** Models that are to go, in one backend or in several that share a GPU, and one that is to come. */
export interface Wish {
  /** Null: none is loaded. */
  load: Spot | null;
  unload: readonly Spot[];
}

/**
 * Has backends put models out of memory and one into it. Never rejects; it ends after `limitMs` at the
 * latest, or when the `change` of `holder` is aborted.
 *
 * @param look brings `loaded` of a backend up to date; false when it did not answer.
 */
export async function changeModels(
  holder: Live,
  { load: wanted, unload }: Wish,
  limitMs: number,
  now: () => number,
  look: (live: Live) => Promise<boolean>,
): Promise<{ load: Load; changed: Changed }> {
  const load: Load = { from: now(), to: null, reason: "" };
  if (wanted !== null) wanted.live.loads.set(wanted.model, load);
  const controller = new AbortController();
  holder.change = controller;
  const late = `not loaded within ${limitMs} ms (timeouts.loadMs)`;
  const timer = setTimeout(
    () => controller.abort(new LoadFailed(late)),
    Math.min(limitMs, 2 ** 31 - 1),
  );
  const { signal } = controller;
  await Promise.all(unload.map((spot) => putOut(spot, signal)));
  // Else the engine would put out another one for what comes.
  if (wanted !== null) await Promise.all(unload.map((spot) => gone(spot, signal, now, look)));
  const changed = await putIn(wanted, signal);
  clearTimeout(timer);
  holder.change = null;
  load.reason = changed.reason;
  return { load, changed };
}

/** By the engine's own name. */
function nameOf({ live, model }: Spot): string {
  return live.targets.get(model)?.model ?? model;
}

async function putOut(spot: Spot, signal: AbortSignal): Promise<void> {
  // Who is not there has nothing in memory; whoever loads next finds out what is wrong otherwise.
  await spot.live.engine.unload?.(spot.connection, nameOf(spot), signal).catch(() => {});
}

async function gone(
  { live, model }: Spot,
  signal: AbortSignal,
  now: () => number,
  look: (live: Live) => Promise<boolean>,
): Promise<void> {
  const until = now() + GONE_MS;
  const isThere = async () => (await look(live)) && live.loaded.has(model);
  for (let waitMs = GONE_LOOK_MS; now() < until && (await isThere()); waitMs *= 2) {
    if (signal.aborted) return;
    await new Promise((resolve) => setTimeout(resolve, waitMs));
  }
}

async function putIn(wanted: Spot | null, signal: AbortSignal): Promise<Changed> {
  if (wanted === null) return { loaded: null, reason: "" };
  const { engine } = wanted.live;
  try {
    const isLoaded = (await engine.load?.(wanted.connection, nameOf(wanted), signal)) ?? false;
    return { loaded: isLoaded ? true : null, reason: "" };
  } catch (error) {
    // The runtimes reject with the reason of the abort, or with an error of their own.
    const cause: unknown = signal.aborted ? signal.reason : error;
    // Nobody there: the requests will find that out, and know what to do then.
    if (!(cause instanceof LoadFailed)) return { loaded: null, reason: "" };
    return { loaded: false, reason: cause.message };
  }
}
