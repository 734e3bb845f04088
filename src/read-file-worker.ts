import { readFile } from "node:fs/promises";
import { parentPort, workerData } from "node:worker_threads";
import type { FileReply } from "./read-file.ts";

/** The file as plain data. */
async function read(path: string): Promise<unknown> {
  if (path.endsWith(".ts")) {
    const module = (await import(path)) as { default?: unknown };
    if (module.default === undefined) throw new Error("it has no export default");
    return module.default;
  }
  const text = (await readFile(path, "utf8")).replace(/^\uFEFF/, "");
  if (path.endsWith(".json")) return JSON.parse(text);
  const { parse } = await import("yaml");
  // An empty file is a configuration that sets nothing.
  return (parse(text) as unknown) ?? {};
}

function answer(reply: FileReply) {
  parentPort?.postMessage(reply);
}

try {
  answer({ value: await read(workerData as string) });
} catch (error) {
  const reason = error instanceof Error ? error.message : String(error);
  const isNoData = error instanceof DOMException && error.name === "DataCloneError";
  answer({ reason: isNoData ? "it may hold plain data only, no functions" : reason });
}
