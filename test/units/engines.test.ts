/**
 * One probe round of every kind, against bodies as the engines write them: those of Ollama, llama.cpp
 * and vLLM as seen (real-engines.md §5), those of SGLang and LM Studio as documented (wire.md §1.2).
 */
import assert from "node:assert/strict";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { after, before, beforeEach, describe, it } from "node:test";
import type { Kind } from "../../src/config.ts";
import type { Ability } from "../../src/dialects/dialect.ts";
import { modelNamed, type ListedModel } from "../../src/engines/engine.ts";
import { engineOf } from "../../src/engines/kinds.ts";

interface Reply {
  status?: number;
  /** An object is sent as JSON. `hang`: nothing is sent. `reset`: the connection breaks. */
  body: unknown;
}

/** Answers by method and path; what it does not know as this kind of engine does. */
class Engine {
  readonly asked: string[] = [];
  /** Bodies of the POSTs. */
  readonly questions: unknown[] = [];
  keys: (string | undefined)[] = [];
  replies: Record<string, Reply> = {};
  unknown: (asked: string) => Reply = () => ({ status: 404, body: { detail: "Not Found" } });
  readonly #server: Server = createServer((request, response) => {
    const asked = `${request.method} ${request.url}`;
    this.asked.push(asked);
    this.keys.push(request.headers.authorization);
    let text = "";
    request.on("data", (bytes: Buffer) => (text += bytes.toString()));
    request.on("end", () => {
      if (text !== "") this.questions.push(JSON.parse(text));
      const { status = 200, body } = this.replies[asked] ?? this.unknown(asked);
      if (body === "hang") return;
      if (body === "reset") return void request.socket.destroy();
      const isText = typeof body === "string";
      response.writeHead(status, { "content-type": isText ? "text/plain" : "application/json" });
      response.end(isText ? body : JSON.stringify(body));
    });
  });

  start(): Promise<void> {
    return new Promise((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
  }

  stop(): Promise<unknown> {
    return new Promise((resolve) => {
      this.#server.close(resolve);
      this.#server.closeAllConnections();
    });
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }
}

const engine = new Engine();
before(() => engine.start());
after(() => engine.stop());
beforeEach(() => {
  engine.asked.length = 0;
  engine.questions.length = 0;
  engine.keys.length = 0;
  engine.replies = {};
  engine.unknown = () => ({ status: 404, body: { detail: "Not Found" } });
});

/** Nothing that loads, generates or wakes may ever be asked. */
const FORBIDDEN =
  /\/slots|\/health|\/v1\/(?!models)|\/models\/|\/api\/(?:generate|chat|embed)|\/props\?(?!.*autoload=false)/;

async function look(kind: Kind, signal = new AbortController().signal) {
  const connection = { id: "box", url: engine.url, apiKey: null };
  const sighting = await engineOf(kind).look(connection, signal);
  for (const asked of engine.asked) assert.doesNotMatch(asked, FORBIDDEN);
  return sighting;
}

async function models(kind: Kind): Promise<ListedModel[]> {
  const { loading, models: seen } = await look(kind);
  assert.equal(loading, false);
  return seen;
}

const model = (name: string, known: Partial<ListedModel> = {}) => modelNamed(name, known);

const data = (...cards: unknown[]): Reply => ({ body: { object: "list", data: cards } });

/** The list that each kind cannot do without. */
const MAIN: Record<Exclude<Kind, "demo">, [path: string, key: string]> = {
  ollama: ["/api/tags", "models"],
  llamacpp: ["/v1/models", "data"],
  vllm: ["/v1/models", "data"],
  sglang: ["/v1/models", "data"],
  lmstudio: ["/v1/models", "data"],
  openai: ["/v1/models", "data"],
};

describe("every kind", () => {
  for (const [kind, [path, key]] of Object.entries(MAIN) as [Kind, [string, string]][]) {
    const main = `GET ${path}`;

    it(`${kind}: an empty list may be null`, async () => {
      for (const body of [{ [key]: null }, { [key]: [] }]) {
        engine.replies = { [main]: { body } };
        assert.deepEqual(await look(kind), { loading: false, models: [] });
      }
    });

    it(`${kind}: leaves out what has no name`, async () => {
      const named = kind === "ollama" ? { name: "m" } : { id: "m" };
      const body = {
        [key]: [null, 7, "m", [], {}, { id: "", name: "" }, { id: 7, name: 7 }, named],
      };
      engine.replies = { [main]: { body } };
      assert.deepEqual(
        (await models(kind)).map(({ name }) => name),
        ["m"],
      );
    });

    it(`${kind}: a 200 that is no list is no sighting`, async () => {
      for (const body of [
        { error: `Unexpected endpoint or method. (GET ${path})` },
        { error: { message: "no" } },
        [],
        null,
        "hello",
        "<html>",
      ]) {
        engine.replies = { [main]: { body } };
        await assert.rejects(look(kind), { message: `no model list at ${path}` });
      }
    });

    it(`${kind}: a key that is not accepted`, async () => {
      for (const status of [401, 403]) {
        const body = {
          error: { message: "Invalid API Key", type: "authentication_error", code: 401 },
        };
        engine.unknown = () => ({ status, body });
        await assert.rejects(look(kind), {
          message: `HTTP ${status} at ${path}: set this backend's apiKey`,
        });
      }
    });

    it(`${kind}: sends the key it has`, async () => {
      engine.unknown = () => data();
      const connection = { id: "box", url: engine.url, apiKey: "K" };
      await engineOf(kind)
        .look(connection, new AbortController().signal)
        .catch(() => {});
      assert(engine.keys.length > 0 && engine.keys.every((sent) => sent === "Bearer K"));
    });

    it(`${kind}: an error is one, in words`, async () => {
      engine.unknown = () => ({ status: 500, body: "oops" });
      await assert.rejects(look(kind), { message: `HTTP 500 at ${path}` });
    });

    it(`${kind}: loading is no failure, any other 503 is`, async () => {
      const error = { message: "Loading model", type: "unavailable_error", code: 503 };
      engine.unknown = () => ({ status: 503, body: { error } });
      assert.deepEqual(await look(kind), { loading: true, models: [] });
      engine.unknown = () => ({ status: 503, body: "<h1>Service Unavailable</h1>" });
      await assert.rejects(look(kind), { message: `HTTP 503 at ${path}` });
    });

    it(`${kind}: a connection that breaks`, async () => {
      engine.unknown = () => ({ body: "reset" });
      await assert.rejects(look(kind));
    });

    it(`${kind}: a probe that is given up`, async () => {
      engine.unknown = () => ({ body: "hang" });
      const controller = new AbortController();
      setTimeout(() => controller.abort(new Error("enough")), 50);
      await assert.rejects(look(kind, controller.signal));
    });
  }

  it("demo asks nobody", async () => {
    assert.deepEqual(await look("demo"), {
      loading: false,
      models: [model("demo", { capabilities: ["completion"] })],
    });
    assert.deepEqual(engine.asked, []);
  });

  it("has its slots where the engine does not tell", () => {
    const kinds = ["ollama", "openai", "llamacpp", "vllm", "lmstudio", "sglang", "demo"] as const;
    const slots = kinds.map((kind) => engineOf(kind).slots);
    assert.deepEqual(slots, [1, 32, 4, 64, 4, 64, 8]);
    for (const kind of kinds) assert.equal(engineOf(kind).kind, kind);
  });
});

describe("paths", () => {
  const ALL = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/responses",
    "/v1/messages/count_tokens",
    "/v1/rerank",
  ];
  const mute: [Kind, string[]][] = [
    ["ollama", ["/v1/messages/count_tokens", "/v1/rerank"]],
    ["lmstudio", ["/v1/messages/count_tokens", "/v1/rerank"]],
    ["demo", ["/v1/messages", "/v1/responses", "/v1/messages/count_tokens", "/v1/rerank"]],
    ["llamacpp", []],
    ["vllm", []],
    ["sglang", []],
    ["openai", []],
  ];
  for (const [kind, lacks] of mute) {
    it(`${kind} lacks ${lacks.join(" and ") || "none"}`, () => {
      assert.deepEqual(
        ALL.filter((path) => !engineOf(kind).speaks(path)),
        lacks,
      );
    });
  }
});

describe("what an engine cannot do", () => {
  it("is said by Ollama, which would leave it out without a word", () => {
    const cannot = (kind: Kind, what: Ability) => engineOf(kind).cannot({ what, param: "p" });
    for (const what of [
      "n",
      "best_of",
      "echo",
      "logit_bias",
      "tool_choice",
      "prompt_list",
      "token_input",
      "image_url",
      "stored_response",
    ] as const) {
      assert.match(cannot("ollama", what) ?? "", /^[a-z].+: .+/, what);
      for (const kind of ["openai", "vllm", "sglang", "llamacpp", "lmstudio"] as const) {
        assert.equal(cannot(kind, what), null);
      }
    }
  });
});

describe("openai", () => {
  it("reads the context in each of the ways it is written", async () => {
    engine.replies["GET /v1/models"] = data(
      { id: "a", object: "model", created: 1_754_049_600, owned_by: "x", max_model_len: 512 },
      { id: "b", meta: { n_ctx: 1024 }, created: 0 },
      { id: "c", context_length: 2048, created: "yesterday" },
      { id: "d", context_window: 4096, max_model_len: null },
      { id: "e", max_context_length: 8192, meta: null },
      { id: "f", max_model_len: 0 },
      { id: "g/with/slashes", max_model_len: "512" },
    );
    assert.deepEqual(await models("openai"), [
      model("a", { contextLength: 512, createdAt: 1_754_049_600 }),
      model("b", { contextLength: 1024 }),
      model("c", { contextLength: 2048 }),
      model("d", { contextLength: 4096 }),
      model("e", { contextLength: 8192 }),
      model("f"),
      model("g/with/slashes"),
    ]);
    assert.deepEqual(engine.asked, ["GET /v1/models"]);
  });
});

describe("vllm", () => {
  it("gives an adapter the length of its base", async () => {
    const card = { object: "model", created: 1_754_049_600, owned_by: "vllm" };
    engine.replies["GET /v1/models"] = data(
      { id: "tiny", ...card, root: "/models/tiny", parent: null, max_model_len: 512 },
      { id: "tiny-too", ...card, root: "/models/tiny", parent: null, max_model_len: 512 },
      { id: "sql", ...card, root: "/adapters/sql", parent: "tiny" },
      { id: "odd", ...card, root: "/adapters/odd", parent: "elsewhere/base", max_model_len: null },
    );
    const known = { contextLength: 512, createdAt: 1_754_049_600 };
    assert.deepEqual(await models("vllm"), [
      model("tiny", known),
      model("tiny-too", known),
      model("sql", known),
      model("odd", known),
    ]);
    assert.deepEqual(engine.asked, ["GET /v1/models"]);
  });
});

describe("sglang", () => {
  const card = {
    id: "qwen",
    object: "model",
    owned_by: "sglang",
    root: "qwen",
    max_model_len: 32768,
  };
  const slots = async (info: unknown, status = 200) => {
    engine.replies = {
      "GET /v1/models": data(card),
      "GET /get_server_info": { status, body: info },
    };
    return (await models("sglang"))[0]?.slots;
  };

  it("knows its slots by what the schedulers settled on, else by what was asked for", async () => {
    const state = { effective_max_running_requests_per_dp: 128, last_gen_throughput: 457.4 };
    assert.equal(await slots({ max_running_requests: null, internal_states: [state] }), 128);
    assert.equal(await slots({ internal_states: [state, state] }), 256, "ranks add up");
    assert.equal(await slots({ max_running_requests: 48, internal_states: [{}] }), 48);
    assert.deepEqual([...new Set(engine.asked)].toSorted(), [
      "GET /get_server_info",
      "GET /v1/models",
    ]);
  });

  it("believes no number that is none", async () => {
    for (const max_running_requests of [null, 0, -1, "48", 1e9]) {
      assert.equal(await slots({ max_running_requests }), null);
    }
    assert.equal(await slots({ internal_states: null }), null);
    assert.equal(await slots([]), null);
  });

  it("is seen without it, too", async () => {
    assert.equal(await slots({ detail: "Not Found" }, 404), null);
    assert.equal(await slots("reset"), null);
  });

  it("says whether it embeds", async () => {
    const capabilities = async (info: unknown) => {
      await slots(info);
      return (await models("sglang"))[0]?.capabilities;
    };
    assert.deepEqual(await capabilities({ is_embedding: true }), ["embedding"]);
    assert.deepEqual(await capabilities({ is_embedding: false }), ["completion"]);
    assert.deepEqual(await capabilities({}), []);
  });
});

describe("llamacpp, one model", () => {
  const META = {
    vocab_type: 2,
    n_vocab: 49152,
    n_ctx: 1024,
    n_ctx_train: 8192,
    n_embd: 576,
    n_params: 134515008,
    size: 96576768,
    ftype: "Q4_1",
  };
  const CARD = {
    id: "other",
    aliases: ["other", "smol-a"],
    tags: [],
    object: "model",
    architecture: { input_modalities: ["text"], output_modalities: ["text"] },
    created: 1_795_381_247,
    owned_by: "llamacpp",
    meta: META,
  };
  const PROPS = {
    default_generation_settings: { params: {}, n_ctx: 1024 },
    total_slots: 2,
    model_alias: "other",
    modalities: { vision: false, video: false, audio: false },
    chat_template_caps: { supports_tools: false, supports_tool_calls: false },
    build_info: "b0-unknown",
    is_sleeping: false,
  };
  const SMOL = {
    contextLength: 1024,
    capabilities: ["completion"],
    createdAt: 1_795_381_247,
    slots: 2,
    sizeBytes: 96576768,
  };

  it("has its context and slots, under each of its names", async () => {
    engine.replies = { "GET /v1/models": data(CARD), "GET /props": { body: PROPS } };
    assert.deepEqual(await models("llamacpp"), [model("other", SMOL), model("smol-a", SMOL)]);
    assert.deepEqual(engine.asked.toSorted(), ["GET /props", "GET /v1/models"]);
  });

  it("takes the context from /props where the card has none", async () => {
    engine.replies = {
      "GET /v1/models": data({ ...CARD, meta: null, aliases: undefined }),
      "GET /props": { body: PROPS },
    };
    assert.deepEqual(await models("llamacpp"), [model("other", { ...SMOL, sizeBytes: null })]);
  });

  it("is seen without /props, too", async () => {
    for (const reply of [{ body: "reset" }, { status: 404, body: {} }, { body: [] }]) {
      engine.replies = { "GET /v1/models": data({ ...CARD, aliases: [] }), "GET /props": reply };
      assert.deepEqual(await models("llamacpp"), [model("other", { ...SMOL, slots: null })]);
    }
  });

  it("is cold while it sleeps: its weights are out of memory", async () => {
    engine.replies = {
      "GET /v1/models": data({ ...CARD, aliases: [] }),
      "GET /props": { body: { ...PROPS, is_sleeping: true } },
    };
    assert.equal((await models("llamacpp"))[0]?.residency, "cold");
  });

  it("says what it can do in Ollama's words", async () => {
    const capabilities = async (card: object, props: object = {}) => {
      engine.replies = {
        "GET /v1/models": data({ ...CARD, aliases: [], ...card }),
        "GET /props": { body: { ...PROPS, ...props } },
      };
      return (await models("llamacpp"))[0]?.capabilities;
    };
    const bert = { meta: { ...META, vocab_type: 3 } };
    assert.deepEqual(await capabilities(bert), ["embedding"]);
    const sees = { modalities: { vision: true } };
    const tools = { chat_template_caps: { supports_tools: true } };
    assert.deepEqual(await capabilities({}, { ...sees, ...tools }), [
      "completion",
      "vision",
      "tools",
    ]);
    const images = { architecture: { input_modalities: ["text", "image"] } };
    assert.deepEqual(await capabilities(images), ["completion", "vision"]);
  });
});

describe("llamacpp, a router", () => {
  const args = (...more: string[]) => [
    "llama-server",
    "--host",
    "127.0.0.1",
    "--port",
    "0",
    ...more,
  ];
  const card = (id: string, status: object, more: object = {}) => ({
    id,
    aliases: [],
    tags: [],
    object: "model",
    owned_by: "llamacpp",
    created: 1_795_381_247,
    status,
    architecture: { input_modalities: ["text"], output_modalities: ["text"] },
    source: "models_dir",
    can_remove: false,
    ...more,
  });
  const ROUTER = {
    role: "router",
    max_instances: 1,
    models_autoload: true,
    model_alias: "llama-server",
    model_path: "none",
    default_generation_settings: { params: null, n_ctx: 0 },
    build_info: "b0-unknown",
  };
  const LOADED = {
    default_generation_settings: { params: {}, n_ctx: 1024 },
    total_slots: 1,
    modalities: { vision: true, audio: false },
    chat_template_caps: { supports_tools: true },
    is_sleeping: false,
  };

  it("tells what is in memory, and asks only that for more", async () => {
    engine.replies = {
      "GET /v1/models": data(
        card(
          "loaded",
          { value: "loaded", args: args() },
          { meta: { n_ctx: 1024, size: 96576768 } },
        ),
        card("loading", { value: "loading", args: args() }),
        card("unloaded", { value: "unloaded", args: args(), failed: true, exit_code: 1 }),
        card("sleeping", { value: "sleeping", args: args() }),
        card("downloading", { value: "downloading", progress: {} }),
      ),
      "GET /props": { body: ROUTER },
      "GET /props?model=loaded&autoload=false": { body: LOADED },
    };
    const known = { capabilities: ["completion"], createdAt: 1_795_381_247 };
    assert.deepEqual(await models("llamacpp"), [
      model("loaded", {
        ...known,
        contextLength: 1024,
        capabilities: ["completion", "vision", "tools"],
        slots: 1,
        sizeBytes: 96576768,
      }),
      model("loading", { ...known, residency: "loading" }),
      model("unloaded", { ...known, residency: "cold" }),
      model("sleeping", { ...known, residency: "cold" }),
      model("downloading", { ...known, residency: "cold" }),
    ]);
    assert.deepEqual(engine.asked.toSorted(), [
      "GET /props",
      "GET /props?model=loaded&autoload=false",
      "GET /v1/models",
    ]);
  });

  it("knows from its arguments what a model that is not loaded will have", async () => {
    const cold = (...more: string[]) => ({ value: "unloaded", args: args(...more) });
    engine.replies["GET /v1/models"] = data(
      card("both", cold("--ctx-size", "4096", "--parallel", "2")),
      card("unified", cold("--ctx-size", "4096", "--parallel", "2", "--kv-unified")),
      card("slots", cold("--parallel", "3")),
      card("context", cold("--ctx-size", "4096")),
      card("auto", cold("--ctx-size", "0", "--parallel", "-1")),
      card("embeds", cold("--embedding")),
    );
    assert.deepEqual(
      (await models("llamacpp")).map(({ name, contextLength, slots, capabilities }) => [
        name,
        contextLength,
        slots,
        capabilities[0],
      ]),
      [
        ["both", 2048, 2, "completion"],
        ["unified", 4096, 2, "completion"],
        ["slots", null, 3, "completion"],
        ["context", 4096, null, "completion"],
        ["auto", null, null, "completion"],
        ["embeds", null, null, "embedding"],
      ],
    );
  });

  it("bears that a model goes between the two questions, and names that need quoting", async () => {
    const path = "/props?model=org%2Fa%26b%20c&autoload=false";
    engine.replies = {
      "GET /v1/models": data(card("org/a&b c", { value: "loaded" }, { aliases: ["short"] })),
      "GET /props": { body: ROUTER },
      [`GET ${path}`]: {
        status: 400,
        body: {
          error: { code: 400, message: "model is not loaded", type: "invalid_request_error" },
        },
      },
    };
    const seen = await models("llamacpp");
    assert.deepEqual(
      seen.map(({ name, residency, slots }) => [name, residency, slots]),
      [
        ["org/a&b c", "loaded", null],
        ["short", "loaded", null],
      ],
    );
    assert(engine.asked.includes(`GET ${path}`));
  });
});

describe("lmstudio", () => {
  /** What it answers to every path and method that it does not have. */
  const unexpected = (asked: string): Reply => ({
    body: { error: `Unexpected endpoint or method. (${asked})` },
  });
  beforeEach(() => {
    engine.unknown = unexpected;
  });

  it("since 0.4: state, slots and context of what is loaded", async () => {
    engine.replies["GET /api/v1/models"] = {
      body: {
        models: [
          {
            type: "llm",
            publisher: "openai",
            key: "openai/gpt-oss-20b",
            display_name: "GPT-OSS 20B",
            size_bytes: 12_109_566_624,
            loaded_instances: [
              { id: "openai/gpt-oss-20b", config: { context_length: 8192, parallel: 4 } },
              { id: "openai/gpt-oss-20b:2", config: { context_length: 4096, parallel: 1 } },
            ],
            max_context_length: 131072,
            format: "gguf",
            capabilities: {
              vision: false,
              trained_for_tool_use: true,
              reasoning: { allowed_options: ["low", "medium", "high"], default: "medium" },
            },
          },
          {
            type: "llm",
            key: "google/gemma-4-e4b",
            size_bytes: 1000,
            loaded_instances: [],
            max_context_length: 131072,
            capabilities: { vision: true, trained_for_tool_use: false, reasoning: false },
          },
          {
            type: "embedding",
            key: "text-embedding-nomic-embed-text-v1.5",
            size_bytes: 84_106_624,
            loaded_instances: [{ id: "x", config: { context_length: 2048 } }],
            max_context_length: 2048,
          },
          { type: "vlm", key: "old-vision", loaded_instances: null },
          { type: "llm", key: "" },
        ],
      },
    };
    assert.deepEqual(await models("lmstudio"), [
      model("openai/gpt-oss-20b", {
        contextLength: 8192,
        capabilities: ["completion", "tools", "thinking"],
        slots: 4,
        sizeBytes: 12_109_566_624,
      }),
      model("google/gemma-4-e4b", {
        contextLength: 131072,
        capabilities: ["completion", "vision"],
        residency: "cold",
        sizeBytes: 1000,
      }),
      model("text-embedding-nomic-embed-text-v1.5", {
        contextLength: 2048,
        capabilities: ["embedding"],
        sizeBytes: 84_106_624,
      }),
      model("old-vision", { capabilities: ["completion", "vision"], residency: "cold" }),
    ]);
    assert.deepEqual(engine.asked, ["GET /api/v1/models"], "it logs an error for every other path");
  });

  it("before that: the state alone", async () => {
    engine.replies["GET /api/v0/models"] = data(
      {
        id: "qwen2-vl-7b-instruct",
        object: "model",
        type: "vlm",
        arch: "qwen2_vl",
        state: "not-loaded",
        max_context_length: 32768,
      },
      {
        id: "meta-llama-3.1-8b-instruct",
        object: "model",
        type: "llm",
        state: "loaded",
        max_context_length: 131072,
        loaded_context_length: 4096,
        capabilities: ["tool_use"],
      },
      {
        id: "text-embedding-nomic-embed-text-v1.5",
        object: "model",
        type: "embeddings",
        state: "not-loaded",
        max_context_length: 2048,
      },
    );
    assert.deepEqual(await models("lmstudio"), [
      model("qwen2-vl-7b-instruct", {
        contextLength: 32768,
        capabilities: ["completion", "vision"],
        residency: "cold",
      }),
      model("meta-llama-3.1-8b-instruct", {
        contextLength: 4096,
        capabilities: ["completion", "tools"],
      }),
      model("text-embedding-nomic-embed-text-v1.5", {
        contextLength: 2048,
        capabilities: ["embedding"],
        residency: "cold",
      }),
    ]);
    assert.deepEqual(engine.asked, ["GET /api/v1/models", "GET /api/v0/models"]);
  });

  it("at first: the names", async () => {
    engine.replies["GET /v1/models"] = data({
      id: "m",
      object: "model",
      owned_by: "organization_owner",
    });
    assert.deepEqual(await models("lmstudio"), [model("m")]);
  });

  it("has no models yet", async () => {
    engine.replies["GET /api/v1/models"] = { body: { models: [] } };
    assert.deepEqual(await models("lmstudio"), []);
    assert.deepEqual(engine.asked, ["GET /api/v1/models"]);
  });
});

describe("ollama", () => {
  let digests = 0;
  /** A new one for every test: what is known of a digest is known for ever. */
  const aDigest = () => (++digests).toString(16).padStart(64, "0");
  const DETAILS = {
    parent_model: "",
    format: "gguf",
    family: "llama",
    families: ["llama"],
    parameter_size: "134.52M",
    quantization_level: "Q4_1",
    context_length: 8192,
    embedding_length: 576,
  };
  const tag = (name: string, more: object = {}) => ({
    name,
    model: name,
    modified_at: "2026-11-22T18:21:42.682597003Z",
    size: 98362760,
    digest: aDigest(),
    details: DETAILS,
    capabilities: ["completion"],
    ...more,
  });
  const running = (name: string, digest: string, more: object = {}) => ({
    name,
    model: name,
    size: 161407302,
    digest,
    details: { format: "gguf", family: "llama" },
    expires_at: "2026-11-22T21:07:27.403300895Z",
    size_vram: 0,
    context_length: 2048,
    ...more,
  });
  const tags = (...items: unknown[]) => {
    engine.replies["GET /api/tags"] = { body: { models: items } };
  };
  const ps = (...items: unknown[]) => {
    engine.replies["GET /api/ps"] = { body: { models: items } };
  };
  const CREATED = Date.UTC(2026, 10, 22, 18, 21, 42) / 1000;
  const shows = () => engine.asked.filter((asked) => asked === "POST /api/show").length;

  it("tells what is loaded, with its real context and memory", async () => {
    const [a, b, c] = [tag("smol-a:latest"), tag("smol-b:latest"), tag("big:70b")];
    tags(a, b, c);
    ps(
      running(a.name, a.digest),
      running(c.name, c.digest, { size: 48_000_000_000, size_vram: 20_000_000_000 }),
    );
    const known = { contextLength: 2048, capabilities: ["completion"], createdAt: CREATED };
    assert.deepEqual(await models("ollama"), [
      model(a.name, { ...known, digest: a.digest, sizeBytes: 161407302, vramBytes: 0 }),
      model(b.name, {
        ...known,
        contextLength: 8192,
        digest: b.digest,
        sizeBytes: 98362760,
        residency: "cold",
      }),
      model(c.name, {
        ...known,
        digest: c.digest,
        sizeBytes: 48_000_000_000,
        vramBytes: 20_000_000_000,
      }),
    ]);
    assert.deepEqual(engine.asked.toSorted(), ["GET /api/ps", "GET /api/tags"]);
  });

  it("knows a copy by its digest: one runner serves both names", async () => {
    const [first, copy] = [tag("first:latest"), tag("copy:latest")];
    copy.digest = first.digest;
    tags(first, copy);
    ps(running(first.name, first.digest));
    assert.deepEqual(
      (await models("ollama")).map(({ residency }) => residency),
      ["loaded", "loaded"],
    );
  });

  it("is seen without /api/ps, too: nothing is known of memory then", async () => {
    for (const reply of [
      { status: 404, body: "" },
      { status: 500, body: "" },
      { body: { error: "x" } },
    ]) {
      tags(tag("m:latest"));
      engine.replies["GET /api/ps"] = reply;
      const [seen] = await models("ollama");
      assert.deepEqual([seen?.residency, seen?.vramBytes], ["loaded", null]);
    }
  });

  it("is not seen where /api/ps says nothing at all: what fits is not learned from a guess", async () => {
    tags(tag("m:latest"));
    engine.replies["GET /api/ps"] = { body: "reset" };
    await assert.rejects(models("ollama"));
  });

  it("names what is answered elsewhere", async () => {
    tags(
      tag("gpt-oss:120b-cloud", {
        remote_model: "gpt-oss:120b",
        remote_host: "https://ollama.com:443",
        size: 384,
        details: {},
        capabilities: undefined,
      }),
      tag("mine:latest", { remote_host: "https://elsewhere" }),
      tag("kimi:cloud"),
      tag("glm:4.6-cloud"),
      tag("cloud:latest"),
      tag("my-cloud:7b"),
    );
    ps();
    const seen = await models("ollama");
    assert.deepEqual(
      seen.map(({ remote }) => remote),
      [true, true, true, true, false, false],
    );
    assert.deepEqual(
      seen.map(({ residency }) => residency),
      ["loaded", "loaded", "loaded", "loaded", "cold", "cold"],
    );
    assert.equal(shows(), 0, "nobody elsewhere is asked");
  });

  it("asks older versions for what they do not list, once", async () => {
    const old = tag("old:7b", { details: { family: "llama" }, capabilities: undefined });
    tags(old);
    ps();
    engine.replies["POST /api/show"] = {
      body: {
        details: {},
        model_info: { "general.architecture": "llama", "llama.context_length": 4096 },
        capabilities: ["completion", "tools"],
      },
    };
    for (let round = 0; round < 3; round += 1) {
      const [seen] = await models("ollama");
      assert.deepEqual([seen?.contextLength, seen?.capabilities], [4096, ["completion", "tools"]]);
    }
    assert.deepEqual(engine.questions, [{ model: "old:7b" }]);
    ps(running(old.name, old.digest));
    assert.equal((await models("ollama"))[0]?.contextLength, 2048, "what it is loaded with wins");
  });

  it("believes /api/show, not the list: that calls an imported embedding model a completer", async () => {
    const bert = { format: "gguf", family: "bert", families: ["bert"], parameter_size: "22.57M" };
    tags(tag("minilm:latest", { details: bert }));
    ps();
    engine.replies["POST /api/show"] = {
      body: {
        model_info: { "general.architecture": "bert", "bert.context_length": 512 },
        capabilities: ["embedding"],
      },
    };
    const [seen] = await models("ollama");
    assert.deepEqual([seen?.contextLength, seen?.capabilities], [512, ["embedding"]]);
  });

  it("learns a machine full of old models over several rounds", async () => {
    const items = Array.from({ length: 12 }, (_, at) =>
      tag(`m${at}:1b`, { capabilities: undefined }),
    );
    tags(...items);
    ps();
    engine.replies["POST /api/show"] = { body: { capabilities: ["completion"] } };
    const known: number[] = [];
    for (let round = 0; round < 4; round += 1) {
      const seen = await models("ollama");
      known.push(seen.filter(({ capabilities }) => capabilities.length > 0).length);
    }
    assert.deepEqual(known, [5, 10, 12, 12]);
    assert.equal(shows(), 12);
  });

  it("does without what /api/show does not say", async () => {
    tags(tag("odd:1b", { capabilities: undefined, details: undefined }));
    ps();
    engine.replies["POST /api/show"] = { status: 404, body: { error: "model 'odd:1b' not found" } };
    const [seen] = await models("ollama");
    assert.deepEqual([seen?.contextLength, seen?.capabilities], [null, []]);
    await models("ollama");
    assert.equal(shows(), 1);
  });

  it("asks again where the probe was given up before the answer came", async () => {
    tags(tag("slow:1b", { capabilities: undefined }));
    ps();
    engine.replies["POST /api/show"] = { body: "hang" };
    const controller = new AbortController();
    setTimeout(() => controller.abort(new Error("enough")), 100);
    await look("ollama", controller.signal);
    engine.replies["POST /api/show"] = { body: { capabilities: ["vision"] } };
    assert.deepEqual((await models("ollama"))[0]?.capabilities, ["vision"]);
  });
});
