/** OpenAI's Responses: named events, no [DONE]; `response.completed` is the end. */
import type { Job, Shape, Usage } from "./engine-shapes.ts";
import { join, sse } from "./engine-shapes.ts";

type Fields = Record<string, unknown>;

export function responsesShape(job: Job): Shape {
  const { style } = job;
  const id = style.id("resp", job.count).replaceAll("-", "_");
  const itemId = style.id("msg", job.count).replaceAll("-", "_");
  let sequence = 0;
  let text = "";
  let completed: Fields = {};
  const number = (): Fields => (style.numbersEvents ? { sequence_number: sequence++ } : {});
  const event = (type: string, fields: Fields): string =>
    sse({ type, ...number(), ...fields }, type);
  const response = (status: string, output: unknown[], usage: unknown): Fields => ({
    id,
    object: "response",
    created_at: job.created,
    status,
    model: job.model,
    output,
    error: null,
    usage,
  });
  const item = (status: string, content: unknown[]): Fields => ({
    id: itemId,
    type: "message",
    status,
    role: "assistant",
    content,
  });
  const part = (value: string): Fields => ({ type: "output_text", text: value, annotations: [] });
  const usageOf = (usage: Usage): Fields => ({
    input_tokens: usage.input,
    input_tokens_details: { cached_tokens: usage.cached ?? 0 },
    output_tokens: usage.output,
    output_tokens_details: { reasoning_tokens: 0 },
    total_tokens: usage.input + usage.output,
  });
  // Measured, llama.cpp: neither numbers nor places.
  const output = style.numbersEvents ? { output_index: 0 } : {};
  const place = {
    item_id: itemId,
    ...output,
    ...(style.numbersEvents ? { content_index: 0 } : {}),
  };
  const begun = style.numbersEvents
    ? response("in_progress", [], null)
    : { id, object: "response", status: "in_progress" };
  return {
    open: () => [
      event("response.created", { response: begun }),
      event("response.in_progress", { response: begun }),
      event("response.output_item.added", { ...output, item: item("in_progress", []) }),
      event("response.content_part.added", { ...place, part: part("") }),
    ],
    piece(piece) {
      if ("reasoning" in piece) {
        return [
          event("response.reasoning_summary_text.delta", { ...place, delta: piece.reasoning }),
        ];
      }
      if (!("text" in piece)) return [];
      text += piece.text;
      return [event("response.output_text.delta", { ...place, delta: piece.text })];
    },
    finish(reason, usage) {
      if (reason === null) return [];
      const done = item("completed", [part(text)]);
      completed = response("completed", [done], usageOf(usage));
      return [
        event("response.output_text.done", { ...place, text }),
        event("response.content_part.done", { ...place, part: part(text) }),
        event("response.output_item.done", { ...output, item: done }),
      ];
    },
    done: () => [event("response.completed", { response: completed })],
    error: (error) => {
      const { message = String(error), code = null } = error as {
        message?: string;
        code?: unknown;
      };
      return [
        event("error", {
          code: typeof code === "number" ? String(code) : null,
          message,
          param: null,
        }),
      ];
    },
    swallowed: () => [],
    whole: (pieces, _reason, usage) =>
      response("completed", [item("completed", [part(join(pieces).text)])], usageOf(usage)),
  };
}
