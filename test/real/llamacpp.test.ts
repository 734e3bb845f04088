/** Real llama-servers behind the gateway: with one model, with one that embeds, as a router over two. */
import assert from "node:assert/strict";
import test from "node:test";
import { open, parseSse, readEvents, send, sleep, until } from "../support/client.ts";
import { startGateway } from "../support/gateway.ts";
import {
  cosine,
  knownOf,
  missing,
  sdk,
  startLlamaRouter,
  startLlamaServer,
  STORY,
} from "./support.ts";

const skip = missing("llama-server");
const PLAIN = { name: "plain", upstream: "smol-a" };

type Fields = Record<string, unknown>;

async function get(url: string): Promise<Fields> {
  return (await (await fetch(url)).json()) as Fields;
}

/** The first card of /v1/models. */
async function cardOf(url: string): Promise<{ meta: { n_ctx: number; size: number } }> {
  const { data } = await get(`${url}/v1/models`);
  return (data as [{ meta: { n_ctx: number; size: number } }])[0];
}

test("real llama-server", { skip, timeout: 120_000 }, async (suite) => {
  const smol = await startLlamaServer("smol-a");
  const minilm = await startLlamaServer("minilm");
  const gateway = await startGateway({
    config: {
      backends: [
        { id: "smol", kind: "llamacpp", url: smol.url },
        { id: "embedder", url: `${minilm.url}/v1/` },
        // The same server as one of which nothing is known but that it speaks OpenAI's API.
        { id: "plain", kind: "openai", url: smol.url, models: [PLAIN] },
      ],
    },
  });
  const client = sdk(gateway.url);
  const busySlots = async (): Promise<number> => {
    const slots = (await (await fetch(`${smol.url}/slots`)).json()) as { is_processing: boolean }[];
    return slots.filter((slot) => slot.is_processing).length;
  };

  try {
    await suite.test("lists and retrieves its models", async () => {
      const { data } = await client.models.list();
      assert.deepEqual(data.map(({ id }) => id).toSorted(), ["minilm", "plain", "smol-a"]);
      assert.equal((await client.models.retrieve("smol-a")).id, "smol-a");
    });

    await suite.test("knows of them what the engine tells", async () => {
      for (const [backend, model, { url }, capability] of [
        ["smol", "smol-a", smol, "completion"],
        ["embedder", "minilm", minilm, "embedding"],
      ] as const) {
        const { total_slots } = await get(`${url}/props`);
        const { meta } = await cardOf(url);
        const known = (await knownOf(gateway.url, backend)).get(model);
        assert.deepEqual(known, {
          backend,
          model,
          residency: "loaded",
          slots: total_slots,
          sizeBytes: meta.size,
          vramBytes: null,
          digest: null,
          contextLength: meta.n_ctx,
          capabilities: [capability],
        });
      }
      const plain = (await knownOf(gateway.url, "plain")).get("plain");
      assert.deepEqual([plain?.contextLength, plain?.slots], [2048, 32]);
    });

    await suite.test("says clearly what a request cannot have", async () => {
      const content = [
        { type: "image_url", image_url: { url: "data:image/png;base64,iVBORw0KGgo=" } },
      ];
      const words = "word ".repeat(1500);
      const refused: [path: string, body: Fields, status: number, code: string][] = [
        ["embeddings", { model: "minilm", input: words }, 400, "context_length_exceeded"],
        ["chat/completions", { model: "minilm", messages: STORY }, 501, "unsupported_endpoint"],
        [
          "chat/completions",
          { model: "minilm", messages: STORY, stream: true },
          501,
          "unsupported_endpoint",
        ],
        ["embeddings", { model: "smol-a", input: "x" }, 501, "unsupported_endpoint"],
        ["rerank", { model: "smol-a", query: "x", documents: ["y"] }, 501, "unsupported_endpoint"],
        [
          "chat/completions",
          { model: "smol-a", messages: [{ role: "user", content }] },
          400,
          "unsupported_parameter",
        ],
        [
          "chat/completions",
          { model: "smol-a", messages: [{ role: "user", content: words.repeat(2) }] },
          400,
          "context_length_exceeded",
        ],
      ];
      for (const [path, body, status, code] of refused) {
        const answer = await send(`${gateway.url}/v1/${path}`, { max_tokens: 1, ...body });
        assert.equal(answer.status, status, answer.text);
        assert.equal((answer.json().error as Fields).code, code, answer.text);
      }
    });

    await suite.test("makes several choices at once", async () => {
      const wanted = { model: "smol-a", messages: STORY, max_tokens: 4, n: 2 };
      assert.equal((await client.chat.completions.create(wanted)).choices.length, 2);
    });

    await suite.test("answers and streams a chat", async () => {
      for (const [model, backend] of [
        ["smol-a", "smol"],
        ["plain", "plain"],
      ] as const) {
        const answer = await client.chat.completions
          .create({ model, messages: STORY, max_tokens: 8 })
          .withResponse();
        assert.equal(answer.data.usage?.completion_tokens, 8);
        assert.equal(answer.response.headers.get("x-tidegate-backend"), backend);
      }
      for (const include of [undefined, true]) {
        const stream = await client.chat.completions.create({
          model: "smol-a",
          messages: STORY,
          max_completion_tokens: 8,
          stream: true,
          ...(include === true ? { stream_options: { include_usage: true } } : {}),
        });
        let text = "";
        const usages: number[] = [];
        for await (const part of stream) {
          text += part.choices[0]?.delta.content ?? "";
          if (part.usage) usages.push(part.usage.completion_tokens);
        }
        assert.ok(text.length > 0);
        assert.deepEqual(usages, include === true ? [8] : []);
      }
    });

    await suite.test("completes a text", async () => {
      const answer = await client.completions.create({
        model: "smol-a",
        prompt: "One, two, three,",
        max_tokens: 6,
      });
      assert.ok((answer.choices[0]?.text ?? "").length > 0);
    });

    await suite.test("embeds, base64 and floats", async () => {
      const input = ["the tide is high", "a bicycle chain"];
      const packed = await client.embeddings.create({ model: "minilm", input });
      const plain = await client.embeddings.create({
        model: "minilm",
        input,
        encoding_format: "float",
      });
      for (const [index, { embedding }] of packed.data.entries()) {
        assert.equal(embedding.length, 384);
        assert.ok(cosine(embedding, plain.data[index]?.embedding ?? []) > 0.9999);
      }
    });

    await suite.test("a client that leaves frees its slot, streaming or not", async () => {
      for (const stream of [true, false]) {
        const leaving = new AbortController();
        const wanted = { model: "smol-a", messages: STORY, max_tokens: 1500, stream };
        const answer = open(`${gateway.url}/v1/chat/completions`, wanted, {
          signal: leaving.signal,
          headers: { "x-conversation-id": "must not reach llama.cpp" },
        }).then((response) => response.text());
        answer.catch(() => {});
        assert.ok(await until(async () => (await busySlots()) === 1, 5000));
        leaving.abort();
        // For a whole answer llama-server looks for its client after a second without any result;
        // each look at /slots is one, so asking more often would keep the slot busy.
        for (let look = 0; look < 3 && (look === 0 || (await busySlots()) > 0); look += 1) {
          await sleep(stream ? 200 : 1300);
        }
        assert.equal(await busySlots(), 0, stream ? "streaming" : "not streaming");
      }
    });

    // The last one: it ends the engine.
    await suite.test("an engine killed in mid-stream ends in an error event", async () => {
      const answer = await open(`${gateway.url}/v1/chat/completions`, {
        model: "smol-a",
        messages: STORY,
        max_tokens: 1500,
        stream: true,
      });
      let raw = "";
      let events = 0;
      for await (const event of readEvents(answer)) {
        raw += event.raw;
        events += 1;
        if (events === 5) smol.kill("SIGKILL");
      }
      const last = parseSse(raw).events.at(-1);
      assert.match(last?.data ?? "", /^\{"error":/, raw.slice(-500));
      const { error } = JSON.parse(last?.data ?? "") as { error: { code: string } };
      assert.equal(error.code, "upstream_incomplete");
      assert.doesNotMatch(raw, /\[DONE\]/);
      const record = await gateway.record(
        ({ ending, status }) => ending === "failed" && status === 200,
      );
      assert.equal(record.cause, "upstream_incomplete");

      await assert.rejects(
        client.chat.completions.create({ model: "smol-a", messages: STORY, max_tokens: 1 }),
        ({ status }: { status: number }) => status === 502 || status === 503,
      );
      const { data } = await client.embeddings.create({ model: "minilm", input: "still here" });
      assert.equal(data[0]?.embedding.length, 384);
    });
  } finally {
    await gateway.stop();
    await smol.stop();
    await minilm.stop();
  }
});

test("real llama-server with a key", { skip, timeout: 60_000 }, async () => {
  const engine = await startLlamaServer("smol-a", "--api-key", "K");
  const backend = { kind: "llamacpp", url: engine.url, healthInterval: 100 };
  const gateway = await startGateway({
    config: {
      backends: [
        { id: "told", apiKey: "K", ...backend },
        { id: "untold", ...backend },
      ],
    },
  });
  try {
    assert.equal((await knownOf(gateway.url, "told")).get("smol-a")?.slots, 2);
    const { backends } = await get(`${gateway.url}/admin/api/snapshot`);
    const reasons = Object.fromEntries(
      (backends as { id: string; reason: string }[]).map(({ id, reason }) => [id, reason]),
    );
    assert.equal(reasons.told, "");
    assert.match(reasons.untold ?? "", /401 at \/v1\/models: set this backend's apiKey/);
    const answer = await sdk(gateway.url)
      .chat.completions.create({ model: "smol-a", messages: STORY, max_tokens: 2 })
      .withResponse();
    assert.equal(answer.response.headers.get("x-tidegate-backend"), "told");
  } finally {
    await gateway.stop();
    await engine.stop();
  }
});

test("real llama-server with a cap on its answers", { skip, timeout: 120_000 }, async (suite) => {
  const CAP = 12;
  const engine = await startLlamaServer("smol-a");
  const gateway = await startGateway({
    config: {
      backends: [{ id: "smol", kind: "llamacpp", url: engine.url }],
      models: { "smol-a": { maxOutputTokens: CAP } },
    },
  });
  // This makes the engine itself go on for ever.
  const endless = { model: "smol-a", ignore_eos: true };
  const bodies: Record<string, Fields> = {
    "chat/completions": { ...endless, messages: STORY },
    completions: { ...endless, prompt: "One, two, three," },
    messages: { ...endless, messages: STORY },
    responses: { ...endless, input: "Write a very long story about the sea." },
  };
  /** Tokens of the answer, as the engine itself counts them. */
  const generated = async (path: string, more: Fields): Promise<number> => {
    const answer = await send(`${gateway.url}/v1/${path}`, { ...bodies[path], ...more });
    assert.equal(answer.status, 200, answer.text);
    const record = await gateway.record(answer.headers.get("x-request-id") ?? "");
    assert.deepEqual([record.ending, record.tokens_estimated], ["completed", false], answer.text);
    return Number(record.tokens_generated);
  };
  try {
    for (const path of Object.keys(bodies)) {
      await suite.test(`${path} that would not end does, streaming or not`, async () => {
        const ways: Fields[] = [{}, { n_predict: -1 }, { max_tokens: -1 }, { max_tokens: 0 }];
        ways.push({ max_completion_tokens: 9000 }, { max_output_tokens: 9000, n_predict: 9000 });
        for (const more of ways) {
          for (const stream of [false, true]) {
            const options = path.includes("completions") ? { include_usage: true } : undefined;
            const tokens = await generated(path, { stream, stream_options: options, ...more });
            assert.equal(tokens, CAP, JSON.stringify(more));
          }
        }
      });
    }

    await suite.test("less is less, in whatever field", async () => {
      assert.equal(await generated("chat/completions", { max_tokens: 5 }), 5);
      assert.equal(await generated("chat/completions", { max_completion_tokens: 6 }), 6);
      assert.equal(await generated("chat/completions", { n_predict: 7 }), 7);
      assert.equal(await generated("completions", { n_predict: 8 }), 8);
      assert.equal(await generated("responses", { max_output_tokens: 9 }), 9);
      assert.equal(await generated("messages", { max_tokens: 10 }), 10);
    });
  } finally {
    await gateway.stop();
    await engine.stop();
  }
});

test("real llama-server as a router", { skip, timeout: 120_000 }, async (suite) => {
  const HEALTH_MS = 100;
  const router = await startLlamaRouter();
  const gateway = await startGateway({
    // No kind: it has to be recognised.
    config: { backends: [{ id: "router", url: router.url, healthInterval: HEALTH_MS }] },
  });
  const client = sdk(gateway.url);
  const residency = async () => {
    const known = await knownOf(gateway.url, "router");
    return Object.fromEntries([...known].map(([name, each]) => [name, each.residency]));
  };
  /** The truth. */
  const status = async () => {
    const { data } = await get(`${router.url}/v1/models`);
    const cards = data as { id: string; status: { value: string } }[];
    return Object.fromEntries(cards.map((card) => [card.id, card.status.value]));
  };
  const loads = () =>
    [...router.output().matchAll(/spawning server instance with name=(\S+)/g)].map(
      ([, name]) => name,
    );
  const chat = (model: string) =>
    client.chat.completions.create({ model, messages: STORY, max_tokens: 3 });

  try {
    await suite.test("probes load nothing", async () => {
      await sleep(5 * HEALTH_MS);
      assert.deepEqual(await residency(), { "smol-a": "cold", "smol-b": "cold" });
      assert.deepEqual(await status(), { "smol-a": "unloaded", "smol-b": "unloaded" });
      assert.deepEqual(loads(), []);
      const { backends } = await get(`${gateway.url}/admin/api/snapshot`);
      assert.equal((backends as [{ kind: string }])[0].kind, "llamacpp");
    });

    await suite.test("knows what a model will have before it is loaded", async () => {
      const known = (await knownOf(gateway.url, "router")).get("smol-a");
      assert.deepEqual([known?.slots, known?.contextLength], [1, 1024]);
    });

    await suite.test("follows a switch from one model to the other", async () => {
      for (const [model, other] of [
        ["smol-a", "smol-b"],
        ["smol-b", "smol-a"],
      ] as const) {
        await chat(model);
        const follows = async () => (await residency())[model] === "loaded";
        assert.ok(await until(follows, 5000), JSON.stringify(await residency()));
        assert.deepEqual(await residency(), { [model]: "loaded", [other]: "cold" });
        assert.deepEqual(await status(), { [model]: "loaded", [other]: "unloaded" });
        const props = await get(`${router.url}/props?model=${model}&autoload=false`);
        const known = (await knownOf(gateway.url, "router")).get(model);
        assert.equal(known?.slots, props.total_slots);
        assert.equal(known?.contextLength, 1024);
        assert.ok((known?.sizeBytes ?? 0) > 90_000_000);
      }
    });

    await suite.test("shows a model on its way, and leaves the other alone", async () => {
      const answer = chat("smol-a");
      const seen = new Set<string | undefined>();
      await until(async () => {
        const now = await residency();
        seen.add(now["smol-a"]);
        return now["smol-a"] === "loaded";
      }, 10_000);
      await answer;
      assert.ok(seen.has("loading"), [...seen].join());
      await sleep(5 * HEALTH_MS);
      assert.deepEqual(await residency(), { "smol-a": "loaded", "smol-b": "cold" });
      assert.deepEqual(loads(), ["smol-a", "smol-b", "smol-a"], "only what was asked for");
    });
  } finally {
    await gateway.stop();
    await router.stop();
  }
});
