import { LoadFailed } from "../engines/engine.ts";
import type { Connection, Engine } from "../engines/engine.ts";
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

interface Wish {
  /** Null: none is loaded. */
  model: string | null;
  unload: readonly string[];
}

/**
 * Has a backend put models out of memory and another into it, by their public names. Never rejects; it
 * ends after `limitMs` at the latest, or when the backend's `change` is aborted.
 *
 * @param look brings `live.loaded` up to date; false when the engine did not answer.
 */
export async function changeModels(
  live: Live,
  connection: Connection,
  { model, unload }: Wish,
  limitMs: number,
  now: () => number,
  look: () => Promise<boolean>,
): Promise<{ load: Load; changed: Changed }> {
  const load: Load = { from: now(), to: null, reason: "" };
  if (model !== null) live.loads.set(model, load);
  const named = (each: string) => live.targets.get(each)?.model ?? each;
  const names = { model: model === null ? null : named(model), unload: unload.map(named) };
  const controller = new AbortController();
  live.change = controller;
  const late = `not loaded within ${limitMs} ms (timeouts.loadMs)`;
  const timer = setTimeout(
    () => controller.abort(new LoadFailed(late)),
    Math.min(limitMs, 2 ** 31 - 1),
  );
  /** Else the engine would put out another one for what comes. */
  const haveGone = async () => {
    const until = now() + GONE_MS;
    const isThere = async () => (await look()) && unload.some((each) => live.loaded.has(each));
    for (let waitMs = GONE_LOOK_MS; now() < until && (await isThere()); waitMs *= 2) {
      if (controller.signal.aborted) return;
      await new Promise((resolve) => setTimeout(resolve, waitMs));
    }
  };
  const changed = await askFor(live.engine, connection, names, controller.signal, haveGone);
  clearTimeout(timer);
  live.change = null;
  load.reason = changed.reason;
  return { load, changed };
}

/** The same by the engine's own names. */
async function askFor(
  engine: Engine,
  connection: Connection,
  { model, unload }: Wish,
  signal: AbortSignal,
  haveGone: () => Promise<void>,
): Promise<Changed> {
  try {
    for (const each of unload) await engine.unload?.(connection, each, signal);
    if (unload.length > 0 && model !== null) await haveGone();
    if (model === null) return { loaded: null, reason: "" };
    const isLoaded = (await engine.load?.(connection, model, signal)) ?? false;
    return { loaded: isLoaded ? true : null, reason: "" };
  } catch (error) {
    // The runtimes reject with the reason of the abort, or with an error of their own.
    const cause: unknown = signal.aborted ? signal.reason : error;
    // Nobody there: the requests will find that out, and know what to do then.
    if (!(cause instanceof LoadFailed)) return { loaded: null, reason: "" };
    return { loaded: false, reason: cause.message };
  }
}
