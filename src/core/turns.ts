import { bestRankIn, claimsIn, headOf, rankOf, type Claim, type Line } from "./fairness.ts";
import {
  areApart,
  createFit,
  includes,
  placing,
  seenApart,
  seenTogether,
  type Fit,
  type Placing,
} from "./fit.ts";
import type { Residency } from "./snapshot.ts";

/** Where one model of a backend is, and how its turn stands. Times are milliseconds. */
export interface Stay {
  /** As the engine reported it, or as our own load has left it since. */
  residency: Residency;
  /** When its turn began: since then it is known to be loaded. */
  since: number;
  /** Of those who waited when its load finished, so many are still to start: they do in this turn. */
  gate: number;
  /** Nobody starts there: another model is to have its memory. */
  closing: boolean;
  /** Moving average of what its loads took, the unloading of others included; null until one has. */
  loadMs: number | null;
  /** Loads that failed in a row, and until when none is tried again. */
  failures: number;
  retryAt: number;
  /** Somebody wants it loaded without a request of their own. */
  asked: { at: number; mayEvict: boolean } | null;
  /** Somebody has left who waited for it, the first one since then, the last one at that time. */
  left: { since: number; at: number } | null;
  /** Somebody wants it out, once nothing runs there. */
  unwanted: boolean;
}

/** What the turn queue looks at of the requests for one model. */
export interface Contender {
  readonly stay: Stay;
  readonly line: Line<Claim>;
  readonly slots: { readonly limit: number; readonly used: number };
  readonly shared: readonly { readonly limit: number }[];
  readonly running: ReadonlyMap<unknown, { readonly startedAt: number }>;
  readonly serviceMs: number | null;
}

/** The change of models under way. */
export interface Change {
  /** Null where one is only put out. */
  model: string | null;
  /** They get nothing before it is over. */
  leaving: ReadonlySet<string>;
  /** Of these those that are put out first, so that the engine need not choose. */
  unload: readonly string[];
  /** What was loaded when it began. */
  resident: ReadonlySet<string>;
  startedAt: number;
}

/** Whose turn it is in one backend, or in several that share a GPU. */
export interface Turns {
  /** By model; where several backends share, by backend and model (see `share`). */
  lanes: Map<string, Contender>;
  turnMs: number | "auto";
  /** Something is not loaded, or is to go: until then nothing here matters. */
  active: boolean;
  change: Change | null;
  /** When the next turn can end, Infinity where only events can end one. */
  wakeAt: number;
  fit: Fit;
}

/** Design §4: what a change of turn costs, and twelve times that to work in between. */
const TURN_FACTOR = 12;
const SHORTEST_TURN_MS = 2000;
const LONGEST_TURN_MS = 60_000;
/** Until a load has been measured. */
const UNMEASURED_TURN_MS = 30_000;
/** However short turns are to be: a shorter one would spend more than a fifth of the time loading. */
const LEAST_LOADS = 4;
const LOAD_WEIGHT = 0.3;
const COOL_DOWN_MS = 10_000;
const LONGEST_COOL_DOWN_MS = 80_000;

export function createTurns(): Turns {
  return {
    lanes: new Map(),
    turnMs: "auto",
    active: false,
    change: null,
    wakeAt: Infinity,
    fit: createFit(),
  };
}

export function createStay(loaded: boolean): Stay {
  return {
    residency: loaded ? "loaded" : "cold",
    since: -Infinity,
    gate: 0,
    closing: false,
    loadMs: null,
    failures: 0,
    retryAt: -Infinity,
    asked: null,
    left: null,
    unwanted: false,
  };
}

/**
 * How long a turn lasts at least while somebody waits for another model, milliseconds.
 *
 * @param loadMs what loading the other takes; null: not measured.
 * @param serviceMs mean service and slots of the model whose turn it is: draining it leaves slots idle.
 */
export function turnLength(
  turnMs: number | "auto",
  loadMs: number | null,
  serviceMs: number | null,
  slots: number,
): number {
  const least = LEAST_LOADS * (loadMs ?? 0);
  if (turnMs !== "auto") return Math.max(turnMs, least);
  const idle = slots > 1 ? 1 - 1 / slots : 0;
  if (loadMs === null || (idle > 0 && serviceMs === null)) {
    return Math.max(UNMEASURED_TURN_MS, least);
  }
  const derived = TURN_FACTOR * (loadMs + (serviceMs ?? 0) * idle);
  return Math.max(Math.min(Math.max(derived, SHORTEST_TURN_MS), LONGEST_TURN_MS), least);
}

/** What a load of this model is expected to take; null before any was measured in this backend. */
export function loadOf({ stay }: Contender, lanes: Iterable<Contender>): number | null {
  if (stay.loadMs !== null) return stay.loadMs;
  const known = [...lanes].flatMap((lane) => lane.stay.loadMs ?? []);
  return known.length === 0 ? null : known.reduce((sum, each) => sum + each, 0) / known.length;
}

/** Requests for it are refused until then. */
export function isCooling({ stay }: Contender, now: number): boolean {
  return stay.residency !== "loaded" && stay.retryAt > now;
}

/** Models in memory. */
export function residents({ lanes }: Turns): Set<string> {
  const names = new Set<string>();
  for (const [name, { stay }] of lanes) if (stay.residency === "loaded") names.add(name);
  return names;
}

function workOf(lane: Contender | undefined): number {
  return lane === undefined ? 0 : lane.line.waiting + lane.slots.used;
}

/** Since when somebody has wanted this model, which is not loaded; null: nobody does. */
export function wantedSince({ stay, line }: Contender): number | null {
  if (line.waiting === 0) return stay.asked?.at ?? null;
  let oldest = Math.min(stay.asked?.at ?? Infinity, stay.left?.since ?? Infinity);
  for (const { arrivedAt } of claimsIn(line)) oldest = Math.min(oldest, arrivedAt);
  return oldest;
}

/**
 * Who must leave for this model.
 *
 * @param comes of these lanes the one for which one more is about to wait.
 */
export function placingFor(
  turns: Turns,
  model: string,
  resident: ReadonlySet<string> = residents(turns),
  comes?: Contender,
): Placing {
  return placing(turns.fit, resident, model, (each) => {
    const lane = turns.lanes.get(each);
    return workOf(lane) + (lane !== undefined && lane === comes ? 1 : 0);
  });
}

/** A model that could be loaded next. */
interface Next extends Placing {
  model: string;
  since: number;
  /** When each of those that must leave has had its turn. */
  over: Map<string, number>;
  /** When all of them have. */
  readyAt: number;
}

function nextOf(
  turns: Turns,
  resident: ReadonlySet<string>,
  model: string,
  now: number,
): Next | null {
  const { lanes } = turns;
  const lane = lanes.get(model) as Contender;
  const since = wantedSince(lane);
  if (lane.stay.residency !== "cold" || since === null || lane.stay.retryAt > now) return null;
  const place = placingFor(turns, model, resident);
  const over = new Map<string, number>();
  let readyAt = -Infinity;
  for (const name of place.leaving) {
    const other = lanes.get(name) as Contender;
    const end = turnEnd(turns, lane, since, other, place.known);
    over.set(name, end);
    // With nobody waiting it ends by itself.
    if (other.line.waiting > 0) readyAt = Math.max(readyAt, end);
  }
  const isCourtesy = lane.line.waiting === 0 && lane.stay.asked?.mayEvict === false;
  if (isCourtesy && !fitsIdly(turns, place)) readyAt = Infinity;
  return { ...place, model, since, over, readyAt };
}

/** What nobody waits for is loaded where nobody leaves for it, or where nobody has tried and all is idle. */
function fitsIdly({ lanes }: Turns, { leaving, known }: Placing): boolean {
  if (known) return leaving.length === 0;
  return leaving.every((each) => workOf(lanes.get(each)) === 0);
}

/** When one model has had its turn and another may take its memory, behind the gate. */
function turnEnd(
  turns: Turns,
  wanted: Contender,
  since: number,
  resident: Contender,
  known: boolean,
): number {
  return resident.stay.gate > 0 ? Infinity : turnOver(turns, wanted, since, resident, known);
}

/**
 * The same without the gate, for another model that has been wanted `since` then: the turn and the wish
 * have to be old enough both. A turn that serves everybody who waited at its beginning before it can
 * end is what keeps the work going; the turn's length is what keeps changes rare; the wish's age is what
 * keeps waiting bounded.
 *
 * @param rank the class of somebody who wants it, too, and is not in its line yet.
 * @param own the same of somebody who wants the one that is loaded.
 */
export function turnOver(
  turns: Turns,
  wanted: Contender,
  since: number,
  { stay, line, slots, serviceMs }: Contender,
  known: boolean,
  rank = Infinity,
  own = Infinity,
): number {
  // Where two have never been tried together it is worth one early change to find out.
  if (!known) return -Infinity;
  const loadMs = loadOf(wanted, turns.lanes.values());
  let length = turnLength(turns.turnMs, loadMs, serviceMs, slots.limit);
  const head = headOf(wanted.line);
  const best = Math.min(rank, head === undefined ? Infinity : rankOf(head));
  const isLower = best < Math.min(own, bestRankIn(line));
  if (isLower && loadMs !== null) length = Math.min(length, LEAST_LOADS * loadMs);
  return Math.max(since, stay.since) + length;
}

/**
 * Says whose turn ends: sets `closing` of every lane and `wakeAt`, by what is true now.
 *
 * @returns the change to begin, once `isDrained`; null: none is due.
 */
export function planTurn(turns: Turns, now: number): Change | null {
  const { lanes } = turns;
  turns.wakeAt = Infinity;
  for (const [name, { stay }] of lanes) {
    stay.closing = stay.unwanted || turns.change?.leaving.has(name) === true;
  }
  if (turns.change !== null) return null;
  const resident = residents(turns);
  for (const name of resident) {
    const lane = lanes.get(name) as Contender;
    if (lane.stay.unwanted && lane.slots.used === 0) {
      const gone = new Set([name]);
      return { model: null, leaving: gone, unload: [name], resident, startedAt: now };
    }
  }
  let next: Next | null = null;
  for (const name of lanes.keys()) {
    const wish = nextOf(turns, resident, name, now);
    if (wish === null) continue;
    if (wish.readyAt > now) turns.wakeAt = Math.min(turns.wakeAt, wish.readyAt);
    else if (next === null || wish.since < next.since) next = wish;
  }
  if (next === null) return null;
  const { model, known, over } = next;
  for (const [name, end] of over) {
    if (end <= now) (lanes.get(name) as Contender).stay.closing = true;
  }
  // Where nothing is known the engine shows what fits. Else it must not choose who stays, and what was
  // loaded on request some engines (LM Studio) never put out by themselves.
  const unload = known ? next.leaving : [];
  return { model, leaving: new Set(next.leaving), unload, resident, startedAt: now };
}

/** Nothing runs on what must leave: the engine never has to stop or wait for anything of ours. */
export function isDrained({ leaving }: Change, { lanes }: Turns): boolean {
  return [...leaving].every((name) => (lanes.get(name)?.slots.used ?? 0) === 0);
}

/** Begins a change that `planTurn` has named. */
export function beginChange(turns: Turns, change: Change): void {
  turns.change = change;
  const lane = change.model === null ? undefined : turns.lanes.get(change.model);
  if (lane !== undefined) lane.stay.residency = "loading";
}

/**
 * Takes what a look at the engine has shown. While a change is under way that is the past.
 * What has come or gone without us starts a new turn.
 *
 * @param lanes those that it has shown, by the names that are in `loaded`.
 */
export function reportResidency(
  turns: Turns,
  loaded: ReadonlySet<string>,
  now: number,
  lanes: ReadonlyMap<string, Contender> = turns.lanes,
): void {
  if (turns.change !== null) return;
  for (const [name, { stay, line, slots }] of lanes) {
    // Out of the configuration: nobody reports it any more, and it still runs.
    if (slots.limit === 0) continue;
    if (!loaded.has(name)) {
      stay.residency = "cold";
      stay.gate = 0;
      stay.unwanted = false;
    } else if (stay.residency !== "loaded") {
      Object.assign(stay, { residency: "loaded", since: now, gate: line.waiting });
      // Whoever loaded it: it can be loaded, and whoever waits when it goes is not to wait for a cool-down.
      Object.assign(stay, { failures: 0, asked: null, left: null, retryAt: -Infinity });
    }
  }
  seenTogether(turns.fit, residents(turns));
  refresh(turns);
}

/** Is there anything to decide? Where everything is loaded there is not. */
export function refresh(turns: Turns): void {
  turns.active = turns.change !== null;
  for (const { stay } of turns.lanes.values()) {
    if (stay.residency !== "loaded" || stay.unwanted) turns.active = true;
    else stay.closing = false;
  }
}

/** What would be loaded at once if the engine put out nobody by itself. */
function triedIn({ model, resident, unload }: Change): Set<string> {
  const tried = new Set(resident);
  for (const each of unload) tried.delete(each);
  if (model !== null) tried.add(model);
  return tried;
}

function endChange(turns: Turns, { unload }: Change) {
  turns.change = null;
  // What an engine has kept all the same is not put out again without end.
  for (const each of unload) {
    const stay = turns.lanes.get(each)?.stay;
    if (stay !== undefined) stay.unwanted = false;
  }
}

/**
 * A change is over: its model is loaded.
 *
 * @param loadMs what it took; null where that tells nothing, and nothing is learned from it.
 * @param loaded what a look at the engine has shown since; null when that failed.
 */
export function finishChange(
  turns: Turns,
  loadMs: number | null,
  loaded: ReadonlySet<string> | null,
  now: number,
): void {
  const { change } = turns;
  if (change === null) return;
  const { model, leaving, resident } = change;
  endChange(turns, change);
  const lane = model === null ? undefined : turns.lanes.get(model);
  const there = new Set(loaded ?? [...resident].filter((each) => !leaving.has(each)));
  if (lane !== undefined && model !== null) {
    there.add(model);
    const { stay } = lane;
    if (loadMs !== null) {
      stay.loadMs =
        stay.loadMs === null ? loadMs : stay.loadMs + LOAD_WEIGHT * (loadMs - stay.loadMs);
      const tried = triedIn(change);
      if (loaded !== null && !includes(there, tried)) seenApart(turns.fit, tried, now);
    }
  }
  reportResidency(turns, there, now);
}

/**
 * A change is over and has failed: its model is left alone for a while, longer each time. Where it was
 * tried beside others for the first time there may just have been no room: then the next try is at
 * once, with the others out.
 *
 * @returns for how long it is left alone, milliseconds; null: not at all.
 */
export function failChange(
  turns: Turns,
  loaded: ReadonlySet<string> | null,
  now: number,
): number | null {
  const { change } = turns;
  if (change === null) return null;
  endChange(turns, change);
  const there = new Set(loaded ?? [...change.resident].filter((each) => !change.leaving.has(each)));
  const lane = change.model === null ? undefined : turns.lanes.get(change.model);
  let coolDown: number | null = null;
  if (lane !== undefined && change.model !== null) {
    const { stay } = lane;
    stay.residency = "cold";
    there.delete(change.model);
    const tried = triedIn(change);
    const isNews = tried.size > 1 && !areApart(turns.fit, tried);
    if (isNews) {
      seenApart(turns.fit, tried, now);
    } else {
      coolDown = Math.min(COOL_DOWN_MS * 2 ** stay.failures, LONGEST_COOL_DOWN_MS);
      stay.failures++;
      stay.retryAt = now + coolDown;
      stay.asked = null;
    }
  }
  reportResidency(turns, there, now);
  return coolDown;
}

/**
 * Somebody who wanted a model that is not loaded is told to come back: the wish stays until it is. Else
 * nobody would ever have it loaded whose patience is shorter than a load, or than the turn of another.
 */
export function keepWish(turns: Turns, { stay }: Contender, since: number): void {
  if (stay.residency !== "cold") return;
  stay.asked = { at: Math.min(since, stay.asked?.at ?? Infinity), mayEvict: true };
  refresh(turns);
}

/**
 * Somebody has left who waited for a model that is not loaded. For that nobody loads it; but who comes soon
 * after, mostly the same one again, need not wait for a whole turn from then on.
 */
export function noteLeaving({ stay }: Contender, since: number, now: number): void {
  if (stay.residency !== "cold") return;
  stay.left = { since: Math.min(since, stay.left?.since ?? Infinity), at: now };
}

/** Somebody is about to wait for a model. */
export function noteComing({ stay, line }: Contender, now: number): void {
  if (stay.left === null || line.waiting > 0 || now - stay.left.at <= LONGEST_TURN_MS) return;
  stay.left = null;
}

/** Somebody who waited has gone, started or not: the gate is never more than who waits. */
export function narrowGate({ stay, line }: Contender): void {
  stay.gate = Math.min(stay.gate, line.waiting);
}

/** The model whose turn it is, the last that was loaded, and what is shown of it. */
export function turnIn({
  lanes,
  active,
  change,
}: Turns): { model: string; since: number; gate: number; next: string | null } | null {
  let model: string | null = null;
  let since = -Infinity;
  for (const [name, { stay }] of lanes) {
    if (stay.residency === "loaded" && stay.since > since) [model, since] = [name, stay.since];
  }
  if (!active || model === null) return null;
  let next = change?.model ?? null;
  let oldest = Infinity;
  for (const [name, lane] of change === null ? lanes : []) {
    const wanted = lane.stay.residency === "loaded" ? null : wantedSince(lane);
    if (wanted !== null && wanted < oldest) [next, oldest] = [name, wanted];
  }
  return { model, since, gate: lanes.get(model)?.stay.gate ?? 0, next };
}
