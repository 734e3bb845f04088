/** Clients of the gateway: a polite one by fetch, and a raw one that leaves whenever it likes. */
import net from "node:net";
import process from "node:process";
import { decodeChunked } from "./engine-socket.ts";
import { createRandom } from "./random.ts";

/** What surely happens may take this long on a machine that is busy; who waits for it goes on at once. */
export const PATIENCE_MS = 15_000;

/** Polls until it holds or the time is over; says which. */
export async function until(
  predicate: () => boolean | Promise<boolean>,
  ms = PATIENCE_MS,
): Promise<boolean> {
  const endsAt = performance.now() + ms;
  for (;;) {
    if (await predicate()) return true;
    if (performance.now() > endsAt) return false;
    await sleep(10);
  }
}

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => void setTimeout(resolve, ms));
}

export interface Random {
  seed: number;
  /** [0, 1) */
  next(): number;
  /** An integer, both ends included. */
  between(least: number, most: number): number;
  pick<Item>(items: readonly Item[]): Item;
}

/** Prints its seed; `SEED` in the environment repeats a run. */
export function seeded(name: string): Random {
  const seed = Number(process.env.SEED ?? Math.floor(Math.random() * 2 ** 31));
  console.log(`${name}: SEED=${seed}`);
  return randomOf(seed);
}

/** The same numbers for the same seed. */
export function randomOf(seed: number): Random {
  const next = createRandom(seed);
  const between = (least: number, most: number): number =>
    least + Math.floor(next() * (most - least + 1));
  return {
    seed,
    next,
    between,
    pick: (items) => items[between(0, items.length - 1)] as (typeof items)[number],
  };
}

/** What of `RequestInit` the tests use, with headers that can be spread. */
export interface Init {
  method?: string;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

export interface Answer {
  status: number;
  headers: Headers;
  body: Buffer;
  text: string;
  /** The body as JSON; throws where it is none. */
  json(this: void): Record<string, unknown>;
}

/** A string or bytes go out as they are, anything else as JSON; without a body it is a GET. */
export async function send(url: string, body?: unknown, init: Init = {}): Promise<Answer> {
  const response = await open(url, body, init);
  const bytes = Buffer.from(await response.arrayBuffer());
  const text = bytes.toString();
  return {
    status: response.status,
    headers: response.headers,
    body: bytes,
    text,
    json: () => JSON.parse(text) as Record<string, unknown>,
  };
}

/** As {@link send}, but with the body still on its way. */
export function open(url: string, body?: unknown, init: Init = {}): Promise<Response> {
  if (body === undefined) return fetch(url, { redirect: "manual", ...init });
  const isRaw = typeof body === "string" || body instanceof Uint8Array;
  return fetch(url, {
    method: "POST",
    ...init,
    headers: { "content-type": "application/json", ...init.headers },
    body: isRaw ? (body as string) : JSON.stringify(body),
  });
}

/** A chat completion with one short user message; `body` adds and overrides. */
export function openaiChat(
  url: string,
  body: Record<string, unknown> = {},
  init: Init = {},
): Promise<Answer> {
  return send(`${url}/v1/chat/completions`, chatBody(body), init);
}

export function chatBody(body: Record<string, unknown> = {}): Record<string, unknown> {
  return { model: "test-model", messages: [{ role: "user", content: "Say something" }], ...body };
}

export interface SseEvent {
  /** `null` for an event without a name. */
  event: string | null;
  /** `null` for a comment. */
  data: string | null;
  comment: string | null;
  /** The event's bytes with its blank line. */
  raw: string;
}

/** Whole events of a body, and what stands after the last blank line. */
export function parseSse(text: string): { events: SseEvent[]; rest: string } {
  const events: SseEvent[] = [];
  const boundary = /\r\n\r\n|\n\n|\r\r/g;
  let start = 0;
  for (let match = boundary.exec(text); match !== null; match = boundary.exec(text)) {
    const raw = text.slice(start, boundary.lastIndex);
    start = boundary.lastIndex;
    const event: SseEvent = { event: null, data: null, comment: null, raw };
    for (const line of raw.split(/\r\n|\n|\r/)) {
      if (line.startsWith(":")) event.comment = line.slice(1).trim();
      else if (line.startsWith("event:")) event.event = line.slice(6).trim();
      else if (line.startsWith("data:"))
        event.data = `${event.data ?? ""}${line.slice(5).trimStart()}`;
    }
    events.push(event);
  }
  return { events, rest: text.slice(start) };
}

/** The JSON of the events that carry some. */
export function dataOf(text: string): Record<string, unknown>[] {
  return parseSse(text)
    .events.filter(({ data }) => data !== null && data !== "[DONE]")
    .map(({ data }) => JSON.parse(data ?? "") as Record<string, unknown>);
}

/** Raw bytes of a body as they come. */
async function* readBytes(response: Response): AsyncGenerator<Buffer> {
  const reader = response.body?.getReader();
  if (reader === undefined) return;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield Buffer.from(value);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Whole events of a body as they come. */
export async function* readEvents(response: Response): AsyncGenerator<SseEvent> {
  const decoder = new TextDecoder();
  let pending = "";
  for await (const bytes of readBytes(response)) {
    const { events, rest } = parseSse(pending + decoder.decode(bytes, { stream: true }));
    pending = rest;
    yield* events;
  }
}

export interface RawClient {
  socket: net.Socket;
  /** Everything that came: head and body with its chunk framing. */
  received(): string;
  status(): number | null;
  header(name: string): string | null;
  /** The body without its framing; `null` until it is complete. */
  body(): string | null;
  write(bytes: string | Uint8Array): void;
  /** "fin" half-closes as `shutdown` does, "close" is a plain close, "reset" a RST. */
  leave(how: "fin" | "close" | "reset"): void;
  pause(): void;
  resume(): void;
  isClosed(): boolean;
  closed: Promise<void>;
}

export async function connect(port: number, localAddress = "127.0.0.1"): Promise<RawClient> {
  const socket = net.connect({ port, host: "127.0.0.1", localAddress });
  socket.setNoDelay(true);
  let parts: Buffer[] = [];
  let isClosed = false;
  socket.on("data", (bytes: Buffer) => void parts.push(bytes));
  socket.on("error", () => {});
  const closed = new Promise<void>((resolve) => {
    socket.once("close", () => {
      isClosed = true;
      resolve();
    });
  });
  await new Promise<void>((resolve, reject) => {
    socket.once("connect", resolve);
    socket.once("error", reject);
  });
  // Asked again and again while it comes: joined once.
  const all = (): Buffer => {
    if (parts.length !== 1) parts = [Buffer.concat(parts)];
    return parts[0] ?? Buffer.alloc(0);
  };
  const headEnd = (): number => all().indexOf("\r\n\r\n");
  const head = (): string => all().subarray(0, Math.max(0, headEnd())).toString("latin1");
  const header = (name: string): string | null =>
    new RegExp(`^${name}: *(.*)$`, "im").exec(head())?.[1]?.trim() ?? null;
  return {
    socket,
    received: () => all().toString(),
    status: () => (headEnd() < 0 ? null : Number(head().split(" ")[1])),
    header,
    body() {
      if (headEnd() < 0) return null;
      const body = all().subarray(headEnd() + 4);
      if (header("transfer-encoding") === "chunked") {
        return decodeChunked(body)?.body.toString() ?? null;
      }
      const length = header("content-length");
      if (length === null) return isClosed ? body.toString() : null;
      return body.length >= Number(length) ? body.subarray(0, Number(length)).toString() : null;
    },
    write: (bytes) => void socket.write(bytes),
    leave(how) {
      if (how === "reset") socket.resetAndDestroy();
      else if (how === "close") socket.destroy();
      else socket.end();
    },
    pause: () => void socket.pause(),
    resume: () => void socket.resume(),
    isClosed: () => isClosed,
    closed,
  };
}

/** The bytes of a POST, ready for {@link RawClient.write}. */
export function postBytes(
  path: string,
  body: unknown,
  headers: Record<string, string> = {},
): string {
  const text = typeof body === "string" ? body : JSON.stringify(body);
  const fields = {
    Host: "localhost",
    "Content-Type": "application/json",
    "Content-Length": String(Buffer.byteLength(text)),
    ...headers,
  };
  const lines = Object.entries(fields).map(([name, value]) => `${name}: ${value}\r\n`);
  return `POST ${path} HTTP/1.1\r\n${lines.join("")}\r\n${text}`;
}

/** Sends the bytes in so many writes, each on its own. */
export async function writeInParts(client: RawClient, bytes: string, count: number): Promise<void> {
  const size = Math.ceil(bytes.length / count);
  for (let at = 0; at < bytes.length; at += size) {
    client.write(bytes.slice(at, at + size));
    await sleep(1);
  }
}
