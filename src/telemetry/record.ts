/** How a request ended. */
export type Ending = "completed" | "cancelled" | "failed";

/** Where a request is; the phase a client left in is the cause of its ending. */
export type Phase = "queued" | "loading" | "connecting" | "first_token" | "streaming" | "retrying";

/**
 * The one record of a request: its log line, and what metrics and span attributes are made of.
 * Filled while the request lives, complete when it ends. Times are milliseconds.
 */
export interface RequestRecord {
  request_id: string;
  client_request_id: string | null;
  trace_id: string | null;
  tenant: string | null;
  endpoint: string;
  /** Public name of the model that answered, null where none was resolved. */
  model: string | null;
  /** As the client wrote it. */
  asked_model: string | null;
  backend_id: string | null;
  stream: boolean;
  cache_hit: boolean;
  cache: string;
  /** From accept to the first token; null for answers in one piece. */
  ttft: number | null;
  tokens_generated: number | null;
  tokens_input: number | null;
  /** Counted from events because the engine did not report. */
  tokens_estimated: boolean;
  latency_ms: number;
  status: number;
  ending: Ending;
  /** An error code, or the phase the client left in; null for a completed request. */
  cause: string | null;
  attempts: number;
  reason: string | null;
  queue_ms: number;
  load_ms: number;
}

/** What stands in `cache` until the cache has been asked. */
export const REFUSED = "bypass;reason=refused";

export function newRecord(requestId: string, endpoint: string): RequestRecord {
  return {
    request_id: requestId,
    client_request_id: null,
    trace_id: null,
    tenant: null,
    endpoint,
    model: null,
    asked_model: null,
    backend_id: null,
    stream: false,
    cache_hit: false,
    cache: REFUSED,
    ttft: null,
    tokens_generated: null,
    tokens_input: null,
    tokens_estimated: false,
    latency_ms: 0,
    status: 0,
    ending: "failed",
    cause: null,
    attempts: 0,
    reason: null,
    queue_ms: 0,
    load_ms: 0,
  };
}

/** Milliseconds for people: three decimals are enough. */
export function rounded(milliseconds: number): number {
  return Math.round(milliseconds * 1000) / 1000;
}
