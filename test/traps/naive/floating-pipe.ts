// Fault: a pipeTo whose promise nobody holds turns an engine's reset into the end of the process.
import { listen, upstream } from "./listen.ts";

listen(async (request) => {
  const response = await fetch(upstream, { method: "POST", body: await request.arrayBuffer() });
  const relay = new TransformStream<Uint8Array, Uint8Array>();
  void response.body?.pipeTo(relay.writable);
  return new Response(relay.readable, { headers: { "content-type": "text/event-stream" } });
});
