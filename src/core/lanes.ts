import { headOf, positionIn, type Claim, type Line } from "./fairness.ts";
import type { Chain } from "./prefix.ts";
import { createTurns, isCooling, type Contender, type Stay, type Turns } from "./turns.ts";

/** Something of which only so much may be in use: slots, a backend's sum, places in a queue. */
export interface Cap {
  limit: number;
  used: number;
}

/** One request that asks for a slot. Times are milliseconds of one monotonic clock. */
export interface Ticket extends Claim {
  readonly id: string;
  readonly model: string;
  /** When waiting has become pointless. */
  readonly deadlineAt: number;
  /** Backends it may not go to: they have failed it, or do not speak its path. */
  readonly barred: ReadonlySet<string>;
  /** Backends whose context is likely too small: only where there is no other. */
  readonly cramped?: ReadonlySet<string>;
  /** What there is to compute before the first token; absent where nobody knows. */
  readonly prompt?: Prompt | undefined;
}

export interface Prompt {
  tokens: number;
  /** Its text, as the prefix index knows it. */
  chain: Chain;
  /** Names the conversation, where the client does. */
  session: string | null;
  /** Its answer comes as a stream, which shows when the prompt has been computed. */
  shows: boolean;
}

/** A request that has a slot. */
export interface Running {
  startedAt: number;
  /** What its flow has been charged. */
  tokens: number;
}

/** The requests of one model in one backend. */
export interface Lane {
  slots: Cap;
  /** Caps that reach beyond this backend: the model's, the process's. Shared with other schedulers. */
  shared: readonly Cap[];
  /** Places in the queue of this model, over all backends. Shared likewise. */
  places: Cap;
  line: Line<Ticket>;
  running: Map<Ticket, Running>;
  /** By ticket, when those who were refused have been told to come back: until then they count as waiting. */
  promises: Map<string, number>;
  /** Mean of how long a request holds its slot, null until one has ended. */
  serviceMs: number | null;
  /** Of so many requests. */
  services: number;
  /** Whether its model is loaded, and how long it stays. */
  stay: Stay;
}

/** Everything the scheduler of one backend knows. Changed in place by `step`, by nothing else. */
export interface SchedulerState {
  /** False while nobody may start here: drained, removed, or unhealthy. */
  available: boolean;
  backend: Cap;
  lanes: Map<string, Lane>;
  waiting: number;
  /** Starts since the last one that went to a lower class for its age. */
  passed: number;
  /** The engine said that it is busy: nobody starts until then, or until somebody ends. */
  heldUntil: number | null;
  /** Which models are served, where not all of them fit; one for all backends on a GPU. */
  turns: Turns;
  /** What the names of this backend's models begin with in there. */
  prefix: string;
}

export function createScheduler(): SchedulerState {
  return {
    available: true,
    backend: { limit: Infinity, used: 0 },
    lanes: new Map(),
    waiting: 0,
    passed: 0,
    heldUntil: null,
    turns: createTurns(),
    prefix: "",
  };
}

/** Would a request of this model start at once here? */
export function hasRoom(state: SchedulerState, model: string): boolean {
  const lane = state.lanes.get(model);
  return lane !== undefined && lane.line.waiting === 0 && mayStart(state, lane);
}

/** Would it, once its model is loaded, which has not just failed? */
export function isVacant(state: SchedulerState, model: string, now: number): boolean {
  const lane = state.lanes.get(model);
  if (lane === undefined || isCooling(lane, now)) return false;
  return lane.line.waiting === 0 && hasSlot(state, lane);
}

/** Until when this model is left alone because a load failed; null: it is not. */
export function coolsUntil(state: SchedulerState, model: string, now: number): number | null {
  const lane = state.lanes.get(model);
  return lane !== undefined && isCooling(lane, now) ? lane.stay.retryAt : null;
}

/** What a request of this model that does not start waits for, in words for people. */
export function waitsFor(state: SchedulerState, model: string): string {
  const { residency = "loaded", closing = false } = state.lanes.get(model)?.stay ?? {};
  if (residency === "loading") return `loading ${model}`;
  return residency === "cold" || closing ? `waiting for ${model}'s turn` : "waiting for a slot";
}

/** Requests of this model that start here before the ticket; -1 when it does not wait here. */
export function positionOf(state: SchedulerState, ticket: Ticket): number {
  const lane = state.lanes.get(ticket.model);
  return lane === undefined ? -1 : positionIn(lane.line, ticket);
}

/** Of those who wait for this model here, the next. */
export function nextOf(state: SchedulerState, model: string): Ticket | undefined {
  const lane = state.lanes.get(model);
  return lane === undefined ? undefined : headOf(lane.line);
}

export function mayStart(state: SchedulerState, lane: Lane): boolean {
  const { residency, closing } = lane.stay;
  return residency === "loaded" && !closing && hasSlot(state, lane);
}

function hasSlot(state: SchedulerState, lane: Lane): boolean {
  return state.available && state.heldUntil === null && freeIn(state, lane) > 0;
}

/** Slots that a request of this lane could have now. */
function freeIn({ backend }: SchedulerState, { slots, shared }: Lane): number {
  let free = Math.min(slots.limit - slots.used, backend.limit - backend.used);
  for (const cap of shared) free = Math.min(free, cap.limit - cap.used);
  return free;
}

/** Slots that requests of this lane could have if nothing else ran, at least 1. */
export function slotsOf({ backend }: SchedulerState, { slots, shared }: Contender): number {
  let most = Math.min(slots.limit, backend.limit);
  for (const cap of shared) most = Math.min(most, cap.limit);
  return Math.max(1, most);
}
