import { isFresh, type CacheControl } from "../core/cachekey.ts";
import { SUCCESS } from "../core/outcome.ts";
import type { Model } from "../core/snapshot.ts";
import { splice, topLevelKeys } from "../core/splice.ts";
import { areAlike, merge, plan, readVectors, type Encoding, type Vector } from "../core/vectors.ts";
import { isRecord } from "../dialects/dialect.ts";
import { GatewayError, quote } from "../errors.ts";
import type { Answer } from "../stores/answers.ts";
import type { Body } from "./accept.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";
import { reserve } from "./reserve.ts";
import { attempts } from "./upstream.ts";

/** What a request for embeddings asks for. */
export interface Asked {
  /** Each as JSON. */
  inputs: string[];
  encoding: Encoding;
  model: Model;
  control: CacheControl;
  /** The key of the vector of an input. */
  keyOf: (input: string) => string;
}

/** So long a large answer is put together in one piece, and so long others come first then. */
const SLICE_MS = 10;
const PAUSE_MS = 1;
const JSON_TYPE = "application/json";
const VECTOR = "application/octet-stream";
const encoder = new TextEncoder();

/** Answers a request for embeddings input by input: each vector is kept, and only what is missing is computed. */
export class Embedding {
  readonly #plane: Plane;
  readonly #asked: Asked;
  readonly #keys: ReadonlyMap<string, string>;
  readonly #known = new Map<string, Vector>();
  #oldest = Infinity;

  constructor(plane: Plane, asked: Asked) {
    this.#plane = plane;
    this.#asked = asked;
    this.#keys = new Map(asked.inputs.map((input) => [input, asked.keyOf(input)]));
  }

  /** The answer, if every vector of it is in memory. */
  async known(): Promise<Answer | null> {
    if (this.#asked.control.noCache) return null;
    for (const [input, key] of this.#keys) {
      this.#take(input, this.#plane.answers.get(key, Date.now()));
    }
    return this.#known.size === this.#keys.size ? this.#merged() : null;
  }

  /**
   * Has engines compute what nobody has.
   *
   * @param anew nothing that was kept is of use.
   * @throws GatewayError
   */
  async compute(
    worker: Exchange,
    anew = this.#asked.control.noCache,
  ): Promise<{ answer: Answer; kept: boolean }> {
    const { inputs, control } = this.#asked;
    if (!anew) await this.#askShared(worker);
    const kept = this.#known.size === this.#keys.size ? await this.#merged() : null;
    worker.check();
    if (kept !== null) return { answer: kept, kept: true };
    if (control.onlyIfCached) {
      throw new GatewayError("not_cached", "only-if-cached: not all of these vectors are there");
    }
    const batches = plan(inputs, this.#known, this.#batchSize());
    const missing = batches.flat();
    const bytes = missing.reduce((sum, input) => sum + Buffer.byteLength(input), 0);
    worker.promptSize = { bytes, messages: 0, images: 0 };
    const tokens = this.#plane.estimates.prompt(worker.record.model ?? "", worker.promptSize);
    if (worker.prompt !== null) worker.prompt = { ...worker.prompt, tokens };
    if (worker.record.attempts === 0) await reserve(worker, this.#plane);
    // Vectors can be read only together; a batch bounds what that is.
    worker.holdBytes = Infinity;
    // Exactly what the client asked for, in one request: then the engine's own bytes are the answer.
    const untouched = batches.length === 1 && batches[0]?.length === inputs.length;
    for (const batch of batches) {
      const body = await this.#embed(worker, batch, untouched);
      if (untouched && body !== null) {
        return { answer: whole(body, Date.now()), kept: false };
      }
    }
    const answer = await this.#merged();
    worker.check();
    if (answer !== null) return { answer, kept: false };
    if (anew) throw invalid(worker, "vectors of different lengths from one batch to the next");
    // The model behind the name has changed: what was kept of the old one does not go with the new.
    this.#known.clear();
    return this.compute(worker, true);
  }

  /** Inputs per request: what every backend that may get it takes. */
  #batchSize(): number {
    const { fleet } = this.#plane;
    const sizes = this.#asked.model.targets.map(
      ({ backend }) => fleet.engineFor(backend)?.embedBatch ?? Infinity,
    );
    return Math.min(...sizes);
  }

  #take(input: string, answer: Answer | null) {
    if (
      answer === null ||
      !isFresh(answer.storedAt, this.#asked.control, this.#plane.config.cache.ttlMs, Date.now())
    )
      return;
    this.#oldest = Math.min(this.#oldest, answer.storedAt);
    this.#known.set(input, vectorFrom(answer));
  }

  async #askShared(worker: Exchange) {
    const { sharedAnswers, answers } = this.#plane;
    const missing = [...this.#keys].filter(([input]) => !this.#known.has(input));
    if (sharedAnswers === null || missing.length === 0) return;
    const found = await sharedAnswers.getMany(missing.map(([, key]) => key));
    worker.check();
    for (const [at, [input, key]] of missing.entries()) {
      const answer = found[at] ?? null;
      if (answer !== null) answers.set(key, answer, Date.now());
      this.#take(input, answer);
    }
  }

  /**
   * One request to an engine, whose vectors are known from then on.
   *
   * @returns its answer's bytes; null where they are not written as the client wants them
   */
  async #embed(worker: Exchange, batch: string[], untouched: boolean): Promise<Uint8Array | null> {
    const original = worker.body;
    if (original !== null && !untouched) worker.body = withInputs(original, batch);
    const reply = await attempts(worker, this.#plane);
    worker.body = original;
    const vectors = readVectors(reply.json, batch);
    // What cannot be taken apart (a vector per token, say) is still what the client asked for.
    if (typeof vectors === "string" && untouched) return reply.head;
    if (typeof vectors === "string") throw invalid(worker, vectors);
    worker.endAttempt(SUCCESS, null);
    for (const [at, input] of batch.entries()) {
      const vector = vectors[at];
      if (vector !== undefined) this.#keep(input, vector);
    }
    // Some engines know one way only.
    return encodingIn(reply.json) === this.#asked.encoding ? reply.head : null;
  }

  #keep(input: string, vector: Vector) {
    this.#known.set(input, vector);
    const key = this.#keys.get(input);
    if (key === undefined) return;
    const answer = answerFrom(vector);
    this.#plane.answers.set(key, answer, answer.storedAt);
    this.#plane.sharedAnswers?.set(key, answer, this.#plane.config.cache.ttlMs);
  }

  async #merged(): Promise<Answer | null> {
    const { inputs, encoding } = this.#asked;
    if (!areAlike(inputs, this.#known)) return null;
    const parts: string[] = [];
    let pausedAt = this.#plane.now();
    for (const part of merge(inputs, this.#known, encoding)) {
      parts.push(part);
      if (this.#plane.now() - pausedAt < SLICE_MS) continue;
      // Streams of others go on meanwhile.
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      pausedAt = this.#plane.now();
    }
    return whole(encoder.encode(parts.join("")), Math.min(this.#oldest, Date.now()));
  }
}

function whole(body: Uint8Array, storedAt: number): Answer {
  return { storedAt, contentType: JSON_TYPE, cacheControl: null, body, model: "" };
}

function invalid(worker: Exchange, detail: string): GatewayError {
  const message = `backend ${quote(worker.record.backend_id)} answered with embeddings that are none`;
  const error = new GatewayError("upstream_invalid_response", message, { detail });
  worker.fail(error, "invalid_answer");
  return error;
}

function withInputs(body: Body, batch: readonly string[]): Body {
  const bytes = splice(body.bytes, body.keys, new Map([["input", `[${batch.join(",")}]`]]));
  return { ...body, bytes, keys: topLevelKeys(bytes) };
}

function encodingIn(answer: unknown): Encoding {
  const data = isRecord(answer) ? answer["data"] : null;
  const [first] = Array.isArray(data) ? (data as unknown[]) : [];
  return isRecord(first) && typeof first["embedding"] === "string" ? "base64" : "float";
}

/** A vector as the cache keeps it: behind four bytes that hold its tokens. */
function answerFrom({ bytes, tokens, model }: Vector): Answer {
  const body = new Uint8Array(4 + bytes.length);
  new DataView(body.buffer).setUint32(0, tokens, true);
  body.set(bytes, 4);
  return { storedAt: Date.now(), contentType: VECTOR, cacheControl: null, body, model };
}

function vectorFrom({ body, model }: Answer): Vector {
  const view = new DataView(body.buffer, body.byteOffset, body.byteLength);
  return { tokens: view.getUint32(0, true), bytes: body.subarray(4), model };
}
