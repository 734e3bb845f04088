/** Keeps the fake llama-servers honest: see `fakes.ts`. */
import { until } from "../support/client.ts";
import type { Check, Fields, Subject } from "./fakes.ts";
import {
  ask,
  chatPath,
  compare,
  isRecord,
  jsonAt,
  keysOf,
  LONG,
  look,
  MESSAGES,
  parsed,
  post,
  SHORT,
  stream,
  tellOf,
  USAGE,
  whole,
} from "./fakes.ts";
import { missing, startLlamaRouter, startLlamaServer } from "./support.ts";

const FILE_NOT_FOUND = "404 not_found_error 404";

const llamacpp: Check[] = [
  [
    "what is there",
    {
      "GET /health": "200",
      "GET /v1/health": "200",
      "GET /props": "200",
      "GET /metrics": "501 not_supported_error 501",
      "GET /": FILE_NOT_FOUND,
      "GET /version": FILE_NOT_FOUND,
      "GET /v1/models/smol-a": FILE_NOT_FOUND,
      "GET /api/tags": FILE_NOT_FOUND,
      [`GET ${chatPath}`]: FILE_NOT_FOUND,
    },
    look(`/health /v1/health /props /metrics / /version /v1/models/smol-a /api/tags ${chatPath}`),
  ],
  [
    "the list",
    [
      "data,models,object",
      "aliases,architecture,created,id,meta,object,owned_by,tags",
      ["smol-a", "llamacpp", 2048],
      "llama.cpp application/json; charset=utf-8",
    ],
    async (at) => {
      const answer = await ask(`${at.url}/v1/models`);
      const { data } = answer.json() as { data: Fields[] };
      const { id, owned_by, meta } = data[0] ?? {};
      const { server, "content-type": type } = Object.fromEntries(answer.headers);
      return [
        keysOf(answer.json()),
        keysOf(data[0]),
        [id, owned_by, (meta as Fields).n_ctx],
        `${server} ${type}`,
      ];
    },
  ],
  [
    "/props",
    [2, 2048, false],
    async (at) => {
      const props = await jsonAt(at, "/props");
      const { n_ctx } = props.default_generation_settings as Fields;
      return [props.total_slots, n_ctx, props.is_sleeping];
    },
  ],
  [
    "any name is served, the own one said",
    [
      "choices,created,id,model,object,system_fingerprint,timings,usage",
      "completion_tokens,prompt_tokens,prompt_tokens_details,total_tokens",
      "smol-a",
    ],
    whole(chatPath, { ...SHORT, model: "whatever", messages: MESSAGES }, ["model"]),
  ],
  [
    "a stream",
    ["text/event-stream", "role content=null", "content", "finish timings", "[DONE]"],
    stream(chatPath, { ...SHORT, messages: MESSAGES }),
  ],
  [
    "a stream with usage",
    [
      "text/event-stream",
      "role content=null",
      "content",
      "finish",
      "no choice usage timings",
      "[DONE]",
    ],
    stream(chatPath, { ...SHORT, ...USAGE, messages: MESSAGES }),
  ],
  [
    "a stream of a completion, with usage",
    ["text/event-stream", "text", "text finish usage timings", "[DONE]"],
    stream("/v1/completions", { ...SHORT, ...USAGE, prompt: "One, two" }),
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
    stream("/v1/messages", { ...SHORT, messages: MESSAGES }),
  ],
  [
    "Responses",
    [
      "text/event-stream",
      "response.created",
      "response.in_progress",
      "response.output_item.added",
      "response.content_part.added",
      "response.output_text.delta",
      "response.output_text.done",
      "response.content_part.done",
      "response.output_item.done",
      "response.completed",
    ],
    stream("/v1/responses", { input: "Write a story.", max_output_tokens: 4 }),
  ],
  [
    "refusals of a chat",
    {
      broken: "400 invalid_request_error 400",
      empty: "400 invalid_request_error 400",
      long: "400 exceed_context_size_error 400",
    },
    post(chatPath, { broken: "{bad", empty: {}, long: { messages: LONG, max_tokens: 1 } }),
  ],
  [
    "other refusals",
    {
      "POST /v1/messages": "500 server_error 500",
      "POST /v1/responses": "200",
      "POST /v1/embeddings": "501 not_supported_error 501",
      "POST /v1/rerank": "501 not_supported_error 501",
      "POST /nope": FILE_NOT_FOUND,
      "POST /v1/messages/count_tokens": "200",
    },
    (at) =>
      tellOf(at, [
        ["/v1/messages", {}],
        ["/v1/responses", { input: "hi", max_output_tokens: 1 }],
        ["/v1/embeddings", { input: "x" }],
        ["/v1/rerank", { query: "x", documents: ["a"] }],
        ["/nope", {}],
        ["/v1/messages/count_tokens", { messages: MESSAGES }],
      ]),
  ],
];

const embedder: Check[] = [
  [
    "embeddings",
    [
      "data,model,object,usage",
      "prompt_tokens,total_tokens",
      "q",
      "embedding,index,object",
      "string",
    ],
    async (at) => {
      const body = { model: "q", input: [[1, 2], [3]] };
      const plain = (await ask(`${at.url}/v1/embeddings`, body)).json();
      const packed = { ...body, encoding_format: "base64" };
      const { data } = (await ask(`${at.url}/v1/embeddings`, packed)).json() as { data: Fields[] };
      const [first] = plain.data as Fields[];
      const keys = [keysOf(plain), keysOf(plain.usage), plain.model, keysOf(first)];
      return [...keys, typeof data[0]?.embedding];
    },
  ],
  [
    "its faults come as 500",
    { long: "500 server_error 500", none: "400 invalid_request_error 400" },
    post("/v1/embeddings", { long: { input: "word ".repeat(2000) }, none: {} }),
  ],
  ["a chat", { chat: "500 server_error 500" }, post(chatPath, { chat: { messages: MESSAGES } })],
];

const UNAUTHORIZED = "401 authentication_error 401";

const guarded: Check[] = [
  [
    "what a key guards",
    {
      "GET /health": "200",
      "GET /v1/health": "200",
      "GET /": FILE_NOT_FOUND,
      "GET /v1/models": UNAUTHORIZED,
      "GET /models": UNAUTHORIZED,
      "GET /props": UNAUTHORIZED,
      "GET /nope": UNAUTHORIZED,
    },
    look("/health /v1/health / /v1/models /models /props /nope"),
  ],
  [
    "either header",
    [200, 200, 401],
    async ({ url }) => {
      const headers = [{ authorization: "Bearer k" }, { "x-api-key": "k" }, { "x-api-key": "z" }];
      const statuses: number[] = [];
      for (const each of headers) {
        statuses.push((await ask(`${url}/v1/models`, undefined, { headers: each })).status);
      }
      return statuses;
    },
  ],
];

async function states(at: Subject): Promise<string> {
  const { data } = (await jsonAt(at, "/models")) as { data: { id: string; status: Fields }[] };
  const each = data.map(({ id, status }) => `${id} ${String(status.value)}`);
  return each.toSorted().join();
}

/** What a request makes of the two models, in the end. */
async function after(at: Subject, wanted: string): Promise<string> {
  await until(async () => (await states(at)) === wanted);
  return states(at);
}

async function wordsOf(at: Subject, path: string, body?: unknown): Promise<string> {
  const { status, text } = await ask(at.url + path, body);
  const json = parsed(text);
  const error = isRecord(json) && isRecord(json.error) ? json.error.message : keysOf(json);
  return `${status} ${String(error)}`;
}

/** The real one takes a model for busy a moment longer than its answer lasts. */
async function oncePossible(at: Subject, path: string, body: unknown): Promise<string> {
  let words = "";
  await until(async () => !/try again later/.test((words = await wordsOf(at, path, body))));
  return words;
}

const router: Check[] = [
  [
    "what is there",
    {
      "GET /health": "200",
      "GET /props": "200",
      "GET /models": "200",
      "GET /": FILE_NOT_FOUND,
      "GET /metrics": "400 invalid_request_error 400",
      "GET /slots": "400 invalid_request_error 400",
      "GET /props?model=nope": "400 invalid_request_error 400",
    },
    look("/health /props /models / /metrics /slots /props?model=nope"),
  ],
  [
    "who it is",
    ["router", 1, "data,object", "args,preset,value", "smol-a unloaded,smol-b unloaded"],
    async (at) => {
      const props = await jsonAt(at, "/props");
      const list = (await jsonAt(at, "/v1/models")) as { data: { status: Fields }[] };
      const status = keysOf(list.data[0]?.status);
      return [props.role, props.max_instances, keysOf(list), status, await states(at)];
    },
  ],
  [
    "looking aside loads nothing",
    ["400 model is not loaded", "400 model is not loaded", "smol-a unloaded,smol-b unloaded"],
    async (at) => [
      await wordsOf(at, "/props?model=smol-a&autoload=false"),
      await wordsOf(at, "/slots?model=smol-a&autoload=false"),
      await states(at),
    ],
  ],
  [
    "a GET that names a model loads it",
    "smol-a loaded,smol-b unloaded",
    async (at) => {
      await ask(`${at.url}/props?model=smol-a`);
      return states(at);
    },
  ],
  [
    "a request loads, and evicts the other",
    ["smol-b", "smol-a unloaded,smol-b loaded"],
    async (at) => {
      const answer = await ask(at.url + chatPath, {
        ...SHORT,
        model: "smol-b",
        messages: MESSAGES,
      });
      return [answer.json().model, await states(at)];
    },
  ],
  [
    "told to load and to unload",
    [
      "200 success",
      "400 model is already running",
      "smol-a loaded,smol-b unloaded",
      "200 success",
      "smol-a unloaded,smol-b unloaded",
      "400 model is not running",
      "400 model is not found",
      "404 File Not Found",
    ],
    async (at) => [
      await oncePossible(at, "/models/load", { model: "smol-a" }),
      await wordsOf(at, "/models/load", { model: "smol-a" }),
      await after(at, "smol-a loaded,smol-b unloaded"),
      await wordsOf(at, "/models/unload", { model: "smol-a" }),
      await after(at, "smol-a unloaded,smol-b unloaded"),
      // The fake is done at once, the real one when its server has ended.
      await until(async () =>
        /not running/.test(await wordsOf(at, "/models/unload", { model: "smol-a" })),
      ).then(() => wordsOf(at, "/models/unload", { model: "smol-a" })),
      await wordsOf(at, "/models/unload", { model: "nope" }),
      await wordsOf(at, "/models/load", { model: "nope" }),
    ],
  ],
  [
    "refusals",
    [
      "400 model 'nope' not found",
      "400 model name is missing from the request",
      "400 model is not loaded",
    ],
    async (at) => [
      await wordsOf(at, chatPath, { model: "nope", messages: MESSAGES }),
      await wordsOf(at, chatPath, { messages: MESSAGES }),
      await wordsOf(at, `${chatPath}?autoload=false`, { model: "smol-a", messages: MESSAGES }),
    ],
  ],
  [
    "a busy model is waited for, and no load is begun beside it",
    ["500 model limit reached, try again later", "smol-a loaded,smol-b unloaded", 200, 200],
    async (at) => {
      const long = { model: "smol-a", messages: MESSAGES, max_tokens: 100 };
      await ask(at.url + chatPath, { ...long, max_tokens: 1 });
      const busy = ask(at.url + chatPath, long);
      const slots = `${at.url}/slots?model=smol-a&autoload=false`;
      await until(async () => (await ask(slots)).text.includes('"is_processing":true'));
      const other = ask(at.url + chatPath, { ...long, model: "smol-b", max_tokens: 1 });
      const refused = await wordsOf(at, "/models/load", { model: "smol-b" });
      const meanwhile = await states(at);
      return [refused, meanwhile, (await busy).status, (await other).status];
    },
  ],
];

const noLlama = missing("llama-server");

const sized = { slots: 2, contextLength: 2048 };
compare(
  "llama-server",
  noLlama,
  () => startLlamaServer("smol-a"),
  { kind: "llamacpp", models: ["smol-a"], behaviour: sized },
  llamacpp,
);
compare(
  "llama-server that embeds",
  noLlama,
  () => startLlamaServer("minilm"),
  { kind: "llamacpp", models: ["minilm"], behaviour: { contextLength: 512 } },
  embedder,
);
compare(
  "llama-server with a key",
  noLlama,
  () => startLlamaServer("minilm", "--api-key", "k"),
  { kind: "llamacpp", models: ["smol-a"], behaviour: { apiKey: "k" } },
  guarded,
);
compare(
  "llama-server as a router",
  noLlama,
  startLlamaRouter,
  {
    kind: "llamacpp-router",
    models: ["smol-a", "smol-b"],
    behaviour: { maxLoaded: 1, loadMs: 50, slots: 1, headersDelayMs: 500 },
  },
  router,
);
