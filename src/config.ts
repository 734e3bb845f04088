import { z } from "zod";
import { CLASSES } from "./core/fairness.ts";

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

/** One engine. */
export const backend = z.strictObject({
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
  gpu: z
    .string()
    .min(1)
    .optional()
    .describe(
      "Backends with the same value share one GPU: where their models do not fit together, they take turns.",
    ),
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
    .describe(
      "Smaller models that answer when this one cannot in time, cannot be loaded or is down, tried in this order.",
    ),
  concurrency: count.optional().describe("Requests at once over all backends."),
  warm: z
    .boolean()
    .default(false)
    .describe(
      "Loaded at start, after a reload and when a backend comes up, where it fits beside what is loaded.",
    ),
  maxOutputTokens: count
    .optional()
    .describe("Cap on the tokens of one answer: put in where the client set none or more."),
});

const tenantOfKey = z
  .string()
  .min(1)
  .default("default")
  .describe("Whose key it is: a name in `tenants`.");

const apiKey = z.union([
  z.strictObject({
    key: z.string().min(1).describe("In clear, or `${VAR}`."),
    tenant: tenantOfKey,
  }),
  z.strictObject({
    hash: z
      .string()
      .regex(/^sha256:[0-9a-f]{64}$/, 'expected "sha256:" and 64 hex digits')
      .describe('`"sha256:"` and 64 hex digits, as `tidegate key create` prints them.'),
    tenant: tenantOfKey,
  }),
]);

/** What a public key can verify. Symmetric algorithms are none of them: their key signs as well. */
const ALGORITHMS = [
  "RS256",
  "RS384",
  "RS512",
  "PS256",
  "PS384",
  "PS512",
  "ES256",
  "ES384",
  "ES512",
  "EdDSA",
] as const;

const tokenIssuer = z.strictObject({
  issuer: z.string().min(1).describe("What `iss` of a token has to be."),
  audience: z.string().min(1).describe("What `aud` has to be, or contain."),
  jwksUrl: httpUrl.optional().describe("Where the issuer's public keys are."),
  jwksFile: z.string().min(1).optional().describe("A file with them, in the place of a URL."),
  algorithms: z
    .array(z.enum(ALGORITHMS))
    .min(1)
    .default(["RS256", "ES256", "EdDSA"])
    .describe("How a token may be signed."),
  toleranceS: z.number().int().min(0).default(5).describe("How far clocks may differ, seconds."),
  tenantClaim: z
    .string()
    .min(1)
    .default("tenant")
    .describe("The claim that names the tenant; dots lead into objects."),
});

const budget = z.strictObject({
  tokens: count.describe("Prompt and answer together."),
  window: z
    .string()
    .regex(
      /^(?:[1-9]\d*[smh]|day|month)$/,
      'expected a time such as "90s", "5m" or "1h", "day" or "month"',
    )
    .describe('`"90s"`, `"5m"`, `"1h"` slide; `"day"`, `"month"` are those of the calendar, UTC.'),
});

const tenant = z.strictObject({
  weight: z.number().positive().default(1).describe("Its share where tenants wait for the same."),
  priority: z
    .enum(CLASSES)
    .default("default")
    .describe("Who is served first; a request may lower its own by `x-tidegate-priority`."),
  models: z
    .array(z.string().min(1))
    .default(["*"])
    .describe("What it may use and sees, by public name; `*` is any text."),
  concurrency: count.optional().describe("Requests at once."),
  requestsPerMinute: count.optional().describe("Requests that are not answered from the cache."),
  maxOutputTokens: count.optional().describe("Cap on the tokens of one answer."),
  budgets: z.array(budget).default([]).describe("Tokens per time; all of them hold."),
});

const METRIC_LABELS = ["model", "backend_id", "cache_hit", "status", "tenant", "endpoint"] as const;
export type MetricLabel = (typeof METRIC_LABELS)[number];

const sections = {
  server: z.strictObject({
    host: z
      .string()
      .min(1)
      .default("127.0.0.1")
      .describe(
        "Bind address. Beyond loopback it needs `auth` (or `TIDEGATE_API_KEYS`) or `insecure`. Needs a restart.",
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
    turnMs: z
      .union([z.literal("auto"), ms])
      .default("auto")
      .describe(
        "How long a model stays at least while others want its memory. `auto`: from what a load takes, 2 s to 60 s. Never below four loads.",
      ),
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
    loadMs: ms.min(1).default(600_000).describe("One load of a model."),
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
    keys: z
      .array(apiKey)
      .default([])
      .describe("Who may call. Neither these nor `auth.jwt`: everyone who can connect."),
    jwt: z.array(tokenIssuer).default([]).describe("Whose tokens are taken as well."),
  }),
  cache: z.strictObject({
    enabled: z
      .boolean()
      .default(true)
      .describe("Keeps answers that would be the same again: `temperature: 0`, and embeddings."),
    maxItems: count.default(1000).describe("Answers; the one not used for longest goes first."),
    maxBytes: size.default(64 * MIB).describe("Of all of them together."),
    ttlMs: ms.min(1).default(300_000).describe("For how long an answer may be given again."),
    streamCacheDisabled: z
      .boolean()
      .default(true)
      .describe("`false`: streams are kept too, once they are whole, and played again."),
  }),
  redis: z.strictObject({
    url: z
      .url({ protocol: /^rediss?$/, error: "expected a URL such as redis://127.0.0.1:6379" })
      .optional()
      .describe("Redis or Valkey, shared with other gateways. Absent: not used."),
    timeoutMs: ms.min(1).default(20).describe("No request waits longer for it."),
    prefix: z.string().default("tidegate:").describe("Before the name of every key there."),
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
  auth: sections.auth.prefault({}).describe("Keys and tokens of clients."),
  tenants: z
    .record(
      z.string().regex(/^[\w.-]{1,64}$/, "expected a name of letters, digits, . _ and -"),
      tenant,
    )
    .default({})
    .describe("Who shares this gateway, and how. `default` always exists."),
  cache: sections.cache.prefault({}).describe("Answers that need not be made again."),
  redis: sections.redis.prefault({}).describe("What several gateways share."),
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
export type TenantConfig = Config["tenants"][string];
/** The configuration as people write it. */
export type ConfigInput = z.input<typeof schema>;

const UNLISTED: TenantConfig = tenant.parse({});

/** A tenant's settings; `default` exists whether it is listed or not. */
export function tenantOf(config: Config, name: string): TenantConfig {
  return Object.hasOwn(config.tenants, name) ? (config.tenants[name] ?? UNLISTED) : UNLISTED;
}

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
