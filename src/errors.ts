/** What went wrong, in the words of the API: `code` -> HTTP status and type. */
const TABLE = {
  invalid_json: [400, "invalid_request_error"],
  invalid_parameter: [400, "invalid_request_error"],
  duplicate_parameter: [400, "invalid_request_error"],
  unsupported_parameter: [400, "invalid_request_error"],
  context_length_exceeded: [400, "invalid_request_error"],
  invalid_config: [400, "invalid_request_error"],
  invalid_api_key: [401, "invalid_request_error"],
  permission_denied: [403, "permission_error"],
  origin_not_allowed: [403, "permission_error"],
  host_not_allowed: [403, "permission_error"],
  model_not_found: [404, "invalid_request_error"],
  unknown_url: [404, "invalid_request_error"],
  method_not_allowed: [405, "invalid_request_error"],
  request_too_large: [413, "invalid_request_error"],
  unsupported_media_type: [415, "invalid_request_error"],
  rate_limit_exceeded: [429, "rate_limit_error"],
  insufficient_quota: [429, "insufficient_quota"],
  /** Only ever in the record: nobody is left to read it. */
  client_closed_request: [499, "invalid_request_error"],
  internal_error: [500, "server_error"],
  unsupported_endpoint: [501, "invalid_request_error"],
  upstream_unreachable: [502, "server_error"],
  upstream_error: [502, "server_error"],
  upstream_invalid_response: [502, "server_error"],
  upstream_incomplete: [502, "server_error"],
  /** Only ever inside a stream. */
  output_limit_exceeded: [502, "server_error"],
  no_backend_available: [503, "server_error"],
  model_load_failed: [503, "server_error"],
  overloaded: [503, "server_error"],
  shutting_down: [503, "server_error"],
  upstream_timeout: [504, "server_error"],
  not_cached: [504, "invalid_request_error"],
} as const;

export type ErrorCode = keyof typeof TABLE;

interface ErrorDetails {
  /** The field of the request that is at fault. */
  param?: string | undefined;
  /** When to try again; whoever may, gets the header. */
  retryAfterMs?: number | undefined;
  /** Every mistake of an `invalid_config`. */
  mistakes?: readonly object[] | undefined;
  /** Methods for a 405. */
  allow?: string | undefined;
  /** What the engine said, word for word: for the log, never for the client. */
  detail?: string | undefined;
  /** An engine's refusal that is passed on with its own status, type and code. */
  passed?: { status: number; type: string; code: string | null } | undefined;
}

/** Every error a client may see. Its message says what to do, in one sentence or two. */
export class GatewayError extends Error {
  override readonly name = "GatewayError";
  readonly status: number;
  readonly type: string;
  readonly code: string | null;
  readonly param: string | null;
  readonly retryAfterMs: number | null;
  readonly allow: string | null;
  readonly mistakes: readonly object[] | null;
  readonly detail: string | null;
  /** For record and metrics: one of few words, never an engine's own. */
  override readonly cause: string;

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}) {
    super(message);
    const [status, type] = TABLE[code];
    this.status = details.passed?.status ?? status;
    this.type = details.passed?.type ?? type;
    this.code = details.passed === undefined ? code : details.passed.code;
    this.param = details.param ?? null;
    this.retryAfterMs = details.retryAfterMs ?? null;
    this.allow = details.allow ?? null;
    this.mistakes = details.mistakes ?? null;
    this.detail = details.detail ?? null;
    this.cause = details.passed === undefined ? code : "invalid_request_error";
  }

  /** Response headers that belong to this error. */
  headers(): Record<string, string> {
    const headers: Record<string, string> = {};
    if (this.allow !== null) headers["allow"] = this.allow;
    if (this.retryAfterMs !== null) {
      const seconds = Math.max(1, Math.ceil(this.retryAfterMs / 1000));
      headers["retry-after"] = String(seconds);
      headers["retry-after-ms"] = String(Math.max(1, Math.ceil(this.retryAfterMs)));
      // SDKs retry at once when the number is beyond what they honour.
      if (seconds > 60) headers["x-should-retry"] = "false";
    }
    return headers;
  }
}

/** Whatever was thrown, as an error that may be shown: anything unforeseen is our bug. */
export function asGatewayError(error: unknown): GatewayError {
  if (error instanceof GatewayError) return error;
  const detail = error instanceof Error ? (error.stack ?? error.message) : String(error);
  return new GatewayError(
    "internal_error",
    "the gateway made a mistake; its log has the details under this request id",
    { detail },
  );
}

/** Text without what could break up or colour a line in a log or a terminal. */
export function printable(text: string): string {
  // oxlint-disable-next-line no-control-regex -- control characters are what it is about
  return text.replaceAll(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]/g, "\uFFFD");
}

/** A value of the client inside a message: bounded, without control characters. */
export function quote(value: unknown): string {
  const text = typeof value === "string" ? value : (JSON.stringify(value) ?? String(value));
  const cut = text.length > 100 ? `${text.slice(0, 100)}…` : text;
  return `"${printable(cut)}"`;
}
