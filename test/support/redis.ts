/** A real Redis, or Valkey, on a free port and with nothing in it. */
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";
import process from "node:process";
import { Redis } from "ioredis";
import { until } from "./client.ts";
import { freePort } from "./gateway.ts";

const FOLDERS = [...(process.env.PATH ?? "").split(delimiter), "/usr/bin", "/usr/local/bin"];
const PROGRAMS = ["redis-server", "valkey-server"].flatMap((name) =>
  FOLDERS.map((folder) => join(folder, name)),
);

export interface RedisServer {
  url: string;
  /** Names of all keys. */
  keys: () => Promise<string[]>;
  /** As `kill -STOP` and `kill -CONT`. */
  freeze(): void;
  thaw(): void;
  stop(): Promise<void>;
}

/** Null where there is none on this machine. */
export async function startRedis(): Promise<RedisServer | null> {
  const program = PROGRAMS.find((path) => existsSync(path));
  if (program === undefined) return null;
  const port = await freePort();
  const args = ["--port", String(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
  const child = spawn(program, args, { stdio: "ignore" });
  const gone = new Promise((resolve) => child.once("exit", resolve));
  // Not `child.kill`: on Deno that works once.
  const signal = (name: NodeJS.Signals) => void process.kill(child.pid ?? 0, name);
  const end = () => signal("SIGKILL");
  process.on("exit", end);
  const url = `redis://127.0.0.1:${port}`;
  const client = new Redis(url, { retryStrategy: () => 50, maxRetriesPerRequest: null });
  client.on("error", () => {});
  if (!(await until(() => client.status === "ready"))) {
    client.disconnect();
    end();
    throw new Error(`${program} did not start`);
  }
  return {
    url,
    keys: () => client.keys("*"),
    freeze: () => signal("SIGSTOP"),
    thaw: () => signal("SIGCONT"),
    async stop() {
      process.off("exit", end);
      client.disconnect();
      end();
      await gone;
    },
  };
}
