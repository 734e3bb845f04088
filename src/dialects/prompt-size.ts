import type { PromptSize } from "../core/estimate.ts";
import { isRecord } from "./dialect.ts";

/** Parts of a message that are no text, in the three APIs that have them. */
const IMAGES = new Set(["image_url", "input_image", "image"]);
/** Where such a part holds its data, at whatever depth. */
const MOST_LEVELS = 3;

/**
 * How much there is to read in a request: the size of its body without what is no text in it.
 *
 * @param bytes of the body.
 */
export function promptSizeOf(body: Record<string, unknown>, bytes: number): PromptSize {
  const list = [body["messages"], body["input"]].find(Array.isArray) ?? [];
  // What is embedded is a list as well, of texts.
  const messages = (list as unknown[]).filter(isRecord);
  const size = { bytes, messages: messages.length, images: 0 };
  for (const { content } of messages) {
    if (!Array.isArray(content)) continue;
    for (const part of content as unknown[]) {
      if (!isRecord(part) || !IMAGES.has(String(part["type"]))) continue;
      size.images++;
      size.bytes -= lengthIn(part);
    }
  }
  return { ...size, bytes: Math.max(0, size.bytes) };
}

function lengthIn(value: unknown, level = 0): number {
  if (typeof value === "string") return value.length;
  if (!isRecord(value) || level === MOST_LEVELS) return 0;
  return Object.values(value).reduce<number>((sum, each) => sum + lengthIn(each, level + 1), 0);
}

/** Top-level fields whose text becomes the prompt. */
const PROMPT_FIELDS = words(
  "system instructions messages prompt suffix input tools functions documents",
);
/** Parts that are no text, and thoughts of earlier answers, which templates leave out. */
const NO_TEXT = /image|audio|video|file|document|thinking|reasoning/;
const THOUGHTS = new Set(words("thinking reasoning reasoning_content encrypted_content signature"));
/** Deeper ones are left out. */
const DEEPEST = 64;

function words(text: string): string[] {
  return text.split(" ");
}

/** UTF-8 bytes of the text in a request that surely goes into its prompt: no more than there is. */
export function textBytesOf(body: Record<string, unknown>): number {
  return PROMPT_FIELDS.reduce((sum, field) => sum + textIn(body[field], 0), 0);
}

function textIn(value: unknown, depth: number): number {
  if (typeof value === "string") return value.startsWith("data:") ? 0 : Buffer.byteLength(value);
  if (typeof value !== "object" || value === null || depth > DEEPEST) return 0;
  if (!Array.isArray(value) && NO_TEXT.test(String(Reflect.get(value, "type")))) return 0;
  let sum = 0;
  for (const [name, each] of Object.entries(value)) {
    if (!THOUGHTS.has(name)) sum += textIn(each, depth + 1);
  }
  return sum;
}
