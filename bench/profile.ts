// Reads a `.cpuprofile` (V8's format, which Bun writes too) into self time per function. Samples are
// counted, not their time deltas: Bun samples only while JavaScript runs, and books an idle wait on
// the sample behind it. System calls and Bun's own native threads are in no sample.
import { readdirSync, readFileSync } from "node:fs";
import { join, relative } from "node:path";

interface CpuProfile {
  nodes: readonly {
    id: number;
    callFrame: { functionName: string; url: string; lineNumber: number };
  }[];
  samples: readonly number[];
}

export interface SelfTime {
  where: string;
  samples: number;
  share: number;
}

export interface ProfileSummary {
  samples: number;
  functions: SelfTime[];
  files: SelfTime[];
}

/** The profile that a process has left in this folder. */
export function readProfile(folder: string): ProfileSummary {
  const name = readdirSync(folder).find((entry) => entry.endsWith(".cpuprofile"));
  if (name === undefined) throw new Error(`no .cpuprofile in ${folder}`);
  const profile: CpuProfile = JSON.parse(readFileSync(join(folder, name), "utf8"));
  const nodes = new Map(profile.nodes.map((node) => [node.id, node]));
  const functions = new Map<string, number>();
  const files = new Map<string, number>();
  let total = 0;
  for (const id of profile.samples) {
    const node = nodes.get(id);
    if (node === undefined || isIdle(node.callFrame.functionName)) continue;
    const { functionName, url, lineNumber } = node.callFrame;
    const file = shorten(url);
    const place = file === "" ? "native" : `${file}:${lineNumber + 1}`;
    total++;
    count(functions, `${functionName || "(anonymous)"}  ${place}`);
    count(files, file === "" ? "native or engine-internal" : file);
  }
  return { samples: total, functions: ranked(functions, total), files: ranked(files, total) };
}

export function printProfile({ samples, functions, files }: ProfileSummary): string {
  const lines = (rows: readonly SelfTime[]): string =>
    rows
      .map(({ share, where }) => `${(100 * share).toFixed(1).padStart(5)} %  ${where}`)
      .join("\n");
  return [
    `${samples} samples\n`,
    `self time by function\n${lines(functions.slice(0, 40))}\n`,
    `by file\n${lines(files.slice(0, 25))}`,
  ].join("\n");
}

function isIdle(functionName: string): boolean {
  return functionName === "(idle)" || functionName === "(root)";
}

function count(sums: Map<string, number>, key: string): void {
  sums.set(key, (sums.get(key) ?? 0) + 1);
}

function ranked(sums: Map<string, number>, total: number): SelfTime[] {
  return [...sums]
    .map(([where, samples]) => ({ where, samples, share: samples / total }))
    .sort((a, b) => b.samples - a.samples);
}

function shorten(url: string): string {
  const path = url.replace(/^file:\/\//, "");
  const root = join(import.meta.dirname, "..");
  return path.startsWith(root) ? relative(root, path) : path;
}
