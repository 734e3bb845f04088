/** Request bodies: sizes, encodings, what is no JSON, what says a thing twice (design §3.2, contract §4). */
import assert from "node:assert/strict";
import { gzipSync } from "node:zlib";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, Init } from "../support/client.ts";
import {
  chatBody,
  connect,
  openaiChat,
  postBytes,
  send,
  sleep,
  until,
  writeInParts,
} from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectAnthropicError, expectError, startFleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const LIMIT = 20_000;

function padded(size: number): string {
  const empty = JSON.stringify(chatBody({ pad: "" }));
  return JSON.stringify(chatBody({ pad: "x".repeat(size - empty.length) }));
}

describe("bodies", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { concurrency: 1 } } },
      { limits: { bodyBytes: LIMIT, heldBytes: 50_000 } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const post = (body: unknown, init: Init = {}, path = "/v1/chat/completions"): Promise<Answer> =>
    send(fleet.url + path, body, init);

  it("takes a body of exactly the limit", TIMEOUT, async () => {
    const body = padded(LIMIT);
    assert.equal(Buffer.byteLength(body), LIMIT);
    assert.equal((await post(body)).status, 200);
    assert.equal(fleet.engines.a.inference()[0]?.body, body);
  });

  it("refuses a longer one before it is read, where its length is declared", TIMEOUT, async () => {
    const client = await connect(fleet.gateway.port);
    const head = `Host: localhost\r\nContent-Type: application/json\r\nContent-Length: ${LIMIT + 1}`;
    client.write(`POST /v1/chat/completions HTTP/1.1\r\n${head}\r\n\r\n`);
    assert.ok(await until(() => client.body() !== null), client.received());
    assert.equal(client.status(), 413);
    assert.match(client.body() ?? "", /"code":"request_too_large"/);
    client.leave("close");
    expectError(await post(padded(LIMIT + 1)), 413, "request_too_large");
    const anthropic = await post(padded(LIMIT + 1), {}, "/v1/messages");
    expectAnthropicError(anthropic, 413, "request_too_large");
  });

  it("refuses a longer one that comes in chunks", TIMEOUT, async () => {
    const client = await connect(fleet.gateway.port);
    client.write(
      "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    const piece = "x".repeat(1000);
    for (let count = 0; count < 30 && client.status() === null; count += 1) {
      client.write(`${piece.length.toString(16)}\r\n${piece}\r\n`);
      await sleep(2);
    }
    assert.ok(await until(() => client.status() === 413), client.received());
    client.leave("close");
    assert.ok(
      await until(async () => (await fleet.gateway.metric("tidegate_held_body_bytes")) === 0),
    );
  });

  it("takes one that comes in chunks, or in many writes", TIMEOUT, async () => {
    const body = JSON.stringify(chatBody());
    const chunked = await connect(fleet.gateway.port);
    chunked.write(
      "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    for (const char of body)
      chunked.write(`${Buffer.byteLength(char).toString(16)}\r\n${char}\r\n`);
    chunked.write("0\r\n\r\n");
    assert.ok(await until(() => chunked.status() === 200), chunked.received());
    chunked.leave("close");
    const slow = await connect(fleet.gateway.port);
    await writeInParts(slow, postBytes("/v1/chat/completions", body), 50);
    assert.ok(await until(() => slow.status() === 200), slow.received());
    slow.leave("close");
    assert.deepEqual(
      fleet.engines.a.inference().map((request) => request.body),
      [body, body],
    );
  });

  it("503 when all held bodies together are too much", TIMEOUT, async () => {
    fleet.engines.a.behave({ headersDelayMs: Infinity });
    const held = [1, 2].map(() => post(padded(LIMIT)));
    assert.ok(
      await until(async () => (await fleet.gateway.metric("tidegate_held_body_bytes")) >= 40_000),
    );
    const refused = await post(padded(LIMIT));
    expectError(refused, 503, "overloaded");
    assert.ok(Number(refused.headers.get("retry-after")) >= 1);
    const small = post(JSON.stringify(chatBody()));
    assert.ok(
      await until(async () => (await fleet.gateway.metric("tidegate_requests_in_flight")) === 3),
    );
    fleet.engines.a.release();
    assert.equal((await small).status, 200, "a small one still fits");
    for (const answer of await Promise.all(held)) assert.equal(answer.status, 200);
    assert.equal(await fleet.gateway.metric("tidegate_held_body_bytes"), 0);
  });

  it("415 for what would have to be decoded", TIMEOUT, async () => {
    for (const encoding of ["gzip", "zstd", "br"]) {
      const body = gzipSync(JSON.stringify(chatBody()));
      const answer = await post(body, { headers: { "content-encoding": encoding } });
      expectError(answer, 415, "unsupported_media_type");
    }
    const plain = await post(chatBody(), { headers: { "content-encoding": "identity" } });
    assert.equal(plain.status, 200);
  });

  it("400 for what is no JSON object", TIMEOUT, async () => {
    const broken = [
      "",
      " ",
      "{",
      "nonsense",
      '{"model":"test-model"',
      '{"model":"test-model",}',
      '{"model":"test-model"} x',
      "{'model':1}",
      '{"model":"test-model","x":01}',
      '{"model":"a\nb"}',
      Buffer.from([0x7b, 0xff, 0x7d]),
    ];
    for (const body of broken) {
      expectError(await post(body), 400, "invalid_json");
    }
    for (const body of ["null", "[]", '"model"', "7", "true"]) {
      const { code } = expectError(await post(body), 400);
      assert.match(String(code), /^invalid_(json|parameter)$/, body);
    }
    expectAnthropicError(await post("{", {}, "/v1/messages"), 400, "invalid_request_error");
    assert.equal(fleet.engines.a.inference().length, 0);
  });

  it("400 for fields that it acts on and cannot read", TIMEOUT, async () => {
    const wrong: [string, Record<string, unknown>][] = [
      ["model", { messages: [] }],
      ["model", { ...chatBody(), model: 7 }],
      ["model", { ...chatBody(), model: null }],
      ["stream", chatBody({ stream: "yes" })],
      ["stream_options", chatBody({ stream: true, stream_options: "all" })],
    ];
    for (const [param, body] of wrong) {
      const error = expectError(await post(body), 400, "invalid_parameter");
      assert.match(String(error.param), new RegExp(`^${param}`));
    }
    assert.equal(fleet.engines.a.inference().length, 0);
  });

  it(
    "400 for a key said twice that it acts on; all others are the engine's business",
    TIMEOUT,
    async () => {
      const twice = [
        ["model", '{"model":"test-model","messages":[],"model":"other"}'],
        ["model", '{"model":"test-model","mod\\u0065l":"other"}'],
        ["stream", '{"model":"test-model","stream":false,"stream":true}'],
      ] as const;
      for (const [param, body] of twice) {
        assert.equal(expectError(await post(body), 400, "duplicate_parameter").param, param);
      }
      const fine =
        '{"model":"test-model","x":1,"x":2,"messages":[{"role":"user","role":"user","content":"a"}],"y":{"model":1,"model":2}}';
      assert.equal((await post(fine)).status, 200);
      assert.equal(fleet.engines.a.inference()[0]?.body, fine);
    },
  );

  it("is not led astray by keys that look like others, or by depth", TIMEOUT, async () => {
    const odd =
      '{"__proto__":{"model":"x"},"constructor":1,"toString":2,"model":"test-model","messages":[{"role":"user","content":"}]\\"{"}]}';
    assert.equal((await post(odd)).status, 200);
    assert.equal(fleet.engines.a.inference()[0]?.body, odd);
    const depth = 3000;
    const deep = `{"model":"test-model","messages":[{"role":"user","content":"a"}],"x":${"[".repeat(depth)}${"]".repeat(depth)}}`;
    assert.ok((await post(deep)).status < 500);
    assert.equal((await send(`${fleet.url}/health`)).status, 200);
  });

  it("gives up on a client that leaves in the middle of its body", TIMEOUT, async () => {
    for (const how of ["fin", "reset"] as const) {
      const client = await connect(fleet.gateway.port);
      client.write(postBytes("/v1/chat/completions", padded(LIMIT)).slice(0, 5000));
      await sleep(30);
      client.leave(how);
    }
    assert.ok(
      await until(async () => (await fleet.gateway.metric("tidegate_held_body_bytes")) === 0),
    );
    assert.equal((await openaiChat(fleet.url)).status, 200);
    assert.equal(fleet.engines.a.inference().length, 1);
  });
});
