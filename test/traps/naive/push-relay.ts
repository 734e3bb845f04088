// Fault: a stream that enqueues whatever arrives, or a tee with an eager reader, has no backpressure:
// the gateway swallows the engine's whole output for a client that does not read.
import { listen, upstream } from "./listen.ts";

listen(async (request) => {
  const response = await fetch(upstream, { method: "POST", body: await request.arrayBuffer() });
  const source = response.body ?? new ReadableStream<Uint8Array>();
  if (process.argv[2] === "tee") {
    const [forClient, forMeter] = source.tee();
    void forMeter.pipeTo(new WritableStream()).catch(() => {});
    return new Response(forClient);
  }
  return new Response(
    new ReadableStream({
      async start(controller) {
        for await (const part of source) controller.enqueue(part);
        controller.close();
      },
    }),
  );
});
