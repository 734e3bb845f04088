/** The real gateway as a process, on the runtime that runs the test. */
import type { ChildProcess } from "node:child_process";
import { spawn } from "node:child_process";
import { mkdtemp, readFile, rename, rm, writeFile } from "node:fs/promises";
import net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { PATIENCE_MS, until } from "./client.ts";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const SERVER = join(ROOT, "src/server.ts");
/** Loaded before the gateway, collects garbage all the time: see {@link GatewayOptions.preload}. */
export const GC_PRELOAD = fileURLToPath(new URL("./gc.ts", import.meta.url));

const START_MS = 30_000;
const STOP_MS = 20_000;
const PAGE_BYTES = 4096;

export const runtime: "bun" | "deno" = process.versions.bun === undefined ? "deno" : "bun";

/** A test run that dies takes its gateways along. */
const running = new Set<ChildProcess>();
process.on("exit", () => {
  for (const child of running) child.kill("SIGKILL");
});

export type LogRecord = Record<string, unknown>;

export interface GatewayOptions {
  /** Written as JSON and passed by `--config`; `server.port` is 0 unless it names one. */
  config?: object;
  /** Further arguments, after `--config`. */
  args?: string[];
  /** `undefined` unsets a variable. */
  env?: Record<string, string | undefined>;
  /** A module that runs before the gateway's own. */
  preload?: string;
  /** Arguments of the runtime itself, before the script. */
  runtimeArgs?: string[];
  /** It is to end by itself: resolves at its exit, waits for no port. */
  expectExit?: boolean;
  /** Resolve when the banner is there, without waiting for `/ready`. */
  skipReady?: boolean;
}

export interface Gateway {
  url: string;
  port: number;
  pid: number;
  stdout(): string;
  stderr(): string;
  /** Lines of the log with `msg: "request"`. */
  records(): LogRecord[];
  /** Waits for the record of a request id, or the first that fits. */
  record(wanted: string | ((record: LogRecord) => boolean), ms?: number): Promise<LogRecord>;
  metrics(): Promise<string>;
  /** The sum of the samples whose labels fit; 0 where there is none. */
  metric(name: string, labels?: Record<string, string>): Promise<number>;
  residentBytes(): Promise<number>;
  /** Puts another configuration in the place of its file, at once; it is for the test to have it read. */
  writeConfig(config: object): Promise<void>;
  /** Leaves what the gateway writes unread from now on, as a pipe does whose reader has ended. */
  closeOutput(): void;
  kill(signal: NodeJS.Signals): void;
  exited: Promise<number>;
  /** Resolves with the exit code; where that takes too long the process is killed and the code is -1. */
  stop(signal?: NodeJS.Signals): Promise<number>;
}

export async function startGateway(options: GatewayOptions = {}): Promise<Gateway> {
  const folder = await mkdtemp(join(tmpdir(), "tidegate-test-"));
  const args = [...(options.args ?? [])];
  const file = join(folder, "gateway.config.json");
  if (options.config !== undefined) {
    await writeConfig(file, options.config);
    args.unshift("--config", file);
  }
  const child = spawn(process.execPath, [...runtimeArgs(options), SERVER, ...args], {
    cwd: ROOT,
    env: environment(options.env ?? {}),
    stdio: ["ignore", "pipe", "pipe"],
  });
  running.add(child);
  let stdout = "";
  let stderr = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => (stdout += text));
  child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  const exited = new Promise<number>((resolve) => {
    child.once("close", (code) => {
      running.delete(child);
      // A killed process has no code of its own.
      resolve(code ?? -1);
      void rm(folder, { recursive: true, force: true });
    });
  });
  const gateway = faceOf(
    child,
    file,
    exited,
    () => stdout,
    () => stderr,
  );
  if (options.expectExit === true) {
    const code = await Promise.race([exited, timeout(START_MS)]);
    if (code !== null) return gateway;
    child.kill("SIGKILL");
    throw new Error(`The gateway was expected to end by itself:\n${stderr}`);
  }
  let isOver = false;
  void exited.then(() => (isOver = true));
  const port = (): number =>
    Number(/http:\/\/(?:127\.0\.0\.1|0\.0\.0\.0|localhost):(\d+)/.exec(stderr)?.[1] ?? 0);
  await until(() => port() !== 0 || isOver, START_MS);
  const isUp = port() !== 0 && !isOver;
  gateway.port = port();
  gateway.url = `http://127.0.0.1:${gateway.port}`;
  const isReady =
    isUp && (options.skipReady === true || (await until(() => answersReady(gateway), START_MS)));
  if (isReady) return gateway;
  child.kill("SIGKILL");
  throw new Error(
    `The gateway did not become ready (${isUp ? "/ready" : "no banner"}):\n${stderr}${stdout}`,
  );
}

async function writeConfig(file: string, config: object): Promise<void> {
  const { server = {} } = config as { server?: object };
  await writeFile(`${file}.new`, JSON.stringify({ ...config, server: { port: 0, ...server } }));
  await rename(`${file}.new`, file);
}

/** One that nobody listens on just now. */
export async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

function runtimeArgs({ preload, runtimeArgs: own = [] }: GatewayOptions): string[] {
  const preloads = preload === undefined ? [] : ["--preload", preload];
  if (runtime === "bun") return [...preloads, ...own];
  const gc = preload === GC_PRELOAD ? ["--v8-flags=--expose-gc"] : [];
  return ["run", "-A", "--no-check", ...gc, ...preloads, ...own];
}

/** Nothing that this machine happens to set may reach the gateway. */
function environment(changes: Record<string, string | undefined>): Record<string, string> {
  const inherited = Object.entries(process.env).filter(
    ([name]) => !/^(TIDEGATE_|OTEL_|PORT$|REDIS_URL$|NODE_ENV$|FORCE_COLOR$)/.test(name),
  );
  const merged = {
    ...Object.fromEntries(inherited),
    BUN_CONFIG_MAX_HTTP_REQUESTS: "16384",
    ...changes,
  };
  return Object.fromEntries(
    Object.entries(merged).filter((entry): entry is [string, string] => entry[1] !== undefined),
  );
}

async function answersReady({ url }: Gateway): Promise<boolean> {
  try {
    const response = await fetch(`${url}/ready`);
    await response.text();
    return response.status === 200;
  } catch {
    return false;
  }
}

function timeout(ms: number): Promise<null> {
  return new Promise((resolve) => void setTimeout(resolve, ms, null).unref());
}

function faceOf(
  child: ChildProcess,
  file: string,
  exited: Promise<number>,
  stdout: () => string,
  stderr: () => string,
): Gateway {
  // Asked again and again while the log grows: each line is read once.
  const known: LogRecord[] = [];
  let readTo = 0;
  const records = (): LogRecord[] => {
    const end = stdout().lastIndexOf("\n") + 1;
    for (const line of stdout().slice(readTo, end).split("\n")) {
      const record = line.startsWith("{") ? parseLine(line) : null;
      if (record?.msg === "request") known.push(record);
    }
    readTo = end;
    return [...known];
  };
  const gateway: Gateway = {
    url: "",
    port: 0,
    pid: child.pid ?? 0,
    stdout,
    stderr,
    records,
    async record(wanted, ms = PATIENCE_MS) {
      const fits =
        typeof wanted === "string"
          ? (record: LogRecord): boolean => record.request_id === wanted
          : wanted;
      await until(() => records().some(fits), ms);
      const found = records().find(fits);
      if (found !== undefined) return found;
      throw new Error(`No such record within ${ms} ms:\n${stdout().slice(-4000)}`);
    },
    async metrics() {
      const response = await fetch(`${gateway.url}/metrics`);
      return response.text();
    },
    metric: async (name, labels = {}) => sumOf(await gateway.metrics(), name, labels),
    async residentBytes() {
      const statm = await readFile(`/proc/${gateway.pid}/statm`, "utf8");
      return Number(statm.split(" ")[1]) * PAGE_BYTES;
    },
    writeConfig: (config) => writeConfig(file, config),
    closeOutput() {
      child.stdout?.destroy();
      child.stderr?.destroy();
    },
    kill: (signal) => send(child, signal),
    exited,
    async stop(signal = "SIGTERM") {
      send(child, signal);
      const code = await Promise.race([exited, timeout(STOP_MS)]);
      if (code !== null) return code;
      child.kill("SIGKILL");
      await exited;
      return -1;
    },
  };
  return gateway;
}

/** Not `child.kill`: on Deno that makes a child that exits by itself count as killed, and works once. */
function send(child: ChildProcess, signal: NodeJS.Signals): void {
  try {
    if (child.pid !== undefined) process.kill(child.pid, signal);
  } catch {
    // It is gone already.
  }
}

/** The last line may still be on its way. */
function parseLine(line: string): LogRecord | null {
  try {
    return JSON.parse(line) as LogRecord;
  } catch {
    return null;
  }
}

export function sumOf(text: string, name: string, labels: Record<string, string> = {}): number {
  let sum = 0;
  for (const line of text.split("\n")) {
    const match = /^([\w:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (match === null || match[1] !== name) continue;
    const fits = Object.entries(labels).every(([key, value]) =>
      (match[2] ?? "").includes(`${key}="${value}"`),
    );
    if (fits) sum += Number(match[3]);
  }
  return sum;
}
