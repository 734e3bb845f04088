import type { Kind } from "../config.ts";
import type { BreakerSettings, BreakerState } from "../core/breaker.ts";
import { loserTo } from "../core/fairness.ts";
import {
  coolsUntil,
  createScheduler,
  hasRoom,
  nextOf,
  positionOf,
  type SchedulerState,
  type Ticket,
} from "../core/lanes.ts";
import type { Pace } from "../core/pace.ts";
import { createPrefixIndex, type PrefixIndex } from "../core/prefix.ts";
import type { Backend, Health, Model, Snapshot, Target } from "../core/snapshot.ts";
import { asGoodAs } from "../core/select.ts";
import { createTurns, turnIn, type Turns } from "../core/turns.ts";
import type { Engine } from "../engines/engine.ts";
import { engineOf } from "../engines/kinds.ts";
import { Guard } from "./guard.ts";
import { Observed } from "./observed.ts";
import { firstTokenOf, guessesFrom, type Guesses } from "./expect.ts";

/** A load of a model; while it runs `to` is null. `reason`: why it failed. */
export interface Load {
  from: number;
  to: number | null;
  reason: string;
}

/** One backend that requests are sent to: its queue, and what was learned from its traffic. */
export interface Live {
  /** What has to stay for it to be the same backend, beside its id. */
  key: string;
  id: string;
  url: string;
  engine: Engine;
  scheduler: SchedulerState;
  health: Health;
  failedAt: number | null;
  lastChunkAt: number;
  /** When a stream of it was given up because nothing came any more. */
  stalledAt: number;
  observed: Observed;
  /** How fast each model begins its answers. */
  paces: Map<string, Pace>;
  /** Tokens of long prompts that it has been sent and is still computing, as far as streams show that. */
  computing: number;
  /** Prompts that it has computed. */
  prefixes: PrefixIndex;
  guard: Guard;
  /** Requests under way that are to show whether it works again. */
  trials: number;
  /** By public name. */
  targets: Map<string, Target>;
  /** Models in memory, as last reported. */
  loaded: ReadonlySet<string>;
  /** The last load of each model, from its beginning until it could be used. */
  loads: Map<string, Load>;
  /** The GPU whose turns it shares; null: it has its own. */
  gpu: string | null;
  /** The one whose turns it is to share, once the change of models under way is over. */
  nextGpu: string | null;
  /** Ends the change of models under way. */
  change: AbortController | null;
  timer: ReturnType<typeof setTimeout> | undefined;
}

export function keyOf({ kind, url }: Backend): string {
  return `${kind} ${url}`;
}

/** A backend of which nothing is known yet. */
export function createLive(backend: Backend): Live {
  return {
    key: keyOf(backend),
    id: backend.id,
    url: backend.url,
    engine: engineOf(backend.kind as Kind),
    scheduler: createScheduler(),
    health: "unknown",
    failedAt: null,
    lastChunkAt: -Infinity,
    stalledAt: -Infinity,
    observed: new Observed(),
    paces: new Map(),
    computing: 0,
    prefixes: createPrefixIndex(),
    guard: new Guard(),
    trials: 0,
    targets: new Map(),
    loaded: new Set(),
    loads: new Map(),
    gpu: null,
    nextGpu: null,
    change: null,
    timer: undefined,
  };
}

/** Does anything run there, or is anything being loaded there or where it shares a GPU? */
export function isAtWork({ scheduler }: Live): boolean {
  return scheduler.backend.used > 0 || scheduler.turns.change !== null;
}

const TIERS: readonly Health[] = ["healthy", "degraded", "unknown"];

/** Of those who are next in their queues the first that could start at once elsewhere; null: none. */
export function betterOff(
  lives: readonly Live[],
  settings: BreakerSettings,
  now: number,
): { live: Live; model: string } | null {
  for (const live of lives) {
    for (const model of live.scheduler.lanes.keys()) {
      const head = nextOf(live.scheduler, model);
      if (head === undefined) continue;
      const guesses = guessesFrom(lives, model);
      if (isBetterOff(lives, live, head, settings, guesses, now)) return { live, model };
    }
  }
  return null;
}

/** Where selection would send it, or it would come straight back. */
function isBetterOff(
  lives: Iterable<Live>,
  live: Live,
  ticket: Ticket,
  settings: BreakerSettings,
  guesses: Guesses,
  now: number,
): boolean {
  let best = TIERS.length;
  let able: Live[] = [];
  for (const other of lives) {
    const tier = TIERS.indexOf(other.health);
    if (tier === -1 || tier > best || !couldServe(other, ticket, settings, now)) continue;
    // To a trial nobody is sent who has a place; where it waits it may be one itself, and is chosen again.
    if (other !== live && other.guard.admits(ticket.model, settings, now) !== "any") continue;
    if (tier < best) able = [];
    best = tier;
    able.push(other);
  }
  const roomy = able.filter(({ id }) => ticket.cramped?.has(id) !== true);
  if (roomy.length > 0) able = roomy;
  const times = able.map((other) => firstTokenOf(other, ticket, guesses, now));
  const latest = asGoodAs(Math.min(...times));
  return able.some((other, at) => {
    return other !== live && (times[at] ?? 0) <= latest && hasRoom(other.scheduler, ticket.model);
  });
}

/** Might one of these backends serve such a request, as far as is known? @param except not this one. */
export function isServed(
  lives: Iterable<Live>,
  request: Pick<Ticket, "model" | "barred">,
  except: Live | null,
  settings: BreakerSettings,
  now: number,
): boolean {
  return [...lives].some((live) => live !== except && couldServe(live, request, settings, now));
}

function couldServe(
  { id, scheduler, health, guard }: Live,
  { model, barred }: Pick<Ticket, "model" | "barred">,
  settings: BreakerSettings,
  now: number,
): boolean {
  return (
    scheduler.available &&
    // Without slots: taken out, and still at work.
    (scheduler.lanes.get(model)?.slots.limit ?? 0) > 0 &&
    health !== "unhealthy" &&
    !barred.has(id) &&
    guard.admits(model, settings, now) !== null &&
    coolsUntil(scheduler, model, now) === null
  );
}

/**
 * Of those who wait for the same model somewhere the one that should give up its place to a newcomer, for
 * whom none is left; null: nobody.
 */
export function loserAmong(
  lives: readonly Live[],
  newcomer: Ticket,
): { live: Live; ticket: Ticket } | null {
  const lanes = lives.flatMap(({ scheduler }) => scheduler.lanes.get(newcomer.model) ?? []);
  // The one lane has been looked at; and where fewer are allowed than before, one that goes makes no room.
  if (lanes.length < 2 || lanes.some(({ places }) => places.used > places.limit)) return null;
  const lines = lanes.map(({ line }) => line);
  const ticket = loserTo(lines, newcomer);
  const live = lives.find(({ scheduler }) => ticket !== null && positionOf(scheduler, ticket) >= 0);
  return ticket === null || live === undefined ? null : { live, ticket };
}

/** A backend's targets, by the public name of their model. */
export function targetsOf(snapshot: Snapshot, backend: string): Map<string, Target> {
  const targets = new Map<string, Target>();
  for (const model of snapshot.models) {
    const target = model.targets.find((each) => each.backend === backend);
    if (target !== undefined) targets.set(model.name, target);
  }
  return targets;
}

/** Models in memory, as the engine told. */
export function loadedIn(targets: ReadonlyMap<string, Target>): Set<string> {
  const loaded = new Set<string>();
  for (const [model, { residency }] of targets) if (residency === "loaded") loaded.add(model);
  return loaded;
}

/**
 * Is what is said of its models' residency to go by? An engine that loads nothing for us has what it
 * has, and of one that does not answer nobody knows: its requests find out.
 */
export function reportsResidency({ engine }: Live, health: Health): boolean {
  return engine.load !== null && health === "healthy";
}

/** In how many milliseconds the first of a model's open targets is tried again; null: none is open. */
export function triedAgainIn(
  lives: ReadonlyMap<string, Live>,
  model: Model,
  now: number,
): number | null {
  const times = model.targets.flatMap(({ backend }) => {
    const at = lives.get(backend)?.guard.untilAt(model.name) ?? null;
    return at === null ? [] : [at - now];
  });
  return times.length === 0 ? null : Math.max(0, Math.min(...times));
}

/** A load that failed lately: why, and in how many milliseconds it is tried again. */
export interface FailedLoad {
  backend: string;
  reason: string;
  retryAfterMs: number;
}

/** Of a model's targets the first that is tried again after a load failed; null: none did lately. */
export function failedLoad(
  lives: ReadonlyMap<string, Live>,
  model: Model,
  now: number,
): FailedLoad | null {
  const failed = model.targets.flatMap(({ backend }) => {
    const live = lives.get(backend);
    const until = live === undefined ? null : coolsUntil(live.scheduler, model.name, now);
    if (live === undefined || until === null) return [];
    const { reason = "" } = live.loads.get(model.name) ?? {};
    return [{ backend, reason, retryAfterMs: until - now }];
  });
  return failed.toSorted((a, b) => a.retryAfterMs - b.retryAfterMs)[0] ?? null;
}

/** How long the last load of a model ran within `from` and now, and since when; null: it did not. */
export function loadSince(
  live: Live | undefined,
  model: string,
  from: number,
  now: number,
): { from: number; to: number } | null {
  const load = live?.loads.get(model);
  if (load === undefined) return null;
  const span = { from: Math.max(from, load.from), to: load.to ?? now };
  return span.to > span.from ? span : null;
}

/** What one backend is doing now. */
export function usageOf({ id, scheduler, observed }: Live) {
  return {
    backend: id,
    slots: Math.min(
      scheduler.backend.limit,
      [...scheduler.lanes.values()].reduce((sum, lane) => sum + lane.slots.limit, 0),
    ),
    running: scheduler.backend.used,
    waiting: scheduler.waiting,
    observed,
    models: [...scheduler.lanes].map(([model, lane]) => ({
      model,
      running: lane.slots.used,
      waiting: lane.line.waiting,
    })),
  };
}

export type Usage = ReturnType<typeof usageOf>;

/** Whose turn it is, where not everything is loaded. */
export interface TurnReport {
  model: string;
  /** Unix milliseconds. */
  sinceAt: number;
  /** So many start before the turn can end. */
  gate: number;
  /** The model that is being loaded, or has been wanted for longest. */
  next: string | null;
}

/** @param now on the clock of the scheduler. */
export function turnReport({ scheduler }: Live, now: number): TurnReport | null {
  const turn = turnIn(scheduler.turns);
  if (turn === null) return null;
  const { since, gate, next } = turn;
  const model = namedIn(turn.model).model;
  const sinceAt = Math.round(Date.now() + since - now);
  return { model, sinceAt, gate, next: next === null ? null : namedIn(next).model };
}

/** What the names of a backend's models begin with in the turns of its GPU. No name has a line break. */
export function prefixOf({ id }: Live): string {
  return `${id}\n`;
}

/** The turns of a GPU, the same for all who share it; without one new ones. Those nobody has go. */
export function turnsOf(
  gpu: string | null,
  gpus: Map<string, Turns>,
  lives: readonly Live[],
): Turns {
  for (const each of gpus.keys()) {
    if (each !== gpu && !lives.some((live) => live.gpu === each)) gpus.delete(each);
  }
  const turns = (gpu === null ? undefined : gpus.get(gpu)) ?? createTurns();
  if (gpu !== null) gpus.set(gpu, turns);
  return turns;
}

/** What it has in memory, by the names in its turns. */
export function namesOfLoaded(live: Live): string[] {
  const prefix = live.gpu === null ? "" : prefixOf(live);
  return [...live.loaded].map((model) => prefix + model);
}

/** Which model of which backend a name in some turns means; null: of the one whose own they are. */
export function namedIn(name: string): { backend: string | null; model: string } {
  const end = name.indexOf("\n");
  return { backend: end === -1 ? null : name.slice(0, end), model: name.slice(end + 1) };
}

/** A breaker as it is shown. */
export interface BreakerReport {
  state: BreakerState;
  failures: number;
  /** Unix milliseconds, null while it is not open. */
  untilAt: number | null;
}

/** @param now on the clock of the breakers. */
export function breakerReport(live: Live | undefined, now: number): BreakerReport {
  if (live === undefined) return { state: "closed", failures: 0, untilAt: null };
  const { state, failures, untilAt } = live.guard.backend;
  const left = untilAt - now;
  return { state, failures, untilAt: state === "open" ? Math.round(Date.now() + left) : null };
}

/** Its breaker, and that of each model there. */
export function breakersOf({ id, guard, scheduler }: Live) {
  return [
    { backend: id, model: null, state: guard.backend.state },
    ...[...scheduler.lanes.keys()].map((model) => {
      return { backend: id, model, state: guard.models.get(model)?.state ?? "closed" };
    }),
  ];
}
