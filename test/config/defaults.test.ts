/** Every key of the contract (§1, what has been built of it): its default, and what it takes. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { schema, tenantOf } from "../../src/config.ts";
import { check } from "../../src/settings/mistakes.ts";

const MIB = 1024 * 1024;

/** The default of each key. Those of the entries of lists and maps stand below. */
const DEFAULTS: Record<string, unknown> = {
  "server.host": "127.0.0.1",
  "server.port": 4000,
  "server.logLevel": "info",
  "server.insecure": false,
  "server.allowedHosts": [],
  "server.allowedOrigins": [],
  backends: [],
  models: {},
  "queue.maxWaitMs": 120_000,
  "queue.maxLength": 512,
  "queue.turnMs": "auto",
  "queue.heartbeatMs": 15_000,
  "timeouts.connectMs": 5000,
  "timeouts.firstByteMs": 300_000,
  "timeouts.idleMs": 120_000,
  "timeouts.clientMs": 60_000,
  "timeouts.totalMs": 0,
  "timeouts.loadMs": 600_000,
  "limits.bodyBytes": 32 * MIB,
  "limits.heldBytes": 256 * MIB,
  "limits.bufferBytes": 8 * MIB,
  "drain.delayMs": 0,
  "drain.graceMs": 30_000,
  "auth.keys": [],
  "auth.jwt": [],
  tenants: {},
  "cache.enabled": true,
  "cache.maxItems": 1000,
  "cache.maxBytes": 64 * MIB,
  "cache.ttlMs": 300_000,
  "cache.streamCacheDisabled": true,
  "redis.timeoutMs": 20,
  "redis.prefix": "tidegate:",
  "circuitBreaker.failureThreshold": 3,
  "circuitBreaker.resetTimeoutMs": 10_000,
  "circuitBreaker.halfOpenRequests": 1,
  "metrics.enabled": true,
  "metrics.endpoint": "/metrics",
  "metrics.labels": ["model", "backend_id", "cache_hit", "status"],
  "telemetry.serviceName": "tidegate",
  "telemetry.sampling": 1,
  "admin.enabled": true,
};

const BACKEND = { id: "a", url: "http://127.0.0.1:1" };
const ISSUER = { issuer: "https://id.example", audience: "tidegate", jwksFile: "keys.json" };

function accepted(raw: unknown): Record<string, unknown> {
  const result = check(raw);
  assert("config" in result, JSON.stringify(result));
  return result.config;
}

/** Every leaf of an object by its path; lists are leaves. */
function leaves(value: unknown, path = ""): [string, unknown][] {
  const isBranch = typeof value === "object" && value !== null && !Array.isArray(value);
  if (!isBranch || Object.keys(value).length === 0) return [[path, value]];
  return Object.entries(value).flatMap(([key, each]) =>
    leaves(each, path === "" ? key : `${path}.${key}`),
  );
}

/** `{ a: { b: value } }` for `a.b`. */
function at(path: string, value: unknown): Record<string, unknown> {
  const [key = "", ...rest] = path.split(".");
  return { [key]: rest.length === 0 ? value : at(rest.join("."), value) };
}

function inBackend(fields: object): object {
  return { backends: [{ ...BACKEND, ...fields }] };
}

function budget(window: string): object {
  return { tokens: 1, window };
}

function inModel(fields: object): object {
  return { models: { m: fields } };
}

describe("defaults", () => {
  it("are those of the contract, all of them and no others", () => {
    assert.deepEqual(Object.fromEntries(leaves(accepted({}))), DEFAULTS);
  });

  it("fill what a section leaves out", () => {
    for (const section of new Set(Object.keys(DEFAULTS).map((key) => key.split(".")[0] ?? ""))) {
      if (section === "backends") continue;
      assert.deepEqual(accepted({ [section]: {} }), accepted({}), section);
    }
  });

  it("give a backend its weight and the pace of its probe", () => {
    assert.deepEqual(accepted({ backends: [BACKEND] })["backends"], [
      { ...BACKEND, allowCloud: false, weight: 1, healthInterval: 5000, timeout: 3000 },
    ]);
  });

  it("give a model no alias", () => {
    assert.deepEqual(accepted({ models: { m: {} } })["models"], {
      m: { aliases: [], warm: false },
    });
  });

  it("give a tenant every model, the usual priority and no limit", () => {
    assert.deepEqual(accepted({ tenants: { t: {} } })["tenants"], {
      t: { weight: 1, priority: "default", models: ["*"], budgets: [] },
    });
  });

  it("give a key the tenant default, and an issuer algorithms, tolerance and claim", () => {
    const { auth } = accepted({ auth: { keys: [{ key: "k" }], jwt: [ISSUER] } });
    assert.deepEqual(auth, {
      keys: [{ key: "k", tenant: "default" }],
      jwt: [
        {
          ...ISSUER,
          algorithms: ["RS256", "ES256", "EdDSA"],
          toleranceS: 5,
          tenantClaim: "tenant",
        },
      ],
    });
  });

  it("give `default` its settings, whether it is listed or not", () => {
    const plain = tenantOf(schema.parse({}), "default");
    assert.deepEqual(plain.models, ["*"]);
    const listed = schema.parse({ tenants: { default: { models: ["a"] } } });
    assert.deepEqual(tenantOf(listed, "default").models, ["a"]);
    assert.deepEqual(tenantOf(listed, "constructor").models, ["*"], "what objects inherit is none");
  });
});

describe("values", () => {
  const big = Number.MAX_SAFE_INTEGER;
  const good: [string, ...unknown[]][] = [
    ["server.port", 0, 65_535],
    ["server.logLevel", "debug", "info", "warn", "error"],
    ["server.allowedOrigins", ["*"]],
    ["queue.maxWaitMs", 0, big],
    ["queue.maxLength", 1, big],
    ["queue.turnMs", "auto", 0, 1],
    ["queue.heartbeatMs", 0],
    ["timeouts.firstByteMs", 0, big],
    ["timeouts.idleMs", 0],
    ["timeouts.clientMs", 0],
    ["timeouts.totalMs", 0, 1],
    ["limits.bodyBytes", 1, big],
    ["drain.delayMs", 0],
    ["drain.graceMs", 0],
    ["auth.keys", [{ key: "k" }, { hash: `sha256:${"0".repeat(64)}` }]],
    ["auth.jwt", [], [{ ...ISSUER, toleranceS: 0, algorithms: ["PS512"], tenantClaim: "a.b" }]],
    ["tenants", { a: {}, "B_2.c-d": { weight: 0.1, priority: "batch", models: [] } }],
    ["tenants.t.budgets", [], ["90s", "5m", "1h", "day", "month"].map(budget)],
    ["tenants.t.priority", "interactive", "default", "batch"],
    ["tenants.t.concurrency", 1, big],
    ["tenants.t.requestsPerMinute", 1],
    ["tenants.t.maxOutputTokens", 1],
    ["cache", { maxItems: 1, ttlMs: 1 }],
    ["cache.streamCacheDisabled", false],
    ["redis", {}, { url: "redis://127.0.0.1:6379" }, { url: "rediss://u:p@valkey.lan/1" }],
    ["redis.timeoutMs", 1, big],
    ["redis.prefix", "", "a:"],
    ["circuitBreaker", {}, { failureThreshold: 1 }],
    ["circuitBreaker.failureThreshold", 1, big],
    ["circuitBreaker.resetTimeoutMs", 1, big],
    ["circuitBreaker.halfOpenRequests", 1, big],
    ["metrics.labels", [], ["tenant", "endpoint"]],
    ["metrics.endpoint", "/metrics.txt", "/internal/metrics", "/v1metrics"],
    ["telemetry.sampling", 0, 0.5, 1],
    ["telemetry.otlpEndpoint", "http://127.0.0.1:4318"],
    ["admin.enabled", false, true],
    ["admin.key", "k"],
  ];
  const bad: [string, ...unknown[]][] = [
    ["server.port", -1, 65_536, 1.5, "4000", null],
    ["server.host", "", 1],
    ["server.logLevel", "trace", "INFO"],
    ["server.insecure", "true", 1],
    ["server.allowedHosts", "box", [1]],
    ["queue.maxWaitMs", -1, 0.5, "120s"],
    ["queue.maxLength", 0],
    ["queue.turnMs", -1, "60s", "AUTO"],
    ["timeouts.loadMs", 0],
    ["timeouts.connectMs", 0],
    ["timeouts.idleMs", -1],
    ["limits.bodyBytes", 0, "32 MiB"],
    ["drain.graceMs", -1],
    ["auth.keys", [{}], [{ key: "" }], [{ hash: "sha256:00" }], [{ hash: "md5:00" }], ["k"]],
    ["auth.keys", [{ key: "k", tenant: "" }], [{ key: "k", tenant: "nobody" }]],
    [
      "auth.jwt",
      {},
      [{}],
      [{ ...ISSUER, issuer: "" }],
      [{ ...ISSUER, audience: undefined }],
      [{ ...ISSUER, jwksFile: undefined }],
      [{ ...ISSUER, jwksUrl: "http://a" }],
      [{ ...ISSUER, jwksFile: undefined, jwksUrl: "file:///a" }],
      [{ ...ISSUER, jwksFile: undefined, jwksUrl: "http://u:p@a" }],
      [{ ...ISSUER, algorithms: [] }],
      [{ ...ISSUER, algorithms: ["HS256"] }],
      [{ ...ISSUER, algorithms: ["none"] }],
      [{ ...ISSUER, toleranceS: -1 }],
      [{ ...ISSUER, tenantClaim: "" }],
    ],
    ["tenants", [], { "a b": {} }, { "": {} }, { ["x".repeat(65)]: {} }, { "a/b": {} }],
    ["tenants.t", { weight: 0 }, { priority: "high" }, { models: "*" }, { models: [""] }],
    ["tenants.t", { concurrency: 0 }, { requestsPerMinute: 0 }, { maxOutputTokens: 0 }],
    ["tenants.t.budgets", ["1d", "0s", "5", "m", "1.5h", "Day", "week", ""].map(budget), [{}]],
    ["tenants.t.budgets", [{ tokens: 0, window: "day" }], { tokens: 1, window: "day" }],
    ["cache", true, { maxItems: 0 }, { maxBytes: 0 }, { ttlMs: 0 }],
    ["redis", "redis://a", { url: "http://a" }, { url: "127.0.0.1:6379" }, { timeoutMs: 0 }],
    ["circuitBreaker", null, { failureThreshold: 0 }, { halfOpenRequests: 0 }, { rate: 0.5 }],
    ["circuitBreaker.resetTimeoutMs", -1, 0.5, "10s"],
    ["metrics.labels", ["user"], "model"],
    [
      "metrics.endpoint",
      "metrics",
      "/a?b",
      "/a#b",
      "/a b",
      "/",
      "/*",
      "/:id{(}",
      "/v1/models",
      "/admin",
    ],
    ["telemetry.sampling", -0.1, 1.1],
    ["telemetry.otlpEndpoint", "127.0.0.1:4318", "ftp://x"],
    ["telemetry.serviceName", ""],
    ["admin.enabled", "true", 0],
    ["admin.key", "", 1],
  ];
  for (const [path, ...values] of good) {
    it(`${path} takes ${values.map((each) => JSON.stringify(each)).join(", ")}`, () => {
      for (const value of values) accepted(at(path, value));
    });
  }
  for (const [path, ...values] of bad) {
    it(`${path} does not take ${values.map((each) => JSON.stringify(each)).join(", ")}`, () => {
      for (const value of values) {
        const result = check(at(path, value));
        assert("mistakes" in result, `${JSON.stringify(value)} was accepted`);
        for (const mistake of result.mistakes) assert(mistake.path.startsWith(path), mistake.path);
      }
    });
  }

  const kinds = ["ollama", "openai", "demo", "llamacpp", "vllm", "lmstudio", "sglang"];
  const goodBackends: object[] = [
    ...kinds.map((kind) => ({ kind })),
    { models: [] },
    { models: ["a:1", { name: "b", upstream: "org/B" }, { name: "c" }] },
    { apiKey: "k" },
    { concurrency: 1 },
    { weight: 0.1 },
    { healthInterval: 100, timeout: 100 },
    { healthInterval: 1000, timeout: 60_000 },
    { include: ["llama*", "*:7b"], exclude: ["*embed*"] },
    { include: [] },
    { allowCloud: true },
    { staleAfterMs: 1 },
    { url: "http://engines.lan:8000", discover: "dns" },
    { url: "http://localhost:8000/v1", discover: "dns" },
  ];
  const badBackends: [string, object][] = [
    ["id", { id: "" }],
    ["id", { id: undefined }],
    ["kind", { kind: "tgi" }],
    ["url", { url: "127.0.0.1:11434" }],
    ["url", { url: undefined }],
    ["models[0]", { models: [""] }],
    ["models[0]", { models: [{ upstream: "x" }] }],
    ["apiKey", { apiKey: "" }],
    ["concurrency", { concurrency: 0 }],
    ["concurrency", { concurrency: 1.5 }],
    ["weight", { weight: 0 }],
    ["weight", { weight: -1 }],
    ["healthInterval", { healthInterval: 99 }],
    ["timeout", { timeout: 0 }],
    ["include[0]", { include: [""] }],
    ["include", { include: "llama*" }],
    ["include", { include: ["*"], models: ["a"] }],
    ["exclude", { exclude: [], models: [] }],
    ["exclude[1]", { exclude: ["*", 1] }],
    ["allowCloud", { allowCloud: "yes" }],
    ["staleAfterMs", { staleAfterMs: 0 }],
    ["staleAfterMs", { staleAfterMs: "1m" }],
    ["discover", { url: "http://engines.lan", discover: "srv" }],
    ["discover", { url: "http://engines.lan", discover: true }],
    ["discover", { url: "https://engines.lan", discover: "dns" }],
    ["discover", { url: "http://127.0.0.1:1", discover: "dns" }],
    ["discover", { url: "http://[::1]:1", discover: "dns" }],
    ["discover", { kind: "demo", url: undefined, discover: "dns" }],
  ];
  for (const fields of goodBackends) {
    it(`a backend takes ${JSON.stringify(fields)}`, () => void accepted(inBackend(fields)));
  }
  for (const [key, fields] of badBackends) {
    it(`a backend does not take ${JSON.stringify(fields)}`, () => {
      const result = check(inBackend(fields));
      assert("mistakes" in result && result.mistakes.length === 1, JSON.stringify(result));
      const path = String(result.mistakes[0]?.path);
      assert(path.startsWith(`backends[0].${key}`), path);
    });
  }

  it("a demo backend needs no url", () => {
    accepted({ backends: [{ id: "demo", kind: "demo" }] });
  });

  for (const fields of [
    { aliases: [""] },
    { fallback: 1 },
    { concurrency: 0 },
    { maxOutputTokens: 0 },
    { backends: "a" },
  ]) {
    it(`a model does not take ${JSON.stringify(fields)}`, () => {
      const [key] = Object.keys(fields);
      const result = check(inModel(fields));
      assert("mistakes" in result);
      const path = String(result.mistakes[0]?.path);
      assert(path.startsWith(`models.m.${key}`), path);
    });
  }

  it("a model takes its settings, its fallback as one name or as a list", () => {
    accepted(inModel({ aliases: ["x"], fallback: "n", concurrency: 1, maxOutputTokens: 1 }));
    accepted(inModel({ fallback: ["n", "o"] }));
  });
});

describe("a backend's url", () => {
  const root = "http://127.0.0.1:8000";
  for (const written of ["", "/", "/v1", "/v1/", "/v1//", "//"]) {
    it(`is the same with "${written}" at its end`, () => {
      const [backend] = accepted(inBackend({ url: root + written }))["backends"] as {
        url: string;
      }[];
      assert.equal(backend?.url, root);
    });
  }

  it("keeps its path, apart from /v1", () => {
    const urls = ["https://box/engines/a/v1/", "http://box/v1/v1", "http://box/v10"].map((url) => {
      const [backend] = accepted(inBackend({ url }))["backends"] as { url: string }[];
      return backend?.url;
    });
    assert.deepEqual(urls, ["https://box/engines/a", "http://box/v1", "http://box/v10"]);
  });
});
