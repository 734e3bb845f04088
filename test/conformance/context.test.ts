/** A prompt that no backend can hold is refused here, with the limits; when in doubt the engine decides. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, send } from "../support/client.ts";
import { expectAnthropicError, expectError, startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 20_000 };
const SMALL = 1000;
const LARGE = 2000;

describe("context_length_exceeded", () => {
  let fleet: Fleet<"small" | "large" | "silent">;
  before(async () => {
    const backend = { healthInterval: 60_000 };
    const own = (name: string, contextLength: number) => ({ name, contextLength });
    fleet = await startFleet(
      {
        small: { kind: "vllm", models: [own("m", SMALL)], backend },
        large: {
          kind: "ollama",
          models: [own("m:1", LARGE), own("cold:1", LARGE)],
          backend: { ...backend, models: [{ name: "m", upstream: "m:1" }, "cold:1"] },
        },
        // It tells of no context.
        silent: { models: ["unknown"], backend },
      },
      { cache: { enabled: false }, models: { m: { aliases: ["alias"] } } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  /** At first 0.28 tokens count for a byte, so this many are about as many tokens. */
  const text = (tokens: number) => "word".repeat(Math.ceil(tokens / 0.28 / 4));
  const says = (content: unknown, more: object = {}) =>
    chatBody({ model: "m", messages: [{ role: "user", content }], ...more });
  const chat = (body: unknown) => send(`${fleet.url}/v1/chat/completions`, body);
  const sent = () => Object.values(fleet.engines).flatMap((engine) => engine.inference()).length;

  it("refuses above one and a half times the largest, and asks nobody", TIMEOUT, async () => {
    const answer = await chat(says(text(3.2 * SMALL), { model: "alias" }));
    const { message, param, type } = expectError(answer, 400, "context_length_exceeded");
    assert.equal(type, "invalid_request_error");
    assert.equal(param, "messages");
    assert.match(message, /about 32\d\d tokens.*"m" takes 2000 at most.*small: 1000, large: 2000/);
    assert.equal(sent(), 0);
    const record = await fleet.gateway.record(({ cause }) => cause === "context_length_exceeded");
    assert.deepEqual([record["status"], record["model"], record["attempts"]], [400, "m", 0]);
  });

  it("lets through what may fit somewhere", TIMEOUT, async () => {
    const answer = await chat(says(text(2.8 * SMALL)));
    assert.equal(answer.status, 200, answer.text);
  });

  it("does not count an answer that its client would let run on", TIMEOUT, async () => {
    assert.equal((await chat(says("short", { max_tokens: 1_000_000 }))).status, 200);
  });

  it("refuses nobody where a context is not known", TIMEOUT, async () => {
    assert.equal((await chat(says(text(9 * SMALL), { model: "unknown" }))).status, 200);
  });

  it("words it as each API does, streams included", TIMEOUT, async () => {
    // Whatever was learned of its tokens meanwhile.
    const long = text(40 * SMALL);
    const stream = await chat(says(long, { stream: true }));
    expectError(stream, 400, "context_length_exceeded");
    const messages = await send(`${fleet.url}/v1/messages`, {
      ...says(long),
      max_tokens: 5,
    });
    assert.match(expectAnthropicError(messages, 400, "invalid_request_error"), /about \d+ tokens/);
    const prompt = { model: "m", prompt: long };
    const completion = await send(`${fleet.url}/v1/completions`, prompt);
    assert.equal(expectError(completion, 400, "context_length_exceeded").param, "prompt");
    const input = { model: "m", input: long };
    const response = await send(`${fleet.url}/v1/responses`, input);
    assert.equal(expectError(response, 400, "context_length_exceeded").param, "input");
  });

  const innocent: [what: string, body: Record<string, unknown>][] = [
    [
      "images and sound",
      says([
        { type: "text", text: "what is this?" },
        { type: "image_url", image_url: { url: `data:image/png;base64,${text(9000)}` } },
        { type: "input_audio", input_audio: { data: text(9000), format: "wav" } },
      ]),
    ],
    [
      "a schema of the answer",
      says("hi", { response_format: { type: "json_schema", x: text(9000) } }),
    ],
    ["a prompt that is cut to fit", says(text(9000), { truncate_prompt_tokens: 100 })],
    [
      "thoughts of earlier answers",
      chatBody({
        model: "m",
        messages: [{ role: "assistant", content: "yes", reasoning_content: text(9000) }],
      }),
    ],
  ];
  for (const [what, body] of innocent) {
    it(`does not take ${what} for a long prompt`, TIMEOUT, async () => {
      const answer = await chat(body);
      assert.notEqual(
        answer.json()["error"] && expectError(answer, answer.status).code,
        "context_length_exceeded",
      );
      assert.equal(sent() > 0, true);
    });
  }

  it("takes escapes for the letters that they stand for", TIMEOUT, async () => {
    const escaped = String.raw`\u4f60`.repeat(2400);
    const body = `{"model":"m","messages":[{"role":"user","content":"${escaped}"}]}`;
    assert.equal((await chat(body)).status, 200);
  });

  it(
    "leaves lists of prompts, and what is embedded or ranked, to the engine",
    TIMEOUT,
    async () => {
      const many = Array.from({ length: 20 }, () => text(0.5 * SMALL));
      for (const [path, body] of [
        ["completions", { model: "m", prompt: many }],
        ["embeddings", { model: "m", input: many }],
        ["messages/count_tokens", says(text(9 * SMALL))],
      ] as const) {
        const before = sent();
        const answer = await send(`${fleet.url}/v1/${path}`, body);
        assert.doesNotMatch(answer.text, /prompt is about \d+ tokens/);
        assert(sent() > before, path);
      }
    },
  );

  it(
    "shows each backend's context in the snapshot, and the largest as the model's",
    TIMEOUT,
    async () => {
      const { models } = (await send(`${fleet.url}/admin/api/snapshot`)).json() as {
        models: { name: string; contextLength: number; targets: { contextLength: number }[] }[];
      };
      const m = models.find(({ name }) => name === "m");
      assert.equal(m?.contextLength, LARGE);
      assert.deepEqual(
        m?.targets.map(({ contextLength }) => contextLength),
        [SMALL, LARGE],
      );
    },
  );
});
