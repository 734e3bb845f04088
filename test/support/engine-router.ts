/**
 * llama-server started without a model: it starts one server per model and passes on what names one.
 * What is called measured was seen on b11434 beside real §5.2.
 */
import type { Call, Handler, ModelInfo } from "./engine-call.ts";
import {
  error,
  gate,
  llamacpp,
  manner,
  metaOf,
  posts,
  propsOf,
  refusals,
  slotsOf,
  style,
} from "./engine-llamacpp.ts";
import type { Profile } from "./engine-profile.ts";
import { contextOf, refuse } from "./engine-profile.ts";
import { reads } from "./engine-routes.ts";
import { sendBody } from "./engine-stream.ts";

/** wire §1.2: unloaded, loading, loaded, sleeping; `failed` stays until the next load. */
function statusOf(info: ModelInfo, call: Call): Record<string, unknown> {
  const { name } = info;
  const { residency } = call.host;
  const { slots, sleeping } = call.behaviour;
  // Measured: what one slot has is this, divided.
  const size = contextOf(info, call.behaviour) * slots;
  const awake = sleeping ? "sleeping" : "loaded";
  const idle = residency.isLoading(name) ? "loading" : "unloaded";
  return {
    value: residency.isLoaded(name) ? awake : idle,
    args: `llama-server --alias ${name} --ctx-size ${size} --parallel ${slots}`.split(" "),
    preset: `[${name}]\n`,
    ...(residency.failed.has(name) ? { exit_code: 1, failed: true } : {}),
  };
}

function list(call: Call): unknown {
  const data = call.host.models.map((info) => ({
    id: info.name,
    aliases: [],
    tags: [],
    object: "model",
    owned_by: "llamacpp",
    created: 1_754_049_600,
    status: statusOf(info, call),
    architecture: { input_modalities: ["text"], output_modalities: ["text"] },
    source: "models_dir",
    can_remove: false,
    // Measured: only while it is loaded.
    ...(call.host.residency.isLoaded(info.name) ? { meta: metaOf(info, call) } : {}),
  }));
  return { data, object: "list" };
}

function routerProps({ behaviour }: Call): unknown {
  return {
    role: "router",
    max_instances: behaviour.maxLoaded,
    models_autoload: true,
    model_alias: "llama-server",
    model_path: "none",
    default_generation_settings: { params: null, n_ctx: 0 },
    build_info: "b0-unknown",
  };
}

/** Whether the request may go on to the model's own server: it is loaded for it, unless told not to. */
async function mayPass(call: Call, info: ModelInfo): Promise<boolean> {
  const { residency } = call.host;
  const mayLoad = call.query.get("autoload") !== "false";
  if (mayLoad || residency.isLoaded(info.name)) return true;
  // Measured: one that is loading answers itself.
  await refuse(call, residency.isLoading(info.name) ? "loading" : "notLoaded");
  return false;
}

/** A GET that names a model loads it, and may evict another (wire §1.3, trap 15). */
function passed(body: (info: ModelInfo, call: Call) => unknown, own?: Handler): Handler {
  return async (call) => {
    const name = call.query.get("model") ?? "";
    if (name === "") return own === undefined ? void (await refuse(call, "noModel")) : own(call);
    const info = call.host.find(name);
    if (info === undefined) return void (await refuse(call, "unknownModel", { model: name }));
    if (!(await mayPass(call, info)) || !(await call.host.ensure(call, info))) return;
    const content = body(info, call);
    if (content === null) await refuse(call, "noMetrics");
    else await sendBody(call.reply, 200, content);
  };
}

/** What comes from a model's server comes without length and closes (measured). */
function proxied(handler: Handler): Handler {
  return async (call) => {
    const info = call.host.find(call.model);
    if (info !== undefined && !(await mayPass(call, info))) return;
    if (info !== undefined) {
      call.reply.manner = {
        ...manner,
        headers: { ...manner.headers, "X-Accel-Buffering": "no" },
        closes: "always",
        chunksAll: true,
      };
    }
    await handler(call);
  };
}

const load: Handler = async (call) => {
  const info = call.host.find(call.model);
  // Measured: 404 "File Not Found", not the 400 of unload.
  if (info === undefined) return void (await refuse(call, "noRoute"));
  const { residency } = call.host;
  const isRunning = residency.isLoaded(info.name) || residency.isLoading(info.name);
  if (isRunning) return void (await refuse(call, "alreadyLoaded"));
  // Measured: it never waits for a busy model to go.
  if (!residency.hasRoom(call.behaviour.maxLoaded)) return void (await refuse(call, "noRoom"));
  call.host.preload(call, info);
  await sendBody(call.reply, 200, { success: true });
};

const unload: Handler = async (call) => {
  const info = call.host.find(call.model);
  const { residency } = call.host;
  if (info !== undefined && residency.isLoaded(info.name)) {
    residency.unload(info.name);
    return sendBody(call.reply, 200, { success: true });
  }
  const words = info === undefined ? "model is not found" : "model is not running";
  await sendBody(call.reply, 400, error(400, words, "invalid_request_error").body);
};

const passedPosts = Object.fromEntries(
  Object.entries(posts).map(([path, handler]) => [path, proxied(handler)]),
);

export const router: Profile = {
  ...llamacpp,
  models: ["smol-a", "smol-b"],
  // wire §1.2: --models-max is 4.
  behaviour: { slots: 4, timings: true, contextLength: 4096, maxLoaded: 4 },
  slotsPer: "model",
  // Measured: a load that has begun goes on when its client leaves.
  abortsLoads: false,
  style: {
    ...style,
    // Measured, the model's server killed in mid-stream: these words, no event, then a clean end.
    dies: () => ["proxy error: Failed to read connection"],
  },
  reads: {
    // Its own health says nothing about models (wire §1.1).
    "/health": reads(() => ({ status: "ok" })),
    "/v1/health": reads(() => ({ status: "ok" })),
    "/v1/models": reads(list),
    "/models": reads(list),
    "/props": passed(propsOf, reads(routerProps)),
    "/slots": passed(slotsOf),
    "/metrics": passed(() => null),
  },
  posts: { ...passedPosts, "/models/load": load, "/models/unload": unload },
  control: ["/models/load", "/models/unload"],
  gate: (call) => (call.behaviour.loading ? null : gate(call)),
  refusals: {
    ...refusals,
    noModel: () => error(400, "model name is missing from the request", "invalid_request_error"),
    // real §5.2.
    unknownModel: ({ model }) => error(400, `model '${model}' not found`, "invalid_request_error"),
    notLoaded: () => error(400, "model is not loaded", "invalid_request_error"),
    alreadyLoaded: () => error(400, "model is already running", "invalid_request_error"),
    noRoom: () => error(500, "model limit reached, try again later", "server_error"),
    // wire §1.7.
    loadFailed: ({ model }) => error(500, `model name=${model} failed to load`, "server_error"),
    crashed: () => ({ status: 500, body: "proxy error: Failed to read connection" }),
  },
};
