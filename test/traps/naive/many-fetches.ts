// Fault: Bun sends at most 256 fetches at once per process and queues the rest without a word.
const count = Number(process.argv[2]);
await Promise.all(
  Array.from({ length: count }, () =>
    fetch(process.env["UPSTREAM"] ?? "", { method: "POST", body: "{}", keepalive: false }).then(
      (response) => response.text(),
    ),
  ),
);
console.log(`all ${count} answered`);

export {};
