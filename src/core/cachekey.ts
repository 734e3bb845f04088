import { isRecord } from "./is-record.ts";
import type { Target } from "./snapshot.ts";
import { skipString } from "./splice.ts";

/** Which top-level fields of an endpoint's requests matter. A field in neither set forbids caching. */
export interface CacheRule {
  /** They may change the answer. */
  answer: ReadonlySet<string>;
  /** They cannot. */
  ignored: ReadonlySet<string>;
  /** The answer is sampled token by token: temperature, choices and streaming matter. */
  samples: boolean;
}

/** Why a request is not cached. */
export type Bypass = "endpoint" | "stream" | "temperature" | "n" | "field" | "number";

const QUOTE = 0x22;
const COLON = 0x3a;
const BACKSLASH = 0x5c;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;
const MINUS = 0x2d;
const PLUS = 0x2b;
const DOT = 0x2e;
const SMALL_E = 0x65;
const BIG_E = 0x45;

/** No real request nests deeper, and recursion up to here is safe. */
const MAX_DEPTH = 64;
/** Any decimal with so many digits comes back unchanged from a double. */
const SAFE_DIGITS = 15;
/** Longer ones are nobody's parameter. */
const MAX_DIGITS = 100;
/** RFC 9111 §1.2.2: what cannot be represented is this. */
const MAX_AGE_S = 2 ** 31;

/** Tools that the client runs; all others are run by the engine, and bring other results tomorrow. */
const CLIENT_TOOLS: ReadonlySet<unknown> = new Set([undefined, "function", "custom"]);

const decoder = new TextDecoder();

/**
 * The fields of a request that decide its answer, in a form that is the same for the same values,
 * however they were written: after RFC 8785, keys sorted by UTF-16 code units. Requests whose
 * values the parser does not tell apart are refused, so two that differ never share a text.
 *
 * A null is not the same as nothing: vLLM's `max_tokens` is 16 where absent and unlimited if null.
 *
 * @param rule undefined for an endpoint whose answers are not cached.
 * @param body the parsed `bytes`, a JSON object.
 * @param streams whether streams may be cached too.
 */
export function canonicalFields(
  rule: CacheRule | undefined,
  body: Record<string, unknown>,
  bytes: Uint8Array,
  streams: boolean,
): { fields: string } | { bypass: Bypass } {
  if (rule === undefined) return { bypass: "endpoint" };
  const isStream = body["stream"] === true;
  if (rule.samples) {
    if (isStream && !streams) return { bypass: "stream" };
    if (body["temperature"] !== 0) return { bypass: "temperature" };
    if ((body["n"] ?? 1) !== 1 || (body["best_of"] ?? 1) !== 1) return { bypass: "n" };
  }
  const answer: [string, unknown][] = [];
  for (const [name, value] of Object.entries(body)) {
    const isAboutStreams = name === "stream" || name === "stream_options";
    if (rule.answer.has(name) || (isAboutStreams && isStream)) answer.push([name, value]);
    else if (!rule.ignored.has(name) && !isAboutStreams) return { bypass: "field" };
  }
  const tools = body["tools"];
  if (Array.isArray(tools) && !tools.every(isClientTool)) return { bypass: "field" };
  const written = look(bytes);
  if (typeof written !== "number") return { bypass: written };
  // Of keys that stand more than once the parser keeps one, the engine perhaps another.
  if (keysIn(body) !== written) return { bypass: "field" };
  return { fields: canonical(Object.fromEntries(answer)) };
}

function isClientTool(tool: unknown): boolean {
  return !isRecord(tool) || CLIENT_TOOLS.has(tool["type"]);
}

/** JSON with sorted keys. */
function canonical(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (!isRecord(value)) return JSON.stringify(value);
  const names = Object.keys(value).toSorted();
  const members = names.map((name) => `${JSON.stringify(name)}:${canonical(value[name])}`);
  return `{${members.join(",")}}`;
}

/** At all depths. */
function keysIn(value: unknown): number {
  let keys = 0;
  if (Array.isArray(value)) {
    for (const each of value) keys += keysIn(each);
  } else if (isRecord(value)) {
    for (const each of Object.values(value)) keys += 1 + keysIn(each);
  }
  return keys;
}

/**
 * What the parsed value does not show: how many keys are written in it, at all depths; or why its
 * parts cannot be told apart with certainty: too deep, a number that a double does not hold, or a
 * key with an escape, which the JSON.parse of V8 15 may read as a different one.
 *
 * @param bytes UTF-8 of valid JSON.
 */
function look(bytes: Uint8Array): number | "field" | "number" {
  let keys = 0;
  let depth = 0;
  let at = 0;
  let lastString = 0;
  while (at < bytes.length) {
    const byte = bytes[at] ?? 0;
    if (byte === QUOTE) {
      lastString = at;
      at = skipString(bytes, at);
      continue;
    }
    if (byte === MINUS || isDigit(byte)) {
      const end = numberEnd(bytes, at);
      const isPlain = end - at <= SAFE_DIGITS && !hasExponent(bytes, at, end);
      if (!isPlain && !isExact(decoder.decode(bytes.subarray(at, end)))) return "number";
      at = end;
      continue;
    }
    if (byte === COLON) {
      keys++;
      if (bytes.subarray(lastString, at).includes(BACKSLASH)) return "field";
    } else if (byte === OPEN_BRACE || byte === OPEN_BRACKET) {
      depth++;
      if (depth > MAX_DEPTH) return "field";
    } else if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) depth--;
    at++;
  }
  return keys;
}

function isDigit(byte: number): boolean {
  return byte >= 0x30 && byte <= 0x39;
}

function isExponent(byte: number): boolean {
  return byte === SMALL_E || byte === BIG_E;
}

/** The offset behind the number that begins at `start`. */
function numberEnd(bytes: Uint8Array, start: number): number {
  for (let at = start + 1; ; at++) {
    const byte = bytes[at] ?? 0;
    const isSign = byte === MINUS || byte === PLUS;
    if (!isDigit(byte) && byte !== DOT && !isSign && !isExponent(byte)) return at;
  }
}

function hasExponent(bytes: Uint8Array, start: number, end: number): boolean {
  for (let at = start; at < end; at++) if (isExponent(bytes[at] ?? 0)) return true;
  return false;
}

/** A double holds it so well that it is written back as the same decimal number. */
function isExact(text: string): boolean {
  return text.length <= MAX_DIGITS && decimal(text) === decimal(String(Number(text)));
}

/** A decimal number without its sign as digits and a power of ten, no zeros around the digits. */
function decimal(text: string): string {
  const [mantissa = "", exponent = "0"] = text.toLowerCase().split("e");
  const [whole = "", fraction = ""] = mantissa.replace("-", "").split(".");
  const digits = (whole + fraction).replace(/^0+/, "");
  const significant = digits.replace(/0+$/, "");
  if (significant === "") return "0";
  const power = Number(exponent) - fraction.length + digits.length - significant.length;
  return `${significant}e${power}`;
}

/** What else decides an answer. */
export interface Scope {
  tenant: string;
  /** With its query. */
  path: string;
  /** `identityOf` the model. */
  model: string;
  /** The output cap that holds for the request, null for none. */
  cap: number | null;
  /** Those request headers that go to the engine and change what it does; null where absent. */
  headers: Readonly<Record<string, string | null>>;
}

/**
 * The text whose SHA-256 is the key of an answer, or of one input's vector.
 *
 * @param parts `fields` of `canonicalFields`, and for a vector its input.
 */
export function keyText(scope: Scope, ...parts: string[]): string {
  return [canonical(scope), ...parts].map((part) => `${part.length}:${part}`).join("");
}

/**
 * What answers under a model's name: the digests of its targets where engines tell them. A name
 * of an engine's own means different weights on different backends ("default"), so it counts only
 * together with the public name that was configured to mean one model.
 *
 * @param targets those that may serve the request.
 */
export function identityOf(
  model: string,
  targets: readonly Pick<Target, "model" | "digest">[],
): string {
  const identities = targets.map((target) =>
    JSON.stringify(target.digest === null ? [model, target.model] : [target.digest]),
  );
  return `[${[...new Set(identities)].toSorted().join(",")}]`;
}

/** What a client's `Cache-Control` header asks for. */
export interface CacheControl {
  noStore: boolean;
  noCache: boolean;
  /** The oldest answer it takes, null for any. */
  maxAgeMs: number | null;
  onlyIfCached: boolean;
}

/** Reads a request's `Cache-Control` header; what it does not know or cannot read it leaves out. */
export function cacheControlOf(header: string | null): CacheControl {
  const asked: CacheControl = {
    noStore: false,
    noCache: false,
    maxAgeMs: null,
    onlyIfCached: false,
  };
  // A comma in quotes separates nothing.
  const unquoted = header?.replaceAll(/"[^"]*"/g, (each) => each.slice(1, -1).replaceAll(",", " "));
  for (const directive of unquoted?.split(",") ?? []) {
    const [name = "", value = ""] = directive.split("=", 2).map((each) => each.trim());
    switch (name.toLowerCase()) {
      case "no-store":
        asked.noStore = true;
        break;
      case "no-cache":
        asked.noCache = true;
        break;
      case "only-if-cached":
        asked.onlyIfCached = true;
        break;
      case "max-age": {
        const seconds = value === "" ? Number.NaN : Number(value);
        if (Number.isNaN(seconds)) break;
        const ms = 1000 * Math.min(Math.max(seconds, 0), MAX_AGE_S);
        asked.maxAgeMs = Math.min(ms, asked.maxAgeMs ?? ms);
        break;
      }
      default:
    }
  }
  return asked;
}

/**
 * May an answer still be given, and is it as young as the client wants it?
 *
 * @param storedAt Unix milliseconds, as `now`.
 */
export function isFresh(
  storedAt: number,
  { maxAgeMs }: CacheControl,
  ttlMs: number,
  now: number,
): boolean {
  const age = now - storedAt;
  return age < ttlMs && (maxAgeMs === null || age <= maxAgeMs);
}
