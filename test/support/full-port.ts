/** A port that takes no more connections: whoever calls stays in connecting, on loopback too. */
import { spawn } from "node:child_process";
import net from "node:net";
import process from "node:process";
import { sleep } from "./client.ts";

/** A listener that never accepts, for its only thread is asleep. */
const LISTENER = `
  const net = await import("node:net");
  const server = net.createServer(() => {});
  server.listen({ port: 0, host: "127.0.0.1", backlog: 1 }, () => {
    console.log(server.address().port);
    setTimeout(() => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0), 50);
  });
`;
/** Bun has a backlog of its own, of 512. */
const MOST_CALLERS = 2000;
const PATIENCE_MS = 200;

export interface FullPort {
  url: string;
  close(): void;
}

export async function startFullPort(): Promise<FullPort> {
  const evaluate = process.versions.bun === undefined ? "eval" : "-e";
  const child = spawn(process.execPath, [evaluate, LISTENER], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const port = await new Promise<number>((resolve) => {
    child.stdout.once("data", (text: Buffer) => resolve(Number(text.toString())));
  });
  await sleep(200);
  const callers: net.Socket[] = [];
  const close = (): void => {
    child.kill("SIGKILL");
    for (const caller of callers) caller.destroy();
  };
  while (callers.length < MOST_CALLERS) {
    const caller = net.connect(port, "127.0.0.1");
    caller.on("error", () => {});
    callers.push(caller);
    const isTaken = await new Promise<boolean>((resolve) => {
      caller.once("connect", () => resolve(true));
      setTimeout(resolve, PATIENCE_MS, false).unref();
    });
    if (!isTaken) return { url: `http://127.0.0.1:${port}`, close };
  }
  close();
  throw new Error("The backlog did not fill up");
}
