import type { Fault } from "../core/outcome.ts";
import { isRecord, numberOf, textOf, type Endpoint } from "../dialects/dialect.ts";
import { GatewayError, printable, quote, type ErrorCode } from "../errors.ts";
import type { Engine, Said } from "./engine.ts";

/** An engine's refusal: the verdict's key, and the error in the caller's words. */
export interface Refusal {
  fault: Fault;
  error: GatewayError;
}

const CONTEXT_WORDS =
  /context (?:length|window|size)|maximum context|exceeds? the (?:available|model)|exceed_context_size|prompt is (?:too long|longer)|`inputs` (?:tokens \+|must have less)/i;

/** Of an engine's refusal so much is passed on. */
const MOST_WORDS = 4000;

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** The error inside whatever shape an engine gave its refusal. */
function errorIn(text: string): Pick<Said, "words" | "type" | "code"> {
  const body = parse(text);
  if (!isRecord(body)) return { words: text.trim(), type: null, code: null };
  // Nested (OpenAI), a string (Ollama's own API, TGI), flat (SGLang), or FastAPI's `detail`.
  const inner = body["error"] ?? body;
  const fields = isRecord(inner) ? inner : {};
  const words =
    textOf(inner) ?? textOf(fields["message"]) ?? textOf(fields["detail"]) ?? text.trim();
  // Ollama hands on what its runner said, envelope and all.
  if (words !== text && isRecord(parse(words))) return errorIn(words);
  const type = textOf(fields["type"]) ?? textOf(body["error_type"]);
  return { words, type, code: textOf(fields["code"]) };
}

/** An engine's words inside our message: bounded, on one line. */
function cited(words: string): string {
  return words === "" ? "no words" : printable(words.slice(0, 500));
}

/** An engine's words as our message: bounded, without what could colour a terminal. */
function kept(words: string): string {
  if (words === "") return "no words";
  return words.slice(0, MOST_WORDS).split("\n").map(printable).join("\n");
}

function retryAfterOf(headers: Headers): number {
  const seconds = Number(headers.get("retry-after"));
  return Number.isFinite(seconds) && seconds > 0 ? seconds * 1000 : 1000;
}

function unsupported(said: string, path: string, detail: string): Refusal {
  const message = `this model's backend does not do ${path}; ${said}`;
  const error = new GatewayError("unsupported_endpoint", message, { detail });
  return { fault: "unsupported", error };
}

/** Turns an answer other than 2xx into a fault and the caller's error. `text` is the body, bounded. */
export function readRefusal(
  engine: Engine,
  backend: string,
  { path }: Endpoint,
  status: number,
  headers: Headers,
  text: string,
): Refusal {
  const { words, type, code } = errorIn(text);
  const meaning = engine.meaning({ status, words, type, code, path });
  // A refusal of the request may repeat the prompt: of that the log only gets what kind it was.
  const kindOfError = `HTTP ${status} ${type ?? ""} ${code ?? ""}`.trim();
  const isBroken = status >= 500 || meaning === "broken";
  const isRequests = !isBroken || meaning === "too_long" || meaning === "unsupported_input";
  const detail = isRequests ? kindOfError : `${kindOfError}: ${words.slice(0, 500)}`;
  const said = `backend ${quote(backend)} answered HTTP ${status}: ${cited(words)}`;
  const refusal = (fault: Fault, as: ErrorCode, message: string): Refusal => {
    return { fault, error: new GatewayError(as, message, { detail }) };
  };
  if (status === 429 || status === 503) {
    const message = `every backend with this model is busy, try again; ${said}`;
    const retryAfterMs = retryAfterOf(headers);
    const error = new GatewayError("rate_limit_exceeded", message, { detail, retryAfterMs });
    return { fault: "busy", error };
  }
  if (status === 501 || meaning === "unsupported") return unsupported(said, path, detail);
  if (meaning === "too_long" || (isRejection(status) && isTooLong(words, type, code))) {
    return refusal("rejected", "context_length_exceeded", kept(words));
  }
  if (meaning === "unsupported_input") return refusal("rejected", "unsupported_parameter", said);
  if (isBroken) return refusal("server_error", "upstream_error", said);
  const fix = meaning === "not_loaded" ? NOT_LOADED : fixOf(status);
  if (fix !== null) return refusal("misconfigured", "upstream_error", `${said} (${fix})`);
  const passed = { status, type: type ?? "invalid_request_error", code };
  const error = new GatewayError("invalid_parameter", kept(words), { detail, passed });
  return { fault: "rejected", error };
}

/**
 * Reads a 200 that is no answer: null when it is no refusal either.
 *
 * @param text the body
 */
export function readDenial(
  engine: Engine,
  backend: string,
  { path }: Endpoint,
  text: string,
): Refusal | null {
  const body = parse(text);
  const words = isRecord(body) ? textOf(body["error"]) : null;
  if (words === null) return null;
  const meaning = engine.meaning({ status: 200, words, type: null, code: null, path });
  if (meaning !== "unsupported") return null;
  return unsupported(`backend ${quote(backend)} answered: ${cited(words)}`, path, "HTTP 200");
}

/**
 * Reads an error that came as the first event of a stream: null where it does not say that the request
 * is at fault or the engine busy. The status it would have had is in its code, or in its words.
 *
 * @param text the event's data
 */
export function readErrorEvent(
  engine: Engine,
  backend: string,
  endpoint: Endpoint,
  text: string,
): Refusal | null {
  const body = parse(text);
  const inner = isRecord(body) ? body["error"] : null;
  const { words, type, code } = errorIn(text);
  const told = isRecord(inner) ? numberOf(inner["code"]) : null;
  const status = told ?? (isTooLong(words, type, code) ? 400 : 500);
  if (status < 400 || (status >= 500 && status !== 503)) return null;
  return readRefusal(engine, backend, endpoint, status, new Headers(), text);
}

const NOT_LOADED =
  "it does not load models by itself: load this one there, or start it without --no-models-autoload";

/** What a person has to change where the backend is set up wrongly for every request. */
function fixOf(status: number): string | null {
  if (status < 400) return "redirects are not followed: set the backend's url to where it leads";
  if (status === 401 || status === 403) {
    return "it does not accept the gateway: check this backend's apiKey";
  }
  return null;
}

function isRejection(status: number): boolean {
  return status === 400 || status === 422;
}

function isTooLong(words: string, type: string | null, code: string | null): boolean {
  return code === "context_length_exceeded" || CONTEXT_WORDS.test(`${type ?? ""} ${words}`);
}
