import type { Verdict } from "../core/outcome.ts";
import type { RefusalCause } from "../core/scheduler.ts";
import type { Target } from "../core/snapshot.ts";
import type { Connection, Engine } from "../engines/engine.ts";
import type { Answered } from "./observed.ts";

/** The right to one slot, to be given back once. */
export interface Permit {
  readonly target: Target;
  readonly connection: Connection;
  readonly engine: Engine;
  /** How long the answer is expected to take to begin, milliseconds; unmeasured, 1 for each token. */
  readonly beginMs: number;
  /** Idempotent. @param answered what the attempt showed of the backend, where it was made. */
  release(verdict: Verdict, answered?: Answered): void;
  /** The answer has begun, and is one: whatever was in doubt here, works. */
  proved(): void;
  /** Nothing came in a stream for as long as it may take. */
  stalled(): void;
  /**
   * Bytes of an answer arrived at `at`: the backend works, whatever a probe says.
   *
   * @param tokens of prompt and answer so far, as counted.
   */
  flowed(at: number, tokens: number): void;
}

export type Admission =
  | { type: "granted"; permit: Permit }
  | { type: "reselect" }
  | { type: "refused"; cause: "expired" | RefusalCause; retryAfterMs: number };

/** A request's place in one backend's queue. */
export interface Place {
  /** Requests of the model ahead of it; -1 when it does not wait. */
  position(): number;
  /** What it waits for, in words for people. */
  reason(): string;
  /** When it will start if nobody else comes, milliseconds from now. */
  etaMs(): number;
  /** Gives up the place, and the permit where one was granted meanwhile. Idempotent. */
  leave(): void;
}
