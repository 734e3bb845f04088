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
import { keysOf, MESSAGES_WANTS, wantsIn } from "./wants.ts";

const TYPE_OF_STATUS: Record<number, string> = {
  401: "authentication_error",
  403: "permission_error",
  404: "not_found_error",
  413: "request_too_large",
  429: "rate_limit_error",
  503: "overloaded_error",
  504: "timeout_error",
};

function errorBody(error: GatewayError, requestId: string) {
  const type =
    TYPE_OF_STATUS[error.status] ?? (error.status < 500 ? "invalid_request_error" : "api_error");
  return { type: "error", error: { type, message: error.message }, request_id: requestId };
}

export const anthropic: Dialect = {
  errorBody,
  errorEvent: (error, requestId) =>
    `event: error\ndata: ${JSON.stringify(errorBody(error, requestId))}\n\n`,
};

function readUsage(usage: unknown, facts: AnswerFacts) {
  if (!isRecord(usage)) return;
  const cached = numberOf(usage["cache_read_input_tokens"]);
  const fresh = numberOf(usage["input_tokens"]);
  // `input_tokens` leaves the cached ones out; later events may repeat only the output.
  const input = fresh === null ? (facts.usage?.input ?? 0) : fresh + (cached ?? 0);
  const output = numberOf(usage["output_tokens"]) ?? facts.usage?.output ?? 0;
  facts.usage = { input, output, cached: cached ?? facts.usage?.cached ?? null };
}

export const messages: Endpoint = {
  path: "/v1/messages",
  operation: "chat",
  dialect: anthropic,
  keys: [...VIEW_KEYS, ...keysOf(MESSAGES_WANTS)],
  view: (body) => readView(body, wantsIn(body, MESSAGES_WANTS)),
  usageOnRequest: false,
  telling: /"type"\s*:\s*"(?:message_start|message_delta|message_stop|error)"|"error"\s*:\s*[{"]/,
  deltaMark: '"content_block_delta"',
  readEvent(data, facts) {
    switch (data["type"]) {
      case "message_start": {
        const message = isRecord(data["message"]) ? data["message"] : {};
        facts.id ??= textOf(message["id"]);
        facts.model ??= textOf(message["model"]);
        facts.choices.add(0);
        readUsage(message["usage"], facts);
        break;
      }
      case "content_block_delta":
        facts.deltas++;
        break;
      case "message_delta": {
        const reason = isRecord(data["delta"]) ? textOf(data["delta"]["stop_reason"]) : null;
        readUsage(data["usage"], facts);
        if (reason !== null) {
          facts.finished.add(0);
          facts.finishReasons.push(reason);
        }
        break;
      }
      case "message_stop":
        facts.ended = true;
        break;
      default:
        if (data["type"] === "error" || isRecord(data["error"])) {
          facts.error = errorWords(data["error"]) ?? "no words";
        }
    }
    return "other";
  },
  readWhole(body, facts) {
    if (body["type"] !== "message") return false;
    facts.id = textOf(body["id"]);
    facts.model = textOf(body["model"]);
    readUsage(body["usage"], facts);
    const reason = textOf(body["stop_reason"]);
    if (reason !== null) facts.finishReasons.push(reason);
    return true;
  },
};

export const countTokens: Endpoint = {
  ...messages,
  path: "/v1/messages/count_tokens",
  operation: "count_tokens",
  view: (body) => ({ ...readView(body), stream: false }),
  readWhole: (body) => numberOf(body["input_tokens"]) !== null,
};
