// CPU per request and per streamed chunk: the gateway beside a bare relay and nginx, interleaved.
// `bun bench/run.ts [--rounds N] [--quick] [--deno]`, or `--profile stream|request [--deno]`.
// How to read the table: bench/README.md.
import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { cpus, loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import type { DriverReport } from "./driver.ts";
import { cpuTime, residentMiB, threadTimes } from "./meter.ts";
import { printProfile, readProfile } from "./profile.ts";
import {
  Missing,
  pause,
  startGateway,
  startNginx,
  startRelay,
  stopChild,
  type Subject,
  url,
  type Workplace,
} from "./subjects.ts";

type Measure = "request" | "stream";

interface Sample {
  round: number;
  subject: string;
  measure: Measure;
  /** Requests, or events delivered. */
  units: number;
  userMs: number;
  systemMs: number;
  microsPerUnit: number;
  readsPerUnit: number;
  wallMs: number;
}

interface Load {
  requests: number;
  atOnce: number;
  streams: number;
  chunks: number;
}

const FULL: Load = { requests: 6000, atOnce: 8, streams: 20, chunks: 600 };
const PROFILED: Load = { requests: 20_000, atOnce: 8, streams: 20, chunks: 1500 };
const QUICK: Load = { requests: 1500, atOnce: 8, streams: 20, chunks: 100 };
/** After each run: what it left behind (spans to export, garbage) is charged to it. */
const REST_MS = 1300;
const MEASURES: readonly Measure[] = ["request", "stream"];
const TARGETS: Record<Measure, number> = { request: 6, stream: 1.8 };
const MAX_SUBJECTS = 4;

const { values: flags } = parseArgs({
  options: {
    rounds: { type: "string" },
    quick: { type: "boolean", default: false },
    deno: { type: "boolean", default: false },
    profile: { type: "string" },
  },
});

const children: ChildProcess[] = [];
const subjects: Subject[] = [];
const collector = { posts: 0, bytes: 0 };

/** Answers every export with 200, and counts them: tracing that is off would look cheap. */
function startCollector(): { url: string } {
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    async fetch(request) {
      collector.posts++;
      collector.bytes += (await request.arrayBuffer()).byteLength;
      return new Response(null, { status: 200 });
    },
  });
  return { url: url(server.port ?? 0) };
}

async function startEngine(): Promise<number[]> {
  const child = spawn(
    "bun",
    [join(import.meta.dirname, "engine.ts"), "--ports", String(MAX_SUBJECTS)],
    {
      stdio: ["ignore", "pipe", "inherit"],
    },
  );
  children.push(child);
  const [line] = await once(child.stdout, "data");
  const { ports }: { ports: number[] } = JSON.parse(String(line));
  return ports;
}

async function drive(subject: Subject, measure: Measure, load: Load): Promise<DriverReport> {
  const shape =
    measure === "request"
      ? ["--count", String(load.requests), "--at-once", String(load.atOnce)]
      : ["--at-once", String(load.streams), "--chunks", String(load.chunks)];
  const child = spawn(
    "bun",
    [
      join(import.meta.dirname, "driver.ts"),
      "--port",
      String(subject.port),
      "--mode",
      measure,
      ...shape,
    ],
    { stdio: ["ignore", "pipe", "inherit"] },
  );
  children.push(child);
  let output = "";
  child.stdout.on("data", (bytes) => (output += String(bytes)));
  await once(child, "close");
  children.splice(children.indexOf(child), 1);
  const report: DriverReport = JSON.parse(output);
  const wanted = measure === "request" ? load.requests : load.streams;
  if (report.complete !== wanted || report.failures.length > 0) {
    throw new Error(
      `${subject.name}: ${report.complete} of ${wanted} answers complete\n${report.failures.join("\n")}`,
    );
  }
  return report;
}

async function sample(
  subject: Subject,
  measure: Measure,
  load: Load,
  round: number,
): Promise<Sample> {
  const before = cpuTime(subject.pid);
  const report = await drive(subject, measure, load);
  await pause(REST_MS);
  const after = cpuTime(subject.pid);
  const units = measure === "request" ? report.complete : report.events;
  const userMs = after.userMs - before.userMs;
  const systemMs = after.systemMs - before.systemMs;
  return {
    round,
    subject: subject.name,
    measure,
    units,
    userMs,
    systemMs,
    microsPerUnit: (1000 * (userMs + systemMs)) / units,
    readsPerUnit: report.reads / units,
    wallMs: report.wallMs,
  };
}

async function measureAll(rounds: number, load: Load): Promise<Sample[]> {
  const samples: Sample[] = [];
  // Round 0 warms up and does not count.
  for (let round = 0; round <= rounds; round++) {
    for (const measure of MEASURES) {
      for (const subject of shuffled(subjects)) {
        const taken = await sample(subject, measure, load, round);
        if (round > 0) samples.push(taken);
      }
    }
    console.error(`round ${round} of ${rounds} done, load ${loadavg()[0]?.toFixed(1)}`);
  }
  return samples;
}

function shuffled<T>(items: readonly T[]): T[] {
  return items
    .map((item) => ({ item, order: Math.random() }))
    .sort((a, b) => a.order - b.order)
    .map(({ item }) => item);
}

interface Spread {
  median: number;
  min: number;
  max: number;
}

function spread(numbers: readonly number[]): Spread | undefined {
  const sorted = [...numbers].sort((a, b) => a - b);
  const [min, max] = [sorted[0], sorted.at(-1)];
  const low = sorted[Math.floor((sorted.length - 1) / 2)];
  const high = sorted[Math.ceil((sorted.length - 1) / 2)];
  if (min === undefined || max === undefined || low === undefined || high === undefined)
    return undefined;
  return { median: (low + high) / 2, min, max };
}

/** Subject over reference, round by round: what the machine did to a round, it did to both. */
function ratio(
  samples: readonly Sample[],
  measure: Measure,
  subject: string,
  reference: string,
): Spread | undefined {
  const of = (name: string): Sample[] =>
    samples.filter((taken) => taken.subject === name && taken.measure === measure);
  const references = new Map(of(reference).map((taken) => [taken.round, taken.microsPerUnit]));
  return spread(
    of(subject).flatMap(({ round, microsPerUnit }) => {
      const base = references.get(round);
      return base === undefined || base === 0 ? [] : [microsPerUnit / base];
    }),
  );
}

function table(samples: readonly Sample[]): string {
  const rows = subjects.map((subject) => {
    const cells = MEASURES.flatMap((measure) => {
      const own = samples.filter(
        (taken) => taken.subject === subject.name && taken.measure === measure,
      );
      return [
        spread(own.map(({ microsPerUnit }) => microsPerUnit))?.median.toFixed(0) ?? "–",
        cell(ratio(samples, measure, subject.name, "nginx")),
        cell(ratio(samples, measure, subject.name, "bare relay")),
      ];
    });
    return `| ${[subject.name, ...cells, residentMiB(subject.pid).toFixed(0)].join(" | ")} |`;
  });
  return [
    "| | CPU µs / request | × nginx | × relay | CPU µs / chunk | × nginx | × relay | RSS after, MiB |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ...rows,
  ].join("\n");
}

function cell(value: Spread | undefined): string {
  if (value === undefined) return "–";
  return `${value.median.toFixed(2)} (${value.min.toFixed(2)}–${value.max.toFixed(2)})`;
}

function verdicts(samples: readonly Sample[]): string[] {
  return MEASURES.flatMap((measure) => {
    const seen = ratio(samples, measure, "gateway (Bun)", "nginx");
    if (seen === undefined) return [];
    const word = seen.median <= TARGETS[measure] ? "met" : "missed";
    const unit = measure === "request" ? "request" : "chunk";
    return [
      `target per ${unit}: at most ${TARGETS[measure]} × nginx: ${word} (${seen.median.toFixed(2)})`,
    ];
  });
}

/** The gateway's own count of requests: metrics that are off would look cheap. */
async function countedRequests(gateway: Subject): Promise<number> {
  const text = await (await fetch(`${url(gateway.port)}/metrics`)).text();
  const counts = text.matchAll(/^tidegate_requests_total\{[^}]*\} (\S+)/gm);
  return [...counts].reduce((sum, [, count]) => sum + Number(count), 0);
}

async function bench(workplace: Workplace, enginePorts: readonly number[]): Promise<void> {
  const load = flags.quick ? QUICK : FULL;
  const rounds = Number(flags.rounds ?? (flags.quick ? 2 : 7));
  if (!Number.isInteger(rounds) || rounds < 1) throw new Error("--rounds takes a number from 1 up");
  const starters = [
    ["nginx", startNginx],
    ["bare relay", startRelay],
    ["gateway (Bun)", startGateway.bind(undefined, "bun")],
    ...(flags.deno ? ([["gateway (Deno)", startGateway.bind(undefined, "deno")]] as const) : []),
  ] as const;
  for (const [index, [name, starter]] of starters.entries()) {
    try {
      subjects.push(await starter(enginePorts[index] ?? 0, workplace));
    } catch (error) {
      if (!(error instanceof Missing)) throw error;
      console.log(`skipped: ${name}: ${error.message}`);
    }
  }
  const samples = await measureAll(rounds, load);
  const gateways = subjects.filter(({ name }) => name.startsWith("gateway"));
  const counted = await Promise.all(gateways.map(countedRequests));
  const sent = (rounds + 1) * (load.requests + load.streams) + 1;
  console.log(`\n${table(samples)}\n`);
  console.log(
    `${rounds} rounds and one to warm up; per round ${load.requests} requests, ${load.atOnce} at once, and ` +
      `${load.streams} streams of ${load.chunks} chunks; ratios: median over rounds (min–max)`,
  );
  console.log(
    `collector: ${collector.posts} exports, ${collector.bytes} bytes; ` +
      gateways
        .map(({ name }, index) => `${name} counted ${counted[index]} of ${sent} requests`)
        .join("; "),
  );
  for (const line of verdicts(samples)) console.log(line);
  const results = join(import.meta.dirname, "results");
  mkdirSync(results, { recursive: true });
  const file = join(results, `${new Date().toISOString().replaceAll(":", "-")}.json`);
  const machine = {
    cpu: cpus()[0]?.model,
    cores: cpus().length,
    load: loadavg(),
    bun: Bun.version,
  };
  const memory = Object.fromEntries(subjects.map(({ name, pid }) => [name, residentMiB(pid)]));
  writeFileSync(
    file,
    JSON.stringify({ machine, load, rounds, memory, collector, counted, sent, samples }, null, 1),
  );
  console.log(`samples: ${file}`);
}

async function profile(
  workplace: Workplace,
  enginePorts: readonly number[],
  measure: Measure,
): Promise<void> {
  const folder = join(workplace.folder, "profile");
  const profiler = ["--cpu-prof", `--cpu-prof-dir=${folder}`, "--cpu-prof-interval=500"];
  const runtime = flags.deno ? "deno" : "bun";
  const gateway = await startGateway(runtime, enginePorts[0] ?? 0, workplace, profiler);
  subjects.push(gateway);
  const warmUp = await sample(gateway, measure, FULL, 0);
  const before = threadTimes(gateway.pid);
  const { units, userMs, systemMs } = await sample(gateway, measure, PROFILED, 1);
  const threads = [...threadTimes(gateway.pid)]
    .map(([name, ms]) => ({ name, micros: (1000 * (ms - (before.get(name) ?? 0))) / units }))
    .sort((a, b) => b.micros - a.micros);
  await gateway.stop();
  console.log(
    `${measure}: ${warmUp.units} units to warm up, then ${units}: user ${userMs} ms, system ${systemMs} ms`,
  );
  console.log("(the profiler's own cost is in these figures)\n\nCPU µs per unit by thread");
  for (const { name, micros } of threads)
    if (micros >= 0.1) console.log(`${micros.toFixed(1).padStart(6)}  ${name}`);
  console.log();
  console.log(printProfile(readProfile(folder)));
}

async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "tidegate-bench-"));
  try {
    const workplace = { folder, collectorUrl: startCollector().url };
    const enginePorts = await startEngine();
    if (flags.profile === undefined) await bench(workplace, enginePorts);
    else if (flags.profile === "stream" || flags.profile === "request") {
      await profile(workplace, enginePorts, flags.profile);
    } else throw new Error("--profile takes stream or request");
  } finally {
    await cleanUp();
    rmSync(folder, { recursive: true, force: true });
  }
}

async function cleanUp(): Promise<void> {
  await Promise.all([...subjects.map((subject) => subject.stop()), ...children.map(stopChild)]);
}

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  process.once(signal, () => void cleanUp().finally(() => process.exit(1)));
}
try {
  await main();
  process.exit(0);
} catch (error) {
  console.error(error instanceof Error ? error.message : error);
  process.exit(1);
}
