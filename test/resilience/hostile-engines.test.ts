/** Engines that send anything at all: a clear error or a bounded cost (design §1, §3; contract §4). */
import assert from "node:assert/strict";
import { gzipSync } from "node:zlib";
import { after, afterEach, before, describe, it } from "node:test";
import { dataOf, openaiChat, send, until } from "../support/client.ts";
import type { Fault } from "../support/engine-behaviour.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import { checkWell } from "./hostile.ts";

const TIMEOUT = { timeout: 60_000 };
const MIB = 1024 * 1024;

/** Names that an engine may list; the configuration names some of them too. */
const oddNames = [
  "__proto__",
  "constructor",
  "toString",
  "hasOwnProperty",
  "e\r\nx-evil: 1",
  'quote"back\\slash\nnew line',
  "\u6a21\u578b-\u{1f30a}",
  "l".repeat(5000),
];

describe("hostile engines", () => {
  let fleet: Fleet<"a">;
  let elsewhere: FakeEngine;
  let resident = 0;
  before(async () => {
    elsewhere = await startEngine();
    fleet = await startFleet(
      { a: { models: ["test-model", ...oddNames], backend: { healthInterval: 300 } } },
      {
        models: { constructor: { aliases: ["valueOf"] } },
        // Nothing but failures: no breaker may get between them and the client.
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    );
    for (let count = 0; count < 20; count += 1) await openaiChat(fleet.url);
    resident = await fleet.gateway.residentBytes();
  });
  afterEach(() => checkWell(fleet, "test-model", resident));
  after(async () => {
    await fleet.close();
    await elsewhere.close();
  });

  const ask = (body: Record<string, unknown> = {}) => openaiChat(fleet.url, body);
  const behave = (fault: Fault, more: object = {}) => fleet.engines.a.behave({ fault, ...more });

  it(
    "models with names that are something else in JavaScript, or in a header",
    TIMEOUT,
    async () => {
      for (const model of [...oddNames, "valueOf"]) {
        for (const stream of [false, true]) {
          const answer = await ask({ model, stream });
          assert.equal(answer.status, 200, `${model.slice(0, 50)}: ${answer.text}`);
          assert.equal(answer.headers.get("x-evil"), null);
          const asked = fleet.engines.a.inference().at(-1)?.json.model;
          assert.equal(asked, model === "valueOf" ? "constructor" : model);
        }
      }
      const { data } = (await send(`${fleet.url}/v1/models`)).json() as { data: { id: string }[] };
      for (const name of oddNames)
        assert.ok(
          data.some(({ id }) => id === name),
          name,
        );
      assert.doesNotMatch(await fleet.gateway.metrics(), /^x-evil|^new line/m);
      for (const line of fleet.gateway.stdout().trim().split("\n")) JSON.parse(line);
    },
  );

  it("twenty megabytes in one line", TIMEOUT, async () => {
    const big = "x".repeat(20 * MIB);
    const chunk = (content: string, reason: string | null): string =>
      `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content }, finish_reason: reason }] })}\n\n`;
    const end = chunk("", "stop") + "data: [DONE]\n\n";
    for (const body of [chunk("a", null) + chunk(big, null) + end, chunk(big, null) + end]) {
      behave({ kind: "raw", body });
      const answer = await ask({ stream: true });
      assert.ok(answer.text === body, `came ${answer.text.length} of ${body.length}`);
      behave({ kind: "raw", body: body.slice(0, 15 * MIB) });
      const cut = await ask({ stream: true });
      const error = dataOf(cut.text.slice(cut.text.lastIndexOf("data: "))).at(-1)?.error;
      assert.equal((error as { code?: string }).code, "upstream_incomplete");
    }
    // No event at all, only a line that never ends.
    behave({ kind: "raw", body: `: ${big}` });
    assert.match((await ask({ stream: true })).text, /"code":"upstream_incomplete"/);
  });

  it("levels without end in an answer", TIMEOUT, async () => {
    const deep = "[".repeat(100_000);
    const closed = deep + "]".repeat(100_000);
    for (const inner of [deep, closed]) {
      behave({ kind: "raw", body: `{"choices":[],"x":${inner}}` });
      const whole = await ask();
      assert.ok(whole.status === 200 || whole.status === 502, whole.text.slice(0, 300));
      for (const first of ["", 'data: {"choices":[{"delta":{"content":"a"}}]}\n\n']) {
        behave({ kind: "raw", body: `${first}data: {"error":${inner}}\n\n` });
        const { status, text } = await ask({ stream: true });
        assert.ok(status === 502 || status === 200, text.slice(0, 300));
        assert.doesNotMatch(text, /\[DONE\]/);
      }
    }
  });

  it("packed although nobody asked for it", TIMEOUT, async () => {
    const packed = { "Content-Encoding": "gzip" };
    const whole = '{"choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}]}';
    const events = `data: ${whole.replace("message", "delta")}\n\ndata: [DONE]\n\n`;
    for (const [text, stream] of [
      [whole, false],
      [events, true],
    ] as const) {
      behave({ kind: "raw", body: gzipSync(text) }, { headers: packed });
      const answer = await ask({ stream });
      if (answer.status === 200) {
        assert.equal(answer.text, text);
        assert.equal(answer.headers.get("content-encoding"), null);
      } else expectError(answer, 502);
      for (const body of [gzipSync(text).subarray(0, 40), Buffer.from("this is not gzip")]) {
        behave({ kind: "raw", body }, { headers: packed });
        const broken = await ask({ stream });
        assert.ok(broken.status === 502 || /"code":"upstream_/.test(broken.text), broken.text);
      }
    }
    const bomb = gzipSync(Buffer.alloc(100 * MIB, " "));
    behave({ kind: "raw", body: bomb }, { headers: packed, contentType: "text/html" });
    assert.equal((await ask({ stream: true })).status, 502);
  });

  it("a length that is not true", TIMEOUT, async () => {
    const body = '{"choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}]}';
    const sized = (length: number, status = 200): Fault => ({
      kind: "answer",
      status,
      body,
      contentType: "application/json",
      length,
    });
    behave(sized(body.length + 50));
    expectError(await ask(), 502, "upstream_incomplete");
    behave(sized(body.length - 5));
    expectError(await ask(), 502, "upstream_incomplete");
    behave(sized(0));
    expectError(await ask(), 502);
    behave(sized(5 * 1024 * MIB, 500));
    expectError(await ask(), 502, "upstream_error");
  });

  it("a redirect is not followed, by requests or by probes", TIMEOUT, async () => {
    for (const status of [301, 302, 303, 307, 308]) {
      const headers = { Location: `${elsewhere.url}/v1/chat/completions` };
      behave({ kind: "answer", status, body: "", headers });
      for (const stream of [false, true]) {
        expectError(await ask({ stream }), 502, "upstream_error");
      }
    }
    const headers = { Location: `${elsewhere.url}/v1/models` };
    fleet.engines.a.behave({ probeFault: { kind: "answer", status: 302, body: "", headers } });
    const probes = () => fleet.engines.a.requests.filter(({ method }) => method === "GET").length;
    const before = probes();
    assert.ok(await until(() => probes() >= before + 2));
    assert.equal(elsewhere.requests.length, 0, "the other place sees nothing");
  });
});
