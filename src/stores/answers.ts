import QuickLRU from "quick-lru";

/** An answer that may be given again. */
export interface Answer {
  /** Unix milliseconds. */
  storedAt: number;
  contentType: string;
  /** The engine's own header. */
  cacheControl: string | null;
  body: Uint8Array;
  /** Of the vector of one input the model that the engine named; else empty. */
  model: string;
}

interface Bounds {
  maxItems: number;
  /** Of keys and bodies. */
  maxBytes: number;
  ttlMs: number;
}

/** No single answer takes more than this share of the bytes. */
const LARGEST_SHARE = 1 / 8;

/**
 * Answers in memory, bounded in number and bytes; the one not used for longest goes first.
 *
 * QuickLRU alone keeps up to twice its `maxSize`, in two generations, and knows the order of use
 * only between them. Here an answer that is used is taken out and put in again, and room is made
 * before anything is put in: the order is exact, and no generation is dropped with something in it.
 */
export class Answers {
  #bounds: Bounds;
  readonly #answers: QuickLRU<string, Answer>;
  #entries = 0;
  #bytes = 0;

  constructor(bounds: Bounds) {
    this.#bounds = bounds;
    this.#answers = new QuickLRU({
      maxSize: bounds.maxItems,
      onEviction: (key, answer) => this.#uncount(key, answer),
    });
  }

  get entries(): number {
    return this.#entries;
  }

  get bytes(): number {
    return this.#bytes;
  }

  /** Takes effect at once; what fits stays. */
  configure(bounds: Bounds): void {
    this.#bounds = bounds;
    this.#answers.resize(bounds.maxItems);
    while (this.#bytes > bounds.maxBytes) this.#removeOldest();
  }

  /** @param now Unix milliseconds. */
  get(key: string, now: number): Answer | null {
    const answer = this.#take(key);
    if (answer === null || this.#isOver(answer, now)) return null;
    this.#put(key, answer);
    return answer;
  }

  /** Keeps it, in the place of an older one, unless it is too large or too old. */
  set(key: string, answer: Answer, now: number): void {
    const { maxItems, maxBytes } = this.#bounds;
    this.#take(key);
    const size = sizeOf(key, answer);
    if (size > maxBytes * LARGEST_SHARE || this.#isOver(answer, now)) return;
    while (this.#entries >= maxItems || this.#bytes + size > maxBytes) this.#removeOldest();
    const { body } = answer;
    // A view would keep all of the buffer that it looks at.
    const isView = body.byteLength < body.buffer.byteLength;
    this.#put(key, isView ? { ...answer, body: new Uint8Array(body) } : answer);
  }

  #isOver({ storedAt }: Answer, now: number): boolean {
    return now - storedAt >= this.#bounds.ttlMs;
  }

  #take(key: string): Answer | null {
    const answer = this.#answers.peek(key);
    if (answer === undefined) return null;
    this.#answers.delete(key);
    this.#uncount(key, answer);
    return answer;
  }

  #put(key: string, answer: Answer) {
    this.#answers.set(key, answer);
    this.#entries++;
    this.#bytes += sizeOf(key, answer);
  }

  #removeOldest() {
    const [oldest] = this.#answers.entriesAscending();
    if (oldest !== undefined) this.#take(oldest[0]);
  }

  #uncount(key: string, answer: Answer) {
    this.#entries--;
    this.#bytes -= sizeOf(key, answer);
  }
}

/** Keys are digests: a byte per character. */
function sizeOf(key: string, { body }: Answer): number {
  return key.length + body.byteLength;
}
