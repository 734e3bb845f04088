import type { Exchange } from "./exchange.ts";
import { REFUSED } from "../telemetry/record.ts";
import type { Plane } from "./plane.ts";

/** Tells of a client's request, once, when it has ended: its span, its log line, its metrics. */
export function report(exchange: Exchange, { log, metrics, tenants }: Plane): void {
  const { record, trace, error } = exchange;
  const source = exchange.flight ?? exchange;
  if (record.ending === "cancelled") trace.event("abort", { phase: record.cause ?? "" });
  if (record.cause === "upstream_incomplete") trace.event("truncated");
  if (record.cause === "upstream_timeout") trace.event("stall");
  trace.end(record);
  log.request(record, error?.detail ?? null);
  if (record.tenant !== null) tenants.request(record.tenant);
  const [result = ""] = record.cache.split(";");
  if (record.cache !== REFUSED) metrics?.lookup(result);
  metrics?.request(record, {
    interTokenMs: source.lastAttempt?.interTokenMs() ?? null,
    dispatched: source.record.attempts > 0,
  });
}

/** Counts what engines did for an exchange, once, whoever waited for it. */
export function count(exchange: Exchange, { tenants, estimates, metrics }: Plane): void {
  const { record, tenant, cachedTokens } = exchange;
  tenants.tokens(tenant, record);
  metrics?.tokens(tenant, record, cachedTokens);
  if (record.ending !== "completed" || record.tokens_estimated) return;
  const model = record.model ?? "none";
  if (record.tokens_input !== null) {
    estimates.learnPrompt(model, exchange.promptSize, record.tokens_input);
  }
  if (record.tokens_generated) estimates.learnOutput(tenant, model, record.tokens_generated);
}
