/** Preloaded into the gateway's process: collects garbage all the time, so that what is not held is lost. */
import process from "node:process";

const INTERVAL_MS = 50;

const collect =
  process.versions.bun === undefined
    ? (globalThis as unknown as { gc?: () => void }).gc
    : () => Bun.gc(true);

if (collect === undefined) throw new Error("No gc(): start Deno with --v8-flags=--expose-gc");
setInterval(collect, INTERVAL_MS).unref();
process.stderr.write(`gc: every ${INTERVAL_MS} ms\n`);
