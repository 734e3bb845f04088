/** Serves a handler with the runtime's own server, for variants whose fault is not the server's. */
export function listen(fetch: (request: Request) => Response | Promise<Response>): void {
  if ("Bun" in globalThis) {
    announce(Bun.serve({ hostname: "127.0.0.1", port: 0, idleTimeout: 0, fetch }));
  } else {
    Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: announce }, fetch);
  }
}

function announce({ port }: { port?: number | undefined }): void {
  console.log(`listening ${port}`);
}

export const upstream = process.env["UPSTREAM"] ?? "";
