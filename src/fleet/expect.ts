import type { BreakerSettings } from "../core/breaker.ts";
import { FIRST_GUESS, NO_GUESS, startIn, type Guess } from "../core/eta.ts";
import { coolsUntil, hasRoom, isVacant, type Ticket } from "../core/lanes.ts";
import {
  beginsIn,
  createPace,
  FIRST_PACE,
  learnPace,
  measuredPace,
  median,
  type Pace,
  type PaceGuess,
} from "../core/pace.ts";
import { correct, expectedCached, matched, type Match } from "../core/prefix.ts";
import type { Candidate } from "../core/select.ts";
import type { Backend, Target } from "../core/snapshot.ts";
import type { Live } from "./live.ts";
import type { Answered } from "./observed.ts";

/** What is expected of a backend of which something has not been measured. */
export interface Guesses {
  queue: Guess;
  pace: PaceGuess;
}

const FIRST_GUESSES: Guesses = { queue: FIRST_GUESS, pace: FIRST_PACE };

/** The same as of the backends where it has been: of each quantity the median over those with this model. */
export function guessesFrom(all: Iterable<Live>, model: string): Guesses {
  const lives: Live[] = [];
  for (const live of all) if (live.scheduler.lanes.has(model)) lives.push(live);
  // Nobody compares one with itself.
  if (lives.length < 2) return FIRST_GUESSES;
  const lanes = lives.map(({ scheduler }) => scheduler.lanes.get(model));
  const paces = lives.map((live) => measuredPace(paceOf(live, model)));
  const middle = (values: (number | null | undefined)[], first: number) =>
    median(values.filter((value) => value != null)) ?? first;
  return {
    queue: {
      ...FIRST_GUESS,
      serviceMs: middle(
        lanes.map((lane) => lane?.serviceMs),
        FIRST_GUESS.serviceMs,
      ),
      loadMs: middle(
        lanes.map((lane) => lane?.stay.loadMs),
        FIRST_GUESS.loadMs,
      ),
    },
    pace: {
      baseMs: middle(
        paces.map(({ baseMs }) => baseMs),
        FIRST_PACE.baseMs,
      ),
      perTokenMs: middle(
        paces.map(({ perTokenMs }) => perTokenMs),
        FIRST_PACE.perTokenMs,
      ),
    },
  };
}

/** How much of a prompt need not be computed there, as far as one can tell. */
export interface Cached {
  match: Match;
  tokens: number;
}

const NONE: Cached = { match: { blocks: 0, share: 0, use: 0 }, tokens: 0 };

export function cachedIn({ prefixes }: Live, { prompt }: Ticket, now: number): Cached {
  if (prompt === undefined || prompt.chain.blocks.length === 0) return NONE;
  const match = matched(prefixes, prompt.chain);
  return { match, tokens: expectedCached(prefixes, match, prompt.tokens, now) };
}

/** Tokens of the prompt that have to be computed there. */
export function uncached({ prompt }: Ticket, cached: Cached): number {
  return (prompt?.tokens ?? 0) - cached.tokens;
}

/** How long the answer takes to begin once the request is sent, milliseconds: prompts are computed in turn. */
export function beginOf(
  live: Live,
  ticket: Ticket,
  cached: Cached,
  guess: PaceGuess,
  now: number,
): number {
  const tokens = live.computing + uncached(ticket, cached);
  return beginsIn(paceOf(live, ticket.model), tokens, guess, now);
}

/** When the first token would come if the request went there, milliseconds from now. */
export function firstTokenOf(live: Live, ticket: Ticket, guesses: Guesses, now: number): number {
  const startMs = startIn(live.scheduler, ticket, now, guesses.queue);
  return startMs + beginOf(live, ticket, cachedIn(live, ticket, now), guesses.pace, now);
}

/** A target with what selection looks at. @param familiar the ticket's session was there last. */
export function candidateOf(
  live: Live,
  { health, weight }: Backend,
  target: Target,
  ticket: Ticket,
  familiar: boolean,
  settings: BreakerSettings,
  guesses: Guesses,
  now: number,
): Candidate {
  const { scheduler, guard, failedAt, trials } = live;
  const { model } = ticket;
  const free = hasRoom(scheduler, model);
  const vacant = free || isVacant(scheduler, model, now);
  const resident = scheduler.lanes.get(model)?.stay.residency === "loaded";
  const admits = guard.admits(model, settings, now);
  // A trial does not wait in a queue, nor is a load tried again before its time.
  const cools = coolsUntil(scheduler, model, now) !== null;
  const open = cools || admits === null || (admits === "trial" && !vacant);
  const cached = cachedIn(live, ticket, now);
  const startMs = startIn(scheduler, ticket, now, guesses.queue);
  const isLate = (ms: number) => ms > 0 && now + ms > ticket.deadlineAt;
  return {
    target,
    health,
    weight,
    startMs,
    firstTokenMs: startMs + beginOf(live, ticket, cached, guesses.pace, now),
    cachedTokens: cached.tokens,
    free,
    vacant,
    resident,
    familiar,
    late: isLate(startMs) && isLate(startIn(scheduler, ticket, now, NO_GUESS)),
    roomy: ticket.cramped?.has(live.id) !== true,
    barred: ticket.barred.has(live.id),
    open,
    trying: trials > 0,
    failedAt,
  };
}

/** One conversation with one model; another flow's sessions are others. Null where the client names none. */
export function sessionKey({ prompt, flow, model }: Ticket): string | null {
  return prompt?.session == null ? null : JSON.stringify([flow, model, prompt.session]);
}

/**
 * What an answer has shown of how its backend computes prompts.
 *
 * @param expected to be cached, when it was sent.
 * @param ahead tokens of other prompts that were to be computed then.
 */
export function learn(
  live: Live,
  { model }: Ticket,
  { ttftMs, promptTokens, cachedTokens }: Answered,
  expected: Cached,
  ahead: number,
  now: number,
): void {
  if (cachedTokens !== null) {
    correct(live.prefixes, expected.match, { input: promptTokens, cached: cachedTokens }, now);
  }
  if (ttftMs === null) return;
  const computed = Math.max(0, promptTokens - (cachedTokens ?? expected.tokens));
  learnPace(paceOf(live, model), ahead + computed, ttftMs, now);
}

function paceOf({ paces }: Live, model: string): Pace {
  let pace = paces.get(model);
  if (pace === undefined) paces.set(model, (pace = createPace()));
  return pace;
}
