import { isRecord, textOf } from "./dialect.ts";

/** The fields that hold a prompt, by path, in the order in which templates put them to the model. */
const PROMPT_FIELDS: ReadonlyMap<string, readonly string[]> = new Map([
  ["/v1/chat/completions", ["tools", "functions", "messages"]],
  ["/v1/completions", ["prompt"]],
  ["/v1/messages", ["system", "tools", "messages"]],
  ["/v1/responses", ["instructions", "tools", "input"]],
  ["/api/chat", ["tools", "messages"]],
  ["/api/generate", ["system", "context", "images", "prompt"]],
]);
const DATA_FIELDS = new Set(["tools", "functions", "images"]);

/** What a message, or a part of one, says, and what it calls. Its other fields no model sees. */
const TEXT_FIELDS = [
  "thinking",
  "reasoning",
  "reasoning_content",
  "summary",
  "content",
  "refusal",
  "output",
];
const CALL_FIELDS = ["name", "arguments", "input", "function_call", "tool_calls"];
const SAYING = [...TEXT_FIELDS, ...CALL_FIELDS];

/** No real request nests deeper, and recursion up to here is safe. */
const MOST_LEVELS = 64;
/** Some 20,000 messages. What is made of more, is made to keep us busy, and cut. */
const MOST_PIECES = 100_000;

/** Longer strings of media are told apart by their length and so many characters. */
const LONGEST_WORD = 256;
const SAMPLE = 64;

const MOST_SESSION_LENGTH = 200;

/**
 * The text of a prompt in the order in which engines see it, for `chainOf`. The pieces of a turn
 * begin with those of the turn before it, whatever clients move about in between (Claude Code's
 * `cache_control` is always on the last message).
 *
 * @param path of the endpoint; those that read no prompt have no text.
 */
export function conversationOf(path: string, body: Record<string, unknown>): string[] {
  const pieces: string[] = [];
  for (const field of PROMPT_FIELDS.get(path) ?? []) {
    const value = body[field];
    if (DATA_FIELDS.has(field)) readData(pieces, value, field === "images");
    else read(pieces, value);
  }
  return pieces;
}

/** A text, a message, a part of one, or a list of them. */
function read(pieces: string[], value: unknown, level = 0): void {
  if (typeof value === "string") pieces.push(value);
  else if (level === MOST_LEVELS) return;
  else if (isTokens(value)) pieces.push(value.join(","));
  else if (Array.isArray(value)) {
    for (const each of value) {
      if (pieces.length >= MOST_PIECES) return;
      read(pieces, each, level + 1);
    }
  } else if (isRecord(value)) readRecord(pieces, value, level);
}

function isTokens(value: unknown): value is number[] {
  return (
    Array.isArray(value) && value.length > 0 && value.every((each) => typeof each === "number")
  );
}

function readRecord(pieces: string[], record: Record<string, unknown>, level: number): void {
  const { role, type, text, images } = record;
  if (typeof text === "string" && role === undefined) {
    // A part that is text is the same as the text alone.
    pieces.push(text);
    return;
  }
  pieces.push("\u0000", textOf(role) ?? textOf(type) ?? "", "\u0000");
  if (!SAYING.some((field) => field in record)) {
    readData(pieces, record, true, level);
    return;
  }
  for (const field of TEXT_FIELDS) read(pieces, record[field], level + 1);
  for (const field of CALL_FIELDS) readData(pieces, record[field], false, level + 1);
  readData(pieces, images, true, level + 1);
}

/**
 * A tool, its arguments, an image, a file: whatever has its own structure. Much like JSON.stringify,
 * which is not used because it would go as deep as a client likes.
 *
 * @param isMedia long strings in it are no text.
 */
function readData(pieces: string[], value: unknown, isMedia: boolean, level = 0): void {
  if (typeof value === "string") pieces.push(isMedia ? inShort(value) : value, ",");
  else if (typeof value === "number" || typeof value === "boolean") pieces.push(`${value}`, ",");
  else if (typeof value === "object" && value !== null && level < MOST_LEVELS) {
    readMembers(pieces, value, isMedia, level + 1);
  }
}

function readMembers(pieces: string[], value: object, isMedia: boolean, level: number): void {
  pieces.push("[");
  if (Array.isArray(value)) {
    for (const each of value) {
      if (pieces.length >= MOST_PIECES) return;
      readData(pieces, each, isMedia, level);
    }
    return;
  }
  for (const [name, each] of Object.entries(value)) {
    if (pieces.length >= MOST_PIECES) return;
    if (name === "cache_control") continue;
    pieces.push(name, ":");
    readData(pieces, each, isMedia, level);
  }
}

/** Pictures of one size begin alike; in the middle and at the end they differ. */
function inShort(data: string): string {
  if (data.length <= LONGEST_WORD) return data;
  const middle = data.length >> 1;
  return `${data.length}:${data.slice(middle, middle + SAMPLE)}${data.slice(-SAMPLE)}`;
}

/**
 * The session a client names: requests of one session go where its last one went.
 *
 * @returns null when it names none.
 */
export function sessionOf(
  headers: Pick<Headers, "get">,
  body: Record<string, unknown>,
): string | null {
  const named = [
    headers.get("x-session-id"),
    headers.get("x-claude-code-session-id"),
    headers.get("session-id"),
    textOf(body["prompt_cache_key"]),
  ];
  for (const name of named) {
    const session = name?.trim().slice(0, MOST_SESSION_LENGTH);
    if (session) return session;
  }
  return null;
}
