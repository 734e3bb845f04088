import type { Endpoint } from "../dialects/dialect.ts";
import { asGatewayError, GatewayError } from "../errors.ts";
import type { Answer } from "../stores/answers.ts";
import { accept } from "./accept.ts";
import { resolveModel } from "./resolve.ts";
import { fly, keepStream, look, type Lookup } from "./cache.ts";
import { refuseTooLong } from "./context.ts";
import { Exchange } from "./exchange.ts";
import { lateFault, totalMsOf } from "./forward.ts";
import { checkOrigin, identify } from "./identify.ts";
import type { Reply } from "./inspect.ts";
import type { Plane } from "./plane.ts";
import { readPrompt, type PeerAddress } from "./prompt.ts";
import { Relay } from "./relay.ts";
import { outputCapOf } from "./reserve.ts";
import { obtain } from "./upstream.ts";

const STREAM_HEADERS = { "cache-control": "no-cache", "x-accel-buffering": "no" };

/** Serves one inference request, from its headers to the end of its body. Never rejects. */
export async function serve(
  request: Request,
  endpoint: Endpoint,
  plane: Plane,
  peer?: PeerAddress,
): Promise<Response> {
  const exchange = new Exchange(plane, endpoint, request);
  request.signal.addEventListener("abort", () => exchange.cancel());
  try {
    if (!plane.admitting) throw shuttingDown();
    plane.retries.count(exchange.receivedAt);
    checkOrigin(exchange.headers, plane.access);
    const tenant = identify(exchange.headers, plane.access);
    exchange.identified(typeof tenant === "string" ? tenant : await tenant);
    exchange.check();
    await accept(exchange, request, plane);
    exchange.check();
    const model = resolveModel(exchange, plane);
    refuseTooLong(exchange, model, plane);
    readPrompt(exchange, model, plane, peer);
    exchange.outputCap = outputCapOf(exchange, model.name);
    const lookup = await look(exchange, model, plane);
    if (lookup.type === "hit") return replay(exchange, lookup.answer);
    return exchange.record.stream
      ? await answerStream(exchange, plane, lookup)
      : await answerWhole(exchange, plane, lookup);
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
function answerStream(exchange: Exchange, plane: Plane, lookup: Lookup): Promise<Response> {
  const relay = new Relay(exchange, plane);
  if (lookup.type === "miss") keepStream(exchange, relay, plane, lookup.key);
  const { heartbeatMs } = exchange.config.queue;
  return new Promise((resolve) => {
    const respond = (contentType: string, cacheControl: string | null) => {
      exchange.record.status = 200;
      const headers: Record<string, string> = {
        ...exchange.explain(),
        ...STREAM_HEADERS,
        "content-type": contentType,
      };
      if (cacheControl !== null) headers["cache-control"] = cacheControl;
      resolve(new Response(relay.readable, { headers }));
    };
    const stop =
      heartbeatMs === 0
        ? () => {}
        : exchange.after(heartbeatMs, () => {
            respond("text/event-stream", null);
            relay.open();
          });
    obtain(exchange, plane)
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

async function answerWhole(exchange: Exchange, plane: Plane, lookup: Lookup): Promise<Response> {
  const totalMs = totalMsOf(exchange);
  if (totalMs < Infinity) {
    const left = Math.max(0, totalMs - (plane.now() - exchange.receivedAt));
    const message = `the answer was not done within ${totalMs} ms (timeouts.totalMs, or the client's own)`;
    exchange.after(left, () =>
      exchange.fail(new GatewayError("upstream_timeout", message), lateFault(exchange)),
    );
  }
  if (lookup.type === "miss") {
    const landed = await fly(exchange, plane, lookup);
    if (landed.type === "answer") return replay(exchange, landed.answer);
    if (landed.type === "reply") return respond(exchange, plane, landed.reply, landed.exchange);
  }
  return respond(exchange, plane, await obtain(exchange, plane), exchange);
}

/** @param worker whose answer it is: the exchange itself, or that of its flight. */
function respond(exchange: Exchange, plane: Plane, reply: Reply, worker: Exchange): Response {
  exchange.record.status = 200;
  const headers: Record<string, string> = {
    ...exchange.explain(),
    "content-type": reply.contentType,
  };
  if (reply.cacheControl !== null) headers["cache-control"] = reply.cacheControl;
  exchange.dropBody();
  if (reply.more) {
    const relay = new Relay(worker, plane);
    relay.relay(reply);
    return new Response(relay.readable, { headers });
  }
  exchange.complete();
  return new Response(reply.head as Uint8Array<ArrayBuffer>, { headers });
}

/** An answer that was made before, or for several at once. */
function replay(exchange: Exchange, { contentType, cacheControl, body }: Answer): Response {
  exchange.record.status = 200;
  exchange.dropBody();
  const headers: Record<string, string> = { ...exchange.explain(), "content-type": contentType };
  if (exchange.record.stream) Object.assign(headers, STREAM_HEADERS);
  if (cacheControl !== null) headers["cache-control"] = cacheControl;
  exchange.complete();
  return new Response(body as Uint8Array<ArrayBuffer>, { headers });
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
