/** The verdict on one attempt, for breaker and metrics. */
export type Outcome = "success" | "failure" | "saturated" | "ignore";

/**
 * May the request be sent again before it is committed? `elsewhere`: to another backend, waiting if
 * need be; `free_slot`: to another backend, but only where it starts at once; `no`: never.
 */
export type Retry = "elsewhere" | "free_slot" | "no";

/** What went wrong with one attempt. */
export type Fault =
  /** Refused, reset, or closed before the response headers. */
  | "unreachable"
  /** The engine answered 5xx and is not merely busy. */
  | "server_error"
  /** 429, 503: the engine works and has no room. */
  | "busy"
  /** An error inside a 200: in the body, or as the first event. */
  | "error_in_answer"
  /** Not JSON, not an event stream, or without what this endpoint answers. */
  | "invalid_answer"
  /** The answer broke off or ended before it was whole. */
  | "incomplete"
  /** Our own limit: no first byte, no further chunk, or not done in time. */
  | "timeout"
  /** 4xx: the request is at fault. */
  | "rejected"
  /** 401, 403, 3xx: the backend is set up wrongly, for every request alike. */
  | "misconfigured"
  /** The engine cannot do this at all; another one may. */
  | "unsupported"
  /** The client left, or the gateway shuts down. */
  | "ended";

export interface Verdict {
  outcome: Outcome;
  retry: Retry;
}

const VERDICTS: Record<Fault, Verdict> = {
  unreachable: { outcome: "failure", retry: "elsewhere" },
  server_error: { outcome: "failure", retry: "elsewhere" },
  busy: { outcome: "saturated", retry: "free_slot" },
  error_in_answer: { outcome: "failure", retry: "elsewhere" },
  invalid_answer: { outcome: "failure", retry: "elsewhere" },
  incomplete: { outcome: "failure", retry: "elsewhere" },
  timeout: { outcome: "failure", retry: "elsewhere" },
  rejected: { outcome: "ignore", retry: "no" },
  misconfigured: { outcome: "ignore", retry: "no" },
  unsupported: { outcome: "ignore", retry: "elsewhere" },
  ended: { outcome: "ignore", retry: "no" },
};

/** Judges a failed attempt. */
export function judge(fault: Fault): Verdict {
  return VERDICTS[fault];
}
