/** A real Ollama behind the gateway, used through the official OpenAI SDK. */
import assert from "node:assert/strict";
import test from "node:test";
import { open, parseSse, send, sleep, until } from "../support/client.ts";
import { type Gateway, startGateway } from "../support/gateway.ts";
import {
  cosine,
  isFree,
  knownOf,
  missing,
  sdk,
  type Service,
  startOllama,
  STORY,
} from "./support.ts";

const skip = missing("ollama");

const HEALTH_MS = 100;
/** One for every load of a model in Ollama's log. */
const LOAD = /msg="starting llama-server"/;

let ollama: Service;
let gateway: Gateway;

async function withOllama(run: () => Promise<void>): Promise<void> {
  ollama = await startOllama();
  gateway = await startGateway({
    config: {
      backends: [{ id: "real", kind: "ollama", url: ollama.url, healthInterval: HEALTH_MS }],
    },
  });
  try {
    await run();
  } finally {
    await gateway.stop();
    await ollama.stop();
  }
}

test("real Ollama", { skip, timeout: 180_000 }, async (suite) => {
  await withOllama(async () => {
    const client = sdk(gateway.url);

    await suite.test("lists and retrieves its models", async () => {
      const { data } = await client.models.list();
      const ids = data.map(({ id }) => id);
      for (const id of ["smol-a:latest", "smol-b:latest", "minilm:latest"]) {
        assert.ok(ids.includes(id), ids.join());
      }
      const model = await client.models.retrieve("smol-a:latest");
      assert.equal(model.id, "smol-a:latest");
      assert.equal(model.object, "model");
      await assert.rejects(client.models.retrieve("nope"), {
        status: 404,
        code: "model_not_found",
      });
    });

    await suite.test("knows what is on disk, and its probes load nothing of it", async () => {
      await sleep(5 * HEALTH_MS);
      const known = await knownOf(gateway.url, "real");
      const facts = (name: string) => {
        const { residency, slots, vramBytes, contextLength, capabilities } = known.get(name) ?? {};
        return { residency, slots, vramBytes, contextLength, capabilities };
      };
      const cold = { residency: "cold", slots: 1, vramBytes: null };
      assert.deepEqual(facts("smol-a:latest"), {
        ...cold,
        contextLength: 8192,
        capabilities: ["completion"],
      });
      // Of this one /api/tags has no context and the wrong capability.
      assert.deepEqual(facts("minilm:latest"), {
        ...cold,
        contextLength: 512,
        capabilities: ["embedding"],
      });
      assert.doesNotMatch(ollama.output(), LOAD);
    });

    await suite.test("follows what is loaded and unloaded", async () => {
      const smol = async () => (await knownOf(gateway.url, "real")).get("smol-a:latest");
      const becomes = (wanted: string) =>
        until(async () => (await smol())?.residency === wanted, 5000);
      await client.chat.completions.create({ model: "smol-a", messages: STORY, max_tokens: 2 });
      assert.ok(await becomes("loaded"));
      const ps = (await send(`${ollama.url}/api/ps`)).json().models as [Record<string, unknown>];
      const known = await smol();
      assert.deepEqual(
        [known?.contextLength, known?.sizeBytes, known?.vramBytes, known?.digest],
        [2048, ps[0].size, ps[0].size_vram, ps[0].digest],
      );
      assert.equal((await knownOf(gateway.url, "real")).get("smol-b:latest")?.residency, "cold");
      await send(`${ollama.url}/api/generate`, { model: "smol-a", keep_alive: 0 });
      assert.ok(await becomes("cold"));
      await sleep(5 * HEALTH_MS);
      assert.equal(ollama.output().match(new RegExp(LOAD, "g"))?.length, 1);
    });

    await suite.test("says what Ollama cannot do, which itself says nothing", async () => {
      const call = { type: "function", function: { name: "f", parameters: { type: "object" } } };
      const image = { type: "image_url", image_url: { url: "http://127.0.0.1/x.png" } };
      const refused: [path: string, body: Record<string, unknown>, param: string][] = [
        ["chat/completions", { messages: STORY, n: 2 }, "n"],
        ["chat/completions", { messages: STORY, logit_bias: { "5": 1 } }, "logit_bias"],
        [
          "chat/completions",
          { messages: STORY, tools: [call], tool_choice: "required" },
          "tool_choice",
        ],
        ["chat/completions", { messages: [{ role: "user", content: [image] }] }, "messages"],
        ["completions", { prompt: ["a", "b"] }, "prompt"],
        ["embeddings", { input: [1, 2] }, "input"],
      ];
      for (const [path, body, param] of refused) {
        const wanted = { model: "smol-a", max_tokens: 1, ...body };
        const answer = await send(`${gateway.url}/v1/${path}`, wanted);
        const error = answer.json().error as Record<string, unknown>;
        assert.equal(answer.status, 400, answer.text);
        assert.deepEqual([error.code, error.param], ["unsupported_parameter", param]);
        assert.match(String(error.message), /ollama/);
      }
      const unable = await send(`${gateway.url}/v1/embeddings`, { model: "smol-a", input: "x" });
      assert.equal(unable.status, 501, unable.text);
      assert.match(unable.text, /"unsupported_endpoint"/);
    });

    await suite.test("answers a chat, with and without the tag", async () => {
      for (const model of ["smol-a:latest", "smol-a"]) {
        const answer = await client.chat.completions.create({
          model,
          messages: STORY,
          max_tokens: 8,
        });
        assert.ok((answer.choices[0]?.message.content ?? "").length > 0);
        assert.equal(answer.usage?.completion_tokens, 8);
        assert.equal(answer.choices[0]?.finish_reason, "length");
      }
    });

    await suite.test("streams a chat; usage only for who asks for it", async () => {
      for (const include of [undefined, true]) {
        const stream = await client.chat.completions.create({
          model: "smol-a",
          messages: STORY,
          max_tokens: 8,
          stream: true,
          ...(include === true ? { stream_options: { include_usage: true } } : {}),
        });
        let text = "";
        let finish: string | null = null;
        const usages: number[] = [];
        for await (const part of stream) {
          text += part.choices[0]?.delta.content ?? "";
          finish = part.choices[0]?.finish_reason ?? finish;
          if (part.usage) usages.push(part.usage.completion_tokens);
        }
        assert.ok(text.length > 0);
        assert.equal(finish, "length");
        assert.deepEqual(usages, include === true ? [8] : []);
      }
      await until(() => gateway.records().filter(({ stream }) => stream === true).length >= 2);
      for (const record of gateway.records().filter(({ stream }) => stream === true)) {
        assert.equal(record.tokens_generated, 8);
        assert.equal(record.tokens_estimated, false);
        assert.equal(record.ending, "completed");
        assert.ok(typeof record.ttft === "number" && record.ttft > 0);
      }
    });

    await suite.test("completes a text, streamed and not", async () => {
      const wanted = { model: "smol-a", prompt: "One, two, three,", max_tokens: 6 };
      const answer = await client.completions.create(wanted);
      assert.ok((answer.choices[0]?.text ?? "").length > 0);
      assert.equal(answer.usage?.completion_tokens, 6);
      const stream = await client.completions.create({ ...wanted, stream: true });
      let text = "";
      for await (const part of stream) text += part.choices[0]?.text ?? "";
      assert.ok(text.length > 0);
    });

    await suite.test("embeds: base64, which the SDK asks for by itself, and floats", async () => {
      const input = ["the tide is high", "the water is rising", "a bicycle chain"];
      const packed = await client.embeddings.create({ model: "minilm", input });
      const plain = await client.embeddings.create({
        model: "minilm",
        input,
        encoding_format: "float",
      });
      assert.equal(packed.data.length, 3);
      const vectors = plain.data.map(({ embedding }) => embedding);
      for (const [index, { embedding }] of packed.data.entries()) {
        assert.equal(embedding.length, 384);
        assert.ok(cosine(embedding, vectors[index] ?? []) > 0.9999);
      }
      const [tide = [], water = [], chain = []] = vectors;
      assert.ok(cosine(tide, water) > cosine(tide, chain));
    });

    await suite.test("honours max_completion_tokens, which Ollama ignores", async () => {
      const wanted = { model: "smol-a", messages: STORY, max_completion_tokens: 3 };
      const answer = await client.chat.completions.create(wanted, { timeout: 10_000 });
      assert.equal(answer.usage?.completion_tokens, 3);
      const stream = await client.chat.completions.create(
        { ...wanted, stream: true, stream_options: { include_usage: true } },
        { timeout: 10_000 },
      );
      let tokens = 0;
      for await (const part of stream) tokens = part.usage?.completion_tokens ?? tokens;
      assert.equal(tokens, 3);
    });

    await suite.test("a client that leaves frees the engine, streaming or not", async () => {
      const next = async (): Promise<number> => {
        const start = performance.now();
        await client.chat.completions.create({ model: "smol-a", messages: STORY, max_tokens: 1 });
        return performance.now() - start;
      };
      await next();
      const before = gateway.records().length;
      const stream = await client.chat.completions.create({
        model: "smol-a",
        messages: STORY,
        max_tokens: 1500,
        stream: true,
      });
      let parts = 0;
      for await (const _ of stream) {
        parts += 1;
        if (parts === 5) stream.controller.abort();
      }
      const afterStream = await next();
      assert.ok(afterStream < 2000, `served after ${afterStream} ms`);

      const leaving = new AbortController();
      const whole = client.chat.completions.create(
        { model: "smol-a", messages: STORY, max_tokens: 1500 },
        { signal: leaving.signal },
      );
      setTimeout(() => leaving.abort(), 500);
      await assert.rejects(whole);
      const afterWhole = await next();
      assert.ok(afterWhole < 2000, `served after ${afterWhole} ms`);
      const cancelled = () =>
        gateway
          .records()
          .slice(before)
          .filter(({ ending }) => ending === "cancelled");
      await until(() => cancelled().length === 2);
      assert.equal(cancelled().length, 2);
      assert.equal(cancelled()[0]?.cause, "streaming");
    });

    await suite.test("passes /v1/messages through, streamed and not", async () => {
      const wanted = { model: "smol-a", max_tokens: 8, messages: STORY };
      const init = { headers: { "anthropic-version": "2023-06-01" } };
      const answer = await send(`${gateway.url}/v1/messages`, wanted, init);
      assert.equal(answer.status, 200, answer.text);
      assert.equal(answer.json().type, "message");
      assert.equal((answer.json().usage as { output_tokens: number }).output_tokens, 8);
      const streamed = await open(`${gateway.url}/v1/messages`, { ...wanted, stream: true }, init);
      assert.match(streamed.headers.get("content-type") ?? "", /^text\/event-stream/);
      const names = parseSse(await streamed.text()).events.map(({ event }) => event);
      assert.equal(names[0], "message_start");
      assert.equal(names.at(-1), "message_stop");
      assert.ok(!names.includes("error"));
    });

    await suite.test("an engine's own 4xx keeps its status and words", async () => {
      const answer = await send(`${gateway.url}/v1/chat/completions`, {
        model: "minilm",
        messages: STORY,
      });
      assert.equal(answer.status, 400, answer.text);
      assert.match(answer.text, /does not support chat/);
    });
  });
});

test("real Ollama with a cap on its answers", { skip, timeout: 120_000 }, async (suite) => {
  const CAP = 30;
  const engine = await startOllama();
  const capped = await startGateway({
    config: {
      backends: [
        { id: "real", kind: "ollama", url: engine.url },
        // Taken for an engine that obeys `max_completion_tokens`, which it does not.
        {
          id: "plain",
          kind: "openai",
          url: engine.url,
          models: [{ name: "plain", upstream: "smol-a:latest" }],
        },
      ],
      models: { "smol-a:latest": { maxOutputTokens: CAP }, plain: { maxOutputTokens: CAP } },
    },
  });
  const bodies: Record<string, Record<string, unknown>> = {
    "chat/completions": { messages: STORY },
    completions: { prompt: "Write a very long story about the sea." },
    messages: { messages: STORY },
    responses: { input: "Write a very long story about the sea." },
  };
  // Cool enough to go on and on, and not so cold that answers are kept.
  const ask = (path: string, more: object) =>
    send(`${capped.url}/v1/${path}`, {
      model: "smol-a",
      temperature: 0.01,
      ...bodies[path],
      ...more,
    });
  try {
    for (const path of Object.keys(bodies)) {
      await suite.test(`${path} that would not end does, streaming or not`, async () => {
        const ways = [{}, { max_tokens: -1 }, { max_tokens: 0 }, { max_completion_tokens: 9000 }];
        for (const more of path === "responses" ? [{}, { max_output_tokens: 9000 }] : ways) {
          for (const stream of [false, true]) {
            const answer = await ask(path, { stream, ...more });
            assert.equal(answer.status, 200, answer.text);
            const record = await capped.record(answer.headers.get("x-request-id") ?? "");
            assert.equal(record.ending, "completed", answer.text);
            assert.equal(record.tokens_generated, CAP, JSON.stringify(more));
          }
        }
      });
    }

    await suite.test(
      "a stream that takes no notice of it is ended, and the engine free",
      async () => {
        const wanted = { model: "plain", max_completion_tokens: 10, stream: true };
        const answer = await ask("chat/completions", wanted);
        const { events } = parseSse(answer.text);
        const error = JSON.parse(events.at(-1)?.data ?? "") as { error: { code: string } };
        assert.equal(error.error.code, "output_limit_exceeded");
        assert.doesNotMatch(answer.text, /\[DONE\]/);
        const tokens = events.filter(({ data }) => /"content":"[^"]/.test(data ?? ""));
        assert.equal(tokens.length, 33, "1.1 times the cap");
        const start = performance.now();
        await ask("chat/completions", { max_tokens: 1 });
        const after = performance.now() - start;
        assert.ok(after < 3000, `served after ${after} ms`);
      },
    );

    await suite.test("a key in other letters is no way around it", async () => {
      for (const more of [{ Max_Tokens: 200 }, { MAX_TOKENS: 200, max_tokens: 5 }]) {
        const answer = await ask("chat/completions", more);
        const tokens = (answer.json().usage as { completion_tokens: number } | undefined)
          ?.completion_tokens;
        assert.ok(answer.status === 400 || Number(tokens) <= CAP, answer.text);
      }
    });
  } finally {
    await capped.stop();
    await engine.stop();
  }
});

test("real Ollama, found without configuration", { skip, timeout: 60_000 }, async () => {
  if (!(await isFree(11434))) {
    console.log("skipped: discovery of Ollama: port 11434 is taken on this machine");
    return;
  }
  const found = await startOllama(11434);
  const discovering = await startGateway({ config: {} });
  try {
    const client = sdk(discovering.url);
    const { data } = await client.models.list();
    assert.ok(data.some(({ id }) => id === "smol-a:latest"));
    const answer = await client.chat.completions
      .create({ model: "smol-a", messages: STORY, max_tokens: 3 })
      .withResponse();
    assert.equal(answer.data.usage?.completion_tokens, 3);
    assert.match(answer.response.headers.get("x-tidegate-backend") ?? "", /ollama/);
  } finally {
    await discovering.stop();
    await found.stop();
  }
});
