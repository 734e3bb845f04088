import { z } from "zod";

/** Durations are milliseconds, sizes bytes. `0` switches a limit off where the key says so. */
const ms = z.number().int().min(0);
const size = z.number().int().min(1);
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

const namedModel = z.union([
  z.string().min(1),
  z.strictObject({ name: z.string().min(1), upstream: z.string().min(1).optional() }),
]);

const backend = z.strictObject({
  id: z.string().min(1),
  kind: z.enum(KINDS).optional(),
  url: httpUrl.transform(rootUrl).optional(),
  models: z.array(namedModel).optional(),
  apiKey: z.string().min(1).optional(),
  concurrency: z.number().int().min(1).optional(),
  weight: z.number().positive().default(1),
  healthInterval: ms.min(100).default(5000),
  timeout: ms.min(100).default(3000),
});

const model = z.strictObject({
  backends: z.array(z.string()).optional(),
  aliases: z.array(z.string().min(1)).default([]),
  fallback: z.union([z.string(), z.array(z.string())]).optional(),
  concurrency: z.number().int().min(1).optional(),
  maxOutputTokens: z.number().int().min(1).optional(),
});

const apiKey = z.union([
  z.strictObject({ key: z.string().min(1) }),
  z.strictObject({
    hash: z.string().regex(/^sha256:[0-9a-f]{64}$/, 'expected "sha256:" and 64 hex digits'),
  }),
]);

const METRIC_LABELS = ["model", "backend_id", "cache_hit", "status", "tenant", "endpoint"] as const;
export type MetricLabel = (typeof METRIC_LABELS)[number];

// `.prefault({})`: an absent section is parsed like an empty one, so each default stands once.
export const schema = z.strictObject({
  server: z
    .strictObject({
      host: z.string().min(1).default("127.0.0.1"),
      port: z.number().int().min(0).max(65_535).default(4000),
      logLevel: z.enum(["debug", "info", "warn", "error"]).default("info"),
      insecure: z.boolean().default(false),
      allowedHosts: z.array(z.string()).default([]),
      allowedOrigins: z.array(z.string()).default([]),
    })
    .prefault({}),
  backends: z.array(backend).default([]),
  models: z.record(z.string(), model).default({}),
  queue: z
    .strictObject({
      maxWaitMs: ms.default(120_000),
      maxLength: z.number().int().min(1).default(512),
      heartbeatMs: ms.default(15_000),
    })
    .prefault({}),
  timeouts: z
    .strictObject({
      connectMs: ms.min(1).default(5000),
      firstByteMs: ms.default(300_000),
      idleMs: ms.default(120_000),
      clientMs: ms.default(60_000),
      totalMs: ms.default(0),
    })
    .prefault({}),
  limits: z
    .strictObject({
      bodyBytes: size.default(32 * MIB),
      heldBytes: size.default(256 * MIB),
      bufferBytes: size.default(8 * MIB),
    })
    .prefault({}),
  drain: z.strictObject({ delayMs: ms.default(0), graceMs: ms.default(30_000) }).prefault({}),
  auth: z.strictObject({ keys: z.array(apiKey).default([]) }).prefault({}),
  cache: z
    .strictObject({
      enabled: z.boolean().default(true),
      maxItems: z.number().int().min(1).default(1000),
      maxBytes: size.default(64 * MIB),
      ttlMs: ms.default(300_000),
      streamCacheDisabled: z.boolean().default(true),
    })
    .optional(),
  circuitBreaker: z
    .strictObject({
      failureThreshold: z.number().int().min(1).default(3),
      resetTimeoutMs: ms.default(10_000),
      halfOpenRequests: z.number().int().min(1).default(1),
    })
    .optional(),
  metrics: z
    .strictObject({
      enabled: z.boolean().default(true),
      endpoint: z
        .string()
        .regex(/^\/[^?#\s]*$/, "expected a path such as /metrics")
        .default("/metrics"),
      labels: z
        .array(z.enum(METRIC_LABELS))
        .default(["model", "backend_id", "cache_hit", "status"]),
    })
    .prefault({}),
  telemetry: z
    .strictObject({
      otlpEndpoint: httpUrl.optional(),
      serviceName: z.string().min(1).default("tidegate"),
      sampling: z.number().min(0).max(1).default(1),
    })
    .prefault({}),
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
