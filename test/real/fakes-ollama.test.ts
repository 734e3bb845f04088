/** Keeps the fake Ollama and the fake vLLM honest: see `fakes.ts`. A running vLLM (model `tiny`) is taken from TIDEGATE_TEST_VLLM_URL. */
import process from "node:process";
import type { Answer } from "../support/client.ts";
import type { Check, Fields } from "./fakes.ts";
import {
  ask,
  chatPath,
  compare,
  jsonAt,
  keysOf,
  LONG,
  look,
  MESSAGES,
  post,
  SHORT,
  stream,
  tellOf,
  told,
  USAGE,
  whole,
} from "./fakes.ts";
import { missing, startOllama } from "./support.ts";

const GIN_NOT_FOUND = "404 404 page not found";

const ollama: Check[] = [
  [
    "what is there",
    {
      "GET /": "200 Ollama is running",
      "GET /api/version": "200",
      "GET /health": GIN_NOT_FOUND,
      "GET /metrics": GIN_NOT_FOUND,
      "GET /props": GIN_NOT_FOUND,
      [`GET ${chatPath}`]: "405 405 method not allowed",
      "GET /v1/models/nope": "404 not_found_error null",
      "GET /v1/models/smol-a": "200",
    },
    look(`/ /api/version /health /metrics /props ${chatPath} /v1/models/nope /v1/models/smol-a`),
  ],
  [
    "the lists",
    [
      "created,id,object,owned_by",
      "capabilities,details,digest,model,modified_at,name,size",
      "context_length,embedding_length,families,family,format,parameter_size,parent_model,quantization_level",
      ["minilm:latest", "smol-a:latest", "smol-b:latest"],
    ],
    async (at) => {
      const { data } = (await jsonAt(at, "/v1/models")) as { data: Fields[] };
      const { models } = (await jsonAt(at, "/api/tags")) as { models: Fields[] };
      const smol = models.find(({ name }) => name === "smol-a:latest");
      const names = models.map(({ name }) => String(name)).toSorted();
      return [keysOf(data[0]), keysOf(smol), keysOf(smol?.details), names];
    },
  ],
  [
    "loaded by an empty prompt, shown, unloaded by keep_alive 0",
    [
      "load",
      "context_length,details,digest,expires_at,model,name,size,size_vram",
      "families,family,format,parameter_size,parent_model,quantization_level",
      "unload",
      0,
      200,
    ],
    async (at) => {
      const generate = (more: Fields): Promise<Answer> =>
        ask(`${at.url}/api/generate`, { model: "smol-a", ...more });
      const loaded = (await generate({})).json().done_reason;
      const [model] = (await jsonAt(at, "/api/ps")).models as Fields[];
      const unloaded = (await generate({ keep_alive: 0 })).json().done_reason;
      const { length } = (await jsonAt(at, "/api/ps")).models as Fields[];
      const again = (await generate({ keep_alive: 0 })).status;
      return [loaded, keysOf(model), keysOf(model?.details), unloaded, length, again];
    },
  ],
  [
    "a whole chat",
    [
      "choices,created,id,model,object,system_fingerprint,usage",
      "completion_tokens,prompt_tokens,total_tokens",
      "smol-a",
    ],
    whole(chatPath, { ...SHORT, model: "smol-a", messages: MESSAGES }, ["model"]),
  ],
  [
    "a stream with usage",
    ["text/event-stream", "role content", "content", "finish", "no choice usage", "[DONE]"],
    stream(chatPath, { ...SHORT, ...USAGE, model: "smol-a", messages: MESSAGES }),
  ],
  [
    "a stream of a completion, with zeros",
    ["text/event-stream", "text usage", "text finish usage", "no choice usage", "[DONE]"],
    stream("/v1/completions", { ...SHORT, ...USAGE, model: "smol-a", prompt: "One, two" }),
  ],
  [
    "Messages",
    [
      "text/event-stream",
      "message_start",
      "content_block_start",
      "content_block_delta",
      "content_block_stop",
      "message_delta",
      "message_stop",
    ],
    stream("/v1/messages", { ...SHORT, model: "smol-a", messages: MESSAGES }),
  ],
  [
    "what is too long is cut",
    [200, true],
    async (at) => {
      const body = { model: "smol-a", messages: LONG, max_tokens: 1 };
      const answer = await ask(at.url + chatPath, body);
      const { prompt_tokens } = answer.json().usage as { prompt_tokens: number };
      return [answer.status, prompt_tokens < 2048];
    },
  ],
  [
    "refusals of a chat",
    {
      broken: "400 invalid_request_error null",
      nameless: "400 invalid_request_error null",
      unknown: "404 not_found_error null",
      empty: "400 invalid_request_error null",
      embedder: "400 invalid_request_error null",
    },
    post(chatPath, {
      broken: "{bad",
      nameless: { messages: MESSAGES },
      unknown: { model: "nope", messages: MESSAGES },
      empty: { model: "smol-a", messages: [] },
      embedder: { model: "minilm", messages: MESSAGES },
    }),
  ],
  [
    "other refusals",
    {
      "POST /v1/messages": "404 not_found_error anthropic",
      "POST /api/chat": "404 string",
      "POST /v1/messages/count_tokens": GIN_NOT_FOUND,
      "POST /v1/rerank": GIN_NOT_FOUND,
    },
    (at) =>
      tellOf(at, [
        ["/v1/messages", { model: "nope", max_tokens: 1, messages: MESSAGES }],
        ["/api/chat", { model: "nope", messages: MESSAGES }],
        ["/v1/messages/count_tokens", { model: "smol-a" }],
        ["/v1/rerank", { model: "smol-a" }],
      ]),
  ],
  [
    "embeddings",
    {
      text: "200",
      tokens: "400 invalid_request_error null",
      lists: "400 invalid_request_error null",
      chat: "501 api_error null",
    },
    post("/v1/embeddings", {
      text: { model: "minilm", input: ["a", "b"] },
      tokens: { model: "minilm", input: [1, 2] },
      lists: { model: "minilm", input: [[1, 2]] },
      chat: { model: "smol-a", input: "a" },
    }),
  ],
  [
    "a foreign Origin",
    ["403", "200"],
    async (at) => {
      const from = (origin: string): Promise<Answer> =>
        ask(`${at.url}/api/tags`, undefined, { headers: { origin } });
      return [told(await from("http://evil.example")), told(await from("http://localhost:3000"))];
    },
  ],
];

const DETAIL = '404 "Not Found"';
const SSE = "text/event-stream; charset=utf-8";

const vllm: Check[] = [
  [
    "what is there",
    {
      "GET /health": "200",
      "GET /version": "200",
      "GET /load": "200",
      "GET /": DETAIL,
      "GET /is_sleeping": DETAIL,
      "GET /v1/models/tiny": DETAIL,
      [`GET ${chatPath}`]: '405 "Method Not Allowed"',
    },
    look(`/health /version /load / /is_sleeping /v1/models/tiny ${chatPath}`),
  ],
  [
    "the list",
    "created,id,max_model_len,object,owned_by,parent,permission,root",
    async (at) => keysOf(((await jsonAt(at, "/v1/models")) as { data: Fields[] }).data[0]),
  ],
  [
    "a stream with usage",
    [SSE, "role content", "content", "content finish", "no choice usage", "[DONE]"],
    stream(chatPath, { ...SHORT, ...USAGE, model: "tiny", messages: MESSAGES, ignore_eos: true }),
  ],
  [
    "Messages",
    [
      SSE,
      "message_start",
      "content_block_start",
      "content_block_delta",
      "content_block_stop",
      "message_delta",
      "message_stop",
    ],
    stream("/v1/messages", { max_tokens: 40, model: "tiny", messages: MESSAGES }),
  ],
  [
    "refusals of a chat",
    {
      broken: "400 Bad Request 400",
      unknown: "404 NotFoundError 404",
      missing: "400 Bad Request 400",
      empty: "400 BadRequestError 400",
      long: "400 BadRequestError 400",
      nameless: "200",
    },
    post(chatPath, {
      broken: "{bad",
      unknown: { model: "nope", messages: MESSAGES },
      missing: { model: "tiny" },
      empty: { model: "tiny", messages: [] },
      long: { model: "tiny", messages: LONG },
      nameless: { model: "", messages: MESSAGES, max_tokens: 1 },
    }),
  ],
  [
    "other refusals",
    {
      "POST /v1/messages": "404 NotFoundError anthropic",
      "POST /v1/messages again": "400 Bad Request 400",
      "POST /v1/embeddings": DETAIL,
      "POST /v1/rerank": DETAIL,
    },
    (at) =>
      tellOf(at, [
        ["/v1/messages", { model: "nope", max_tokens: 1, messages: MESSAGES }],
        ["/v1/messages", { model: "tiny", max_tokens: 1 }],
        ["/v1/embeddings", { model: "tiny", input: "x" }],
        ["/v1/rerank", { model: "tiny", query: "x", documents: ["a"] }],
      ]),
  ],
  [
    "without its content-type",
    "400 Bad Request null",
    async (at) => {
      const headers = { "content-type": "text/plain" };
      const { error } = (await ask(at.url + chatPath, {}, { headers })).json() as {
        error: Fields;
      };
      return `${String(error.code)} ${String(error.type)} ${String(error.param)}`;
    },
  ],
];

const noOllama = missing("ollama");
const vllmUrl = process.env.TIDEGATE_TEST_VLLM_URL ?? null;
const noVllm = vllmUrl === null && "no TIDEGATE_TEST_VLLM_URL";
if (noVllm !== false) console.log(`skipped: vllm: ${noVllm}`);

compare(
  "Ollama",
  noOllama,
  () => startOllama(),
  {
    kind: "ollama",
    models: ["smol-a", "smol-b", "minilm"],
    behaviour: { maxLoaded: 2, contextLength: 2048 },
  },
  ollama,
);
compare(
  "vLLM",
  noVllm,
  () => Promise.resolve({ url: vllmUrl ?? "" }),
  { kind: "vllm", models: ["tiny"], behaviour: { contextLength: 512 } },
  vllm,
);
