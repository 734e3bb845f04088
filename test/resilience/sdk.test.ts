/**
 * What a person's program sees of a cut: the official clients raise, although both of them take an end
 * without a word for success (wire §1.7).
 */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
import { seeded } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";
import type { Path, WholeStream } from "./corpus.ts";
import { corpus, paths } from "./corpus.ts";

const TIMEOUT = { timeout: 60_000 };
const CUTS = 50;
const random = seeded("sdk");

const streams = corpus();
const user = { role: "user", content: "x" } as const;

describe("official clients", () => {
  let fleet: Fleet<"a">;
  let openai: OpenAI;
  let anthropic: Anthropic;
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["m"], backend: { healthInterval: 60_000 } } },
      // Nothing but failures: no breaker may get between them and the client.
      { circuitBreaker: { failureThreshold: 1_000_000 } },
    );
    openai = new OpenAI({ baseURL: `${fleet.url}/v1`, apiKey: "none", maxRetries: 0 });
    anthropic = new Anthropic({ baseURL: fleet.url, apiKey: "none", maxRetries: 0 });
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  /** One stream as the client of this path opens it. */
  function open(path: Path): PromiseLike<AsyncIterable<unknown>> {
    const options = { stream_options: { include_usage: true } };
    const plain = { model: "m", stream: true } as const;
    switch (path) {
      case "/v1/chat/completions":
        return openai.chat.completions.create({ ...plain, messages: [user], ...options });
      case "/v1/completions":
        return openai.completions.create({ ...plain, prompt: "x", ...options });
      case "/v1/responses":
        return openai.responses.create({ ...plain, input: "x" });
      case "/v1/messages":
        return anthropic.messages.create({ ...plain, messages: [user], max_tokens: 9 });
    }
  }

  /** How many events came, and what it raised. */
  async function read(path: Path, body: Uint8Array): Promise<{ count: number; error: unknown }> {
    fleet.engines.a.behave({ fault: { kind: "raw", body }, chunking: random.pick(["once", 64]) });
    let count = 0;
    try {
      for await (const event of await open(path)) if (event !== null) count += 1;
    } catch (error) {
      return { count, error };
    }
    return { count, error: null };
  }

  function isRaised(path: Path, error: unknown): boolean {
    if (path === "/v1/messages") return error instanceof Anthropic.APIError;
    return error instanceof OpenAI.APIError;
  }

  /** Anthropic's client keeps pings to itself, OpenAI's reads no further than the end marker. */
  function eventsIn({ frames, path, ended }: WholeStream): number {
    const isAnthropic = path === "/v1/messages";
    const skipped = isAnthropic ? /event: ping/ : /\[DONE\]/;
    const read = path === "/v1/responses" ? frames : frames.slice(0, ended);
    return read.filter((frame) => frame.includes("data:") && !skipped.test(frame)).length;
  }

  for (const path of paths) {
    const own = streams.filter((stream) => stream.path === path);

    it(`${path}: whole streams are read without an error`, TIMEOUT, async () => {
      for (const stream of own) {
        const { count, error } = await read(path, Buffer.from(stream.frames.join("")));
        assert.equal(error, null, stream.name);
        assert.equal(count, eventsIn(stream), stream.name);
      }
    });

    it(`${path}: raises at ${CUTS} cuts`, TIMEOUT, async () => {
      let raised = 0;
      for (let cuts = 0; cuts < CUTS; cuts += 1) {
        const stream = random.pick(own);
        const bytes = Buffer.from(stream.frames.join(""));
        const wholeFrom = Buffer.byteLength(stream.frames.slice(0, stream.finished).join(""));
        const at = random.between(1, bytes.length - 1);
        const { error } = await read(path, bytes.subarray(0, at));
        const where = `${stream.name} at ${at} of ${bytes.length}: ${String(error)}`;
        assert.equal(error !== null, at < wholeFrom, where);
        if (error === null) continue;
        raised += 1;
        assert.ok(isRaised(path, error), where);
        assert.match(
          error instanceof Error ? error.message : "",
          /broke off|ended its stream|before (?:the|its) answer/,
          where,
        );
      }
      console.log(`sdk: ${path}: ${raised} of ${CUTS} raised, the others were whole`);
      assert.ok(raised > CUTS / 3);
    });
  }
});
