import { concat, folded, topLevelKeys, type Keys } from "../core/splice.ts";
import { isRecord } from "../dialects/dialect.ts";
import { promptSizeOf } from "../dialects/prompt-size.ts";
import { GatewayError, quote } from "../errors.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/** A request body: the client's own bytes, and where its top-level keys stand in them. */
export interface Body {
  bytes: Uint8Array;
  keys: Keys;
  /** The bytes are not needed any more: no retry can follow. Idempotent. */
  drop(): void;
}

/** A body that may be waited for in one piece. */
const SMALL_BYTES = 64 * 1024;
const SIGNAL_MS = 20;

const MIB = 1024 * 1024;
/** A larger body is looked at in steps. Each takes some 2 ms per MiB, and so long is the pause behind it. */
const LARGE_BYTES = MIB;
const PAUSE_MS = 2;

/** Replaces what is not UTF-8 by an error instead of by U+FFFD. A byte order mark is skipped. */
const utf8 = new TextDecoder("utf-8", { fatal: true });

/**
 * Reads the body once and checks what the gateway acts on, whatever the content-type says.
 *
 * @throws GatewayError 400, 413, 415, or 503 when too many bodies are held
 */
export async function accept(exchange: Exchange, request: Request, plane: Plane): Promise<void> {
  const encoding = request.headers.get("content-encoding");
  if (encoding !== null && encoding !== "identity") {
    throw new GatewayError(
      "unsupported_media_type",
      `content-encoding ${quote(encoding)} is not decoded here: send the body as plain JSON`,
    );
  }
  const body = await read(exchange, request, plane);
  exchange.check();
  const size = body.bytes.length;
  if (size > LARGE_BYTES) await pause(exchange, size);
  const text = decode(body.bytes);
  if (size > LARGE_BYTES) await pause(exchange, size);
  const parsed = parse(text);
  if (size > LARGE_BYTES) await pause(exchange, size);
  body.keys = topLevelKeys(body.bytes);
  // What comes next copies it for the engine.
  if (size > LARGE_BYTES) await pause(exchange, size);
  refuseRepeats(body.keys, exchange.endpoint.keys);
  exchange.body = body;
  const view = exchange.endpoint.view(parsed);
  exchange.view = view;
  exchange.fields = parsed;
  exchange.promptSize = promptSizeOf(parsed, body.bytes.length);
  exchange.record.stream = view.stream;
  exchange.record.asked_model = view.model.slice(0, 200);
  exchange.timing.accept = plane.now() - exchange.receivedAt;
}

/** Lets the streams of others go on. By a timer: on Deno `setImmediate` comes before bytes that wait. */
async function pause(exchange: Exchange, bytes: number): Promise<void> {
  await new Promise((resolve) => setTimeout(resolve, (bytes / MIB) * PAUSE_MS));
  exchange.check();
}

async function read(exchange: Exchange, request: Request, plane: Plane): Promise<Body> {
  const { bodyBytes, heldBytes } = exchange.config.limits;
  const tooLarge = () =>
    new GatewayError(
      "request_too_large",
      `the body is larger than ${bodyBytes} bytes (limits.bodyBytes)`,
    );
  const declared = Number(request.headers.get("content-length") ?? 0);
  if (declared > bodyBytes) throw tooLarge();
  let held = 0;
  const hold = (bytes: number) => {
    if (plane.heldBytes + bytes > heldBytes) {
      throw new GatewayError(
        "overloaded",
        "too many requests with large bodies are in the house, try again (limits.heldBytes)",
        { retryAfterMs: 1000 },
      );
    }
    held += bytes;
    plane.heldBytes += bytes;
  };
  const drop = exchange.own(() => {
    plane.heldBytes -= held;
    held = 0;
  });
  const broken = (error: unknown) => unreadable(exchange, error);
  const { clientMs } = exchange.config.timeouts;
  /** Gives up on a client that promised more and sends nothing. */
  const awaited = <T>(next: Promise<T>): Promise<T> => {
    if (clientMs === 0) return next;
    return new Promise((resolve, reject) => {
      const message = `nothing more of the body came for ${clientMs} ms`;
      const stall = () => reject(new GatewayError("invalid_json", message));
      next.finally(exchange.after(clientMs, stall)).then(resolve, reject);
    });
  };
  // In one piece where that is little; the runtimes have a short way for it.
  if (declared > 0 && declared <= SMALL_BYTES) {
    hold(declared);
    const bytes = new Uint8Array(await awaited(request.arrayBuffer().catch(broken)));
    return { bytes, keys: [], drop };
  }
  // Else held as it comes: a length that is only promised takes no room from others.
  const reader = request.body?.getReader();
  const stop = exchange.own(() => void reader?.cancel().catch(() => {}));
  const parts: Uint8Array[] = [];
  while (reader !== undefined) {
    const { value, done } = await awaited(reader.read().catch(broken));
    exchange.check();
    if (done) break;
    hold(value.length);
    if (held > bodyBytes) throw tooLarge();
    parts.push(value);
  }
  stop();
  return { bytes: concat(parts), keys: [], drop };
}

/** A body breaks off because its client left, mostly; then the signal says so, if a moment later. */
async function unreadable(exchange: Exchange, error: unknown): Promise<never> {
  await new Promise((resolve) => setTimeout(resolve, SIGNAL_MS));
  exchange.check();
  throw new GatewayError("invalid_json", "the body broke off before it was whole", {
    detail: String(error),
  });
}

function decode(bytes: Uint8Array): string {
  if (bytes.length === 0) throw new GatewayError("invalid_json", "the body is empty");
  try {
    return utf8.decode(bytes);
  } catch (error) {
    throw notJson(error);
  }
}

function notJson(error: unknown): GatewayError {
  const why = error instanceof Error ? error.message : String(error);
  return new GatewayError("invalid_json", `the body is not JSON: ${quote(why)}`);
}

function parse(text: string): Record<string, unknown> {
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch (error) {
    throw notJson(error);
  }
  if (!isRecord(parsed)) {
    throw new GatewayError("invalid_json", "the body has to be a JSON object");
  }
  return parsed;
}

/**
 * Gateway and engine could read different values of a key that stands twice. To Go, that is to Ollama,
 * `Model` and `MODEL` are `model` as well, and the last one counts.
 */
function refuseRepeats(keys: Keys, acted: readonly string[]) {
  const seen = new Set<string>();
  for (const { name } of keys) {
    const meant = folded(name);
    if (meant !== name && acted.includes(meant)) {
      throw new GatewayError("invalid_parameter", `${quote(name)} has to be written ${meant}`, {
        param: meant,
      });
    }
    if (seen.has(name) && acted.includes(name)) {
      throw new GatewayError("duplicate_parameter", `${name} stands more than once in the body`, {
        param: name,
      });
    }
    seen.add(name);
  }
}
