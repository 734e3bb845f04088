// Fault: Deno forgets the abort link of a fetch once its Response is collected, though the body is
// still being read: `abort()` then does nothing and the engine goes on generating.
const controller = new AbortController();

async function startReading(): Promise<void> {
  const response = await fetch(process.env["UPSTREAM"] ?? "", {
    method: "POST",
    body: "{}",
    signal: controller.signal,
  });
  const reader = response.body?.getReader();
  void (async () => {
    for (;;) {
      const part = await reader?.read();
      if (part === undefined || part.done) return;
    }
  })().catch(() => {});
}

await startReading();
setInterval(() => (globalThis as { gc?: () => void }).gc?.(), 20);
setTimeout(() => {
  controller.abort();
  console.log("aborted");
}, 500);

export {};
