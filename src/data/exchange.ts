import { tenantOf, type Config, type TenantConfig } from "../config.ts";
import type { PromptSize } from "../core/estimate.ts";
import { CLASSES, type Priority } from "../core/fairness.ts";
import type { Prompt } from "../core/lanes.ts";
import { judge, SUCCESS, type Fault, type Verdict } from "../core/outcome.ts";
import { visibleTo, type Snapshot } from "../core/snapshot.ts";
import { anthropic } from "../dialects/anthropic.ts";
import {
  outputTokens,
  type AnswerFacts,
  type Dialect,
  type Endpoint,
  type View,
} from "../dialects/dialect.ts";
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
import { count, report } from "./report.ts";
import { NO_WISHES, wishesOf, type Wishes } from "./wishes.ts";

/** One request sent to one backend, as the exchange sees it. */
export interface Attempt {
  readonly facts: AnswerFacts;
  /** Mean time between two tokens; null where that cannot be told. */
  interTokenMs(): number | null;
  /** Closes the upstream, gives the permit back, ends the span. Idempotent. */
  end(verdict: Verdict, cause: string | null): void;
}

/** Which model answers, instead of which, and why. */
export interface Degraded {
  served: string;
  asked: string;
  reason: string;
}

/** Where the time went, milliseconds; shown in `server-timing`. */
export interface Timing {
  accept?: number;
  cache?: number;
  queue?: number;
  load?: number;
  retry?: number;
  connect?: number;
  first_token?: number;
  generate?: number;
}

/** The one that is served first. */
export function sooner(a: Priority, b: Priority): Priority {
  return CLASSES.indexOf(a) <= CLASSES.indexOf(b) ? a : b;
}

/**
 * One request from identify to the end of its body. Everything acquired hangs on it, and `settle`,
 * which acts once, is the only place that releases.
 *
 * A flight has one too, without a client: made from the exchange that it begins for, it does that
 * one's work under the same trace and leaves the telling to those who wait for it.
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
  readonly timing: Timing = { accept: 0, cache: 0, queue: 0 };
  /** On the clock of the plane. */
  readonly receivedAt: number;

  /** Whose request it is, and what that tenant may; known once it is identified. */
  tenant = "default";
  policy: TenantConfig;
  priority: Priority = "default";
  wishes: Wishes = NO_WISHES;
  /** Cap on the tokens of the answer, from model and tenant; null for none. */
  outputCap: number | null = null;
  /** Tokens that prompt and answer are expected to be. */
  expectedTokens = 0;
  /** How much there is to read. */
  promptSize: PromptSize = { bytes: 0, messages: 0, images: 0 };
  /** Of the prompt's tokens those that the engine had computed before. */
  cachedTokens = 0;
  /** Of a flight: the latest time up to which any of those who wait for it may wait for a slot. */
  deadlineAt: number | null = null;
  /** Whose turn it is when several wait: the tenant's, or where there are none the session's or address's. */
  flow = "default";
  /** What there is to compute before the first token, and where it may have been computed before. */
  prompt: Prompt | null = null;
  /** What a model must be able to do to answer it, in the words of the snapshot's capabilities. */
  needs: string[] = [];
  /** A smaller model answers instead of the one that was asked for. */
  degraded: Degraded | null = null;
  /** An answer in one piece is held up to this, bytes; a larger one is passed on as it comes. */
  holdBytes: number;
  phase: Phase = "queued";
  /** The parsed body, until it is known whether its answer may be kept. */
  fields: Record<string, unknown> | null = null;
  view: View | null = null;
  body: Body | null = null;
  /** The one under way. */
  attempt: Attempt | null = null;
  lastAttempt: Attempt | null = null;
  /** Status and headers are out, by a heartbeat or by the engine's first byte. */
  opened = false;
  /** The flight whose answer this request waits for: what it acquires is the flight's. */
  flight: Exchange | null = null;
  /** What of the body the engine of the last attempt did not get. */
  pinned: readonly string[] = [];
  /** Further headers of the answer: rate limits, the age of what was kept. */
  readonly headersOut: Record<string, string> = {};
  /** Called once, when everything has been released. */
  onEnd: () => void;

  readonly #plane: Plane;
  readonly #releases = new Set<() => void>();
  #error: GatewayError | null = null;
  #ended = false;

  /** @param origin a client's request, or the exchange that a flight begins for. */
  constructor(plane: Plane, endpoint: Endpoint, origin: Request | Exchange) {
    const leader = origin instanceof Exchange ? origin : null;
    this.#plane = plane;
    this.endpoint = endpoint;
    this.headers = origin.headers;
    this.dialect = origin.headers.has("anthropic-version") ? anthropic : endpoint.dialect;
    this.receivedAt = plane.now();
    this.record = newRecord(this.id, endpoint.path);
    this.config = leader?.config ?? plane.config;
    this.holdBytes = this.config.limits.bufferBytes;
    this.policy = leader?.policy ?? tenantOf(plane.config, this.tenant);
    this.snapshot = leader?.snapshot ?? plane.snapshot();
    if (leader !== null) {
      this.path = leader.path;
      this.trace = leader.trace;
      this.tenant = leader.tenant;
      this.priority = leader.priority;
      this.wishes = leader.wishes;
      this.outputCap = leader.outputCap;
      this.view = leader.view;
      this.promptSize = leader.promptSize;
      this.prompt = leader.prompt;
      this.flow = leader.flow;
      this.needs = leader.needs;
      this.record.model = leader.record.model;
      this.onEnd = () => {};
      return;
    }
    const request = origin as Request;
    // Null where the Host header is no host: whoever checks it refuses the request.
    this.path = endpoint.path + (URL.parse(request.url)?.search ?? "");
    this.record.client_request_id = this.headers.get("x-request-id")?.slice(0, 100) ?? null;
    this.trace = plane.tracing.request("POST", endpoint.path, this.headers);
    this.record.trace_id = this.trace.traceId;
    this.onEnd = () => report(this, plane);
    plane.exchanges.add(this);
  }

  /**
   * From here on it is this tenant's: what it may see, and how urgent it is.
   *
   * @throws GatewayError `invalid_parameter` for a wish that does not exist.
   */
  identified(tenant: string): void {
    this.tenant = tenant;
    this.record.tenant = tenant;
    this.policy = tenantOf(this.config, tenant);
    this.priority = this.policy.priority;
    this.wishes = wishesOf(this.headers);
    const asked = this.wishes.priority ?? this.priority;
    // It can be lowered only.
    if (sooner(this.priority, asked) === this.priority) this.priority = asked;
    this.renew();
  }

  /** Takes the newest snapshot, as far as the tenant may see it. */
  renew(): void {
    this.snapshot = visibleTo(this.#plane.snapshot(), this.policy.models);
  }

  /** Tokens that the prompt is expected to be. */
  get promptTokens(): number {
    return this.prompt?.tokens ?? 0;
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
    const { phase, record } = this.flight ?? this;
    const { backend_id, model } = record;
    const isLoading =
      phase === "queued" && this.#plane.fleet.isLoading(backend_id ?? "", model ?? "");
    this.#settle("cancelled", error, isLoading ? "loading" : phase, judge("ended"));
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

  /** The attempt under way is over; the record keeps what it told of tokens. */
  endAttempt(verdict: Verdict, cause: string | null): void {
    const { attempt, record } = this;
    if (attempt === null) return;
    this.lastAttempt = attempt;
    this.attempt = null;
    const { usage } = attempt.facts;
    const counted = outputTokens(attempt.facts);
    if (usage !== null || record.stream) {
      record.tokens_generated = (record.tokens_generated ?? 0) + counted;
    }
    if (usage !== null) record.tokens_input = (record.tokens_input ?? 0) + usage.input;
    record.tokens_estimated ||= record.stream && counted !== usage?.output;
    this.cachedTokens += usage?.cached ?? 0;
    attempt.end(verdict, cause);
  }

  #settle(ending: Ending, error: GatewayError | null, cause: string | null, verdict: Verdict) {
    if (this.#ended) return;
    this.#ended = true;
    this.#error = error;
    const { record } = this;
    record.ending = ending;
    record.cause = cause;
    record.latency_ms = rounded(this.#plane.now() - this.receivedAt);
    if (record.status === 0) record.status = error?.status ?? 200;
    this.endAttempt(verdict, ending === "failed" ? cause : null);
    // What a flight did is counted as its own.
    if (record.attempts > 0 && this.flight === null) count(this, this.#plane);
    for (const release of this.#releases) release();
    this.#releases.clear();
    this.body = null;
    this.#plane.exchanges.delete(this);
    this.onEnd();
  }

  /** The headers that explain this answer, as far as they are known now. */
  explain(): Record<string, string> {
    const { record, timing } = this;
    const headers: Record<string, string> = {
      "x-request-id": this.id,
      "x-tidegate-cache": record.cache,
    };
    if (this.dialect === anthropic) headers["request-id"] = this.id;
    Object.assign(headers, this.headersOut);
    if (record.backend_id === null) return headers;
    headers["x-tidegate-backend"] = headerText(record.backend_id);
    headers["x-tidegate-model"] = headerText(record.model ?? "");
    headers["x-tidegate-reason"] = record.reason ?? "";
    if (this.degraded !== null) {
      const { asked, reason } = this.degraded;
      headers["x-tidegate-degraded"] = `asked=${headerText(asked)};reason=${reason}`;
    }
    headers["x-tidegate-attempts"] = String(record.attempts);
    if (this.pinned.length > 0) headers["x-tidegate-pinned"] = this.pinned.join(", ");
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
