import type { Config } from "../config.ts";
import type { Snapshot } from "../core/snapshot.ts";
import type { Estimates } from "../core/estimate.ts";
import type { RetryBudget } from "../core/retries.ts";
import type { Fleet } from "../fleet/fleet.ts";
import type { Permit } from "../fleet/permit.ts";
import type { Answers } from "../stores/answers.ts";
import type { Ledger } from "../stores/ledger.ts";
import type { RedisAnswers } from "../stores/redis-answers.ts";
import type { Log } from "../telemetry/log.ts";
import type { Metrics } from "../telemetry/metrics.ts";
import type { TenantUsage } from "../telemetry/tenants.ts";
import type { Tracing } from "../telemetry/tracing.ts";
import type { Exchange } from "./exchange.ts";
import type { Flight } from "./flight.ts";
import type { Access } from "./identify.ts";
import type { AtOnce } from "./reserve.ts";

/** What a request needs from the rest of the house. */
export interface Plane {
  /** Replaced by a reload; an exchange keeps the one it began with. */
  config: Config;
  access: Access;
  readonly fleet: Fleet;
  readonly log: Log;
  /** Null when switched off. */
  metrics: Metrics | null;
  /** Replaced once the exporter has started, and by a reload. */
  tracing: Tracing;
  /** Every request that has not ended. */
  readonly exchanges: Set<Exchange>;
  /** Which second attempts may wait. */
  readonly retries: RetryBudget;
  /** Answers that may be given again. */
  readonly answers: Answers;
  /** Those that several gateways share; null where there is no such place. */
  sharedAnswers: RedisAnswers | null;
  /** Deterministic requests under way, by the key of their answer. */
  readonly flights: Map<string, Flight>;
  /** What tenants may still use. */
  ledger: Ledger;
  /** What requests are expected to cost. */
  readonly estimates: Estimates;
  /** What tenants have used. */
  readonly tenants: TenantUsage;
  /** Requests at once, per tenant; only of those that have any. */
  readonly atOnce: Map<string, AtOnce>;
  /** Sum of the request bodies in memory. */
  heldBytes: number;
  /** False once the gateway shuts down: nothing further is let in. */
  admitting: boolean;
  /** Monotonic milliseconds. */
  now(): number;
  snapshot(): Snapshot;
  /** Probes at once the place a permit is for; true when it answers. Never rejects. */
  probe(permit: Permit): Promise<boolean>;
}
