// What would another order of service have done with these requests? `bun run sim --help`.
import { readFileSync } from "node:fs";
import process from "node:process";
import { readArguments, usageError } from "../../src/arguments.ts";
import { suggest } from "../../src/core/suggest.ts";
import { compare } from "./compare.ts";
import { readLog, type MachineHints } from "./replay.ts";
import { SCENARIOS, type Scenario } from "./scenarios.ts";
import { LEGEND, tableOf } from "./table.ts";

const HELP = `bun run sim [options]

Plays workloads in virtual time against models of engines: directly, under other schedulers, and with the
gateway's own scheduler and choice of a backend, the very code that runs in production.

  --workload NAME   one of the workloads below; default: all
  --seed N          another workload of the same kind; default 1
  --log FILE        the requests of a request log instead, one JSON object per line (- reads standard input)
  --fits N          with --log: models in memory at once; default 1
  --slots N         with --log: requests per model at once; default 1
  --load-ms N       with --log: what a load takes; default: what the log shows
  --json            results as JSON
  --help            this

Workloads:
${Object.entries(SCENARIOS)
  .map(([name, { about }]) => `  ${name.padEnd(16)}  ${about}`)
  .join("\n")}

Exit codes: 0 done, 1 the log cannot be used, 2 a mistake on the command line. More: docs/simulator.md
`;

interface Run {
  scenario: Scenario;
  notes: string[];
}

function main(): void {
  const { values } = readArguments({
    options: {
      workload: { type: "string" },
      seed: { type: "string", default: "1" },
      log: { type: "string" },
      fits: { type: "string" },
      slots: { type: "string" },
      "load-ms": { type: "string" },
      json: { type: "boolean", default: false },
      help: { type: "boolean", default: false },
    },
  });
  if (values.help) {
    process.stdout.write(HELP);
    return;
  }
  const seed = wholeNumber("seed", values.seed, 0);
  const { workload, log } = values;
  const hints = {
    fits: wholeNumber("fits", values.fits ?? "1", 1),
    slots: wholeNumber("slots", values.slots ?? "1", 1),
    loadMs: values["load-ms"] === undefined ? null : wholeNumber("load-ms", values["load-ms"], 0),
  };
  if (log !== undefined && workload !== undefined)
    usageError("--log and --workload: give one of them");
  const hint = (["fits", "slots", "load-ms"] as const).find((name) => values[name] !== undefined);
  if (log === undefined && hint !== undefined)
    usageError(`--${hint} describes the machine of a --log`);
  const runs = log === undefined ? workloads(workload) : { [log]: replay(log, hints) };
  if (values.json) printJson(runs, seed);
  else printTables(runs, seed);
}

function wholeNumber(name: string, text: string, least: number): number {
  if (!/^\d{1,9}$/.test(text) || Number(text) < least) {
    usageError(`--${name} ${text}: a whole number from ${least} on`);
  }
  return Number(text);
}

function workloads(name = "all"): Record<string, Run> {
  const all = Object.entries(SCENARIOS).map(([each, scenario]): [string, Run] => {
    return [each, { scenario, notes: [] }];
  });
  const chosen = all.filter(([each]) => name === "all" || name === each);
  if (chosen.length > 0) return Object.fromEntries(chosen);
  const names = Object.keys(SCENARIOS);
  const meant = suggest(name, names);
  const help = meant === null ? `there are ${names.join(", ")}` : `did you mean ${meant}?`;
  usageError(`--workload ${name}: there is none of that name; ${help}`);
}

function replay(path: string, hints: MachineHints): Run {
  try {
    return readLog(readFileSync(path === "-" ? 0 : path, "utf8"), hints);
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    process.stderr.write(`tidegate: ${path}: ${said}\n`);
    process.exit(1);
  }
}

function printJson(runs: Record<string, Run>, seed: number) {
  const results = Object.entries(runs).map(([name, { scenario, notes }]) => {
    return {
      workload: name,
      seed,
      about: scenario.about,
      notes,
      policies: compare(scenario, seed),
    };
  });
  process.stdout.write(`${JSON.stringify(results, null, 2)}\n`);
}

function printTables(runs: Record<string, Run>, seed: number) {
  for (const [name, { scenario, notes }] of Object.entries(runs)) {
    const lines = notes.map((note) => `  ${note}\n`).join("");
    process.stdout.write(`${name} (seed ${seed}): ${scenario.about}\n${lines}`);
    process.stdout.write(`\n${tableOf(compare(scenario, seed))}\n\n`);
  }
  process.stdout.write(`${LEGEND}\n`);
}

// Whoever reads only the beginning (`| head`) is not to see an error.
process.stdout.on("error", () => {});
main();
