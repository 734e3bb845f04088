/** Which kind of engine answers: small servers that answer as the real ones do (wire.md §1.1, real-engines.md §5). */
import assert from "node:assert/strict";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { afterEach, describe, it } from "node:test";
import type { Kind } from "../../src/config.ts";
import { fingerprint } from "../../src/control/probe.ts";

interface Answer {
  status?: number;
  /** An object is sent as JSON. */
  body: object | string | null;
  headers?: Record<string, string>;
}

/** Answers by path; a path that is not there gets the last one. */
interface Imitation {
  paths: Record<string, Answer>;
  otherwise: Answer;
}

const servers: Server[] = [];
afterEach(async () => {
  for (const server of servers.splice(0)) {
    await new Promise((resolve) => {
      server.close(resolve);
      server.closeAllConnections();
    });
  }
});

async function serve({ paths, otherwise }: Imitation, asked: string[] = []): Promise<string> {
  const server = createServer((request, response) => {
    asked.push(`${request.method} ${request.url} ${request.headers.authorization ?? ""}`.trim());
    const { status = 200, body, headers = {} } = paths[request.url ?? ""] ?? otherwise;
    const isText = typeof body === "string";
    response.writeHead(status, {
      "content-type": isText ? "text/plain" : "application/json",
      ...headers,
    });
    response.end(isText ? body : JSON.stringify(body));
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

async function kindOf(url: string, apiKey: string | null = null): Promise<Kind | null> {
  return await fingerprint({ id: "x", url, apiKey }, new AbortController().signal);
}

const list = (owner?: string): Answer => ({
  body: {
    object: "list",
    data: [{ id: "m", object: "model", ...(owner === undefined ? {} : { owned_by: owner }) }],
  },
});
const NOT_FOUND: Answer = {
  status: 404,
  body: { error: { message: "File Not Found", code: 404 } },
};
const DETAIL: Answer = { status: 404, body: { detail: "Not Found" } };
const GIN: Answer = { status: 404, body: "404 page not found" };

const LLAMACPP_SERVER = { server: "llama.cpp" };
const llamacpp = (answer: Answer): Answer => ({ ...answer, headers: LLAMACPP_SERVER });
const LOADING: Answer = {
  status: 503,
  body: { error: { message: "Loading model", type: "unavailable_error", code: 503 } },
};
const LM_STUDIO: Answer = { body: { error: "Unexpected endpoint or method. (GET /props)" } };

const imitations: [what: string, kind: Kind | null, imitation: Imitation][] = [
  [
    "Ollama",
    "ollama",
    {
      paths: {
        "/": { body: "Ollama is running" },
        "/api/version": { body: { version: "0.32.15" } },
        "/v1/models": list("library"),
      },
      otherwise: GIN,
    },
  ],
  [
    "Ollama without a model: data is null",
    "ollama",
    {
      paths: {
        "/": { body: "Ollama is running" },
        "/v1/models": { body: { object: "list", data: null } },
      },
      otherwise: GIN,
    },
  ],
  [
    "an Ollama too old to list models the OpenAI way",
    "ollama",
    { paths: { "/": { body: "Ollama is running" } }, otherwise: GIN },
  ],
  [
    "llama.cpp",
    "llamacpp",
    {
      paths: {
        "/v1/models": llamacpp({
          body: { models: [{ name: "m" }], object: "list", data: [{ id: "m", meta: null }] },
        }),
        "/props": llamacpp({ body: { total_slots: 4, default_generation_settings: {} } }),
      },
      otherwise: llamacpp(NOT_FOUND),
    },
  ],
  [
    "llama.cpp behind a proxy that hides its name",
    "llamacpp",
    {
      paths: { "/v1/models": list("llamacpp"), "/props": { body: { total_slots: 1 } } },
      otherwise: NOT_FOUND,
    },
  ],
  [
    "llama.cpp while it loads: 503 everywhere",
    "llamacpp",
    { paths: {}, otherwise: llamacpp(LOADING) },
  ],
  [
    "llama.cpp with a key we do not have",
    "llamacpp",
    {
      paths: { "/health": llamacpp({ body: { status: "ok" } }) },
      otherwise: llamacpp({ status: 401, body: { error: { message: "Invalid API Key" } } }),
    },
  ],
  [
    "llama.cpp as a router",
    "llamacpp",
    {
      paths: {
        "/v1/models": {
          body: { object: "list", data: [{ id: "a", status: { value: "unloaded" } }] },
        },
        "/props": { body: { role: "router", max_instances: 4, models_autoload: true } },
      },
      otherwise: NOT_FOUND,
    },
  ],
  [
    "vLLM",
    "vllm",
    {
      paths: {
        "/v1/models": {
          body: { object: "list", data: [{ id: "m", owned_by: "vllm", max_model_len: 512 }] },
        },
        "/version": { body: { version: "0.32.0" } },
      },
      otherwise: DETAIL,
    },
  ],
  [
    "SGLang, which also answers as Ollama",
    "sglang",
    {
      paths: {
        "/": { body: "Ollama is running" },
        "/api/version": { body: { version: "0.9.0" } },
        "/api/tags": { body: { models: [] } },
        "/v1/models": list("sglang"),
        "/get_server_info": { body: { version: "0.5.16", max_running_requests: 64 } },
      },
      otherwise: DETAIL,
    },
  ],
  [
    "an SGLang that names no owner",
    "sglang",
    {
      paths: {
        "/": { body: "Ollama is running" },
        "/v1/models": list(),
        "/get_server_info": { body: { version: "0.5.2" } },
      },
      otherwise: DETAIL,
    },
  ],
  [
    "an SGLang that says only who owns its model",
    "sglang",
    {
      paths: { "/": { body: "Ollama is running" }, "/v1/models": list("sglang") },
      otherwise: DETAIL,
    },
  ],
  [
    "LM Studio: 200 with an error on every path it does not know",
    "lmstudio",
    {
      paths: {
        "/v1/models": list("organization_owner"),
        "/api/v1/models": { body: { models: [{ type: "llm", key: "m", loaded_instances: [] }] } },
      },
      otherwise: LM_STUDIO,
    },
  ],
  [
    "LM Studio without a model",
    "lmstudio",
    {
      paths: {
        "/v1/models": { body: { object: "list", data: [] } },
        "/api/v1/models": { body: { models: [] } },
      },
      otherwise: LM_STUDIO,
    },
  ],
  [
    "a plain OpenAI-compatible server",
    "openai",
    { paths: { "/v1/models": list("organization") }, otherwise: NOT_FOUND },
  ],
  [
    "a plain one without a model",
    "openai",
    { paths: { "/v1/models": { body: { object: "list", data: [] } } }, otherwise: NOT_FOUND },
  ],
  [
    "a plain one whose list is null",
    "openai",
    { paths: { "/v1/models": { body: { object: "list", data: null } } }, otherwise: NOT_FOUND },
  ],
  [
    "LocalAI: a page at /, an owner of its own",
    "openai",
    {
      paths: {
        "/": { body: "<!doctype html><title>LocalAI</title>" },
        "/v1/models": { body: { object: "list", data: [{ id: "m", object: "model" }] } },
        "/api/tags": { body: { models: [{ name: "m" }] } },
      },
      otherwise: NOT_FOUND,
    },
  ],
  [
    "a server that answers everything with 200 and an error",
    null,
    { paths: {}, otherwise: LM_STUDIO },
  ],
  [
    "a web page on every path",
    null,
    {
      paths: {},
      otherwise: {
        body: "<!doctype html><title>My router</title>",
        headers: { "content-type": "text/html" },
      },
    },
  ],
  ["some other API", null, { paths: {}, otherwise: { body: { status: "ok" } } }],
  ["JSON that is no object", null, { paths: {}, otherwise: { body: [1, 2] } }],
  ["null", null, { paths: {}, otherwise: { body: null } }],
  ["404 everywhere", null, { paths: {}, otherwise: NOT_FOUND }],
  [
    "a list, but not with 200",
    null,
    {
      paths: { "/v1/models": { ...list("organization"), status: 401 } },
      otherwise: NOT_FOUND,
    },
  ],
  [
    "a redirect, which is not followed",
    null,
    {
      paths: { "/real": list("vllm") },
      otherwise: { status: 302, body: "", headers: { location: "/real" } },
    },
  ],
];

describe("fingerprint", () => {
  for (const [what, kind, imitation] of imitations) {
    it(`finds ${kind ?? "nothing"}: ${what}`, async () => {
      assert.equal(await kindOf(await serve(imitation)), kind);
    });
  }

  it("finds nothing where nobody listens", async () => {
    const url = await serve({ paths: {}, otherwise: NOT_FOUND });
    const [server] = servers.splice(0);
    await new Promise((resolve) => server?.close(resolve));
    assert.equal(await kindOf(url), null);
  });

  it("only asks: no completion, nothing that loads or changes anything", async () => {
    const asked: string[] = [];
    await kindOf(await serve({ paths: {}, otherwise: LM_STUDIO }, asked));
    assert(asked.length > 0);
    for (const each of asked) assert.match(each, /^GET \/(?!.*(generate|completion|slots|load))/);
  });

  it("asks with the backend's key", async () => {
    const asked: string[] = [];
    await kindOf(await serve({ paths: {}, otherwise: NOT_FOUND }, asked), "secret");
    for (const each of asked) assert.match(each, / Bearer secret$/);
  });

  it("finds nothing once it was aborted", async () => {
    const url = await serve({ paths: { "/v1/models": list("vllm") }, otherwise: NOT_FOUND });
    const controller = new AbortController();
    controller.abort(new Error("enough"));
    assert.equal(await fingerprint({ id: "x", url, apiKey: null }, controller.signal), null);
  });
});
