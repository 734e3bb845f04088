/** Anthropic's Messages: named events, no [DONE]; `message_stop` is the end. */
import type { Job, Shape } from "./engine-shapes.ts";
import { join, sse } from "./engine-shapes.ts";

const stopReasons: Record<string, string> = {
  stop: "end_turn",
  length: "max_tokens",
  tool_calls: "tool_use",
};

export function messagesShape(job: Job): Shape {
  const { style } = job;
  const id = style.id("msg", job.count).replaceAll("-", "_");
  let index = -1;
  let openBlock: "text" | "thinking" | null = null;
  const event = (type: string, fields: Record<string, unknown> = {}): string =>
    sse({ type, ...fields }, type);
  const close = (): string[] => {
    if (openBlock === null) return [];
    openBlock = null;
    return [event("content_block_stop", { index })];
  };
  const enter = (type: "text" | "thinking"): string[] => {
    if (openBlock === type) return [];
    const frames = close();
    openBlock = type;
    index += 1;
    frames.push(event("content_block_start", { index, content_block: { type, [type]: "" } }));
    return frames;
  };
  return {
    open: (usage) => [
      event("message_start", {
        message: {
          id,
          type: "message",
          role: "assistant",
          model: job.model,
          content: [],
          stop_reason: null,
          stop_sequence: null,
          usage: style.messagesUsage(usage, "start"),
        },
      }),
    ],
    piece(piece) {
      if ("text" in piece) {
        const delta = { type: "text_delta", text: piece.text };
        return [...enter("text"), event("content_block_delta", { index, delta })];
      }
      if ("reasoning" in piece) {
        const delta = { type: "thinking_delta", thinking: piece.reasoning };
        return [...enter("thinking"), event("content_block_delta", { index, delta })];
      }
      const frames = close();
      index += 1;
      const { name, arguments: json } = piece.toolCall;
      return [
        ...frames,
        event("content_block_start", {
          index,
          content_block: { type: "tool_use", id: `toolu_${index}`, name, input: {} },
        }),
        event("content_block_delta", {
          index,
          delta: { type: "input_json_delta", partial_json: json },
        }),
        event("content_block_stop", { index }),
      ];
    },
    finish: (reason, usage) => [
      ...close(),
      event("message_delta", {
        delta: {
          stop_reason: reason === null ? null : (stopReasons[reason] ?? reason),
          stop_sequence: null,
        },
        usage: style.messagesUsage(usage, "end"),
      }),
    ],
    done: () => [event("message_stop")],
    error: (error) => {
      const message = (error as { message?: string }).message ?? String(error);
      return [event("error", { error: { type: "api_error", message } })];
    },
    swallowed: () => [],
    whole(pieces, reason, usage) {
      const { text, reasoning, toolCalls } = join(pieces);
      const content: unknown[] = [];
      if (reasoning !== "") content.push({ type: "thinking", thinking: reasoning });
      if (text !== "") content.push({ type: "text", text });
      for (const [at, call] of toolCalls.entries()) {
        const input: unknown = JSON.parse(call.arguments);
        content.push({ type: "tool_use", id: `toolu_${at}`, name: call.name, input });
      }
      return {
        id,
        type: "message",
        role: "assistant",
        model: job.model,
        content,
        stop_reason: stopReasons[reason] ?? reason,
        stop_sequence: null,
        usage: style.messagesUsage(usage, "whole"),
      };
    },
  };
}
