/** What a data plane remembers, empty: for tests that put one together themselves. */
import type { Config } from "../../src/config.ts";
import { Estimates } from "../../src/core/estimate.ts";
import { RetryBudget } from "../../src/core/retries.ts";
import { Answers } from "../../src/stores/answers.ts";
import { MemoryLedger } from "../../src/stores/ledger.ts";
import { TenantUsage } from "../../src/telemetry/tenants.ts";
import type { Plane } from "../../src/data/plane.ts";

/** @param now Unix milliseconds, of the ledger. */
export function emptyPlane(config: Config, now: () => number = Date.now) {
  return {
    metrics: null,
    exchanges: new Set(),
    retries: new RetryBudget(),
    answers: new Answers(config.cache),
    sharedAnswers: null,
    flights: new Map(),
    ledger: new MemoryLedger(now),
    estimates: new Estimates(),
    tenants: new TenantUsage(),
    atOnce: new Map(),
    heldBytes: 0,
    admitting: true,
  } satisfies Partial<Plane>;
}
