import { aheadOf, claimsIn, rankOf } from "./fairness.ts";
import { freeIn, mayStart, slotsOf, type Lane, type SchedulerState, type Ticket } from "./lanes.ts";
import { loadOf, placingFor, turnOver, wantedSince, type Contender } from "./turns.ts";

/** What is taken for what nobody has measured yet, milliseconds. */
export interface Guess {
  serviceMs: number;
  loadMs: number;
  /** How long a busy engine is left alone at most: less, where somebody ends before. */
  heldMs: number;
}

/** For ranking and for promises, which need a number. */
export const FIRST_GUESS: Guess = { serviceMs: 10_000, loadMs: 10_000, heldMs: Infinity };
/** For refusals: what is not known is no reason for one. */
export const NO_GUESS: Guess = { serviceMs: 0, loadMs: 0, heldMs: 0 };

/** A request that runs for longer than usual still has this share of a usual one to go. */
const LEAST_LEFT = 0.25;
/** In one queue. */
const MOST_PROMISES = 512;

/**
 * When a request would start here if nobody else came: what is left of the turn of the models that have
 * to leave for its own, the loads that come before, its own load, and the wait for a slot.
 *
 * @returns milliseconds from now; 0: at once.
 */
export function startIn(
  state: SchedulerState,
  ticket: Ticket,
  now: number,
  guess: Guess = FIRST_GUESS,
): number {
  const lane = state.lanes.get(ticket.model);
  if (lane === undefined || (lane.line.waiting === 0 && mayStart(state, lane))) return 0;
  return startBehind(state, lane, ticket, aheadOf(lane.line, ticket), now, guess);
}

/**
 * In how many milliseconds a request like this one would be served in time, at least 1. It is a promise:
 * until then it counts as one that waits, so that the next one is told a later time.
 */
export function promise(state: SchedulerState, ticket: Ticket, now: number): number {
  const lane = state.lanes.get(ticket.model);
  if (lane === undefined) return 1;
  lane.promises = lane.promises.filter((at) => at > now);
  const { places, promises } = lane;
  const behind = (ahead: number) => startBehind(state, lane, ticket, ahead, now, FIRST_GUESS);
  const startMs = behind(aheadOf(lane.line, ticket) + promises.length);
  const patienceMs = ticket.deadlineAt - ticket.arrivedAt;
  // A place comes free whenever somebody who waits starts.
  const missing = places.used + promises.length + 1 - places.limit;
  const placeMs = missing > 0 ? behind(missing - 1) : 0;
  const waitMs = Math.max(1, startMs - patienceMs, placeMs);
  // A flood of requests that do not heed what they are told puts off the others no further than this.
  if (promises.length < MOST_PROMISES) promises.push(now + waitMs);
  return waitMs;
}

/** When a request starts that so many others start before. */
function startBehind(
  state: SchedulerState,
  lane: Lane,
  ticket: Ticket,
  ahead: number,
  now: number,
  guess: Guess,
): number {
  const heldMs = Math.min(guess.heldMs, Math.max(0, (state.heldUntil ?? now) - now));
  if (lane.stay.residency === "loaded" && !lane.stay.closing) {
    return Math.max(heldMs, slotIn(state, lane, ticket, ahead, now, guess));
  }
  const readyMs = Math.max(heldMs, readyIn(state, lane, ticket, now, guess));
  // All slots are free then.
  return readyMs + Math.floor(ahead / slotsOf(state, lane)) * serviceOf(lane, guess);
}

function serviceOf(lane: Contender, guess: Guess): number {
  return lane.serviceMs ?? guess.serviceMs;
}

/** How long what runs on these lanes still takes, the first to end first. */
function endings(lanes: Iterable<Contender>, now: number, guess: Guess): number[] {
  const left: number[] = [];
  for (const lane of lanes) {
    const serviceMs = serviceOf(lane, guess);
    for (const { startedAt } of lane.running.values()) {
      left.push(Math.max(serviceMs - (now - startedAt), serviceMs * LEAST_LEFT));
    }
  }
  return left.toSorted((one, other) => one - other);
}

/** When so many of those who wait, and then this one, have got a slot of a loaded model. */
function slotIn(
  state: SchedulerState,
  lane: Lane,
  ticket: Ticket,
  ahead: number,
  now: number,
  guess: Guess,
): number {
  const free = freeIn(state, lane);
  const isBackendFull =
    state.backend.limit - state.backend.used < lane.slots.limit - lane.slots.used;
  const rivals = isBackendFull ? rivalsOf(state, lane, ticket) : 0;
  const needed = ahead + rivals + 1 - free;
  if (needed <= 0) return 0;
  const left = endings(isBackendFull ? state.lanes.values() : [lane], now, guess);
  const serviceMs = serviceOf(lane, guess);
  // What it lacks is in use by another backend.
  if (left.length === 0) return (needed * serviceMs) / slotsOf(state, lane);
  const at = (needed - 1) % left.length;
  return (left[at] as number) + Math.floor((needed - 1) / left.length) * serviceMs;
}

/** Of those who wait for other models of the same backend, who comes first. */
function rivalsOf(state: SchedulerState, own: Lane, ticket: Ticket): number {
  let rivals = 0;
  for (const lane of state.lanes.values()) {
    if (lane === own || lane.stay.residency !== "loaded" || lane.stay.closing) continue;
    for (const other of claimsIn(lane.line)) {
      const ranks = rankOf(other) - rankOf(ticket);
      if (ranks < 0 || (ranks === 0 && other.arrivedAt < ticket.arrivedAt)) rivals++;
    }
  }
  return rivals;
}

/** How long those who wait for this model take, all slots being theirs. */
function workOf(state: SchedulerState, lane: Contender, waiting: number, guess: Guess): number {
  return Math.ceil(waiting / slotsOf(state, lane)) * serviceOf(lane, guess);
}

/** When a model that is not served now will be. */
function readyIn(
  state: SchedulerState,
  lane: Lane,
  ticket: Ticket,
  now: number,
  guess: Guess,
): number {
  const { turns } = state;
  const { change, lanes } = turns;
  const loadMsOf = (each: Contender) => loadOf(each, lanes.values()) ?? guess.loadMs;
  let at = 0;
  const coming = change?.model == null ? undefined : lanes.get(change.model);
  if (change !== null && coming !== undefined) {
    at = Math.max(0, loadMsOf(coming) - (now - change.startedAt));
    if (coming === lane) return at;
    at += workOf(state, coming, coming.line.waiting, guess);
  }
  const since = Math.min(wantedSince(lane) ?? ticket.arrivedAt, ticket.arrivedAt);
  for (const other of lanes.values()) {
    if (other === lane || other.stay.residency !== "cold") continue;
    const wanted = wantedSince(other);
    if (wanted === null || wanted >= since || other.stay.retryAt > now) continue;
    at += loadMsOf(other) + workOf(state, other, other.line.waiting, guess);
  }
  let leaveMs = 0;
  const { leaving, known } = placingFor(turns, state.prefix + ticket.model);
  for (const name of leaving) {
    const resident = lanes.get(name) as Contender;
    const over = turnOver(turns, lane, since, resident, known);
    leaveMs = Math.max(leaveMs, leaveIn(state, resident, over, now, guess));
  }
  return at + leaveMs + loadMsOf(lane);
}

/** When a loaded model has had its turn, which ends when nobody waits or, behind its gate, at `over`. */
function leaveIn(
  state: SchedulerState,
  lane: Contender,
  over: number,
  now: number,
  guess: Guess,
): number {
  const drainMs = endings([lane], now, guess).at(-1) ?? 0;
  if (lane.line.waiting === 0 || lane.stay.closing) return drainMs;
  const allMs = drainMs + workOf(state, lane, lane.line.waiting, guess);
  const gateMs = workOf(state, lane, lane.stay.gate, guess);
  return Math.min(allMs, Math.max(gateMs, over - now) + serviceOf(lane, guess));
}
