/**
 * How long one model in one backend takes to begin an answer, learned from its streams at the load they
 * found. Milliseconds.
 */
export interface Pace {
  /** Of a short prompt; moving average, null before the second. */
  baseMs: number | null;
  /** What the last short prompt took. */
  lastMs: number | null;
  /** What long prompts took beyond that, and their tokens: sums, the older the less. */
  prefillMs: number;
  prefillTokens: number;
  /** When it last learned. */
  at: number;
}

/** What is taken for what nobody has measured. */
export interface PaceGuess {
  baseMs: number;
  perTokenMs: number;
}

export const FIRST_PACE: PaceGuess = { baseMs: 0, perTokenMs: 1 };
export const NO_PACE: PaceGuess = { baseMs: 0, perTokenMs: 0 };

/** With fewer tokens to compute the time is that of everything else, and nobody waits for them. */
export const SHORT_TOKENS = 256;
const BASE_WEIGHT = 0.2;
/** The average is that of about so many tokens. */
const MEMORY_TOKENS = 16_384;
/** So old it counts half: a backend that was slow once and is avoided since gets another chance. */
const HALF_LIFE_MS = 60_000;

export function createPace(): Pace {
  return { baseMs: null, lastMs: null, prefillMs: 0, prefillTokens: 0, at: -Infinity };
}

/** An answer began `ttftMs` after it was sent, with so many tokens of its prompt not cached. */
export function learnPace(pace: Pace, tokens: number, ttftMs: number, now: number): void {
  if (tokens < SHORT_TOKENS) {
    const { lastMs } = pace;
    pace.lastMs = ttftMs;
    if (lastMs === null) return;
    // One slow answer is an accident, the first mostly: all requests would go elsewhere for a minute.
    const quickMs = Math.min(lastMs, ttftMs);
    const before = pace.baseMs ?? quickMs;
    pace.baseMs = before + BASE_WEIGHT * (quickMs - before);
    pace.at = now;
    return;
  }
  pace.at = now;
  const kept = MEMORY_TOKENS / (MEMORY_TOKENS + tokens);
  pace.prefillMs = pace.prefillMs * kept + Math.max(0, ttftMs - (pace.baseMs ?? 0));
  pace.prefillTokens = pace.prefillTokens * kept + tokens;
}

/** What was measured; null where nothing was. */
export function measuredPace({ baseMs, prefillMs, prefillTokens }: Pace): {
  baseMs: number | null;
  perTokenMs: number | null;
} {
  return { baseMs, perTokenMs: prefillTokens === 0 ? null : prefillMs / prefillTokens };
}

/** How long an answer takes to begin once its request is sent, milliseconds. */
export function beginsIn(pace: Pace, tokens: number, guess: PaceGuess, now: number): number {
  const { baseMs, perTokenMs } = measuredPace(pace);
  const trust = 0.5 ** ((now - pace.at) / HALF_LIFE_MS);
  const blend = (measured: number | null, guessed: number) =>
    measured === null ? guessed : trust * measured + (1 - trust) * guessed;
  return blend(baseMs, guess.baseMs) + tokens * blend(perTokenMs, guess.perTokenMs);
}

/** The middle one, of two the mean; null of none. */
export function median(values: readonly number[]): number | null {
  const sorted = values.toSorted((one, other) => one - other);
  const middle = sorted.length / 2;
  const [low, high] = [sorted[Math.ceil(middle) - 1], sorted[Math.floor(middle)]];
  return low === undefined || high === undefined ? null : (low + high) / 2;
}
