/**
 * What the trap tests stand on: an upstream and a client on raw sockets, so that nothing a runtime's
 * HTTP layer does for us can hide a fault, and a way to run a naive program on the present runtime.
 */
import { spawn, type ChildProcess } from "node:child_process";
import net from "node:net";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { connect, postBytes, type RawClient, sleep, until } from "../support/client.ts";
import { runtime } from "../support/gateway.ts";

export const isBun = runtime === "bun";
export const isDeno = runtime === "deno";

// --- upstream ---

export interface UpstreamRequest {
  readonly method: string;
  readonly path: string;
  readonly head: string;
  readonly body: string;
  readonly socket: net.Socket;
  /** 1 for the first request of its connection. */
  readonly nth: number;
  isClosed: () => boolean;
}

export interface Upstream {
  readonly url: string;
  readonly port: number;
  /** Every POST seen so far. GETs are a gateway's probes and answered here. */
  readonly posts: UpstreamRequest[];
  open: () => number;
  stop: () => Promise<void>;
}

const MODELS = JSON.stringify({
  object: "list",
  data: [{ id: "m", object: "model", created: 1, owned_by: "test" }],
});

/** One HTTP server on bare sockets: knows content-length bodies, keep-alive, and nothing else. */
export async function startUpstream(
  answer: (request: UpstreamRequest) => void | Promise<void>,
): Promise<Upstream> {
  const posts: UpstreamRequest[] = [];
  const sockets = new Set<net.Socket>();
  const server = net.createServer((socket) => {
    sockets.add(socket);
    let closed = false;
    let nth = 0;
    let pending = Buffer.alloc(0);
    socket.on("error", () => {});
    socket.on("close", () => {
      closed = true;
      sockets.delete(socket);
    });
    socket.on("data", (bytes: Buffer) => {
      pending = Buffer.concat([pending, bytes]);
      for (;;) {
        const headEnd = pending.indexOf("\r\n\r\n");
        if (headEnd < 0) return;
        const head = pending.subarray(0, headEnd).toString("latin1");
        const length = Number(/^content-length: *(\d+)/im.exec(head)?.[1] ?? 0);
        const total = headEnd + 4 + length;
        if (pending.length < total) return;
        const body = pending.subarray(headEnd + 4, total).toString("utf8");
        pending = pending.subarray(total);
        const [method = "", path = ""] = head.split(" ", 2);
        nth += 1;
        const request = { method, path, head, body, socket, nth, isClosed: () => closed };
        if (method === "POST") {
          posts.push(request);
          void answer(request);
        } else {
          socket.write(whole(200, MODELS));
          if (/^connection: *close/im.test(head)) socket.end();
        }
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as net.AddressInfo;
  return {
    url: `http://127.0.0.1:${port}`,
    port,
    posts,
    open: () => sockets.size,
    stop: () => {
      for (const socket of sockets) socket.destroy();
      return new Promise((resolve) => server.close(() => resolve()));
    },
  };
}

/** A complete answer with its length. */
export function whole(status: number, json: string): string {
  return (
    `HTTP/1.1 ${status} Whatever\r\ncontent-type: application/json\r\n` +
    `content-length: ${Buffer.byteLength(json)}\r\n\r\n${json}`
  );
}

export const STREAM_HEAD =
  "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/** One chunk of a chunked body. */
export function chunk(text: string): string {
  return `${Buffer.byteLength(text).toString(16)}\r\n${text}\r\n`;
}

export const LAST_CHUNK = "0\r\n\r\n";

/** An SSE event in the shape of a chat completion chunk. */
export function delta(content: string, finish: string | null = null): string {
  const choice = { index: 0, delta: { content }, finish_reason: finish };
  return `data: ${JSON.stringify({
    id: "chatcmpl-1",
    object: "chat.completion.chunk",
    created: 1,
    model: "m",
    choices: [choice],
  })}\n\n`;
}

export const ANSWER = JSON.stringify({
  id: "chatcmpl-1",
  object: "chat.completion",
  created: 1,
  model: "m",
  choices: [{ index: 0, message: { role: "assistant", content: "hi" }, finish_reason: "stop" }],
  usage: { prompt_tokens: 1, completion_tokens: 1, total_tokens: 2 },
});

export const WHOLE_STREAM =
  STREAM_HEAD +
  chunk(delta("hi")) +
  chunk(delta("", "stop")) +
  chunk("data: [DONE]\n\n") +
  LAST_CHUNK;

// --- client ---

/** The body of a chat request to model `m`. */
export function chat(stream: boolean, prompt = "hello"): string {
  return JSON.stringify({
    model: "m",
    stream,
    max_tokens: 8,
    messages: [{ role: "user", content: prompt }],
  });
}

/** Sends one chat request over a socket of its own; `pauses` sends its body in two late writes. */
export async function ask(
  port: number,
  body: string,
  { pauses = false }: { pauses?: boolean } = {},
): Promise<RawClient> {
  const client = await connect(port);
  const bytes = postBytes("/v1/chat/completions", body);
  if (!pauses) {
    client.write(bytes);
    return client;
  }
  const half = bytes.length - body.length / 2;
  for (const part of [
    bytes.slice(0, -body.length),
    bytes.slice(-body.length, half),
    bytes.slice(half),
  ]) {
    client.write(part);
    await sleep(50);
  }
  return client;
}

// --- programs ---

export interface Program {
  readonly child: ChildProcess;
  /** The port it announced as `listening PORT`. */
  readonly port: number;
  output: () => string;
  /** undefined while it runs; a signal's name when one ended it. */
  exit: () => number | string | undefined;
  stop: () => Promise<void>;
}

/** Runs a file of `naive/` on the present runtime. Waits for its port unless `listens: false`. */
export async function runNaive(
  name: string,
  upstream: string,
  {
    listens = true,
    runtimeArgs = [],
    args = [],
  }: { listens?: boolean; runtimeArgs?: string[]; args?: string[] } = {},
): Promise<Program> {
  const file = fileURLToPath(new URL(`./naive/${name}.ts`, import.meta.url));
  const verbs = isDeno ? ["run", "-A", "--no-check", ...runtimeArgs] : runtimeArgs;
  const env: NodeJS.ProcessEnv = { ...process.env, UPSTREAM: upstream, NO_COLOR: "1" };
  // The limit under test must not be lifted by the shell that runs the tests.
  delete env.BUN_CONFIG_MAX_HTTP_REQUESTS;
  const child = spawn(process.execPath, [...verbs, file, ...args], {
    env,
    stdio: ["ignore", "pipe", "pipe"],
  });
  let output = "";
  let exit: number | string | undefined;
  child.stdout.on("data", (bytes: Buffer) => (output += bytes.toString()));
  child.stderr.on("data", (bytes: Buffer) => (output += bytes.toString()));
  const gone = new Promise<void>((resolve) =>
    child.once("exit", (code, signal) => {
      exit = code ?? signal ?? "unknown";
      resolve();
    }),
  );
  let port = 0;
  if (listens) {
    const announced = () => /^listening (\d+)$/m.exec(output)?.[1];
    await until(() => announced() !== undefined || exit !== undefined, 20_000);
    port = Number(announced() ?? 0);
    if (port === 0) {
      child.kill("SIGKILL");
      throw new Error(`naive/${name}.ts did not start:\n${output}`);
    }
  }
  return {
    child,
    port,
    output: () => output,
    exit: () => exit,
    stop: async () => {
      if (exit === undefined) child.kill("SIGKILL");
      await gone;
    },
  };
}
