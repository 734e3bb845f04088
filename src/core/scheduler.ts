import { NO_GUESS, promise, startIn } from "./eta.ts";
import {
  charge,
  choose,
  claimsIn,
  createLine,
  end,
  join,
  leave,
  loserTo,
  start,
} from "./fairness.ts";
import {
  mayStart,
  nextOf,
  type Cap,
  type Lane,
  type SchedulerState,
  type Ticket,
} from "./lanes.ts";
import {
  beginChange,
  createStay,
  failChange,
  finishChange,
  isCooling,
  isDrained,
  keepWish,
  narrowGate,
  noteComing,
  noteLeaving,
  planTurn,
  refresh,
  reportResidency,
  type Turns,
} from "./turns.ts";

export interface LanePlan {
  model: string;
  slots: number;
  shared: readonly Cap[];
  places: Cap;
  /** Whether a model that comes new is in memory; absent: it is. */
  loaded?: boolean;
}

export type SchedulerEvent =
  | { type: "arrive"; ticket: Ticket }
  /** A waiting request's client left. */
  | { type: "cancel"; ticket: Ticket }
  /**
   * A request that had been granted ended, however. `serviceMs` is null where it tells nothing of how
   * long answers take, `tokens` where it does not tell how many it was (0: the grant was given back
   * unused); `heldUntil` is set where the engine was too busy for it.
   */
  | {
      type: "complete";
      ticket: Ticket;
      serviceMs: number | null;
      tokens: number | null;
      heldUntil: number | null;
    }
  /** So many tokens of its prompt and answer have flowed by now. */
  | { type: "chunk"; ticket: Ticket; tokens: number }
  | { type: "configure"; available: boolean; concurrency: number; lanes: readonly LanePlan[] }
  /** `queue.turnMs` from now on. */
  | { type: "turns"; turnMs: number | "auto" }
  /** These are its turns from now on, in which the names of its models begin with `prefix`. */
  | { type: "share"; turns: Turns; prefix: string }
  /** What the engine has in memory. Without such an event everything counts as loaded. */
  | { type: "residency"; loaded: ReadonlySet<string> }
  /**
   * The change that a `load` effect began is done. `loaded` is what is in memory since, null where
   * nobody could look; `loadMs` is null where it tells nothing of how long a load takes.
   */
  | { type: "loaded"; loadMs: number | null; loaded: ReadonlySet<string> | null }
  | { type: "loadFailed"; loaded: ReadonlySet<string> | null }
  /** Somebody wants a model in memory without a request; others leave for it only if they may. */
  | { type: "warm"; model: string; mayEvict: boolean }
  /** Somebody wants a model out of memory, as soon as nothing runs there. */
  | { type: "unload"; model: string }
  /** Somebody who waits gives its place to one who comes to another backend with the same model. */
  | { type: "yield"; ticket: Ticket }
  /** What a request was promised counts no more, but for this model: it comes back for nothing else. */
  | { type: "forgive"; id: string; except: string | null }
  /** A shared cap has room again. */
  | { type: "room" }
  /** Another backend could start a request of this model at once. */
  | { type: "elsewhere"; model: string }
  /** This backend, or one model there, is of no use now: whoever waits had better choose again. */
  | { type: "recall"; model?: string }
  | { type: "timer" };

export type SchedulerEffect =
  | { type: "grant"; ticket: Ticket }
  /**
   * The queue is full; or it would start too late, in so many milliseconds; or the model could not be
   * loaded and is left alone for so long.
   */
  | { type: "refuse"; ticket: Ticket; cause: RefusalCause; retryAfterMs: number }
  /** Waited as long as it may. */
  | { type: "expire"; ticket: Ticket; retryAfterMs: number }
  /** Choose again: it cannot or need not be served here. */
  | { type: "reselect"; ticket: Ticket }
  /**
   * Put these models out of memory, then load that one (null: none), with nothing else under way,
   * whoever comes or leaves meanwhile; then send `loaded` or `loadFailed`. Where backends share their
   * turns the names are those in there, with the backends' prefixes, and the backend that is told is
   * the one of the model.
   */
  | { type: "load"; model: string | null; unload: readonly string[] }
  /** Send a `timer` event then. Replaces an earlier one. */
  | { type: "timer"; at: number };

export type RefusalCause = "full" | "late" | "load_failed";

/** How long answers take is the mean of the first twenty, then a moving average of about as many. */
const SERVICE_WEIGHT = 0.05;

/**
 * Decides what one event means for the requests of one backend: a bounded queue per model, in fair
 * order (see `choose`), in front of slots per model and per backend. No slot of a loaded model stays
 * free that somebody who waits could use, except where its turn has ended (see `planTurn`).
 *
 * Deterministic: `now` is an argument, and `state` is changed in place and read by nobody in between.
 */
export function step(state: SchedulerState, event: SchedulerEvent, now: number): SchedulerEffect[] {
  const effects: SchedulerEffect[] = [];
  switch (event.type) {
    case "arrive":
      arrive(state, event.ticket, now, effects);
      break;
    case "cancel":
      cancel(state, event.ticket, now, effects);
      break;
    case "chunk":
      chargeMore(state, event.ticket, event.tokens);
      break;
    case "complete":
      complete(state, event);
      state.heldUntil = event.heldUntil;
      if (event.heldUntil !== null) arm(state, effects);
      serve(state, now, effects);
      break;
    case "configure":
      configure(state, event, effects);
      // A backend that was taken out and comes back has lost its timer.
      if (state.heldUntil !== null) arm(state, effects);
      serve(state, now, effects);
      break;
    case "turns":
      state.turns.turnMs = event.turnMs;
      serve(state, now, effects);
      break;
    case "share":
      share(state, event);
      serve(state, now, effects);
      break;
    case "yield":
      if (take(state, event.ticket)) refuse(state, event.ticket, "full", now, effects);
      break;
    case "forgive":
      for (const [model, { promises }] of state.lanes) {
        if (model !== event.except) promises.delete(event.id);
      }
      break;
    case "room":
      serve(state, now, effects);
      break;
    case "residency":
      reportResidency(state.turns, event.loaded, now, state.lanes);
      serve(state, now, effects);
      break;
    case "loaded":
      finishChange(state.turns, event.loadMs, event.loaded, now);
      serve(state, now, effects);
      break;
    case "loadFailed":
      loadFailed(state, event.loaded, now, effects);
      serve(state, now, effects);
      break;
    case "warm":
    case "unload":
      wish(state, event, now);
      serve(state, now, effects);
      break;
    case "elsewhere": {
      const head = nextOf(state, event.model);
      if (head !== undefined) reselect(state, head, effects);
      break;
    }
    case "recall":
      for (const [model, lane] of state.lanes) {
        if (event.model === undefined || event.model === model) recall(state, lane, effects);
      }
      break;
    case "timer":
      if (state.heldUntil !== null && state.heldUntil <= now) state.heldUntil = null;
      expire(state, now, effects);
      serve(state, now, effects);
      break;
  }
  return effects;
}

function grant(
  state: SchedulerState,
  lane: Lane,
  ticket: Ticket,
  now: number,
  effects: SchedulerEffect[],
) {
  lane.slots.used++;
  state.backend.used++;
  for (const cap of lane.shared) cap.used++;
  if (lane.stay.gate > 0) lane.stay.gate--;
  start(lane.line, ticket);
  lane.running.set(ticket, { startedAt: now, tokens: ticket.tokens });
  effects.push({ type: "grant", ticket });
}

/** An answer that becomes longer than expected is charged as it flows, so that it pays in time. */
function chargeMore(state: SchedulerState, ticket: Ticket, tokens: number) {
  const lane = state.lanes.get(ticket.model);
  const running = lane?.running.get(ticket);
  if (lane === undefined || running === undefined || tokens <= running.tokens) return;
  charge(lane.line, ticket, tokens - running.tokens);
  running.tokens = tokens;
}

function arrive(state: SchedulerState, ticket: Ticket, now: number, effects: SchedulerEffect[]) {
  const lane = state.lanes.get(ticket.model);
  // A lane that is gone keeps its counters until its last request has ended, and grants nothing.
  if (lane === undefined || lane.slots.limit === 0 || !state.available) {
    effects.push({ type: "reselect", ticket });
  } else if (lane.line.waiting === 0 && mayStart(state, lane)) {
    grant(state, lane, ticket, now, effects);
  } else if (isCooling(lane, now)) {
    const retryAfterMs = lane.stay.retryAt - now;
    effects.push({ type: "refuse", ticket, cause: "load_failed", retryAfterMs });
  } else if (ticket.deadlineAt <= now) {
    effects.push({ type: "expire", ticket, retryAfterMs: promise(state, ticket, now) });
    keepWish(state.turns, lane, ticket.arrivedAt);
    serve(state, now, effects);
  } else if (now + startIn(state, ticket, now, NO_GUESS) > ticket.deadlineAt) {
    refuse(state, ticket, "late", now, effects);
    keepWish(state.turns, lane, ticket.arrivedAt);
    serve(state, now, effects);
  } else if (lane.places.used < lane.places.limit || makeRoom(state, lane, ticket, now, effects)) {
    lane.promises.delete(ticket.id);
    noteComing(lane, now);
    join(lane.line, ticket);
    lane.places.used++;
    state.waiting++;
    arm(state, effects);
    if (state.turns.active) serve(state, now, effects);
  } else {
    refuse(state, ticket, "full", now, effects);
  }
}

function refuse(
  state: SchedulerState,
  ticket: Ticket,
  cause: "full" | "late",
  now: number,
  effects: SchedulerEffect[],
) {
  effects.push({ type: "refuse", ticket, cause, retryAfterMs: promise(state, ticket, now) });
}

/** Refuses somebody who waits, where the newcomer has the better claim to a place. */
function makeRoom(
  state: SchedulerState,
  lane: Lane,
  newcomer: Ticket,
  now: number,
  effects: SchedulerEffect[],
): boolean {
  const ticket = loserTo([lane.line], newcomer);
  if (ticket === null || !take(state, ticket)) return false;
  refuse(state, ticket, "full", now, effects);
  return true;
}

/** Removes a waiting ticket; false when it does not wait here. */
function take(state: SchedulerState, ticket: Ticket): boolean {
  const lane = state.lanes.get(ticket.model);
  if (lane === undefined || !leave(lane.line, ticket)) return false;
  lane.places.used--;
  state.waiting--;
  narrowGate(lane);
  return true;
}

function reselect(state: SchedulerState, ticket: Ticket, effects: SchedulerEffect[]) {
  if (take(state, ticket)) effects.push({ type: "reselect", ticket });
}

function recall(state: SchedulerState, lane: Lane, effects: SchedulerEffect[]) {
  for (const ticket of oldestFirst(lane)) reselect(state, ticket, effects);
}

function cancel(state: SchedulerState, ticket: Ticket, now: number, effects: SchedulerEffect[]) {
  const lane = state.lanes.get(ticket.model);
  if (lane === undefined || !take(state, ticket) || !state.turns.active) return;
  noteLeaving(lane, ticket.arrivedAt, now);
  // The gate may have waited for this one, and nothing else but the next model for the gate.
  serve(state, now, effects);
}

function oldestFirst(lane: Lane): Ticket[] {
  return [...claimsIn(lane.line)].toSorted((a, b) => a.arrivedAt - b.arrivedAt);
}

function complete(
  state: SchedulerState,
  { ticket, serviceMs, tokens }: Extract<SchedulerEvent, { type: "complete" }>,
) {
  const lane = state.lanes.get(ticket.model);
  state.backend.used--;
  if (lane === undefined) return;
  lane.slots.used--;
  for (const cap of lane.shared) cap.used--;
  const charged = lane.running.get(ticket)?.tokens ?? ticket.tokens;
  lane.running.delete(ticket);
  end(lane.line, ticket, (tokens ?? charged) - charged);
  if (serviceMs === null) return;
  lane.services++;
  const before = lane.serviceMs ?? 0;
  const weight = Math.max(1 / lane.services, SERVICE_WEIGHT);
  lane.serviceMs = before + weight * (serviceMs - before);
}

/** Ends turns that are over, grants to whoever is next, and begins the load that is due. */
function serve(state: SchedulerState, now: number, effects: SchedulerEffect[]) {
  const { turns } = state;
  const wokeAt = turns.wakeAt;
  turns.wakeAt = Infinity;
  if (!turns.active || !state.available) return dispatch(state, now, effects);
  let due;
  let waited;
  do {
    waited = state.waiting;
    due = planTurn(turns, now);
    if (due !== null && isDrained(due, turns)) {
      beginChange(turns, due);
      effects.push({ type: "load", model: due.model, unload: due.unload });
      planTurn(turns, now);
    }
    dispatch(state, now, effects);
    // Whoever has started may have been the last of a gate.
  } while (state.waiting < waited);
  if (turns.wakeAt !== wokeAt) arm(state, effects);
}

/** A load has failed: that concerns those who wait for this model, and nobody else. */
function loadFailed(
  state: SchedulerState,
  loaded: ReadonlySet<string> | null,
  now: number,
  effects: SchedulerEffect[],
) {
  const model = state.turns.change?.model ?? null;
  const retryAfterMs = failChange(state.turns, loaded, now);
  const lane = model === null ? undefined : state.lanes.get(model.slice(state.prefix.length));
  if (lane === undefined || retryAfterMs === null) return;
  for (const ticket of oldestFirst(lane)) {
    take(state, ticket);
    effects.push({ type: "refuse", ticket, cause: "load_failed", retryAfterMs });
  }
}

function wish(
  state: SchedulerState,
  event: Extract<SchedulerEvent, { type: "warm" | "unload" }>,
  now: number,
) {
  const stay = state.lanes.get(event.model)?.stay;
  if (stay === undefined) return;
  if (event.type === "unload") stay.unwanted = stay.residency === "loaded";
  else if (stay.residency !== "loaded") stay.asked = { at: now, mayEvict: event.mayEvict };
  refresh(state.turns);
}

/** Grants to whoever is next, until nobody can start. */
function dispatch(state: SchedulerState, now: number, effects: SchedulerEffect[]) {
  while (state.waiting > 0) {
    const open = [...state.lanes.values()].filter((lane) => mayStart(state, lane));
    const lines = open.map(({ line }) => line);
    const next = choose(lines, state.passed, now);
    if (next === null) return;
    const ticket = next.claim;
    state.passed = next.aged ? 0 : state.passed + 1;
    grant(state, state.lanes.get(ticket.model) as Lane, ticket, now, effects);
    take(state, ticket);
  }
}

function configure(
  state: SchedulerState,
  plan: Extract<SchedulerEvent, { type: "configure" }>,
  effects: SchedulerEffect[],
) {
  state.available = plan.available;
  state.backend.limit = plan.concurrency;
  const planned = new Set<string>();
  for (const { model, slots, shared, places, loaded = true } of plan.lanes) {
    planned.add(model);
    const lane = state.lanes.get(model);
    if (lane === undefined) {
      const fresh = { limit: slots, used: 0 };
      const line = createLine<Ticket>();
      const stay = createStay(loaded);
      const empty = { line, running: new Map(), promises: new Map(), serviceMs: null, services: 0 };
      const lane = { slots: fresh, shared, places, stay, ...empty };
      state.lanes.set(model, lane);
      state.turns.lanes.set(state.prefix + model, lane);
    } else {
      lane.slots.limit = slots;
      // One that nothing ran in may have outlived what it shared.
      if (lane.slots.used + lane.line.waiting === 0) Object.assign(lane, { shared, places });
    }
  }
  for (const [model, lane] of state.lanes) {
    const gone = !planned.has(model);
    if (gone) lane.slots.limit = 0;
    if (gone || !plan.available) recall(state, lane, effects);
    // A lane with running requests stays, or their completion would find no counters to lower.
    if (!gone || lane.slots.used > 0) continue;
    state.lanes.delete(model);
    withdraw(state, model, lane);
  }
  refresh(state.turns);
}

/** Out of the turns, where another backend may have come under the same name meanwhile. */
function withdraw({ turns, prefix }: SchedulerState, model: string, lane: Lane) {
  const name = prefix + model;
  if (turns.lanes.get(name) === lane) turns.lanes.delete(name);
}

function share(
  state: SchedulerState,
  { turns, prefix }: Extract<SchedulerEvent, { type: "share" }>,
) {
  for (const [model, lane] of state.lanes) withdraw(state, model, lane);
  refresh(state.turns);
  Object.assign(state, { turns, prefix });
  for (const [model, lane] of state.lanes) turns.lanes.set(prefix + model, lane);
  refresh(turns);
}

function expire(state: SchedulerState, now: number, effects: SchedulerEffect[]) {
  for (const lane of state.lanes.values()) {
    for (const ticket of [...claimsIn(lane.line)].filter((each) => each.deadlineAt <= now)) {
      take(state, ticket);
      keepWish(state.turns, lane, ticket.arrivedAt);
      effects.push({ type: "expire", ticket, retryAfterMs: promise(state, ticket, now) });
    }
  }
  arm(state, effects);
}

function arm(state: SchedulerState, effects: SchedulerEffect[]) {
  let at = Math.min(state.heldUntil ?? Infinity, state.turns.wakeAt);
  for (const lane of state.lanes.values()) {
    for (const { deadlineAt } of claimsIn(lane.line)) at = Math.min(at, deadlineAt);
  }
  if (at < Infinity) effects.push({ type: "timer", at });
}
