/**
 * HTTP/1.1 by hand on a TCP socket: node:http would not let a fake engine lie about a length,
 * stop in the middle of a chunk, or leave by RST.
 */
import net from "node:net";

export interface WireRequest {
  method: string;
  /** Request target as it came: path and query. */
  target: string;
  /** Lower-case names; repeated fields joined with ", ". */
  headers: Record<string, string>;
  rawHeaders: [name: string, value: string][];
  body: Buffer;
}

export type Framing = "chunked" | "close" | { length: number };

/** How a server writes its answers, whatever they are. */
export interface Manner {
  /** On every answer. */
  headers: Record<string, string>;
  /** Content type of its JSON. */
  json: string;
  /** And of its event streams. */
  stream: string;
  /** llama.cpp closes after an error, its router after everything it passes on (real §5.2). */
  closes: "never" | "onError" | "always";
  /** Whole answers too have no length (a proxy's). */
  chunksAll: boolean;
}

/** Waits, but not for a client that has left. */
export function pause(ms: number, left: AbortSignal): Promise<void> {
  if (left.aborted || ms === 0) return Promise.resolve();
  return new Promise((resolve) => {
    const timer = ms === Number.POSITIVE_INFINITY ? undefined : setTimeout(settle, ms);
    function settle(): void {
      clearTimeout(timer);
      left.removeEventListener("abort", settle);
      resolve();
    }
    left.addEventListener("abort", settle);
  });
}

/** A process that is stopped (kill -STOP): the kernel still accepts, nobody reads, writes or notices. */
class Sleep {
  #awake: Promise<void> | null = null;
  #wake: () => void = () => {};

  get isAsleep(): boolean {
    return this.#awake !== null;
  }

  begin(): void {
    this.#awake ??= new Promise((resolve) => (this.#wake = resolve));
  }

  end(): void {
    this.#awake = null;
    this.#wake();
  }

  async over(): Promise<void> {
    while (this.#awake !== null) await this.#awake;
  }
}

/** Thrown by {@link Reply.write} when there is nobody left to write to. */
export class ClientLeft extends Error {
  override name = "ClientLeft";
}

export class Reply {
  /** Aborted when the client left before the answer was complete. */
  readonly left: AbortSignal;
  status: number | null = null;
  bytesSent = 0;
  manner: Manner;
  #sleep: Sleep;
  #socket: net.Socket;
  #framing: Framing = "close";
  #leaving = new AbortController();
  #isOver = false;
  #keepAlive: boolean;
  #next: () => void;

  constructor(
    socket: net.Socket,
    keepAlive: boolean,
    { manner, sleep, next }: { manner: Manner; sleep: Sleep; next: () => void },
  ) {
    this.#socket = socket;
    this.#keepAlive = keepAlive;
    this.manner = manner;
    this.#sleep = sleep;
    this.#next = next;
    this.left = this.#leaving.signal;
  }

  get isOver(): boolean {
    return this.#isOver;
  }

  /** The connection's end, seen from below. */
  clientLeft(): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#leaving.abort(new ClientLeft("the client left"));
  }

  async head(status: number, headers: Record<string, string>, asked: Framing): Promise<void> {
    await this.#sleep.over();
    if (this.left.aborted) throw new ClientLeft("the client left");
    const { manner } = this;
    const framing = manner.chunksAll && asked !== "close" ? "chunked" : asked;
    this.status = status;
    this.#framing = framing;
    const fields = Object.entries({ ...manner.headers, ...headers });
    if (framing === "chunked") fields.push(["Transfer-Encoding", "chunked"]);
    else if (framing !== "close") fields.push(["Content-Length", String(framing.length)]);
    if (framing === "close" || manner.closes === "always") this.#keepAlive = false;
    if (manner.closes === "onError" && status >= 400) this.#keepAlive = false;
    if (!this.#keepAlive) fields.push(["Connection", "close"]);
    const lines = fields.map(([name, value]) => `${name}: ${value}\r\n`).join("");
    this.#socket.write(`HTTP/1.1 ${status} ${status < 400 ? "OK" : "Error"}\r\n${lines}\r\n`);
  }

  /** Resolves when the socket takes more: a client that does not read holds the engine back. */
  async write(bytes: Uint8Array): Promise<void> {
    await this.#sleep.over();
    if (this.left.aborted) throw new ClientLeft("the client left");
    if (bytes.length === 0) return;
    this.bytesSent += bytes.length;
    const payload =
      this.#framing === "chunked"
        ? Buffer.concat([
            Buffer.from(`${bytes.length.toString(16)}\r\n`),
            bytes,
            Buffer.from("\r\n"),
          ])
        : bytes;
    if (this.#socket.write(payload)) return;
    await new Promise<void>((resolve) => {
      const settle = (): void => {
        this.#socket.off("drain", settle);
        this.left.removeEventListener("abort", settle);
        resolve();
      };
      this.#socket.on("drain", settle);
      this.left.addEventListener("abort", settle);
    });
    if (this.left.aborted) throw new ClientLeft("the client left");
  }

  /** A proper end; in chunked framing also the clean end of a body that lacks its content. */
  async end(): Promise<void> {
    await this.#sleep.over();
    if (this.#isOver) return;
    if (this.#framing === "chunked") this.#socket.write("0\r\n\r\n");
    this.#isOver = true;
    if (this.#keepAlive) this.#next();
    else this.#socket.end();
  }

  /** FIN in the middle: no last chunk, or fewer bytes than the declared length. */
  fin(): void {
    this.#isOver = true;
    this.#socket.end();
  }

  reset(): void {
    this.#isOver = true;
    this.#socket.resetAndDestroy();
  }
}

export class WireServer {
  #server: net.Server | null = null;
  #sockets = new Map<net.Socket, () => boolean>();
  #sleep = new Sleep();
  #manner: Manner;
  #handle: (request: WireRequest, reply: Reply) => void;
  port = 0;

  constructor(manner: Manner, handle: (request: WireRequest, reply: Reply) => void) {
    this.#manner = manner;
    this.#handle = handle;
  }

  async listen(port: number, host = "127.0.0.1"): Promise<void> {
    const server = net.createServer((socket) => this.#serve(socket));
    await new Promise<void>((resolve, reject) => {
      server.once("error", reject);
      server.listen(port, host, resolve);
    });
    this.#server = server;
    this.port = (server.address() as net.AddressInfo).port;
  }

  /** New connections are refused, idle ones closed; what runs goes on. */
  stopListening(): void {
    this.#server?.close();
    this.#server = null;
    for (const [socket, isIdle] of this.#sockets) if (isIdle()) socket.destroy();
  }

  /** As after kill -STOP: connections are accepted, nothing is read, said or noticed. */
  freeze(): void {
    this.#sleep.begin();
    for (const socket of this.#sockets.keys()) socket.pause();
  }

  /** kill -CONT. */
  thaw(): void {
    this.#sleep.end();
    for (const socket of this.#sockets.keys()) socket.resume();
  }

  openConnections(): number {
    return this.#sockets.size;
  }

  destroyConnections(): void {
    for (const socket of this.#sockets.keys()) socket.destroy();
  }

  #serve(socket: net.Socket): void {
    socket.setNoDelay(true);
    let pending: Buffer = Buffer.alloc(0);
    let chunks: Buffer[] = [];
    let size = 0;
    let needed = 0;
    let reply: Reply | null = null;
    this.#sockets.set(socket, () => reply === null || reply.isOver);
    const read = (): void => {
      if (this.#sleep.isAsleep) return void this.#sleep.over().then(read);
      if (reply !== null && !reply.isOver) return;
      if (size < needed) return;
      if (chunks.length > 0) pending = Buffer.concat([pending, ...chunks]);
      chunks = [];
      const parsed = parseRequest(pending);
      if (typeof parsed === "number") {
        size = pending.length;
        needed = parsed;
        return;
      }
      pending = parsed.rest;
      size = pending.length;
      needed = 0;
      const { request } = parsed;
      const keepAlive = !/close/i.test(request.headers.connection ?? "");
      reply = new Reply(socket, keepAlive, {
        manner: this.#manner,
        sleep: this.#sleep,
        next: () => setImmediate(read),
      });
      this.#handle(request, reply);
    };
    socket.on("data", (data: Buffer) => {
      chunks.push(data);
      size += data.length;
      read();
    });
    const gone = (): void => {
      this.#sockets.delete(socket);
      if (!this.#sleep.isAsleep) reply?.clientLeft();
      else void this.#sleep.over().then(() => reply?.clientLeft());
    };
    if (this.#sleep.isAsleep) socket.pause();
    // A client that half-closes has left: the engines' servers see it so, too.
    socket.on("end", gone);
    socket.on("error", gone);
    socket.on("close", gone);
  }
}

/** The first whole request in the buffer, or how many bytes are needed before it is worth another look. */
function parseRequest(buffer: Buffer): { request: WireRequest; rest: Buffer } | number {
  const headEnd = buffer.indexOf("\r\n\r\n");
  if (headEnd < 0) return buffer.length + 1;
  const [requestLine = "", ...lines] = buffer.subarray(0, headEnd).toString("latin1").split("\r\n");
  const [method = "", target = "/"] = requestLine.split(" ");
  const rawHeaders: [string, string][] = [];
  const headers: Record<string, string> = {};
  for (const line of lines) {
    const colon = line.indexOf(":");
    const name = line.slice(0, colon);
    const value = line.slice(colon + 1).trim();
    rawHeaders.push([name, value]);
    const key = name.toLowerCase();
    headers[key] = key in headers ? `${headers[key]}, ${value}` : value;
  }
  const bodyStart = headEnd + 4;
  if (/chunked/i.test(headers["transfer-encoding"] ?? "")) {
    const decoded = decodeChunked(buffer, bodyStart);
    if (decoded === null) return buffer.length + 1;
    const request = { method, target, headers, rawHeaders, body: decoded.body };
    return { request, rest: buffer.subarray(decoded.end) };
  }
  const bodyEnd = bodyStart + Number(headers["content-length"] ?? 0);
  if (buffer.length < bodyEnd) return bodyEnd;
  const body = Buffer.from(buffer.subarray(bodyStart, bodyEnd));
  return { request: { method, target, headers, rawHeaders, body }, rest: buffer.subarray(bodyEnd) };
}

/** `null` while the last chunk is missing. */
export function decodeChunked(buffer: Buffer, start = 0): { body: Buffer; end: number } | null {
  const parts: Buffer[] = [];
  let at = start;
  for (;;) {
    const lineEnd = buffer.indexOf("\r\n", at);
    if (lineEnd < 0) return null;
    const length = Number.parseInt(buffer.subarray(at, lineEnd).toString("latin1"), 16);
    const dataEnd = lineEnd + 2 + length;
    if (!(dataEnd + 2 <= buffer.length)) return null;
    if (length === 0) return { body: Buffer.concat(parts), end: dataEnd + 2 };
    parts.push(buffer.subarray(lineEnd + 2, dataEnd));
    at = dataEnd + 2;
  }
}
