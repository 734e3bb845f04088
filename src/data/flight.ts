import { asGatewayError } from "../errors.ts";
import type { Answer } from "../stores/answers.ts";
import { deadlineOf, lateness, reconsider } from "./admit.ts";
import { Exchange, sooner } from "./exchange.ts";
import { lateFault } from "./forward.ts";
import type { Reply } from "./inspect.ts";
import type { Plane } from "./plane.ts";

/** What came of a flight for one of those who waited for it. */
export type Landed =
  | { type: "answer"; answer: Answer; kept: boolean }
  /** Too large to hold: it is passed on as it comes, to this one alone. */
  | { type: "reply"; reply: Reply; exchange: Exchange }
  /** It went to somebody else: ask for yourself. */
  | { type: "alone" };

/** The answer, whether it had been kept somewhere already; or the beginning of one that is too large. */
export type Work = (exchange: Exchange) => Promise<{ answer: Answer; kept: boolean } | Reply>;

/** A deadline that is so much later is worth asking again for a place in the queue. */
const NEWS_MS = 1000;

interface Waiter {
  resolve: (landed: Landed) => void;
  reject: (error: unknown) => void;
}

/**
 * The upstream work of one deterministic request, for everyone who asks for the same while it is
 * under way. Its own exchange owns reservation, slot, permit and upstream; those who wait own nothing
 * but their subscription. Anyone may leave; when the last one does, the work is stopped.
 */
export class Flight {
  readonly exchange: Exchange;
  readonly #plane: Plane;
  readonly #key: string;
  readonly #waiters = new Map<Exchange, Waiter>();
  #heir: Exchange | null = null;

  constructor(plane: Plane, key: string, leader: Exchange) {
    this.#plane = plane;
    this.#key = key;
    const exchange = new Exchange(plane, leader.endpoint, leader);
    this.exchange = exchange;
    exchange.onEnd = () => this.#ended();
    const { body } = leader;
    if (body === null) return;
    // Held for the flight from now on: the leader may leave before it.
    const held = body.bytes.length;
    plane.heldBytes += held;
    leader.dropBody();
    const drop = exchange.own(() => {
      plane.heldBytes -= held;
    });
    exchange.body = { ...body, drop };
  }

  /** Requests that wait for it. */
  get size(): number {
    return this.#waiters.size;
  }

  /**
   * Waits for the answer, in the queue as long as this member may. The flight takes the best priority
   * and the latest deadline of all.
   */
  join(member: Exchange): Promise<Landed> {
    const { exchange } = this;
    member.flight = exchange;
    const priority = sooner(exchange.priority, member.priority);
    const deadlineAt = deadlineOf(member);
    const isLater = deadlineAt - this.#deadlineAt > NEWS_MS;
    const isNews = isLater || priority !== exchange.priority;
    exchange.priority = priority;
    if (isLater) exchange.deadlineAt = deadlineAt;
    if (isNews) reconsider(exchange);
    return new Promise((resolve, reject) => {
      this.#waiters.set(member, { resolve, reject });
      const leave = member.own(() => {
        this.#waiters.delete(member);
        // Whoever awaits finds its exchange ended.
        resolve({ type: "alone" });
        if (exchange.ended) return;
        const isLast = this.#waiters.size === 0;
        if (isLast) this.#abandon(member);
        this.#tell(member, isLast);
      });
      member.after(Math.max(0, deadlineAt - this.#plane.now()), () => {
        // Its own time is up, and not only this one's: it may find a smaller model.
        if (deadlineAt >= this.#deadlineAt) return;
        const late = lateness(member, exchange);
        if (late === null) return;
        reject(late);
        leave();
      });
    });
  }

  get #deadlineAt(): number {
    return this.exchange.deadlineAt ?? -Infinity;
  }

  /** Nobody waits any more. For whose time it took too long says so of the engine, as without a flight. */
  #abandon(last: Exchange) {
    const { error } = last;
    if (error?.cause === "upstream_timeout") this.exchange.fail(error, lateFault(last));
    else this.exchange.cancel();
  }

  /** Does the work. Never rejects: everyone who waits is told. */
  async start(work: Work): Promise<void> {
    const { exchange } = this;
    try {
      const done = await work(exchange);
      exchange.check();
      if ("answer" in done) this.#land(done);
      else this.#passOn(done);
    } catch (error) {
      exchange.fail(exchange.error ?? asGatewayError(error));
      // Also where the end itself went wrong: nobody waits for ever.
      for (const { reject } of this.#waiters.values()) reject(error);
    }
  }

  #land(done: { answer: Answer; kept: boolean }) {
    this.exchange.complete();
    for (const { resolve } of this.#waiters.values()) resolve({ type: "answer", ...done });
  }

  /** The first who still waits gets it, the others have to ask for themselves. */
  #passOn(reply: Reply) {
    this.#close();
    // What is under way cannot be asked for again.
    this.exchange.dropBody();
    for (const [member, { resolve }] of this.#waiters) {
      if (this.#heir === null) {
        this.#heir = member;
        this.#tell(member, true);
        resolve({ type: "reply", reply, exchange: this.exchange });
      } else {
        this.#waiters.delete(member);
        member.flight = null;
        resolve({ type: "alone" });
      }
    }
  }

  /**
   * What the exchange learned, for the headers and the records of those who waited.
   *
   * @param isOne it is told what the engine did as well: once, so that records can be summed up.
   */
  #tell(member: Exchange, isOne: boolean) {
    const { record, timing, headersOut, pinned } = this.exchange;
    member.record.backend_id = record.backend_id;
    member.record.reason = record.reason;
    member.record.queue_ms = record.queue_ms;
    member.record.load_ms = record.load_ms;
    member.record.model = record.model;
    member.degraded = this.exchange.degraded;
    if (!isOne) return;
    member.record.attempts = record.attempts;
    member.record.tokens_generated = record.tokens_generated;
    member.record.tokens_input = record.tokens_input;
    member.record.tokens_estimated = record.tokens_estimated;
    const { accept = 0, cache = 0 } = member.timing;
    Object.assign(member.timing, timing, { accept, cache });
    Object.assign(member.headersOut, headersOut);
    member.pinned = pinned;
  }

  /** Nobody joins from now on. */
  #close() {
    if (this.#plane.flights.get(this.#key) === this) this.#plane.flights.delete(this.#key);
  }

  #ended() {
    const { error, record } = this.exchange;
    this.#close();
    let isFirst = true;
    for (const [member, { reject }] of this.#waiters) {
      this.#tell(member, isFirst);
      isFirst = false;
      if (member === this.#heir) {
        if (error === null) member.complete();
        else if (record.ending === "cancelled") member.cancel();
        else member.fail(error);
      } else if (error !== null) reject(error);
    }
  }
}
