import { printable } from "../errors.ts";
import type { RequestRecord } from "./record.ts";

export type Level = "debug" | "info" | "warn" | "error";
const RANK: Record<Level, number> = { debug: 10, info: 20, warn: 30, error: 40 };

export interface LogOptions {
  level: Level;
  /** JSON, one object per line; else text for a terminal. */
  json: boolean;
  colour: boolean;
  write: (line: string) => void;
}

/** The log on stdout. Never prompts, answers or secrets: callers pass only what may be read. */
export class Log {
  readonly #options: LogOptions;

  constructor(options: LogOptions) {
    this.#options = { ...options };
  }

  set level(level: Level) {
    this.#options.level = level;
  }

  debug(msg: string, fields?: object): void {
    this.#line("debug", msg, fields);
  }

  info(msg: string, fields?: object): void {
    this.#line("info", msg, fields);
  }

  warn(msg: string, fields?: object): void {
    this.#line("warn", msg, fields);
  }

  error(msg: string, fields?: object): void {
    this.#line("error", msg, fields);
  }

  /** The line of one request. Only our own mistakes are errors; `detail` is what the engine said. */
  request(record: RequestRecord, detail: string | null): void {
    const level = levelOf(record);
    if (RANK[level] < RANK[this.#options.level]) return;
    if (this.#options.json) {
      this.#line(level, "request", detail === null ? record : { ...record, detail });
    } else {
      this.#text(level, summary(record) + (detail === null ? "" : ` · ${detail}`));
    }
  }

  #line(level: Level, msg: string, fields: object = {}) {
    if (RANK[level] < RANK[this.#options.level]) return;
    if (this.#options.json) {
      const time = new Date().toISOString();
      this.#options.write(`${JSON.stringify({ time, level, msg, ...fields })}\n`);
    } else {
      const words = Object.entries(fields).flatMap(([key, value]) =>
        value === undefined ? [] : [`${key}=${JSON.stringify(value)}`],
      );
      this.#text(level, [msg, ...words].join(" "));
    }
  }

  #text(level: Level, text: string) {
    const time = new Date().toISOString().slice(11, 23);
    const codes: Record<Level, string> = { debug: "2", info: "36", warn: "33", error: "31" };
    const name = this.#options.colour ? `\u001B[${codes[level]}m${level}\u001B[0m` : level;
    this.#options.write(`${time} ${name} ${printable(text)}\n`);
  }
}

function levelOf(record: RequestRecord): Level {
  if (record.status === 500) return "error";
  return record.ending === "failed" ? "warn" : "info";
}

function summary(record: RequestRecord): string {
  const seconds = (record.latency_ms / 1000).toFixed(2);
  const parts = [
    `${record.status} ${record.endpoint} ${record.model ?? record.asked_model ?? "-"}`,
    `→ ${record.backend_id ?? "-"}`,
    `${seconds}s`,
  ];
  if (record.ttft !== null) parts.push(`ttft ${Math.round(record.ttft)}ms`);
  if (record.tokens_generated !== null) parts.push(`${record.tokens_generated} tokens`);
  if (record.ending !== "completed") parts.push(`${record.ending}: ${record.cause ?? "?"}`);
  if (record.attempts > 1) parts.push(`${record.attempts} attempts`);
  return parts.join(" ");
}
