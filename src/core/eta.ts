import { aheadOf, claimsIn, rankOf, waitsIn } from "./fairness.ts";
import {
  mayStart,
  slotsOf,
  type Cap,
  type Lane,
  type SchedulerState,
  type Ticket,
} from "./lanes.ts";
import {
  loadOf,
  placingFor,
  residents,
  turnOver,
  wantedSince,
  type Contender,
  type Turns,
} from "./turns.ts";

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

/** What there is to predict from. */
interface View {
  state: SchedulerState;
  now: number;
  guess: Guess;
  /** Lane and class of a ticket that does not wait yet: it counts as if it did, or would be sent to and fro. */
  comes: { lane: Contender; rank: number } | null;
}

/** A request that runs for longer than usual still has this share of a usual one to go, */
const LEAST_LEFT = 0.25;
/** and a load, which takes about the same each time, this. */
const LEAST_LOAD_LEFT = 0.1;
/** In one queue. */
const MOST_PROMISES = 512;
const JITTER = 0.1;
const MOST_JITTER_MS = 2000;

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
  const comes = waitsIn(lane.line, ticket) ? null : { lane, rank: rankOf(ticket) };
  return startBehind({ state, now, guess, comes }, lane, ticket, aheadOf(lane.line, ticket));
}

/**
 * In how many milliseconds a request like this one would be served in time, at least 1. It is a promise:
 * until then it counts as one that waits, so that the next one is told a later time.
 */
export function promise(state: SchedulerState, ticket: Ticket, now: number): number {
  const lane = state.lanes.get(ticket.model);
  if (lane === undefined) return 1;
  const { places, promises } = lane;
  for (const [id, at] of promises) if (at <= now || id === ticket.id) promises.delete(id);
  const view = { state, now, guess: FIRST_GUESS, comes: { lane, rank: rankOf(ticket) } };
  const behind = (ahead: number) => startBehind(view, lane, ticket, ahead);
  const startMs = behind(aheadOf(lane.line, ticket) + promises.size);
  const patienceMs = ticket.deadlineAt - ticket.arrivedAt;
  // A place comes free whenever somebody who waits starts.
  const missing = places.used + promises.size + 1 - places.limit;
  const placeMs = missing > 0 ? behind(missing - 1) : 0;
  const waitMs = Math.max(1, startMs - patienceMs, placeMs);
  // A flood of requests that do not heed what they are told puts off the others no further than this.
  if (promises.size < MOST_PROMISES) promises.set(ticket.id, now + waitMs);
  return waitMs;
}

/**
 * What somebody who is refused is told: a little later, so that those who are refused at once do not come
 * back at once. Promises have their own time each already, and of long ones a share would leave slots idle.
 *
 * @param random from 0 up to 1.
 */
export function jittered(retryAfterMs: number, random: number): number {
  return retryAfterMs + random * Math.min(JITTER * retryAfterMs, MOST_JITTER_MS);
}

/** When a request starts that so many others start before. */
function startBehind(view: View, lane: Lane, ticket: Ticket, ahead: number): number {
  const { turns, prefix } = view.state;
  const name = prefix + ticket.model;
  const { residency, unwanted, gate } = lane.stay;
  const heldMs = heldIn(view);
  const ready = (behind: number, since: number | null) => {
    const readyMs = Math.max(heldMs, readyIn(view, lane, ticket, since));
    // All slots are free then, but for those that other models have.
    const slotMs = Math.floor(behind / slotsOf(view.state, lane)) * serviceOf(view, lane);
    return Math.max(readyMs + slotMs, backendIn(view, lane, ticket, behind));
  };
  // One that is only about to go may stay for who comes: its turn tells.
  const isLeaving = unwanted || turns.change?.leaving.has(name) === true;
  if (residency !== "loaded" || isLeaving) return ready(ahead, wantedSince(lane));
  const slotMs = slotIn(view, lane, ticket, ahead);
  const overMs = overIn(view, lane, name);
  if (ahead < gate || slotMs <= overMs) return Math.max(heldMs, slotMs);
  // The turn ends before, with those served who start until then, and comes again.
  const firstMs = slotIn(view, lane, ticket, 0);
  const rounds = Math.floor((overMs - firstMs) / serviceOf(view, lane)) + 1;
  const served = Math.min(ahead, Math.max(gate, rounds * slotsOf(view.state, lane)));
  const waiting = [...claimsIn(lane.line)].map(({ arrivedAt }) => arrivedAt);
  return ready(ahead - served, waiting.toSorted((one, other) => one - other)[served] ?? null);
}

/** When the turn of a loaded model ends though somebody waits; Infinity where nobody wants its memory. */
function overIn(view: View, lane: Lane, name: string): number {
  const { state, now, comes } = view;
  const { turns } = state;
  let over = Infinity;
  if (!turns.active) return over;
  const resident = residents(turns);
  const own = rankIn(view, lane);
  for (const [other, wanted, since] of wishes(turns, now)) {
    if (wanted.stay.residency !== "cold") continue;
    const { leaving, known } = placingFor(turns, other, resident, comes?.lane);
    if (!leaving.includes(name)) continue;
    over = Math.min(over, turnOver(turns, wanted, since, lane, known, Infinity, own));
  }
  return over - now;
}

/** The class of who comes to this lane; Infinity where it is another one. */
function rankIn({ comes }: View, lane: Contender): number {
  return comes?.lane === lane ? comes.rank : Infinity;
}

/** For how long a busy engine is left alone: until its time is over, or somebody ends. */
function heldIn(view: View): number {
  const { state, now, guess } = view;
  const { heldUntil, lanes } = state;
  if (heldUntil === null || heldUntil <= now) return 0;
  const [first = Infinity] = endings(view, lanes.values());
  return Math.min(guess.heldMs, heldUntil - now, first);
}

function serviceOf({ guess }: View, lane: Contender): number {
  return lane.serviceMs ?? guess.serviceMs;
}

/** How long what runs on these lanes still takes, the first to end first. */
function endings(view: View, lanes: Iterable<Contender>): number[] {
  const left: number[] = [];
  for (const lane of lanes) {
    const serviceMs = serviceOf(view, lane);
    for (const { startedAt } of lane.running.values()) {
      left.push(Math.max(serviceMs - (view.now - startedAt), serviceMs * LEAST_LEFT));
    }
  }
  return left.toSorted((one, other) => one - other);
}

/** When so many of those who wait, and then this one, have got a slot of a loaded model. */
function slotIn(view: View, lane: Lane, ticket: Ticket, ahead: number): number {
  const own = () => endings(view, [lane]);
  let at = backendIn(view, lane, ticket, ahead);
  for (const cap of [lane.slots, ...lane.shared]) {
    at = Math.max(at, roomIn(cap, own, ahead, serviceOf(view, lane)));
  }
  return at;
}

/** The same by what the backend may do at once, in the order of all its models. */
function backendIn(view: View, lane: Lane, ticket: Ticket, ahead: number): number {
  const { backend, lanes } = view.state;
  if (backend.limit === Infinity) return 0;
  const all = () => endings(view, lanes.values());
  return roomIn(backend, all, ahead, serviceOf(view, lane), rivalsOf(view, lane, ticket));
}

/**
 * When a cap has room for one that so many like it go before.
 *
 * @param leftOf when those that use it end.
 * @param rivals how long others take that go before all of them.
 */
function roomIn(
  { limit, used }: Cap,
  leftOf: () => number[],
  ahead: number,
  serviceMs: number,
  rivals: readonly number[] = [],
): number {
  const free = limit - used;
  if (ahead + rivals.length < free || limit < 1) return 0;
  const left = leftOf();
  // Of what other backends use one can only say how often such a one ends.
  if (used > left.length) return ((ahead + 1 - free) * serviceMs) / limit;
  // When each place is free for the next.
  let places = free < 0 ? left.slice(-free) : [...Array<number>(free).fill(0), ...left];
  for (const rivalMs of rivals) places = taken(places, rivalMs);
  let behind = ahead;
  for (; behind > 0; behind--) {
    if ((places.at(-1) ?? 0) - (places[0] ?? 0) <= serviceMs) break;
    places = taken(places, serviceMs);
  }
  // From here on they are taken one after the other, and again once for every service.
  return (places[behind % limit] ?? 0) + Math.floor(behind / limit) * serviceMs;
}

/** The first of these is taken for so long. */
function taken([first = 0, ...others]: readonly number[], serviceMs: number): number[] {
  const until = first + serviceMs;
  const behind = others.findIndex((at) => at > until);
  return others.toSpliced(behind === -1 ? others.length : behind, 0, until);
}

/** How long each of those takes who wait for other models that are loaded, and come first. */
function rivalsOf(view: View, own: Lane, ticket: Ticket): number[] {
  const rivals: number[] = [];
  for (const lane of view.state.lanes.values()) {
    if (lane === own || lane.stay.residency !== "loaded" || lane.stay.closing) continue;
    const serviceMs = serviceOf(view, lane);
    for (const other of claimsIn(lane.line)) {
      const ranks = rankOf(other) - rankOf(ticket);
      if (ranks < 0 || (ranks === 0 && other.arrivedAt < ticket.arrivedAt)) rivals.push(serviceMs);
    }
  }
  return rivals;
}

/** How long those who wait for this model take, all slots being theirs. */
function workOf(view: View, lane: Contender, waiting: number): number {
  return Math.ceil(waiting / slotsOf(view.state, lane)) * serviceOf(view, lane);
}

/**
 * When a model that is not served now will be: the load under way, then one for each model that has been
 * wanted for longer, then its own; each begins when the one before is done, and when the models that
 * leave for it have had their turn.
 *
 * @param wanted since when it has been; null: only by this ticket.
 */
function readyIn(view: View, lane: Lane, ticket: Ticket, wanted: number | null): number {
  const { state, now, guess } = view;
  const { turns } = state;
  const { change, lanes } = turns;
  const own = state.prefix + ticket.model;
  const resident = residents(turns);
  const loadMsOf = (each: Contender) => loadOf(each, lanes.values()) ?? guess.loadMs;
  /** Of the models that are loaded by then, when nobody waits there any more. */
  const idleAt = new Map<string, number>();
  const enter = (name: string, each: Contender, at: number) => {
    resident.add(name);
    idleAt.set(name, at + workOf(view, each, each.line.waiting));
    return at;
  };
  let at = 0;
  for (const name of change?.leaving ?? []) resident.delete(name);
  const coming = change?.model == null ? undefined : lanes.get(change.model);
  if (change?.model != null && coming !== undefined) {
    const loadMs = loadMsOf(coming);
    const leftMs = Math.max(loadMs - (now - change.startedAt), loadMs * LEAST_LOAD_LEFT);
    at = enter(change.model, coming, leftMs);
    if (change.model === own) return at;
  }
  /** When those who leave for a model have had their turn. */
  const placeFor = (name: string, each: Contender, since: number) => {
    resident.delete(name);
    const { leaving, known } = placingFor(turns, name, resident, view.comes?.lane);
    const rank = name === own ? rankOf(ticket) : Infinity;
    const ends = leaving.map((other) => {
      const stays = lanes.get(other) as Contender;
      const over = turnOver(turns, each, since, stays, known, rank, rankIn(view, stays));
      return idleAt.get(other) ?? leaveIn(view, stays, over);
    });
    return { leaving, begins: Math.max(at, ...ends) };
  };
  const all = wishes(turns, now).filter(([name]) => name !== own);
  all.push([own, lane, Math.min(wanted ?? Infinity, ticket.arrivedAt)]);
  all.sort(([, , one], [, , other]) => one - other);
  if (coming === undefined) {
    // The first for whom there is room, however long others have waited for models that have to go.
    const cold = all.filter(([, { stay }]) => stay.residency === "cold");
    const begins = cold.map((wish) => placeFor(...wish).begins);
    const first = cold[begins.indexOf(Math.min(...begins))];
    if (first !== undefined) all.unshift(...all.splice(all.indexOf(first), 1));
  }
  for (const [name, each, since] of all) {
    const { leaving, begins } = placeFor(name, each, since);
    for (const other of leaving) resident.delete(other);
    at = enter(name, each, begins + loadMsOf(each));
    if (name === own) break;
  }
  return at;
}

/** The models that somebody waits for in vain, and since when: not loaded, or about to go. */
function wishes({ lanes }: Turns, now: number): [string, Contender, number][] {
  const all: [string, Contender, number][] = [];
  for (const [name, lane] of lanes) {
    const { residency, closing, retryAt, asked } = lane.stay;
    if (residency === "loading" || (residency === "loaded" && !closing) || retryAt > now) continue;
    // What is only loaded where nobody minds comes before nobody.
    if (lane.line.waiting === 0 && asked?.mayEvict !== true) continue;
    const since = wantedSince(lane);
    if (since !== null) all.push([name, lane, since]);
  }
  return all;
}

/** When a loaded model has had its turn, which ends when nobody waits or, behind its gate, at `over`. */
function leaveIn(view: View, lane: Contender, over: number): number {
  const comes = lane === view.comes?.lane;
  const waiting = lane.line.waiting + (comes ? 1 : 0);
  const drainMs = endings(view, [lane]).at(-1) ?? 0;
  if (waiting === 0 || (lane.stay.closing && !comes)) return drainMs;
  const allMs = drainMs + workOf(view, lane, waiting);
  const gateMs = drainMs + workOf(view, lane, lane.stay.gate);
  // Whoever has started by then ends first.
  const overMs = over > view.now ? over - view.now + serviceOf(view, lane) : 0;
  return Math.min(allMs, Math.max(gateMs, overMs));
}
