import { isRecord, numberOf, textOf, type Ability } from "../dialects/dialect.ts";
import { LIMIT_FIELDS, valueOf } from "./cap.ts";
import {
  ask,
  askAside,
  countOf,
  knownMeaning,
  list,
  modelNamed,
  openai,
  readLoadRefusal,
  type Connection,
  type Engine,
  type ListedModel,
} from "./engine.ts";
import { withholdFromOllama } from "./withhold.ts";

type Fields = Record<string, unknown>;

/** Of the JSON values only `null` begins with it. */
const LETTER_N = 0x6e;

const PATHS = new Set([
  "/v1/chat/completions",
  "/v1/completions",
  "/v1/embeddings",
  "/v1/messages",
  "/v1/responses",
]);

/** What it leaves out without a word, or refuses in the words of its parser. */
const CANNOT: Partial<Record<Ability, string>> = {
  n: "gives one choice per request: leave it out, or ask several times",
  best_of: "makes one answer and cannot choose among several: leave it out",
  echo: "does not repeat the prompt: leave it out",
  logit_bias: "has no such bias: leave it out",
  tool_choice: 'lets the model choose its tools: leave it out, or say "auto"',
  prompt_list: "takes one prompt, as a string: send each in a request of its own, as text",
  token_input: "takes text and no token ids: send strings",
  image_url: "fetches no images: send them as base64 data",
  stored_response: "keeps no responses: send the whole conversation",
};

/** What `/api/show` knows of a model and older versions do not list. */
interface Shown {
  contextLength: number | null;
  capabilities: string[] | null;
}

/** By digest, under which nothing ever changes. */
const shown = new Map<string, Shown>();
const MOST_SHOWN = 1000;
/** In one round: a machine full of models is learned over several. */
const SHOWN_PER_ROUND = 5;

function wordsOf(value: unknown): string[] | null {
  return Array.isArray(value) ? value.map(String) : null;
}

async function show(connection: Connection, item: Fields, digest: string, signal: AbortSignal) {
  const question = { model: item["name"] ?? item["model"] };
  const told = await askAside(connection, "/api/show", signal, question);
  if (signal.aborted) return;
  const info = isRecord(told?.["model_info"]) ? told["model_info"] : {};
  const architecture = textOf(info["general.architecture"]) ?? "";
  const [oldest] = shown.keys();
  if (shown.size >= MOST_SHOWN && oldest !== undefined) shown.delete(oldest);
  shown.set(digest, {
    contextLength: countOf(info[`${architecture}.context_length`]),
    capabilities: wordsOf(told?.["capabilities"]),
  });
}

function detailsOf(item: Fields): Fields {
  return isRecord(item["details"]) ? item["details"] : {};
}

/** Such tags are answered by ollama.com. */
function hasCloudTag(name: string): boolean {
  return /:(?:.*-)?cloud$/.test(name);
}

function isRemote(item: Fields, name: string): boolean {
  return !!item["remote_host"] || !!item["remote_model"] || hasCloudTag(name);
}

/** Asks once per digest for what the list lacks, and never for a model of another machine. */
async function showMissing(connection: Connection, items: Fields[], signal: AbortSignal) {
  const missing = new Map<string, Fields>();
  for (const item of items) {
    const digest = textOf(item["digest"]);
    const told = Array.isArray(item["capabilities"]) && countOf(detailsOf(item)["context_length"]);
    if (digest === null || digest === "" || told || shown.has(digest)) continue;
    if (!isRemote(item, textOf(item["name"]) ?? "")) missing.set(digest, item);
  }
  const asked = [...missing].slice(0, SHOWN_PER_ROUND);
  await Promise.all(asked.map(([digest, item]) => show(connection, item, digest, signal)));
}

/**
 * @param item of `/api/tags`
 * @param running the items of `/api/ps`, null when it did not answer
 */
function listed(item: Fields, running: Fields[] | null): ListedModel[] {
  const name = textOf(item["name"]) ?? textOf(item["model"]);
  if (name === null || name === "") return [];
  const digest = textOf(item["digest"]);
  // A copy under another name is the same runner, listed under the name that came first.
  const loaded =
    running?.find((each) => each["name"] === name) ??
    running?.find((each) => digest !== null && each["digest"] === digest);
  const more = shown.get(digest ?? "");
  const modified = Date.parse(textOf(item["modified_at"]) ?? "");
  const remote = isRemote(item, name);
  return [
    modelNamed(name, {
      digest,
      contextLength:
        countOf(loaded?.["context_length"]) ??
        countOf(detailsOf(item)["context_length"]) ??
        more?.contextLength ??
        null,
      // The list calls some models completers that are none; who was asked knows better.
      capabilities: more?.capabilities ?? wordsOf(item["capabilities"]) ?? [],
      createdAt: Number.isNaN(modified) ? null : Math.floor(modified / 1000),
      residency: running === null || loaded !== undefined || remote ? "loaded" : "cold",
      sizeBytes: countOf(loaded?.["size"]) ?? countOf(item["size"]),
      // 0 is an answer: all of it is in main memory.
      vramBytes: numberOf(loaded?.["size_vram"]),
      remote,
    }),
  ];
}

/** Only the gateway's own loads say it; requests on `/v1` renew it. */
const KEEP_ALIVE = "30m";

/** Without a prompt it only loads; a model that embeds has another route for the same. */
async function load(connection: Connection, model: string, signal: AbortSignal): Promise<boolean> {
  const wish = { model, keep_alive: KEEP_ALIVE };
  let answer = await ask(connection, "/api/generate", signal, { ...wish, stream: false });
  if (answer.status === 400 && answer.text.includes("does not support generate")) {
    answer = await ask(connection, "/api/embed", signal, { ...wish, input: "" });
  }
  return answer.status === 200 || readLoadRefusal(answer.status, answer.body, answer.text);
}

async function unload(connection: Connection, model: string, signal: AbortSignal): Promise<void> {
  const wish = { model, keep_alive: 0 };
  const { text } = await ask(connection, "/api/generate", signal, wish);
  if (!text.includes("does not support generate")) return;
  await ask(connection, "/api/embed", signal, { ...wish, input: "" });
}

export const ollama: Engine = {
  ...openai,
  kind: "ollama",
  // OLLAMA_NUM_PARALLEL is 1 by default and no endpoint tells it.
  slots: 1,
  // Each input is a call of its own inside it: small batches end soon when the client leaves.
  embedBatch: 64,
  speaks: (path) => PATHS.has(path),
  cannot: ({ what }) => CANNOT[what] ?? null,
  tellsResidency: true,
  tellsAbilities: true,
  isRemote: hasCloudTag,
  withhold: withholdFromOllama,
  adapt(body, keys) {
    // Ollama ignores `max_completion_tokens`, and an output without a limit never ends.
    const limit = valueOf(body, keys, "max_completion_tokens");
    const own = valueOf(body, keys, "max_tokens");
    const isMissing = own === undefined || own[0] === LETTER_N;
    return new Map(limit !== undefined && isMissing ? [["max_tokens", limit]] : []);
  },
  limitFields: { ...LIMIT_FIELDS, "/v1/chat/completions": ["max_tokens"] },
  async look(connection, signal) {
    const [{ loading, items }, ps] = await Promise.all([
      list(connection, "/api/tags", "models", signal),
      // Without an answer nobody knows what is loaded: then the probe has failed, rather than that what
      // fits together would be learned from a guess. Old versions do not have it.
      ask(connection, "/api/ps", signal),
    ]);
    await showMissing(connection, items, signal);
    const loaded = ps.status === 200 && isRecord(ps.body) ? ps.body["models"] : null;
    const running = Array.isArray(loaded) ? loaded.filter(isRecord) : null;
    return { loading, models: items.flatMap((item) => listed(item, running)) };
  },
  load,
  unload,
  meaning: knownMeaning,
};
