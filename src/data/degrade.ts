import { resolve, type Model } from "../core/snapshot.ts";
import { GatewayError, type ErrorCode } from "../errors.ts";
import { isAble } from "./resolve.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";
import { NO_CHAIN } from "./prompt.ts";
import { isSampled, outputCapOf } from "./reserve.ts";

/** What a model may be unable to do just now, and a smaller one not: the words of `x-tidegate-degraded`. */
const REASONS: Partial<Record<ErrorCode, string>> = {
  rate_limit_exceeded: "busy",
  model_load_failed: "load",
  no_backend_available: "down",
};
/** Of failed attempts: where none of the model's backends is up after one, it is down. */
const FAILURES = new Set<ErrorCode>([
  "upstream_unreachable",
  "upstream_error",
  "upstream_invalid_response",
  "upstream_incomplete",
  "upstream_timeout",
]);
/** In the words of engines. */
const OUT_OF_MEMORY =
  /out of memory|insufficient (?:memory|system resources)|more system memory|(?:failed|unable) to allocate|\bOOM\b/i;

/**
 * Hands the request on to the next model of the `fallback` chain that fits it, where `error` says that
 * the one before cannot serve it now.
 *
 * @param passed models that have been looked at, by name; added to, so that every chain comes to its end.
 * @returns false when there is none: the request fails with what the asked-for model could not do.
 */
export function degrade(
  exchange: Exchange,
  plane: Plane,
  error: unknown,
  passed: Set<string>,
): boolean {
  const { view, degraded } = exchange;
  // Vectors of another model are of no use.
  if (exchange.ended || !isSampled(exchange)) return false;
  const asked = modelOf(exchange, view?.model);
  const cause = reasonFor(exchange, plane, error);
  if (asked === null || cause === null) return false;
  passed.add(asked.name);
  for (const name of asked.fallback) {
    const model = modelOf(exchange, name);
    if (model === null || passed.has(model.name)) continue;
    passed.add(model.name);
    if (!fits(exchange, plane, model)) continue;
    // Why the others of the chain could not either is in the trace.
    const reason = degraded?.reason ?? cause;
    exchange.degraded = { served: model.name, asked: asked.name, reason };
    exchange.phase = "queued";
    exchange.outputCap = outputCapOf(exchange, model.name);
    // Where the prompt has been is known of the other model.
    if (exchange.prompt !== null) exchange.prompt = { ...exchange.prompt, chain: NO_CHAIN };
    exchange.trace.event("degrade", { asked: asked.name, served: model.name, reason: cause });
    return true;
  }
  return false;
}

function modelOf({ snapshot }: Exchange, name: string | null | undefined): Model | null {
  const resolution = resolve(snapshot, name ?? "");
  return resolution.found ? resolution.model : null;
}

function reasonFor(exchange: Exchange, plane: Plane, error: unknown): string | null {
  if (!(error instanceof GatewayError)) return null;
  if (OUT_OF_MEMORY.test(error.detail ?? "")) return "memory";
  // Not its code: that may be an engine's own word.
  const code = error.cause as ErrorCode;
  if (!FAILURES.has(code)) return REASONS[code] ?? null;
  const model = exchange.record.model ?? "";
  return plane.fleet.isServed({ model, barred: new Set() }) ? null : "down";
}

/** What a model is not known to lack it is taken to have. */
function fits(exchange: Exchange, plane: Plane, model: Model): boolean {
  const { targets, capabilities } = model;
  const { promptTokens, needs, view } = exchange;
  const cap = outputCapOf(exchange, model.name) ?? Infinity;
  const tokens = promptTokens + Math.min(Math.max(0, view?.sampling.maxTokens ?? 0), cap);
  if (!targets.some(({ contextLength }) => tokens <= (contextLength ?? Infinity))) return false;
  const isKnown =
    capabilities.length > 0 &&
    targets.every(({ backend }) => plane.fleet.engineFor(backend)?.tellsAbilities === true);
  if (isKnown && needs.some((need) => !capabilities.includes(need))) return false;
  return isAble(exchange, plane, model);
}
