// Fault: Deno.serve aborts request.signal after every answer, so a signal is no proof of a client
// that left.
Deno.serve({ hostname: "127.0.0.1", port: 0, onListen }, async (request) => {
  await request.arrayBuffer();
  request.signal.addEventListener("abort", () => console.log("ending: cancelled"));
  return new Response("whole answer");
});

function onListen({ port }: { port: number }): void {
  console.log(`listening ${port}`);
}

export {};
