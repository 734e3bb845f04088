/** The plain OpenAI-compatible wording; every kind's own is this one with its differences. */
import type { Style } from "./engine-shapes.ts";
import { sse } from "./engine-shapes.ts";

/** vLLM's words when its engine dies mid-stream (wire §1.7); numeric code as there. */
export const engineDied = {
  message: "EngineCore encountered an issue. See stack trace (above) for the root cause.",
  type: "InternalServerError",
  param: null,
  code: 500,
};

function wideId(prefix: string, count: number): string {
  return `${prefix}-${count.toString(16).padStart(24, "0")}`;
}

export const plainStyle: Style = {
  id: wideId,
  answersOwnName: false,
  frame: (job, object, prefix, choices, more) => ({
    id: job.style.id(prefix, job.count),
    object,
    created: job.created,
    model: job.model,
    choices,
    ...more,
  }),
  choice: (content, reason) => ({ index: 0, ...content, finish_reason: reason }),
  delta: (fields) => fields,
  message: (fields) => fields,
  wholeMore: {},
  firstContent: null,
  reasoning: "reasoning_content",
  wholeToolCalls: false,
  usage: ({ input, output, cached }) => ({
    prompt_tokens: input,
    completion_tokens: output,
    total_tokens: input + output,
    ...(cached === null ? {} : { prompt_tokens_details: { cached_tokens: cached } }),
  }),
  completionUsage: "extraChunk",
  knowsCompletionLimit: true,
  numbersEvents: true,
  messagesUsage: ({ input, output }, at) => ({
    // real §5.1: an estimate at the start, the truth at the end.
    input_tokens: at === "start" ? 3 : input,
    output_tokens: at === "start" ? 0 : output,
  }),
  embeddings: (vectors, job, tokens) => ({
    object: "list",
    data: vectors.map((embedding, index) => ({ object: "embedding", embedding, index })),
    model: job.model,
    usage: { prompt_tokens: tokens, total_tokens: tokens },
  }),
  knowsBase64: true,
  rerank: (scores, job) => ({
    id: job.style.id("rerank", job.count),
    model: job.model,
    usage: { total_tokens: scores.length },
    results: scores.map(({ index, document, score }) => ({
      index,
      document: { text: document },
      relevance_score: score,
    })),
  }),
  // wire §1.7: vLLM and SGLang still say that they are done.
  dies: (shape, hasDone) => [...shape.error(engineDied), ...(hasDone ? [sse("[DONE]")] : [])],
};
