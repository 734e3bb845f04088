import { isRecord } from "../dialects/dialect.ts";
import { askAside, countOf, fromCard, knownMeaning, list, openai, type Engine } from "./engine.ts";

/** More at once than this is a limit of nothing. */
const MOST_SLOTS = 4096;

/** What its schedulers settled on, all ranks together, else what it was started with. */
function slotsOf(info: Record<string, unknown>): number | null {
  const states = Array.isArray(info["internal_states"]) ? info["internal_states"] : [];
  let settled = 0;
  for (const state of states.filter(isRecord)) {
    settled += countOf(state["effective_max_running_requests_per_dp"]) ?? 0;
  }
  const slots = countOf(settled) ?? countOf(info["max_running_requests"]);
  return slots !== null && slots <= MOST_SLOTS ? slots : null;
}

function capabilitiesOf(info: Record<string, unknown>): string[] {
  if (typeof info["is_embedding"] !== "boolean") return [];
  return [info["is_embedding"] ? "embedding" : "completion"];
}

export const sglang: Engine = {
  ...openai,
  kind: "sglang",
  slots: 64,
  // As many as the API itself allows.
  embedBatch: 2048,
  // Never `/health`: it generates a token and takes a second.
  async look(connection, signal) {
    const [{ loading, items }, info] = await Promise.all([
      list(connection, "/v1/models", "data", signal),
      askAside(connection, "/get_server_info", signal),
    ]);
    const known = { slots: slotsOf(info ?? {}), capabilities: capabilitiesOf(info ?? {}) };
    return { loading, models: items.flatMap(fromCard).map((model) => ({ ...model, ...known })) };
  },
  meaning(said) {
    if (/does not appear to be an embedding model/i.test(said.words)) return "unsupported";
    return knownMeaning(said);
  },
};
