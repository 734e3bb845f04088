// The load: raw sockets, prepared bytes, and every answer compared with what the engine sent.
// `bun bench/driver.ts --port N --mode request --count N --at-once N`
// `bun bench/driver.ts --port N --mode stream --at-once N --chunks N`
// prints one line of JSON, a `DriverReport`.
import { parseArgs } from "node:util";
import type { Socket } from "bun";
import { chatAnswer, MODEL, streamEvents } from "./engine.ts";

export interface DriverReport {
  /** Answers that came whole, byte for byte. */
  complete: number;
  /** Events in them, `[DONE]` included; 0 for answers that are not streams. */
  events: number;
  /** How often a socket had something to read: far fewer than events means that chunks were merged. */
  reads: number;
  connections: number;
  wallMs: number;
  failures: string[];
}

const PATIENCE_MS = 90_000;

const { values } = parseArgs({
  options: {
    port: { type: "string" },
    mode: { type: "string", default: "request" },
    count: { type: "string", default: "1000" },
    "at-once": { type: "string", default: "8" },
    chunks: { type: "string", default: "200" },
  },
});
const port = Number(values.port);
const streams = values.mode === "stream";
const atOnce = Number(values["at-once"]);
const chunks = Number(values.chunks);
const wanted = streams ? atOnce : Number(values.count);
const expectedEvents = streams ? streamEvents(chunks, false) : [chatAnswer()];
const expected = Buffer.from(expectedEvents.join(""));
const requestBytes = Buffer.from(buildRequest());

function buildRequest(): string {
  const sentence = "Please explain how a tide gate keeps the fields behind a dike dry. ";
  const body = JSON.stringify({
    model: MODEL,
    messages: [
      { role: "system", content: "You are a patient engineer who answers in plain words." },
      { role: "user", content: sentence.repeat(10) },
    ],
    temperature: 0.7,
    max_tokens: chunks,
    stream: streams,
  });
  return [
    "POST /v1/chat/completions HTTP/1.1",
    `host: 127.0.0.1:${port}`,
    "content-type: application/json",
    "authorization: Bearer bench",
    "user-agent: tidegate-bench",
    `content-length: ${Buffer.byteLength(body)}`,
    "",
    body,
  ].join("\r\n");
}

const CRLF = Buffer.from("\r\n");
const CRLF_CRLF = Buffer.from("\r\n\r\n");

/** Reads one HTTP answer out of a connection's bytes and compares its body with the expected one. */
class AnswerReader {
  #head: string | undefined;
  #held: Buffer = Buffer.alloc(0);
  #chunked = false;
  /** Left of the body, or of the current chunk with the line end behind it. */
  #left = 0;
  #position = 0;
  #inLastChunk = false;
  /** The server ends the connection behind this answer. */
  closes = false;

  /** True when the answer is whole. Throws when it is not the expected one. */
  feed(bytes: Buffer): boolean {
    let rest = this.#held.length === 0 ? bytes : Buffer.concat([this.#held, bytes]);
    this.#held = Buffer.alloc(0);
    if (this.#head === undefined) {
      const end = rest.indexOf(CRLF_CRLF);
      if (end < 0) return this.#hold(rest);
      this.#startBody(rest.toString("latin1", 0, end));
      rest = rest.subarray(end + CRLF_CRLF.length);
    }
    if (this.#chunked) return this.#feedChunks(rest);
    this.#compare(rest.subarray(0, this.#left));
    this.#left -= rest.length;
    return this.#left <= 0 && this.#isWhole();
  }

  #startBody(head: string): void {
    this.#head = head;
    if (!head.startsWith("HTTP/1.1 200")) throw new Error(head.slice(0, 300));
    this.closes = /\r\nconnection: *close/i.test(head);
    this.#chunked = /\r\ntransfer-encoding: *chunked/i.test(head);
    const length = /\r\ncontent-length: *(\d+)/i.exec(head)?.[1];
    if (!this.#chunked && length === undefined)
      throw new Error(`no framing: ${head.slice(0, 300)}`);
    this.#left = this.#chunked ? 0 : Number(length);
  }

  #feedChunks(bytes: Buffer): boolean {
    let rest = bytes;
    while (rest.length > 0) {
      if (this.#left === 0) {
        const lineEnd = rest.indexOf(CRLF);
        if (lineEnd < 0) return this.#hold(rest);
        const size = Number.parseInt(rest.toString("latin1", 0, lineEnd), 16);
        rest = rest.subarray(lineEnd + CRLF.length);
        this.#inLastChunk = size === 0;
        this.#left = size + CRLF.length;
      }
      this.#compare(rest.subarray(0, Math.max(0, this.#left - CRLF.length)));
      const taken = Math.min(this.#left, rest.length);
      this.#left -= taken;
      rest = rest.subarray(taken);
      if (this.#left === 0 && this.#inLastChunk) return this.#isWhole();
    }
    return false;
  }

  #hold(bytes: Buffer): false {
    this.#held = Buffer.from(bytes);
    return false;
  }

  #compare(part: Buffer): void {
    const end = this.#position + part.length;
    if (end > expected.length || part.compare(expected, this.#position, end) !== 0) {
      throw new Error(
        `not the engine's bytes at ${this.#position}: ${part.toString().slice(0, 300)}`,
      );
    }
    this.#position = end;
  }

  #isWhole(): true {
    if (this.#position === expected.length) return true;
    throw new Error(`ended after ${this.#position} of ${expected.length} bytes`);
  }
}

const report: DriverReport = {
  complete: 0,
  events: 0,
  reads: 0,
  connections: 0,
  wallMs: 0,
  failures: [],
};
let started = 0;

/** Keeps one client busy until no request is left; opens a new connection where the old one went. */
async function client(): Promise<void> {
  while (started < wanted && report.failures.length < 10) await connection();
}

function connection(): Promise<void> {
  report.connections++;
  const { promise, resolve } = Promise.withResolvers<void>();
  let answer: AnswerReader | undefined;
  const next = (socket: Socket): void => {
    if (started >= wanted) {
      socket.end();
      return resolve();
    }
    started++;
    answer = new AnswerReader();
    socket.write(requestBytes);
  };
  const fail = (problem: string): void => {
    if (answer !== undefined) report.failures.push(problem);
    answer = undefined;
    resolve();
  };
  Bun.connect({
    hostname: "127.0.0.1",
    port,
    socket: {
      open(socket) {
        socket.setNoDelay(true);
        next(socket);
      },
      data(socket, bytes) {
        report.reads++;
        try {
          if (answer?.feed(bytes) !== true) return;
        } catch (error) {
          fail(String(error));
          socket.end();
          return;
        }
        const { closes } = answer;
        answer = undefined;
        report.complete++;
        if (streams) report.events += expectedEvents.length;
        if (closes) socket.end();
        else next(socket);
      },
      close: () => fail("connection closed before the answer was whole"),
      error: (_socket, error) => fail(String(error)),
      connectError: (_socket, error) => {
        started++;
        report.failures.push(String(error));
        resolve();
      },
    },
  }).catch(() => {});
  return promise;
}

if (import.meta.main) {
  const startedAt = performance.now();
  const timer = setTimeout(() => {
    report.failures.push(
      `not done after ${PATIENCE_MS} ms: ${report.complete} of ${wanted} answers`,
    );
    finish();
  }, PATIENCE_MS);
  const finish = (): void => {
    clearTimeout(timer);
    report.wallMs = Math.round(performance.now() - startedAt);
    console.log(JSON.stringify(report));
    process.exit(0);
  };
  await Promise.all(Array.from({ length: atOnce }, client));
  finish();
}
