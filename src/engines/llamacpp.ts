import type { Residency } from "../core/snapshot.ts";
import { isRecord, textOf } from "../dialects/dialect.ts";
import { LIMIT_FIELDS } from "./cap.ts";
import {
  ask,
  askAside,
  countOf,
  fromCard,
  knownMeaning,
  list,
  LoadFailed,
  openai,
  readLoadRefusal,
  type Connection,
  type Engine,
  type ListedModel,
} from "./engine.ts";

type Fields = Record<string, unknown>;

function fieldsOf(value: unknown): Fields {
  return isRecord(value) ? value : {};
}

/** WordPiece, the vocabulary of BERT: such a model embeds and cannot generate. */
const WORD_PIECE = 3;

/** It calls every model a completer, so that is taken back where something else says otherwise. */
function capabilitiesOf(card: Fields, props: Fields, args: readonly unknown[]): string[] {
  const embeds = fieldsOf(card["meta"])["vocab_type"] === WORD_PIECE;
  if (embeds || args.includes("--embedding") || args.includes("--embeddings")) return ["embedding"];
  const inputs = fieldsOf(card["architecture"])["input_modalities"];
  const sees =
    fieldsOf(props["modalities"])["vision"] === true ||
    (Array.isArray(inputs) && inputs.includes("image"));
  const capabilities = sees ? ["completion", "vision"] : ["completion"];
  if (fieldsOf(props["chat_template_caps"])["supports_tools"] === true) capabilities.push("tools");
  return capabilities;
}

/** The number after `--name` in the arguments a router starts a model with. */
function argument(args: readonly unknown[], name: string): number | null {
  const at = args.indexOf(name);
  return at < 0 ? null : countOf(Number(args[at + 1]));
}

/** Of one slot: what the loaded model says, else what its arguments make of it. */
function contextOf(listed: ListedModel, props: Fields, args: readonly unknown[]): number | null {
  const settings = fieldsOf(props["default_generation_settings"]);
  const told = listed.contextLength ?? countOf(settings["n_ctx"]);
  const whole = argument(args, "--ctx-size");
  if (told !== null || whole === null) return told;
  // As many slots as it likes share one context; a number of slots divides it, unless told not to.
  const parts = args.includes("--kv-unified") ? null : argument(args, "--parallel");
  return Math.floor(whole / (parts ?? 1));
}

/** One card is as many models as it has names. */
function named(card: Fields, residency: Residency, props: Fields): ListedModel[] {
  const told = fieldsOf(card["status"])["args"];
  const args: unknown[] = Array.isArray(told) ? told : [];
  const aliases = Array.isArray(card["aliases"]) ? card["aliases"] : [];
  return fromCard(card).flatMap((listed) => {
    const model = {
      ...listed,
      residency,
      capabilities: capabilitiesOf(card, props, args),
      contextLength: contextOf(listed, props, args),
      slots: countOf(props["total_slots"]) ?? argument(args, "--parallel"),
      sizeBytes: countOf(fieldsOf(card["meta"])["size"]),
    };
    const names = new Set([listed.name, ...aliases.filter((alias) => textOf(alias))].map(String));
    return [...names].map((name) => ({ ...model, name }));
  });
}

/** A sleeping or downloading model is not in memory either. */
function residencyOf(status: string): Residency {
  return status === "loaded" || status === "loading" ? status : "cold";
}

/** A model of a router. Only the loaded ones are asked further, and in a way that loads nothing. */
async function routed(
  connection: Connection,
  card: Fields,
  status: string,
  signal: AbortSignal,
): Promise<ListedModel[]> {
  const residency = residencyOf(status);
  const name = encodeURIComponent(textOf(card["id"]) ?? "");
  const path = `/props?model=${name}&autoload=false`;
  const props = residency === "loaded" ? await askAside(connection, path, signal) : null;
  return named(card, residency, props ?? {});
}

const LOOK_MS = 50;
const LONGEST_LOOK_MS = 500;
/** So often it may say that it does not load what it was told to load. */
const MOST_IDLE_LOOKS = 5;

/** What a router says of a model. */
async function statusOf(connection: Connection, model: string, signal: AbortSignal) {
  const { items } = await list(connection, "/models", "data", signal);
  return fieldsOf(items.find((card) => card["id"] === model)?.["status"]);
}

/** A router answers at once and loads afterwards. */
async function load(connection: Connection, model: string, signal: AbortSignal): Promise<boolean> {
  const { status, body, text } = await ask(connection, "/models/load", signal, { model });
  const isRunning = status === 400 && /already (?:running|loaded|loading)/i.test(text);
  // A server with one model has no such route, and wakes it when asked for an answer.
  if (status !== 200 && !isRunning) return readLoadRefusal(status, body, text);
  let idle = 0;
  for (let ms = LOOK_MS; idle < MOST_IDLE_LOOKS; ms = Math.min(ms * 1.5, LONGEST_LOOK_MS)) {
    const { value, failed, exit_code: code } = await statusOf(connection, model, signal);
    if (value === "loaded") return true;
    if (failed === true) throw new LoadFailed(`its server ended with exit code ${String(code)}`);
    if (value !== "loading") idle++;
    await pause(ms, signal);
  }
  return false;
}

async function unload(connection: Connection, model: string, signal: AbortSignal): Promise<void> {
  const { status } = await ask(connection, "/models/unload", signal, { model });
  if (status !== 200) return;
  while ((await statusOf(connection, model, signal))["value"] === "loaded") {
    await pause(LOOK_MS, signal);
  }
}

/** Rejects when the signal is aborted. */
function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const leave = () => {
      clearTimeout(timer);
      reject(signal.reason as Error);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", leave);
      resolve();
    }, ms);
    signal.addEventListener("abort", leave, { once: true });
  });
}

export const llamacpp: Engine = {
  ...openai,
  kind: "llamacpp",
  slots: 4,
  embedBatch: 256,
  tellsResidency: true,
  tellsAbilities: true,
  takesAnyName: true,
  // Its own name goes before all others, wherever it is handed on.
  limitFields: {
    ...LIMIT_FIELDS,
    "/v1/chat/completions": ["max_tokens", "max_completion_tokens", "n_predict"],
    "/v1/completions": ["max_tokens", "n_predict"],
    "/v1/responses": ["max_output_tokens", "n_predict"],
  },
  // Never `/slots`: it wakes a sleeping model.
  async look(connection, signal) {
    const [{ loading, items }, told] = await Promise.all([
      list(connection, "/v1/models", "data", signal),
      askAside(connection, "/props", signal),
    ]);
    const props = told ?? {};
    const models = await Promise.all(
      items.map(async (card) => {
        // Only a router's cards have a status.
        const status = textOf(fieldsOf(card["status"])["value"]);
        if (status !== null) return await routed(connection, card, status, signal);
        return named(card, props["is_sleeping"] === true ? "cold" : "loaded", props);
      }),
    );
    return { loading, models: models.flat() };
  },
  load,
  unload,
  meaning(said) {
    const { status, words } = said;
    // It blames itself for these three; the fault is the request's.
    if (status === 500 && /too large to process/i.test(words)) return "too_long";
    if (status === 500 && /does not support logits/i.test(words)) return "unsupported";
    if (status === 500 && /\b\w+ input is not supported/i.test(words)) return "unsupported_input";
    if (status === 400 && /^model is not loaded/i.test(words)) return "not_loaded";
    return knownMeaning(said);
  },
};
