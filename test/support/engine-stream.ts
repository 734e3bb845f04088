/** Writes one answer, event by event, at the pace and with the fault that the behaviour asks for. */
import type { Behaviour, Fault } from "./engine-behaviour.ts";
import type { Piece, Shape, Style, Usage } from "./engine-shapes.ts";
import { sse } from "./engine-shapes.ts";
import type { Reply } from "./engine-socket.ts";
import { pause } from "./engine-socket.ts";
import { engineDied } from "./engine-style.ts";

/** Enough for a client's kernel to have the bytes before a RST throws away what it has not read. */
const BEFORE_RESET_MS = 15;

/** The body was cut at the byte that the fault names. */
class Cut extends Error {}

export interface Answer {
  shape: Shape;
  style: Style;
  /** Its streams end with [DONE]. */
  hasDone: boolean;
  pieces: Piece[];
  reason: string;
  usage: Usage;
}

/** Splits a body over writes as the behaviour says, keeps what was sent, stops at a cut. */
class BodyWriter {
  readonly #reply: Reply;
  readonly #behaviour: Behaviour;
  readonly #keep: (bytes: Uint8Array) => void;
  #pending: Buffer = Buffer.alloc(0);
  #room: number;

  constructor(reply: Reply, behaviour: Behaviour, keep: (bytes: Uint8Array) => void) {
    this.#reply = reply;
    this.#behaviour = behaviour;
    this.#keep = keep;
    const { fault } = behaviour;
    this.#room = fault?.kind === "cut" ? (fault.afterBytes ?? Infinity) : Infinity;
  }

  async add(frame: string | Uint8Array): Promise<void> {
    const { lineEnd, chunking } = this.#behaviour;
    const bytes =
      typeof frame === "string"
        ? Buffer.from(lineEnd === "\n" ? frame : frame.replaceAll("\n", lineEnd))
        : Buffer.from(frame);
    if (chunking === "event") return this.#write(bytes);
    this.#pending = Buffer.concat([this.#pending, bytes]);
    if (chunking === "once") return;
    while (this.#pending.length >= chunking) await this.#take(chunking);
  }

  async flush(): Promise<void> {
    if (this.#pending.length > 0) await this.#take(this.#pending.length);
  }

  async pause(ms: number): Promise<void> {
    if (ms === 0) return;
    if (this.#behaviour.chunking !== "once") await this.flush();
    const { pingMs } = this.#behaviour;
    if (pingMs === 0) return pause(ms, this.#reply.left);
    const endsAt = performance.now() + ms;
    while (!this.#reply.left.aborted) {
      const remaining = endsAt - performance.now();
      if (remaining <= 0) return;
      await pause(Math.min(pingMs, remaining), this.#reply.left);
      if (remaining > pingMs) await this.add(":\n\n");
    }
  }

  async #take(count: number): Promise<void> {
    const part = this.#pending.subarray(0, count);
    this.#pending = this.#pending.subarray(count);
    await this.#write(part);
    // A write of its own: without this the kernel would join the pieces again.
    await new Promise((resolve) => setImmediate(resolve));
  }

  async #write(bytes: Buffer): Promise<void> {
    const fitting = bytes.subarray(0, Math.min(bytes.length, this.#room));
    this.#room -= fitting.length;
    this.#keep(fitting);
    await this.#reply.write(fitting);
    if (this.#room === 0) throw new Cut();
  }
}

async function endBy(reply: Reply, by: "reset" | "fin" | "eof" | "silence"): Promise<void> {
  if (by === "eof") return reply.end();
  if (by === "fin") return reply.fin();
  if (by === "silence") return pause(Number.POSITIVE_INFINITY, reply.left);
  await pause(BEFORE_RESET_MS, reply.left);
  reply.reset();
}

export async function streamAnswer(
  reply: Reply,
  behaviour: Behaviour,
  answer: Answer,
  keep: (bytes: Uint8Array) => void,
): Promise<void> {
  const { shape, reason, usage } = answer;
  const { fault } = behaviour;
  const body = new BodyWriter(reply, behaviour, keep);
  const isUnfinished = fault?.kind === "endless" && !fault.finish;
  const lastReason = behaviour.finishOnLastToken && !isUnfinished ? reason : null;
  await reply.head(
    200,
    {
      "Content-Type": behaviour.contentType ?? shape.contentType ?? reply.manner.stream,
      "Cache-Control": "no-cache",
      ...behaviour.headers,
    },
    "chunked",
  );
  const add = async (frames: string[]): Promise<void> => {
    for (const frame of frames) await body.add(frame);
  };
  try {
    if (fault?.kind === "raw") {
      await body.add(typeof fault.body === "string" ? fault.body : Buffer.from(fault.body));
      await body.flush();
      return reply.end();
    }
    if (behaviour.flood !== null) await flood(reply, body, shape, behaviour.flood);
    else {
      await body.pause(behaviour.firstTokenDelayMs);
      if (await strike(reply, body, answer, fault, 0)) return;
      await add(shape.open(usage));
      for (const [index, piece] of answer.pieces.entries()) {
        if (index > 0) await body.pause(behaviour.tokenDelayMs);
        if (index === behaviour.stallAfterTokens) await body.pause(behaviour.stallMs);
        await add(ping(behaviour.pings));
        const isLast = index === answer.pieces.length - 1;
        await add(shape.piece(piece, index === 0, isLast ? lastReason : null));
        if (await strike(reply, body, answer, fault, index + 1)) return;
      }
      if (answer.pieces.length === behaviour.stallAfterTokens) await body.pause(behaviour.stallMs);
    }
    if (!isUnfinished) await add(shape.finish(reason, usage));
    if (fault?.kind !== "endless") await add(shape.done());
    await body.flush();
    await reply.end();
  } catch (error) {
    if (!(error instanceof Cut)) throw error;
    await endBy(reply, fault?.kind === "cut" ? fault.by : "eof");
  }
}

/** Whether the fault has ended the answer. */
async function strike(
  reply: Reply,
  body: BodyWriter,
  { shape, style, hasDone }: Answer,
  fault: Fault | null,
  tokens: number,
): Promise<boolean> {
  if (fault === null || !("afterTokens" in fault) || fault.afterTokens !== tokens) return false;
  switch (fault.kind) {
    case "malformed":
      await body.add(
        fault.frame ?? 'data: {"id":"chatcmpl-1","choices":[{"delta":{"content":"x\n\n',
      );
      return false;
    case "error": {
      for (const frame of shape.error(fault.error ?? engineDied)) await body.add(frame);
      if (fault.ends === "done") await body.add(sse("[DONE]"));
      await body.flush();
      if (fault.ends === "silence") await pause(Number.POSITIVE_INFINITY, reply.left);
      else await endBy(reply, fault.ends === "reset" ? "reset" : "eof");
      return true;
    }
    case "dies":
      for (const frame of style.dies(shape, hasDone)) await body.add(frame);
      await body.flush();
      await reply.end();
      return true;
    case "swallowed":
      for (const frame of shape.swallowed()) await body.add(frame);
      await body.flush();
      await reply.end();
      return true;
    case "cut":
      await body.flush();
      await endBy(reply, fault.by);
      return true;
  }
}

function ping(kind: Behaviour["pings"]): string[] {
  if (kind === "none") return [];
  if (kind === "bare") return [":\n\n"];
  return kind === "comment" ? [": keep-alive\n\n"] : ['event: ping\ndata: {"type":"ping"}\n\n'];
}

async function flood(
  reply: Reply,
  body: BodyWriter,
  shape: Shape,
  { bytes, frameBytes = 4096 }: NonNullable<Behaviour["flood"]>,
): Promise<void> {
  const frame = Buffer.from(shape.piece({ text: "x".repeat(frameBytes) }, false, null).join(""));
  // Some 64 KiB per write: as fast as a socket can be.
  const block = Buffer.concat(Array.from({ length: Math.ceil(65536 / frame.length) }, () => frame));
  while (reply.bytesSent < bytes) await body.add(block);
}

/** Not streaming: engines send nothing, not even headers, until all is done. */
export async function sendWhole(
  reply: Reply,
  behaviour: Behaviour,
  answer: Answer,
  keep: (bytes: Uint8Array) => void,
): Promise<void> {
  const { fault } = behaviour;
  if (fault?.kind === "error" || fault?.kind === "swallowed") {
    const error = fault.kind === "error" ? (fault.error ?? engineDied) : engineDied;
    return sendBody(reply, 500, { error }, {}, keep);
  }
  const body = Buffer.from(
    JSON.stringify(answer.shape.whole(answer.pieces, answer.reason, answer.usage)),
  );
  const headers = {
    "Content-Type": behaviour.contentType ?? reply.manner.json,
    ...behaviour.headers,
  };
  if (fault?.kind === "raw") return sendBytes(reply, 200, headers, Buffer.from(fault.body), keep);
  if (fault?.kind !== "cut" && behaviour.wholePauseMs === 0) {
    return sendBytes(reply, 200, headers, body, keep);
  }
  if (fault?.kind !== "cut") {
    const half = Math.ceil(body.length / 2);
    keep(body);
    await reply.head(200, headers, { length: body.length });
    await reply.write(body.subarray(0, half));
    await pause(behaviour.wholePauseMs, reply.left);
    await reply.write(body.subarray(half));
    return reply.end();
  }
  const part = body.subarray(0, fault.afterBytes ?? Math.floor(body.length / 2));
  await reply.head(200, headers, fault.by === "eof" ? "chunked" : { length: body.length });
  keep(part);
  await reply.write(part);
  await endBy(reply, fault.by);
}

async function sendBytes(
  reply: Reply,
  status: number,
  headers: Record<string, string>,
  body: Buffer,
  keep: (bytes: Uint8Array) => void,
): Promise<void> {
  await reply.head(status, headers, { length: body.length });
  keep(body);
  await reply.write(body);
  await reply.end();
}

/** A string goes out as it is, anything else as JSON. */
export async function sendBody(
  reply: Reply,
  status: number,
  body: unknown,
  headers: Record<string, string> = {},
  keep: (bytes: Uint8Array) => void = () => {},
): Promise<void> {
  const isText = typeof body === "string";
  const bytes = Buffer.from(isText ? body : JSON.stringify(body));
  const type = isText ? "text/plain" : reply.manner.json;
  await sendBytes(reply, status, { "Content-Type": type, ...headers }, bytes, keep);
}

/** Faults that come instead of an answer; `false`: none of these, go on. */
export async function answerFault(
  reply: Reply,
  fault: Fault | null,
  keep: (bytes: Uint8Array) => void,
): Promise<boolean> {
  if (fault?.kind === "hang") {
    await pause(Number.POSITIVE_INFINITY, reply.left);
    return true;
  }
  if (fault?.kind === "drop") {
    if (fault.by === "reset") reply.reset();
    else reply.fin();
    return true;
  }
  if (fault?.kind !== "answer") return false;
  const isText = typeof fault.body === "string";
  const bytes = Buffer.from(isText ? (fault.body as string) : JSON.stringify(fault.body));
  const type = fault.contentType ?? (isText ? "text/plain" : "application/json");
  const headers = { "Content-Type": type, ...fault.headers };
  await reply.head(fault.status, headers, { length: fault.length ?? bytes.length });
  keep(bytes);
  await reply.write(bytes);
  if (fault.length === undefined || fault.length === bytes.length) await reply.end();
  else reply.fin();
  return true;
}
