import { z } from "zod";
import { isRecord } from "../core/is-record.ts";
import { GatewayError } from "../errors.ts";

export { isRecord };

/** Tokens as the engine counts them. */
export interface Usage {
  /** All prompt tokens, cached ones included. */
  input: number;
  output: number;
  cached: number | null;
}

/** What an answer has told so far. Filled by the endpoint's readers, read by tap, record and span. */
export interface AnswerFacts {
  /** Events that carried content, reasoning or tool calls. */
  deltas: number;
  usage: Usage | null;
  finishReasons: string[];
  /** Choices seen, and those of them that are finished. */
  choices: Set<number>;
  finished: Set<number>;
  /** The end marker came. */
  ended: boolean;
  /** The engine's own error event, its words. */
  error: string | null;
  id: string | null;
  model: string | null;
}

export function emptyFacts(): AnswerFacts {
  return {
    deltas: 0,
    usage: null,
    finishReasons: [],
    choices: new Set(),
    finished: new Set(),
    ended: false,
    error: null,
    id: null,
    model: null,
  };
}

/**
 * True when the answer is whole: its end marker came, or every choice is finished.
 *
 * @param asked choices that the client asked for: one may be finished before the next one begins.
 */
export function isWhole(facts: AnswerFacts, asked = 1): boolean {
  return facts.ended || facts.finished.size >= Math.max(1, asked, facts.choices.size);
}

/** Tokens of the answer: as the engine counts them, or as they flowed where more has than it has told. */
export function outputTokens({ usage, deltas, ended }: AnswerFacts): number {
  // Anthropic's streams begin with a count of one, and tell the truth at their end.
  return usage === null || (!ended && deltas > usage.output) ? deltas : usage.output;
}

/** What not every engine does. `stored_response` continues an answer that the engine has kept. */
export type Ability =
  | "n"
  | "best_of"
  | "echo"
  | "logit_bias"
  | "tool_choice"
  | "prompt_list"
  | "token_input"
  | "image_url"
  | "stored_response";

/** Something that a request asks for and not every engine does, and the field that asks for it. */
export interface Want {
  what: Ability;
  param: string;
}

/** The part of a request body that the gateway acts on. */
export interface View {
  model: string;
  stream: boolean;
  /** The client asked for usage in the stream itself. */
  includeUsage: boolean;
  /** Empty for most requests: any engine that speaks the path can do those. */
  wants: readonly Want[];
  /** How many choices a stream is to bring. */
  choices: number;
  /** Sampling parameters, for the span only; undefined where absent or not a number. */
  sampling: {
    maxTokens?: number | undefined;
    temperature?: number | undefined;
    topP?: number | undefined;
    seed?: number | undefined;
  };
}

/** How errors look to callers of one API. */
export interface Dialect {
  errorBody(error: GatewayError, requestId: string): unknown;
  /** The same inside a stream: one whole server-sent event. */
  errorEvent(error: GatewayError, requestId: string): string;
}

/** One inference path: how its requests and answers are read. Its bytes are never altered here. */
export interface Endpoint {
  path: string;
  /** Of the span's name and `gen_ai.operation.name`. */
  operation: string;
  dialect: Dialect;
  /** The top-level keys that `view` reads; repeating one of them is an error. */
  keys: readonly string[];
  /** @throws GatewayError `invalid_parameter` */
  view(body: Record<string, unknown>): View;
  /** Usage in a stream has to be asked for with `stream_options`. */
  usageOnRequest: boolean;
  /** After the first token only events whose text matches are parsed. */
  telling: RegExp;
  /** Part of the text of every event that carries tokens. */
  deltaMark: string;
  /**
   * Reads one event of a stream into `facts`.
   * @returns `usage` for an event that does nothing but report usage because it was asked to.
   */
  readEvent(data: Record<string, unknown>, facts: AnswerFacts): "usage" | "other";
  /**
   * Reads a whole answer into `facts`.
   * @returns false when it is not an answer of this endpoint.
   */
  readWhole(body: Record<string, unknown>, facts: AnswerFacts): boolean;
  /** A bare list is an answer too: SGLang ranks so. */
  takesList?: boolean;
}

const optionalNumber = z.number().optional().catch(undefined);

/** The keys of every inference request that the gateway acts on or reports. */
const viewSchema = z.object({
  model: z.string().min(1),
  stream: z.boolean().nullish(),
  stream_options: z.object({ include_usage: z.boolean().nullish() }).nullish(),
  max_tokens: optionalNumber,
  max_completion_tokens: optionalNumber,
  max_output_tokens: optionalNumber,
  n_predict: optionalNumber,
  temperature: optionalNumber,
  top_p: optionalNumber,
  seed: optionalNumber,
});

/** The keys whose repetition would make gateway and engine disagree on what was asked. */
export const VIEW_KEYS = Object.keys(viewSchema.shape);

/** @throws GatewayError `invalid_parameter` that names the first field at fault. */
export function readView(body: Record<string, unknown>, wants: readonly Want[] = []): View {
  const parsed = viewSchema.safeParse(body);
  if (!parsed.success) throw invalidParameter(parsed.error);
  const view = parsed.data;
  return {
    model: view.model,
    stream: view.stream === true,
    includeUsage: view.stream_options?.include_usage === true,
    wants,
    choices: 1,
    sampling: {
      maxTokens: view.max_completion_tokens ?? view.max_output_tokens ?? view.max_tokens,
      temperature: view.temperature,
      topP: view.top_p,
      seed: view.seed,
    },
  };
}

/** The first mistake zod found, as the error the caller gets. */
function invalidParameter(error: z.core.$ZodError): GatewayError {
  const [issue] = error.issues;
  const param = issue?.path.join(".") ?? "";
  const missingModel = param === "model" && issue?.code === "invalid_type";
  const hint = missingModel ? "; GET /v1/models lists the names" : "";
  return new GatewayError("invalid_parameter", `${param}: ${issue?.message ?? "invalid"}${hint}`, {
    param,
  });
}

/**
 * The hook of every use of the validator, whose own answer is not our error.
 *
 * @throws GatewayError `invalid_parameter`
 */
export function refuseInvalid(result: { success: boolean; error?: z.core.$ZodError }): void {
  if (!result.success && result.error !== undefined) throw invalidParameter(result.error);
}

/** A finite number, or null. */
export function numberOf(value: unknown): number | null {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

export function textOf(value: unknown): string | null {
  return typeof value === "string" ? value : null;
}

/** The words of an error in any of the shapes that engines use; null when it is none. */
export function errorWords(error: unknown): string | null {
  if (typeof error === "string") return error;
  if (!isRecord(error)) return null;
  return textOf(error["message"]) ?? JSON.stringify(error);
}
