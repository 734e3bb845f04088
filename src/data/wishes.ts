import { CLASSES, type Priority } from "../core/fairness.ts";
import { GatewayError, quote } from "../errors.ts";

/** What a client says in headers of how it wants this request served. */
export interface Wishes {
  /** `x-tidegate-priority`; null: as its tenant has it. */
  priority: Priority | null;
  /** `x-slo-ttft-ms`: within how many milliseconds it has a use for a first token; null: it does not say. */
  sloMs: number | null;
  /** A smaller model may answer, unless `x-tidegate-degrade` is `never`. */
  mayDegrade: boolean;
  /** Its own time-out in milliseconds, as the official SDKs send it; null: it does not say. */
  timeoutMs: number | null;
}

export const NO_WISHES: Wishes = {
  priority: null,
  sloMs: null,
  mayDegrade: true,
  timeoutMs: null,
};

/** @throws GatewayError `invalid_parameter` for a wish that does not exist; of a time-out it is ignored. */
export function wishesOf(headers: Headers): Wishes {
  return {
    priority: priorityIn(headers),
    sloMs: sloMsIn(headers),
    mayDegrade: mayDegradeIn(headers),
    timeoutMs: timeoutMsIn(headers),
  };
}

function unknown(header: string, problem: string): GatewayError {
  return new GatewayError("invalid_parameter", `${header} ${problem}`, { param: header });
}

function priorityIn(headers: Headers): Priority | null {
  const asked = headers.get("x-tidegate-priority");
  if (asked === null) return null;
  const known = CLASSES.find((each) => each === asked.toLowerCase());
  if (known !== undefined) return known;
  throw unknown("x-tidegate-priority", `${quote(asked)} is none of ${CLASSES.join(", ")}`);
}

function sloMsIn(headers: Headers): number | null {
  const asked = headers.get("x-slo-ttft-ms");
  if (asked === null) return null;
  const ms = Number(asked);
  if (asked.trim() !== "" && Number.isFinite(ms) && ms > 0) return ms;
  throw unknown("x-slo-ttft-ms", `${quote(asked)} is no number of milliseconds above 0`);
}

function mayDegradeIn(headers: Headers): boolean {
  const asked = headers.get("x-tidegate-degrade");
  if (asked === null) return true;
  if (asked.toLowerCase() === "never") return false;
  throw unknown("x-tidegate-degrade", `${quote(asked)} is not known: leave it out, or send never`);
}

function timeoutMsIn(headers: Headers): number | null {
  const seconds = Number(headers.get("x-stainless-timeout") ?? Number.NaN);
  return Number.isFinite(seconds) && seconds > 0 ? seconds * 1000 : null;
}
