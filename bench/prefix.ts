// Conversations on two real llama-servers, once by plain round robin and once through the gateway: how
// much of the prompts is cached where they arrive. `bun run prefix [--seed N] [--rounds N] [--json]`. How to read it:
// docs/performance.md.
import { loadavg } from "node:os";
import process from "node:process";
import { parseArgs } from "node:util";
import { cachedIn, converse, type Outcome, type Side } from "../test/real/conversations.ts";
import { missing } from "../test/real/support.ts";
import { quantile } from "../test/real/turn-runs.ts";

const { values: flags } = parseArgs({
  options: {
    seed: { type: "string", default: "1" },
    rounds: { type: "string", default: "3" },
    json: { type: "boolean", default: false },
  },
});

const TARGET = 2;
/** What a server keeps beside its slots, MiB; the second is llama-server's default. */
const CACHES = [0, 8192];

interface Round {
  cacheMib: number;
  seed: number;
  sides: Record<Side, Outcome>;
}

async function play(cacheMib: number, seed: number, isOursFirst: boolean): Promise<Round> {
  const sides: Partial<Record<Side, Outcome>> = {};
  const order: Side[] = isOursFirst ? ["gateway", "round robin"] : ["round robin", "gateway"];
  for (const side of order) sides[side] = await converse(side, seed, cacheMib);
  return { cacheMib, seed, sides: sides as Round["sides"] };
}

function row(cells: readonly (string | number)[]): string {
  return `| ${cells.join(" | ")} |`;
}

const seconds = (ms: number | null): string => (ms === null ? "–" : (ms / 1000).toFixed(2));

function ttft({ answers }: Outcome, share: number): number {
  return (
    quantile(
      answers.map(({ ttftMs }) => ttftMs),
      share,
    ) ?? 0
  );
}

const MEASURES: [name: string, of: (outcome: Outcome) => number, shown: (n: number) => string][] = [
  [
    "prompt tokens",
    ({ answers }) => answers.reduce((sum, { promptTokens }) => sum + promptTokens, 0),
    String,
  ],
  ["cached", cachedIn, String],
  ["computed", ({ computedTokens }) => computedTokens, String],
  ["ttft p50", (outcome) => ttft(outcome, 0.5), seconds],
  ["ttft p95", (outcome) => ttft(outcome, 0.95), seconds],
  ["all in", ({ tookMs }) => tookMs, seconds],
];

function tableOf({ sides }: Round): string {
  const head = ["", "answers", ...MEASURES.map(([name]) => name)];
  const rows = Object.entries(sides).map(([side, outcome]) => {
    return row([
      side,
      outcome.answers.length,
      ...MEASURES.map(([, of, shown]) => shown(of(outcome))),
    ]);
  });
  const shares = MEASURES.map(([, of]) => {
    return (of(sides.gateway) / of(sides["round robin"])).toFixed(2);
  });
  return [
    row(head),
    row(head.map(() => "---")),
    ...rows,
    row(["gateway / round robin", "", ...shares]),
  ].join("\n");
}

function ceilingOf(outcome: Outcome): number {
  return outcome.answers.reduce((sum, each) => sum + each.promptTokens, 0) / cachedIn(outcome);
}

/** Over all rounds, not the best of them. */
function verdict(rounds: readonly Round[]): string {
  const factors = rounds.map(
    ({ sides }) => cachedIn(sides.gateway) / cachedIn(sides["round robin"]),
  );
  const middle = quantile(factors, 0.5) ?? 0;
  const all = factors.map((factor) => factor.toFixed(2)).join(", ");
  const word = middle >= TARGET ? "met" : "MISSED";
  // Where the engines keep everything even a round robin finds much.
  const most =
    quantile(
      rounds.map(({ sides }) => ceilingOf(sides["round robin"])),
      0.5,
    ) ?? 0;
  const ceiling = most < TARGET ? `; all prompt tokens are ${most.toFixed(2)} ×` : "";
  return `${word}: cached tokens ≥ ${TARGET} × round robin (${all}${ceiling})`;
}

if (missing("llama-server") !== false) process.exit(1);
const seed = Number(flags.seed);
const count = Number(flags.rounds);
if (!Number.isInteger(seed + count)) throw new Error("the flags take whole numbers");
const all: Round[] = [];
for (const cacheMib of CACHES) {
  const rounds: Round[] = [];
  const kept = cacheMib === 0 ? "nothing beside its slots" : `${cacheMib} MiB beside its slots`;
  if (!flags.json) console.log(`\n## A server keeps ${kept}`);
  for (let at = 0; at < count; at++) {
    const round = await play(cacheMib, seed + at, at % 2 === 1);
    rounds.push(round);
    if (flags.json) continue;
    console.log(
      `\nSeed ${round.seed}, load average ${loadavg()[0]?.toFixed(1)}\n\n${tableOf(round)}`,
    );
  }
  if (!flags.json) console.log(`\n${verdict(rounds)}`);
  all.push(...rounds);
}
if (flags.json) console.log(JSON.stringify(all));
