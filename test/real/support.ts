/**
 * Real engines and a real Jaeger, as `install.sh` built them. Each starts on free loopback ports
 * with one thread; a test whose binary is not there says so and is skipped.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { accessSync } from "node:fs";
import { mkdtemp, rm, symlink } from "node:fs/promises";
import net from "node:net";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import OpenAI from "openai";
import type { Snapshot, Target } from "../../src/core/snapshot.ts";
import { until } from "../support/client.ts";

const CACHE = process.env.TIDEGATE_REAL_CACHE ?? join(homedir(), ".cache", "tidegate-workshop");

const NEEDS = {
  ollama: ["bin/ollama", "lib/ollama/llama-server", "ollama-models"],
  "ollama of three": ["bin/ollama", "lib/ollama/llama-server", "ollama-three"],
  "llama-server": ["lib/ollama/llama-server", "models/smol-a.gguf", "models/minilm-f16.gguf"],
  jaeger: ["bin/all-in-one"],
} as const;

type Name = keyof typeof NEEDS;

/** Why these cannot run here, printed once per call; false where all of them can. */
export function missing(...names: Name[]): string | false {
  for (const name of names) {
    const absent = NEEDS[name].find((file) => !isThere(join(CACHE, file)));
    if (absent === undefined) continue;
    const reason = `no ${absent} in ${CACHE}: run test/real/install.sh`;
    console.log(`skipped: ${name}: ${reason}`);
    return reason;
  }
  return false;
}

function isThere(path: string): boolean {
  try {
    accessSync(path);
    return true;
  } catch {
    return false;
  }
}

async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => net.createServer());
  const ports = await Promise.all(
    servers.map(
      (server) =>
        new Promise<number>((resolve) => {
          server.listen(0, "127.0.0.1", () => resolve((server.address() as net.AddressInfo).port));
        }),
    ),
  );
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
  return ports;
}

export function isFree(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = net.createServer();
    server.once("error", () => resolve(false));
    server.listen(port, "127.0.0.1", () => server.close(() => resolve(true)));
  });
}

export interface Service {
  url: string;
  port: number;
  /** What it has written so far. */
  output: () => string;
  kill: (signal: NodeJS.Signals) => void;
  stop: () => Promise<void>;
}

/** A test run that dies takes its engines along. */
const running = new Set<ChildProcess>();
process.on("exit", () => {
  for (const child of running) child.kill("SIGKILL");
});

async function start(
  file: string,
  args: string[],
  env: Record<string, string>,
  port: number,
  readyUrl: string,
): Promise<Service> {
  const child = spawn(join(CACHE, file), args, {
    env: { PATH: process.env.PATH ?? "", HOME: homedir(), ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  running.add(child);
  let output = "";
  child.stdout.on(
    "data",
    (bytes: Buffer) => (output = (output + bytes.toString()).slice(-4_000_000)),
  );
  child.stderr.on(
    "data",
    (bytes: Buffer) => (output = (output + bytes.toString()).slice(-4_000_000)),
  );
  let isOver = false;
  const exited = new Promise<void>((resolve) => {
    child.once("close", () => {
      isOver = true;
      running.delete(child);
      resolve();
    });
  });
  const stop = async (): Promise<void> => {
    if (!isOver) child.kill("SIGTERM");
    // llama-server may stay for half a minute after one SIGTERM: real-engines.md §5.2.
    const timer = setTimeout(() => child.kill("SIGKILL"), 3000);
    await exited;
    clearTimeout(timer);
  };
  if (!(await until(async () => isOver || (await isUp(readyUrl)), 30_000)) || isOver) {
    await stop();
    throw new Error(`${file} did not start:\n${output.slice(-8000)}`);
  }
  return {
    url: `http://127.0.0.1:${port}`,
    port,
    output: () => output,
    kill: (signal) => void child.kill(signal),
    stop,
  };
}

async function isUp(url: string): Promise<boolean> {
  try {
    const response = await fetch(url);
    await response.text();
    return response.ok;
  } catch {
    return false;
  }
}

/** Ollama with `smol-a`, `smol-b` and `minilm`, one request at a time, two models at once. */
export function startOllama(wantedPort?: number): Promise<Service> {
  return ollama("ollama-models", 2, wantedPort);
}

/** Ollama with `smol-a`, `smol-b` and `smol-c`, one request and one model at a time. */
export function startOllamaOfThree(): Promise<Service> {
  return ollama("ollama-three", 1);
}

async function ollama(store: string, modelsAtOnce: number, wantedPort?: number): Promise<Service> {
  const [free = 0] = await freePorts(1);
  const port = wantedPort ?? free;
  return start(
    "bin/ollama",
    ["serve"],
    {
      OLLAMA_HOST: `127.0.0.1:${port}`,
      OLLAMA_MODELS: join(CACHE, store),
      OLLAMA_NOPRUNE: "1",
      OLLAMA_NO_CLOUD: "1",
      OLLAMA_MAX_LOADED_MODELS: String(modelsAtOnce),
      OLLAMA_NUM_PARALLEL: "1",
      OLLAMA_CONTEXT_LENGTH: "2048",
    },
    port,
    `http://127.0.0.1:${port}/api/version`,
  );
}

/** llama.cpp with one model: `smol-a` with two slots, or MiniLM for embeddings. */
export async function startLlamaServer(
  model: "smol-a" | "minilm",
  ...more: string[]
): Promise<Service> {
  const own =
    model === "minilm"
      ? ["-m", join(CACHE, "models/minilm-f16.gguf"), "--embeddings"]
      : ["-m", join(CACHE, "models/smol-a.gguf"), "-c", "4096", "-np", "2"];
  return await llamaServer([...own, "--alias", model, ...more]);
}

/** llama.cpp as a router over `smol-a` and `smol-b`, with room for one of them. */
export async function startLlamaRouter(): Promise<Service> {
  const folder = await mkdtemp(join(tmpdir(), "tidegate-router-"));
  for (const file of ["smol-a.gguf", "smol-b.gguf"]) {
    await symlink(join(CACHE, "models", file), join(folder, file));
  }
  const room = ["--models-max", "1", "-c", "1024", "-np", "1"];
  const router = await llamaServer(["--models-dir", folder, ...room]);
  return {
    ...router,
    async stop() {
      await router.stop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

async function llamaServer(own: string[]): Promise<Service> {
  const [port = 0] = await freePorts(1);
  return start(
    "lib/ollama/llama-server",
    [...own, "--host", "127.0.0.1", "--port", String(port), "-t", "1"],
    {},
    port,
    `http://127.0.0.1:${port}/health`,
  );
}

/** What the gateway's snapshot says of a model on a backend. */
export interface Known extends Target {
  contextLength: number | null;
  capabilities: string[];
}

/** Every model of a backend as `GET /admin/api/snapshot` has it, by name. */
export async function knownOf(gatewayUrl: string, backend: string): Promise<Map<string, Known>> {
  const response = await fetch(`${gatewayUrl}/admin/api/snapshot`);
  const { models } = (await response.json()) as Snapshot;
  const known = new Map<string, Known>();
  for (const { name, contextLength, capabilities, targets } of models) {
    const target = targets.find((each) => each.backend === backend);
    if (target !== undefined) known.set(name, { ...target, contextLength, capabilities });
  }
  return known;
}

export interface Jaeger extends Service {
  otlpUrl: string;
}

/** Jaeger all-in-one; unless told otherwise it would bind eleven sockets on every interface. */
export async function startJaeger(): Promise<Jaeger> {
  const ports = await freePorts(11);
  const at = (index: number): string => `127.0.0.1:${ports[index]}`;
  const sockets = [
    "query.http-server.host-port",
    "collector.otlp.http.host-port",
    "admin.http.host-port",
    "collector.otlp.grpc.host-port",
    "query.grpc-server.host-port",
    "collector.http-server.host-port",
    "collector.grpc-server.host-port",
    "http-server.host-port",
    "processor.jaeger-binary.server-host-port",
    "processor.jaeger-compact.server-host-port",
    "processor.zipkin-compact.server-host-port",
  ];
  const service = await start(
    "bin/all-in-one",
    [
      "--memory.max-traces=1000",
      "--log-level=warn",
      "--collector.otlp.enabled=true",
      `--reporter.grpc.host-port=${at(6)}`,
      ...sockets.map((flag, index) => `--${flag}=${at(index)}`),
    ],
    {},
    ports[0] ?? 0,
    `http://${at(2)}/`,
  );
  return { ...service, otlpUrl: `http://${at(1)}` };
}

/** A prompt whose answer is long: a cap on its tokens is always reached. */
export const STORY = [{ role: "user" as const, content: "Write a very long story about the sea." }];

/** The official SDK, told nothing but the gateway's address. */
export function sdk(gatewayUrl: string): OpenAI {
  return new OpenAI({
    baseURL: `${gatewayUrl}/v1`,
    apiKey: "none",
    maxRetries: 0,
    timeout: 30_000,
  });
}

/** How alike two embeddings are: 1 for the same direction. */
export function cosine(one: number[], other: number[]): number {
  const dot = (a: number[], b: number[]): number =>
    a.reduce((sum, value, index) => sum + value * (b[index] ?? 0), 0);
  return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
}
