// Fault: on a reused connection that dies before the headers, Deno's fetch sends the POST again.
const upstream = process.env["UPSTREAM"] ?? "";
await (await fetch(upstream, { method: "POST", body: "warm" })).text();
try {
  const response = await fetch(upstream, { method: "POST", body: "die" });
  console.log(`answered ${response.status}`);
} catch {
  console.log("failed");
}

export {};
