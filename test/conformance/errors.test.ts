/** The engines' errors in the caller's words (contract §4). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer } from "../support/client.ts";
import { chatBody, openaiChat, send } from "../support/client.ts";
import type { Fault } from "../support/engine-behaviour.ts";
import { faults } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectAnthropicError, expectError, startFleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };

interface Expected {
  status: number;
  /** undefined: any string, or null. */
  code?: string | null;
  type?: string;
  message?: RegExp;
  anthropic: string;
  retryAfter?: string;
}

const upstreamError = {
  status: 502,
  code: "upstream_error",
  type: "server_error",
  anthropic: "api_error",
};
const invalid = { ...upstreamError, code: "upstream_invalid_response" };
const overflow = {
  status: 400,
  code: "context_length_exceeded",
  type: "invalid_request_error",
  anthropic: "invalid_request_error",
};
const busy = {
  status: 429,
  code: "rate_limit_exceeded",
  type: "rate_limit_error",
  anthropic: "rate_limit_error",
  retryAfter: "1",
};

function answer(status: number, body: unknown, headers: Record<string, string> = {}): Fault {
  return { kind: "answer", status, body, headers };
}

const cases: Record<string, [Fault, Expected]> = {
  "Ollama cannot load": [faults.ollamaLoadFailed, upstreamError],
  "a string for an error": [
    faults.stringError,
    { status: 400, message: /invalid options: num_predict/, anthropic: "invalid_request_error" },
  ],
  "overflow at llama.cpp": [faults.llamacppContext, overflow],
  "overflow at vLLM": [faults.vllmContext, overflow],
  "overflow at Ollama": [faults.ollamaContext, overflow],
  "SGLang's flat error": [
    faults.sglangFlat,
    {
      status: 400,
      type: "BadRequestError",
      message: /top_p must be/,
      anthropic: "invalid_request_error",
    },
  ],
  "TGI's validation": [
    faults.tgiValidation,
    { status: 422, message: /Input validation error/, anthropic: "invalid_request_error" },
  ],
  "LocalAI without a body": [answer(400, ""), { status: 400, anthropic: "invalid_request_error" }],
  "an engine that wants a key": [faults.unauthorized, upstreamError],
  "an engine that forbids": [faults.forbidden, upstreamError],
  "a redirect": [answer(307, "", { Location: "http://127.0.0.1:9/v1/x" }), upstreamError],
  "500 in HTML": [faults.htmlGateway(500), upstreamError],
  "502 in HTML": [faults.htmlGateway(502), upstreamError],
  "504 in HTML": [faults.htmlGateway(504), upstreamError],
  "200 in HTML": [faults.htmlGateway(200), invalid],
  "200 without a body": [answer(200, ""), invalid],
  "200 with broken JSON": [answer(200, '{"choices": nonsense}'), invalid],
  "200 with other JSON": [answer(200, { models: [] }), invalid],
  "200 with a JSON null": [answer(200, "null"), invalid],
  "a reset before the headers": [
    { kind: "drop", by: "reset" },
    { ...upstreamError, code: "upstream_unreachable" },
  ],
  "an end before the headers": [
    { kind: "drop", by: "fin" },
    { ...upstreamError, code: "upstream_unreachable" },
  ],
};

const busyCases: Record<string, [Fault, Expected]> = {
  "Ollama is full": [faults.ollamaBusy, busy],
  "vLLM is full": [faults.vllmBusy, busy],
  "TGI is full": [faults.tgiBusy, busy],
  "LocalAI is full": [faults.busyFor(7), { ...busy, retryAfter: "7" }],
  "LocalAI cools down": [faults.busyFor(10, 503), { ...busy, retryAfter: "10" }],
  "llama.cpp loads": [faults.loadingModel, busy],
};

const messages = (url: string, body: Record<string, unknown> = {}): Promise<Answer> =>
  send(`${url}/v1/messages`, chatBody({ max_tokens: 9, ...body }));

/** Once as a stream and once in one piece, in both dialects; `modelOf` names the model of each. */
async function checkBoth(
  { url, gateway }: Pick<Fleet<string>, "url" | "gateway">,
  expected: Expected,
  modelOf: (index: number) => string,
  attempted: number,
): Promise<void> {
  for (const [index, stream] of [false, true].entries()) {
    const model = modelOf(2 * index);
    const chat = await openaiChat(url, { stream, model });
    const error = expectError(chat, expected.status, expected.code);
    if (expected.type !== undefined) assert.equal(error.type, expected.type);
    if (expected.message !== undefined) assert.match(error.message, expected.message);
    if (expected.retryAfter !== undefined) {
      assert.equal(chat.headers.get("retry-after"), expected.retryAfter);
    }
    assert.match(chat.headers.get("x-tidegate-backend") ?? "", /^a/);
    assert.equal(chat.headers.get("x-tidegate-attempts"), String(attempted));
    const record = await gateway.record(chat.headers.get("x-request-id") ?? "");
    assert.deepEqual([record.status, record.ending], [expected.status, "failed"]);
    if (expected.code) assert.equal(record.cause, expected.code);

    const anthropic = await messages(url, { stream, model: modelOf(2 * index + 1) });
    const message = expectAnthropicError(anthropic, expected.status, expected.anthropic);
    if (expected.message !== undefined) assert.match(message, expected.message);
  }
}

describe("errors of engines", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    // The same engine fails again and again: its breaker is not what is asked here.
    fleet = await startFleet(
      { a: { models: ["test-model"], backend: { healthInterval: 60_000 } } },
      { circuitBreaker: { failureThreshold: 1_000_000 } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  for (const [name, [fault, expected]] of Object.entries(cases)) {
    it(`${name}: ${expected.status} ${expected.code ?? ""}`, TIMEOUT, async () => {
      fleet.engines.a.behave({ fault });
      await checkBoth(fleet, expected, () => "test-model", 1);
    });
  }

  it("a model that is listed and gone: 404 in Ollama's words", TIMEOUT, async () => {
    const ollama = await startFleet({ o: { kind: "ollama", models: ["gone"] } });
    try {
      ollama.engines.o.behave({ fault: faults.ollamaNoModel });
      const error = expectError(await openaiChat(ollama.url, { model: "gone" }), 404);
      assert.deepEqual([error.type, error.code], ["not_found_error", null]);
      assert.match(error.message, /model 'gone' not found/);
      const anthropic = await send(
        `${ollama.url}/v1/messages`,
        chatBody({ model: "gone", max_tokens: 9 }),
      );
      assert.match(
        expectAnthropicError(anthropic, 404, "not_found_error"),
        /model 'gone' not found/,
      );
    } finally {
      await ollama.close();
    }
  });

  it("LM Studio's string and an error object in a 200: 502", TIMEOUT, async () => {
    for (const fault of [faults.lmStudioUnexpected, faults.errorIn200]) {
      fleet.engines.a.behave({ fault });
      for (const stream of [false, true]) {
        const { code } = expectError(await openaiChat(fleet.url, { stream }), 502);
        assert.match(String(code), /^upstream_(error|invalid_response)$/);
        expectAnthropicError(await messages(fleet.url, { stream }), 502, "api_error");
      }
    }
  });

  it("an error as the first event: 502", TIMEOUT, async () => {
    for (const ends of ["done", "eof", "reset"] as const) {
      fleet.engines.a.behave({ fault: { kind: "error", afterTokens: 0, ends } });
      const { code } = expectError(await openaiChat(fleet.url, { stream: true }), 502);
      // A reset takes along what has not been read yet.
      const codes =
        ends === "reset" ? ["upstream_error", "upstream_incomplete"] : ["upstream_error"];
      assert.ok(codes.includes(String(code)), String(code));
      expectAnthropicError(await messages(fleet.url, { stream: true }), 502, "api_error");
    }
  });

  it("JSON where a stream was asked for: 502", TIMEOUT, async () => {
    fleet.engines.a.behave({ fault: { kind: "unstreamed" } });
    expectError(await openaiChat(fleet.url, { stream: true }), 502, "upstream_invalid_response");
  });

  it("a stream of the wrong type: 502", TIMEOUT, async () => {
    fleet.engines.a.behave({ contentType: "text/html" });
    expectError(await openaiChat(fleet.url, { stream: true }), 502, "upstream_invalid_response");
  });

  it("an unknown route: 404 in the engine's words, 501 on the newer routes", TIMEOUT, async () => {
    for (const [fault, words] of [
      [faults.fastapiNotFound, /Not Found/],
      [faults.ginNotFound, /404 page not found/],
    ] as const) {
      fleet.engines.a.behave({ fault });
      assert.match(expectError(await openaiChat(fleet.url), 404).message, words);
      expectAnthropicError(await messages(fleet.url), 501, "api_error");
      const responses = await send(`${fleet.url}/v1/responses`, {
        model: "test-model",
        input: "x",
      });
      expectError(responses, 501, "unsupported_endpoint");
    }
  });

  it("speaks Anthropic's to who sends anthropic-version, whatever the route", TIMEOUT, async () => {
    const headers = { "anthropic-version": "2023-06-01" };
    const unknown = await openaiChat(fleet.url, { model: "nope" }, { headers });
    expectAnthropicError(unknown, 404, "not_found_error");
    expectAnthropicError(
      await send(`${fleet.url}/nope`, undefined, { headers }),
      404,
      "not_found_error",
    );
    fleet.engines.a.behave({ fault: faults.ollamaLoadFailed });
    expectAnthropicError(await openaiChat(fleet.url, {}, { headers }), 502, "api_error");
  });

  it("speaks Ollama's below /api", TIMEOUT, async () => {
    const answer = await send(`${fleet.url}/api/nope`);
    assert.equal(answer.status, 404);
    assert.deepEqual(Object.keys(answer.json()), ["error"]);
    assert.equal(typeof answer.json().error, "string");
  });

  it("says what the engine said, but not who it is", TIMEOUT, async () => {
    fleet.engines.a.behave({
      fault: answer(400, { error: { message: "bad\u0000 \u001b[31m thing", code: 7 } }),
    });
    const { message } = expectError(await openaiChat(fleet.url), 400);
    assert.match(message, /bad.* thing/);
  });

  it("a whole answer that breaks off: 502 upstream_incomplete", TIMEOUT, async () => {
    for (const by of ["fin", "reset", "eof"] as const) {
      for (const afterBytes of [1, 50, 200]) {
        fleet.engines.a.behave({ fault: { kind: "cut", by, afterBytes } });
        const { code } = expectError(await openaiChat(fleet.url), 502);
        // A clean end after half of the JSON may be called either.
        const allowed =
          by === "eof" ? /^upstream_(incomplete|invalid_response)$/ : /^upstream_incomplete$/;
        assert.match(String(code), allowed, `${by} ${afterBytes}`);
        expectAnthropicError(await messages(fleet.url), 502, "api_error");
      }
    }
  });

  it("no answer in time: 504 for streams and for others", TIMEOUT, async () => {
    const limited = await startFleet(
      { slow: { behaviour: { headersDelayMs: 5000 } } },
      { timeouts: { firstByteMs: 200, totalMs: 250 } },
    );
    try {
      expectError(await openaiChat(limited.url, { stream: true }), 504, "upstream_timeout");
      expectError(await openaiChat(limited.url), 504, "upstream_timeout");
      const anthropic = await send(`${limited.url}/v1/messages`, chatBody({ max_tokens: 9 }));
      expectAnthropicError(anthropic, 504, "timeout_error");
      assert.equal(limited.engines.slow.activeGenerations(), 0, "the engine was stopped");
    } finally {
      await limited.close();
    }
  });

  it("an engine that is away: 502, then what it is", TIMEOUT, async () => {
    const away = await startFleet({
      gone: { backend: { models: ["test-model"], healthInterval: 60_000 } },
    });
    try {
      away.engines.gone.stopListening();
      expectError(await openaiChat(away.url), 502, "upstream_unreachable");
      expectError(await openaiChat(away.url, { stream: true }), 502, "upstream_unreachable");
      await away.engines.gone.listenAgain();
      assert.equal((await openaiChat(away.url)).status, 200);
    } finally {
      await away.close();
    }
  });
});

describe("errors of busy engines, where nobody waits", () => {
  // One that said so gets nothing more for a second: a backend and a model for each request.
  const start = (count: number): Promise<Fleet<string>> => {
    const ids = Array.from({ length: count }, (_, index) => `a${index}`);
    return startFleet(Object.fromEntries(ids.map((id) => [id, { models: [id] }])), {
      queue: { maxWaitMs: 0 },
    });
  };

  for (const [name, [fault, expected]] of Object.entries(busyCases)) {
    it(`${name}: ${expected.status} ${expected.code ?? ""}`, TIMEOUT, async () => {
      const fleet = await start(4);
      try {
        for (const engine of Object.values(fleet.engines)) engine.behave({ fault });
        await checkBoth(fleet, expected, (index) => `a${index}`, 1);
      } finally {
        await fleet.close();
      }
    });
  }

  it("turns any Retry-After into a true number of seconds", TIMEOUT, async () => {
    const inFive = new Date(Date.now() + 5000).toUTCString();
    const cases = [
      ["0", 1, 1],
      ["90", 90, 90],
      ["0.5", 1, 1],
      ["nonsense", 1, 1],
      ["-3", 1, 1],
      [inFive, 1, 6],
    ] as const;
    const fleet = await start(cases.length);
    try {
      for (const [index, [said, least, most]] of cases.entries()) {
        const fault = answer(429, { error: "busy" }, { "Retry-After": said });
        fleet.engines[`a${index}`]?.behave({ fault });
        const { headers } = await openaiChat(fleet.url, { model: `a${index}` });
        const seconds = Number(headers.get("retry-after"));
        assert.ok(
          Number.isInteger(seconds) && seconds >= least && seconds <= most,
          `${said}: ${seconds}`,
        );
        assert.equal(headers.get("x-should-retry"), seconds > 60 ? "false" : null);
      }
    } finally {
      await fleet.close();
    }
  });
});
