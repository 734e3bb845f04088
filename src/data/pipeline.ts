import type { Endpoint } from "../dialects/dialect.ts";
import { asGatewayError, GatewayError } from "../errors.ts";
import type { Permit } from "../fleet/fleet.ts";
import { accept } from "./accept.ts";
import { admit, deadlineOf, resolveModel } from "./admit.ts";
import { Exchange } from "./exchange.ts";
import { AttemptFailed, UpstreamAttempt } from "./attempt.ts";
import { forward, totalMsOf } from "./forward.ts";
import type { Reply } from "./inspect.ts";
import { checkOrigin, identify } from "./identify.ts";
import type { Plane } from "./plane.ts";
import { Relay } from "./relay.ts";

/** Attempts per request: the first, and one more elsewhere. */
const MOST_ATTEMPTS = 2;

/** Serves one inference request, from its headers to the end of its body. Never rejects. */
export async function serve(request: Request, endpoint: Endpoint, plane: Plane): Promise<Response> {
  const exchange = new Exchange(plane, endpoint, request);
  request.signal.addEventListener("abort", () => exchange.cancel());
  try {
    if (!plane.admitting) throw shuttingDown();
    plane.retries.count(exchange.receivedAt);
    checkOrigin(exchange.headers, plane.access);
    exchange.record.tenant = identify(exchange.headers, plane.access);
    await accept(exchange, request, plane);
    exchange.check();
    resolveModel(exchange, plane);
    return exchange.record.stream
      ? await answerStream(exchange, plane)
      : await answerWhole(exchange, plane);
  } catch (error) {
    return refuse(exchange, error);
  }
}

/** What a request gets that comes, or still runs, when the gateway stops. */
export function shuttingDown(): GatewayError {
  return new GatewayError("shutting_down", "the gateway is shutting down, try again", {
    retryAfterMs: 1000,
  });
}

/** Until the answer begins its status is open; a long wait opens it with a heartbeat instead. */
function answerStream(exchange: Exchange, plane: Plane): Promise<Response> {
  const relay = new Relay(exchange, plane);
  const { heartbeatMs } = exchange.config.queue;
  return new Promise((resolve) => {
    const respond = (contentType: string, cacheControl: string | null) => {
      exchange.record.status = 200;
      const headers = {
        ...exchange.explain(),
        "content-type": contentType,
        "cache-control": cacheControl ?? "no-cache",
        "x-accel-buffering": "no",
      };
      resolve(new Response(relay.readable, { headers }));
    };
    const stop =
      heartbeatMs === 0
        ? () => {}
        : exchange.after(heartbeatMs, () => {
            respond("text/event-stream", null);
            relay.open();
          });
    attempts(exchange, plane)
      .then((reply) => {
        stop();
        if (exchange.opened) relay.explain(exchange.explain());
        else respond(reply.contentType, reply.cacheControl);
        exchange.dropBody();
        relay.relay(reply);
      })
      // An opened answer has its error in the stream already; nobody reads this response then.
      .catch((error: unknown) => resolve(refuse(exchange, error)));
  });
}

async function answerWhole(exchange: Exchange, plane: Plane): Promise<Response> {
  const totalMs = totalMsOf(exchange);
  if (totalMs < Infinity) {
    const left = Math.max(0, totalMs - (plane.now() - exchange.receivedAt));
    const message = `the answer was not done within ${totalMs} ms (timeouts.totalMs, or the client's own)`;
    exchange.after(left, () =>
      exchange.fail(new GatewayError("upstream_timeout", message), "timeout"),
    );
  }
  const reply = await attempts(exchange, plane);
  exchange.record.status = 200;
  const headers: Record<string, string> = {
    ...exchange.explain(),
    "content-type": reply.contentType,
  };
  if (reply.cacheControl !== null) headers["cache-control"] = reply.cacheControl;
  exchange.dropBody();
  if (reply.more) {
    const relay = new Relay(exchange, plane);
    relay.relay(reply);
    return new Response(relay.readable, { headers });
  }
  exchange.complete();
  return new Response(reply.head as Uint8Array<ArrayBuffer>, { headers });
}

/** Admit and forward, and once more elsewhere where the first attempt allows it. */
async function attempts(exchange: Exchange, plane: Plane): Promise<Reply> {
  const tried = new Set<string>();
  const busy = new Set<string>();
  let failed: AttemptFailed | null = null;
  let last = "";
  for (;;) {
    const permit = await admit(exchange, plane, {
      tried,
      busy,
      // An engine that was busy is waited for as any other; a failure's second attempt not always.
      mayWait: () =>
        plane.now() < deadlineOf(exchange) && (tried.size === 0 || plane.retries.take(plane.now())),
    }).catch((error: unknown) => {
      // Nowhere else to go: the client learns what the engine said.
      throw failed !== null && !exchange.ended ? failed.error : error;
    });
    if (failed !== null) countRetry(exchange, plane, last, failed.error.cause);
    const attempt = begin(exchange, plane, permit);
    try {
      const reply = await forward(exchange, attempt, plane);
      permit.proved();
      return reply;
    } catch (error) {
      if (!(error instanceof AttemptFailed)) throw error;
      failed = error;
      attempt.end(failed.verdict, failed.error.cause);
      last = permit.target.backend;
      (failed.fault === "busy" ? busy : tried).add(last);
      if (failed.verdict.retry === "no" || tried.size >= MOST_ATTEMPTS) throw failed.error;
      exchange.phase = "retrying";
      exchange.timing.retry = (exchange.timing.retry ?? 0) + plane.now() - attempt.sentAt;
    }
  }
}

/** @param backend the one that failed. */
function countRetry(exchange: Exchange, plane: Plane, backend: string, cause: string) {
  exchange.trace.event("retry", { backend_id: backend, cause });
  plane.metrics?.retry(backend, cause);
}

function begin(exchange: Exchange, plane: Plane, permit: Permit): UpstreamAttempt {
  const { record, view, endpoint } = exchange;
  record.attempts++;
  const trace = exchange.trace.attempt({
    number: record.attempts,
    operation: endpoint.operation,
    model: record.model ?? "",
    upstreamModel: permit.target.model,
    kind: permit.engine.kind,
    backend: permit.target.backend,
    url: permit.connection.url,
    stream: record.stream,
    sampling: view?.sampling ?? {},
    retryCount: exchange.headers.get("x-stainless-retry-count"),
  });
  const attempt = new UpstreamAttempt(plane, permit, trace);
  exchange.attempt = attempt;
  exchange.phase = "connecting";
  return attempt;
}

/** The error as the caller's API words it, and the end of the exchange. */
function refuse(exchange: Exchange, thrown: unknown): Response {
  const error = exchange.error ?? asGatewayError(thrown);
  exchange.fail(error);
  const { dialect } = exchange;
  return Response.json(dialect.errorBody(error, exchange.id), {
    status: error.status,
    headers: { ...exchange.explain(), ...error.headers() },
  });
}
