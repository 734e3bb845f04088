const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const COMMA = 0x2c;
const COLON = 0x3a;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;

/** Where the value of a top-level key stands: from `start` up to, not including, `end`. */
export interface Span {
  start: number;
  end: number;
}

/** The top-level keys of a JSON object in their order, a repeated key several times; `start`: of its name. */
export type Keys = { name: string; start: number; value: Span }[];

const encoder = new TextEncoder();
const decoder = new TextDecoder();

function isSpace(byte: number | undefined): boolean {
  return byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09;
}

/** The offset behind the string that opens at `start`. */
export function skipString(bytes: Uint8Array, start: number): number {
  let quote = bytes.indexOf(QUOTE, start + 1);
  for (;;) {
    if (quote === -1) return bytes.length;
    let backslashes = 0;
    while (bytes[quote - 1 - backslashes] === BACKSLASH) backslashes++;
    if (backslashes % 2 === 0) return quote + 1;
    quote = bytes.indexOf(QUOTE, quote + 1);
  }
}

/** The offset behind the value that begins at `start`. */
function skipValue(bytes: Uint8Array, start: number): number {
  let depth = 0;
  let at = start;
  while (at < bytes.length) {
    const byte = bytes[at];
    if (byte === QUOTE) {
      at = skipString(bytes, at);
      if (depth === 0) return at;
      continue;
    }
    if (byte === OPEN_BRACE || byte === OPEN_BRACKET) depth++;
    else if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) {
      // The brace that closes the object around a number or a literal.
      if (depth === 0) return at;
      depth--;
      if (depth === 0) return at + 1;
    } else if (depth === 0 && (byte === COMMA || isSpace(byte))) return at;
    at++;
  }
  return at;
}

/**
 * Finds the top-level keys of a JSON object without building its values.
 *
 * @param bytes UTF-8 of a valid JSON object (parse it first; other input gives meaningless spans).
 */
export function topLevelKeys(bytes: Uint8Array): Keys {
  const keys: Keys = [];
  let at = bytes.indexOf(OPEN_BRACE) + 1;
  while (at < bytes.length) {
    while (isSpace(bytes[at]) || bytes[at] === COMMA) at++;
    if (bytes[at] !== QUOTE) break;
    const start = at;
    const afterName = skipString(bytes, at);
    const name: unknown = JSON.parse(decoder.decode(bytes.subarray(at, afterName)));
    at = afterName;
    while (isSpace(bytes[at]) || bytes[at] === COLON) at++;
    const end = skipValue(bytes, at);
    keys.push({ name: String(name), start, value: { start: at, end } });
    at = end;
  }
  return keys;
}

/**
 * Replaces the values of top-level keys in the bytes of a JSON object and adds those that are not
 * there; every other byte stays as it is, so that numbers and unknown fields reach the engine as
 * the client wrote them.
 *
 * @param edits key -> its new value as JSON text or bytes.
 */
export function splice(
  bytes: Uint8Array,
  keys: Keys,
  edits: ReadonlyMap<string, string | Uint8Array>,
): Uint8Array {
  if (edits.size === 0) return bytes;
  const parts: Uint8Array[] = [];
  let copied = 0;
  const write = (value: string | Uint8Array) =>
    parts.push(typeof value === "string" ? encoder.encode(value) : value);
  const missing = new Map(edits);
  const afterBrace = bytes.indexOf(OPEN_BRACE) + 1;
  for (const { name } of keys) missing.delete(name);
  if (missing.size > 0) {
    parts.push(bytes.subarray(0, afterBrace));
    copied = afterBrace;
    let separator = "";
    for (const [name, value] of missing) {
      write(`${separator}${JSON.stringify(name)}:`);
      write(value);
      separator = ",";
    }
    if (keys.length > 0) write(",");
  }
  for (const { name, value } of keys) {
    const edit = edits.get(name);
    if (edit === undefined) continue;
    parts.push(bytes.subarray(copied, value.start));
    write(edit);
    copied = value.end;
  }
  parts.push(bytes.subarray(copied));
  return concat(parts);
}

/** What stands between two members, or around the last, goes with those that are left out. */
export function spansOf(keys: Keys, isGone: (name: string) => boolean): Span[] {
  const spans: Span[] = [];
  let at = 0;
  while (at < keys.length) {
    const from = at;
    while (at < keys.length && isGone(keys[at]?.name ?? "")) at++;
    const first = keys[from];
    const last = keys[at - 1];
    if (at > from && first !== undefined && last !== undefined) {
      const next = keys[at];
      // The last of an object takes the comma before it along, any other the one behind it.
      const before = next === undefined ? keys[from - 1]?.value.end : undefined;
      spans.push({ start: before ?? first.start, end: next?.start ?? last.value.end });
    }
    at++;
  }
  return spans;
}

/** The bytes without these spans, which stand in order and apart. */
export function without(bytes: Uint8Array, spans: readonly Span[]): Uint8Array {
  const parts: Uint8Array[] = [];
  let from = 0;
  for (const { start, end } of spans) {
    parts.push(bytes.subarray(from, start));
    from = end;
  }
  parts.push(bytes.subarray(from));
  return concat(parts);
}

/** A name as Go compares it: regardless of case, where the long s and the Kelvin sign are s and k. */
export function folded(name: string): string {
  return name.toUpperCase().toLowerCase();
}

/** One array of all the parts' bytes. */
export function concat(parts: readonly Uint8Array[]): Uint8Array {
  const [only] = parts;
  if (only !== undefined && parts.length === 1) return only;
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
