/** A prompt's text as a chain of hashes: each stands for all of the text up to the end of its block. */
export interface Chain {
  blocks: readonly number[];
  /** Of the whole text, in UTF-16 code units as all lengths here; the last block ends before it. */
  length: number;
}

/** What one backend has seen of prompts. */
export interface PrefixIndex {
  /** Two generations, block to the use that saw it last: when `recent` is full, `older` is dropped. */
  recent: Map<number, number>;
  older: Map<number, number>;
  /** How many blocks fill a generation. */
  generation: number;
  /** Counts the prompts that were remembered. */
  use: number;
  /** The engine has lost what was last seen in this use or before. */
  goneUntil: number;
  /** How much of what was expected to be cached is, 0 to 1, when an engine last told. */
  hitRatio: number;
  toldAt: number;
}

/** What a backend has seen of one prompt. */
export interface Match {
  /** Leading blocks. */
  blocks: number;
  /** Their share of the text, 0 to 1. */
  share: number;
  /** The use in which the last of them was seen last. */
  use: number;
}

/**
 * A block is so long, and twice as long after so many blocks, again and again: a book costs few
 * blocks, and what lies between two blocks is never more than 1/256 of a long text.
 */
const BLOCK_LENGTH = 256;
const BLOCKS_PER_LENGTH = 512;
/** A million tokens. What comes behind them counts as not seen. */
const LONGEST_CHAIN = 5 * BLOCKS_PER_LENGTH;

/** One backend remembers so many blocks, 12 MiB of text or more. */
const MOST_BLOCKS = 50_000;

/** Odd, and without a pattern. Each makes a hash of its own. */
const FIRST_FACTOR = 0x9e3779b1;
const SECOND_FACTOR = 0x5f356495;

/** Weight of one report in the moving average. */
const REPORT_WEIGHT = 0.2;
/**
 * Reports on less count for less: engines cache whole blocks, of 16 tokens mostly, but of hundreds
 * where a model is a hybrid.
 */
const TELLING_TOKENS = 512;
/** Less than this of what was expected: the end of it is gone. */
const GONE_BELOW = 0.5;
/** Without reports a bad average is half forgotten after so long. */
const DOUBT_HALF_LIFE_MS = 900_000;

const MOST_SESSIONS = 10_000;

/**
 * The running hash is taken at the end of each block, so a block stands for all that came before
 * it. Where the pieces part makes no difference.
 *
 * Of 53 bits, so that a block is a number: making strings of them doubles the time on Deno. Whoever
 * forges a collision gains nothing: his own request goes where its prompt is not cached.
 *
 * @param seed what has to be the same for prompts to share anything: the model.
 */
export function chainOf(seed: string, pieces: Iterable<string>): Chain {
  let first = 1;
  let second = 2;
  const blocks: number[] = [];
  let length = 0;
  let blockLength = BLOCK_LENGTH;
  let missing = blockLength;
  for (let at = 0; at < seed.length; at++) {
    first = Math.imul(first ^ seed.charCodeAt(at), FIRST_FACTOR);
    second = Math.imul(second ^ seed.charCodeAt(at), SECOND_FACTOR);
  }
  for (const piece of pieces) {
    length += piece.length;
    let at = 0;
    while (at < piece.length && blocks.length < LONGEST_CHAIN) {
      const end = Math.min(piece.length, at + missing);
      missing -= end - at;
      for (; at < end; at++) {
        const unit = piece.charCodeAt(at);
        first = Math.imul(first ^ unit, FIRST_FACTOR);
        second = Math.imul(second ^ unit, SECOND_FACTOR);
      }
      if (missing > 0) continue;
      // The low bits of a product depend on low bits alone: of 21, the high ones.
      blocks.push((second >>> 11) * 2 ** 32 + (first >>> 0));
      if (blocks.length % BLOCKS_PER_LENGTH === 0) blockLength *= 2;
      missing = blockLength;
    }
  }
  return { blocks, length };
}

/** The length of so many leading blocks. */
function lengthOf(blocks: number): number {
  const doubled = 2 ** Math.floor(blocks / BLOCKS_PER_LENGTH);
  const full = BLOCKS_PER_LENGTH * (doubled - 1);
  return BLOCK_LENGTH * (full + (blocks % BLOCKS_PER_LENGTH) * doubled);
}

/** @param most blocks it may hold; at least the half of them seen last are there. */
export function createPrefixIndex(most = MOST_BLOCKS): PrefixIndex {
  return {
    recent: new Map(),
    older: new Map(),
    generation: Math.floor(most / 2),
    use: 0,
    goneUntil: 0,
    hitRatio: 1,
    toldAt: 0,
  };
}

/** How much of a prompt this backend has seen: its leading blocks. */
export function matched({ recent, older, goneUntil }: PrefixIndex, chain: Chain): Match {
  let blocks = 0;
  let use = 0;
  for (const block of chain.blocks) {
    const seen = recent.get(block) ?? older.get(block) ?? 0;
    if (seen <= goneUntil) break;
    use = seen;
    blocks++;
  }
  return { blocks, share: blocks === 0 ? 0 : lengthOf(blocks) / chain.length, use };
}

/**
 * The engine has read this prompt. To be told with its first token rather than when it is sent: of
 * ten prompts that come at once and begin alike, none finds the beginning cached.
 *
 * Generations instead of one map in the order of use, whose keys had to be deleted and put back
 * each time: to refresh 40 blocks takes 1 µs instead of 200.
 */
export function remember(index: PrefixIndex, { blocks }: Chain): void {
  index.use++;
  // From the end: a beginning is never in an older generation than what follows it, nor lost before.
  for (let at = blocks.length - 1; at >= 0; at--) {
    index.recent.set(blocks[at] ?? 0, index.use);
    if (index.recent.size < index.generation) continue;
    index.older = index.recent;
    index.recent = new Map();
  }
}

/**
 * The tokens of a prompt that need not be computed, as far as one can tell.
 *
 * @param promptTokens all of them, estimated.
 * @param now milliseconds, as in `correct`.
 */
export function expectedCached(
  index: PrefixIndex,
  { share }: Match,
  promptTokens: number,
  now: number,
): number {
  return Math.floor(promptTokens * share * ratioAt(index, now));
}

/**
 * The engine has told what was cached.
 *
 * The blocks of this prompt stay: the engine has just computed them again. If it had lost them,
 * then by now also what nobody asked for since they were seen last, because engines drop what was
 * used longest ago, and all at once when a model is unloaded. That is forgotten. Whatever else
 * makes them cache less than we think (caching is off, the cache is small, a template that begins
 * with the time of day) lowers the average.
 *
 * @param match what had been seen when the prompt was sent.
 * @param usage tokens of the prompt as the engine counts them, and those it had cached.
 */
export function correct(
  index: PrefixIndex,
  match: Match,
  usage: { input: number; cached: number },
  now: number,
): void {
  const expected = usage.input * match.share;
  if (!(expected > 0 && usage.cached >= 0)) return;
  // More than expected is no wonder: answers are cached too.
  const hit = Math.min(1, usage.cached / expected);
  const weight = REPORT_WEIGHT * Math.min(1, expected / TELLING_TOKENS);
  const ratio = ratioAt(index, now);
  index.hitRatio = ratio + (hit - ratio) * weight;
  index.toldAt = now;
  if (hit < GONE_BELOW && expected >= TELLING_TOKENS) {
    index.goneUntil = Math.max(index.goneUntil, match.use);
  }
}

/** Who expects nothing sends nothing and hears nothing: doubt has to pass by itself. */
function ratioAt({ hitRatio, toldAt }: PrefixIndex, now: number): number {
  const elapsed = Math.max(0, now - toldAt);
  return 1 - (1 - hitRatio) * 0.5 ** (elapsed / DOUBT_HALF_LIFE_MS);
}

/**
 * The backend that served a session last, of one model. It decides between equals, and for prompts
 * whose text is with the engine (`previous_response_id`).
 */
export class Sessions {
  readonly #backends = new Map<string, string>();

  remember(session: string, backend: string): void {
    this.#backends.delete(session);
    this.#backends.set(session, backend);
    if (this.#backends.size <= MOST_SESSIONS) return;
    const [oldest] = this.#backends.keys();
    if (oldest !== undefined) this.#backends.delete(oldest);
  }

  last(session: string): string | null {
    return this.#backends.get(session) ?? null;
  }
}
