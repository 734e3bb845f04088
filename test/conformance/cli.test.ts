/** The command line beside the gateway: `tidegate key create`. The real process. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { join } from "node:path";
import process from "node:process";
import { describe, it } from "node:test";
import { fileURLToPath } from "node:url";
import manifest from "../../package.json" with { type: "json" };
import { schema } from "../../src/config.ts";
import { send } from "../support/client.ts";
import { runtime, startGateway } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };
const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const KEY = /^tg_[\w-]{43}$/;

interface Run {
  code: number | null;
  out: string;
  err: string;
}

/** By the path that `bin` of the package has. */
function tidegate(...args: string[]): Promise<Run> {
  const script = join(ROOT, manifest.bin.tidegate);
  const own = runtime === "bun" ? [] : ["run", "-A", "--no-check"];
  const child = spawn(process.execPath, [...own, script, ...args], { cwd: "/" });
  const run: Run = { code: null, out: "", err: "" };
  child.stdout.setEncoding("utf8").on("data", (text: string) => (run.out += text));
  child.stderr.setEncoding("utf8").on("data", (text: string) => (run.err += text));
  return new Promise((resolve) => {
    child.once("close", (code) => resolve({ ...run, code }));
  });
}

const hashOf = (key: string): string => `sha256:${createHash("sha256").update(key).digest("hex")}`;

describe("tidegate key create", () => {
  it("prints a key alone, and beside it the line for the configuration", TIMEOUT, async () => {
    const { code, out, err } = await tidegate("key", "create");
    const key = out.trimEnd();
    assert.deepEqual([code, out], [0, `${key}\n`]);
    assert.match(key, KEY);
    assert(err.includes(`{ hash: "${hashOf(key)}", tenant: "default" }`), err);
    assert(err.includes("auth.keys") && err.includes("curl "), err);
    assert(!err.includes(key), "once");
    assert(!err.includes("listed"), "the default tenant need not be");
  });

  it("prints the same to programs", TIMEOUT, async () => {
    const { code, out, err } = await tidegate("key", "create", "--json", "--tenant", "night-shift");
    const made = JSON.parse(out) as Record<string, string>;
    assert.deepEqual([code, err, Object.keys(made)], [0, "", ["key", "hash", "tenant"]]);
    assert.match(made["key"] ?? "", KEY);
    assert.deepEqual([made["hash"], made["tenant"]], [hashOf(made["key"] ?? ""), "night-shift"]);
  });

  it("makes another one each time", TIMEOUT, async () => {
    const runs = await Promise.all([tidegate("key", "create"), tidegate("key", "create")]);
    assert.equal(new Set(runs.map(({ out }) => out)).size, 2);
  });

  it("makes what the gateway takes, for that tenant", TIMEOUT, async () => {
    const { out, err } = await tidegate("key", "create", "--tenant=night-shift");
    assert.match(err, /night-shift has to be listed in tenants/);
    const [, hash = ""] = /hash: "([^"]+)"/.exec(err) ?? [];
    const config = {
      backends: [{ id: "demo", kind: "demo" }],
      tenants: { "night-shift": { models: ["no-such"] } },
      auth: { keys: [{ hash, tenant: "night-shift" }] },
    };
    schema.parse(config);
    const gateway = await startGateway({ config });
    try {
      const list = (key: string) =>
        send(`${gateway.url}/v1/models`, undefined, { headers: { "x-api-key": key } });
      const answer = await list(out.trimEnd());
      assert.deepEqual([answer.status, answer.json()["data"]], [200, []]);
      assert.equal((await list(`${out.trimEnd()}x`)).status, 401);
    } finally {
      await gateway.stop();
    }
  });
});

describe("tidegate", () => {
  it("says what it can do, and its version", TIMEOUT, async () => {
    for (const args of [["--help"], ["key", "create", "--help"]]) {
      const { code, out, err } = await tidegate(...args);
      assert.deepEqual([code, err], [0, ""]);
      for (const word of ["key create", "--tenant", "--json", "--version", "bun ", "deno "]) {
        assert(out.includes(word), word);
      }
      for (const line of out.split("\n")) assert(line.length <= 100, line);
    }
    assert.deepEqual(await tidegate("--version"), {
      code: 0,
      out: `${manifest.version}\n`,
      err: "",
    });
  });

  const wrong: [string[], RegExp][] = [
    [[], /a verb: key create$/m],
    [["key"], /unknown verb "key"; did you mean key create\?/],
    [["kee", "create"], /did you mean key create\?/],
    [["key", "create", "now"], /unknown verb "key create now"/],
    [["frobnicate"], /unknown verb "frobnicate"; there is key create/],
    [["constructor"], /unknown verb/],
    [["key", "create", "--tenent", "a"], /Unknown option '--tenent'; did you mean --tenant\?$/m],
    [["key", "create", "--tenant"], /--tenant/],
    [["key", "create", "--tenant", "night shift"], /--tenant: .*letters, digits/],
    [["key", "create", "--tenant="], /--tenant: /],
  ];
  for (const [args, words] of wrong) {
    it(`ends with 2 for ${JSON.stringify(args)}, and says why`, TIMEOUT, async () => {
      const { code, out, err } = await tidegate(...args);
      assert.deepEqual([code, out], [2, ""], err);
      assert.match(err, words);
      assert.match(err, /^tidegate: [^\n]+\nTry --help\.\n$/, "one sentence, no stack");
    });
  }
});
