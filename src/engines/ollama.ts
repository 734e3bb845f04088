import { isRecord, numberOf, textOf } from "../dialects/dialect.ts";
import { ask, modelNamed, openai, type Engine, type ListedModel } from "./engine.ts";

const PATHS = new Set([
  "/v1/chat/completions",
  "/v1/completions",
  "/v1/embeddings",
  "/v1/messages",
  "/v1/responses",
]);

function listed(item: unknown): ListedModel[] {
  if (!isRecord(item)) return [];
  const name = textOf(item["name"]) ?? textOf(item["model"]);
  if (name === null || name === "") return [];
  const details = isRecord(item["details"]) ? item["details"] : {};
  const capabilities = Array.isArray(item["capabilities"]) ? item["capabilities"].map(String) : [];
  const modified = Date.parse(textOf(item["modified_at"]) ?? "");
  return [
    modelNamed(name, {
      digest: textOf(item["digest"]),
      contextLength: numberOf(details["context_length"]),
      capabilities,
      createdAt: Number.isNaN(modified) ? null : Math.floor(modified / 1000),
    }),
  ];
}

export const ollama: Engine = {
  ...openai,
  kind: "ollama",
  // OLLAMA_NUM_PARALLEL is 1 by default and no endpoint tells it.
  slots: 1,
  speaks: (path) => PATHS.has(path),
  adapt(body, keys) {
    // Ollama ignores `max_completion_tokens`, and an output without a limit never ends.
    const limit = keys.find((key) => key.name === "max_completion_tokens");
    if (limit === undefined || keys.some((key) => key.name === "max_tokens")) return new Map();
    return new Map([["max_tokens", body.subarray(limit.value.start, limit.value.end)]]);
  },
  async look(connection, signal) {
    const { status, body } = await ask(connection, "/api/tags", signal);
    if (status !== 200) throw new Error(`HTTP ${status} at /api/tags`);
    if (!isRecord(body) || !("models" in body)) throw new Error("no model list at /api/tags");
    const items = Array.isArray(body["models"]) ? body["models"] : [];
    return { loading: false, models: items.flatMap(listed) };
  },
};
