import { zValidator } from "@hono/zod-validator";
import { Hono, type Context, type MiddlewareHandler } from "hono";
import { z } from "zod";
import type { Backend } from "../core/snapshot.ts";
import { suggest } from "../core/suggest.ts";
import { refuseInvalid } from "../dialects/dialect.ts";
import { GatewayError, quote } from "../errors.ts";
import { ConfigError } from "../settings/load.ts";
import { reported } from "../settings/mistakes.ts";
import { checkOperator } from "./access.ts";
import type { Operations } from "./operations.ts";

/** The address at the other end, from whoever took the connection. */
export interface Peer {
  peer?: (() => string | null) | undefined;
}

const idParam = z.object({ id: z.string().min(1) });
const modelParam = z.object({ model: z.string().min(1) });
const placeBody = z.object({ backend: z.string().optional() });
const reloadQuery = z.object({ dry_run: z.enum(["true", "false"]).optional() });

/** Lets nobody past but operators; where the admin side is switched off nobody at all. */
export function operatorsOnly(operations: Operations): MiddlewareHandler<{ Bindings: Peer }> {
  return async (context, next) => {
    const { enabled, key } = operations.settings;
    if (!enabled) return context.notFound();
    checkOperator(context.req.raw.headers, context.env.peer?.() ?? null, key);
    await next();
  };
}

/** Everything below `/admin/api`; it is to be mounted behind `operatorsOnly`. */
export function adminApi(operations: Operations): Hono<{ Bindings: Peer }> {
  const api = new Hono<{ Bindings: Peer }>();

  api.get("/snapshot", (context) => context.json(operations.snapshot()));
  api.get("/backends", (context) => context.json(operations.backends()));
  for (const [verb, drained] of [
    ["drain", true],
    ["resume", false],
  ] as const) {
    api.post(`/backends/:id/${verb}`, zValidator("param", idParam, refuseInvalid), (context) => {
      const { id } = context.req.valid("param");
      if (!operations.drain(id, drained)) throw noSuchBackend(id, operations.backends());
      return context.json(operations.backends().find((backend) => backend.id === id));
    });
  }
  api.post("/reload", zValidator("query", reloadQuery, refuseInvalid), async (context) => {
    try {
      const dryRun = context.req.valid("query").dry_run === "true";
      const result = dryRun ? operations.compare(await bodyOf(context)) : await operations.reload();
      return context.json({ version: operations.snapshot().version, ...result });
    } catch (error) {
      throw error instanceof ConfigError ? invalidConfig(error) : error;
    }
  });
  api.get("/queue", (context) => context.json(operations.queue()));
  for (const verb of ["load", "unload"] as const) {
    api.post(
      `/models/:model{.+}/${verb}`,
      zValidator("param", modelParam, refuseInvalid),
      async (context) => {
        const { model } = context.req.valid("param");
        const asked = placeBody.safeParse(
          (await context.req.text()) === "" ? {} : await bodyOf(context),
        );
        refuseInvalid(asked);
        const backend = asked.data?.backend ?? null;
        if (!operations.snapshot().models.some(({ name }) => name === model)) {
          throw new GatewayError("model_not_found", `there is no model ${quote(model)}`);
        }
        const targets = operations[verb](model, backend);
        if (targets.length === 0) throw notThere(model, backend ?? "", operations.backends());
        return context.json({ model, targets }, 202);
      },
    );
  }
  api.get("/tenants", async (context) => context.json(await operations.tenants()));
  api.get("/config", (context) =>
    context.json({ values: operations.values(), lastReload: operations.lastReload }),
  );
  return api;
}

function notThere(model: string, id: string, backends: readonly Backend[]): GatewayError {
  if (!backends.some((backend) => backend.id === id)) return noSuchBackend(id, backends);
  const message = `backend ${quote(id)} has no model ${quote(model)}`;
  return new GatewayError("model_not_found", message);
}

function noSuchBackend(id: string, backends: readonly Backend[]): GatewayError {
  const known = backends.map((backend) => backend.id);
  const meant = suggest(id, known);
  const hint = meant === null ? `there are ${known.join(", ")}` : `did you mean ${quote(meant)}?`;
  return new GatewayError("unknown_url", `there is no backend ${quote(id)}; ${hint}`);
}

async function bodyOf(context: Context): Promise<unknown> {
  try {
    return await context.req.json();
  } catch {
    throw new GatewayError("invalid_json", "the body has to be JSON");
  }
}

function invalidConfig({ message, mistakes }: ConfigError): GatewayError {
  return new GatewayError("invalid_config", message, { mistakes: reported(mistakes) });
}
