import { judge, type Fault, type Verdict } from "../core/outcome.ts";
import { emptyFacts, outputTokens, type AnswerFacts } from "../dialects/dialect.ts";
import { GatewayError } from "../errors.ts";
import type { Permit } from "../fleet/permit.ts";
import type { AttemptTrace } from "../telemetry/tracing.ts";
import type { Attempt } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/** An attempt that brought no answer. Nothing of it has reached the client. */
export class AttemptFailed extends Error {
  override readonly name = "AttemptFailed";
  readonly error: GatewayError;
  readonly fault: Fault;

  constructor(fault: Fault, error: GatewayError) {
    super(error.message);
    this.error = error;
    this.fault = fault;
  }

  get verdict(): Verdict {
    return judge(this.fault);
  }
}

/** One request to one backend: the permit, the connection and the span, ended together. */
export class UpstreamAttempt implements Attempt {
  readonly facts: AnswerFacts = emptyFacts();
  readonly permit: Permit;
  readonly sentAt: number;
  /** Tokens that its prompt is expected to be. */
  promptTokens = 0;
  /** When tokens came, on the clock of the plane. */
  #firstTokenAt: number | null = null;
  #lastTokenAt: number | null = null;
  /** Held to the end: Deno forgets to abort a fetch whose Response has been collected. */
  response: Response | null = null;
  reader: ReadableStreamDefaultReader<Uint8Array> | null = null;

  readonly #plane: Plane;
  readonly #controller = new AbortController();
  readonly #trace: AttemptTrace;
  #ended = false;
  #drained = false;

  constructor(plane: Plane, permit: Permit, trace: AttemptTrace) {
    this.#plane = plane;
    this.permit = permit;
    this.#trace = trace;
    this.sentAt = plane.now();
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  get traceHeaders(): Record<string, string> {
    return this.#trace.headers;
  }

  /** The answer's headers are here; one that comes too late is closed at once. */
  hold(response: Response): void {
    this.response = response;
    if (this.#ended) this.close(ATTEMPT_ENDED);
  }

  /** The body has been read to its end: there is nothing to close any more. */
  drained(): void {
    this.#drained = true;
  }

  /** Stops the engine. Bun needs the abort, Deno the cancelled body. */
  close(reason: GatewayError): void {
    this.#controller.abort(reason);
    const body = this.reader ?? this.response?.body;
    body?.cancel(reason).catch(() => {});
  }

  /** A token came. @returns true for the first. */
  token(at: number): boolean {
    this.#lastTokenAt = at;
    if (this.#firstTokenAt !== null) return false;
    this.#firstTokenAt = at;
    return true;
  }

  interTokenMs(): number | null {
    const tokens = this.facts.usage?.output ?? this.facts.deltas;
    if (this.#firstTokenAt === null || this.#lastTokenAt === null || tokens < 2) return null;
    return (this.#lastTokenAt - this.#firstTokenAt) / (tokens - 1);
  }

  end(verdict: Verdict, cause: string | null): void {
    if (this.#ended) return;
    this.#ended = true;
    if (!this.#drained) this.close(ATTEMPT_ENDED);
    const first = this.#firstTokenAt;
    const ttftMs = first === null ? null : first - this.sentAt;
    this.#trace.end(this.facts, ttftMs, cause);
    this.#plane.metrics?.attempt(this.permit.target.backend, verdict.outcome);
    const interTokenMs = this.interTokenMs();
    // Tokens that came in one piece tell no speed.
    const lasted = (this.#lastTokenAt ?? 0) - (this.#firstTokenAt ?? 0);
    const tokensPerSecond = interTokenMs === null || lasted < 1 ? null : 1000 / interTokenMs;
    const tokens = this.#tokens(verdict);
    const promptTokens = this.facts.usage?.input ?? this.promptTokens;
    const cachedTokens = this.facts.usage?.cached ?? null;
    const shown = { at: Date.now(), ttftMs, tokensPerSecond, error: cause, tokens };
    this.permit.release(verdict, { ...shown, promptTokens, cachedTokens });
  }

  /** Prompt and answer, as far as anybody can tell. */
  #tokens(verdict: Verdict): number | null {
    const { usage, deltas } = this.facts;
    if (usage !== null) return usage.input + outputTokens(this.facts);
    if (deltas > 0) return this.promptTokens + deltas;
    // Refused, or to be done again elsewhere: it has not been served here.
    return this.response?.ok === false || verdict.retry === "elsewhere" ? 0 : null;
  }
}

/** Made once: an Error of our own as the reason, without the cost of a stack per request. */
const ATTEMPT_ENDED = new GatewayError("client_closed_request", "the attempt has ended");
