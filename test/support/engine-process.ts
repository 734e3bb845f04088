/**
 * A fake engine in a process of its own, which can be killed and frozen. As a script it starts the engine
 * that its argument describes (JSON of `EngineOptions`) and prints its port.
 */
import { spawn } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";
import type { EngineOptions } from "./engine.ts";
import { startEngine } from "./engine.ts";

export interface EngineProcess {
  pid: number;
  port: number;
  url: string;
  kill(signal: NodeJS.Signals): void;
}

const SCRIPT = fileURLToPath(import.meta.url);

export async function startEngineProcess(options: EngineOptions): Promise<EngineProcess> {
  const isBun = process.versions.bun !== undefined;
  const args = isBun ? [SCRIPT] : ["run", "-A", "--no-check", SCRIPT];
  const child = spawn(process.execPath, [...args, JSON.stringify(options)], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const port = await new Promise<number>((resolve, reject) => {
    child.stdout.setEncoding("utf8").once("data", (text: string) => resolve(Number(text)));
    child.once("exit", () => reject(new Error("the engine's process ended")));
  });
  const pid = child.pid ?? 0;
  process.on("exit", () => child.kill("SIGKILL"));
  return {
    pid,
    port,
    url: `http://127.0.0.1:${port}`,
    kill: (signal) => void process.kill(pid, signal),
  };
}

if (process.argv[1] === SCRIPT) {
  const engine = await startEngine(JSON.parse(process.argv[2] ?? "{}") as EngineOptions);
  process.stdout.write(`${engine.port}\n`);
}
