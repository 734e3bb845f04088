import { FrameCutter } from "../core/frames.ts";
import { concat } from "../core/splice.ts";
import { isWhole } from "../dialects/dialect.ts";
import { GatewayError, quote } from "../errors.ts";
import { waitingOf } from "./admit.ts";
import { rounded } from "../telemetry/record.ts";
import type { Exchange } from "./exchange.ts";
import type { UpstreamAttempt } from "./attempt.ts";
import { FRAME_BYTES, type Reply } from "./inspect.ts";
import type { Plane } from "./plane.ts";
import { Tap } from "./tap.ts";

const LF = 0x0a;
const DATA_LINE = /^data:/m;
const decoder = new TextDecoder();
const encoder = new TextEncoder();

/** Tenths of its cap that an answer may have: events and tokens are not quite the same. */
const CAP_TENTHS = 11;

/** How long an engine may keep its connection open behind the end of its answer. */
const END_GRACE_MS = 1000;

/**
 * The body of an answer that is passed on as it comes. Bytes are pulled by the client, so that none
 * wait in memory. Of a stream whole events go through at a time, a tap reads along, and exactly one
 * ending is written. It may be opened, with comments, before there is an engine's answer to relay.
 *
 * An answer in one piece that is too large to hold goes through unseen: when it breaks off, the
 * connection breaks off too, since nothing else would be true.
 */
export class Relay {
  readonly readable: ReadableStream<Uint8Array>;
  /** Sees the engine's bytes as they go out. */
  onBytes: ((bytes: Uint8Array) => void) | null = null;
  readonly #exchange: Exchange;
  readonly #plane: Plane;
  readonly #cutter = new FrameCutter();
  readonly #attached = Promise.withResolvers<void>();
  #controller!: ReadableStreamDefaultController<Uint8Array>;
  #attempt: UpstreamAttempt | null = null;
  #tap: Tap | null = null;
  /** Events with tokens that the answer may have. */
  #mostDeltas = Infinity;
  /** The frame that is not whole yet, and how much of it has been let go already. */
  #held: Uint8Array[] = [];
  #heldBytes = 0;
  #released = 0;
  /** The beginning of this frame was too much to keep: the tap cannot read it. */
  #blind = false;
  /** The client has asked for more and has not got it yet. */
  #wanted = false;
  #writes = 0;
  #lastChunkAt = 0;
  #lastWriteAt: number;
  #closed = false;

  constructor(exchange: Exchange, plane: Plane) {
    this.#exchange = exchange;
    this.#plane = plane;
    this.#lastWriteAt = plane.now();
    this.readable = new ReadableStream(
      {
        start: (controller) => {
          this.#controller = controller;
        },
        pull: () => this.#pull(),
        cancel: () => {
          this.#closed = true;
          exchange.cancel();
        },
      },
      { highWaterMark: 0 },
    );
    exchange.own(() => this.#close());
  }

  /** Writes the first heartbeat, so that the headers go out, and keeps them coming. */
  open(): void {
    this.#exchange.opened = true;
    this.#heartbeat();
    this.#watch();
  }

  /** Lets a comment out that carries the headers which were not known when the answer was opened. */
  explain(headers: Record<string, string>): void {
    this.#write(encoder.encode(`: tidegate ${JSON.stringify(headers)}\n\n`));
  }

  /** Takes over an answer; the first byte of it commits the request. */
  relay({ attempt, head }: Reply): void {
    const exchange = this.#exchange;
    const { endpoint, view, record, outputCap } = exchange;
    this.#attempt = attempt;
    if (outputCap !== null) {
      this.#mostDeltas = Math.floor((outputCap * (view?.choices ?? 1) * CAP_TENTHS) / 10);
    }
    if (record.stream) {
      const hideUsage = endpoint.usageOnRequest && view?.includeUsage !== true;
      this.#tap = new Tap(endpoint, attempt.facts, hideUsage, () => this.#token());
    }
    exchange.phase = "streaming";
    this.#lastChunkAt = this.#plane.now();
    if (!exchange.opened) this.#watch();
    exchange.opened = true;
    this.#chunk(head);
    this.#attached.resolve();
  }

  /** The client wants more: reads on until something goes out, or nothing ever will. Never rejects. */
  async #pull(): Promise<void> {
    this.#wanted = true;
    const before = this.#writes;
    if (this.#attempt === null) await this.#attached.promise;
    while (this.#writes === before && !this.#closed) {
      try {
        const result = await this.#attempt?.reader?.read();
        if (result?.done === false) this.#chunk(result.value);
        else {
          this.#attempt?.drained();
          this.#end();
        }
      } catch (error) {
        this.#broken(error);
      }
    }
    this.#wanted = false;
  }

  #token() {
    const now = this.#lastChunkAt;
    const exchange = this.#exchange;
    if (this.#attempt?.token(now) !== true) return;
    exchange.record.ttft = rounded(now - exchange.receivedAt);
    exchange.trace.event("first_token");
  }

  #write(bytes: Uint8Array, now: number = this.#plane.now()) {
    this.#writes++;
    this.#lastWriteAt = now;
    this.#controller.enqueue(bytes);
  }

  /** The engine's own bytes go out. */
  #pass(bytes: Uint8Array, now?: number) {
    this.onBytes?.(bytes);
    this.#write(bytes, now);
  }

  #chunk(chunk: Uint8Array) {
    if (this.#exchange.ended || chunk.length === 0) return;
    const now = this.#plane.now();
    this.#lastChunkAt = now;
    const attempt = this.#attempt;
    attempt?.permit.flowed(now, attempt.promptTokens + attempt.facts.deltas);
    if (this.#tap === null) return this.#pass(chunk, now);
    if (this.#heldBytes === 0 && !this.#blind && isOneEvent(chunk)) return this.#event(chunk, now);
    const ends = this.#cutter.cut(chunk);
    if (ends.length === 0) return this.#hold(chunk);
    // Offsets move by what was held back from earlier chunks.
    const before = this.#heldBytes;
    const bytes = before === 0 ? chunk : concat([...this.#held, chunk]);
    let from = this.#released;
    let blind = this.#blind;
    this.#held = [];
    this.#heldBytes = 0;
    this.#released = 0;
    this.#blind = false;
    let start = 0;
    for (const offset of ends) {
      const end = before + offset;
      const verdict = blind ? "pass" : this.#tap.frame(bytes.subarray(start, end));
      blind = false;
      // Too much, unless its beginning is out already.
      if (this.#runsOn() && from <= start) break;
      if (verdict === "hide" && from <= start) {
        if (from < start) this.#pass(bytes.subarray(from, start), now);
        from = end;
      }
      start = end;
      // Whatever an engine sends after its own error is no part of an answer.
      if (this.#attempt?.facts.error != null) break;
    }
    if (from < start) this.#pass(bytes.subarray(from, start), now);
    this.#afterEvents();
    if (this.#exchange.ended) return;
    if (start < bytes.length) this.#hold(bytes.subarray(start));
  }

  /** Most chunks are one whole event: nothing to cut, nothing to put together. */
  #event(chunk: Uint8Array, now: number) {
    const verdict = this.#tap?.frame(chunk);
    if (verdict !== "hide" && !this.#runsOn()) this.#pass(chunk, now);
    this.#afterEvents();
  }

  #runsOn(): boolean {
    return (this.#attempt?.facts.deltas ?? 0) > this.#mostDeltas;
  }

  /** What the events that have just gone out mean for the stream as a whole. */
  #afterEvents() {
    const facts = this.#attempt?.facts;
    if (facts === undefined) return;
    if (facts.error !== null) return this.#engineError(facts.error);
    if (this.#runsOn()) {
      const { outputCap } = this.#exchange;
      const what = `went on beyond ${outputCap} tokens and was stopped (maxOutputTokens)`;
      return this.#fail("output_limit_exceeded", what, `${facts.deltas} events`);
    }
    if (facts.ended) this.#exchange.after(END_GRACE_MS, () => this.#end());
  }

  /** Keeps back what is not a whole event yet; what is too long to wait for goes on as it comes. */
  #hold(bytes: Uint8Array) {
    const tooLong = this.#heldBytes > FRAME_BYTES || this.#blind;
    this.#held.push(bytes);
    this.#heldBytes += bytes.length;
    if (tooLong) this.#pass(bytes);
    else if (this.#heldBytes > FRAME_BYTES) for (const part of this.#held) this.#pass(part);
    else return;
    this.#released = this.#heldBytes;
    // The tap would like to read all of it, as far as memory allows.
    if (this.#heldBytes <= this.#exchange.config.limits.bufferBytes && !this.#blind) return;
    this.#held = [];
    this.#heldBytes = 0;
    this.#released = 0;
    this.#blind = true;
  }

  /** A clean end of the engine's body, or long enough after its end marker: is the answer whole? */
  #end() {
    const exchange = this.#exchange;
    const attempt = this.#attempt;
    if (exchange.ended || attempt === null) return;
    if (this.#tap !== null && !isWhole(attempt.facts, exchange.view?.choices ?? 1)) {
      return this.#fail(
        "upstream_incomplete",
        "ended its stream before the answer was whole",
        "end",
      );
    }
    // An end marker may lack its blank line. What has no whole line of data says nothing: some clients
    // (OpenAI's) take it for an event all the same, and fail on it.
    const rest = concat(this.#held);
    const isEvent = rest.at(-1) === LF && DATA_LINE.test(decoder.decode(rest));
    if (isEvent) this.#pass(rest.subarray(this.#released));
    exchange.complete();
  }

  /** The engine's connection broke. */
  #broken(error: unknown) {
    // Behind the end marker nothing is lost.
    if (this.#attempt?.facts.ended === true) return this.#end();
    this.#fail("upstream_incomplete", "broke off before the answer was whole", String(error));
  }

  #fail(code: keyof typeof FAULTS, what: string, detail: string) {
    const backend = quote(this.#attempt?.permit.target.backend ?? "");
    const error = new GatewayError(code, `backend ${backend} ${what}`, { detail });
    this.#exchange.fail(error, FAULTS[code]);
  }

  /** The engine's own error event has gone out: no second one follows it. */
  #engineError(words: string) {
    const backend = quote(this.#attempt?.permit.target.backend ?? "");
    const message = `backend ${backend} reported an error in its stream`;
    const error = new GatewayError("upstream_error", message, { detail: words.slice(0, 500) });
    this.#closed = true;
    this.#controller.close();
    this.#exchange.fail(error, "error_in_answer");
  }

  /** The exchange has ended: whatever ended it, the client learns of it here, once. */
  #close() {
    const { error, record, id, dialect } = this.#exchange;
    if (this.#closed) return;
    this.#closed = true;
    this.#attached.resolve();
    if (record.ending === "completed") return this.#controller.close();
    if (record.ending === "failed" && record.stream) {
      // A frame that was let go in part has to be closed before another can begin.
      const gap = this.#released > 0 || this.#blind ? "\n\n" : "";
      const event = error === null ? "" : dialect.errorEvent(error, id);
      this.#controller.enqueue(encoder.encode(gap + event));
      return this.#controller.close();
    }
    // A client that stopped reading never drains what is queued, and an answer that is cut has no
    // other way to say so: the connection has to go.
    this.#controller.error(error);
  }

  #heartbeat() {
    const waiting = waitingOf(this.#exchange);
    const reason = waiting?.reason ?? WORDS[this.#exchange.phase];
    const beat = { position: waiting?.position ?? null, reason, etaMs: waiting?.etaMs ?? null };
    this.#write(encoder.encode(`: tidegate ${JSON.stringify(beat)}\n\n`));
  }

  /** One clock per stream for everything that may not go on for ever. */
  #watch() {
    const { idleMs, clientMs } = this.#exchange.config.timeouts;
    const { heartbeatMs } = this.#exchange.config.queue;
    const now = this.#plane.now();
    let next = Infinity;
    const due = (since: number, limit: number): boolean => {
      if (limit === 0) return false;
      const left = since + limit - now;
      // A timer may fire a little early by this clock.
      if (left > 0.5) next = Math.min(next, left);
      return left <= 0.5;
    };
    // Asked for more, and nothing that was written meanwhile is still waiting to be taken.
    const reading = this.#wanted && (this.#controller.desiredSize ?? -1) >= 0;
    if (this.#attempt !== null) {
      if (!reading && due(this.#lastChunkAt, clientMs)) return this.#exchange.cancel();
      if (reading && this.#tap !== null && due(this.#lastChunkAt, idleMs)) {
        // Behind the end of its answer an engine may say nothing for as long as it likes.
        if (this.#attempt.facts.ended) return this.#end();
        this.#attempt.permit.stalled();
        return this.#fail(
          "upstream_timeout",
          `sent nothing for ${idleMs} ms (timeouts.idleMs)`,
          "stall",
        );
      }
    }
    // Only at an event boundary, and only to somebody who reads.
    const isOver = this.#attempt?.facts.ended === true;
    const mayBeat = reading && !isOver && this.#heldBytes === 0 && this.#exchange.record.stream;
    if (mayBeat && due(this.#lastWriteAt, heartbeatMs)) {
      this.#heartbeat();
      next = Math.min(next, heartbeatMs);
    }
    // Who reads now may stop in a moment.
    if (this.#attempt !== null && clientMs > 0) next = Math.min(next, clientMs);
    // What is in the way now may be gone in a moment.
    if (!mayBeat) next = Math.min(next, heartbeatMs || 1000, clientMs || 1000, 1000);
    if (next < Infinity) this.#exchange.after(next, () => this.#watch());
  }
}

/** Ends at its only blank line, with LF line ends. */
function isOneEvent(chunk: Uint8Array): boolean {
  const last = chunk.length - 1;
  return chunk[last] === LF && chunk.indexOf(LF) === last - 1;
}

const FAULTS = {
  upstream_incomplete: "incomplete",
  upstream_timeout: "timeout",
  // It works and takes no notice of the field, for this request or for every one: to leave it alone
  // for that would take the model from those whose answers end by themselves.
  output_limit_exceeded: "ended",
} as const;

const WORDS = {
  queued: "waiting for a slot",
  loading: "loading the model",
  connecting: "sent to the engine",
  first_token: "the engine is reading the prompt",
  streaming: "the engine is generating",
  retrying: "trying another backend",
} as const;
