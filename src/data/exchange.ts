import type { Config } from "../config.ts";
import { judge, SUCCESS, type Fault, type Verdict } from "../core/outcome.ts";
import type { Snapshot } from "../core/snapshot.ts";
import { anthropic } from "../dialects/anthropic.ts";
import type { AnswerFacts, Dialect, Endpoint, View } from "../dialects/dialect.ts";
import { GatewayError } from "../errors.ts";
import {
  newRecord,
  rounded,
  type Ending,
  type Phase,
  type RequestRecord,
} from "../telemetry/record.ts";
import type { RequestTrace } from "../telemetry/tracing.ts";
import type { Body } from "./accept.ts";
import type { Plane } from "./plane.ts";

/** One request sent to one backend, as the exchange sees it. */
export interface Attempt {
  readonly facts: AnswerFacts;
  /** Mean time between two tokens; null where that cannot be told. */
  interTokenMs(): number | null;
  /** Closes the upstream, gives the permit back, ends the span. Idempotent. */
  end(verdict: Verdict, cause: string | null): void;
}

/** Where the time went, milliseconds; shown in `server-timing`. */
export interface Timing {
  accept?: number;
  queue?: number;
  retry?: number;
  connect?: number;
  first_token?: number;
  generate?: number;
}

/**
 * One request from identify to the end of its body. Everything acquired hangs on it, and `settle`,
 * which acts once, is the only place that releases.
 */
export class Exchange {
  readonly id: string = crypto.randomUUID();
  readonly endpoint: Endpoint;
  /** How this caller's errors are worded: Anthropic's clients say who they are on every path. */
  readonly dialect: Dialect;
  /** The configuration as this request found it: a reload changes nothing for it. */
  readonly config: Config;
  /** The client's headers. */
  readonly headers: Headers;
  /** Path and query as they go to the engine. */
  readonly path: string;
  /** The fleet as this request sees it; newer only when it has to choose again. */
  snapshot: Snapshot;
  readonly record: RequestRecord;
  readonly trace: RequestTrace;
  readonly timing: Timing = { accept: 0, queue: 0 };
  /** On the clock of the plane. */
  readonly receivedAt: number;

  phase: Phase = "queued";
  view: View | null = null;
  body: Body | null = null;
  attempt: Attempt | null = null;
  /** Status and headers are out, by a heartbeat or by the engine's first byte. */
  opened = false;

  readonly #plane: Plane;
  readonly #releases = new Set<() => void>();
  #error: GatewayError | null = null;
  #ended = false;

  constructor(plane: Plane, endpoint: Endpoint, request: Request) {
    // Null where the Host header is no host: whoever checks it refuses the request.
    const url = URL.parse(request.url);
    this.#plane = plane;
    this.config = plane.config;
    this.endpoint = endpoint;
    this.dialect = request.headers.has("anthropic-version") ? anthropic : endpoint.dialect;
    this.headers = request.headers;
    this.path = endpoint.path + (url?.search ?? "");
    this.snapshot = plane.snapshot();
    this.receivedAt = plane.now();
    this.record = newRecord(this.id, endpoint.path);
    this.record.client_request_id = request.headers.get("x-request-id")?.slice(0, 100) ?? null;
    this.trace = plane.tracing.request("POST", endpoint.path, request.headers);
    this.record.trace_id = this.trace.traceId;
    plane.exchanges.add(this);
  }

  get ended(): boolean {
    return this.#ended;
  }

  /** Why it ended early; null while it runs and when it completed. */
  get error(): GatewayError | null {
    return this.#error;
  }

  /** To be asked after every `await`: throws when somebody ended the exchange meanwhile. */
  check(): void {
    if (this.#ended) throw this.#error ?? new GatewayError("client_closed_request", "ended");
  }

  /**
   * Hangs something acquired on the exchange.
   * @returns releases it earlier; calling it again does nothing.
   */
  own(release: () => void): () => void {
    // A thing acquired too late is returned at once.
    if (this.#ended) {
      release();
      return () => {};
    }
    this.#releases.add(release);
    return () => {
      if (this.#releases.delete(release)) release();
    };
  }

  /** The answer is under way and no retry can follow: the client's bytes are not needed any more. */
  dropBody(): void {
    this.body?.drop();
    this.body = null;
  }

  /** Runs `act` after `ms` unless the exchange ends before. @returns stops the clock. */
  after(ms: number, act: () => void): () => void {
    const timer = setTimeout(
      () => {
        stop();
        act();
      },
      Math.min(ms, 2 ** 31 - 1),
    );
    const stop = this.own(() => clearTimeout(timer));
    return stop;
  }

  /** The client left. SDKs do so at the end marker already: then the answer was whole. */
  cancel(): void {
    if (this.phase === "streaming" && this.attempt?.facts.ended === true) return this.complete();
    const error = new GatewayError("client_closed_request", "the client left");
    this.#settle("cancelled", error, this.phase, judge("ended"));
  }

  /**
   * Ended by an error: ours, the engine's, a deadline or the shutdown.
   * @param fault what it says of the backend.
   */
  fail(error: GatewayError, fault: Fault = "ended"): void {
    this.#settle("failed", error, error.cause, judge(fault));
  }

  /** The whole answer is out. */
  complete(): void {
    this.#settle("completed", null, null, SUCCESS);
  }

  #settle(ending: Ending, error: GatewayError | null, cause: string | null, verdict: Verdict) {
    if (this.#ended) return;
    this.#ended = true;
    this.#error = error;
    const { record, attempt } = this;
    record.ending = ending;
    record.cause = cause;
    record.latency_ms = rounded(this.#plane.now() - this.receivedAt);
    if (record.status === 0) record.status = error?.status ?? 200;
    if (attempt !== null) fillTokens(record, attempt.facts);
    attempt?.end(verdict, ending === "failed" ? cause : null);
    for (const release of this.#releases) release();
    this.#releases.clear();
    this.body = null;
    this.#plane.exchanges.delete(this);
    this.#report(error);
  }

  #report(error: GatewayError | null) {
    const { record, attempt, trace } = this;
    const { log, metrics } = this.#plane;
    if (record.ending === "cancelled") trace.event("abort", { phase: record.cause ?? "" });
    if (record.cause === "upstream_incomplete") trace.event("truncated");
    if (record.cause === "upstream_timeout") trace.event("stall");
    trace.end(record);
    log.request(record, error?.detail ?? null);
    metrics?.request(record, {
      cachedTokens: attempt?.facts.usage?.cached ?? null,
      interTokenMs: attempt?.interTokenMs() ?? null,
      dispatched: attempt !== null,
    });
  }

  /** The headers that explain this answer, as far as they are known now. */
  explain(): Record<string, string> {
    const { record, timing } = this;
    const headers: Record<string, string> = {
      "x-request-id": this.id,
      "x-tidegate-cache": record.cache,
    };
    if (this.dialect === anthropic) headers["request-id"] = this.id;
    if (record.backend_id === null) return headers;
    headers["x-tidegate-backend"] = headerText(record.backend_id);
    headers["x-tidegate-model"] = headerText(record.model ?? "");
    headers["x-tidegate-reason"] = record.reason ?? "";
    headers["x-tidegate-attempts"] = String(record.attempts);
    let serverTiming = "";
    for (const [name, duration] of Object.entries(timing)) {
      serverTiming += `${serverTiming === "" ? "" : ", "}${name};dur=${rounded(duration)}`;
    }
    headers["server-timing"] = serverTiming;
    return headers;
  }
}

/** Header values are Latin-1 at most; a model's name may be anything. */
function headerText(text: string): string {
  return text.toWellFormed().replaceAll(/[^\u0020-\u007E]/gu, encodeURIComponent);
}

function fillTokens(record: RequestRecord, facts: AnswerFacts) {
  if (facts.usage !== null) {
    record.tokens_generated = facts.usage.output;
    record.tokens_input = facts.usage.input;
  } else if (record.stream) {
    record.tokens_generated = facts.deltas;
    record.tokens_estimated = true;
  }
}
