/** A request log, played again. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, describe, it } from "node:test";
import { newRecord, type RequestRecord } from "../../src/telemetry/record.ts";
import { runtime } from "../support/gateway.ts";
import { compare } from "./compare.ts";
import type { Measured } from "./measure.ts";
import { readLog } from "./replay.ts";

const HINTS = { fits: 1, slots: 1, loadMs: null };
const FROM = Date.parse("2026-01-01T12:00:00Z");
const TIMEOUT = { timeout: 20_000 };

/** A line as the gateway writes it. @param at when the request ended, seconds. */
function line(at: number, record: Partial<RequestRecord>): string {
  const time = new Date(FROM + at * 1000).toISOString();
  const whole: RequestRecord = {
    ...newRecord("r", "chat"),
    model: "a",
    tenant: "team",
    stream: true,
    ending: "completed",
    status: 200,
    ttft: 500,
    latency_ms: 2500,
    tokens_input: 500,
    tokens_generated: 100,
    ...record,
  };
  return JSON.stringify({ time, level: "info", msg: "request", ...whole });
}

/** Three models by turns, 21 requests within two seconds. */
const ALTERNATING = Array.from({ length: 21 }, (_, at) => {
  return line(10 + at / 10, { model: "abc".charAt(at % 3), load_ms: at < 3 ? 3000 : 0 });
});

describe("a replayed log", () => {
  it("asks the same of the same at the same times, on a machine as fast as the log's", () => {
    const { scenario, notes } = readLog(ALTERNATING.join("\n"), HINTS);
    const [first, second] = scenario.clients(1);
    assert.equal(first?.first.at, 0);
    assert.equal(second?.first.at, 100);
    const { model, flow, answerTokens } = second?.first.request ?? {};
    assert.deepEqual([model, flow, answerTokens], ["b", "team", 100]);
    assert.equal(scenario.machine.type, "box");
    if (scenario.machine.type !== "box") return;
    const { speed, loadMs } = scenario.machine.box;
    // 500 ms for 500 tokens, then 2 s for 100.
    assert.deepEqual([speed.promptMs, speed.tokenMs, loadMs], [1, 20, 3000]);
    assert(notes.every((note) => note.includes("from the log")));
  });

  it("shows what the order of service was worth", () => {
    const { scenario } = readLog(ALTERNATING.join("\n"), HINTS);
    const { direct, ours } = compare(scenario, 1) as { direct: Measured; ours: Measured };
    assert.equal(ours.served, 21);
    assert.equal(ours.loads, 3);
    assert(direct.loads > 10, `${direct.loads} loads`);
  });

  it("leaves out what no engine did, and says so", () => {
    const log = [
      line(1, {}),
      line(2, { cache_hit: true, cache: "hit" }),
      line(3, { model: null, ending: "failed", status: 404 }),
      JSON.stringify({ time: "2026-01-01T12:00:00Z", msg: "model loaded" }),
      "npm notice",
      "",
    ];
    const { scenario, notes } = readLog(log.join("\n"), HINTS);
    assert.equal(scenario.clients(1).length, 1);
    for (const why of ["the cache", "without a model", "other log lines", "not JSON"]) {
      assert(
        notes.some((note) => note.startsWith("1 lines left out") && note.includes(why)),
        why,
      );
    }
  });

  it("gives those who left their patience, and an answer as long as others have", () => {
    const left = line(4, { ending: "cancelled", tokens_generated: 3, latency_ms: 700 });
    const refused = line(5, { ending: "failed", status: 429, tokens_generated: null });
    const { scenario } = readLog([line(1, {}), left, refused].join("\n"), HINTS);
    // In the order in which they were asked: the refused one before the one who left.
    const wishes = scenario.clients(1).map(({ first }) => first.request);
    assert.deepEqual(
      wishes.map(({ patienceMs, answerTokens }) => [patienceMs, answerTokens]),
      [
        [Infinity, 100],
        [Infinity, 100],
        [700, 100],
      ],
    );
  });

  it("says what is wrong with a log that has no request in it", () => {
    assert.throws(() => readLog("", HINTS), /it is empty/);
    assert.throws(() => readLog("hello\n", HINTS), /1 lines left out: not JSON/);
  });
});

interface Run {
  code: number | null;
  out: string;
  err: string;
}

function sim(...args: string[]): Promise<Run> {
  const script = join(import.meta.dirname, "sim.ts");
  const own = runtime === "bun" ? [] : ["run", "-A", "--no-check"];
  const child = spawn(process.execPath, [...own, script, ...args]);
  const run: Run = { code: null, out: "", err: "" };
  child.stdout.setEncoding("utf8").on("data", (text: string) => (run.out += text));
  child.stderr.setEncoding("utf8").on("data", (text: string) => (run.err += text));
  return new Promise((resolve) => {
    child.once("close", (code) => resolve({ ...run, code }));
  });
}

describe("bun run sim", () => {
  const folder = mkdtempSync(join(tmpdir(), "tidegate-sim-"));
  after(() => rmSync(folder, { recursive: true }));

  it("explains itself", TIMEOUT, async () => {
    const { code, out } = await sim("--help");
    assert.equal(code, 0);
    for (const word of ["--workload", "--seed", "--log", "--json", "burst", "Exit codes"]) {
      assert(out.includes(word), word);
    }
  });

  it("compares policies in a table or as JSON, the same for the same seed", TIMEOUT, async () => {
    const [table, json, again] = await Promise.all([
      sim("--workload", "burst"),
      sim("--workload", "burst", "--json", "--seed", "7"),
      sim("--workload", "burst", "--json", "--seed", "7"),
    ]);
    assert.equal(table.code, 0);
    assert.match(table.out, /^direct +60 +60 /m);
    assert.match(table.out, /^ours +60 +60 /m);
    const [result] = JSON.parse(json.out) as [{ seed: number; policies: { ours: Measured } }];
    assert.deepEqual([result.seed, result.policies.ours.loads], [7, 3]);
    assert.equal(json.out, again.out);
  });

  it("replays a log", TIMEOUT, async () => {
    const path = join(folder, "requests.jsonl");
    writeFileSync(path, ALTERNATING.join("\n"));
    const { code, out } = await sim("--log", path, "--load-ms", "1000");
    assert.equal(code, 0);
    assert(out.includes("21 requests of a log, 3 models"), out);
  });

  it(
    "ends with 1 for a log it cannot use, with 2 for what it does not understand",
    TIMEOUT,
    async () => {
      const cases: [args: string[], code: number, says: RegExp][] = [
        [["--log", join(folder, "absent")], 1, /absent.*no such file|ENOENT/i],
        [["--workload", "bursts"], 2, /did you mean burst\?/],
        [["--seed", "x"], 2, /--seed x: a whole number/],
        [["--sede", "1"], 2, /did you mean --seed\?/],
        [["--fits", "2"], 2, /--fits describes the machine of a --log/],
      ];
      for (const [args, code, says] of cases) {
        const run = await sim(...args);
        assert.equal(run.code, code, args.join(" "));
        assert.match(run.err, says);
        assert.equal(run.out, "");
      }
    },
  );
});
