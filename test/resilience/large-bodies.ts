/**
 * Large bodies at a steady pace, from a process of their own: whoever writes five megabytes is held up by it,
 * and the clock of who measures must not be. As a script: port, bodies per second, milliseconds; it says
 * when it begins, and at the end what the bodies were answered.
 */
import { spawn } from "node:child_process";
import net from "node:net";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { chatBody, postBytes, sleep } from "../support/client.ts";

const MIB = 1024 * 1024;
const SCRIPT = fileURLToPath(import.meta.url);

export interface Posted {
  statuses: number[];
  /** Of one request. */
  mib: number;
}

/** @param begin is called when the first body is about to go out. */
export async function postLargeBodies(
  port: number,
  perSecond: number,
  ms: number,
  begin: () => void,
): Promise<Posted> {
  const isBun = process.versions.bun !== undefined;
  const args = isBun ? [SCRIPT] : ["run", "-A", "--no-check", SCRIPT];
  const child = spawn(process.execPath, [...args, String(port), String(perSecond), String(ms)], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  let said = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    if (said === "") begin();
    said += text;
  });
  await new Promise((resolve) => child.once("close", resolve));
  return JSON.parse(said.split("\n")[1] ?? "") as Posted;
}

/** A prompt as long ones are: many messages, escapes and letters of more than one byte in them. */
function largeBody(): Buffer {
  const content = 'He said: "\u00e9t\u00e9"\nand more, and more of it still. '.repeat(200);
  const message = { role: "user", content };
  const count = Math.ceil((5 * MIB) / JSON.stringify(message).length);
  const messages = Array.from({ length: count }, () => message);
  return Buffer.from(postBytes("/v1/chat/completions", chatBody({ model: "large", messages })));
}

function post(port: number, bytes: Buffer): Promise<number> {
  return new Promise((resolve) => {
    const socket = net.connect(port, "127.0.0.1");
    socket.once("data", (data: Buffer) => {
      resolve(Number(data.toString("latin1").split(" ")[1]));
      socket.destroy();
    });
    socket.once("error", () => resolve(0));
    socket.write(bytes);
  });
}

if (process.argv[1] === SCRIPT) {
  const [port = 0, perSecond = 1, ms = 0] = process.argv.slice(2).map(Number);
  const body = largeBody();
  process.stdout.write("begins\n");
  const answers: Promise<number>[] = [];
  const endsAt = performance.now() + ms;
  while (performance.now() < endsAt) {
    answers.push(post(port, body));
    await sleep(1000 / perSecond);
  }
  const posted: Posted = { statuses: await Promise.all(answers), mib: body.length / MIB };
  process.stdout.write(`${JSON.stringify(posted)}\n`);
}
