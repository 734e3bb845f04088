import { limitsOf, type Limit, type LimitState } from "../core/budget.ts";
import { GatewayError } from "../errors.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/** Longer than this a client is not to try again by itself. */
const SOON_MS = 60_000;
/** Others have no answer that is counted in tokens. */
const SAMPLED = new Set(["chat", "text_completion"]);
const DURATION_WEIGHT = 0.2;

/** How many requests of a tenant are under way, and how long one takes; milliseconds. */
export interface AtOnce {
  running: number;
  meanMs: number;
}

/** Is its answer text, counted in tokens? */
export function isSampled({ endpoint }: Exchange): boolean {
  return SAMPLED.has(endpoint.operation);
}

/** Cap on the tokens of one answer: the model's or the tenant's, the lower one; null for none. */
export function outputCapOf({ config, policy }: Exchange, model: string): number | null {
  const ofModel = Object.hasOwn(config.models, model) ? config.models[model] : undefined;
  const cap = Math.min(ofModel?.maxOutputTokens ?? Infinity, policy.maxOutputTokens ?? Infinity);
  return cap === Infinity ? null : cap;
}

/**
 * Takes from the tenant's limits what the request is expected to need; its settlement gives back the
 * difference to what it used.
 *
 * @throws GatewayError `rate_limit_exceeded`, `insufficient_quota`, or what ended the exchange
 */
export async function reserve(exchange: Exchange, plane: Plane): Promise<void> {
  const { policy, tenant, view, outputCap, record } = exchange;
  if (policy.concurrency !== undefined) takePlace(exchange, plane, policy.concurrency);
  const model = record.model ?? "";
  const choices = view?.choices ?? 1;
  // 0 and -1 are no limit to engines.
  const asked = Math.max(0, view?.sampling.maxTokens ?? 0) * choices || null;
  const output = isSampled(exchange)
    ? plane.estimates.output(tenant, model, asked, outputCap && outputCap * choices)
    : 0;
  exchange.expectedTokens = exchange.promptTokens + output;
  const limits = limitsOf(policy);
  if (limits.length === 0) return;
  const { ledger } = plane;
  const booking = await ledger.reserve(tenant, limits, exchange.expectedTokens);
  if (booking.granted) {
    exchange.own(() => ledger.settle(booking.reservation, spent(exchange)));
  }
  exchange.check();
  Object.assign(exchange.headersOut, rateHeaders(booking.states));
  if (!booking.granted) throw refusal(tenant, booking.limit, booking.retryAfterMs);
}

function takePlace(exchange: Exchange, plane: Plane, most: number) {
  const { tenant } = exchange;
  const { atOnce } = plane;
  const mine = atOnce.get(tenant) ?? { running: 0, meanMs: 0 };
  if (mine.running >= most) {
    throw new GatewayError(
      "rate_limit_exceeded",
      `tenant "${tenant}" has ${most} requests under way already, as many as it may (concurrency)`,
      { retryAfterMs: Math.min(SOON_MS, Math.max(1000, mine.meanMs / most)) },
    );
  }
  atOnce.set(tenant, mine);
  mine.running++;
  const startedAt = plane.now();
  exchange.own(() => {
    mine.running--;
    // What was refused tells nothing of how long answers take.
    if (exchange.record.attempts === 0) return;
    const tookMs = plane.now() - startedAt;
    mine.meanMs =
      mine.meanMs === 0 ? tookMs : mine.meanMs + DURATION_WEIGHT * (tookMs - mine.meanMs);
  });
}

/** Tokens that a request has used, as far as anybody can tell. */
function spent(exchange: Exchange): number {
  const { record, promptTokens, expectedTokens } = exchange;
  if (record.attempts === 0 || record.ending === "failed") {
    return (record.tokens_input ?? 0) + (record.tokens_generated ?? 0);
  }
  if (record.tokens_input !== null) return record.tokens_input + (record.tokens_generated ?? 0);
  // The engine did not report: what flowed has been counted, and an answer in one piece has not.
  record.tokens_estimated = true;
  return record.stream ? promptTokens + (record.tokens_generated ?? 0) : expectedTokens;
}

/** The state of the tightest limit of each unit. */
function rateHeaders(states: readonly LimitState[]): Record<string, string> {
  const headers: Record<string, string> = {};
  for (const unit of ["requests", "tokens"] as const) {
    const [tightest] = states
      .filter(({ limit }) => limit.unit === unit)
      .toSorted((a, b) => a.remaining / a.limit.amount - b.remaining / b.limit.amount);
    if (tightest === undefined) continue;
    headers[`x-ratelimit-limit-${unit}`] = String(tightest.limit.amount);
    headers[`x-ratelimit-remaining-${unit}`] = String(Math.max(0, Math.floor(tightest.remaining)));
    headers[`x-ratelimit-reset-${unit}`] = `${Math.ceil(tightest.resetMs / 100) / 10}s`;
  }
  return headers;
}

function refusal(tenant: string, { unit, amount, window }: Limit, retryAfterMs: number) {
  const what = `tenant "${tenant}" has used its ${amount} ${unit} per ${window}`;
  if (retryAfterMs <= SOON_MS) {
    return new GatewayError("rate_limit_exceeded", `${what}: try again when some are free`, {
      retryAfterMs,
    });
  }
  return new GatewayError("insufficient_quota", `${what}: they come back later (budgets)`, {
    retryAfterMs,
  });
}
