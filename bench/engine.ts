// The engine stand-in: a raw-socket HTTP server that costs next to nothing and writes each event
// with a write of its own, so that what is measured is the gateway in front of it.
// `bun bench/engine.ts --ports N` prints `{"ports":[…]}`; one port per measured process, so that
// closed connections of one do not use up the source ports of another.
import type { Socket } from "bun";

export const MODEL = "bench-1";
const TICK_MS = 2;
/** Each stream gets one event per cycle: 5 × 2 ms, so about 100 events per second. */
const TICKS_PER_CYCLE = 5;
const CREATED = 1_763_000_000;

/** About a kilobyte, as a short answer has. The same bytes every time: the driver compares them. */
export function chatAnswer(): string {
  const sentence = "The tide gate opens when the water is low and closes before it turns. ";
  return JSON.stringify({
    id: "chatcmpl-bench",
    object: "chat.completion",
    created: CREATED,
    model: MODEL,
    choices: [
      {
        index: 0,
        message: { role: "assistant", content: sentence.repeat(10) },
        logprobs: null,
        finish_reason: "stop",
      },
    ],
    usage: { prompt_tokens: 180, completion_tokens: 160, total_tokens: 340 },
    system_fingerprint: "fp_bench",
  });
}

/**
 * The events of a stream: `chunks` of about 230 bytes, the usage chunk if asked for, `[DONE]`. The
 * other chunks carry no `"usage":null`, as with vLLM and llama.cpp.
 */
export function streamEvents(chunks: number, includeUsage: boolean): string[] {
  const events: string[] = [];
  for (let index = 0; index < chunks; index++) {
    const last = index === chunks - 1;
    const delta =
      index === 0 ? { role: "assistant", content: "" } : last ? {} : { content: word(index) };
    const choices = [{ index: 0, delta, logprobs: null, finish_reason: last ? "stop" : null }];
    events.push(streamEvent(choices, undefined));
  }
  if (includeUsage) {
    const usage = { prompt_tokens: 180, completion_tokens: chunks - 2, total_tokens: 178 + chunks };
    events.push(streamEvent([], usage));
  }
  events.push("data: [DONE]\n\n");
  return events;
}

function streamEvent(choices: unknown[], usage: object | undefined): string {
  const head = { id: "chatcmpl-bench", object: "chat.completion.chunk", created: CREATED };
  const data = { ...head, model: MODEL, system_fingerprint: "fp_bench", choices, usage };
  return `data: ${JSON.stringify(data)}\n\n`;
}

function word(index: number): string {
  return ` token${String(index).padStart(5, "0")}`;
}

interface Connection {
  received: Buffer;
  stream: Stream | undefined;
  /** What the socket has not taken yet. */
  unsent: Buffer | undefined;
  closing: boolean;
}

interface Stream {
  frames: readonly Buffer[];
  next: number;
  turn: number;
}

type EngineSocket = Socket<Connection>;

const CRLF_CRLF = Buffer.from("\r\n\r\n");
const LAST_CHUNK = Buffer.from("0\r\n\r\n");
const framesByShape = new Map<string, readonly Buffer[]>();
const streaming = new Set<EngineSocket>();
let streamsStarted = 0;
let tick = 0;

function framesOf(chunks: number, includeUsage: boolean): readonly Buffer[] {
  const key = `${chunks} ${includeUsage}`;
  let frames = framesByShape.get(key);
  if (frames === undefined) {
    frames = streamEvents(chunks, includeUsage).map((event) =>
      Buffer.from(`${Buffer.byteLength(event).toString(16)}\r\n${event}\r\n`),
    );
    framesByShape.set(key, frames);
  }
  return frames;
}

/** At most one event per stream and cycle: an engine that is late does not catch up in bursts. */
function advance(): void {
  tick = (tick + 1) % TICKS_PER_CYCLE;
  for (const socket of streaming) {
    const { stream, unsent } = socket.data;
    if (stream === undefined || stream.turn !== tick || unsent !== undefined) continue;
    const frame = stream.frames[stream.next++];
    if (frame !== undefined) send(socket, frame);
    if (stream.next < stream.frames.length) continue;
    streaming.delete(socket);
    socket.data.stream = undefined;
    send(socket, LAST_CHUNK);
    finish(socket);
  }
}

function send(socket: EngineSocket, bytes: Buffer): void {
  const { unsent } = socket.data;
  if (unsent !== undefined) {
    socket.data.unsent = Buffer.concat([unsent, bytes]);
    return;
  }
  const sent = Math.max(0, socket.write(bytes));
  if (sent < bytes.length) socket.data.unsent = bytes.subarray(sent);
}

function finish(socket: EngineSocket): void {
  if (socket.data.closing && socket.data.unsent === undefined) socket.end();
}

function receive(socket: EngineSocket, bytes: Buffer): void {
  const connection = socket.data;
  connection.received =
    connection.received.length === 0
      ? Buffer.from(bytes)
      : Buffer.concat([connection.received, bytes]);
  const headEnd = connection.received.indexOf(CRLF_CRLF);
  if (headEnd < 0) return;
  const head = connection.received.toString("latin1", 0, headEnd);
  const length = Number(/\r\ncontent-length: *(\d+)/i.exec(head)?.[1] ?? 0);
  const end = headEnd + CRLF_CRLF.length + length;
  if (connection.received.length < end) return;
  const body = connection.received.toString("utf8", headEnd + CRLF_CRLF.length, end);
  connection.received = connection.received.subarray(end);
  connection.closing = /\r\nconnection: *close/i.test(head);
  answer(socket, head, body);
}

const CHAT_ANSWER = chatAnswer();
const MODELS = JSON.stringify({
  object: "list",
  data: [{ id: MODEL, object: "model", created: CREATED, owned_by: "bench" }],
});

function answer(socket: EngineSocket, head: string, body: string): void {
  if (head.startsWith("GET /v1/models ")) return sendJson(socket, "200 OK", MODELS);
  if (!head.startsWith("POST /v1/chat/completions ")) {
    return sendJson(socket, "404 Not Found", '{"detail":"Not Found"}');
  }
  const request: {
    stream?: boolean;
    max_tokens?: number;
    stream_options?: { include_usage?: boolean };
  } = JSON.parse(body);
  if (request.stream !== true) return sendJson(socket, "200 OK", CHAT_ANSWER);
  const frames = framesOf(
    request.max_tokens ?? 200,
    request.stream_options?.include_usage === true,
  );
  send(
    socket,
    Buffer.from(responseHead(socket, "200 OK", "text/event-stream", "transfer-encoding: chunked")),
  );
  socket.data.stream = { frames, next: 0, turn: streamsStarted++ % TICKS_PER_CYCLE };
  streaming.add(socket);
}

function sendJson(socket: EngineSocket, status: string, json: string): void {
  const framing = `content-length: ${Buffer.byteLength(json)}`;
  send(socket, Buffer.from(responseHead(socket, status, "application/json", framing) + json));
  finish(socket);
}

function responseHead(socket: EngineSocket, status: string, type: string, framing: string): string {
  const connection = socket.data.closing ? "close" : "keep-alive";
  return `HTTP/1.1 ${status}\r\ncontent-type: ${type}\r\n${framing}\r\nconnection: ${connection}\r\n\r\n`;
}

function listen(): number {
  return Bun.listen<Connection>({
    hostname: "127.0.0.1",
    port: 0,
    socket: {
      open(socket) {
        socket.data = {
          received: Buffer.alloc(0),
          stream: undefined,
          unsent: undefined,
          closing: false,
        };
        socket.setNoDelay(true);
      },
      data: receive,
      drain(socket) {
        const { unsent } = socket.data;
        if (unsent === undefined) return;
        socket.data.unsent = undefined;
        send(socket, unsent);
        if (socket.data.stream === undefined) finish(socket);
      },
      close: (socket) => void streaming.delete(socket),
      error: (socket) => void streaming.delete(socket),
    },
  }).port;
}

if (import.meta.main) {
  const count = Number(process.argv[process.argv.indexOf("--ports") + 1]);
  const ports = Array.from({ length: count }, listen);
  setInterval(advance, TICK_MS);
  console.log(JSON.stringify({ ports }));
}
