// The bare relay: the least that a correct relay written on `fetch` does, and nothing else.
// What the gateway costs beyond it is the gateway's own doing.
// `bun bench/relay.ts --upstream http://127.0.0.1:N --port N`
import { parseArgs } from "node:util";

const { values } = parseArgs({
  options: { upstream: { type: "string", default: "" }, port: { type: "string", default: "0" } },
});

async function relay(request: Request): Promise<Response> {
  const { pathname, search } = new URL(request.url);
  const abort = new AbortController();
  request.signal.addEventListener("abort", () => abort.abort(request.signal.reason));
  const answer = await fetch(values.upstream + pathname + search, {
    method: request.method,
    headers: {
      "content-type": "application/json",
      "accept-encoding": "identity",
      connection: "close",
    },
    body: request.method === "GET" ? null : await request.arrayBuffer(),
    signal: abort.signal,
    redirect: "manual",
    keepalive: false,
    timeout: false,
  } as RequestInit);
  const contentType = answer.headers.get("content-type") ?? "application/octet-stream";
  return new Response(answer.body === null ? null : onePass(answer.body, abort), {
    status: answer.status,
    headers: { "content-type": contentType },
  });
}

/** Every chunk passes through JavaScript once, pulled by the client. */
function onePass(
  body: ReadableStream<Uint8Array>,
  abort: AbortController,
): ReadableStream<Uint8Array> {
  const reader = body.getReader();
  return new ReadableStream<Uint8Array>(
    {
      async pull(controller) {
        const { done, value } = await reader.read();
        if (done) controller.close();
        else controller.enqueue(value);
      },
      async cancel(reason) {
        abort.abort(reason);
        await reader.cancel(reason);
      },
    },
    { highWaterMark: 0 },
  );
}

Bun.serve({ hostname: "127.0.0.1", port: Number(values.port), idleTimeout: 0, fetch: relay });
