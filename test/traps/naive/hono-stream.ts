// Fault: Hono's stream helpers close the answer in `finally`: a crash of the engine looks like an end.
import { Hono } from "hono";
import { stream, streamSSE } from "hono/streaming";
import { listen, upstream } from "./listen.ts";

const app = new Hono();
app.post("*", async (context) => {
  const response = await fetch(upstream, { method: "POST", body: await context.req.arrayBuffer() });
  const body = response.body ?? new ReadableStream<Uint8Array>();
  context.header("content-type", "text/event-stream");
  return process.argv[2] === "streamSSE"
    ? streamSSE(context, async (out) => {
        const reader = body.getReader();
        for (;;) {
          const part = await reader.read();
          if (part.done) return;
          await out.write(part.value);
        }
      })
    : stream(context, (out) => out.pipe(body));
});
listen((request) => app.fetch(request));
