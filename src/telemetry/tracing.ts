import type { Attributes, Context, Span, TextMapGetter, Tracer } from "@opentelemetry/api";
import type { Config } from "../config.ts";
import type { AnswerFacts, View } from "../dialects/dialect.ts";
import type { RequestRecord } from "./record.ts";

const headersGetter: TextMapGetter<Headers> = {
  get: (headers, name) => headers.get(name) ?? undefined,
  keys: (headers) => [...headers.keys()],
};

/** What is known of an attempt when its span begins: samplers see these. */
export interface AttemptStart {
  number: number;
  operation: string;
  model: string;
  upstreamModel: string;
  kind: string;
  backend: string;
  /** The backend's URL. */
  url: string;
  stream: boolean;
  sampling: View["sampling"];
  retryCount: string | null;
}

export interface AttemptTrace {
  /** Headers that continue the trace in the engine. */
  headers: Record<string, string>;
  end(facts: AnswerFacts, firstChunkMs: number | null, cause: string | null): void;
}

export interface RequestTrace {
  traceId: string | null;
  attempt(start: AttemptStart): AttemptTrace;
  /** Waiting has begun; call the result when it is over. */
  queue(position: number, reason: string, etaMs: number): () => void;
  /** A load that it has waited for, while it did; Unix milliseconds. */
  load(model: string, backend: string, from: number, to: number): void;
  event(name: string, attributes?: Attributes): void;
  end(record: RequestRecord): void;
}

export interface Tracing {
  request(method: string, route: string, headers: Headers): RequestTrace;
  /** Exports what is left, for at most three seconds. */
  stop(): Promise<void>;
}

const TRACEPARENT = /^00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$/;

/** No exporter: no spans, but a client's trace still reaches the engine and the log. */
export const untraced: Tracing = {
  request(_method, _route, headers) {
    const traceparent = headers.get("traceparent") ?? "";
    const [, traceId = null] = TRACEPARENT.exec(traceparent) ?? [];
    const passed: Record<string, string> = {};
    if (traceId !== null) {
      passed["traceparent"] = traceparent;
      const tracestate = headers.get("tracestate");
      if (tracestate !== null) passed["tracestate"] = tracestate;
    }
    return {
      traceId,
      attempt: () => ({ headers: passed, end: () => {} }),
      queue: () => () => {},
      load: () => {},
      event: () => {},
      end: () => {},
    };
  },
  stop: () => Promise.resolve(),
};

/** Is there anywhere to export to? */
export function tracingWanted(
  config: Config["telemetry"],
  environment: Readonly<Record<string, string | undefined>>,
): boolean {
  if (environment["OTEL_SDK_DISABLED"] === "true") return false;
  const exporter = environment["OTEL_TRACES_EXPORTER"];
  return (
    config.otlpEndpoint !== undefined ||
    environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] !== undefined ||
    environment["OTEL_DENO"] === "true" ||
    (exporter !== undefined && exporter !== "none")
  );
}

/**
 * Loads the SDK and starts exporting. To be called once the server listens: the import alone takes
 * a few hundred milliseconds.
 *
 * @param environment the process's own: the SDK reads its settings there and nowhere else.
 */
export async function startTracing(
  config: Config["telemetry"],
  environment: Record<string, string | undefined>,
): Promise<Tracing> {
  const api = await import("@opentelemetry/api");
  let shutdown = () => Promise.resolve();
  // Deno registers a provider of its own, after which the SDK's is ignored without a word.
  if (environment["OTEL_DENO"] !== "true") {
    const { NodeSDK } = await import("@opentelemetry/sdk-node");
    // After a reload the earlier SDK's provider is in the way.
    api.trace.disable();
    api.propagation.disable();
    api.context.disable();
    const restore = lend(environment, sdkVariables(config, environment));
    const sdk = new NodeSDK({
      serviceName: config.serviceName,
      autoDetectResources: false,
      instrumentations: [],
      metricReaders: [],
      logRecordProcessors: [],
    });
    sdk.start();
    restore();
    shutdown = () => sdk.shutdown();
  }
  const tracer = api.trace.getTracer("tidegate");
  return {
    request: (method, route, headers) => traceRequest(api, tracer, method, route, headers),
    async stop() {
      let timer;
      const limit = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, 3000);
      });
      await Promise.race([shutdown().catch(() => {}), limit]);
      clearTimeout(timer);
    },
  };
}

/** What the SDK is told beside what the environment says itself. */
function sdkVariables(
  { otlpEndpoint, sampling }: Config["telemetry"],
  environment: Readonly<Record<string, string | undefined>>,
): Record<string, string> {
  const sampler =
    environment["OTEL_TRACES_SAMPLER"] === undefined
      ? {
          OTEL_TRACES_SAMPLER: "parentbased_traceidratio",
          OTEL_TRACES_SAMPLER_ARG: String(sampling),
        }
      : {};
  return {
    ...(otlpEndpoint === undefined ? {} : { OTEL_EXPORTER_OTLP_ENDPOINT: otlpEndpoint }),
    OTEL_TRACES_EXPORTER: environment["OTEL_TRACES_EXPORTER"] ?? "otlp",
    OTEL_METRICS_EXPORTER: environment["OTEL_METRICS_EXPORTER"] ?? "none",
    OTEL_LOGS_EXPORTER: environment["OTEL_LOGS_EXPORTER"] ?? "none",
    OTEL_PROPAGATORS: environment["OTEL_PROPAGATORS"] ?? "tracecontext",
    ...sampler,
  };
}

/**
 * Sets variables for as long as the SDK reads them: a later start must not take them for the user's.
 * @returns puts back what was there.
 */
function lend(
  environment: Record<string, string | undefined>,
  variables: Record<string, string>,
): () => void {
  const before = Object.keys(variables).map((name) => [name, environment[name]] as const);
  Object.assign(environment, variables);
  return () => {
    for (const [name, value] of before) {
      if (value === undefined) delete environment[name];
      else environment[name] = value;
    }
  };
}

type Api = typeof import("@opentelemetry/api");

function traceRequest(
  api: Api,
  tracer: Tracer,
  method: string,
  route: string,
  headers: Headers,
): RequestTrace {
  const parent = api.propagation.extract(api.ROOT_CONTEXT, headers, headersGetter);
  const span = tracer.startSpan(
    `${method} ${route}`,
    {
      kind: api.SpanKind.SERVER,
      attributes: { "http.request.method": method, "http.route": route },
    },
    parent,
  );
  const context = api.trace.setSpan(parent, span);
  return {
    traceId: span.spanContext().traceId,
    attempt: (start) => traceAttempt(api, tracer, context, start),
    queue(position, reason, etaMs) {
      const attributes = {
        "tidegate.queue.position": position,
        "tidegate.queue.reason": reason,
        "tidegate.queue.eta_ms": etaMs,
      };
      const queue = tracer.startSpan("queue", { attributes }, context);
      return () => queue.end();
    },
    load(model, backend, from, to) {
      const attributes = { "gen_ai.request.model": model, "tidegate.backend_id": backend };
      tracer.startSpan("load", { attributes, startTime: from }, context).end(to);
    },
    event: (name, attributes) => void span.addEvent(name, attributes),
    end(record) {
      if (span.isRecording()) {
        span.setAttributes(requestAttributes(record));
        if (record.ending === "failed") fail(api, span, record.cause);
      }
      span.end();
    },
  };
}

function fail(api: Api, span: Span, cause: string | null) {
  span.setAttribute("error.type", cause ?? "_OTHER");
  span.setStatus({ code: api.SpanStatusCode.ERROR });
}

function requestAttributes(record: RequestRecord): Attributes {
  return {
    "http.response.status_code": record.status,
    model: record.model ?? undefined,
    backend_id: record.backend_id ?? undefined,
    cache_hit: record.cache_hit,
    ttft: record.ttft ?? undefined,
    tokens_generated: record.tokens_generated ?? undefined,
    latency_ms: record.latency_ms,
    status: record.status,
    "tidegate.request_id": record.request_id,
    "tidegate.tenant": record.tenant ?? undefined,
    "tidegate.reason": record.reason ?? undefined,
    "tidegate.cache": record.cache,
    "tidegate.ending": record.ending,
  };
}

function attemptAttributes(start: AttemptStart): Attributes {
  const { hostname = "", port = "", protocol = "" } = URL.parse(start.url) ?? {};
  const { maxTokens, temperature, topP, seed } = start.sampling;
  return {
    "gen_ai.operation.name": start.operation,
    "gen_ai.provider.name": start.kind,
    "gen_ai.request.model": start.model,
    "gen_ai.request.stream": start.stream ? true : undefined,
    "gen_ai.request.max_tokens": maxTokens,
    "gen_ai.request.temperature": temperature,
    "gen_ai.request.top_p": topP,
    "gen_ai.request.seed": seed,
    "server.address": hostname === "" ? undefined : hostname,
    "server.port": hostname === "" ? undefined : Number(port || (protocol === "https:" ? 443 : 80)),
    "tidegate.backend_id": start.backend,
    "tidegate.attempt": start.number,
    "tidegate.retry": start.retryCount === null ? undefined : Number(start.retryCount),
    "tidegate.upstream_model":
      start.upstreamModel === start.model ? undefined : start.upstreamModel,
  };
}

function traceAttempt(
  api: Api,
  tracer: Tracer,
  parent: Context,
  start: AttemptStart,
): AttemptTrace {
  const name = `${start.operation} ${start.model}`;
  const attributes = attemptAttributes(start);
  const span = tracer.startSpan(name, { kind: api.SpanKind.CLIENT, attributes }, parent);
  const headers: Record<string, string> = {};
  api.propagation.inject(api.trace.setSpan(parent, span), headers);
  return {
    headers,
    end(facts, firstChunkMs, cause) {
      if (span.isRecording()) {
        const { id, model, finishReasons, usage } = facts;
        span.setAttributes({
          "gen_ai.response.id": id ?? undefined,
          "gen_ai.response.model": model ?? undefined,
          "gen_ai.response.finish_reasons": finishReasons.length > 0 ? finishReasons : undefined,
          "gen_ai.response.time_to_first_chunk":
            firstChunkMs === null ? undefined : firstChunkMs / 1000,
          "gen_ai.usage.input_tokens": usage?.input,
          "gen_ai.usage.output_tokens": usage?.output,
          "gen_ai.usage.cache_read.input_tokens": usage?.cached ?? undefined,
        });
        if (cause !== null) fail(api, span, cause);
      }
      span.end();
    },
  };
}
