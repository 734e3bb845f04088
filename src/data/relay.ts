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
const encoder = new TextEncoder();

/** `cancel` is called when the reader goes away; newer than the type in the DOM library. */
interface CancellableTransformer extends Transformer<Uint8Array, Uint8Array> {
  cancel?: (reason: unknown) => void;
}

/**
 * The body of a streamed answer. Bytes go through as they came, whole events at a time; a tap reads
 * along; exactly one ending is written. It may be opened, with comments, before there is an engine's
 * answer to relay.
 */
export class Relay {
  readonly readable: ReadableStream<Uint8Array>;
  readonly #exchange: Exchange;
  readonly #plane: Plane;
  readonly #writable: WritableStream<Uint8Array>;
  readonly #cutter = new FrameCutter();
  #controller!: TransformStreamDefaultController<Uint8Array>;
  #attempt: UpstreamAttempt | null = null;
  #tap: Tap | null = null;
  /** The frame that is not whole yet, and how much of it has been let go already. */
  #held: Uint8Array[] = [];
  #heldBytes = 0;
  #released = 0;
  /** The beginning of this frame was too much to keep: the tap cannot read it. */
  #blind = false;
  #lastChunkAt = 0;
  #lastWriteAt: number;
  #terminated = false;

  constructor(exchange: Exchange, plane: Plane) {
    this.#exchange = exchange;
    this.#plane = plane;
    this.#lastWriteAt = plane.now();
    const transformer: CancellableTransformer = {
      start: (controller) => {
        this.#controller = controller;
      },
      transform: (chunk) => this.#chunk(chunk),
      flush: () => this.#end(),
      cancel: () => exchange.cancel(),
    };
    // One chunk on the readable side: `desiredSize` then tells whether the client reads.
    const stream = new TransformStream(transformer, undefined, { highWaterMark: 1 });
    this.readable = stream.readable;
    this.#writable = stream.writable;
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
  relay(reply: Reply): void {
    const { attempt, head, rest } = reply;
    const exchange = this.#exchange;
    this.#attempt = attempt;
    const hideUsage = exchange.endpoint.usageOnRequest && exchange.view?.includeUsage !== true;
    this.#tap = new Tap(exchange.endpoint, attempt.facts, hideUsage, () => this.#token());
    exchange.phase = "streaming";
    this.#lastChunkAt = this.#plane.now();
    if (!exchange.opened) this.#watch();
    exchange.opened = true;
    this.#chunk(head);
    if (rest === null || exchange.ended) return this.#end();
    // Aborting the signal also cancels `rest`, which its reader can no longer be asked to do.
    rest
      .pipeTo(this.#writable, { preventAbort: true, signal: attempt.signal })
      .catch((error: unknown) => this.#broken(error));
  }

  #token() {
    const now = this.#lastChunkAt;
    const exchange = this.#exchange;
    exchange.lastTokenAt = now;
    if (exchange.firstTokenAt !== null) return;
    exchange.firstTokenAt = now;
    if (this.#attempt !== null) this.#attempt.firstTokenAt = now;
    exchange.record.ttft = rounded(now - exchange.receivedAt);
    exchange.trace.event("first_token");
  }

  #write(bytes: Uint8Array, now: number = this.#plane.now()) {
    this.#lastWriteAt = now;
    this.#controller.enqueue(bytes);
  }

  #chunk(chunk: Uint8Array) {
    if (this.#exchange.ended || chunk.length === 0) return;
    const now = this.#plane.now();
    this.#lastChunkAt = now;
    this.#attempt?.permit.flowed(now);
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
      const verdict = blind ? "pass" : this.#tap?.frame(bytes.subarray(start, end));
      blind = false;
      if (verdict === "hide" && from <= start) {
        if (from < start) this.#write(bytes.subarray(from, start), now);
        from = end;
      }
      start = end;
      if (this.#attempt !== null && this.#attempt.facts.error !== null) {
        // Whatever an engine sends after its own error is no part of an answer.
        this.#write(bytes.subarray(from, end), now);
        return this.#engineError(this.#attempt.facts.error);
      }
    }
    if (from < start) this.#write(bytes.subarray(from, start), now);
    if (start < bytes.length) this.#hold(bytes.subarray(start));
  }

  /** Keeps back what is not a whole event yet; what is too long to wait for goes on as it comes. */
  #hold(bytes: Uint8Array) {
    const tooLong = this.#heldBytes > FRAME_BYTES || this.#blind;
    this.#held.push(bytes);
    this.#heldBytes += bytes.length;
    if (tooLong) this.#write(bytes);
    else if (this.#heldBytes > FRAME_BYTES) for (const part of this.#held) this.#write(part);
    else return;
    this.#released = this.#heldBytes;
    // The tap would like to read all of it, as far as memory allows.
    if (this.#heldBytes <= this.#plane.config.limits.bufferBytes && !this.#blind) return;
    this.#held = [];
    this.#heldBytes = 0;
    this.#released = 0;
    this.#blind = true;
  }

  /** A clean end of the engine's body: is the answer whole? */
  #end() {
    const exchange = this.#exchange;
    if (exchange.ended) return;
    const facts = this.#attempt?.facts;
    const rest = concat(this.#held);
    if (facts !== undefined && isWhole(facts)) {
      // An end marker may lack its blank line. An event without one is dropped, as clients do.
      if (rest.at(-1) === LF) this.#write(rest.subarray(this.#released));
      this.#terminated = true;
      exchange.complete();
      this.#controller.terminate();
      return;
    }
    this.#fail("upstream_incomplete", "ended its stream before the answer was whole", "clean end");
  }

  /** The engine's body broke, or the client's side went away. */
  #broken(error: unknown) {
    const exchange = this.#exchange;
    if (exchange.ended) return;
    // A connection that breaks behind the end marker has lost nothing.
    if (this.#attempt?.facts.ended === true) return this.#end();
    this.#fail("upstream_incomplete", "broke off before the answer was whole", String(error));
  }

  #fail(code: "upstream_incomplete" | "upstream_timeout", what: string, detail: string) {
    const backend = quote(this.#attempt?.permit.target.backend ?? "");
    const error = new GatewayError(code, `backend ${backend} ${what}`, { detail });
    this.#exchange.fail(error, "failure");
  }

  #engineError(words: string) {
    const backend = quote(this.#attempt?.permit.target.backend ?? "");
    const message = `backend ${backend} reported an error in its stream`;
    const error = new GatewayError("upstream_error", message, { detail: words.slice(0, 500) });
    this.#terminated = true;
    this.#exchange.fail(error, "failure");
    this.#controller.terminate();
  }

  /** The exchange has ended: whatever ended it, the client learns of it here, once. */
  #close() {
    const { error, record, id, endpoint } = this.#exchange;
    if (this.#terminated) return;
    this.#terminated = true;
    if (error !== null && record.ending === "failed") {
      // A frame that was let go in part has to be closed before another can begin.
      const gap = this.#released > 0 || this.#blind ? "\n\n" : "";
      this.#controller.enqueue(encoder.encode(gap + endpoint.dialect.errorEvent(error, id)));
      this.#controller.terminate();
    } else if (record.ending === "cancelled") {
      // A client that stopped reading never drains what is queued: the connection has to go.
      this.#controller.error(error);
    }
  }

  #heartbeat() {
    const waiting = waitingOf(this.#exchange);
    const reason = waiting?.reason ?? WORDS[this.#exchange.phase];
    const beat = { position: waiting?.position ?? null, reason };
    this.#write(encoder.encode(`: tidegate ${JSON.stringify(beat)}\n\n`));
  }

  /** One clock per stream for everything that may not go on for ever. */
  #watch() {
    const { idleMs, clientMs } = this.#plane.config.timeouts;
    const { heartbeatMs } = this.#plane.config.queue;
    const now = this.#plane.now();
    let next = Infinity;
    const due = (since: number, limit: number): boolean => {
      if (limit === 0) return false;
      const left = since + limit - now;
      // A timer may fire a little early by this clock.
      if (left > 0.5) next = Math.min(next, left);
      return left <= 0.5;
    };
    const reading = (this.#controller.desiredSize ?? 0) > 0;
    if (this.#attempt !== null) {
      if (!reading && due(this.#lastChunkAt, clientMs)) return this.#exchange.cancel();
      if (reading && due(this.#lastChunkAt, idleMs)) {
        return this.#fail(
          "upstream_timeout",
          `sent nothing for ${idleMs} ms (timeouts.idleMs)`,
          "stall",
        );
      }
    }
    // Only at an event boundary, and only to somebody who reads.
    const mayBeat = reading && this.#heldBytes === 0;
    if (mayBeat && due(this.#lastWriteAt, heartbeatMs)) {
      this.#heartbeat();
      next = Math.min(next, heartbeatMs);
    }
    // What is in the way now may be gone in a moment.
    if (!mayBeat) next = Math.min(next, heartbeatMs || 1000, clientMs || 1000, 1000);
    if (next < Infinity) this.#exchange.after(next, () => this.#watch());
  }
}

const WORDS = {
  queued: "waiting for a slot",
  connecting: "sent to the engine",
  first_token: "the engine is reading the prompt",
  streaming: "the engine is generating",
  retrying: "trying another backend",
} as const;

/**
 * An answer in one piece that is too large to hold: its bytes, unseen. When it breaks off the
 * connection breaks off too, since nothing else would be true.
 */
export function relayUnseen(
  exchange: Exchange,
  plane: Plane,
  reply: Reply,
): ReadableStream<Uint8Array> {
  const { attempt, head, rest } = reply;
  exchange.phase = "streaming";
  exchange.opened = true;
  const transformer: CancellableTransformer = {
    start: (controller) => controller.enqueue(head),
    transform(chunk, controller) {
      attempt.permit.flowed(plane.now());
      controller.enqueue(chunk);
    },
    flush: () => exchange.complete(),
    cancel: () => exchange.cancel(),
  };
  const stream = new TransformStream(transformer);
  rest?.pipeTo(stream.writable, { signal: attempt.signal }).catch((error: unknown) => {
    const { backend } = attempt.permit.target;
    const message = `backend ${quote(backend)} broke off before its answer was whole`;
    const broken = new GatewayError("upstream_incomplete", message, { detail: String(error) });
    exchange.fail(broken, "failure");
  });
  return stream.readable;
}
