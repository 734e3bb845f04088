import { contextFor } from "../core/context.ts";
import type { Model } from "../core/snapshot.ts";
import { textBytesOf } from "../dialects/prompt-size.ts";
import { GatewayError, quote } from "../errors.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/** Whose prompt is one text, which the model has to hold as a whole. */
const OPERATIONS = new Set(["chat", "text_completion"]);

/**
 * Refuses a prompt that no backend with the model can hold. When in doubt it goes through: engines count.
 *
 * @throws GatewayError `context_length_exceeded`
 */
export function refuseTooLong(exchange: Exchange, model: Model, plane: Plane): void {
  const { endpoint, fields, promptSize } = exchange;
  if (!OPERATIONS.has(endpoint.operation) || fields === null) return;
  if (model.targets.some(({ contextLength }) => contextLength === null)) return;
  // Several prompts, each of which may fit; or the client has it cut to fit.
  if (Array.isArray(fields["prompt"]) || isCut(fields)) return;
  const tokensOf = (bytes: number) => {
    // What images cost differs too much.
    return plane.estimates.prompt(model.name, { ...promptSize, bytes, images: 0 });
  };
  if (contextFor(model.targets, tokensOf(promptSize.bytes), 0).exceeded === null) return;
  // By its own text alone, now that it matters: not by how it is written, nor by what stands beside it.
  const tokens = tokensOf(Math.min(promptSize.bytes, textBytesOf(fields)));
  const { exceeded } = contextFor(model.targets, tokens, 0);
  if (exceeded === null) return;
  const limits = model.targets.map(({ backend, contextLength }) => `${backend}: ${contextLength}`);
  throw new GatewayError(
    "context_length_exceeded",
    `the prompt is about ${tokens} tokens, and model ${quote(model.name)} takes ${exceeded} at most ` +
      `with its answer (${limits.join(", ")}): shorten it, or ask a model with a larger context`,
    { param: ["messages", "prompt", "input"].find((each) => each in fields) ?? "messages" },
  );
}

/** As vLLM and the Responses API have it. */
function isCut(fields: Record<string, unknown>): boolean {
  const most = fields["truncate_prompt_tokens"] ?? null;
  return most !== null || fields["truncation"] === "auto";
}
