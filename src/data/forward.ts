import type { Fault } from "../core/outcome.ts";
import { splice, topLevelKeys, without, type Keys } from "../core/splice.ts";
import { capOutput } from "../engines/cap.ts";
import type { EngineRequest } from "../engines/engine.ts";
import { GatewayError, quote, type ErrorCode } from "../errors.ts";
import { AttemptFailed, type UpstreamAttempt } from "./attempt.ts";
import type { Exchange } from "./exchange.ts";
import { peek, readWhole, refused, type Reply } from "./inspect.ts";
import type { Plane } from "./plane.ts";
import { watchSilence } from "./silence.ts";

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
  const { backend } = permit.target;
  attempt.promptTokens = exchange.promptTokens;
  const stream = exchange.view?.stream === true;
  // Whoever ends the attempt from a timer leaves here why, since `fetch` only says "aborted".
  let timedOut: AttemptFailed | null = null;
  const giveUp = (fault: Fault, code: ErrorCode, message: string) => {
    timedOut = new AttemptFailed(fault, new GatewayError(code, message));
    attempt.close(timedOut.error);
  };
  const silence = watchSilence(exchange, attempt, plane, giveUp);
  try {
    const response = await permit.engine.send(permit.connection, build(exchange, attempt));
    attempt.hold(response);
    exchange.check();
    silence.connected();
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
    silence.stop();
  }
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
  const { body, view, endpoint, outputCap } = exchange;
  const { engine, target } = attempt.permit;
  let bytes = body?.bytes ?? new Uint8Array();
  let keys = body?.keys ?? [];
  const { names, spans } = engine.withhold(bytes, keys);
  exchange.pinned = names;
  if (spans.length > 0) {
    bytes = without(bytes, spans);
    keys = topLevelKeys(bytes);
  }
  const edits = new Map<string, string | Uint8Array>(engine.adapt(bytes, keys));
  if (view !== null && view.model !== target.model)
    edits.set("model", JSON.stringify(target.model));
  if (view?.stream === true && endpoint.usageOnRequest && !view.includeUsage) {
    edits.set("stream_options", withUsage(bytes, keys));
  }
  if (outputCap !== null) {
    capOutput(bytes, keys, edits, engine.limitFields[endpoint.path] ?? [], outputCap);
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

/** The limit for an answer in one piece, milliseconds: ours, or the client's own; Infinity for none. */
export function totalMsOf(exchange: Exchange): number {
  return Math.min(ownTotalMs(exchange), exchange.wishes.timeoutMs ?? Infinity);
}

function ownTotalMs({ config }: Exchange): number {
  const { totalMs } = config.timeouts;
  return totalMs === 0 ? Infinity : totalMs;
}

/** What it says of the engine that this limit is over: nothing, where a client only had less patience. */
export function lateFault(exchange: Exchange): Fault {
  return totalMsOf(exchange) < ownTotalMs(exchange) ? "ended" : "timeout";
}
