import { isRecord } from "./is-record.ts";

/** The vector of one input, as it is kept. */
export interface Vector {
  /** 32-bit floats, little endian: as base64 they are what clients ask for most. */
  bytes: Uint8Array;
  /** The input's share of the prompt tokens that the engine counted. */
  tokens: number;
  /** As the engine calls it. */
  model: string;
}

export type Encoding = "float" | "base64";

const encoder = new TextEncoder();

/** What tokens, indexes and their number can be. */
function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && Number(value) >= 0;
}

function isTokens(value: unknown): boolean {
  return Array.isArray(value) && value.length > 0 && value.every(isCount);
}

function isText(value: unknown): boolean {
  return typeof value === "string" && value !== "";
}

/**
 * The inputs of an embeddings request, each as JSON, which is its part of a key and of a request
 * to an engine alike; and how the client wants its vectors. Null for what cannot be taken apart:
 * no input or an empty one, other things than texts or tokens, other encodings.
 */
export function readInputs(
  body: Record<string, unknown>,
): { inputs: string[]; encoding: Encoding } | null {
  const encoding = body["encoding_format"] ?? "float";
  if (encoding !== "float" && encoding !== "base64") return null;
  const input = body["input"];
  const inputs: unknown[] = Array.isArray(input) && !isTokens(input) ? input : [input];
  if (inputs.length === 0 || !(inputs.every(isText) || inputs.every(isTokens))) return null;
  return { inputs: inputs.map((each) => JSON.stringify(each)), encoding };
}

/**
 * What an engine has to compute: each input that is not known, once, in the client's order.
 *
 * @param known the vectors that are there, by input.
 * @param batchSize inputs per request, at least 1.
 */
export function plan(
  inputs: readonly string[],
  known: ReadonlyMap<string, Vector>,
  batchSize: number,
): string[][] {
  const missing = [...new Set(inputs)].filter((input) => !known.has(input));
  const batches: string[][] = [];
  for (let at = 0; at < missing.length; at += batchSize) {
    batches.push(missing.slice(at, at + batchSize));
  }
  return batches;
}

/**
 * The vectors in an engine's answer, in the order of the inputs it was asked for; or, as a text,
 * what is wrong with it.
 *
 * @param answer the parsed body.
 */
export function readVectors(answer: unknown, batch: readonly string[]): Vector[] | string {
  if (!isRecord(answer) || !Array.isArray(answer["data"])) return "no list of embeddings";
  const data: unknown[] = answer["data"];
  if (data.length !== batch.length) return `${data.length} embeddings for ${batch.length} inputs`;
  const found: Uint8Array[] = [];
  for (const each of data) {
    if (!isRecord(each)) return "an embedding that is no object";
    const { index, embedding } = each;
    if (!isCount(index) || index >= batch.length) return "an index that was not asked for";
    if (found[index] !== undefined) return `index ${index} stands twice`;
    const bytes = floatBytes(embedding);
    if (bytes === null) return `embedding ${index} is no list of finite numbers`;
    found[index] = bytes;
  }
  const [first] = found;
  if (found.some(({ length }) => length !== first?.length)) return "embeddings differ in length";
  const model = typeof answer["model"] === "string" ? answer["model"] : "";
  const shares = shareOut(promptTokens(answer["usage"]), batch);
  return found.map((bytes, index) => ({ bytes, tokens: shares[index] ?? 0, model }));
}

function promptTokens(usage: unknown): number {
  const tokens = isRecord(usage) ? usage["prompt_tokens"] : 0;
  return isCount(tokens) ? tokens : 0;
}

/** Whole parts of `total`, by the bytes of each input; their sum is exact. */
function shareOut(total: number, inputs: readonly string[]): number[] {
  const sizes = inputs.map((input) => encoder.encode(input).length);
  const sum = sizes.reduce((left, right) => left + right, 0);
  let size = 0;
  let given = 0;
  return sizes.map((each) => {
    size += each;
    const share = Math.round((total * size) / sum) - given;
    given += share;
    return share;
  });
}

/** Whatever was asked for, some engines answer with base64, and some never do. */
function floatBytes(embedding: unknown): Uint8Array | null {
  const floats = typeof embedding === "string" ? floatsIn(embedding) : floatsOf(embedding);
  if (floats === null || floats.length === 0 || !floats.every(Number.isFinite)) return null;
  return new Uint8Array(floats.buffer);
}

function floatsIn(base64: string): Float32Array<ArrayBuffer> | null {
  try {
    return new Float32Array(Uint8Array.fromBase64(base64).buffer);
  } catch {
    return null;
  }
}

function floatsOf(list: unknown): Float32Array<ArrayBuffer> | null {
  if (!Array.isArray(list) || !list.every((each) => typeof each === "number")) return null;
  return new Float32Array(list);
}

/**
 * False when vectors do not belong together: the model behind a name has changed, and the known ones
 * have to be computed again.
 *
 * @param vectors one for each of the inputs.
 */
export function areAlike(inputs: readonly string[], vectors: ReadonlyMap<string, Vector>): boolean {
  const lengths = new Set(inputs.map((input) => vectors.get(input)?.bytes.length));
  return lengths.size === 1;
}

/**
 * The answer's body for a client that asked for all of these inputs, in pieces: thousands of vectors
 * take a while to write. Of the engine's own answers it has the fields of OpenAI's API and no others.
 *
 * @param vectors one for each of the inputs, and alike.
 */
export function* merge(
  inputs: readonly string[],
  vectors: ReadonlyMap<string, Vector>,
  encoding: Encoding,
): Generator<string> {
  let tokens = 0;
  let model = "";
  yield '{"object":"list","data":[';
  for (const [index, input] of inputs.entries()) {
    const vector = vectors.get(input);
    if (vector === undefined) throw new Error("an input without a vector: `plan` names them");
    tokens += vector.tokens;
    model = vector.model;
    const comma = index === 0 ? "" : ",";
    const embedding = write(vector.bytes, encoding);
    yield `${comma}{"object":"embedding","index":${index},"embedding":${embedding}}`;
  }
  const usage = JSON.stringify({ prompt_tokens: tokens, total_tokens: tokens });
  yield `],"model":${JSON.stringify(model)},"usage":${usage}}`;
}

function write(bytes: Uint8Array, encoding: Encoding): string {
  if (encoding === "base64") return `"${bytes.toBase64()}"`;
  // A copy, because 32-bit floats cannot begin at every offset.
  const floats = new Float32Array(new Uint8Array(bytes).buffer);
  return JSON.stringify(Array.from(floats, shortest));
}

/** The powers of ten that doubles hold exactly. */
const POWERS = Array.from({ length: 23 }, (_, power) => Number(`1e${power}`));

/**
 * The double with the fewest digits that is this 32-bit float: 0.1, not 0.10000000149011612.
 * Up to 6 digits only the nearest decimal can be it, with 9 that always is (subnormal floats may
 * get a digit too many).
 */
function shortest(float: number): number {
  if (float === 0) return 0;
  const exponent = Math.floor(Math.log10(Math.abs(float)));
  for (let digits = 6; digits < 9; digits++) {
    const rounded = round(float, digits, exponent);
    if (Math.fround(rounded) === float) return rounded;
  }
  return round(float, 9, exponent);
}

/** To so many significant digits. */
function round(float: number, digits: number, exponent: number): number {
  const power = POWERS[digits - 1 - exponent];
  // Beyond the exact powers through text, which takes ten times as long.
  if (power === undefined) return Number(float.toPrecision(digits));
  return Math.round(float * power) / power;
}
