/** Which models there are, and which one a name means (design §3, contract §5). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, openaiChat, send, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const SLASHES = "meta-llama/Llama-3.1-8B/Instruct";
const OLLAMA_MODELS = [
  "llama3:8b",
  "mistral:7b",
  "phi:latest",
  "phi:3b",
  "qwen2.5:14b",
  "qwen2.5:7b",
];

interface Card {
  id: string;
  object: string;
  created: number;
  owned_by: string;
}

describe("models", () => {
  let fleet: Fleet<"ollama" | "plain" | "named">;
  before(async () => {
    fleet = await startFleet(
      {
        ollama: { kind: "ollama", models: OLLAMA_MODELS, backend: { healthInterval: 200 } },
        plain: { models: [SLASHES, "mistral:7b"] },
        named: {
          models: ["engine-name", "not-offered"],
          backend: { models: [{ name: "public-name", upstream: "engine-name" }] },
        },
      },
      { models: { "llama3:8b": { aliases: ["default", "gpt-4o"] } } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const listed = async (): Promise<string[]> => {
    const { data } = (await send(`${fleet.url}/v1/models`)).json() as { data: Card[] };
    return data.map(({ id }) => id);
  };
  const servedBy = async (model: string): Promise<{ backend: string; upstream: unknown }> => {
    const answer = await openaiChat(fleet.url, { model });
    assert.equal(answer.status, 200, answer.text);
    const backend = answer.headers.get("x-tidegate-backend") as "ollama" | "plain" | "named";
    return { backend, upstream: fleet.engines[backend].inference().at(-1)?.json.model };
  };

  it("lists each model once, in OpenAI's shape", TIMEOUT, async () => {
    const answer = await send(`${fleet.url}/v1/models`);
    assert.equal(answer.status, 200);
    const { object, data } = answer.json() as { object: string; data: Card[] };
    assert.equal(object, "list");
    const ids = data.map(({ id }) => id);
    for (const name of [...OLLAMA_MODELS, SLASHES, "public-name"])
      assert.ok(ids.includes(name), name);
    assert.equal(new Set(ids).size, ids.length, "ids are unique");
    assert.ok(!ids.includes("engine-name") && !ids.includes("not-offered"), "only what is named");
    for (const card of data) {
      assert.equal(card.object, "model");
      assert.ok(Number.isInteger(card.created), `created of ${card.id}`);
      assert.equal(typeof card.owned_by, "string");
    }
  });

  it("lists them in Anthropic's shape for Anthropic's clients", TIMEOUT, async () => {
    const answer = await send(`${fleet.url}/v1/models`, undefined, {
      headers: { "anthropic-version": "2023-06-01" },
    });
    const body = answer.json() as {
      data: { type: string; id: string; display_name: string; created_at: string }[];
      has_more: boolean;
      first_id: string;
      last_id: string;
    };
    assert.equal(body.has_more, false);
    assert.equal(body.first_id, body.data[0]?.id);
    assert.equal(body.last_id, body.data.at(-1)?.id);
    for (const { type, id, display_name, created_at } of body.data) {
      assert.equal(type, "model");
      assert.ok(id.length > 0 && display_name.length > 0);
      assert.ok(!Number.isNaN(Date.parse(created_at)), created_at);
    }
    assert.ok(answer.headers.get("request-id") !== null);
  });

  it("shows one model, its id with slashes raw or encoded", TIMEOUT, async () => {
    for (const path of [SLASHES, encodeURIComponent(SLASHES), "llama3:8b", "llama3%3A8b"]) {
      const answer = await send(`${fleet.url}/v1/models/${path}`);
      assert.equal(answer.status, 200, path);
      assert.equal(answer.json().id, decodeURIComponent(path));
      assert.equal(answer.json().object, "model");
    }
    const anthropic = await send(`${fleet.url}/v1/models/${SLASHES}`, undefined, {
      headers: { "anthropic-version": "2023-06-01" },
    });
    assert.equal(anthropic.json().type, "model");
    expectError(await send(`${fleet.url}/v1/models/nope`), 404, "model_not_found");
    expectError(await send(`${fleet.url}/v1/models/%E0%A4%A`), 404);
  });

  it("answers the seed document's command literally", TIMEOUT, async () => {
    const command =
      '{"model":"llama3","messages":[{"role":"user","content":"Hello!"}],"stream":true}';
    const streamed = await send(`${fleet.url}/v1/chat/completions`, command);
    assert.equal(streamed.status, 200);
    assert.ok(streamed.text.endsWith("data: [DONE]\n\n"));
    const whole = await send(
      `${fleet.url}/v1/chat/completions`,
      '{"model":"llama3","messages":[{"role":"user","content":"Hello!"}]}',
    );
    const [choice] = whole.json().choices as { message: { content: string } }[];
    assert.equal(choice?.message.content, "word0 word1 word2 word3 word4");
  });

  it("completes a name without a tag: :latest, else the only tag", TIMEOUT, async () => {
    assert.deepEqual(await servedBy("llama3"), { backend: "ollama", upstream: "llama3:8b" });
    assert.deepEqual(await servedBy("phi"), { backend: "ollama", upstream: "phi:latest" });
    const answer = await openaiChat(fleet.url, { model: "llama3" });
    assert.equal(answer.headers.get("x-tidegate-model"), "llama3:8b");
    const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
    assert.deepEqual([record.model, record.asked_model], ["llama3:8b", "llama3"]);
  });

  it("serves a full name, an alias, a renamed model, an id with slashes", TIMEOUT, async () => {
    assert.deepEqual(await servedBy("phi:3b"), { backend: "ollama", upstream: "phi:3b" });
    assert.deepEqual(await servedBy("default"), { backend: "ollama", upstream: "llama3:8b" });
    assert.deepEqual(await servedBy("gpt-4o"), { backend: "ollama", upstream: "llama3:8b" });
    assert.deepEqual(await servedBy("public-name"), { backend: "named", upstream: "engine-name" });
    assert.deepEqual(await servedBy(SLASHES), { backend: "plain", upstream: SLASHES });
  });

  it("says what was perhaps meant, and asks no engine", TIMEOUT, async () => {
    const typo = expectError(
      await openaiChat(fleet.url, { model: "lama3:8b" }),
      404,
      "model_not_found",
    );
    assert.equal(typo.type, "invalid_request_error");
    assert.equal(typo.param, "model");
    assert.match(typo.message, /llama3:8b/);
    const ambiguous = await openaiChat(fleet.url, { model: "qwen2.5" });
    assert.match(expectError(ambiguous, 404, "model_not_found").message, /qwen2\.5:(7b|14b)/);
    expectError(await openaiChat(fleet.url, { model: "engine-name" }), 404, "model_not_found");
    for (const engine of Object.values(fleet.engines)) assert.equal(engine.inference().length, 0);
    const record = await fleet.gateway.record(({ asked_model }) => asked_model === "lama3:8b");
    assert.deepEqual([record.status, record.model, record.backend_id], [404, null, null]);
    assert.equal(record.cause, "model_not_found");
  });

  it("cuts what a client calls a model before repeating it", TIMEOUT, async () => {
    const model = `evil\u0007\u001b[31m${"x".repeat(5000)}`;
    const { message } = expectError(await openaiChat(fleet.url, { model }), 404, "model_not_found");
    assert.ok(message.length < 400, `${message.length} characters`);
    // oxlint-disable-next-line no-control-regex -- the very thing that must not come back
    assert.doesNotMatch(message, /[\u0000-\u001f]/);
  });

  it("learns of a model that comes, and of one that goes", TIMEOUT, async () => {
    fleet.engines.ollama.setModels([...OLLAMA_MODELS, "gemma:2b"]);
    assert.ok(await until(async () => (await listed()).includes("gemma:2b")));
    assert.deepEqual(await servedBy("gemma"), { backend: "ollama", upstream: "gemma:2b" });
    fleet.engines.ollama.setModels(OLLAMA_MODELS);
    assert.ok(await until(async () => !(await listed()).includes("gemma:2b")));
  });
});

describe("models that only some backends may serve", () => {
  it("keeps to models.<name>.backends and to a backend's own list", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: { models: ["m", "other"] }, b: { models: ["m", "other"], backend: { models: ["m"] } } },
      { models: { m: { backends: ["b"] } } },
    );
    try {
      for (let count = 0; count < 4; count += 1) {
        const shared = await openaiChat(fleet.url, { model: "m" });
        assert.equal(shared.headers.get("x-tidegate-backend"), "b");
        const own = await send(`${fleet.url}/v1/chat/completions`, chatBody({ model: "other" }));
        assert.equal(own.headers.get("x-tidegate-backend"), "a");
      }
    } finally {
      await fleet.close();
    }
  });

  it("lists nothing, as an empty list, where an Ollama is empty (wire §1.2)", TIMEOUT, async () => {
    const fleet = await startFleet({ empty: { kind: "ollama", models: [] } });
    try {
      assert.deepEqual((await send(`${fleet.url}/v1/models`)).json(), { object: "list", data: [] });
      expectError(await openaiChat(fleet.url, { model: "any" }), 404, "model_not_found");
    } finally {
      await fleet.close();
    }
  });
});
