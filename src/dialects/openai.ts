import type { GatewayError } from "../errors.ts";
import {
  errorWords,
  isRecord,
  numberOf,
  readView,
  textOf,
  VIEW_KEYS,
  type AnswerFacts,
  type Dialect,
  type Endpoint,
} from "./dialect.ts";
import {
  CHAT_WANTS,
  COMPLETION_WANTS,
  EMBEDDING_WANTS,
  keysOf,
  RESPONSES_WANTS,
  wantsIn,
} from "./wants.ts";

function errorBody(error: GatewayError) {
  const { message, type, param, code, mistakes } = error;
  const errors = mistakes === null ? {} : { errors: mistakes };
  return { error: { message, type, param, code, ...errors } };
}

export const openai: Dialect = {
  errorBody,
  errorEvent: (error) => `data: ${JSON.stringify(errorBody(error))}\n\n`,
};

/** The Responses API names the event as well. */
const responsesDialect: Dialect = {
  errorBody,
  errorEvent: (error) => `event: error\ndata: ${JSON.stringify(errorBody(error))}\n\n`,
};

function readUsage(usage: unknown, facts: AnswerFacts) {
  if (!isRecord(usage)) return;
  const input = numberOf(usage["prompt_tokens"]) ?? numberOf(usage["input_tokens"]);
  const output = numberOf(usage["completion_tokens"]) ?? numberOf(usage["output_tokens"]);
  // Ollama's completions carry zeros on every chunk and the truth on the last.
  if (!input && !output) return;
  const details = usage["prompt_tokens_details"] ?? usage["input_tokens_details"];
  const cached = isRecord(details) ? numberOf(details["cached_tokens"]) : null;
  facts.usage = { input: input ?? 0, output: output ?? 0, cached };
}

function readIdentity(body: Record<string, unknown>, facts: AnswerFacts) {
  facts.id ??= textOf(body["id"]);
  facts.model ??= textOf(body["model"]);
}

function readFinish(choice: Record<string, unknown>, facts: AnswerFacts) {
  const index = numberOf(choice["index"]) ?? 0;
  facts.choices.add(index);
  const reason = textOf(choice["finish_reason"]);
  if (reason === null || facts.finished.has(index)) return;
  facts.finished.add(index);
  facts.finishReasons.push(reason);
}

const TOKEN_FIELDS = ["content", "reasoning", "reasoning_content", "refusal", "function_call"];

/** A role alone, or an empty string, is not a token yet. */
function carriesToken(choice: Record<string, unknown>): boolean {
  if (choice["text"]) return true;
  const delta = choice["delta"];
  if (!isRecord(delta)) return false;
  const calls = delta["tool_calls"];
  return (Array.isArray(calls) && calls.length > 0) || TOKEN_FIELDS.some((field) => delta[field]);
}

function readChunk(data: Record<string, unknown>, facts: AnswerFacts): "usage" | "other" {
  if (data["error"] !== undefined && data["error"] !== null) {
    facts.error = errorWords(data["error"]) ?? "no words";
    return "other";
  }
  readIdentity(data, facts);
  readUsage(data["usage"], facts);
  const choices = Array.isArray(data["choices"]) ? data["choices"].filter(isRecord) : [];
  for (const choice of choices) readFinish(choice, facts);
  if (choices.some(carriesToken)) facts.deltas++;
  return Array.isArray(data["choices"]) && choices.length === 0 && isRecord(data["usage"])
    ? "usage"
    : "other";
}

function readChoices(body: Record<string, unknown>, facts: AnswerFacts): boolean {
  const choices = body["choices"];
  if (!Array.isArray(choices)) return false;
  readIdentity(body, facts);
  readUsage(body["usage"], facts);
  for (const choice of choices) if (isRecord(choice)) readFinish(choice, facts);
  return true;
}

/** An answer that is one JSON object with a list in it. */
function readListed(key: string): Endpoint["readWhole"] {
  return (body, facts) => {
    if (!Array.isArray(body[key])) return false;
    readIdentity(body, facts);
    readUsage(body["usage"], facts);
    return true;
  };
}

const chunked = {
  dialect: openai,
  usageOnRequest: true,
  // A further choice is told as well: the answer is whole when every choice is finished.
  telling: /"finish_reason"\s*:\s*"|"usage"\s*:\s*\{|"error"\s*:\s*[{"]|"index"\s*:\s*[1-9]/,
  deltaMark: '"choices"',
  readEvent: readChunk,
  readWhole: readChoices,
} satisfies Partial<Endpoint>;

const unstreamed = {
  ...chunked,
  usageOnRequest: false,
  keys: VIEW_KEYS,
  // An answer in one piece whatever the body says: nothing here reads `stream`.
  view: (body: Record<string, unknown>) => ({ ...readView(body), stream: false }),
} satisfies Partial<Endpoint>;

/** One per prompt, `n` times. */
function choicesIn({ n, prompt }: Record<string, unknown>): number {
  const isList = Array.isArray(prompt) && typeof prompt[0] !== "number";
  return Math.max(1, numberOf(n) ?? 1) * (isList ? Math.max(1, prompt.length) : 1);
}

export const chatCompletions: Endpoint = {
  ...chunked,
  path: "/v1/chat/completions",
  operation: "chat",
  keys: [...VIEW_KEYS, ...keysOf(CHAT_WANTS)],
  view: (body) => ({
    ...readView(body, wantsIn(body, CHAT_WANTS)),
    choices: choicesIn({ n: body["n"] }),
  }),
};

export const completions: Endpoint = {
  ...chunked,
  path: "/v1/completions",
  operation: "text_completion",
  keys: [...VIEW_KEYS, ...keysOf(COMPLETION_WANTS)],
  view: (body) => ({
    ...readView(body, wantsIn(body, COMPLETION_WANTS)),
    choices: choicesIn(body),
  }),
};

export const embeddings: Endpoint = {
  ...unstreamed,
  path: "/v1/embeddings",
  operation: "embeddings",
  keys: [...VIEW_KEYS, ...keysOf(EMBEDDING_WANTS)],
  view: (body) => ({ ...unstreamed.view(body), wants: wantsIn(body, EMBEDDING_WANTS) }),
  readWhole: readListed("data"),
};

export const rerank: Endpoint = {
  ...unstreamed,
  path: "/v1/rerank",
  operation: "rerank",
  readWhole: readListed("results"),
  takesList: true,
};

const RESPONSE_ENDS = new Set(["response.completed", "response.incomplete"]);

export const responses: Endpoint = {
  path: "/v1/responses",
  operation: "chat",
  dialect: responsesDialect,
  keys: [...VIEW_KEYS, ...keysOf(RESPONSES_WANTS)],
  view: (body) => readView(body, wantsIn(body, RESPONSES_WANTS)),
  usageOnRequest: false,
  telling: /"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed)|error)"|"error"\s*:\s*[{"]/,
  deltaMark: '.delta"',
  readEvent(data, facts) {
    const type = textOf(data["type"]) ?? "";
    const response = isRecord(data["response"]) ? data["response"] : {};
    if (type.endsWith(".delta")) facts.deltas++;
    readIdentity(response, facts);
    if (RESPONSE_ENDS.has(type)) {
      readUsage(response["usage"], facts);
      facts.ended = true;
      facts.finishReasons.push(textOf(response["status"]) ?? "completed");
    } else if (type === "response.failed") {
      facts.error = errorWords(response["error"]) ?? "the response failed";
    } else if (type === "error" || isRecord(data["error"])) {
      facts.error = errorWords(data["error"] ?? data) ?? "no words";
    }
    return "other";
  },
  readWhole(body, facts) {
    if (body["object"] !== "response") return false;
    readIdentity(body, facts);
    readUsage(body["usage"], facts);
    facts.finishReasons.push(textOf(body["status"]) ?? "completed");
    return true;
  },
};
