/** Where traces go in tests. */
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";

/** Whatever an exporter sends by OTLP over HTTP, as it stands on the wire: names and ids are plain there. */
export async function startSink() {
  let received = "";
  const server = createServer((request, response) => {
    request.setEncoding("latin1").on("data", (text: string) => (received += text));
    request.on("end", () =>
      response.writeHead(200, { "content-type": "application/json" }).end("{}"),
    );
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  return {
    url: `http://127.0.0.1:${port}`,
    has: (text: string) => received.includes(text),
    received: () => received,
    close: () => {
      server.closeAllConnections();
      server.close();
    },
  };
}

export type Sink = Awaited<ReturnType<typeof startSink>>;

export async function withSink(work: (sink: Sink) => Promise<void>): Promise<void> {
  const sink = await startSink();
  try {
    await work(sink);
  } finally {
    sink.close();
  }
}
