/** One set of expectations, held against a real engine and against the fake of its kind. */
import assert from "node:assert/strict";
import test from "node:test";
import type { Answer, Init } from "../support/client.ts";
import { parseSse, send } from "../support/client.ts";
import type { EngineOptions } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { Service } from "./support.ts";

export type Fields = Record<string, unknown>;

export interface Subject {
  url: string;
}

/** What a check is called, what it has to observe, and how. */
export type Check = [name: string, expected: unknown, observe: (at: Subject) => Promise<unknown>];

export const MESSAGES = [{ role: "user", content: "Write a very long story about the sea." }];
export const LONG = [{ role: "user", content: "word ".repeat(3000) }];
export const USAGE = { stream_options: { include_usage: true } };
export const SHORT = { max_tokens: 4 };

/** Runs every check against both; what the real one does otherwise, the fake does wrong. */
export function compare(
  name: string,
  skip: string | false,
  startReal: () => Promise<Service | Subject>,
  fake: EngineOptions,
  checks: Check[],
): void {
  const run = async (at: Subject, suite: test.TestContext): Promise<void> => {
    for (const [what, expected, observe] of checks) {
      await suite.test(what, async () => assert.deepEqual(await observe(at), expected));
    }
  };
  test(`${name}: the fake`, { timeout: 60_000 }, async (suite) => {
    const engine = await startEngine(fake);
    try {
      await run(engine, suite);
    } finally {
      await engine.close();
    }
  });
  test(`${name}: the real one`, { skip, timeout: 120_000 }, async (suite) => {
    const engine = await startReal();
    try {
      await run(engine, suite);
    } finally {
      if ("stop" in engine) await engine.stop();
    }
  });
}

/** On a connection of its own: llama-server closes used ones without a word (real §5.2). */
export function ask(url: string, body?: unknown, init: Init = {}): Promise<Answer> {
  return send(url, body, { ...init, headers: { ...init.headers, connection: "close" } });
}

export function isRecord(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

export function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Status and what kind of refusal, without the words that depend on the request. */
export function told({ status, text }: Answer): string {
  const body = parsed(text);
  if (!isRecord(body)) return `${status} ${text.slice(0, 40)}`.trim();
  if ("detail" in body) return `${status} ${JSON.stringify(body.detail)}`;
  const { error } = body;
  if (isRecord(error)) {
    const code = error.code === undefined ? "" : ` ${JSON.stringify(error.code)}`;
    const envelope = body.type === "error" ? " anthropic" : "";
    return `${status} ${String(error.type)}${code}${envelope}`;
  }
  if (error !== undefined && error !== null) return `${status} ${typeof error}`;
  return String(status);
}

export async function tellOf(
  at: Subject,
  requests: [path: string, body?: unknown][],
): Promise<Fields> {
  const answers: Fields = {};
  for (const [path, body] of requests) {
    const key = `${body === undefined ? "GET" : "POST"} ${path}`;
    answers[key in answers ? `${key} again` : key] = told(await ask(at.url + path, body));
  }
  return answers;
}

/** Every path once, by GET. */
export function look(paths: string): (at: Subject) => Promise<unknown> {
  return (at) =>
    tellOf(
      at,
      paths.split(" ").map((path) => [path]),
    );
}

/** Bodies by what they are about, all to one path. */
export function post(path: string, bodies: Fields): (at: Subject) => Promise<unknown> {
  return async (at) => {
    const answers: Fields = {};
    for (const [name, body] of Object.entries(bodies)) {
      answers[name] = told(await ask(at.url + path, body));
    }
    return answers;
  };
}

/** One event: what stands in it, not what it says. */
function signature({ event, data }: { event: string | null; data: string | null }): string {
  if (data === "[DONE]" || data === null) return String(data);
  const chunk = JSON.parse(data) as Fields;
  if (event !== null) return event;
  const [choice] = (chunk.choices ?? []) as Fields[];
  const content = isRecord(choice?.delta)
    ? Object.entries(choice.delta).map(([key, value]) => (value === null ? `${key}=null` : key))
    : [choice === undefined ? "no choice" : "text"];
  const finish = choice?.finish_reason ? ["finish"] : [];
  const more = ["usage", "timings"].filter((key) => isRecord(chunk[key]));
  return [...content, ...finish, ...more].join(" ");
}

/** The events of a stream, equal neighbours once. */
export function stream(path: string, body: Fields): (at: Subject) => Promise<unknown> {
  return async (at) => {
    const answer = await ask(at.url + path, { ...body, stream: true });
    const events = parseSse(answer.text).events.map(signature);
    return [
      answer.headers.get("content-type"),
      ...events.filter((each, index) => each !== events[index - 1]),
    ];
  };
}

export function keysOf(value: unknown): string {
  return isRecord(value) ? Object.keys(value).toSorted().join() : typeof value;
}

/** Keys of a whole answer, of its usage, and the values of some. */
export function whole(
  path: string,
  body: Fields,
  values: string[] = [],
): (at: Subject) => Promise<unknown> {
  return async (at) => {
    const json = (await ask(at.url + path, body)).json();
    return [keysOf(json), keysOf(json.usage), ...values.map((key) => json[key])];
  };
}

export async function jsonAt(at: Subject, path: string): Promise<Fields> {
  return (await ask(at.url + path)).json();
}

export const chatPath = "/v1/chat/completions";
