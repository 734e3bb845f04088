import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { stripVTControlCharacters } from "node:util";
import { parentPort, workerData } from "node:worker_threads";
import type { FileReply } from "./read-file.ts";

/** The file as its format reads it. */
async function read(path: string): Promise<unknown> {
  if (path.endsWith(".ts")) {
    const module = (await import(pathToFileURL(path).href)) as { default?: unknown };
    if (module.default === undefined) throw new Error("it has no export default");
    return module.default;
  }
  const text = (await readFile(path, "utf8")).replace(/^\uFEFF/, "");
  if (path.endsWith(".json")) return parseJson(text);
  const { parse } = await import("yaml");
  // An empty file is a configuration that sets nothing.
  return (parse(text) as unknown) ?? {};
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    // The runtimes quote what stands there, and there may be a key in it.
    throw new Error(wordsOf(error).replace(/"[^]*"/, '"…"'), { cause: error });
  }
}

/** An error in words, without the lines of the file that some of them show: a key may be in these. */
function wordsOf(error: unknown): string {
  // Bun, of a file with several mistakes.
  if (error instanceof AggregateError && error.errors.length > 0) return wordsOf(error.errors[0]);
  if (!(error instanceof Error)) return String(error);
  const [first = "", ...others] = stripVTControlCharacters(error.message).split("\n");
  // Deno says where behind those lines, Bun beside the message.
  const { line } = (error as { position?: { line: number } | null }).position ?? {};
  const where =
    line === undefined ? others.find((each) => /^ +at /.test(each)) : ` at line ${line}`;
  return first.replace(/:$/, "") + (where?.replace(/^ +/, " ") ?? "");
}

function answer(reply: FileReply) {
  parentPort?.postMessage(reply);
}

try {
  const value = await read(workerData as string);
  try {
    // What holds itself could leave the thread, and never be read to its end.
    JSON.stringify(value);
    answer({ value });
  } catch {
    answer({ reason: "it may hold plain data only: no functions, and nothing that holds itself" });
  }
} catch (error) {
  answer({ reason: wordsOf(error) });
}
