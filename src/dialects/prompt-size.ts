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
