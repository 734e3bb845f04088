import { defineConfig } from "./src/config.ts";

// This file names no backends, so the engines that run on this machine are discovered.
// Every setting is here with its default: take away the slashes and change it.
export default defineConfig({
  // server: {
  //   host: "127.0.0.1", // beyond loopback: auth.keys, or insecure: true
  //   port: 4000, // 0: any free port
  //   logLevel: "info", // debug, info, warn, error
  //   insecure: false, // true: a bind beyond loopback without keys
  //   allowedHosts: [], // Host names beside localhost on a loopback bind
  //   allowedOrigins: [], // web origins beside loopback ones; "*" for all
  // },
  // backends: [
  //   {
  //     id: "ollama",
  //     kind: "ollama",
  //     url: "http://127.0.0.1:11434",
  //     include: ["llama3*", "mistral:*"], // of the discovered models only these; * is any text
  //     exclude: ["*-embed"], // and not these
  //     allowCloud: false, // true: also models that run on other people's machines
  //   },
  //   {
  //     id: "vllm",
  //     kind: "vllm", // absent: found out by asking the engine
  //     url: "http://127.0.0.1:8000/v1", // with or without /v1
  //     models: ["qwen2.5:14b", { name: "coder", upstream: "Qwen/Qwen2.5-Coder-7B" }], // absent: discovered
  //     apiKey: "…", // sent to this backend as a bearer token
  //     concurrency: 12, // requests at once; absent: the engine's slots
  //     weight: 1, // its share among equals
  //     gpu: "0", // backends with the same value share one GPU, and take turns where they do not fit together
  //     healthInterval: 5000, // ms between probes
  //     timeout: 3000, // ms a probe may take
  //     staleAfterMs: 18_000, // older knowledge is no knowledge; absent: 3 × healthInterval + timeout
  //   },
  //   // Each address of the name is a backend of its own.
  //   { id: "pods", kind: "vllm", url: "http://vllm.internal:8000", discover: "dns" },
  // ],
  // models: {
  //   "qwen2.5:14b": {
  //     backends: ["vllm"], // only these serve it; absent: all that have it
  //     aliases: ["default"],
  //     fallback: ["coder"], // smaller models that answer while this one cannot, in this order
  //     concurrency: 4, // requests at once over all backends
  //     warm: false, // true: loaded at start and after a reload, where it fits
  //     maxOutputTokens: 4096, // cap on one answer
  //   },
  // },
  // queue: {
  //   maxWaitMs: 120_000, // the longest wait; 0: do not wait
  //   maxLength: 512, // waiting requests per model
  //   turnMs: "auto", // ms a model stays at least while others want its memory; auto: from what a load takes
  //   heartbeatMs: 15_000, // comments in a stream while nothing flows; 0: none
  // },
  // timeouts: {
  //   connectMs: 5000, // no headers for so long: the backend is probed
  //   firstByteMs: 300_000, // streams; 0: none
  //   idleMs: 120_000, // streams, between chunks; 0: none
  //   clientMs: 60_000, // a client that does not read; 0: none
  //   totalMs: 0, // answers in one piece; 0: none
  //   loadMs: 600_000, // one load of a model
  // },
  // limits: {
  //   bodyBytes: 32 * 1024 * 1024, // one request body
  //   heldBytes: 256 * 1024 * 1024, // all that are held at once
  //   bufferBytes: 8 * 1024 * 1024, // an answer in one piece that is checked before it is passed on
  // },
  // drain: {
  //   delayMs: 0, // after SIGTERM still admitting: set it behind a balancer
  //   graceMs: 30_000, // then for running answers
  // },
  // auth: {
  //   keys: [
  //     { key: "${MY_KEY}" },
  //     { hash: "sha256:…", tenant: "night-shift" }, // as tidegate key create prints it
  //   ],
  //   jwt: [
  //     {
  //       issuer: "https://id.example", // what iss of a token has to be
  //       audience: "tidegate", // what aud has to be, or contain
  //       jwksUrl: "https://id.example/.well-known/jwks.json", // or jwksFile: "keys.json"
  //       algorithms: ["RS256", "ES256", "EdDSA"],
  //       toleranceS: 5, // how far clocks may differ, seconds
  //       tenantClaim: "tenant", // the claim that names the tenant
  //     },
  //   ],
  // },
  // tenants: {
  //   "night-shift": {
  //     weight: 1, // its share where tenants wait for the same
  //     priority: "default", // interactive, default, batch
  //     models: ["*"], // what it may use and sees; * is any text
  //     concurrency: 4, // requests at once; absent: no limit
  //     requestsPerMinute: 60, // absent: no limit
  //     maxOutputTokens: 4096, // cap on one answer; absent: none
  //     budgets: [{ tokens: 2_000_000, window: "day" }], // "90s", "5m", "1h", "day", "month"
  //   },
  // },
  // cache: {
  //   enabled: true, // answers that would be the same again: temperature 0, and embeddings
  //   maxItems: 1000,
  //   maxBytes: 64 * 1024 * 1024, // of all of them together
  //   ttlMs: 300_000, // for how long an answer may be given again
  //   streamCacheDisabled: true, // false: streams too, once they are whole
  // },
  // redis: {
  //   url: "${MY_REDIS}", // such as redis://127.0.0.1:6379; absent: not used
  //   timeoutMs: 20, // no request waits longer for it
  //   prefix: "tidegate:", // before the name of every key there
  // },
  // circuitBreaker: {
  //   failureThreshold: 3, // failures in a row after which a backend, or a model on it, is left alone
  //   resetTimeoutMs: 10_000, // for so long, doubled each time up to 8 ×
  //   halfOpenRequests: 1, // at once, then, to find out whether it works again
  // },
  // metrics: {
  //   enabled: true,
  //   endpoint: "/metrics",
  //   labels: ["model", "backend_id", "cache_hit", "status"], // also tenant, endpoint
  // },
  // telemetry: {
  //   otlpEndpoint: "http://127.0.0.1:4318", // absent: no traces
  //   serviceName: "tidegate",
  //   sampling: 1, // 0 to 1
  // },
  // admin: {
  //   enabled: true, // GET, POST /admin/api/…
  //   key: "${MY_ADMIN_KEY}", // needed from everywhere; absent: callers on this machine only
  // },
});
