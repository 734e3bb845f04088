/** What one attempt showed of its backend. */
export interface Answered {
  /** Unix milliseconds of its end. */
  at: number;
  /** From sent to the first token; null for answers in one piece. */
  ttftMs: number | null;
  /** Of its prompt, counted by the engine or estimated. */
  promptTokens: number;
  /** Of these the ones that the engine says it had computed before; null where it does not say. */
  cachedTokens: number | null;
  /** Of this answer alone, from its first token to its last; null where that cannot be told. */
  tokensPerSecond: number | null;
  /** The code of its error, null when it had none. */
  error: string | null;
  /** Prompt and answer; null where that cannot be told, and what was expected stands. */
  tokens: number | null;
}

/** How many answers the percentiles are over. */
const SAMPLES = 200;
const SPEED_WEIGHT = 0.2;

/** What the answers of one backend have shown lately. */
export class Observed {
  readonly #ttfts: number[] = [];
  #next = 0;
  /** Moving average. */
  tokensPerSecond: number | null = null;
  lastError: { at: number; code: string } | null = null;

  add({ at, ttftMs, tokensPerSecond, error }: Answered): void {
    if (error !== null) this.lastError = { at, code: error };
    if (ttftMs !== null) {
      this.#ttfts[this.#next] = ttftMs;
      this.#next = (this.#next + 1) % SAMPLES;
    }
    if (tokensPerSecond === null) return;
    const before = this.tokensPerSecond ?? tokensPerSecond;
    this.tokensPerSecond = before + SPEED_WEIGHT * (tokensPerSecond - before);
  }

  /** The ttft that this share of the last answers did not exceed, nearest rank; null before the first. */
  ttftMs(share: number): number | null {
    const sorted = this.#ttfts.toSorted((a, b) => a - b);
    return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] ?? null;
  }
}
