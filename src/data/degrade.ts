import { resolve, type Model } from "../core/snapshot.ts";
import { GatewayError, quote, type ErrorCode } from "../errors.ts";
import { isAble } from "./admit.ts";
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
/** In the words of engines. */
const OUT_OF_MEMORY = /out of memory|insufficient memory|more system memory|\bOOM\b/i;

/**
 * May a smaller model answer this request?
 *
 * @throws GatewayError `invalid_parameter` for a wish that does not exist.
 */
export function mayDegrade({ headers }: Exchange): boolean {
  const wish = headers.get("x-tidegate-degrade");
  if (wish === null) return true;
  if (wish.toLowerCase() === "never") return false;
  const message = `x-tidegate-degrade ${quote(wish)} is not known: leave it out, or send never`;
  throw new GatewayError("invalid_parameter", message, { param: "x-tidegate-degrade" });
}

/**
 * Hands the request on to the next model of the `fallback` chain that fits it, where `error` says that
 * the one before cannot serve it now.
 *
 * @returns false when there is none: the request fails with what the asked-for model could not do.
 */
export function degrade(exchange: Exchange, plane: Plane, error: unknown): boolean {
  const reason = reasonFor(error);
  // Vectors of another model are of no use.
  if (reason === null || exchange.ended || !isSampled(exchange)) return false;
  const { snapshot, view, degraded } = exchange;
  const resolution = resolve(snapshot, view?.model ?? "");
  if (!resolution.found) return false;
  const { name: asked, fallback } = resolution.model;
  // None is at -1: the first comes next.
  const from = fallback.indexOf(degraded?.served ?? "") + 1;
  for (const served of fallback.slice(from)) {
    const smaller = resolve(snapshot, served);
    if (!smaller.found || !fits(exchange, plane, smaller.model)) continue;
    exchange.degraded = { served, asked, reason };
    exchange.outputCap = outputCapOf(exchange, smaller.model.name);
    // Where the prompt has been is known of the other model.
    if (exchange.prompt !== null) exchange.prompt = { ...exchange.prompt, chain: NO_CHAIN };
    exchange.trace.event("degrade", { asked, served, reason });
    return true;
  }
  return false;
}

function reasonFor(error: unknown): string | null {
  if (!(error instanceof GatewayError)) return null;
  if (OUT_OF_MEMORY.test(error.detail ?? "")) return "memory";
  return REASONS[error.code as ErrorCode] ?? null;
}

/** What a model is not known to lack it is taken to have. */
function fits(exchange: Exchange, plane: Plane, model: Model): boolean {
  const { contextLength, capabilities } = model;
  const { promptTokens, needs, view } = exchange;
  const tokens = promptTokens + Math.max(0, view?.sampling.maxTokens ?? 0);
  if (contextLength !== null && tokens > contextLength) return false;
  if (capabilities.length > 0 && needs.some((need) => !capabilities.includes(need))) return false;
  return isAble(exchange, plane, model);
}
