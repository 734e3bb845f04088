/**
 * What `defineConfig` refuses to compile and what it must not. Nobody runs this file: `tsc -p .`
 * checks it, and an expected error that no longer comes is an error itself.
 */
import { defineConfig } from "../../src/config.ts";

const url = "http://127.0.0.1:11434";

// What must compile.

defineConfig({});

defineConfig({ backends: [], models: { m: { backends: ["whatever"], fallback: "whatever" } } });

defineConfig({ models: { m: { backends: ["discovered"], fallback: ["x", "y"] } } });

// The example of the design document.
defineConfig({
  server: { host: "127.0.0.1", port: 4000, logLevel: "info" },
  backends: [
    {
      id: "ollama-dev",
      kind: "ollama",
      url,
      models: ["llama3:8b", "mistral:7b"],
      concurrency: 8,
      healthInterval: 5000,
      timeout: 3000,
    },
    { id: "vllm-prod", kind: "vllm", url, models: ["qwen2.5:14b"], concurrency: 12, weight: 2 },
  ],
  models: {
    "llama3:8b": {
      aliases: ["default"],
      fallback: "mistral:7b",
      concurrency: 4,
      maxOutputTokens: 4096,
    },
  },
  cache: { enabled: true, maxItems: 1000, ttlMs: 300_000, streamCacheDisabled: true },
  circuitBreaker: { failureThreshold: 3, resetTimeoutMs: 10_000, halfOpenRequests: 1 },
  metrics: {
    enabled: true,
    endpoint: "/metrics",
    labels: ["model", "backend_id", "cache_hit", "status"],
  },
});

// Names come from strings and from objects, of every backend.
defineConfig({
  backends: [
    { id: "a", url, models: ["x", { name: "y", upstream: "org/Y" }] },
    { id: "b", url, models: [{ name: "z" }] },
  ],
  models: {
    x: { backends: ["a", "b"], fallback: ["y", "z"] },
    y: { fallback: "z" },
    "a model that no backend names": { fallback: "x" },
  },
});

// One backend discovers its models, so any name may be there; ids are still known.
defineConfig({
  backends: [
    { id: "a", url, models: ["x"] },
    { id: "b", url },
  ],
  models: { x: { backends: ["b"], fallback: "found at run time" } },
});

// Lists built elsewhere: their names are only strings, and strings are let through.
const ids: readonly string[] = ["a", "b"];
defineConfig({
  backends: ids.map((id) => ({ id, url, models: [`${id}-model`] })),
  models: { m: { backends: ids, fallback: "anything" } },
});

const constant = { backends: [{ id: "a", url, models: ["x"] }] } as const;
defineConfig({ ...constant, models: { x: { backends: ["a"] } } });

// It hands back what it was given, with the names still known.
const defined = defineConfig({ backends: [{ id: "only", url }] });
defined.backends?.[0].id satisfies "only" | undefined;

defineConfig({
  auth: {
    keys: [{ key: "k" }, { hash: "sha256:…", tenant: "team" }],
    jwt: [{ issuer: "i", audience: "a", jwksUrl: "https://id.example/keys", tenantClaim: "a.b" }],
  },
  tenants: { team: { weight: 2, models: ["llama*"], budgets: [{ tokens: 9, window: "day" }] } },
  redis: { url: "redis://127.0.0.1" },
});

// What must not. (An unknown key of a backend compiles, for its type is inferred; the start refuses it.)

defineConfig({
  backends: [{ id: "ollama-dev", url }],
  // @ts-expect-error -- an id that no backend has
  models: { m: { backends: ["ollama-prod"] } },
});

defineConfig({
  backends: [
    { id: "a", url },
    { id: "b", url },
  ],
  // @ts-expect-error -- one of two does not exist
  models: { m: { backends: ["a", "c"] } },
});

defineConfig({
  backends: [{ id: "a", url, models: ["llama3:8b", "mistral:7b"] }],
  // @ts-expect-error -- a model that no backend names
  models: { "llama3:8b": { fallback: "mistral:8b" } },
});

defineConfig({
  backends: [
    { id: "a", url, models: ["x"] },
    { id: "b", url, models: ["y"] },
  ],
  // @ts-expect-error -- the same in a list
  models: { x: { fallback: ["y", "z"] } },
});

defineConfig({
  backends: [{ id: "a", url, models: [{ name: "y", upstream: "org/Y" }] }],
  // @ts-expect-error -- the engine's name is no public name
  models: { y: { fallback: "org/Y" } },
});

defineConfig({
  backends: [{ id: "a", url, models: ["x"] }],
  // @ts-expect-error -- a fallback is a model, not a backend
  models: { x: { fallback: "a" } },
});

// @ts-expect-error -- an unknown section
defineConfig({ servers: {} });

// @ts-expect-error -- an unknown key
defineConfig({ server: { prot: 4000 } });

// @ts-expect-error -- a port is a number
defineConfig({ server: { port: "4000" } });

// @ts-expect-error -- no such level
defineConfig({ server: { logLevel: "trace" } });

// @ts-expect-error -- no such kind
defineConfig({ backends: [{ id: "a", kind: "olama", url }] });

// @ts-expect-error -- a backend without an id
defineConfig({ backends: [{ kind: "ollama", url }] });

// @ts-expect-error -- no such label
defineConfig({ metrics: { labels: ["user"] } });

// @ts-expect-error -- neither key nor hash
defineConfig({ auth: { keys: ["secret"] } });

// @ts-expect-error -- a key of a later version
defineConfig({ telemetry: { slowMs: 1 } });

// @ts-expect-error -- no such priority
defineConfig({ tenants: { team: { priority: "high" } } });

// @ts-expect-error -- a secret that signs is none that only verifies
defineConfig({ auth: { jwt: [{ issuer: "i", audience: "a", algorithms: ["HS256"] }] } });

defineConfig({
  backends: [{ id: "a", url }],
  // @ts-expect-error -- an unknown key of a model
  models: { m: { alias: ["x"] } },
});
