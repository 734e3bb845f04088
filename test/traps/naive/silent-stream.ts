// Fault: Bun does not finish the response's head before the body's first byte.
import { listen } from "./listen.ts";

listen(
  () => new Response(new ReadableStream(), { headers: { "content-type": "text/event-stream" } }),
);
