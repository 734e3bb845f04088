/** Real llama-servers behind the gateway: one named as the plain OpenAI kind, one to be recognised. */
import assert from "node:assert/strict";
import test from "node:test";
import { open, parseSse, readEvents, sleep, until } from "../support/client.ts";
import { startGateway } from "../support/gateway.ts";
import { cosine, missing, sdk, startLlamaServer, STORY } from "./support.ts";

const skip = missing("llama-server");

test("real llama-server", { skip, timeout: 120_000 }, async (suite) => {
  const smol = await startLlamaServer("smol-a");
  const minilm = await startLlamaServer("minilm");
  const gateway = await startGateway({
    config: {
      backends: [
        { id: "smol", kind: "openai", url: smol.url },
        { id: "embedder", url: `${minilm.url}/v1/` },
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
      assert.deepEqual(data.map(({ id }) => id).toSorted(), ["minilm", "smol-a"]);
      assert.equal((await client.models.retrieve("smol-a")).id, "smol-a");
    });

    await suite.test("answers and streams a chat", async () => {
      const answer = await client.chat.completions
        .create({ model: "smol-a", messages: STORY, max_tokens: 8 })
        .withResponse();
      assert.equal(answer.data.usage?.completion_tokens, 8);
      assert.equal(answer.response.headers.get("x-tidegate-backend"), "smol");
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
      const record = await gateway.record(({ ending }) => ending === "failed");
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
