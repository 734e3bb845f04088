import { z } from "zod";

/** Durations are milliseconds, sizes bytes. `0` switches a limit off where the key says so. */
const ms = z.number().int().min(0);
const size = z.number().int().min(1);
const count = z.number().int().min(1);
const MIB = 1024 * 1024;

const KINDS = ["ollama", "openai", "demo", "llamacpp", "vllm", "lmstudio", "sglang"] as const;
export type Kind = (typeof KINDS)[number];

/** A backend's URL is accepted with or without `/v1` and trailing slash; this is it without. */
function rootUrl(url: string): string {
  return url.replace(/\/+$/, "").replace(/\/v1$/, "").replace(/\/+$/, "");
}

const httpUrl = z.url({
  protocol: /^https?$/,
  error: "expected an http(s) URL such as http://127.0.0.1:11434",
});

/** `fetch` refuses a URL with a user in it, and the engine would never see the rest. */
const backendUrl = httpUrl
  .refine((text) => {
    const url = URL.parse(text);
    return url === null || url.username + url.password + url.search + url.hash === "";
  }, "expected a URL without user, query or fragment: a key belongs in apiKey")
  .transform(rootUrl);

const namedModel = z.union([
  z.string().min(1),
  z.strictObject({
    name: z.string().min(1).describe("Public name; the same on several backends is one model."),
    upstream: z.string().min(1).optional().describe("The engine's name, where it differs."),
  }),
]);

const backend = z.strictObject({
  id: z.string().min(1).describe("Unique; `backend_id` in headers, log, metrics and traces."),
  kind: z
    .enum(KINDS)
    .optional()
    .describe("Absent: found out by asking the engine; `openai` until it answers."),
  url: backendUrl
    .optional()
    .describe("With or without `/v1` and trailing slash. `demo` needs none."),
  models: z
    .array(namedModel)
    .optional()
    .describe("Absent: discovered. Named: exactly these, also while the engine is away."),
  include: z
    .array(z.string().min(1))
    .optional()
    .describe("Of the discovered models only those that match one of these; `*` is any text."),
  exclude: z
    .array(z.string().min(1))
    .optional()
    .describe("Not those discovered models that match one of these; `*` is any text."),
  allowCloud: z
    .boolean()
    .default(false)
    .describe("Serves Ollama models whose answers are made on other people's machines."),
  apiKey: z.string().min(1).optional().describe("Sent to this backend as a bearer token."),
  concurrency: count
    .optional()
    .describe("Requests at once in this backend, all models together. Absent: as the engine says."),
  weight: z.number().positive().default(1).describe("Its share among equals."),
  healthInterval: ms.min(100).default(5000).describe("From probe to probe."),
  timeout: ms.min(100).default(3000).describe("For one probe; nothing else."),
  staleAfterMs: ms
    .min(1)
    .optional()
    .describe("Older knowledge counts as `unknown`. Absent: 3 × healthInterval + timeout."),
  discover: z
    .literal("dns")
    .optional()
    .describe('`"dns"`: each A record of the URL\'s host is a backend of its own, `id@address`.'),
});

const model = z.strictObject({
  backends: z
    .array(z.string())
    .optional()
    .describe("Only these backends serve it. Absent: all that have it."),
  aliases: z
    .array(z.string().min(1))
    .default([])
    .describe("Further names. A discovered model of that name wins, with a warning."),
  fallback: z
    .union([z.string(), z.array(z.string())])
    .optional()
    .describe("Smaller models, tried in this order. In effect from a later version."),
  concurrency: count.optional().describe("Requests at once over all backends."),
  maxOutputTokens: count
    .optional()
    .describe("Cap on the tokens of one answer. In effect from a later version."),
});

const apiKey = z.union([
  z.strictObject({ key: z.string().min(1).describe("In clear, or `${VAR}`.") }),
  z.strictObject({
    hash: z
      .string()
      .regex(/^sha256:[0-9a-f]{64}$/, 'expected "sha256:" and 64 hex digits')
      .describe('`"sha256:"` and 64 hex digits.'),
  }),
]);

const METRIC_LABELS = ["model", "backend_id", "cache_hit", "status", "tenant", "endpoint"] as const;
export type MetricLabel = (typeof METRIC_LABELS)[number];

const sections = {
  server: z.strictObject({
    host: z
      .string()
      .min(1)
      .default("127.0.0.1")
      .describe(
        "Bind address. Beyond loopback it needs `auth.keys` or `insecure`. Needs a restart.",
      ),
    port: z
      .number()
      .int()
      .min(0)
      .max(65_535)
      .default(4000)
      .describe("0: any free one. Needs a restart."),
    logLevel: z.enum(["debug", "info", "warn", "error"]).default("info").describe("Of the log."),
    insecure: z
      .boolean()
      .default(false)
      .describe("Allows a bind beyond loopback without keys: everyone there may call."),
    allowedHosts: z
      .array(z.string())
      .default([])
      .describe("`Host` names on a loopback bind, beside those of this machine."),
    allowedOrigins: z
      .array(z.string())
      .default([])
      .describe('Origins of web pages, beside those of this machine and local apps; `"*"`: all.'),
  }),
  queue: z.strictObject({
    maxWaitMs: ms
      .default(120_000)
      .describe(
        "Longest wait for a slot, also capped by the client's own time-out. 0: do not wait.",
      ),
    maxLength: count.default(512).describe("Waiting requests per model."),
    heartbeatMs: ms
      .default(15_000)
      .describe("A comment in a stream after so long without anything else. 0: none."),
  }),
  timeouts: z.strictObject({
    connectMs: ms
      .min(1)
      .default(5000)
      .describe("No response headers for so long: the backend is probed at once."),
    firstByteMs: ms.default(300_000).describe("Streams: until the first byte. 0: none."),
    idleMs: ms.default(120_000).describe("Streams: between chunks. 0: none."),
    clientMs: ms.default(60_000).describe("A client that does not read. 0: none."),
    totalMs: ms.default(0).describe("Answers in one piece. 0: none but the client's own."),
  }),
  limits: z.strictObject({
    bodyBytes: size.default(32 * MIB).describe("One request body; beyond: 413."),
    heldBytes: size.default(256 * MIB).describe("All request bodies in memory; beyond: 503."),
    bufferBytes: size
      .default(8 * MIB)
      .describe("An answer in one piece up to this is checked before it is passed on."),
  }),
  drain: z.strictObject({
    delayMs: ms
      .default(0)
      .describe("After the signal still admitting for so long: set it behind a balancer."),
    graceMs: ms.default(30_000).describe("Then for running answers."),
  }),
  auth: z.strictObject({
    keys: z.array(apiKey).default([]).describe("Who may call. Empty: everyone who can connect."),
  }),
  cache: z.strictObject({
    enabled: z.boolean().default(true).describe("In effect from a later version."),
    maxItems: count.default(1000).describe("In effect from a later version."),
    maxBytes: size.default(64 * MIB).describe("In effect from a later version."),
    ttlMs: ms.default(300_000).describe("In effect from a later version."),
    streamCacheDisabled: z.boolean().default(true).describe("In effect from a later version."),
  }),
  circuitBreaker: z.strictObject({
    failureThreshold: count
      .default(3)
      .describe("Opens after so many failures in a row; nothing else opens it."),
    resetTimeoutMs: ms
      .default(10_000)
      .describe(
        "Open for so long, doubled each time it opens again up to 8 ×, jittered downward by up to a fifth.",
      ),
    halfOpenRequests: count
      .default(1)
      .describe("Requests at once that try whether it works again."),
  }),
  metrics: z.strictObject({
    enabled: z.boolean().default(true).describe("Counts, and answers at `endpoint`."),
    endpoint: z
      .string()
      .regex(
        /^\/(?!(?:v1|api|admin|health|ready)(?:\/|$))[\w.~-]+(?:\/[\w.~-]+)*$/,
        "expected a path such as /metrics that is no other route",
      )
      .default("/metrics")
      .describe("Path of the Prometheus text."),
    labels: z
      .array(z.enum(METRIC_LABELS))
      .default(["model", "backend_id", "cache_hit", "status"])
      .describe("Of `tidegate_requests_total`."),
  }),
  telemetry: z.strictObject({
    otlpEndpoint: httpUrl.optional().describe("Where traces go. Absent: none are made."),
    serviceName: z.string().min(1).default("tidegate").describe("Of the traces."),
    sampling: z.number().min(0).max(1).default(1).describe("Share of requests that are traced."),
  }),
  admin: z.strictObject({
    enabled: z.boolean().default(true).describe("Answers at `/admin/api`."),
    key: z
      .string()
      .min(1)
      .optional()
      .describe("Needed from everywhere. Absent: `/admin/api` answers this machine only."),
  }),
};

// `.prefault({})`: an absent section is parsed like an empty one, so each default stands once.
export const schema = z.strictObject({
  server: sections.server.prefault({}).describe("Where it listens and who may reach it."),
  backends: z
    .array(backend)
    .default([])
    .describe("The engines. None named: the usual loopback ports are searched for them."),
  models: z.record(z.string(), model).default({}).describe("Settings of models, by public name."),
  queue: sections.queue.prefault({}).describe("Waiting for a slot."),
  timeouts: sections.timeouts.prefault({}).describe("Each limit has one meaning."),
  limits: sections.limits.prefault({}).describe("What may be in memory."),
  drain: sections.drain.prefault({}).describe("The end of the process, after SIGTERM or SIGINT."),
  auth: sections.auth.prefault({}).describe("Keys of clients."),
  cache: sections.cache.optional().describe("Accepted; in effect from a later version."),
  circuitBreaker: sections.circuitBreaker
    .prefault({})
    .describe("Leaves backends, and models on them, alone while they fail."),
  metrics: sections.metrics.prefault({}).describe("Prometheus."),
  telemetry: sections.telemetry.prefault({}).describe("OpenTelemetry."),
  admin: sections.admin.prefault({}).describe("The operator's side: `/admin/api`."),
});

/** The configuration as code reads it: checked, with every default in its place. */
export type Config = z.output<typeof schema>;
export type BackendConfig = Config["backends"][number];
/** The configuration as people write it. */
export type ConfigInput = z.input<typeof schema>;

type Frozen<T> = T extends readonly (infer Item)[]
  ? readonly Frozen<Item>[]
  : T extends object
    ? { readonly [Key in keyof T]: Frozen<T[Key]> }
    : T;
type BackendInput = Frozen<NonNullable<ConfigInput["backends"]>[number]>;
type ModelInput = Frozen<NonNullable<ConfigInput["models"]>[string]>;

type IdOf<B extends readonly BackendInput[]> = B extends readonly [] ? string : B[number]["id"];
/** Without `models` a backend may have any: the union is then just `string`. */
type NameOf<B> = B extends { readonly models: readonly (infer Named)[] }
  ? Named extends { readonly name: infer Name extends string }
    ? Name
    : Named & string
  : string;
type NamesOf<B extends readonly BackendInput[]> = B extends readonly []
  ? string
  : NameOf<B[number]>;

type TypedConfig<B extends readonly BackendInput[]> = Frozen<
  Omit<ConfigInput, "backends" | "models">
> & {
  readonly backends?: B;
  readonly models?: Readonly<
    Record<
      string,
      Omit<ModelInput, "backends" | "fallback"> & {
        readonly backends?: readonly NoInfer<IdOf<B>>[];
        readonly fallback?: NoInfer<NamesOf<B>> | readonly NoInfer<NamesOf<B>>[];
      }
    >
  >;
};

/**
 * Types a configuration: an unknown backend id, and where every backend names its models an unknown
 * fallback, does not compile. At run time it changes nothing; everything is checked again at start.
 */
export function defineConfig<const B extends readonly BackendInput[] = readonly []>(
  config: TypedConfig<B>,
): TypedConfig<B> {
  return config;
}
