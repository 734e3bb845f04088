import { createParser } from "eventsource-parser";
import { concat } from "../core/splice.ts";
import { emptyFacts, errorWords, isRecord } from "../dialects/dialect.ts";
import { readDenial, readErrorEvent, readRefusal } from "../engines/refusal.ts";
import { GatewayError, quote } from "../errors.ts";
import { AttemptFailed, type UpstreamAttempt } from "./attempt.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/** An answer whose beginning has been looked at. */
export interface Reply {
  contentType: string;
  cacheControl: string | null;
  /** What was read to look at it. */
  head: Uint8Array;
  /** `head` is not all: the attempt's reader has the rest. */
  more: boolean;
  /** `head` parsed, where it is a whole answer. */
  json?: unknown;
  attempt: UpstreamAttempt;
}

/** A frame longer than this is not waited for. */
export const FRAME_BYTES = 64 * 1024;
const ERROR_BODY_BYTES = 64 * 1024;
const ERROR_BODY_MS = 5000;

/** The beginning of a body that is no answer, read for at most a few seconds: some never end. */
async function readBounded(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
): Promise<string> {
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
  return new TextDecoder().decode(concat(parts));
}

function recordFrom(text: string): Record<string, unknown> {
  try {
    const parsed: unknown = JSON.parse(text);
    return isRecord(parsed) ? parsed : {};
  } catch {
    return {};
  }
}

/** What the engine's refusal means, in the caller's words. */
export async function refused(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
): Promise<AttemptFailed> {
  const text = await readBounded(exchange, attempt, response);
  const { engine, target } = attempt.permit;
  const { status, headers } = response;
  const refusal = readRefusal(engine, target.backend, exchange.endpoint, status, headers, text);
  return new AttemptFailed(refusal.fault, refusal.error);
}

/** What came instead may be an answer's text, which no log may hold: only its length is told. */
function invalid(backend: string, what: string, got: string): AttemptFailed {
  const message = `backend ${quote(backend)} sent ${what}`;
  const error = new GatewayError("upstream_invalid_response", message, {
    detail: `${got.length} characters`,
  });
  return new AttemptFailed("invalid_answer", error);
}

/** LM Studio answers paths it does not have with a 200. */
function denied(exchange: Exchange, attempt: UpstreamAttempt, text: string): AttemptFailed | null {
  const { engine, target } = attempt.permit;
  const refusal = readDenial(engine, target.backend, exchange.endpoint, text);
  return refusal === null ? null : new AttemptFailed(refusal.fault, refusal.error);
}

function errorInside(backend: string, words: string): AttemptFailed {
  const message = `backend ${quote(backend)} answered with an error: ${quote(words)}`;
  const error = new GatewayError("upstream_error", message, { detail: words.slice(0, 500) });
  return new AttemptFailed("error_in_answer", error);
}

function incomplete(backend: string, detail: string): AttemptFailed {
  const message = `backend ${quote(backend)} broke off before its answer was whole`;
  const error = new GatewayError("upstream_incomplete", message, { detail });
  return new AttemptFailed("incomplete", error);
}

/** The next bytes of the answer; null at its end. */
async function next(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  plane: Plane,
): Promise<Uint8Array | null> {
  const result = await attempt.reader?.read().catch((error: unknown) => {
    exchange.check();
    throw incomplete(attempt.permit.target.backend, String(error));
  });
  exchange.check();
  if (result === undefined || result.done) return null;
  attempt.permit.flowed(plane.now(), 0);
  return result.value;
}

/** Reads a stream up to its first event, which may still be an error that another backend can mend. */
export async function peek(
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
  attempt.reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parts: Uint8Array[] = [];
  const events: string[] = [];
  let length = 0;
  const parser = createParser({ onEvent: ({ data }) => void events.push(data) });
  while (events.length === 0 && length < FRAME_BYTES) {
    const value = await next(exchange, attempt, plane);
    if (value === null) throw incomplete(backend, "no event at all");
    parts.push(value);
    length += value.length;
    parser.feed(decoder.decode(value, { stream: true }));
  }
  const [first] = events;
  if (first !== undefined) judgeFirst(exchange, attempt, first);
  exchange.timing.first_token = plane.now() - attempt.sentAt - (exchange.timing.connect ?? 0);
  const cacheControl = response.headers.get("cache-control");
  return { contentType, cacheControl, head: concat(parts), more: true, attempt };
}

function judgeFirst(exchange: Exchange, attempt: UpstreamAttempt, data: string) {
  const { engine, target } = attempt.permit;
  const { backend } = target;
  if (data === "[DONE]") return;
  let parsed: unknown;
  try {
    parsed = JSON.parse(data);
  } catch {
    throw invalid(backend, "a first event that is not JSON", data);
  }
  const facts = emptyFacts();
  if (isRecord(parsed)) exchange.endpoint.readEvent(parsed, facts);
  if (facts.error === null) return;
  const refusal = readErrorEvent(engine, backend, exchange.endpoint, data);
  if (refusal !== null) throw new AttemptFailed(refusal.fault, refusal.error);
  throw errorInside(backend, facts.error);
}

async function notAStream(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
  contentType: string,
): Promise<AttemptFailed> {
  const { backend } = attempt.permit.target;
  const text = await readBounded(exchange, attempt, response);
  const { error } = recordFrom(text);
  if (isRecord(error)) return errorInside(backend, errorWords(error) ?? "no words");
  return (
    denied(exchange, attempt, text) ??
    invalid(backend, `${quote(contentType)} instead of an event stream`, text)
  );
}

/** Holds an answer in one piece until it is whole; beyond `holdBytes` it is passed on unseen. */
export async function readWhole(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  response: Response,
  plane: Plane,
): Promise<Reply> {
  const contentType = response.headers.get("content-type") ?? "application/json";
  const cacheControl = response.headers.get("cache-control");
  const headersAt = plane.now();
  attempt.reader = response.body?.getReader() ?? null;
  const parts: Uint8Array[] = [];
  let length = 0;
  for (;;) {
    const value = await next(exchange, attempt, plane);
    if (value === null) break;
    parts.push(value);
    length += value.length;
    if (length > exchange.holdBytes) {
      return { contentType, cacheControl, head: concat(parts), more: true, attempt };
    }
  }
  attempt.drained();
  exchange.timing.generate = plane.now() - headersAt;
  const head = concat(parts);
  const json = judgeWhole(exchange, attempt, head);
  return { contentType, cacheControl, head, more: false, json, attempt };
}

/** @returns the answer, parsed. */
function judgeWhole(exchange: Exchange, attempt: UpstreamAttempt, bytes: Uint8Array): unknown {
  const { backend } = attempt.permit.target;
  const text = new TextDecoder().decode(bytes);
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch {
    // What begins like an answer and has no end has been cut.
    const cut = /^\s*\{/.test(text) && !/\}\s*$/.test(text);
    if (cut) throw incomplete(backend, `${text.length} characters`);
    throw invalid(backend, "something that is not JSON", text);
  }
  if (isRecord(parsed) && exchange.endpoint.readWhole(parsed, attempt.facts)) return parsed;
  if (Array.isArray(parsed) && exchange.endpoint.takesList === true) return parsed;
  const inner = isRecord(parsed) ? parsed["error"] : undefined;
  if (isRecord(inner)) throw errorInside(backend, errorWords(inner) ?? "no words");
  throw (
    denied(exchange, attempt, text) ??
    invalid(backend, `an answer that is none of ${exchange.endpoint.path}`, text)
  );
}
