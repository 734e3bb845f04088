// A day of mixed traffic, once straight to an engine and through the gateway: what the engine had to
// compute. `bun bench/day.ts [--seed N] [--max-items N]`. How to read it: bench/README.md.
import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { startGateway, type Gateway } from "../test/support/gateway.ts";
import type { ChatRequest, Computed, EmbeddingRequest } from "./day-engine.ts";
import { CONTEXT_TOKENS, lengthOf, promptOf, vectorOf, wordOf } from "./day-engine.ts";
import { aDay, type Hour, type Job, type Wish } from "./day-work.ts";
import { stopChild, url } from "./subjects.ts";

const { values: flags } = parseArgs({
  options: {
    seed: { type: "string", default: "1" },
    "max-items": { type: "string", default: "1000" },
  },
});

/** Answers end here at the latest: twice what the longest that ends by itself has. */
const CAP = 1024;
/** Tokens a second, to weigh the two kinds against each other: assumed, not measured. */
const PROMPT_SPEED = 3000;
const ANSWER_SPEED = 60;

const CLASSES: readonly [name: string, words: string][] = [
  ["tests", "tests in CI, temperature 0"],
  ["index", "documents, embedded again"],
  ["once", "temperature 0, never the same"],
  ["chat", "chat, temperature 0.7"],
  ["chat, left", "chat, left in the middle"],
  ["endless", "runs away"],
];

interface Run {
  name: string;
  computed: Record<string, Computed>;
  /** By what the cache had. */
  lookups: Record<string, number> | null;
  tookMs: number;
}

async function startEngine(): Promise<{ child: ChildProcess; port: number }> {
  const child = spawn(process.execPath, [join(import.meta.dirname, "day-engine.ts")], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const [line] = (await once(child.stdout, "data")) as [Buffer];
  return { child, port: Number(line.toString()) };
}

async function run(name: string, day: readonly Hour[], cache: object | null): Promise<Run> {
  const { child, port } = await startEngine();
  let gateway: Gateway | null = null;
  try {
    if (cache !== null) {
      gateway = await startGateway({
        config: {
          server: { logLevel: "error" },
          backends: [{ id: "engine", kind: "openai", url: url(port) }],
          models: { chat: { maxOutputTokens: CAP } },
          cache,
        },
      });
    }
    const startedAt = performance.now();
    for (const hour of day) {
      const base = gateway?.url ?? url(port);
      await Promise.all(hour.map((job) => work(base, job, gateway === null ? null : CAP)));
    }
    const tookMs = performance.now() - startedAt;
    // What was left is stopped once the connection's end has come through.
    await new Promise((resolve) => setTimeout(resolve, 200));
    const computed = (await (await fetch(`${url(port)}/computed`)).json()) as Run["computed"];
    return { name, computed, lookups: gateway && (await lookupsOf(gateway)), tookMs };
  } finally {
    await gateway?.stop();
    await stopChild(child);
  }
}

async function lookupsOf(gateway: Gateway): Promise<Record<string, number>> {
  const results = ["hit", "joined", "miss", "bypass"];
  const counts = results.map((result) => {
    return gateway.metric("tidegate_cache_lookups_total", { result });
  });
  const found = await Promise.all(counts);
  return Object.fromEntries(results.map((result, at) => [result, found[at] ?? 0]));
}

async function work(base: string, { atOnce, wishes }: Job, cap: number | null): Promise<void> {
  const left = [...wishes];
  const client = async (): Promise<void> => {
    for (let wish = left.shift(); wish !== undefined; wish = left.shift()) {
      await send(base, wish, cap);
    }
  };
  await Promise.all(Array.from({ length: atOnce }, client));
}

/** @throws Error for an answer that is not this request's: whatever it saved is worth nothing. */
async function send(base: string, wish: Wish, cap: number | null): Promise<void> {
  const leaving = new AbortController();
  const path = wish.kind === "chat" ? "/v1/chat/completions" : "/v1/embeddings";
  const response = await fetch(`${base}${path}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(wish.body),
    signal: leaving.signal,
  });
  if (response.status !== 200) throw new Error(`${response.status} ${await response.text()}`);
  if (wish.kind === "embed") return checkVectors(wish.body, await response.json());
  const { body, leavesAfter } = wish;
  const length = Math.min(lengthOf(body), cap ?? CONTEXT_TOKENS);
  const expected = Array.from({ length }, (_, at) => wordOf(promptOf(body), at));
  if (body.stream !== true) return checkAnswer(body, await response.json(), expected.join(""));
  let words = 0;
  for await (const word of wordsOf(response)) {
    if (word !== expected[words]) throw new Error(`word ${words} of a stream is another's`);
    words += 1;
    if (words === leavesAfter) break;
  }
  if (words === leavesAfter) return leaving.abort();
  if (words !== length) throw new Error(`${words} words instead of ${length}`);
}

function checkAnswer(request: ChatRequest, answer: unknown, expected: string): void {
  const { choices } = answer as { choices: { message: { content: string } }[] };
  if (choices[0]?.message.content === expected) return;
  throw new Error(`the answer is another's: class ${request.metadata.class}`);
}

function checkVectors({ input }: EmbeddingRequest, answer: unknown): void {
  const { data } = answer as { data: { index: number; embedding: number[] }[] };
  const isRight = data.every(({ index, embedding }, at) => {
    return index === at && embedding.map(Math.fround).join() === vectorOf(input[at] ?? "").join();
  });
  if (!isRight || data.length !== input.length) throw new Error("the vectors are another's");
}

async function* wordsOf(response: Response): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let pending = "";
  for await (const bytes of response.body ?? []) {
    const events = (pending + decoder.decode(bytes, { stream: true })).split("\n\n");
    pending = events.pop() ?? "";
    for (const event of events) {
      if (!event.startsWith("data: {")) continue;
      const { choices } = JSON.parse(event.slice("data: ".length)) as {
        choices: { delta: { content?: string } }[];
      };
      const word = choices[0]?.delta.content;
      if (word !== undefined) yield word;
    }
  }
}

const NOTHING: Computed = { prompts: 0, promptTokens: 0, answerTokens: 0 };

function sumOf(all: readonly Computed[]): Computed {
  const sum = { ...NOTHING };
  for (const each of all) {
    sum.prompts += each.prompts;
    sum.promptTokens += each.promptTokens;
    sum.answerTokens += each.answerTokens;
  }
  return sum;
}

const tokensIn = ({ promptTokens, answerTokens }: Computed): number => promptTokens + answerTokens;
const secondsOf = ({ promptTokens, answerTokens }: Computed): number =>
  promptTokens / PROMPT_SPEED + answerTokens / ANSWER_SPEED;

function saved(direct: number, through: number): string {
  if (direct === 0) return "–";
  // No minus in front of a zero.
  return `${Math.round(100 * (1 - through / direct)) + 0} %`;
}

function table(requests: ReadonlyMap<string, number>, direct: Run, through: Run): string {
  const row = (name: string, count: number, one: Computed, other: Computed): string => {
    const pairs = [
      [one.prompts, other.prompts],
      [one.promptTokens, other.promptTokens],
      [one.answerTokens, other.answerTokens],
    ].map(([before, after]) => `${before} → ${after}`);
    const saves = [saved(tokensIn(one), tokensIn(other)), saved(secondsOf(one), secondsOf(other))];
    return `| ${[name, count, ...pairs, ...saves].join(" | ")} |`;
  };
  const rows = CLASSES.map(([name, words]) => {
    const [one = NOTHING, other = NOTHING] = [direct.computed[name], through.computed[name]];
    return row(words, requests.get(name) ?? 0, one, other);
  });
  const [one, other] = [direct, through].map(({ computed }) => sumOf(Object.values(computed)));
  const all = [...requests.values()].reduce((sum, count) => sum + count, 0);
  return [
    "| | requests | prompts computed | prompt tokens | answer tokens | tokens saved | engine time saved |",
    "| --- | --- | --- | --- | --- | --- | --- |",
    ...rows,
    row("**all**", all, one ?? NOTHING, other ?? NOTHING),
  ].join("\n");
}

/** What the project set out to save. */
function targets(before: Computed, after: Computed): string {
  const lines: string[] = [];
  for (const [what, share, one, other] of [
    ["compute: 40 % less engine time", 0.4, secondsOf(before), secondsOf(after)],
    ["tokens: 60 % less", 0.6, tokensIn(before), tokensIn(after)],
  ] as const) {
    const word = 1 - other / one >= share ? "met" : "missed";
    lines.push(`target for ${what}: ${word} (${saved(one, other)})`);
  }
  return lines.join("\n");
}

function requestsIn(day: readonly Hour[]): Map<string, number> {
  const counts = new Map<string, number>();
  for (const wish of day.flat().flatMap(({ wishes }) => wishes)) {
    const name = wish.kind === "chat" ? wish.body.metadata.class : "index";
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return counts;
}

const seed = Number(flags.seed);
const maxItems = Number(flags["max-items"]);
if (!Number.isInteger(seed + maxItems)) throw new Error("the flags take whole numbers");
const day = aDay(seed);
const requests = requestsIn(day);
const direct = await run("direct", day, null);
const runs = [
  await run("kept for a day", day, { ttlMs: 86_400_000, maxItems }),
  await run("kept for no time", day, { ttlMs: 1 }),
];
for (const through of runs) {
  const { computed, lookups, tookMs } = through;
  console.log(`\nStraight → through the gateway, answers ${through.name} (seed ${seed}):\n`);
  console.log(table(requests, direct, through));
  const before = sumOf(Object.values(direct.computed));
  const after = sumOf(Object.values(computed));
  console.log(
    `\nprompts computed: ${saved(before.prompts, after.prompts)} less; ` +
      `tokens: ${saved(tokensIn(before), tokensIn(after))} less; ` +
      `engine time at ${PROMPT_SPEED} prompt and ${ANSWER_SPEED} answer tokens a second: ` +
      `${secondsOf(before).toFixed(0)} → ${secondsOf(after).toFixed(0)} s, ` +
      `${saved(secondsOf(before), secondsOf(after))} less`,
  );
  if (through === runs[0]) console.log(targets(before, after));
  const found = Object.entries(lookups ?? {}).map(([result, count]) => `${count} ${result}`);
  console.log(`the cache: ${found.join(", ")}; the replay took ${(tookMs / 1000).toFixed(1)} s`);
}
