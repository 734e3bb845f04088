import { resolve, type Model, type Snapshot } from "../core/snapshot.ts";
import type { Want } from "../dialects/dialect.ts";
import type { Engine } from "../engines/engine.ts";
import { GatewayError, quote } from "../errors.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/**
 * The model of that name in a snapshot.
 *
 * @throws GatewayError `model_not_found`, `permission_denied`
 */
export function findModel(snapshot: Snapshot, asked: string): Model {
  const resolution = resolve(snapshot, asked);
  if (resolution.found) return resolution.model;
  if (snapshot.withheld.includes(asked)) {
    throw new GatewayError(
      "permission_denied",
      `model ${quote(asked)} is answered by machines that are not yours, so it is not served: ` +
        "set allowCloud: true on its backend to let prompts leave",
      { param: "model" },
    );
  }
  const { suggestion } = resolution;
  const hint = suggestion === null ? "" : `; did you mean ${quote(suggestion)}?`;
  const count = snapshot.models.length;
  throw new GatewayError(
    "model_not_found",
    `model ${quote(asked)} is not here${hint}; GET /v1/models lists what is (${count})`,
    { param: "model" },
  );
}

/**
 * The model a request means, in the exchange's snapshot.
 *
 * @throws GatewayError `model_not_found`, `permission_denied`, `unsupported_endpoint`, `unsupported_parameter`
 */
export function resolveModel(exchange: Exchange, plane: Plane): Model {
  const model = findModel(
    exchange.snapshot,
    exchange.degraded?.served ?? exchange.view?.model ?? "",
  );
  exchange.record.model = model.name;
  if (!isAble(exchange, plane, model)) throw inability(exchange, plane, model);
  return model;
}

/** Is there an engine with this model that does what the request wants? */
export function isAble(exchange: Exchange, plane: Plane, model: Model): boolean {
  return model.targets.some(({ backend }) => {
    return canServe(exchange, plane.fleet.engineFor(backend));
  });
}

/** The first thing that the request wants and this engine cannot do. */
function lackOf(exchange: Exchange, engine: Engine): Want | undefined {
  for (const want of exchange.view?.wants ?? []) if (engine.cannot(want) !== null) return want;
  return undefined;
}

/** Does this engine speak the path, and do all that the request wants? */
export function canServe(exchange: Exchange, engine: Engine | undefined): boolean {
  return engine?.speaks(exchange.endpoint.path) === true && lackOf(exchange, engine) === undefined;
}

/** Why none of the model's backends can serve the request, however idle. */
function inability(exchange: Exchange, plane: Plane, model: Model): GatewayError {
  const { path } = exchange.endpoint;
  const name = quote(model.name);
  for (const { backend } of model.targets) {
    const engine = plane.fleet.engineFor(backend);
    const want = engine?.speaks(path) === true ? lackOf(exchange, engine) : undefined;
    if (engine === undefined || want === undefined) continue;
    return new GatewayError(
      "unsupported_parameter",
      `no backend with model ${name} does what ${want.param} asks for: ${engine.kind} ${engine.cannot(want)}`,
      { param: want.param },
    );
  }
  return new GatewayError("unsupported_endpoint", `no backend with model ${name} does ${path}`);
}
