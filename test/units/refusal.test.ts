/** An engine's refusal, in each of the shapes of wire.md §1.7, as fault and as the caller's error. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import type { Kind } from "../../src/config.ts";
import type { Fault } from "../../src/core/outcome.ts";
import { messages } from "../../src/dialects/anthropic.ts";
import type { Endpoint } from "../../src/dialects/dialect.ts";
import { chatCompletions, embeddings, rerank, responses } from "../../src/dialects/openai.ts";
import { engineOf } from "../../src/engines/kinds.ts";
import { readDenial, readRefusal } from "../../src/engines/refusal.ts";

interface Refused {
  kind: Kind;
  status: number;
  /** An object is sent as JSON. */
  body: object | string;
  headers?: Record<string, string>;
  endpoint?: Endpoint;
}

function read({ kind, status, body, headers = {}, endpoint = chatCompletions }: Refused) {
  const text = typeof body === "string" ? body : JSON.stringify(body);
  return readRefusal(engineOf(kind), "box", endpoint, status, new Headers(headers), text);
}

interface Expected {
  fault: Fault;
  status: number;
  type: string;
  code: string | null;
  says: RegExp;
}

const rejected = (status: number, says: RegExp, type = "invalid_request_error"): Expected => ({
  fault: "rejected",
  status,
  type,
  code: null,
  says,
});
const tooLong = (says: RegExp): Expected => ({
  ...rejected(400, says),
  code: "context_length_exceeded",
});
const busy = (says: RegExp): Expected => ({
  fault: "busy",
  status: 429,
  type: "rate_limit_error",
  code: "rate_limit_exceeded",
  says,
});
const broken = (says: RegExp): Expected => ({
  fault: "server_error",
  status: 502,
  type: "server_error",
  code: "upstream_error",
  says,
});
const misconfigured = (says: RegExp): Expected => ({ ...broken(says), fault: "misconfigured" });
const unsupported = (says: RegExp): Expected => ({
  fault: "unsupported",
  status: 501,
  type: "invalid_request_error",
  code: "unsupported_endpoint",
  says,
});

/** Ollama, vLLM, llama.cpp put the error in an envelope; the number in `code` is theirs. */
const envelope = (message: string, type: string, code: unknown = null, param: unknown = null) => ({
  error: { message, type, param, code },
});

const llamacpp500 = (message: string) => ({ error: { code: 500, message, type: "server_error" } });

const LOADING = envelope("Loading model", "unavailable_error", 503);
const OLLAMA_BUSY = "server busy, please try again.  maximum pending requests exceeded";
const VLLM_BUSY =
  "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.";
const VLLM_TOO_LONG =
  "This model's maximum context length is 512 tokens. However, you requested 700 tokens.";

const cases: [what: string, refused: Refused, expected: Expected][] = [
  [
    "Ollama: unknown model",
    {
      kind: "ollama",
      status: 404,
      body: envelope("model 'x' not found", "not_found_error"),
    },
    rejected(404, /model 'x' not found/, "not_found_error"),
  ],
  [
    "Ollama: bad JSON",
    { kind: "ollama", status: 400, body: envelope("unexpected EOF", "invalid_request_error") },
    rejected(400, /^unexpected EOF$/),
  ],
  [
    "Ollama's own API: a string",
    { kind: "ollama", status: 404, body: { error: "model 'x' not found" } },
    rejected(404, /^model 'x' not found$/),
  ],
  [
    "Ollama: unknown path, plain text",
    { kind: "ollama", status: 404, body: "404 page not found\n" },
    unsupported(/404 page not found/),
  ],
  [
    "Ollama: what its runner said, in the runner's envelope",
    {
      kind: "ollama",
      status: 400,
      body: envelope(
        '{"error":{"code":400,"message":"Multimodal data provided, but model does not support multimodal requests.","type":"invalid_request_error"}}',
        "invalid_request_error",
      ),
    },
    rejected(400, /^Multimodal data provided, but model does not support multimodal requests\.$/),
  ],
  [
    "Ollama: its runner's context is too short",
    {
      kind: "ollama",
      status: 400,
      body: envelope(
        '{"error":{"code":400,"message":"too much","type":"exceed_context_size_error"}}',
        "invalid_request_error",
      ),
    },
    tooLong(/^too much$/),
  ],
  [
    "Ollama: an embedding model cannot chat, in Anthropic's envelope",
    {
      kind: "ollama",
      status: 400,
      endpoint: messages,
      body: {
        type: "error",
        error: { type: "invalid_request_error", message: '"minilm" does not support chat' },
        request_id: "req_e9fcb65d6f1bfd0ed41bf8a3",
      },
    },
    rejected(400, /^"minilm" does not support chat$/),
  ],
  [
    "Ollama: foreign Host, an empty 403",
    { kind: "ollama", status: 403, body: "" },
    misconfigured(/HTTP 403: no words/),
  ],
  [
    "Ollama: queue full",
    { kind: "ollama", status: 503, body: envelope(OLLAMA_BUSY, "api_error") },
    busy(/maximum pending requests exceeded/),
  ],
  [
    "Ollama: the runner died",
    {
      kind: "ollama",
      status: 500,
      body: envelope("llama-server process has terminated: cudaMalloc failed", "api_error"),
    },
    broken(/cudaMalloc failed/),
  ],
  [
    "Ollama: prompt too long without context shift",
    {
      kind: "ollama",
      status: 400,
      body: envelope(
        "the prompt is longer than the context length currently available",
        "invalid_request_error",
      ),
    },
    tooLong(/longer than the context length/),
  ],
  [
    "Ollama: embeddings of a chat model",
    {
      kind: "ollama",
      status: 501,
      endpoint: embeddings,
      body: envelope("this model does not support embeddings", "api_error"),
    },
    unsupported(/does not do \/v1\/embeddings.*does not support embeddings/),
  ],
  [
    "llama.cpp: loading counts as busy",
    { kind: "llamacpp", status: 503, body: LOADING },
    busy(/Loading model/),
  ],
  [
    "llama.cpp: context overflow",
    {
      kind: "llamacpp",
      status: 400,
      body: {
        error: {
          code: 400,
          message: "the request exceeds the available context size, try increasing it",
          type: "exceed_context_size_error",
          n_prompt_tokens: 5000,
          n_ctx: 2048,
        },
      },
    },
    tooLong(/exceeds the available context size/),
  ],
  [
    "llama.cpp: only the type tells of the overflow",
    {
      kind: "llamacpp",
      status: 400,
      body: { error: { code: 400, message: "too much", type: "exceed_context_size_error" } },
    },
    tooLong(/^too much$/),
  ],
  [
    "llama.cpp: a number in code is no code",
    {
      kind: "llamacpp",
      status: 400,
      body: { error: { code: 400, message: "n > slots", type: "invalid_request_error" } },
    },
    rejected(400, /^n > slots$/),
  ],
  [
    "llama.cpp: wrong API key",
    {
      kind: "llamacpp",
      status: 401,
      body: { error: { code: 401, message: "Invalid API Key", type: "authentication_error" } },
    },
    misconfigured(/Invalid API Key.*apiKey/),
  ],
  [
    "llama.cpp: embeddings without the flag",
    {
      kind: "llamacpp",
      status: 501,
      endpoint: embeddings,
      body: {
        error: {
          code: 501,
          message: "This server does not support embeddings",
          type: "not_supported_error",
        },
      },
    },
    unsupported(/does not support embeddings/),
  ],
  [
    "llama.cpp: 500",
    { kind: "llamacpp", status: 500, body: llamacpp500("Compute error.") },
    broken(/Compute error\./),
  ],
  [
    "llama.cpp: an input to embed that is too long is its 500",
    {
      kind: "llamacpp",
      status: 500,
      endpoint: embeddings,
      body: llamacpp500(
        "input (1502 tokens) is too large to process. increase the physical batch size (current batch size: 512)",
      ),
    },
    tooLong(/^input \(1502 tokens\) is too large/),
  ],
  [
    "llama.cpp: a chat with an embedding model is its 500",
    {
      kind: "llamacpp",
      status: 500,
      body: llamacpp500("the current context does not support logits computation. skipping"),
    },
    unsupported(/does not do \/v1\/chat\/completions.*logits computation/),
  ],
  [
    "llama.cpp: an image for a model that cannot see is its 500",
    {
      kind: "llamacpp",
      status: 500,
      body: llamacpp500(
        "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
      ),
    },
    { ...rejected(400, /"box".*image input is not supported/), code: "unsupported_parameter" },
  ],
  [
    "llama.cpp: an older one lacks a path",
    {
      kind: "llamacpp",
      status: 404,
      endpoint: responses,
      body: { error: { message: "File Not Found", type: "not_found_error", code: 404 } },
    },
    unsupported(/does not do \/v1\/responses.*File Not Found/),
  ],
  [
    "llama.cpp router: a model that it does not load by itself",
    {
      kind: "llamacpp",
      status: 400,
      body: {
        error: { code: 400, message: "model is not loaded", type: "invalid_request_error" },
      },
    },
    misconfigured(/model is not loaded \(it does not load models by itself: load this one there/),
  ],
  [
    "llama.cpp router: unknown model is a 400",
    {
      kind: "llamacpp",
      status: 400,
      body: {
        error: { code: 400, message: "model 'x' not found", type: "invalid_request_error" },
      },
    },
    rejected(400, /model 'x' not found/),
  ],
  [
    "vLLM: unknown model",
    {
      kind: "vllm",
      status: 404,
      body: envelope("The model `x` does not exist.", "NotFoundError", 404, "model"),
    },
    rejected(404, /The model `x` does not exist/, "NotFoundError"),
  ],
  [
    "vLLM: context overflow",
    {
      kind: "vllm",
      status: 400,
      body: envelope(VLLM_TOO_LONG, "BadRequestError", 400),
    },
    tooLong(/maximum context length/),
  ],
  [
    "vLLM: bad parameter, dotted",
    {
      kind: "vllm",
      status: 400,
      body: envelope("Input should be a valid integer", "Bad Request", 400, "body.max_tokens"),
    },
    rejected(400, /valid integer/, "Bad Request"),
  ],
  [
    "vLLM: 422",
    {
      kind: "vllm",
      status: 422,
      body: envelope("unprocessable", "UnprocessableEntityError", 422),
    },
    rejected(422, /^unprocessable$/, "UnprocessableEntityError"),
  ],
  [
    "vLLM: 501 NotImplementedError",
    { kind: "vllm", status: 501, body: envelope("no suffix", "NotImplementedError", 501) },
    unsupported(/no suffix/),
  ],
  [
    "vLLM: unknown route is FastAPI's detail",
    { kind: "vllm", status: 404, endpoint: embeddings, body: { detail: "Not Found" } },
    unsupported(/does not do \/v1\/embeddings.*Not Found/),
  ],
  [
    "vLLM: a chat with a model that embeds, older versions",
    {
      kind: "vllm",
      status: 400,
      body: envelope("The model does not support Chat Completions API", "BadRequestError", 400),
    },
    unsupported(/does not support Chat Completions API/),
  ],
  [
    "vLLM: an image to a model that reads text only",
    {
      kind: "vllm",
      status: 400,
      body: envelope("tiny is not a multimodal model None", "BadRequestError", 400),
    },
    { ...rejected(400, /not a multimodal model/), code: "unsupported_parameter" },
  ],
  [
    "SGLang: unknown route is FastAPI's detail",
    { kind: "sglang", status: 404, endpoint: rerank, body: { detail: "Not Found" } },
    unsupported(/does not do \/v1\/rerank/),
  ],
  [
    "SGLang: embeddings of a chat model, flat",
    {
      kind: "sglang",
      status: 400,
      endpoint: embeddings,
      body: {
        object: "error",
        message:
          "This model does not appear to be an embedding model by default. Please add `--is-embedding` when launching the server or try another model.",
        type: "BadRequestError",
        param: null,
        code: 400,
      },
    },
    unsupported(/does not do \/v1\/embeddings/),
  ],
  [
    "vLLM: a response that it does not keep is no path that it lacks",
    {
      kind: "vllm",
      status: 404,
      endpoint: responses,
      body: envelope("Response with id 'resp_1' not found.", "invalid_request_error", 404),
    },
    rejected(404, /^Response with id 'resp_1' not found\.$/),
  ],
  [
    "vLLM: engine full, without Retry-After",
    { kind: "vllm", status: 503, body: envelope(VLLM_BUSY, "Service Unavailable", 503) },
    busy(/cannot accept new requests/),
  ],
  [
    "SGLang: flat",
    {
      kind: "sglang",
      status: 400,
      body: {
        object: "error",
        message: "max_tokens must be positive",
        type: "BadRequestError",
        param: null,
        code: 400,
      },
    },
    rejected(400, /^max_tokens must be positive$/, "BadRequestError"),
  ],
  [
    "SGLang: context overflow, flat",
    {
      kind: "sglang",
      status: 400,
      body: {
        object: "error",
        message: "The input (9000 tokens) is longer than the model's context length (8192 tokens).",
        type: "BadRequestError",
        param: null,
        code: 400,
      },
    },
    tooLong(/context length/),
  ],
  [
    "SGLang: wrapped",
    { kind: "sglang", status: 400, body: envelope("no such tool", "BadRequestError", 400) },
    rejected(400, /^no such tool$/, "BadRequestError"),
  ],
  [
    "LM Studio: a string",
    { kind: "lmstudio", status: 400, body: { error: "'messages' field is required" } },
    rejected(400, /^'messages' field is required$/),
  ],
  [
    "TGI: overloaded",
    {
      kind: "openai",
      status: 429,
      body: { error: "Model is overloaded", error_type: "overloaded" },
    },
    busy(/Model is overloaded/),
  ],
  [
    "TGI: validation",
    {
      kind: "openai",
      status: 422,
      body: { error: "Input validation error: `stop` must be an array", error_type: "validation" },
    },
    rejected(422, /`stop` must be an array/, "validation"),
  ],
  [
    "TGI: context overflow",
    {
      kind: "openai",
      status: 422,
      body: {
        error:
          "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 17 `inputs` tokens and 10000 `max_new_tokens`",
        error_type: "validation",
      },
    },
    tooLong(/must be <= 4096/),
  ],
  [
    "TGI: generation failed",
    { kind: "openai", status: 424, body: { error: "Generation failed", error_type: "generation" } },
    rejected(424, /^Generation failed$/, "generation"),
  ],
  [
    "TGI: 401 with an empty body",
    { kind: "openai", status: 401, body: "" },
    misconfigured(/apiKey/),
  ],
  [
    "LocalAI: opaque, no body",
    { kind: "openai", status: 500, body: "" },
    broken(/HTTP 500: no words/),
  ],
  [
    "LocalAI: a string in code",
    {
      kind: "openai",
      status: 503,
      headers: { "retry-after": "7" },
      body: { error: { message: "still loading", code: "model_loading", type: "server_error" } },
    },
    busy(/still loading/),
  ],
  [
    "OpenAI: its code is passed on",
    {
      kind: "openai",
      status: 400,
      body: envelope("too small", "invalid_request_error", "integer_below_min_value", "n"),
    },
    { ...rejected(400, /^too small$/), code: "integer_below_min_value" },
  ],
  [
    "OpenAI: context overflow by its code",
    {
      kind: "openai",
      status: 400,
      body: envelope("shorten it", "invalid_request_error", "context_length_exceeded", "messages"),
    },
    tooLong(/^shorten it$/),
  ],
  [
    "a proxy's HTML page",
    { kind: "openai", status: 502, body: "<html><h1>502 Bad Gateway</h1></html>" },
    broken(/502 Bad Gateway/),
  ],
  [
    "a redirect",
    { kind: "openai", status: 307, headers: { location: "/elsewhere" }, body: "" },
    misconfigured(/redirects are not followed.*url/),
  ],
  [
    "JSON that is no object",
    { kind: "openai", status: 400, body: '["no"]' },
    rejected(400, /^\["no"\]$/),
  ],
  [
    "error: null beside a message",
    { kind: "openai", status: 400, body: { error: null, message: "read me" } },
    rejected(400, /^read me$/),
  ],
  [
    "FastAPI's detail as a list",
    { kind: "sglang", status: 400, body: { detail: [{ loc: ["body", "n"], msg: "too big" }] } },
    rejected(400, /too big/),
  ],
];

describe("readRefusal", () => {
  for (const [what, refused, expected] of cases) {
    it(what, () => {
      const { fault, error } = read(refused);
      const { says, ...rest } = expected;
      const { status, type, code } = error;
      assert.deepEqual({ fault, status, type, code }, rest);
      assert.match(error.message, says);
      assert(code === null || typeof code === "string");
    });
  }

  it("takes the engine's Retry-After in seconds, else one second", () => {
    const after = (headers: Record<string, string>) =>
      read({ kind: "vllm", status: 503, body: "", headers }).error.retryAfterMs;
    assert.equal(after({ "retry-after": "7" }), 7000);
    assert.equal(after({ "retry-after": "0.5" }), 500);
    for (const value of ["0", "-3", "soon", "Wed, 21 Oct 2026 07:28:00 GMT", ""]) {
      assert.equal(after({ "retry-after": value }), 1000, value);
    }
    assert.equal(after({}), 1000);
  });

  it("is the path's fault on the newer routes, or in the words of a known router anywhere", () => {
    const missing = (kind: Kind, endpoint: Endpoint, body: object | string) =>
      read({ kind, status: 404, endpoint, body }).fault;
    for (const kind of ["openai", "vllm", "ollama"] as const) {
      for (const endpoint of [messages, responses, rerank]) {
        assert.equal(missing(kind, endpoint, "no such thing"), "unsupported", endpoint.path);
      }
      for (const endpoint of [chatCompletions, embeddings]) {
        assert.equal(missing(kind, endpoint, "no such thing"), "rejected", endpoint.path);
        // A plain engine's 404 may mean anything there, a wrong url above all.
        const routers = kind === "openai" ? "rejected" : "unsupported";
        assert.equal(missing(kind, endpoint, "Not Found"), routers, endpoint.path);
      }
      const unknown = envelope("The model `x` does not exist.", "NotFoundError", 404);
      assert.equal(missing(kind, messages, unknown), "rejected", "the model was not found");
    }
  });

  it("tells a path that LM Studio lacks from an answer, though both are a 200", () => {
    const denial = (kind: Kind, body: unknown) =>
      readDenial(engineOf(kind), "box", messages, JSON.stringify(body));
    const body = { error: "Unexpected endpoint or method. (POST /v1/messages)" };
    const { fault, error } = denial("lmstudio", body) ?? assert.fail();
    assert.deepEqual(
      [fault, error.status, error.code],
      ["unsupported", 501, "unsupported_endpoint"],
    );
    assert.match(error.message, /\/v1\/messages.*"box".*Unexpected endpoint/);
    assert.equal(error.detail, "HTTP 200");
    assert.equal(denial("openai", body), null, "of a plain engine that is an answer that is none");
    for (const other of [{ error: "crashed" }, { error: { message: "x" } }, {}, [], "x", null]) {
      assert.equal(denial("lmstudio", other), null, JSON.stringify(other));
    }
  });

  it("names the backend and the status in a fault of the backend", () => {
    for (const status of [401, 500, 503]) {
      const { message } = read({ kind: "vllm", status, body: { error: "x" } }).error;
      assert(message.includes('"box"') && message.includes(`HTTP ${status}`), message);
    }
  });

  it("never shows a client more than a bounded line of what an engine said", () => {
    const body = { error: { message: `a\nb\u001B[31m\u0000${"x".repeat(10_000)}`, type: "t" } };
    for (const status of [401, 500, 503]) {
      const { message } = read({ kind: "openai", status, body }).error;
      assert(message.length < 700, `${status}: ${message.length}`);
      // oxlint-disable-next-line no-control-regex -- these are what must not reach a client
      assert(!/[\u0000-\u001f\u007f-\u009f]/.test(message), JSON.stringify(message));
    }
  });

  it("keeps the lines of what an engine says about a 4xx, and nothing else that a terminal obeys", () => {
    const message = `a\n  b\u001B[31m\u0000${"x".repeat(10_000)}`;
    const told = read({ kind: "openai", status: 400, body: { error: { message, type: "t" } } });
    assert.equal(told.error.message, `a\n  b\uFFFD[31m\uFFFD${"x".repeat(4000 - 11)}`);
  });

  it("keeps an engine's words about a 4xx whole, as far as that is sensible: clients read them", () => {
    const words =
      "This model's maximum context length is 512 tokens. However, you requested 700 tokens " +
      "(200 in the messages, 500 in the completion). Please reduce the length of the messages " +
      "or completion.";
    const overflow = read({ kind: "vllm", status: 400, body: envelope(words, "BadRequestError") });
    assert.equal(overflow.error.message, words);
    const other = `${"x".repeat(120)} see the field "n"`;
    const refused = read({ kind: "vllm", status: 422, body: envelope(other, "Unprocessable") });
    assert.equal(refused.error.message, other);
  });

  it("keeps out of the log what a 4xx repeats of the request", () => {
    const body = envelope("invalid value: 'the secret prompt'", "BadRequestError", 400);
    const detail = read({ kind: "vllm", status: 400, body }).error.detail ?? "";
    assert(!detail.includes("secret"), detail);
    assert.match(detail, /HTTP 400 BadRequestError/);
  });

  it("keeps it out of the log, too, where the engine blames itself for the request", () => {
    for (const words of [
      "the secret prompt is too large to process",
      "secret input is not supported",
    ]) {
      const detail = read({ kind: "llamacpp", status: 500, body: llamacpp500(words) }).error.detail;
      assert.equal(detail, "HTTP 500 server_error");
    }
  });

  it("puts into the log what a broken engine said, bounded", () => {
    const body = envelope(`out of memory ${"x".repeat(5000)}`, "api_error");
    const detail = read({ kind: "ollama", status: 500, body }).error.detail ?? "";
    assert.match(detail, /^HTTP 500 api_error: out of memory/);
    assert(detail.length < 1000);
  });

  it("gives the record a cause of few words, never an engine's own", () => {
    const body = envelope("x", "weird", "anything_an_engine_says");
    const { error } = read({ kind: "openai", status: 418, body });
    assert.deepEqual([error.status, error.code], [418, "anything_an_engine_says"]);
    assert.equal(error.cause, "invalid_request_error");
  });
});
