/** Options that would have Ollama load a model anew stay here, and the answer says so (contract §3). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, parseSse, send, until } from "../support/client.ts";
import { startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 20_000 };
/** As a client may write it: numbers that no parser may touch, fields nobody knows. */
const BODY =
  '{ "model" : "m:1", "messages":[{"role":"user","content":"num_ctx"}], "odd": 1.50,\n' +
  ' "options" : {"num_ctx": 8192, "seed": 12345678901234567890, "Num_GPU":1, "x": 1E+2}, "keep_alive": 0 }';
const LEFT =
  '{ "model" : "m:1", "messages":[{"role":"user","content":"num_ctx"}], "odd": 1.50,\n' +
  ' "options" : {"seed": 12345678901234567890, "x": 1E+2} }';
const NAMES = "num_ctx, num_gpu, keep_alive";

describe("options that would reload a model", () => {
  let fleet: Fleet<"o" | "v">;
  before(async () => {
    const backend = { healthInterval: 60_000 };
    fleet = await startFleet(
      {
        o: { kind: "ollama", models: ["m:1", "both:1"], backend: { ...backend, weight: 100 } },
        v: { kind: "vllm", models: ["v:1", "both:1"], backend },
      },
      { queue: { heartbeatMs: 200 } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const chat = (body: unknown) => send(`${fleet.url}/v1/chat/completions`, body);

  it("do not go to Ollama, and nothing else is touched", TIMEOUT, async () => {
    const answer = await chat(BODY);
    assert.equal(answer.status, 200, answer.text);
    assert.equal(answer.headers.get("x-tidegate-pinned"), NAMES);
    assert.equal(fleet.engines.o.inference().at(-1)?.body, LEFT);
    assert.equal(fleet.engines.o.inference().at(-1)?.headers["content-length"], `${LEFT.length}`);
  });

  it(
    "are told with a stream's headers, and in its first comment where it was opened early",
    TIMEOUT,
    async () => {
      const body = chatBody({ model: "m:1", stream: true, options: { num_ctx: 1 } });
      const early = await chat(body);
      assert.equal(early.headers.get("x-tidegate-pinned"), "num_ctx");
      assert.doesNotMatch(early.text, /pinned/);
      // It waits for the one slot, and nobody knows yet who will serve it.
      fleet.engines.o.behave({ headersDelayMs: 500 });
      const [, late] = await Promise.all([chat(chatBody({ model: "m:1" })), chat(body)]);
      assert.equal(late.headers.get("x-tidegate-pinned"), null);
      const told = parseSse(late.text).events.find(({ comment }) => /pinned/.test(comment ?? ""));
      const headers = JSON.parse(told?.comment?.replace("tidegate ", "") ?? "{}") as object;
      assert.equal(Reflect.get(headers, "x-tidegate-pinned"), "num_ctx");
      assert.equal(Reflect.get(headers, "x-tidegate-backend"), "o");
    },
  );

  it("go to every other engine, of which nothing is said", TIMEOUT, async () => {
    const body = BODY.replace("m:1", "v:1");
    const answer = await chat(body);
    assert.equal(answer.headers.get("x-tidegate-pinned"), null);
    assert.equal(fleet.engines.v.inference().at(-1)?.body, body);
  });

  it("are told of the engine that answered, not of one that failed before", TIMEOUT, async () => {
    await send(`${fleet.url}/admin/api/models/both%3A1/load`, { backend: "o" });
    const isLoaded = await until(async () => {
      const { headers } = await chat(chatBody({ model: "both:1" }));
      return headers.get("x-tidegate-backend") === "o";
    });
    assert(isLoaded);
    const before = fleet.engines.o.inference().length;
    fleet.engines.o.behave({ fault: { kind: "answer", status: 500, body: "broken" } });
    for (let round = 0; round < 4; round++) {
      const answer = await chat(BODY.replace("m:1", "both:1"));
      assert.equal(answer.status, 200, answer.text);
      assert.equal(answer.headers.get("x-tidegate-backend"), "v");
      assert.equal(answer.headers.get("x-tidegate-pinned"), null);
    }
    assert(fleet.engines.o.inference().length > before, "it was tried");
  });

  it("say nothing where there is none", TIMEOUT, async () => {
    const answer = await chat(chatBody({ model: "m:1", options: { seed: 1 } }));
    assert.equal(answer.headers.get("x-tidegate-pinned"), null);
    assert.deepEqual(fleet.engines.o.inference().at(-1)?.json["options"], { seed: 1 });
  });

  it("make no difference to the cache where they cannot change an answer", TIMEOUT, async () => {
    const body = { model: "m:1", temperature: 0, messages: [{ role: "user", content: "kept" }] };
    const first = await chat({ ...body, keep_alive: 0 });
    assert.equal(first.headers.get("x-tidegate-cache"), "miss");
    assert.equal(first.headers.get("x-tidegate-pinned"), "keep_alive");
    const again = await chat({ ...body, keep_alive: "1h" });
    assert.equal(again.headers.get("x-tidegate-cache"), "hit");
    assert.equal(again.text, first.text);
    // What else is in there nobody can tell: never kept.
    const other = await chat({ ...body, options: { num_ctx: 1 } });
    assert.equal(other.headers.get("x-tidegate-cache"), "bypass;reason=field");
  });
});
