// A real Ollama with three small models and room for one of them, straight and through the gateway: what
// changing models costs. `bun run turns [--seed N] [--rounds N] [--runs a,b,c,d] [--every S] [--rate N] [--json]`.
// How to read it: docs/performance.md.
import { loadavg } from "node:os";
import process from "node:process";
import { parseArgs } from "node:util";
import { turnLength } from "../src/core/turns.ts";
import { missing } from "../test/real/support.ts";
import {
  beside,
  burst,
  leavers,
  measure,
  mix,
  MODELS,
  quantile,
  startWorld,
  unloadAll,
  type Beside,
  type Leavers,
  type Shown,
  type World,
} from "../test/real/turn-runs.ts";

const { values: flags } = parseArgs({
  options: {
    seed: { type: "string", default: "1" },
    rounds: { type: "string", default: "1" },
    runs: { type: "string", default: "a,b,c,d" },
    every: { type: "string", default: "20" },
    rate: { type: "string" },
    json: { type: "boolean", default: false },
  },
});

const MIX_MS = 45_000;
/** Of what one model serves that is always loaded: 4.2 a second where a service takes 0.17 s. */
const MIX_LOAD = 0.71;
const BURST = 60;
const BESIDE_MS = 45_000;
/** A client that leaves during a load has waited for so much of one. */
const PATIENCE = 0.3;

interface Pace {
  serviceMs: number;
  loadMs: number;
}

/** One run at one address. */
interface Side extends Shown {
  /** Straight from Ollama, just before and just after. */
  pace: Pace;
  /** What the gateway says it took, each of them: nothing for the other address. */
  services: number[];
  loadTimes: number[];
  /** Since the gateway started: the turn it derives goes by what loads took before. */
  longestLoadMs: number;
}

interface Target {
  what: string;
  seen: string;
  met: boolean;
}

interface Run<Result extends Shown> {
  about: (pace: Pace) => string;
  /** What a real Ollama was seen to do with it: S 0.17 s, L 0.55 s. */
  known: string;
  play: (world: World, url: string, pace: Pace, seed: number) => Promise<Result>;
  targets: (direct: Side & Result, ours: Side & Result) => Target[];
  /** More columns for a side. */
  more: Record<string, (side: Side & Result) => string>;
}

const seconds = (ms: number | null | undefined): string =>
  ms == null ? "never" : (ms / 1000).toFixed(2);
const ttfts = ({ asked }: Shown, model?: string): number[] =>
  asked.flatMap((one) => (model === undefined || one.model === model ? (one.ttftMs ?? []) : []));
const count = ({ asked }: Shown, ending: string, model?: string): number =>
  asked.filter((one) => one.ending === ending && (model ?? one.model) === one.model).length;

function atMost(what: string, seen: number, most: number): Target {
  return { what: `${what} ≤ ${seconds(most)} s`, seen: `${seconds(seen)} s`, met: seen <= most };
}

function nothingFails(ours: Shown): Target {
  const failures = count(ours, "failed");
  return { what: "0 failures", seen: String(failures), met: failures === 0 };
}

const rateFor = ({ serviceMs }: Pace): number =>
  flags.rate === undefined ? (MIX_LOAD * 1000) / serviceMs : Number(flags.rate);
const everyMs = Number(flags.every) * 1000;

const mixed: Run<Shown> = {
  about: (pace) =>
    `a mix of three models, Poisson, ${rateFor(pace).toFixed(1)} requests a second for ${MIX_MS / 1000} s`,
  known: "direct 72–82 s, p95 26–36 s",
  play: (world, url, pace, seed) => mix(world, url, seed, rateFor(pace), MIX_MS),
  targets: (_, ours) => [
    atMost("makespan", ours.tookMs, 48_000),
    atMost("ttft p95", quantile(ttfts(ours), 0.95) ?? Infinity, 5000),
    nothingFails(ours),
  ],
  more: {},
};

const aside: Run<Beside> = {
  about: () =>
    `two loops on A, and B asked for every ${flags.every} s for ${BESIDE_MS / 1000} s; the loops then go on for another turn and a half`,
  known: "direct never serves B",
  play(world, url, pace) {
    const turnMs = turnLength("auto", pace.loadMs, null, 1);
    const endMs = BESIDE_MS + 1.5 * turnMs + 2 * pace.loadMs;
    return beside(world, url, { everyMs, askForMs: BESIDE_MS, endMs });
  },
  targets(direct, ours) {
    const serviceMs = Math.max(ours.pace.serviceMs, ...ours.services);
    const loadMs = Math.max(ours.pace.loadMs, ours.longestLoadMs);
    const turnMs = turnLength("auto", loadMs, null, 1);
    const unserved = count(ours, "left", MODELS[1]) + count(ours, "failed", MODELS[1]);
    const share = ours.done / direct.done;
    return [
      { what: "every request of B served", seen: `${unserved} not`, met: unserved === 0 },
      atMost(
        "B's longest: turn + drain + load + its own service",
        Math.max(...ttfts(ours, MODELS[1])),
        turnMs + loadMs + 2 * serviceMs,
      ),
      { what: "A keeps ≥ 85 %", seen: `${(100 * share).toFixed(0)} %`, met: share >= 0.85 },
      nothingFails(ours),
    ];
  },
  more: {
    "A a second": ({ done, tookMs }) => ((done * 1000) / tookMs).toFixed(2),
    "B served": (side) => String(count(side, "served", MODELS[1])),
    "B left": (side) => String(count(side, "left", MODELS[1])),
  },
};

const burstOfAll: Run<Shown> = {
  about: () => `${BURST} at once over three models, by turns`,
  known: "direct 60 loads, 48 s",
  play: (world, url) => burst(world, url, BURST),
  targets(_, ours) {
    const { serviceMs, loadMs } = ours.pace;
    const allOf = (times: number[]) => times.reduce((sum, each) => sum + each, 0);
    return [
      { what: "3 loads", seen: String(ours.loads), met: ours.loads === 3 },
      atMost(
        `3 L + ${BURST} S + 10 %, measured beside it,`,
        ours.tookMs,
        1.1 * (3 * loadMs + BURST * serviceMs),
      ),
      // On a machine that others use it may have been faster or slower just then.
      atMost(
        "its own loads and services + 10 %, by the gateway's log,",
        ours.tookMs,
        1.1 * (allOf(ours.loadTimes) + allOf(ours.services)),
      ),
      nothingFails(ours),
    ];
  },
  more: {},
};

const leaving: Run<Leavers> = {
  about: ({ loadMs }) =>
    `A loaded; ten clients ask for B, one after the other, for ${seconds(PATIENCE * loadMs)} s each (${PATIENCE} L); then one who stays`,
  known: "direct ten loads, none served",
  play: (world, url, { loadMs }) => leavers(world, url, PATIENCE * loadMs),
  targets: (_, ours) => [
    { what: "one load", seen: String(ours.loads), met: ours.loads === 1 },
    { what: "resident after the ten", seen: String(ours.resident), met: ours.resident },
    {
      what: "the last is served",
      seen: ours.asked.at(-1)?.ending ?? "",
      met: ours.asked.at(-1)?.ending === "served",
    },
    nothingFails(ours),
  ],
  more: {
    "of ten served": ({ asked }) => String(count({ asked: asked.slice(0, -1) } as Shown, "served")),
    resident: ({ resident }) => (resident ? "yes" : "no"),
    "the last, ttft": ({ asked }) => seconds(asked.at(-1)?.ttftMs),
  },
};

const RUNS: Record<string, Run<Shown>> = {
  a: mixed,
  b: aside as unknown as Run<Shown>,
  c: burstOfAll,
  d: leaving as unknown as Run<Shown>,
};

const mean = (one: number, other: number): number => (one + other) / 2;

function paceBetween(before: Pace, after: Pace): Pace {
  return {
    serviceMs: mean(before.serviceMs, after.serviceMs),
    loadMs: mean(before.loadMs, after.loadMs),
  };
}

/** What the gateway's log says of services and loads. */
function toldBy({ gateway }: World): { services: number[]; loadTimes: number[] } {
  const services = gateway.records().map((record) => {
    return Number(record.latency_ms) - Number(record.queue_ms) - Number(record.load_ms);
  });
  const lines = gateway.stdout().split("\n");
  const loaded = lines.filter((line) => line.includes('"model loaded"'));
  const loadTimes = loaded.map((line) => (JSON.parse(line) as { load_ms: number }).load_ms);
  return { services, loadTimes };
}

interface Played {
  run: string;
  round: number;
  seed: number;
  about: string;
  direct: Side;
  ours: Side;
  targets: Target[];
}

/** Both addresses, one after the other, with the same seed; which comes first changes with the round. */
async function play(name: string, run: Run<Shown>, round: number, seed: number): Promise<Played> {
  const world = await startWorld();
  try {
    const sides: Partial<Record<"direct" | "ours", Side>> = {};
    const first = await measure(world);
    let before = first;
    for (const side of round % 2 === 0
      ? (["direct", "ours"] as const)
      : (["ours", "direct"] as const)) {
      await unloadAll(world);
      const told = toldBy(world);
      const url = side === "direct" ? world.ollama.url : world.gateway.url;
      const result = await run.play(world, url, first, seed);
      const now = toldBy(world);
      const after = await measure(world);
      sides[side] = {
        ...result,
        pace: paceBetween(before, after),
        services: now.services.slice(told.services.length),
        loadTimes: now.loadTimes.slice(told.loadTimes.length),
        longestLoadMs: Math.max(...now.loadTimes),
      };
      before = after;
    }
    const { direct, ours } = sides as Record<"direct" | "ours", Side>;
    const targets = run.targets(direct, ours);
    return { run: name, round, seed, about: run.about(first), direct, ours, targets };
  } finally {
    await world.stop();
  }
}

const HEAD = ["", "loads", "makespan", "failed", "ttft p50", "p95", "max"];

function spread(values: readonly number[]): (number | null)[] {
  return [0.5, 0.95, 1].map((share) => quantile(values, share));
}

function row(cells: readonly string[]): string {
  return `| ${cells.join(" | ")} |`;
}

function tableOf({ run, round, seed, about, direct, ours, targets }: Played): string {
  const { more, known } = RUNS[run] as Run<Shown>;
  const names = Object.keys(more);
  const lines = [row([...HEAD, ...names]), row([...HEAD, ...names].map(() => "---"))];
  for (const [name, side] of Object.entries({ direct, gateway: ours })) {
    const totals = [side.loads, seconds(side.tookMs), count(side, "failed")].map(String);
    const extras = names.map((each) => more[each]?.(side) ?? "");
    lines.push(row([name, ...totals, ...spread(ttfts(side)).map(seconds), ...extras]));
    for (const model of MODELS) {
      const number = side.asked.filter((one) => one.model === model).length;
      if (number === 0) continue;
      const cells = spread(ttfts(side, model)).map(seconds);
      lines.push(row([`${number} × ${model}`, "", "", "", ...cells, ...names.map(() => "")]));
    }
  }
  const paces = Object.entries({ direct, gateway: ours }).map(([name, { pace }]) => {
    return `${name} S ${seconds(pace.serviceMs)} s, L ${seconds(pace.loadMs)} s`;
  });
  const inRun = `the gateway's own log: S ${seconds(quantile(ours.services, 0.5))} s, L ${seconds(quantile(ours.loadTimes, 0.5))} s`;
  const verdicts = targets.map(({ what, seen, met }) => {
    return `- ${met ? "met" : "MISSED"}: ${what} (${seen})`;
  });
  const problems = [direct, ours].flatMap(({ asked }) =>
    asked.flatMap(({ problem }) => problem ?? []),
  );
  return [
    `\n## (${run}) ${about} (seed ${seed}, round ${round + 1})\n`,
    `Measured beside it: ${paces.join("; ")}; ${inRun}; load average ${loadavg()[0]?.toFixed(1)}`,
    `Known, with S 0.17 s and L 0.55 s: ${known}\n`,
    ...lines,
    "",
    ...verdicts,
    ...problems.slice(0, 3).map((problem) => `- failed: ${problem.slice(0, 300)}`),
  ].join("\n");
}

/** What does not depend on how fast the machine just was. */
function ratios(all: readonly Played[]): string {
  const measures: [string, (side: Side) => number | null][] = [
    ["loads", ({ loads }) => loads],
    ["makespan", ({ tookMs }) => tookMs],
    ["ttft p50", (side) => quantile(ttfts(side), 0.5)],
    ["ttft p95", (side) => quantile(ttfts(side), 0.95)],
    ["ttft max", (side) => quantile(ttfts(side), 1)],
  ];
  const head = ["direct / gateway", "rounds", ...measures.map(([name]) => name)];
  const lines = [row(head), row(head.map(() => "---"))];
  for (const [run, rounds] of Map.groupBy(all, (played) => played.run)) {
    const cells = measures.map(([, of]) => {
      const values = rounds.flatMap(({ direct, ours }) => {
        const [one, other] = [of(direct), of(ours)];
        return one === null || !other ? [] : [one / other];
      });
      const [middle, least, most] = [0.5, 0, 1].map((share) => quantile(values, share)?.toFixed(2));
      if (middle === undefined) return "–";
      return values.length === 1 ? middle : `${middle} (${least}–${most})`;
    });
    lines.push(row([`(${run})`, String(rounds.length), ...cells]));
  }
  return lines.join("\n");
}

if (missing("ollama of three") !== false) process.exit(1);
const seed = Number(flags.seed);
const rounds = Number(flags.rounds);
const names = flags.runs.split(",");
const unknown = names.find((name) => RUNS[name] === undefined);
if (unknown !== undefined) throw new Error(`there is no run ${unknown}: a, b, c and d`);
if (!Number.isInteger(seed + rounds) || !(everyMs > 0)) throw new Error("the flags take numbers");
const all: Played[] = [];
for (let round = 0; round < rounds; round++) {
  for (const name of names) {
    const played = await play(name, RUNS[name] as Run<Shown>, round, seed + round);
    all.push(played);
    if (!flags.json) console.log(tableOf(played));
  }
}
if (flags.json) console.log(JSON.stringify(all));
else console.log(`\n## Ratios, median over the rounds (least–most)\n\n${ratios(all)}`);
