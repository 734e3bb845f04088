// Fault: Bun.serve's default idleTimeout of 10 s cuts a stream that is merely waiting for a token.
// (On Bun 1.4.5 a POST whose handler has not answered yet is spared; a GET is cut there too.)
const server = Bun.serve({
  hostname: "127.0.0.1",
  port: 0,
  fetch: async (request) =>
    fetch(process.env["UPSTREAM"] ?? "", {
      method: "POST",
      body: await request.arrayBuffer(),
      keepalive: false,
    }),
});
console.log(`listening ${server.port}`);

export {};
