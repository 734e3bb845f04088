import type { Answer } from "./answers.ts";
import type { RedisLink } from "./redis.ts";

/** Larger answers stay in the gateway that has them. */
const MOST_BYTES = 1024 * 1024;
/** First byte of every value: another layout is a miss. */
const VERSION = 1;
/** Version, and the length of the head as 32 bits. */
const PREAMBLE_BYTES = 5;

/** Answers that gateways share. What cannot be had in time, or is not whole, is a miss. */
export class RedisAnswers {
  readonly #link: Pick<RedisLink, "ask" | "prefix">;

  constructor(link: Pick<RedisLink, "ask" | "prefix">) {
    this.#link = link;
  }

  async get(key: string): Promise<Answer | null> {
    const bytes = await this.#link.ask((redis) => redis.getBuffer(this.#nameOf(key)));
    return decode(bytes);
  }

  /** As many as keys, in their order, for one wait. */
  async getMany(keys: readonly string[]): Promise<(Answer | null)[]> {
    if (keys.length === 0) return [];
    const names = keys.map((key) => this.#nameOf(key));
    const values = await this.#link.ask((redis) => redis.mgetBuffer(names));
    return keys.map((_, index) => decode(values?.[index] ?? null));
  }

  /** Nobody waits for it. */
  set(key: string, answer: Answer, ttlMs: number): void {
    if (answer.body.byteLength > MOST_BYTES) return;
    const value = encode(answer);
    void this.#link.ask((redis) => redis.set(this.#nameOf(key), value, "PX", Math.ceil(ttlMs)));
  }

  #nameOf(key: string): string {
    return `${this.#link.prefix}answer:${key}`;
  }
}

/** Version, length of the head, the head as JSON, the body as it is. */
function encode({ body, ...head }: Answer): Buffer {
  const json = Buffer.from(JSON.stringify({ ...head, bytes: body.byteLength }));
  const preamble = Buffer.alloc(PREAMBLE_BYTES);
  preamble.writeUInt8(VERSION, 0);
  preamble.writeUInt32BE(json.byteLength, 1);
  return Buffer.concat([preamble, json, body]);
}

function decode(value: Buffer | null): Answer | null {
  if (value === null || value.byteLength < PREAMBLE_BYTES || value[0] !== VERSION) return null;
  const bodyAt = PREAMBLE_BYTES + value.readUInt32BE(1);
  try {
    const head: unknown = JSON.parse(value.toString("utf8", PREAMBLE_BYTES, bodyAt));
    if (!isHead(head) || head.bytes !== value.byteLength - bodyAt) return null;
    const { storedAt, contentType, cacheControl, model } = head;
    return {
      storedAt,
      contentType,
      cacheControl,
      model,
      body: new Uint8Array(value.subarray(bodyAt)),
    };
  } catch {
    return null;
  }
}

function isHead(head: unknown): head is Omit<Answer, "body"> & { bytes: number } {
  if (typeof head !== "object" || head === null) return false;
  const { storedAt, contentType, cacheControl, model } = head as Partial<Record<string, unknown>>;
  const isControl = cacheControl === null || typeof cacheControl === "string";
  const areTexts = typeof contentType === "string" && typeof model === "string";
  return typeof storedAt === "number" && areTexts && isControl;
}
