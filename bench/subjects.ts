// What is measured: each subject is a real process of its own on a loopback port, in front of its
// own port of the engine.
import { spawn, type ChildProcess } from "node:child_process";
import { existsSync, mkdirSync, openSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { MODEL } from "./engine.ts";

export interface Subject {
  name: string;
  pid: number;
  port: number;
  stop(): Promise<void>;
}

export interface Workplace {
  /** Holds every file the bench writes but its results. */
  folder: string;
  collectorUrl: string;
}

/** Not there on this machine: the run goes on without it. */
export class Missing extends Error {}

const ROOT = join(import.meta.dirname, "..");
const NGINX = "/usr/sbin/nginx";
const START_LIMIT_MS = 20_000;

export type GatewayRuntime = "bun" | "deno";

/** Everything on: metrics, one log line per request (to /dev/null), one trace in ten. */
export async function startGateway(
  runtime: GatewayRuntime,
  enginePort: number,
  workplace: Workplace,
  runtimeFlags: readonly string[] = [],
): Promise<Subject> {
  const port = freePort();
  const config = join(workplace.folder, `gateway-${runtime}.json`);
  writeFileSync(
    config,
    JSON.stringify({
      server: { host: "127.0.0.1", port },
      backends: [{ id: "engine", kind: "openai", url: url(enginePort), concurrency: 1000 }],
      metrics: { enabled: true },
      telemetry: { otlpEndpoint: workplace.collectorUrl, sampling: 0.1 },
    }),
  );
  const command =
    runtime === "bun" ? ["bun", ...runtimeFlags] : ["deno", "run", "-A", ...runtimeFlags];
  return start({
    name: `gateway (${runtime === "bun" ? "Bun" : "Deno"})`,
    command: [...command, "src/server.ts", "--config", config],
    port,
    folder: workplace.folder,
  });
}

export async function startRelay(enginePort: number, workplace: Workplace): Promise<Subject> {
  const port = freePort();
  return start({
    name: "bare relay",
    command: ["bun", "bench/relay.ts", "--upstream", url(enginePort), "--port", String(port)],
    port,
    folder: workplace.folder,
  });
}

export async function startNginx(enginePort: number, workplace: Workplace): Promise<Subject> {
  if (!existsSync(NGINX)) throw new Missing(`${NGINX} is not installed`);
  const port = freePort();
  const folder = join(workplace.folder, "nginx");
  mkdirSync(folder);
  const config = join(folder, "nginx.conf");
  writeFileSync(config, nginxConfig(port, enginePort, folder));
  return start({
    name: "nginx",
    command: [NGINX, "-p", folder, "-c", config],
    port,
    folder: workplace.folder,
  });
}

function nginxConfig(port: number, enginePort: number, folder: string): string {
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    .map((kind) => `${kind}_temp_path ${folder}/${kind};`)
    .join("\n  ");
  return `${process.getuid?.() === 0 ? "user root;" : ""}
daemon off;
worker_processes 1;
pid ${folder}/nginx.pid;
error_log stderr warn;
events { worker_connections 4096; }
http {
  access_log off;
  ${temporary}
  keepalive_requests 1000000000;
  server {
    listen 127.0.0.1:${port};
    location / {
      proxy_pass ${url(enginePort)};
      proxy_http_version 1.1;
      proxy_set_header Connection close;
      proxy_buffering off;
    }
  }
}
`;
}

interface Start {
  name: string;
  command: readonly string[];
  port: number;
  folder: string;
}

async function start({ name, command, port, folder }: Start): Promise<Subject> {
  const [program = "", ...args] = command;
  const complaints = join(folder, `${name.replaceAll(/\W+/g, "-")}.stderr`);
  const child = spawn(program, args, {
    cwd: ROOT,
    env: {
      PATH: process.env.PATH,
      HOME: process.env.HOME,
      // Bun's fetch stops at 256 requests at once unless told otherwise at start.
      BUN_CONFIG_MAX_HTTP_REQUESTS: "16384",
      // Spans leave within a run's rest, so that exporting them is charged to that run.
      OTEL_BSP_SCHEDULE_DELAY: "1000",
    },
    stdio: ["ignore", openSync("/dev/null", "w"), openSync(complaints, "w")],
  });
  const stop = (): Promise<void> => stopChild(child);
  try {
    await answers(port, child);
  } catch (error) {
    await stop();
    const said = existsSync(complaints) ? readFileSync(complaints, "utf8").trim().slice(-1500) : "";
    throw new Error(`${name} did not start: ${String(error)}\n${said}`, { cause: error });
  }
  return { name, pid: child.pid ?? 0, port, stop };
}

/** Resolves when a chat through the subject is answered. */
async function answers(port: number, child: ChildProcess): Promise<void> {
  let gone: string | undefined;
  let last: unknown = "no answer";
  child.once("error", (error) => (gone = String(error)));
  child.once("exit", (code, signal) => (gone = `exited with ${signal ?? code}`));
  for (const deadline = Date.now() + START_LIMIT_MS; Date.now() < deadline; await pause(100)) {
    if (gone !== undefined) throw new Error(gone);
    try {
      const answer = await fetch(`${url(port)}/v1/chat/completions`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: MODEL, messages: [{ role: "user", content: "ready?" }] }),
      });
      const text = await answer.text();
      if (answer.ok) return;
      last = `${answer.status} ${text.slice(0, 300)}`;
    } catch (error) {
      last = error;
    }
  }
  throw new Error(`not ready after ${START_LIMIT_MS} ms: ${String(last)}`);
}

/** Asks it to go, waits 5 s, and ends it by its pid. */
export async function stopChild(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return;
  const { promise, resolve } = Promise.withResolvers<void>();
  child.once("exit", () => resolve());
  child.kill("SIGTERM");
  const timer = setTimeout(() => child.kill("SIGKILL"), 5000);
  await promise;
  clearTimeout(timer);
}

export function url(port: number): string {
  return `http://127.0.0.1:${port}`;
}

export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Free a moment ago; everything else on this machine asks for port 0 too. */
function freePort(): number {
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const { port } = listener;
  listener.stop(true);
  return port;
}
