/**
 * Conversations with shared system prompts on two real llama-servers: once by turns, as a plain round
 * robin sends them, once through the gateway. `prefix.test.ts` and `bench/prefix.ts` play them.
 */
import { open, randomOf, readEvents, send, type Random } from "../support/client.ts";
import { startGateway, sumOf } from "../support/gateway.ts";
import { startLlamaServer, type Service } from "./support.ts";

const CONVERSATIONS = 8;
const TURNS = 6;
/** As many as the two have slots. Whoever ends makes room for the next. */
const AT_ONCE = 4;
/** Tokens, about: one and a half times as many as words. */
const SYSTEM_WORDS = 60;
const USER_WORDS = 45;
const ANSWER_TOKENS = 12;
const PATIENCE_MS = 240_000;

const WORDS =
  "river engine morning paper window letter garden number winter market doctor silver question music village bridge coffee animal history pocket answer mountain kitchen reason island teacher evening machine promise shadow".split(
    " ",
  );

interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

/** One answer, with what the engine says of its prompt. */
export interface Answered {
  promptTokens: number;
  cachedTokens: number;
  ttftMs: number;
}

/** What came of all of them. */
export interface Outcome {
  answers: Answered[];
  tookMs: number;
  /** By the engines' own counters. */
  computedTokens: number;
}

export type Side = "round robin" | "gateway";

function textOf(random: Random, words: number): string {
  return Array.from({ length: words }, () => random.pick(WORDS)).join(" ");
}

interface Script {
  system: string;
  says: string[];
  /** Where a round robin sends each turn. */
  servers: number[];
}

/** What the users say, by conversation: some share one system prompt, the others another. */
function scripts(seed: number): Script[] {
  const random = randomOf(seed);
  const systems = [textOf(random, SYSTEM_WORDS), textOf(random, SYSTEM_WORDS)];
  const all = Array.from({ length: CONVERSATIONS }, (): Script => {
    const says = Array.from({ length: TURNS }, () => textOf(random, USER_WORDS));
    return { system: random.pick(systems), says, servers: [] };
  });
  // By turns in a seeded order of arrival. In that of the clock four clients often keep in step, and
  // then two servers by turns are always the same ones.
  const left = [...all];
  const active = left.splice(0, AT_ONCE);
  for (let sent = 0; active.length > 0; sent++) {
    const script = random.pick(active);
    script.servers.push(sent % 2);
    if (script.servers.length < TURNS) continue;
    active.splice(active.indexOf(script), 1, ...left.splice(0, 1));
  }
  return all;
}

/**
 * Plays all conversations against two fresh servers with two slots each.
 *
 * @param cacheMib what a server keeps of prompts beside its slots; 0: nothing.
 */
export async function converse(side: Side, seed: number, cacheMib: number): Promise<Outcome> {
  const options = ["-c", "8192", "-np", "2", "--metrics", "--cache-ram", String(cacheMib)];
  const servers: Service[] = [];
  try {
    for (let each = 0; each < 2; each++) servers.push(await startLlamaServer("smol-a", ...options));
    if (side === "gateway") return await throughGateway(servers, seed);
    return await play(servers, seed, (server) => (servers[server] as Service).url);
  } finally {
    for (const server of servers) await server.stop();
  }
}

async function throughGateway(servers: readonly Service[], seed: number): Promise<Outcome> {
  const backends = servers.map(({ url }, at) => ({ id: `server-${at}`, kind: "llamacpp", url }));
  const gateway = await startGateway({ config: { server: { logLevel: "error" }, backends } });
  try {
    return await play(servers, seed, () => gateway.url);
  } finally {
    await gateway.stop();
  }
}

async function play(
  servers: readonly Service[],
  seed: number,
  urlFor: (server: number) => string,
): Promise<Outcome> {
  const startedAt = performance.now();
  const left = scripts(seed);
  const answers: Answered[] = [];
  const client = async (): Promise<void> => {
    for (let script = left.shift(); script !== undefined; script = left.shift()) {
      const messages: Message[] = [{ role: "system", content: script.system }];
      for (const [turn, content] of script.says.entries()) {
        messages.push({ role: "user", content });
        const { answered, text } = await ask(urlFor(script.servers[turn] ?? 0), messages);
        answers.push(answered);
        messages.push({ role: "assistant", content: text });
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, client));
  const tookMs = performance.now() - startedAt;
  let computedTokens = 0;
  for (const { url } of servers) {
    const { text } = await send(`${url}/metrics`);
    computedTokens += sumOf(text, "llamacpp:prompt_tokens_total");
  }
  return { answers, tookMs, computedTokens };
}

interface Chunk {
  choices?: { delta?: { content?: string | null } }[];
  usage?: { prompt_tokens: number; prompt_tokens_details?: { cached_tokens?: number } } | null;
}

/** @throws Error where the answer is not whole */
async function ask(
  url: string,
  messages: readonly Message[],
): Promise<{ answered: Answered; text: string }> {
  const startedAt = performance.now();
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(), PATIENCE_MS);
  try {
    const body = {
      model: "smol-a",
      messages,
      max_tokens: ANSWER_TOKENS,
      temperature: 0.7,
      seed: 1,
      stream: true,
      stream_options: { include_usage: true },
    };
    // It may close a connection after a stream: real-engines.md §5.2.
    const init = { signal: controller.signal, headers: { connection: "close" } };
    const response = await open(`${url}/v1/chat/completions`, body, init);
    if (response.status !== 200) throw new Error(`${response.status} ${await response.text()}`);
    let text = "";
    let ttftMs: number | null = null;
    let usage: Chunk["usage"] = null;
    for await (const { data } of readEvents(response)) {
      if (data === null || data === "[DONE]") continue;
      const chunk = JSON.parse(data) as Chunk;
      const content = chunk.choices?.[0]?.delta?.content ?? "";
      if (content !== "") ttftMs ??= performance.now() - startedAt;
      text += content;
      usage = chunk.usage ?? usage;
    }
    const cachedTokens = usage?.prompt_tokens_details?.cached_tokens;
    if (usage == null || cachedTokens === undefined || ttftMs === null) {
      throw new Error(`an answer without tokens or usage: ${text}`);
    }
    return { answered: { promptTokens: usage.prompt_tokens, cachedTokens, ttftMs }, text };
  } finally {
    clearTimeout(timer);
  }
}

/** Prompt tokens that the engines had cached, by what their answers say. */
export function cachedIn({ answers }: Outcome): number {
  return answers.reduce((sum, { cachedTokens }) => sum + cachedTokens, 0);
}
