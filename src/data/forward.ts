import { createParser } from "eventsource-parser";
import { judge, type Fault, type Outcome, type Retry } from "../core/outcome.ts";
import { concat, splice, topLevelKeys, type Keys } from "../core/splice.ts";
import { emptyFacts, errorWords, isRecord, type AnswerFacts } from "../dialects/dialect.ts";
import { readRefusal, type EngineRequest } from "../engines/engine.ts";
import { GatewayError, quote, type ErrorCode } from "../errors.ts";
import type { Permit } from "../fleet/fleet.ts";
import type { AttemptTrace } from "../telemetry/tracing.ts";
import { clientTimeoutMs } from "./admit.ts";
import type { Attempt, Exchange } from "./exchange.ts";
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

  get outcome(): Outcome {
    return judge(this.fault).outcome;
  }

  get retry(): Retry {
    return judge(this.fault).retry;
  }
}

/** An answer whose beginning has been looked at. */
export interface Reply {
  contentType: string;
  cacheControl: string | null;
  /** What was read to look at it. */
  head: Uint8Array;
  /** What is still to come; null when `head` is the whole answer. */
  rest: ReadableStream<Uint8Array> | null;
  attempt: UpstreamAttempt;
}

/** A frame longer than this is not waited for. */
export const FRAME_BYTES = 64 * 1024;
const ERROR_BODY_BYTES = 64 * 1024;
const ERROR_BODY_MS = 5000;

/** One request to one backend: the permit, the connection and the span, ended together. */
export class UpstreamAttempt implements Attempt {
  readonly facts: AnswerFacts = emptyFacts();
  readonly permit: Permit;
  readonly sentAt: number;
  /** When the first token came, on the clock of the plane. */
  firstTokenAt: number | null = null;
  /** Held to the end: Deno forgets to abort a fetch whose Response has been collected. */
  response: Response | null = null;
  reader: ReadableStreamDefaultReader<Uint8Array> | null = null;

  readonly #plane: Plane;
  readonly #controller = new AbortController();
  readonly #trace: AttemptTrace;
  #ended = false;

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

  /** Stops the engine. Bun needs the abort, Deno the cancelled body. */
  close(reason: GatewayError): void {
    this.#controller.abort(reason);
    const body = this.reader ?? this.response?.body;
    body?.cancel(reason).catch(() => {});
  }

  end(outcome: Outcome, cause: string | null): void {
    if (this.#ended) return;
    this.#ended = true;
    if (outcome !== "success") this.close(ATTEMPT_ENDED);
    const first = this.firstTokenAt;
    this.#trace.end(this.facts, first === null ? null : first - this.sentAt, cause);
    this.#plane.metrics?.attempt(this.permit.target.backend, outcome);
    this.permit.release(outcome);
  }
}

/** Made once: an Error of our own as the reason, without the cost of a stack per request. */
const ATTEMPT_ENDED = new GatewayError("client_closed_request", "the attempt has ended");

/**
 * Sends the request once and looks at the beginning of the answer: headers and the first event of a
 * stream, or the whole of a bounded answer in one piece.
 *
 * @throws AttemptFailed when there is no answer to pass on; the attempt is still to be ended
 */
export async function forward(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  plane: Plane,
): Promise<Reply> {
  const { permit } = attempt;
  const { timeouts } = plane.config;
  const { backend } = permit.target;
  const stream = exchange.view?.stream === true;
  // Whoever ends the attempt from a timer leaves here why, since `fetch` only says "aborted".
  let timedOut: AttemptFailed | null = null;
  const giveUp = (fault: Fault, code: ErrorCode, message: string) => {
    timedOut = new AttemptFailed(fault, new GatewayError(code, message));
    attempt.close(timedOut.error);
  };
  const clocks: (() => void)[] = [];
  if (stream && timeouts.firstByteMs > 0) {
    const message = `backend ${quote(backend)} sent nothing for ${timeouts.firstByteMs} ms (timeouts.firstByteMs)`;
    clocks.push(
      exchange.after(timeouts.firstByteMs, () => giveUp("timeout", "upstream_timeout", message)),
    );
  }
  const stopConnect = exchange.after(timeouts.connectMs, () => {
    void plane.probe(backend).then((answers) => {
      if (answers || attempt.response !== null || flowsSince(plane, backend, timeouts.connectMs))
        return;
      const message = `backend ${quote(backend)} does not answer, nor does it answer a probe (timeouts.connectMs)`;
      giveUp("unreachable", "upstream_unreachable", message);
    });
  });
  clocks.push(stopConnect);
  try {
    const response = await permit.engine.send(permit.connection, build(exchange, attempt));
    attempt.response = response;
    exchange.check();
    stopConnect();
    exchange.timing.connect = plane.now() - attempt.sentAt;
    exchange.phase = "first_token";
    if (!response.ok) throw await refused(exchange, attempt, response);
    return stream
      ? await peek(exchange, attempt, response, plane)
      : await readWhole(exchange, attempt, response, plane);
  } catch (error) {
    exchange.check();
    if (timedOut !== null) throw timedOut;
    if (error instanceof AttemptFailed || error instanceof GatewayError) throw error;
    throw new AttemptFailed("unreachable", unreachable(backend, error));
  } finally {
    for (const stop of clocks) stop();
  }
}

function flowsSince(plane: Plane, backend: string, ms: number): boolean {
  return plane.now() - plane.fleet.lastChunkAt(backend) < ms;
}

/** The text of a network error names addresses and paths: it is for the log. */
function unreachable(backend: string, error: unknown): GatewayError {
  const cause = error instanceof Error && error.cause instanceof Error ? error.cause.message : "";
  const detail = `${error instanceof Error ? error.message : String(error)} ${cause}`.trim();
  return new GatewayError(
    "upstream_unreachable",
    `backend ${quote(backend)} could not be reached, or closed the connection without an answer`,
    { detail },
  );
}

const PASSED_ON = ["accept", "user-agent", "anthropic-version", "anthropic-beta"];

function build(exchange: Exchange, attempt: UpstreamAttempt): EngineRequest {
  const { body, view, endpoint } = exchange;
  const { engine, target } = attempt.permit;
  const bytes = body?.bytes ?? new Uint8Array();
  const keys = body?.keys ?? [];
  const edits = new Map<string, string | Uint8Array>(engine.adapt(bytes, keys));
  if (view !== null && view.model !== target.model)
    edits.set("model", JSON.stringify(target.model));
  if (view?.stream === true && endpoint.usageOnRequest && !view.includeUsage) {
    edits.set("stream_options", withUsage(bytes, keys));
  }
  const headers: Record<string, string> = {
    // vLLM insists on it, whatever the client wrote.
    "content-type": "application/json",
    "x-request-id": exchange.id,
    ...attempt.traceHeaders,
  };
  for (const name of PASSED_ON) {
    const value = exchange.headers.get(name);
    if (value !== null) headers[name] = value;
  }
  headers["accept"] ??= "*/*";
  headers["user-agent"] ??= "tidegate";
  return { path: exchange.path, headers, body: splice(bytes, keys, edits), signal: attempt.signal };
}

/** The client's own `stream_options` with usage switched on. */
function withUsage(bytes: Uint8Array, keys: Keys): string | Uint8Array {
  const usage = new Map([["include_usage", "true"]]);
  const own = keys.find((key) => key.name === "stream_options")?.value;
  const options = own === undefined ? null : bytes.subarray(own.start, own.end);
  if (options === null || options[0] !== 0x7b) return '{"include_usage":true}';
  return splice(options, topLevelKeys(options), usage);
}

/** Reads at most `limit` bytes of a refusal, for at most a few seconds: some never end. */
async function refused(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
): Promise<AttemptFailed> {
  const reader = response.body?.getReader() ?? null;
  attempt.reader = reader;
  const parts: Uint8Array[] = [];
  let length = 0;
  const stop = exchange.after(ERROR_BODY_MS, () => void reader?.cancel().catch(() => {}));
  while (reader !== null && length < ERROR_BODY_BYTES) {
    const { value, done } = await reader.read().catch(() => ({ value: undefined, done: true }));
    if (done || value === undefined) break;
    parts.push(value);
    length += value.length;
  }
  stop();
  exchange.check();
  const { kind } = attempt.permit.engine;
  const { backend } = attempt.permit.target;
  const text = new TextDecoder().decode(concat(parts));
  const refusal = readRefusal(
    kind,
    backend,
    exchange.endpoint,
    response.status,
    response.headers,
    text,
  );
  return new AttemptFailed(refusal.fault, refusal.error);
}

function invalid(backend: string, what: string, detail: string): AttemptFailed {
  const message = `backend ${quote(backend)} sent ${what}`;
  const error = new GatewayError("upstream_invalid_response", message, {
    detail: detail.slice(0, 2000),
  });
  return new AttemptFailed("invalid_answer", error);
}

function errorInside(backend: string, words: string): AttemptFailed {
  const message = `backend ${quote(backend)} answered with an error: ${quote(words)}`;
  const error = new GatewayError("upstream_error", message, { detail: words.slice(0, 2000) });
  return new AttemptFailed("error_in_answer", error);
}

function incomplete(backend: string, detail: string): AttemptFailed {
  const message = `backend ${quote(backend)} broke off before its answer was whole`;
  const error = new GatewayError("upstream_incomplete", message, { detail });
  return new AttemptFailed("incomplete", error);
}

/** Reads a stream up to its first event, which may still be an error that another backend can mend. */
async function peek(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
  plane: Plane,
): Promise<Reply> {
  const { backend } = attempt.permit.target;
  const contentType = response.headers.get("content-type") ?? "";
  if (!/^text\/event-stream\b/i.test(contentType) || response.body === null) {
    throw await notAStream(exchange, attempt, response, contentType);
  }
  const reader = response.body.getReader();
  attempt.reader = reader;
  const decoder = new TextDecoder();
  const parts: Uint8Array[] = [];
  const events: string[] = [];
  let length = 0;
  const parser = createParser({ onEvent: ({ data }) => void events.push(data) });
  while (events.length === 0 && length < FRAME_BYTES) {
    const { value, done } = await reader.read().catch((error: unknown) => {
      exchange.check();
      throw incomplete(backend, String(error));
    });
    exchange.check();
    if (done) throw incomplete(backend, "no event at all");
    attempt.permit.flowed();
    parts.push(value);
    length += value.length;
    parser.feed(decoder.decode(value, { stream: true }));
  }
  const [first] = events;
  if (first !== undefined) judgeFirst(exchange, backend, first);
  exchange.timing.first_token = plane.now() - attempt.sentAt - (exchange.timing.connect ?? 0);
  reader.releaseLock();
  attempt.reader = null;
  const cacheControl = response.headers.get("cache-control");
  return { contentType, cacheControl, head: concat(parts), rest: response.body, attempt };
}

function judgeFirst(exchange: Exchange, backend: string, data: string) {
  if (data === "[DONE]") return;
  let parsed: unknown;
  try {
    parsed = JSON.parse(data);
  } catch {
    throw invalid(backend, "a first event that is not JSON", data);
  }
  const facts = emptyFacts();
  if (isRecord(parsed)) exchange.endpoint.readEvent(parsed, facts);
  if (facts.error !== null) throw errorInside(backend, facts.error);
}

async function notAStream(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
  contentType: string,
): Promise<AttemptFailed> {
  const { backend } = attempt.permit.target;
  const refusal = await refused(exchange, attempt, response);
  const detail = refusal.error.detail ?? "";
  return invalid(backend, `${quote(contentType)} instead of an event stream`, detail);
}

/** Holds an answer in one piece until it is whole; beyond `limits.bufferBytes` it is passed on unseen. */
async function readWhole(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
  plane: Plane,
): Promise<Reply> {
  const { backend } = attempt.permit.target;
  const contentType = response.headers.get("content-type") ?? "application/json";
  const cacheControl = response.headers.get("cache-control");
  const headersAt = plane.now();
  const reader = response.body?.getReader() ?? null;
  attempt.reader = reader;
  const parts: Uint8Array[] = [];
  let length = 0;
  while (reader !== null) {
    const { value, done } = await reader.read().catch((error: unknown) => {
      exchange.check();
      throw incomplete(backend, String(error));
    });
    exchange.check();
    if (done) break;
    attempt.permit.flowed();
    parts.push(value);
    length += value.length;
    if (length > plane.config.limits.bufferBytes) {
      reader.releaseLock();
      attempt.reader = null;
      return { contentType, cacheControl, head: concat(parts), rest: response.body, attempt };
    }
  }
  exchange.timing.generate = plane.now() - headersAt;
  const head = concat(parts);
  judgeWhole(exchange, attempt, head);
  return { contentType, cacheControl, head, rest: null, attempt };
}

function judgeWhole(exchange: Exchange, attempt: UpstreamAttempt, bytes: Uint8Array) {
  const { backend } = attempt.permit.target;
  const text = new TextDecoder().decode(bytes);
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch (error) {
    // What begins like an answer and has no end has been cut.
    if (/^\s*\{/.test(text) && !/\}\s*$/.test(text)) throw incomplete(backend, String(error));
    throw invalid(backend, "something that is not JSON", text);
  }
  if (isRecord(parsed) && exchange.endpoint.readWhole(parsed, attempt.facts)) return;
  const inner = isRecord(parsed) ? parsed["error"] : undefined;
  // LM Studio answers paths it does not have with 200 and a string.
  if (isRecord(inner)) throw errorInside(backend, errorWords(inner) ?? "no words");
  throw invalid(backend, `an answer that is none of ${exchange.endpoint.path}`, text);
}

/** The limit for an answer in one piece: ours, or the client's own; Infinity for none. */
export function totalMsOf(exchange: Exchange, plane: Plane): number {
  const { totalMs } = plane.config.timeouts;
  return Math.min(totalMs === 0 ? Infinity : totalMs, clientTimeoutMs(exchange) ?? Infinity);
}
