// Fault: Deno.serve does not tell a POST's handler that its client left before the response.
Deno.serve({ hostname: "127.0.0.1", port: 0, onListen }, async (request) => {
  const body = await request.arrayBuffer();
  request.signal.addEventListener("abort", () => console.log("signal fired"));
  return fetch(process.env["UPSTREAM"] ?? "", { method: "POST", body, signal: request.signal });
});

function onListen({ port }: { port: number }): void {
  console.log(`listening ${port}`);
}

export {};
