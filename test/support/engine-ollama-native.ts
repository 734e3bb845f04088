/** `/api/chat` and `/api/generate`: one JSON object per line, the last with `done: true`; durations in ns. */
import type { Job, Shape } from "./engine-shapes.ts";
import { join } from "./engine-shapes.ts";

const CREATED = "2026-08-01T12:00:00.123456789Z";

type Fields = Record<string, unknown>;

export function nativeShape(job: Job, route: "chat" | "generate"): Shape {
  const line = (fields: Fields): string =>
    `${JSON.stringify({ model: job.model, created_at: CREATED, ...fields })}\n`;
  const content = (text: string, more: Fields = {}): Fields =>
    route === "chat"
      ? { message: { role: "assistant", content: text, ...more } }
      : { response: text, ...more };
  const numbers = (input: number, output: number): Fields => ({
    total_duration: 96_750_000,
    load_duration: 1_000_000,
    // wire §1.6: absent when 0.
    ...(input === 0 ? {} : { prompt_eval_count: input, prompt_eval_duration: 12_500_000 }),
    ...(output === 0 ? {} : { eval_count: output, eval_duration: 84_250_000 }),
  });
  const last = (text: string, reason: string, input: number, output: number): Fields => ({
    ...content(text),
    done: true,
    done_reason: reason,
    ...numbers(input, output),
  });
  return {
    contentType: "application/x-ndjson",
    open: () => [],
    piece(piece) {
      if ("text" in piece) return [line({ ...content(piece.text), done: false })];
      if ("reasoning" in piece)
        return [line({ ...content("", { thinking: piece.reasoning }), done: false })];
      const args: unknown = JSON.parse(piece.toolCall.arguments);
      const calls = [{ function: { name: piece.toolCall.name, arguments: args } }];
      return [line({ ...content("", { tool_calls: calls }), done: false })];
    },
    finish: (reason, usage) =>
      reason === null ? [] : [line(last("", reason, usage.input, usage.output))],
    done: () => [],
    error: (error) => {
      const message = (error as { message?: string }).message ?? String(error);
      return [`${JSON.stringify({ error: message })}\n`];
    },
    // real §5.1: here the error is told.
    swallowed: () => [
      `${JSON.stringify({ error: "an error was encountered while running the model: unexpected EOF" })}\n`,
    ],
    whole: (pieces, reason, usage) => ({
      model: job.model,
      created_at: CREATED,
      ...last(join(pieces).text, reason, usage.input, usage.output),
    }),
  };
}
