/** What goes up is what the client sent, what comes down is what the engine sent (design §1.2, §3). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, dataOf, openaiChat, parseSse, send } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";
import { runtime } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };
const USAGE = { stream_options: { include_usage: true } };
const CHUNKINGS = ["event", "once", 1, 7] as const;

describe("passthrough", () => {
  let fleet: Fleet<"plain" | "ollama">;
  before(async () => {
    fleet = await startFleet({
      plain: { models: ["test-model"], backend: { apiKey: "backend-key" } },
      ollama: { kind: "ollama", models: ["llama3:8b"] },
    });
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const lastBody = (id: "plain" | "ollama"): string =>
    fleet.engines[id].inference().at(-1)?.body ?? "";
  const sent = (id: "plain" | "ollama"): Buffer =>
    fleet.engines[id].inference().at(-1)?.sent() ?? Buffer.alloc(0);
  const chatRaw = (text: string): ReturnType<typeof send> =>
    send(`${fleet.url}/v1/chat/completions`, text);

  for (const chunking of CHUNKINGS) {
    for (const lineEnd of ["\n", "\r\n"] as const) {
      const name = `${chunking}, ${JSON.stringify(lineEnd)}`;
      it(`passes a stream on byte for byte: ${name}`, TIMEOUT, async () => {
        fleet.engines.plain.behave({
          chunking,
          lineEnd,
          pings: "comment",
          timings: true,
          tokens: ["", "a", "é", "\u2028", "😀", '"quoted"', "\\n"],
          reasoning: ["hm", "so"],
          toolCalls: [{ name: "f", arguments: '{"city":"Zürich"}' }],
        });
        const chat = await openaiChat(fleet.url, { stream: true, ...USAGE });
        assert.deepEqual(chat.body, sent("plain"));
        const bodies: Record<string, unknown> = {
          "/v1/completions": { model: "test-model", prompt: "x", stream: true, ...USAGE },
          "/v1/messages": chatBody({ stream: true, max_tokens: 9 }),
          "/v1/responses": { model: "test-model", input: "x", stream: true },
        };
        for (const [path, body] of Object.entries(bodies)) {
          const answer = await send(fleet.url + path, body);
          assert.deepEqual(answer.body, sent("plain"), path);
        }
      });
    }
  }

  it("passes bare comments and named pings on", TIMEOUT, async () => {
    for (const pings of ["bare", "event"] as const) {
      fleet.engines.plain.behave({ pings });
      const answer = await openaiChat(fleet.url, { stream: true, ...USAGE });
      assert.deepEqual(answer.body, sent("plain"), pings);
    }
  });

  it("passes events of more than 64 KiB on", TIMEOUT, async () => {
    for (const chunking of ["event", "once", 65_536, 1000] as const) {
      const tokens = ["small", "x".repeat(100_000), "é".repeat(200_000), "small"];
      fleet.engines.plain.behave({ tokens, chunking });
      const answer = await openaiChat(fleet.url, { stream: true, ...USAGE });
      assert.equal(answer.body.length, sent("plain").length, String(chunking));
      assert.ok(answer.body.equals(sent("plain")), String(chunking));
    }
  });

  it("passes fields, events and broken JSON it knows nothing of", TIMEOUT, async () => {
    const body = [
      'id: 7\nretry: 10\nevent: odd\ndata: {"choices":[{"index":0,"delta":{"content":"a","x":1e999}}]}\n\n',
      "data: not json at all\n\n",
      'data: {"choices":[{"index":0,\ndata: "delta":{"content":"b"},"finish_reason":"stop"}]}\n\n',
      "\n\ndata: [DONE]\n\n: after the end\n\n",
    ].join("");
    for (const chunking of CHUNKINGS) {
      fleet.engines.plain.behave({ fault: { kind: "raw", body }, chunking });
      const answer = await openaiChat(fleet.url, { stream: true, ...USAGE });
      assert.equal(answer.text, body, String(chunking));
    }
  });

  it("knows the end of a stream in its other spellings", TIMEOUT, async () => {
    const choice = '{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}';
    for (const body of [
      `data:${choice}\n\ndata:[DONE]\n\n`,
      `data: ${choice} \r\n\r\ndata: [DONE]\r\n\r\n`,
    ]) {
      fleet.engines.plain.behave({ fault: { kind: "raw", body } });
      const answer = await openaiChat(fleet.url, { stream: true, ...USAGE });
      assert.equal(answer.text, body);
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.equal(record.ending, "completed");
    }
  });

  it("passes bytes on that are no UTF-8", TIMEOUT, async () => {
    const choice = '{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}],"x":"';
    const body = Buffer.concat([
      Buffer.from(`data: ${choice}`),
      Buffer.from([0xff, 0xfe, 0xc3]),
      Buffer.from('"}\n\ndata: [DONE]\n\n'),
    ]);
    for (const chunking of CHUNKINGS) {
      fleet.engines.plain.behave({ fault: { kind: "raw", body }, chunking });
      assert.deepEqual((await openaiChat(fleet.url, { stream: true, ...USAGE })).body, body);
    }
  });

  it("passes a whole answer on byte for byte", TIMEOUT, async () => {
    const body =
      '{ "id" : "x",\n "choices":[{"index":0,"message":{"role":"assistant","content":"\\u00e9 1.0"},"finish_reason":"stop"}],"n":12345678901234567890 }';
    fleet.engines.plain.behave({ fault: { kind: "raw", body } });
    assert.equal((await openaiChat(fleet.url)).text, body);
  });

  it("sends the client's own bytes up, whatever they look like", TIMEOUT, async () => {
    const spelled =
      '{\n\t"model" : "test-model", "seed":12345678901234567890,"temperature":1.0,"top_p":1e0, ' +
      '"messages":[{"role":"user","content":"\\u00e9\\/ \\ud83d\\ude00 é"}],"x_unknown":{"model":"inner","stream":true},' +
      '"logit_bias":{"50256":-100.000},"big":1e999,"nothing":null }\n';
    await chatRaw(spelled);
    assert.equal(lastBody("plain"), spelled);
    const padded = `\n ${chatText({ model: "test-model" })} `;
    await chatRaw(padded);
    assert.equal(lastBody("plain"), padded);
  });

  it("replaces nothing but the name", TIMEOUT, async () => {
    const around = (name: string): string =>
      `{"messages":[{"role":"user","content":"model: \\"llama3\\""}],"metadata":{"model":"llama3"},  "model" : ${name} ,"seed":1.50}`;
    await chatRaw(around('"llama3"'));
    assert.equal(lastBody("ollama"), around('"llama3:8b"'));
    // The same name, spelled with escapes, and a key spelled so.
    await chatRaw(around('"\\u006clama3"'));
    assert.equal(lastBody("ollama"), around('"llama3:8b"'));
    await chatRaw(around('"llama3:8b"').replace('"model" :', '"mod\\u0065l" :'));
    assert.equal(JSON.parse(lastBody("ollama")).model, "llama3:8b");
  });

  it(
    "leaves to the engine what it does not act on, null and wrong types too",
    TIMEOUT,
    async () => {
      for (const body of [
        '{"model":"test-model","messages":[{"role":"user","content":"a"}],"stream":null,"max_tokens":null,"temperature":null,"seed":null,"top_p":null,"tools":null}',
        '{"model":"test-model","messages":["none"],"temperature":"hot","max_tokens":"12","seed":1.5e300,"top_p":{},"n":"two"}',
      ]) {
        const answer = await chatRaw(body);
        assert.equal(lastBody("plain"), body, answer.text);
      }
    },
  );

  it("keeps a body with a byte order mark intact, or refuses it", TIMEOUT, async () => {
    const body = `\ufeff${chatText({ model: "llama3" })}`;
    const answer = await chatRaw(body);
    if (answer.status === 400) return;
    assert.equal(JSON.parse(lastBody("ollama").replace("\ufeff", "")).model, "llama3:8b");
  });

  it("asks for usage upstream and hides the chunk from who did not", TIMEOUT, async () => {
    for (const [path, body] of [
      ["/v1/chat/completions", chatBody({ stream: true, seed: 1 })],
      ["/v1/completions", { model: "test-model", prompt: "x", stream: true }],
    ] as const) {
      for (const chunking of CHUNKINGS) {
        fleet.engines.plain.behave({ chunking });
        const answer = await send(fleet.url + path, body);
        const upstream = JSON.parse(lastBody("plain")) as Record<string, unknown>;
        assert.deepEqual(upstream, { ...body, ...USAGE });
        const { events } = parseSse(sent("plain").toString());
        const kept = events.filter(({ data }) => !/"choices":\[\]/.test(data ?? ""));
        assert.equal(kept.length, events.length - 1);
        assert.equal(answer.text, kept.map(({ raw }) => raw).join(""), `${path} ${chunking}`);
      }
    }
  });

  it(
    "keeps the other stream options, and does not ask where nothing streams",
    TIMEOUT,
    async () => {
      const options = '{"include_obfuscation" : false,"include_usage":false,"n":1.0}';
      const answer = await chatRaw(
        `{"model":"test-model","messages":[{"role":"user","content":"x"}],"stream":true,"stream_options":${options}}`,
      );
      assert.doesNotMatch(answer.text, /"choices":\[\]/);
      assert.match(lastBody("plain"), /"include_obfuscation" ?: ?false/);
      assert.match(lastBody("plain"), /"n" ?: ?1(\.0)?/);
      const { stream_options } = JSON.parse(lastBody("plain")) as { stream_options: unknown };
      assert.deepEqual(stream_options, { include_obfuscation: false, include_usage: true, n: 1 });
      await chatRaw(chatText({ model: "test-model", stream: true, stream_options: null }));
      assert.equal(JSON.parse(lastBody("plain")).stream_options.include_usage, true);
      const whole = chatText({ model: "test-model" });
      await chatRaw(whole);
      assert.equal(lastBody("plain"), whole);
      const messages = JSON.stringify(chatBody({ stream: true, max_tokens: 3 }));
      await send(`${fleet.url}/v1/messages`, messages);
      assert.equal(lastBody("plain"), messages);
    },
  );

  it("shows the usage chunk to who asked for it", TIMEOUT, async () => {
    const answer = await openaiChat(fleet.url, { stream: true, ...USAGE });
    const last = dataOf(answer.text).at(-1) as {
      choices: unknown[];
      usage: { total_tokens: number };
    };
    assert.deepEqual([last.choices, last.usage.total_tokens], [[], 10]);
  });

  it(
    "takes the last usage of Ollama's completions, not the zeros (wire §1.6)",
    TIMEOUT,
    async () => {
      const body = { model: "llama3:8b", prompt: "a b", stream: true };
      const answer = await send(`${fleet.url}/v1/completions`, body);
      assert.doesNotMatch(answer.text, /"choices":\[\]/);
      assert.equal(dataOf(answer.text).length, 6);
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.deepEqual([record.tokens_input, record.tokens_generated], [2, 5]);
    },
  );

  it("copies max_completion_tokens to max_tokens for Ollama (real §6.10)", TIMEOUT, async () => {
    fleet.engines.ollama.behave({ tokens: 50 });
    const answer = await chatRaw(chatText({ model: "llama3:8b", max_completion_tokens: 3 }));
    const [choice] = answer.json().choices as { finish_reason: string }[];
    assert.equal(choice?.finish_reason, "length");
    const upstream = JSON.parse(lastBody("ollama")) as Record<string, unknown>;
    assert.deepEqual([upstream.max_tokens, upstream.max_completion_tokens], [3, 3]);
    await chatRaw(chatText({ model: "test-model", max_completion_tokens: 3 }));
    assert.ok(!("max_tokens" in JSON.parse(lastBody("plain"))), "only where it is needed");
  });

  it("keeps the query string", TIMEOUT, async () => {
    await send(`${fleet.url}/v1/messages?beta=true&x=%2F`, chatBody({ max_tokens: 3 }));
    assert.equal(fleet.engines.plain.inference().at(-1)?.path, "/v1/messages?beta=true&x=%2F");
  });

  it("sends up only the headers of the contract", TIMEOUT, async () => {
    const answer = await openaiChat(
      fleet.url,
      {},
      {
        headers: {
          authorization: "Bearer client-secret",
          "x-api-key": "client-secret",
          cookie: "session=client-secret",
          referer: "http://localhost/",
          "x-conversation-id": "goes-on-for-ever",
          "x-forwarded-for": "10.0.0.1",
          "x-stainless-timeout": "600",
          "accept-encoding": "gzip, br",
          "openai-organization": "org",
          "anthropic-version": "2023-06-01",
          "anthropic-beta": "tools-2024",
          "user-agent": "client/1.0",
          accept: "application/json, */*",
          traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
          tracestate: "vendor=1",
        },
      },
    );
    assert.equal(answer.status, 200);
    const request = fleet.engines.plain.inference().at(-1);
    const headers = request?.headers ?? {};
    // What a client of HTTP needs by itself; Deno's fetch adds `accept-language: *` (runtimes §e).
    const framing = ["host", "content-length", ...(runtime === "deno" ? ["accept-language"] : [])];
    const contract =
      "content-type accept user-agent anthropic-version anthropic-beta x-request-id traceparent tracestate accept-encoding connection authorization";
    const allowed = [...contract.split(" "), ...framing];
    assert.deepEqual(
      Object.keys(headers).filter((name) => !allowed.includes(name)),
      [],
    );
    assert.doesNotMatch(JSON.stringify(request?.rawHeaders), /client-secret/);
    assert.equal(headers.authorization, "Bearer backend-key");
    assert.equal(headers["user-agent"], "client/1.0");
    assert.equal(headers.accept, "application/json, */*");
    assert.equal(headers["anthropic-version"], "2023-06-01");
    assert.equal(headers["anthropic-beta"], "tools-2024");
    assert.equal(headers["accept-encoding"], "identity");
    assert.equal(headers.connection, "close");
    assert.equal(headers["x-request-id"], answer.headers.get("x-request-id"));
    assert.equal(headers.host, `127.0.0.1:${fleet.engines.plain.port}`);
    assert.match(
      headers.traceparent ?? "",
      /^00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-0[01]$/,
    );
    assert.match(headers.tracestate ?? "vendor=1", /vendor=1/);
  });

  it("sends no credentials to a backend without a key", TIMEOUT, async () => {
    await openaiChat(
      fleet.url,
      { model: "llama3" },
      { headers: { authorization: "Bearer client-secret" } },
    );
    const headers = fleet.engines.ollama.inference().at(-1)?.headers ?? {};
    assert.equal(headers.authorization, undefined);
  });

  it("is no foreign host to a loopback Ollama (wire §1.8)", TIMEOUT, async () => {
    const answer = await openaiChat(
      fleet.url,
      { model: "llama3" },
      { headers: { origin: "http://localhost:9" } },
    );
    assert.equal(answer.status, 200);
  });

  it("takes a body whatever its content-type says", TIMEOUT, async () => {
    for (const type of [
      "text/plain",
      "application/x-www-form-urlencoded",
      "application/json; charset=utf-8",
    ]) {
      const answer = await openaiChat(fleet.url, {}, { headers: { "content-type": type } });
      assert.equal(answer.status, 200, type);
    }
    assert.equal(fleet.engines.plain.inference().length, 3);
  });
});

function chatText(body: Record<string, unknown>): string {
  return JSON.stringify(chatBody(body));
}
