import { existsSync } from "node:fs";
import { Worker } from "node:worker_threads";

/** A file that loops, or waits for something, must not keep the gateway from starting. */
const READ_MS = 10_000;

/** What the worker answers. */
export type FileReply = { value: unknown } | { reason: string };

/**
 * Reads a configuration file into plain data, in a worker: a TypeScript file then sees the edits of
 * what it imports as well, and can neither hold up requests nor leave anything behind.
 *
 * @param limitMs how long it may take.
 * @throws Error with the reason in words
 */
export async function readConfigFile(path: string, limitMs = READ_MS): Promise<unknown> {
  if (!/\.(?:ts|json|ya?ml)$/.test(path)) {
    throw new Error("its name has to end in .ts, .json or .yaml");
  }
  if (!existsSync(path)) throw new Error("there is none");
  const worker = new Worker(new URL("./read-file-worker.ts", import.meta.url), {
    workerData: path,
  });
  const { promise, resolve, reject } = Promise.withResolvers<FileReply>();
  const timer = setTimeout(() => reject(new Error(`it took longer than ${limitMs} ms`)), limitMs);
  worker.on("message", resolve);
  worker.on("error", reject);
  worker.on("exit", () => reject(new Error("it ended the thread that read it")));
  try {
    const reply = await promise;
    if ("reason" in reply) throw new Error(reply.reason);
    return reply.value;
  } finally {
    clearTimeout(timer);
    await worker.terminate();
  }
}
