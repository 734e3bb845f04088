import { textOf } from "../dialects/dialect.ts";
import { fromCard, knownMeaning, list, openai, type Engine } from "./engine.ts";

export const vllm: Engine = {
  ...openai,
  kind: "vllm",
  slots: 64,
  // As many as the API itself allows.
  embedBatch: 2048,
  async look(connection, signal) {
    const { loading, items } = await list(connection, "/v1/models", "data", signal);
    // One base model per process; the cards of its LoRA adapters name it and have no length.
    const base = items.flatMap(fromCard).find(({ contextLength }) => contextLength !== null);
    const models = items.flatMap((card) => {
      const isAdapter = textOf(card["parent"]) !== null;
      return fromCard(card).map((model) =>
        isAdapter
          ? { ...model, contextLength: model.contextLength ?? base?.contextLength ?? null }
          : model,
      );
    });
    return { loading, models };
  },
  meaning(said) {
    // A model that embeds, asked for a chat: older versions call that a bad request.
    if (/^the model does not support .+ api\b/i.test(said.words)) return "unsupported";
    if (/is not a multimodal model/i.test(said.words)) return "unsupported_input";
    return knownMeaning(said);
  },
};
