/** The verdict on one attempt, for breaker and metrics. */
export type Outcome = "success" | "failure" | "saturated" | "ignore";

/** May the request be sent to another backend, as long as it is not committed? */
export type Retry = "elsewhere" | "no";

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
  /** 401, 403, 3xx: the backend is set up wrongly, for every request alike; another one may not be. */
  | "misconfigured"
  /** The engine cannot do this at all; another one may. */
  | "unsupported"
  /** The client left, or the gateway shuts down. */
  | "ended";

/** What one attempt says, of its backend as a whole and of the model there. */
export interface Verdict {
  outcome: Outcome;
  backend: Outcome;
  model: Outcome;
  retry: Retry;
}

/** The whole answer came. */
export const SUCCESS: Verdict = {
  outcome: "success",
  backend: "success",
  model: "success",
  retry: "no",
};

/** Nobody there, or somebody who breaks off: the backend's fault, whatever the model. */
function ofBackend(retry: Retry): Verdict {
  return { outcome: "failure", backend: "failure", model: "ignore", retry };
}

/** An answer, but not the right one: the backend is reached, and this model fails there. */
function ofModel(retry: Retry): Verdict {
  return { outcome: "failure", backend: "success", model: "failure", retry };
}

function neutral(outcome: "saturated" | "ignore", retry: Retry): Verdict {
  return { outcome, backend: outcome, model: outcome, retry };
}

const VERDICTS: Record<Fault, Verdict> = {
  unreachable: ofBackend("elsewhere"),
  server_error: ofModel("elsewhere"),
  busy: neutral("saturated", "elsewhere"),
  error_in_answer: ofModel("elsewhere"),
  invalid_answer: ofModel("elsewhere"),
  incomplete: ofBackend("elsewhere"),
  // Silence does not tell whose it is: another model may still speak there.
  timeout: { outcome: "failure", backend: "ignore", model: "failure", retry: "elsewhere" },
  rejected: neutral("ignore", "no"),
  misconfigured: neutral("ignore", "elsewhere"),
  unsupported: neutral("ignore", "elsewhere"),
  ended: neutral("ignore", "no"),
};

/** Judges a failed attempt. */
export function judge(fault: Fault): Verdict {
  return VERDICTS[fault];
}
