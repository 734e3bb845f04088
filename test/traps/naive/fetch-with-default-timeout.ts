// Fault: without `timeout: false` Bun's fetch gives up after five to six minutes of silence.
try {
  const response = await fetch(process.env["UPSTREAM"] ?? "", { method: "POST", body: "{}" });
  console.log(`answered ${response.status}`);
} catch (error) {
  console.log(`gave up: ${error instanceof Error ? error.name : String(error)}`);
}

export {};
