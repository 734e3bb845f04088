import type { Keys } from "../core/splice.ts";

/**
 * By path the fields of which any one limits an answer; the first is put in where there is none. On
 * other paths nothing is generated.
 */
export type LimitFields = Readonly<Record<string, readonly string[]>>;

export const LIMIT_FIELDS: LimitFields = {
  "/v1/chat/completions": ["max_tokens", "max_completion_tokens"],
  "/v1/completions": ["max_tokens"],
  "/v1/messages": ["max_tokens"],
  "/v1/responses": ["max_output_tokens"],
};

/** Which of them an engine obeys where there are several differs, so all of them are lowered. */
const ALL_FIELDS = ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"];

/** A value of more bytes is no sensible number, and not worth reading. */
const NUMBER_BYTES = 64;

const decoder = new TextDecoder();

/** The number that a field asks for: null for none, NaN for what is no number. */
function askedBy(value: string | Uint8Array): number | null {
  if (value.length > NUMBER_BYTES) return Number.NaN;
  const asked: unknown = JSON.parse(typeof value === "string" ? value : decoder.decode(value));
  return asked === null || typeof asked === "number" ? asked : Number.NaN;
}

/** The JSON of a top-level value in a body; undefined where there is none. */
export function valueOf(bytes: Uint8Array, keys: Keys, name: string): Uint8Array | undefined {
  const span = keys.find((key) => key.name === name)?.value;
  return span && bytes.subarray(span.start, span.end);
}

/**
 * Adds to the edits of a body what keeps its answer within the cap: lowers each field that would let
 * it run longer, and puts one in where there is none. What asks for less stays as it is written.
 *
 * Null is as good as nothing. Whatever else is no whole number from 1 up is no limit to some engine:
 * 0 falls through to the next field in SGLang, -1 is endless in Ollama and llama.cpp, and llama.cpp
 * leaves out what is no number.
 *
 * @param fields of which the engine obeys any at this path
 */
export function capOutput(
  bytes: Uint8Array,
  keys: Keys,
  edits: Map<string, string | Uint8Array>,
  fields: readonly string[],
  cap: number,
): void {
  const [first] = fields;
  if (first === undefined) return;
  let isLimited = false;
  for (const field of ALL_FIELDS) {
    const value = edits.get(field) ?? valueOf(bytes, keys, field);
    if (value === undefined) continue;
    const asked = askedBy(value);
    if (asked === null) continue;
    if (fields.includes(field)) isLimited = true;
    const isLess = Number.isInteger(asked) && asked >= 1 && asked <= cap;
    if (!isLess) edits.set(field, String(cap));
  }
  if (!isLimited) edits.set(first, String(cap));
}
