import { adminApi, operatorsOnly, type Peer } from "./admin/api.ts";
import type { Operations } from "./admin/operations.ts";
import { zValidator } from "@hono/zod-validator";
import { Hono, type Context } from "hono";
import { cors } from "hono/cors";
import { z } from "zod";
import { tenantOf } from "./config.ts";
import { visibleTo, type Model, type Snapshot } from "./core/snapshot.ts";
import { suggest } from "./core/suggest.ts";
import { checkOrigin, identify } from "./data/identify.ts";
import { serve } from "./data/pipeline.ts";
import type { Plane } from "./data/plane.ts";
import { findModel } from "./data/resolve.ts";
import { anthropic, countTokens, messages } from "./dialects/anthropic.ts";
import { refuseInvalid, type Dialect, type Endpoint } from "./dialects/dialect.ts";
import {
  chatCompletions,
  completions,
  embeddings,
  openai,
  rerank,
  responses,
} from "./dialects/openai.ts";
import { ollama } from "./dialects/ollama.ts";
import { asGatewayError, GatewayError, quote } from "./errors.ts";

const ENDPOINTS: readonly Endpoint[] = [
  chatCompletions,
  completions,
  embeddings,
  responses,
  messages,
  countTokens,
  rerank,
];

/** Readable by pages of other origins. */
const EXPOSED = [
  "x-request-id",
  "request-id",
  "x-tidegate-backend",
  "x-tidegate-model",
  "x-tidegate-reason",
  "x-tidegate-attempts",
  "x-tidegate-cache",
  "x-tidegate-degraded",
  "x-tidegate-pinned",
  "age",
  "x-ratelimit-limit-requests",
  "x-ratelimit-remaining-requests",
  "x-ratelimit-reset-requests",
  "x-ratelimit-limit-tokens",
  "x-ratelimit-remaining-tokens",
  "x-ratelimit-reset-tokens",
  "server-timing",
  "retry-after",
  "retry-after-ms",
  "x-should-retry",
];

const modelParam = z.object({ id: z.string().min(1) });
const modelQuery = z.object({
  limit: z.coerce.number().int().min(1).max(1000).default(1000),
  after_id: z.string().optional(),
  before_id: z.string().optional(),
});

export interface Readiness {
  ready: boolean;
  reason: string;
}

export interface AppOptions {
  version: string;
  /** On the clock of the plane. */
  startedAt: number;
  readiness: () => Readiness;
  operations: Operations;
}

/** What the routes share: who is at the other end, and below `/v1` what that caller may see. */
interface Env {
  Bindings: Peer;
  Variables: { visible: Snapshot };
}

/** The route table: every path the gateway answers. */
export function createApp(plane: Plane, options: AppOptions): Hono<Env> {
  const { version, startedAt, readiness, operations } = options;
  const app = new Hono<Env>();

  // First of all: what the operator may do is nobody else's business, allowed origins included.
  app.use("/admin/*", operatorsOnly(operations));
  app.use(corsForAllowed(plane));
  for (const endpoint of ENDPOINTS) {
    app.post(endpoint.path, ({ req, env }) => serve(req.raw, endpoint, plane, env.peer));
  }
  // From here on requests that are answered by the gateway itself.
  app.use(async (context, next) => {
    checkOrigin(context.req.raw.headers, plane.access);
    await next();
    if (context.res.headers.has("x-request-id")) return;
    const id = crypto.randomUUID();
    context.header("x-request-id", id);
    if (isAnthropic(context)) context.header("request-id", id);
  });
  app.use("/v1/*", async (context, next) => {
    // Of one configuration: a reload may come while a token is looked at.
    const { config, access } = plane;
    const { models } = tenantOf(config, await identify(context.req.raw.headers, access));
    context.set("visible", visibleTo(plane.snapshot(), models));
    await next();
  });
  app.get("/v1/models", zValidator("query", modelQuery, refuseInvalid), (context) => {
    const { models } = context.get("visible");
    if (!isAnthropic(context)) {
      return context.json({ object: "list", data: models.map(openaiModel) });
    }
    return context.json(anthropicPage(models, context.req.valid("query")));
  });
  app.get("/v1/models/:id{.+}", zValidator("param", modelParam, refuseInvalid), (context) => {
    const model = findModel(context.get("visible"), context.req.valid("param").id);
    return context.json(isAnthropic(context) ? anthropicModel(model) : openaiModel(model));
  });
  app.get("/health", (context) => {
    const uptime_s = Math.floor((plane.now() - startedAt) / 1000);
    return context.json({ status: "ok", version, uptime_s });
  });
  app.get("/ready", (context) => {
    const { ready, reason } = readiness();
    const backends = plane
      .snapshot()
      .backends.map(({ id, health, drained }) => ({ id, health, drained }));
    return context.json({ ready, reason, backends }, ready ? 200 : 503);
  });
  app.get("/", (context) =>
    context.json({
      name: "tidegate",
      version,
      description: "One dependable endpoint in front of local language models",
      endpoints: ["/v1/models", ...ENDPOINTS.map(({ path }) => path), "/health", "/ready"],
    }),
  );
  const { metrics } = plane;
  if (metrics !== null) {
    app.get(plane.config.metrics.endpoint, async (context) =>
      context.text(await metrics.text(), 200, { "content-type": metrics.contentType }),
    );
  }
  app.route("/admin/api", adminApi(operations));
  refuseOtherMethods(app);
  app.notFound((context) => answerError(context, unknownUrl(context.req.path)));
  app.onError((error, context) => {
    const shown = asGatewayError(error);
    if (shown.detail !== null) plane.log.error(shown.message, { detail: shown.detail });
    return answerError(context, shown);
  });
  return app;
}

/** Hono's CORS, for the requests that have an origin and may. */
function corsForAllowed(plane: Plane) {
  const allow = cors({
    origin: (origin) => origin,
    exposeHeaders: EXPOSED,
    allowMethods: ["GET", "POST", "HEAD"],
    maxAge: 600,
  });
  return async (context: Context, next: () => Promise<void>): Promise<Response | void> => {
    if (context.req.raw.headers.get("origin") === null) return next();
    try {
      checkOrigin(context.req.raw.headers, plane.access);
    } catch {
      // Refused further in, where it is told of; its page may not read why.
      return next();
    }
    if (context.req.method === "OPTIONS") context.header("x-request-id", crypto.randomUUID());
    return allow(context, next);
  };
}

/** A path that exists, asked with another method. */
function refuseOtherMethods(app: Hono<Env>) {
  const methods = new Map<string, Set<string>>();
  for (const { path, method } of app.routes) {
    if (method === "ALL") continue;
    const known = methods.get(path) ?? new Set();
    known.add(method);
    if (method === "GET") known.add("HEAD");
    methods.set(path, known);
  }
  for (const [path, known] of methods) {
    const allow = [...known].join(", ");
    app.all(path, (context) => {
      const message = `${context.req.method} is not for ${quote(context.req.path)}: use ${allow}`;
      throw new GatewayError("method_not_allowed", message, { allow });
    });
  }
}

function unknownUrl(path: string): GatewayError {
  const known = ENDPOINTS.map((endpoint) => endpoint.path).concat("/v1/models");
  // Base URLs with `/v1` twice or not at all are the usual mistake.
  const likely =
    known.find((each) => each.endsWith(path.replace(/^\/v1(?=\/)/, ""))) ?? suggest(path, known);
  const hint = likely === null ? "" : `; did you mean ${likely}?`;
  return new GatewayError("unknown_url", `there is nothing at ${quote(path)}${hint}`);
}

function isAnthropic(context: Context): boolean {
  const { headers } = context.req.raw;
  return headers.get("anthropic-version") !== null || context.req.path.startsWith("/v1/messages");
}

function dialectOf(context: Context): Dialect {
  if (isAnthropic(context)) return anthropic;
  return context.req.path.startsWith("/api/") ? ollama : openai;
}

function answerError(context: Context, error: GatewayError): Response {
  const id = crypto.randomUUID();
  const dialect = dialectOf(context);
  const headers: Record<string, string> = { "x-request-id": id, ...error.headers() };
  if (dialect === anthropic) headers["request-id"] = id;
  return Response.json(dialect.errorBody(error, id), { status: error.status, headers });
}

function openaiModel(model: Model) {
  const { name: id, createdAt: created, contextLength, capabilities, targets } = model;
  return {
    id,
    object: "model",
    created,
    owned_by: targets[0]?.backend ?? "tidegate",
    ...(contextLength === null ? {} : { context_length: contextLength }),
    ...(capabilities.length === 0 ? {} : { capabilities }),
  };
}

function anthropicModel({ name, createdAt }: Model) {
  const created_at = new Date(createdAt * 1000).toISOString();
  return { type: "model", id: name, display_name: name, created_at };
}

function anthropicPage(models: Model[], query: z.output<typeof modelQuery>) {
  const indexOf = (id: string | undefined, otherwise: number) => {
    const at = models.findIndex((model) => model.name === id);
    return at === -1 ? otherwise : at;
  };
  const from = query.after_id === undefined ? 0 : indexOf(query.after_id, -1) + 1;
  const to =
    query.before_id === undefined ? models.length : indexOf(query.before_id, models.length);
  const page = models.slice(from, Math.min(to, from + query.limit));
  return {
    data: page.map(anthropicModel),
    has_more: from + page.length < to,
    first_id: page[0]?.name ?? null,
    last_id: page.at(-1)?.name ?? null,
  };
}
