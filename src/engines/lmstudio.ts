import { isRecord, textOf } from "../dialects/dialect.ts";
import {
  ask,
  askAside,
  countOf,
  knownMeaning,
  LoadFailed,
  modelNamed,
  openai,
  type Connection,
  type Engine,
  type ListedModel,
  type Sighting,
} from "./engine.ts";

const LACKED_PATHS = new Set(["/v1/rerank", "/v1/messages/count_tokens"]);

/** @param type `llm`, `vlm`, `embedding`, in the old API `embeddings` */
function capabilitiesOf(type: string | null, told: unknown): string[] {
  if (type?.startsWith("embedding") === true) return ["embedding"];
  const has = (key: string) =>
    isRecord(told) ? !!told[key] : Array.isArray(told) && told.includes(key);
  const capabilities = ["completion"];
  if (type === "vlm" || has("vision")) capabilities.push("vision");
  if (has("trained_for_tool_use") || has("tool_use")) capabilities.push("tools");
  if (has("reasoning")) capabilities.push("thinking");
  return capabilities;
}

/** An item of `/api/v1/models`, since 0.4. A model may be loaded more than once: the first serves. */
function listed(item: Record<string, unknown>): ListedModel[] {
  const name = textOf(item["key"]);
  if (name === null || name === "") return [];
  const instances = Array.isArray(item["loaded_instances"]) ? item["loaded_instances"] : [];
  const first = instances.find(isRecord);
  const config = isRecord(first?.["config"]) ? first["config"] : {};
  return [
    modelNamed(name, {
      contextLength: countOf(config["context_length"]) ?? countOf(item["max_context_length"]),
      capabilities: capabilitiesOf(textOf(item["type"]), item["capabilities"]),
      residency: instances.length > 0 ? "loaded" : "cold",
      slots: countOf(config["parallel"]),
      sizeBytes: countOf(item["size_bytes"]),
    }),
  ];
}

/** An item of `/api/v0/models`. */
function listedBefore(item: Record<string, unknown>): ListedModel[] {
  const name = textOf(item["id"]);
  if (name === null || name === "") return [];
  return [
    modelNamed(name, {
      contextLength: countOf(item["loaded_context_length"]) ?? countOf(item["max_context_length"]),
      capabilities: capabilitiesOf(textOf(item["type"]), item["capabilities"]),
      residency: item["state"] === "loaded" ? "loaded" : "cold",
    }),
  ];
}

/** Since 0.4; older ones load a model when it is asked for an answer. */
async function load(connection: Connection, model: string, signal: AbortSignal): Promise<boolean> {
  const { status, body, text } = await ask(connection, "/api/v1/models/load", signal, { model });
  if (/failed to load model/i.test(text)) throw new LoadFailed(`HTTP ${status}: ${text}`);
  return status === 200 && isRecord(body) && body["status"] === "loaded";
}

async function unload(connection: Connection, model: string, signal: AbortSignal): Promise<void> {
  const told = await askAside(connection, "/api/v1/models", signal);
  const models = Array.isArray(told?.["models"]) ? told["models"].filter(isRecord) : [];
  const instances = models.find((each) => each["key"] === model)?.["loaded_instances"];
  for (const instance of Array.isArray(instances) ? instances.filter(isRecord) : []) {
    const wish = { instance_id: instance["id"] };
    await askAside(connection, "/api/v1/models/unload", signal, wish);
  }
}

export const lmstudio: Engine = {
  ...openai,
  kind: "lmstudio",
  slots: 4,
  embedBatch: 64,
  tellsResidency: true,
  tellsAbilities: true,
  speaks: (path) => !LACKED_PATHS.has(path),
  // One after the other: it logs an error for every path it lacks, and answers 200 all the same.
  async look(connection, signal): Promise<Sighting> {
    const native = await askAside(connection, "/api/v1/models", signal);
    if (Array.isArray(native?.["models"])) {
      return { loading: false, models: native["models"].filter(isRecord).flatMap(listed) };
    }
    const older = await askAside(connection, "/api/v0/models", signal);
    if (Array.isArray(older?.["data"])) {
      return { loading: false, models: older["data"].filter(isRecord).flatMap(listedBefore) };
    }
    return openai.look(connection, signal);
  },
  load,
  unload,
  meaning(said) {
    // Its own crash and a load that failed are a 400, as if the request were at fault.
    if (/model has crashed|failed to load model/i.test(said.words)) return "broken";
    return knownMeaning(said);
  },
};
