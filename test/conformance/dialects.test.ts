/** Every kind of engine behind the gateway: what it says reaches the client as it said it. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { connect, postBytes, send, until } from "../support/client.ts";
import { expectError } from "../support/fleet.ts";
import type { House } from "./dialects.ts";
import {
  bodyFor,
  chatModel,
  chatPath,
  dialects,
  embedModel,
  kinds,
  rankModel,
  single,
  startHouse,
  ways,
  withoutUsage,
} from "./dialects.ts";

const TIMEOUT = { timeout: 60_000 };
const USAGE = { stream_options: { include_usage: true } };

interface Model {
  id: string;
  context_length?: number;
}

describe("dialects of engines", () => {
  let house: House;
  before(async () => {
    house = await startHouse();
  });
  afterEach(() => house.fleet.reset());
  after(() => house.close());

  it("probes load, wake and generate nothing", () => {
    for (const kind of kinds) {
      const { loads, requests } = house.engine(kind);
      assert.equal(loads.length, 0, kind);
      assert.ok(requests.length > 0, kind);
      const asked = requests.map(({ method, path }) => `${method} ${path}`);
      // wire §1.1, trap 15: SGLang generates for /health, llama.cpp wakes for /slots.
      const costly = asked.filter((each) => /\/health|\/slots|^POST (?!\/api\/show)/.test(each));
      assert.deepEqual(costly, [], kind);
    }
  });

  for (const way of ways) {
    for (const kind of kinds) {
      describe(`${kind}, ${way}`, () => {
        const ask = (path: string, more: object = {}): ReturnType<House["ask"]> =>
          house.ask(way, kind, path, more);

        it("is known for what it is, and listed", TIMEOUT, async () => {
          const { url } = house.gateways[way];
          const { backends } = (await send(`${url}/admin/api/snapshot`)).json() as {
            backends: { id: string; kind: string; health: string }[];
          };
          const backend = backends.find(({ id }) => id === kind);
          assert.deepEqual([backend?.kind, backend?.health], [house.engine(kind).kind, "healthy"]);
          const { data } = (await send(`${url}/v1/models`)).json() as { data: Model[] };
          const ids = data.map(({ id }) => id);
          for (const id of [chatModel(kind), embedModel(kind)]) {
            assert.equal(ids.filter((each) => each === id).length, 1, `${id} in ${ids.join()}`);
          }
        });

        for (const path of [chatPath, "/v1/completions"]) {
          it(`${path}: whole and streamed, byte for byte`, TIMEOUT, async () => {
            house.engine(kind).behave({ reasoning: ["hm"], cachedTokens: 1 });
            const whole = await ask(path);
            assert.equal(whole.status, 200, whole.text);
            assert.equal(whole.text, house.sent(kind));
            const asked = await ask(path, { stream: true, ...USAGE });
            assert.equal(asked.text, house.sent(kind));
            const plain = await ask(path, { stream: true });
            assert.notEqual(plain.text, "");
            assert.equal(plain.text, withoutUsage(house.sent(kind)));
          });
        }

        it("streams calls of tools as they came", TIMEOUT, async () => {
          const toolCalls = [{ name: "f", arguments: '{"city":"Zürich"}' }];
          house.engine(kind).behave({ tokens: 0, toolCalls });
          const { text } = await ask(chatPath, { stream: true, ...USAGE });
          assert.equal(text, house.sent(kind));
          assert.match(text, /"tool_calls":\[/);
        });

        it("counts tokens and tells how it ended", TIMEOUT, async () => {
          const { headers } = await ask(chatPath, { stream: true, max_tokens: 3 });
          const gateway = house.gateways[way];
          const record = await gateway.record(headers.get("x-request-id") ?? "");
          assert.deepEqual(
            [record.ending, record.tokens_generated, record.tokens_estimated],
            ["completed", 3, false],
          );
          assert.equal(typeof record.ttft, "number");
        });

        it("embeds, floats and base64", TIMEOUT, async () => {
          const engine = house.engine(kind, "embed");
          for (const format of [undefined, "float", "base64"]) {
            const answer = await ask("/v1/embeddings", {
              model: embedModel(kind),
              input: ["a", "b"],
              ...(format === undefined ? {} : { encoding_format: format }),
            });
            assert.equal(answer.status, 200, answer.text);
            assert.equal(answer.text, engine.inference().at(-1)?.sent().toString());
            const [first] = answer.json().data as { embedding: unknown }[];
            const isPacked = format === "base64" && dialects[kind].base64;
            assert.equal(typeof first?.embedding, isPacked ? "string" : "object");
          }
        });

        for (const path of ["/v1/messages", "/v1/responses"]) {
          it(`${path}: whole and streamed, byte for byte`, TIMEOUT, async () => {
            for (const stream of [false, true]) {
              const answer = await ask(path, { stream });
              assert.equal(answer.status, 200, answer.text);
              assert.equal(answer.text, house.sent(kind));
            }
          });
        }

        for (const path of ["/v1/messages/count_tokens", "/v1/rerank", "/v1/embeddings"]) {
          const isLacking = dialects[kind].lacks.includes(path);
          it(`${path}: ${isLacking ? "501" : "served"}`, TIMEOUT, async () => {
            const answer = await ask(path);
            // LM Studio says 400 of a model of the other type: in its words.
            const isOtherType = kind === "lmstudio" && path === "/v1/embeddings";
            if (isOtherType) assert.equal(answer.status, 400, answer.text);
            else if (!isLacking) assert.equal(answer.status, 200, answer.text);
            else if (path.startsWith("/v1/messages")) assert.equal(answer.status, 501);
            else expectError(answer, 501, "unsupported_endpoint");
          });
        }

        if (single.includes(kind)) {
          it("ranks, as it ranks", TIMEOUT, async () => {
            const answer = await ask("/v1/rerank", { model: rankModel(kind) });
            assert.equal(answer.status, 200, answer.text);
            const ranker = house.engine(kind, "rerank");
            assert.equal(answer.text, ranker.inference().at(-1)?.sent().toString());
          });
        }

        it("is loaded and woken by a request, and by nothing else", TIMEOUT, async () => {
          const engine = house.engine(kind);
          engine.behave({ loadMs: 30, sleeping: kind === "llamacpp" });
          const [first, second] = await Promise.all([ask(chatPath), ask(chatPath)]);
          assert.deepEqual([first.status, second.status], [200, 200]);
          const causes = engine.loads.map(({ by, result }) => `${by} ${result}`);
          assert.deepEqual(causes, [`POST ${chatPath} loaded`]);
        });

        it("is free as soon as the client has left", TIMEOUT, async () => {
          const engine = house.engine(kind);
          for (const stream of [true, false]) {
            engine.behave({ tokens: 5000, tokenDelayMs: 20 });
            const client = await connect(house.gateways[way].port);
            client.write(
              postBytes(chatPath, { ...bodyFor(chatPath, kind), max_tokens: 5000, stream }),
            );
            assert.ok(await until(() => engine.activeGenerations() === 1));
            if (stream) assert.ok(await until(() => /word1/.test(client.received())));
            client.leave("close");
            assert.ok(await until(() => engine.activeGenerations() === 0), `stream: ${stream}`);
            assert.ok(await until(() => engine.inference().at(-1)?.closedByClient === true));
          }
        });
      });
    }
  }
});
