/**
 * How a fake engine behaves, and the faults of the real ones. "wire" is `reference/wire.md`, "real" is
 * `reference/real-engines.md`: every fault names the section whose words it repeats.
 */

export interface ToolCall {
  name: string;
  arguments: string;
}

export type Fault =
  /** Accepts and never answers. */
  | { kind: "hang" }
  /** Leaves before the response headers. */
  | { kind: "drop"; by: "reset" | "fin" }
  /** Any answer in the place of the real one; `length` lies about the body's length. */
  | {
      kind: "answer";
      status: number;
      body: unknown;
      contentType?: string;
      headers?: Record<string, string>;
      length?: number;
    }
  /** An error event after n tokens of a stream (0: the first event); a non-stream gets a 500. */
  | {
      kind: "error";
      afterTokens: number;
      error?: unknown;
      ends: "done" | "eof" | "reset" | "silence";
    }
  /**
   * Ends early, after tokens or after bytes of the body. "eof" is the clean end of a chunked body; "silence"
   * keeps the connection and says no more (real §5.2: a llama-server after SIGTERM).
   */
  | {
      kind: "cut";
      afterTokens?: number;
      afterBytes?: number;
      by: "reset" | "fin" | "eof" | "silence";
    }
  /**
   * Fails after n tokens of a stream as its own kind does (wire §1.7): words, framing and end of that kind.
   * A non-stream gets what the kind says then.
   */
  | { kind: "dies"; afterTokens: number }
  /** Ollama's swallowed error: a chunk with `model: ""`, then a clean EOF (real §5.1, wire §1.7). */
  | { kind: "swallowed"; afterTokens: number }
  /** Everything but the end marker; without a finish_reason too, where `finish` is false (wire §1.7). */
  | { kind: "endless"; finish: boolean }
  /** One event whose data is no JSON, then the rest as if nothing had happened. */
  | { kind: "malformed"; afterTokens: number; frame?: string }
  /** Exactly these bytes as a stream's body, chunked as `chunking` says. */
  | { kind: "raw"; body: string | Uint8Array }
  /** A stream was asked for, a JSON completion comes (wire §4, trap 2). */
  | { kind: "unstreamed" };

export interface Behaviour {
  /** Words that are generated: a list, or how many. */
  tokens: number | string[];
  reasoning: string[];
  toolCalls: ToolCall[];
  finishReason: string;
  /** null: counted from the request. */
  promptTokens: number | null;
  cachedTokens: number | null;

  /**
   * Reads a prompt at so many milliseconds a word before its headers. What an earlier prompt began with is
   * not read again, and told as `cached_tokens` (real §5.2: llama.cpp's `cache_prompt`), where it is kept.
   */
  prefill: { msPerToken: number; keeps: boolean } | null;

  /** It takes no notice of the limit that the request sets (wire §1.8: Ollama, of one of the fields). */
  ignoresLimit: boolean;
  /** Before the response headers: engines hold them back until they have a token (real §5.1, §5.2). */
  headersDelayMs: number;
  /** After the headers, before the first token. */
  firstTokenDelayMs: number;
  tokenDelayMs: number;
  /** Silence after that many tokens, `stallMs` long (Infinity: for ever). */
  stallAfterTokens: number | null;
  stallMs: number;
  /** An answer in one piece: silence between its halves. */
  wholePauseMs: number;
  /** Comments while silent, as llama.cpp sends every 30 s (wire §1.8); 0: none. */
  pingMs: number;

  /**
   * Generations at once: per model where several can be loaded, in all elsewhere. Further ones wait without
   * headers (wire §1.4). llama.cpp and LM Studio tell the number (wire §1.2).
   */
  slots: number;
  /** Beyond so many in the queue the kinds that can refuse do (vLLM counts those that run, real §5.3). */
  maxQueued: number;
  /** Models resident at once; a request for another one swaps (wire §1.3). Infinity: all are, always. */
  maxLoaded: number;
  loadMs: number;
  loadFails: boolean;
  /** The server is up and its model is not: llama.cpp's 503 on every route (real §5.2), SGLang's `/health`. */
  loading: boolean;
  /** The model has been put away while idle; the next task wakes it and sets this back (wire §1.3). */
  sleeping: boolean;
  /** What `--api-key` was; what it guards differs by kind (real §5.2). */
  apiKey: string | null;
  /** Tokens; a longer prompt is refused in the kind's own way, or cut by those that cut (real §5.1). */
  contextLength: number | null;
  /** Requests that may wait for a load; beyond: 503 (wire §1.4). */
  maxQueue: number;

  lineEnd: "\n" | "\r\n";
  /** Between the events: llama.cpp's bare comment, a worded one, LocalAI's `event: ping` (wire §1.8). */
  pings: "none" | "bare" | "comment" | "event";
  /** How a body is split over writes. */
  chunking: "event" | "once" | number;
  /** Numbers in a vector, 4 at most; a request may ask for less. */
  vectorLength: number;
  /** How vectors are written: as was asked for, as far as this kind can, or always in one way. */
  vectors: "asked" | "float" | "base64";
  /** A first chunk without content: not the first token (wire §1.8). Ollama sends none (real §6.6). */
  roleFirst: boolean;
  /** The reason on the last content chunk, no separate finish chunk (real §5.3, vLLM). */
  finishOnLastToken: boolean;
  /** llama.cpp's `timings`: on the finish chunk, on the usage chunk where there is one (real §6.4). */
  timings: boolean;
  /** A stream of so many bytes, as fast as the client takes it. */
  flood: { bytes: number; frameBytes?: number } | null;
  /** Instead of the right one. */
  contentType: string | null;
  /** Further response headers. */
  headers: Record<string, string>;
  /** Paths this server does not have. */
  without: string[];

  fault: Fault | null;
  /** How many inference requests it strikes; then the engine is well again. */
  faultTimes: number;
  /** The same for the GET routes, that is, for probes. */
  probeFault: Fault | null;
}

export const calm: Behaviour = {
  tokens: 5,
  reasoning: [],
  toolCalls: [],
  finishReason: "stop",
  promptTokens: null,
  cachedTokens: null,
  prefill: null,
  ignoresLimit: false,
  headersDelayMs: 0,
  firstTokenDelayMs: 0,
  tokenDelayMs: 0,
  stallAfterTokens: null,
  stallMs: Number.POSITIVE_INFINITY,
  wholePauseMs: 0,
  pingMs: 0,
  slots: Number.POSITIVE_INFINITY,
  maxQueued: Number.POSITIVE_INFINITY,
  maxLoaded: Number.POSITIVE_INFINITY,
  loadMs: 0,
  loadFails: false,
  loading: false,
  sleeping: false,
  apiKey: null,
  contextLength: null,
  maxQueue: 512,
  lineEnd: "\n",
  pings: "none",
  chunking: "event",
  vectorLength: 4,
  vectors: "asked",
  roleFirst: true,
  finishOnLastToken: false,
  timings: false,
  flood: null,
  contentType: null,
  headers: {},
  without: [],
  fault: null,
  faultTimes: Number.POSITIVE_INFINITY,
  probeFault: null,
};

function answer(status: number, body: unknown, headers: Record<string, string> = {}): Fault {
  return { kind: "answer", status, body, headers };
}

function text(status: number, body: string): Fault {
  return { kind: "answer", status, body, contentType: "text/plain" };
}

/** The real engines' own words. */
export const faults = {
  /** wire §1.4, real §5.1: Ollama's queue of loads is full. Two blanks, no Retry-After. */
  ollamaBusy: answer(503, {
    error: {
      message: "server busy, please try again.  maximum pending requests exceeded",
      type: "api_error",
      param: null,
      code: null,
    },
  }),
  /** real §5.3: vLLM with --max-num-queued-reqs. No Retry-After, numeric code. */
  vllmBusy: answer(503, {
    error: {
      message:
        "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.",
      type: "Service Unavailable",
      param: null,
      code: 503,
    },
  }),
  /** wire §1.4: TGI at max_concurrent_requests. */
  tgiBusy: answer(429, { error: "Model is overloaded", error_type: "overloaded" }),
  /** wire §1.4: LocalAI at limits.max_concurrent. */
  busyFor: (seconds: number, status: 429 | 503 = 429): Fault =>
    answer(
      status,
      { error: { message: "too many concurrent requests", type: "server_error", code: "busy" } },
      { "Retry-After": String(seconds) },
    ),
  /** wire §1.1, real §5.2: llama.cpp while loading, on every route. */
  loadingModel: answer(503, {
    error: { message: "Loading model", type: "unavailable_error", code: 503 },
  }),
  /** wire §1.7: Ollama out of memory. */
  ollamaLoadFailed: answer(500, {
    error: {
      message: "llama-server process has terminated: cudaMalloc failed: out of memory",
      type: "api_error",
      param: null,
      code: null,
    },
  }),
  /** wire §1.7: Ollama `/v1` for a name it does not have. */
  ollamaNoModel: answer(404, {
    error: { message: "model 'gone' not found", type: "not_found_error", param: null, code: null },
  }),
  /** wire §1.7: Ollama's native routes. */
  stringError: answer(400, { error: "invalid options: num_predict" }),
  /** real §5.2: llama.cpp, numeric code, no param. */
  llamacppContext: answer(400, {
    error: {
      code: 400,
      message: "the request exceeds the available context size, try increasing it",
      type: "exceed_context_size_error",
      n_prompt_tokens: 8014,
      n_ctx: 2048,
    },
  }),
  /** real §5.3: vLLM. */
  vllmContext: answer(400, {
    error: {
      message:
        "This model's maximum context length is 512 tokens. However, your request has 8014 input tokens.",
      type: "BadRequestError",
      param: null,
      code: 400,
    },
  }),
  /** wire §1.7: Ollama, a single over-long prompt with context shift off. */
  ollamaContext: answer(400, {
    error: {
      message: "the prompt is longer than the context length currently available",
      type: "invalid_request_error",
      param: null,
      code: null,
    },
  }),
  /** wire §1.7: SGLang up to 0.5.16, flat. */
  sglangFlat: answer(400, {
    object: "error",
    message: "top_p must be in (0, 1], got 7.0.",
    type: "BadRequestError",
    param: "top_p",
    code: 400,
  }),
  /** wire §1.7: TGI validation. */
  tgiValidation: answer(422, { error: "Input validation error: `stop`", error_type: "validation" }),
  /** real §5.3: an unknown route of vLLM. */
  fastapiNotFound: answer(404, { detail: "Not Found" }),
  /** real §5.1: an unknown route of Ollama. */
  ginNotFound: text(404, "404 page not found"),
  /** wire §1.1: LM Studio, unknown paths and methods. */
  lmStudioUnexpected: answer(200, {
    error: "Unexpected endpoint or method. (POST /v1/chat/completions)",
  }),
  /** wire §4, trap 6: an error object inside a 200. */
  errorIn200: answer(200, {
    error: { message: "model crashed", type: "server_error", param: null, code: null },
  }),
  /** wire §1.1: TGI with an API key set, empty body. */
  unauthorized: text(401, ""),
  /** real §5.1: Ollama, a foreign Host or Origin, empty body. */
  forbidden: text(403, ""),
  /** What stands in front of an engine answers in HTML. */
  htmlGateway: (status: number): Fault => ({
    kind: "answer",
    status,
    body: "<html><body><h1>Bad Gateway</h1></body></html>",
    contentType: "text/html",
  }),
  /** wire §1.7: vLLM, the engine's error as first event of a 200, then [DONE]. */
  vllmFirstEvent: { kind: "error", afterTokens: 0, ends: "done" },
  /** wire §1.7: vLLM, mid-stream, then [DONE]. */
  vllmMidStream: (afterTokens: number): Fault => ({ kind: "error", afterTokens, ends: "done" }),
  /** wire §1.7: llama.cpp, mid-stream, then EOF without [DONE]. */
  llamacppMidStream: (afterTokens: number): Fault => ({ kind: "error", afterTokens, ends: "eof" }),
  /** real §5.1: Ollama's runner was killed. */
  ollamaSwallowed: (afterTokens: number): Fault => ({ kind: "swallowed", afterTokens }),
} satisfies Record<string, Fault | ((...parameters: never[]) => Fault)>;
