// Fault: an error body that is given some time and then forgotten instead of cancelled keeps its
// connection, and the engine's slot behind it, for as long as the engine likes.
import { listen, upstream } from "./listen.ts";

listen(async (request) => {
  const response = await fetch(upstream, {
    method: "POST",
    body: await request.arrayBuffer(),
    keepalive: false,
    headers: { connection: "close" },
  });
  const limit = new Promise<string>((resolve) => setTimeout(resolve, 300, "no words"));
  const words = await Promise.race([response.text(), limit]);
  return new Response(`upstream said ${response.status}: ${words}`, { status: 502 });
});
