/** Clients that send anything at all: a clear error or a bounded cost (design §1, §3.2; contract §4). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { RawClient } from "../support/client.ts";
import {
  chatBody,
  connect,
  openaiChat,
  postBytes,
  seeded,
  send,
  sleep,
  until,
} from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import { checkWell } from "./hostile.ts";

const TIMEOUT = { timeout: 60_000 };
const MIB = 1024 * 1024;
const LIMIT = MIB;
const CHAT = "/v1/chat/completions";
const MUTATIONS = 2000;

describe("hostile clients", () => {
  let fleet: Fleet<"a">;
  let resident = 0;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { concurrency: 1, healthInterval: 60_000 } } },
      { limits: { bodyBytes: LIMIT, heldBytes: 64 * MIB } },
    );
    for (let count = 0; count < 20; count += 1) await openaiChat(fleet.url);
    resident = await fleet.gateway.residentBytes();
  });
  afterEach(() => checkWell(fleet, "test-model", resident));
  after(() => fleet.close());

  const post = (body: unknown) => send(fleet.url + CHAT, body);

  async function exchange(bytes: string | Uint8Array, ms = 3000): Promise<RawClient> {
    const client = await connect(fleet.gateway.port);
    client.write(bytes);
    await until(() => client.status() !== null || client.isClosed(), ms);
    client.leave("close");
    return client;
  }

  it("a body without end gets its 413, and is not taken in", TIMEOUT, async () => {
    const client = await connect(fleet.gateway.port);
    client.write(`POST ${CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n`);
    const piece = Buffer.alloc(65_536, "x");
    let sent = 0;
    while (sent < 256 * MIB && !client.isClosed() && client.status() === null) {
      client.write("10000\r\n");
      client.write(piece);
      client.write("\r\n");
      sent += piece.length;
      if (client.socket.writableLength > MIB) await sleep(2);
    }
    assert.ok(await until(() => client.status() === 413), client.received());
    assert.ok(sent < 32 * MIB, `${sent} bytes were sent before the 413`);
    client.leave("close");
  });

  it(
    "a hundred thousand levels, keys, or escapes are read or refused in time",
    TIMEOUT,
    async () => {
      // The engine here could not read them itself.
      fleet.engines.a.behave({ fault: { kind: "answer", status: 200, body: { choices: [] } } });
      const deep = 100_000;
      const rest = '"model":"test-model","messages":[{"role":"user","content":"a"}]';
      const bodies = {
        arrays: `{${rest},"x":${"[".repeat(deep)}${"]".repeat(deep)}}`,
        objects: `{${rest},"x":${'{"a":'.repeat(deep)}1${"}".repeat(deep)}}`,
        open: `{${rest},"x":${"[".repeat(deep)}`,
        "in messages": `{"model":"test-model","messages":${"[".repeat(deep)}${"]".repeat(deep)}}`,
        keys: `{${rest},${Array.from({ length: deep / 2 }, (_, at) => `"k${at}":1`).join(",")}}`,
        "one key": `{${rest}${',"k":1'.repeat(deep)}}`,
        "model again and again": `{${rest}${',"model":"test-model"'.repeat(deep / 4)}}`,
        quotes: `{${rest},"x":"${'\\"'.repeat(deep)}"}`,
        backslashes: `{${rest},"x":"${"\\\\".repeat(deep)}"}`,
        numbers: `{${rest},"x":${"9".repeat(deep)}}`,
      };
      for (const [name, body] of Object.entries(bodies)) {
        const began = performance.now();
        const { status, text } = await post(body);
        assert.ok(status === 200 || status === 400, `${name}: ${status} ${text.slice(0, 300)}`);
        if (status === 400) assert.ok(text.length < 2000, name);
        assert.ok(performance.now() - began < 3000, `${name} took too long`);
      }
    },
  );

  it("what is no UTF-8 is refused, wherever it stands", TIMEOUT, async () => {
    const wrong = [
      [0xc0, 0xaf],
      [0xed, 0xa0, 0x80],
      [0xf5, 0x80, 0x80, 0x80],
      [0xe2, 0x82],
      [0x80],
    ];
    for (const bytes of wrong) {
      const text = '{"model":"test-model","messages":[{"role":"user","content":"@"}]}';
      const [head = "", tail = ""] = text.split("@");
      const body = Buffer.concat([Buffer.from(head), Buffer.from(bytes), Buffer.from(tail)]);
      expectError(await post(body), 400, "invalid_json");
    }
    const utf16 = Buffer.from(JSON.stringify(chatBody()), "utf16le");
    expectError(await post(utf16), 400, "invalid_json");
  });

  it("headers beyond all measure", TIMEOUT, async () => {
    const heads = [
      { "X-Long": "x".repeat(200_000) },
      Object.fromEntries(Array.from({ length: 3000 }, (_, at) => [`X-${at}`, "y"])),
      { Authorization: `Bearer ${"k".repeat(100_000)}` },
      { "X-Request-Id": "\u00ff".repeat(5000), traceparent: "0".repeat(9000) },
      { "Content-Length": "1e3" },
      { "Content-Length": "-1" },
      { "Content-Length": "99999999999999999999999" },
      { "Transfer-Encoding": "gzip, chunked" },
      { "X-Stainless-Timeout": "-1e99", "X-Stainless-Retry-Count": "\u0001" },
    ];
    for (const head of heads) {
      const client = await exchange(postBytes(CHAT, chatBody(), head), 500);
      const status = client.status();
      assert.ok(status === null || status === 200 || (status >= 400 && status < 500), `${status}`);
    }
  });

  it("bodies that never come hold no slot", TIMEOUT, async () => {
    const whole = postBytes(CHAT, chatBody());
    const slow: RawClient[] = [];
    for (let count = 0; count < 60; count += 1) {
      const client = await connect(fleet.gateway.port);
      // Some have not even all of their headers.
      client.write(whole.slice(0, count % 3 === 0 ? 40 : -5));
      slow.push(client);
    }
    await sleep(50);
    for (let count = 0; count < 5; count += 1) assert.equal((await post(chatBody())).status, 200);
    assert.equal(await fleet.gateway.metric("tidegate_slots_in_use"), 0);
    assert.equal(await fleet.gateway.metric("tidegate_queue_requests"), 0);
    for (const client of slow) client.leave("close");
  });

  it("requests all at once on one connection are answered in their order", TIMEOUT, async () => {
    const client = await connect(fleet.gateway.port);
    const names = ["one", "two", "three"];
    // A name that is not there comes back in the words of its own error.
    client.write(names.map((model) => postBytes(CHAT, chatBody({ model }))).join(""));
    const seen = () =>
      [...client.received().matchAll(/\\"(one|two|three)\\"/g)].map(([, name]) => name);
    assert.ok(await until(() => seen().length >= 3), client.received());
    assert.deepEqual(seen(), names);
    client.leave("close");
  });

  it("paths and methods that nobody has", TIMEOUT, async () => {
    const targets = [
      "/%00",
      "/%ff%fe",
      "/v1/models/%E0%A4%A",
      "/v1/models/..%2f..%2fetc%2fpasswd",
      "//v1/chat/completions",
      "/v1/../admin/api",
      `/${"a/".repeat(4000)}`,
      "/?%",
      "/__proto__",
      "/v1/constructor",
      "*",
      "http://elsewhere.invalid/v1/models",
    ];
    for (const target of targets) {
      const client = await exchange(`GET ${target} HTTP/1.1\r\nHost: localhost\r\n\r\n`, 1000);
      const status = client.status();
      assert.ok(status === null || status < 500, `${target}: ${client.received()}`);
      assert.doesNotMatch(client.received(), /root:|node_modules/);
    }
    for (const method of ["DELETE", "PUT", "PATCH", "TRACE", "PROPFIND", "X-ODD", "CONNECT"]) {
      const client = await exchange(`${method} ${CHAT} HTTP/1.1\r\nHost: localhost\r\n\r\n`, 500);
      const status = client.status();
      assert.ok(status === null || (status >= 400 && status < 500), `${method}: ${status}`);
    }
    const lines = [
      "\r\n\r\n",
      "GET\r\n\r\n",
      "\u0016\u0003\u0001\u0002\u0000\u0001",
      "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ];
    for (const line of lines) await exchange(line, 100);
  });

  it("names with line ends, other scripts or without measure make no header", TIMEOUT, async () => {
    const names = [
      "m\r\nx-evil: 1",
      "m\n\nHTTP/1.1 200 OK",
      "\u6a21\u578b-\u{1f30a}",
      "\ud800",
      "x".repeat(10_000),
      "__proto__",
      "constructor",
      "toString:latest",
      "",
      "../../x",
    ];
    for (const model of names) {
      for (const path of [CHAT, "/v1/messages", "/v1/responses"]) {
        const answer = await send(fleet.url + path, { ...chatBody({ model }), input: "x" });
        assert.ok([400, 404].includes(answer.status), `${model.slice(0, 50)}: ${answer.text}`);
        assert.equal(answer.headers.get("x-evil"), null);
        assert.ok(answer.text.length < 2000, "a name is cut");
      }
    }
    const odd = { ["__proto__"]: { stream: true }, constructor: { model: "x" }, prototype: [] };
    const body = `{"__proto__":{"stream":true,"model":"y"},${JSON.stringify({ ...chatBody(), ...odd }).slice(1)}`;
    assert.equal((await post(body)).status, 200);
  });

  it(`${MUTATIONS} mutations of valid requests`, TIMEOUT, async () => {
    const random = seeded("hostile");
    const seeds = [
      postBytes(CHAT, chatBody({ stream: true })),
      postBytes(CHAT, chatBody({ tools: [], n: 1, stop: ["a"], seed: 1 })),
      postBytes("/v1/messages", chatBody({ max_tokens: 3, stream: true })),
      postBytes("/v1/completions", { model: "test-model", prompt: "x", stream: true }),
      postBytes("/v1/responses", { model: "test-model", input: "x" }),
      postBytes("/v1/embeddings", { model: "test-model", input: ["x"] }),
      "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ].map((text) => Buffer.from(text));
    const words = [
      '"',
      "{",
      "}",
      "[",
      "\\",
      "\r\n",
      "\u0000",
      "null",
      "1e999",
      "__proto__",
      ":",
      "\u00ff",
    ];

    function mutate(seed: Buffer): Buffer {
      let bytes = seed;
      for (let times = random.between(1, 4); times > 0; times -= 1) {
        const at = random.between(0, bytes.length);
        const to = Math.min(bytes.length, at + random.between(0, 12));
        const [head, cut, tail] = [
          bytes.subarray(0, at),
          bytes.subarray(at, to),
          bytes.subarray(to),
        ];
        const random8 = Buffer.from(Array.from({ length: 3 }, () => random.between(0, 255)));
        bytes = Buffer.concat(
          random.pick([
            () => [head, tail],
            () => [head, cut, cut, tail],
            () => [head, random8, tail],
            () => [head, Buffer.from(random.pick(words)), cut, tail],
            () => [head, random.pick(seeds).subarray(at, to), tail],
            () => [head],
          ])(),
        );
      }
      return bytes;
    }

    /** Half of them as a whole, half only in the body, with its true length. */
    function mutated(): Buffer {
      const seed = random.pick(seeds);
      if (random.next() < 0.5) return mutate(seed);
      const bodyAt = seed.indexOf("\r\n\r\n") + 4;
      const body = mutate(seed.subarray(bodyAt));
      const head = seed.toString("latin1", 0, bodyAt);
      const exact = head.replace(/Content-Length: \d+/, `Content-Length: ${body.length}`);
      return Buffer.concat([Buffer.from(exact), body]);
    }

    const statuses: Record<string, number> = {};
    let left = MUTATIONS;
    const lane = async (): Promise<void> => {
      while (left > 0) {
        const bytes = mutated();
        // Odd hosts have a test of their own.
        const hosts = bytes.toString("latin1").match(/^host.*$/gim) ?? [];
        if (hosts.join() !== "Host: localhost") continue;
        left -= 1;
        const client = await connect(fleet.gateway.port);
        client.write(bytes);
        const isRead = (): boolean => client.status() !== null || client.isClosed();
        // The gateway waits for the rest of it, if it has answered what came later.
        if (!(await until(isRead, 60))) {
          await send(`${fleet.url}/ready`);
          await until(isRead, 60);
        }
        client.leave("close");
        const status = String(client.status() ?? (client.isClosed() ? "closed" : "waits"));
        statuses[status] = (statuses[status] ?? 0) + 1;
        const sent = JSON.stringify(bytes.toString("latin1"));
        assert.notEqual(status, "500", `${sent}\n${client.received()}`);
      }
    };
    await Promise.all(Array.from({ length: 32 }, lane));
    console.log(`hostile: ${JSON.stringify(statuses)}`);
    assert.ok((statuses["400"] ?? 0) > MUTATIONS / 20);
  });
});
