import type { Kind } from "../config.ts";
import type { BreakerSettings, BreakerState } from "../core/breaker.ts";
import { createScheduler, hasRoom, type SchedulerState, type Ticket } from "../core/scheduler.ts";
import type { Backend, Health } from "../core/snapshot.ts";
import type { Engine } from "../engines/engine.ts";
import { engineOf } from "../engines/kinds.ts";
import { Guard } from "./guard.ts";
import { Observed } from "./observed.ts";

/** One backend that requests are sent to: its queue, and what was learned from its traffic. */
export interface Live {
  /** What has to stay for it to be the same backend, beside its id. */
  key: string;
  id: string;
  url: string;
  engine: Engine;
  scheduler: SchedulerState;
  health: Health;
  failedAt: number | null;
  lastChunkAt: number;
  /** When a stream of it was given up because nothing came any more. */
  stalledAt: number;
  observed: Observed;
  guard: Guard;
  /** Requests under way that are to show whether it works again. */
  trials: number;
  timer: ReturnType<typeof setTimeout> | undefined;
}

export function keyOf({ kind, url }: Backend): string {
  return `${kind} ${url}`;
}

/** A backend of which nothing is known yet. */
export function createLive(backend: Backend): Live {
  return {
    key: keyOf(backend),
    id: backend.id,
    url: backend.url,
    engine: engineOf(backend.kind as Kind),
    scheduler: createScheduler(),
    health: "unknown",
    failedAt: null,
    lastChunkAt: -Infinity,
    stalledAt: -Infinity,
    observed: new Observed(),
    guard: new Guard(),
    trials: 0,
    timer: undefined,
  };
}

const TIERS: readonly Health[] = ["healthy", "degraded", "unknown"];

/**
 * Would a request that waits at `live` start at once at `other`, and would selection send it there?
 * Never to a worse tier of health: it would come straight back.
 */
export function isBetter(
  other: Live,
  live: Live,
  ticket: Ticket,
  settings: BreakerSettings,
  now: number,
): boolean {
  const tier = TIERS.indexOf(other.health);
  const own = TIERS.indexOf(live.health);
  return (
    other !== live &&
    tier !== -1 &&
    (own === -1 || tier <= own) &&
    !ticket.barred.has(other.id) &&
    other.guard.admits(ticket.model, settings, now) === "any" &&
    hasRoom(other.scheduler, ticket.model)
  );
}

/** What one backend is doing now. */
export function usageOf({ id, scheduler, observed }: Live) {
  return {
    backend: id,
    slots: Math.min(
      scheduler.backend.limit,
      [...scheduler.lanes.values()].reduce((sum, lane) => sum + lane.slots.limit, 0),
    ),
    running: scheduler.backend.used,
    waiting: scheduler.waiting,
    observed,
    models: [...scheduler.lanes].map(([model, lane]) => ({
      model,
      running: lane.slots.used,
      waiting: lane.line.waiting,
    })),
  };
}

export type Usage = ReturnType<typeof usageOf>;

/** A breaker as it is shown. */
export interface BreakerReport {
  state: BreakerState;
  failures: number;
  /** Unix milliseconds, null while it is not open. */
  untilAt: number | null;
}

/** @param now on the clock of the breakers. */
export function breakerReport(live: Live | undefined, now: number): BreakerReport {
  if (live === undefined) return { state: "closed", failures: 0, untilAt: null };
  const { state, failures, untilAt } = live.guard.backend;
  const left = untilAt - now;
  return { state, failures, untilAt: state === "open" ? Math.round(Date.now() + left) : null };
}

/** Its breaker, and that of each model there. */
export function breakersOf({ id, guard, scheduler }: Live) {
  return [
    { backend: id, model: null, state: guard.backend.state },
    ...[...scheduler.lanes.keys()].map((model) => {
      return { backend: id, model, state: guard.models.get(model)?.state ?? "closed" };
    }),
  ];
}
