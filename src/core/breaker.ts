import type { Outcome } from "./outcome.ts";

/** When a breaker opens, for how long, and how many may try whether it works again. */
export interface BreakerSettings {
  /** Failures in a row. */
  failureThreshold: number;
  /** The first open time, milliseconds; doubled each time it opens again, up to eight times as long. */
  resetTimeoutMs: number;
  /** Trials at once. */
  halfOpenRequests: number;
}

export type BreakerState = "closed" | "open" | "half_open";

/** What is known of something that may fail. Changed in place by the functions here, by nothing else. */
export interface Breaker {
  state: BreakerState;
  /** In a row, since the last success. */
  failures: number;
  /** How often it has opened since the last success. */
  opened: number;
  /** End of the open time, on the clock of `now`. */
  untilAt: number;
  /** Trials under way. */
  trials: number;
  /** Counts transitions: what began before one says nothing about what holds after it. */
  epoch: number;
}

/** One request that was let through; it is to be settled once. */
export interface Pass {
  epoch: number;
  trial: boolean;
}

const MOST_DOUBLINGS = 3;
/** Open times are up to this much shorter, so that many gateways do not try at once. */
const JITTER = 0.2;

export function createBreaker(): Breaker {
  return { state: "closed", failures: 0, opened: 0, untilAt: 0, trials: 0, epoch: 0 };
}

/** May a request begin now: as any other, as a trial, or not at all? */
export function admits(
  breaker: Breaker,
  { halfOpenRequests }: BreakerSettings,
  now: number,
): "any" | "trial" | null {
  if (breaker.state === "closed") return "any";
  if (breaker.state === "open") return breaker.untilAt <= now ? "trial" : null;
  return breaker.trials < halfOpenRequests ? "trial" : null;
}

function enter(breaker: Breaker, state: BreakerState) {
  breaker.state = state;
  breaker.trials = 0;
  breaker.epoch++;
}

function open(breaker: Breaker, { resetTimeoutMs }: BreakerSettings, now: number, random: number) {
  const doublings = Math.min(breaker.opened, MOST_DOUBLINGS);
  breaker.opened++;
  breaker.untilAt = now + resetTimeoutMs * 2 ** doublings * (1 - JITTER * random);
  enter(breaker, "open");
}

/**
 * Lets a request through. Whoever asks an open breaker makes it half-open, before its time as well:
 * where nothing better is left, trying is better than refusing everyone.
 */
export function begin(breaker: Breaker): Pass {
  if (breaker.state === "open") enter(breaker, "half_open");
  const trial = breaker.state === "half_open";
  if (trial) breaker.trials++;
  return { epoch: breaker.epoch, trial };
}

/**
 * The answer to a trial has begun: others may come, without waiting for its end. It is closed on
 * probation; the next failure opens it again, and for longer.
 */
export function prove(breaker: Breaker, pass: Pass, { failureThreshold }: BreakerSettings): void {
  if (!pass.trial || pass.epoch !== breaker.epoch) return;
  enter(breaker, "closed");
  breaker.failures = failureThreshold - 1;
  pass.epoch = breaker.epoch;
  pass.trial = false;
}

/**
 * Takes the verdict on a request. Neutral ones (`ignore`, `saturated`) end a trial and say nothing;
 * one that began before the last transition is dropped.
 *
 * @param random from 0 up to 1.
 */
export function settle(
  breaker: Breaker,
  pass: Pass,
  outcome: Outcome,
  settings: BreakerSettings,
  now: number,
  random: number,
): void {
  if (pass.epoch !== breaker.epoch) return;
  if (pass.trial) breaker.trials--;
  if (outcome === "success") {
    breaker.failures = 0;
    breaker.opened = 0;
    if (breaker.state !== "closed") enter(breaker, "closed");
  } else if (outcome === "failure") {
    breaker.failures++;
    const isEnough = breaker.failures >= settings.failureThreshold;
    if (breaker.state === "half_open" || isEnough) open(breaker, settings, now, random);
  }
}

/** A probe has succeeded after having failed: no reason to wait any longer. */
export function retryNow(breaker: Breaker, now: number): void {
  if (breaker.state === "open") breaker.untilAt = Math.min(breaker.untilAt, now);
}
