import { isRecord, textOf, type Ability, type Want } from "./dialect.ts";

type Body = Record<string, unknown>;

/** How one want shows in a request body. */
export interface WantRule {
  want: Want;
  /** The top-level keys that `shows` reads. */
  keys: readonly string[];
  shows: (body: Body) => boolean;
}

function rule(
  what: Ability,
  param: string,
  shows: WantRule["shows"],
  keys: readonly string[] = [param],
): WantRule {
  return { want: { what, param }, keys, shows };
}

function isFilled(value: unknown): boolean {
  if (Array.isArray(value)) return value.length > 0;
  return isRecord(value) && Object.keys(value).length > 0;
}

function isAboveOne(value: unknown): boolean {
  return typeof value === "number" && value > 1;
}

/** The model is not free to choose: by a word (OpenAI), or by an object with a type (all three). */
function forcesTools(body: Body): boolean {
  const choice = body["tool_choice"];
  const kind = isRecord(choice) ? textOf(choice["type"]) : textOf(choice);
  if (kind === null || kind === "auto") return false;
  // Without tools there is nothing to leave uncalled.
  return kind !== "none" || isFilled(body["tools"]);
}

/** The engine would have to fetch it; OpenAI's two APIs say `image_url`, Anthropic's `source`. */
function isRemoteImage(part: unknown): boolean {
  if (!isRecord(part)) return false;
  const image = part["image_url"] ?? part["source"];
  const url = isRecord(image) ? image["url"] : image;
  return typeof url === "string" && /^https?:/i.test(url);
}

function hasRemoteImage(messages: unknown): boolean {
  if (!Array.isArray(messages)) return false;
  for (const message of messages) {
    const content: unknown = isRecord(message) ? message["content"] : null;
    if (Array.isArray(content) && content.some(isRemoteImage)) return true;
  }
  return false;
}

/** Tokens where text is usual: `[1, 2]` or `[[1], [2]]`. */
function isTokens(value: unknown): boolean {
  if (!Array.isArray(value)) return false;
  const first: unknown = value[0];
  return typeof first === "number" || Array.isArray(first);
}

const CHOICES = rule("n", "n", (body) => isAboveOne(body["n"]));
const LOGIT_BIAS = rule("logit_bias", "logit_bias", (body) => isFilled(body["logit_bias"]));
const TOOL_CHOICE = rule("tool_choice", "tool_choice", forcesTools, ["tool_choice", "tools"]);
const IMAGES = rule("image_url", "messages", (body) => hasRemoteImage(body["messages"]));

export const CHAT_WANTS: readonly WantRule[] = [CHOICES, LOGIT_BIAS, TOOL_CHOICE, IMAGES];

export const COMPLETION_WANTS: readonly WantRule[] = [
  CHOICES,
  LOGIT_BIAS,
  rule("best_of", "best_of", (body) => isAboveOne(body["best_of"])),
  rule("echo", "echo", (body) => body["echo"] === true),
  rule("prompt_list", "prompt", (body) => Array.isArray(body["prompt"])),
];

export const EMBEDDING_WANTS: readonly WantRule[] = [
  rule("token_input", "input", (body) => isTokens(body["input"])),
];

export const MESSAGES_WANTS: readonly WantRule[] = [TOOL_CHOICE, IMAGES];

export const RESPONSES_WANTS: readonly WantRule[] = [
  TOOL_CHOICE,
  rule("image_url", "input", (body) => hasRemoteImage(body["input"])),
  rule("stored_response", "previous_response_id", (body) => !!body["previous_response_id"]),
];

/** The keys that these rules read. */
export function keysOf(rules: readonly WantRule[]): string[] {
  return [...new Set(rules.flatMap(({ keys }) => keys))];
}

const NOTHING: readonly Want[] = [];

/** What a body asks for that not every engine does; most ask for nothing. */
export function wantsIn(body: Body, rules: readonly WantRule[]): readonly Want[] {
  let wants = NOTHING;
  for (const { want, shows } of rules) if (shows(body)) wants = [...wants, want];
  return wants;
}
