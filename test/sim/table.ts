import type { Fate, Measured } from "./measure.ts";

/** Rows of text in columns; the first is left-aligned, the others are numbers. */
function columns(rows: readonly (readonly string[])[]): string {
  const widths: number[] = [];
  for (const row of rows) {
    for (const [at, cell] of row.entries()) widths[at] = Math.max(widths[at] ?? 0, cell.length);
  }
  const lines = rows.map((row) => {
    const cells = row.map((cell, at) => {
      const width = widths[at] ?? 0;
      return at === 0 ? cell.padEnd(width) : cell.padStart(width);
    });
    return cells.join("  ").trimEnd();
  });
  return lines.join("\n");
}

const HEAD = [
  "",
  "asked",
  "served",
  "refused",
  "left",
  "unserved",
  "ttft mean",
  "p50",
  "p95",
  "max",
  "wait mean",
  "per hour",
  "all in",
  "loads",
  "reloads",
  "gone",
  "twice",
  "cached",
];

/** Under the table. */
export const LEGEND = `Seconds, counted from the request; "unserved" still waited at the end of the run. "per hour" is what was
served in the time from the first request to the last one served ("all in"). Waste: "reloads", loads beyond
one per model; "gone", answer tokens for clients that had gone; "twice", identical deterministic requests
computed again. "cached" is the share of the prompts' tokens that was in a prefix cache.`;

/** Milliseconds as seconds. */
function seconds(ms: number | null): string {
  if (ms === null) return "-";
  return (ms / 1000).toFixed(ms < 9950 ? 2 : ms < 99_500 ? 1 : 0);
}

function fateCells({ asked, served, refused, left, unserved, ttft, wait }: Fate): string[] {
  return [
    ...[asked, served, refused, left, unserved].map(String),
    ...[ttft.mean, ttft.p50, ttft.p95, ttft.max, wait.mean].map(seconds),
  ];
}

/** Policies one below the other, and the models or flows of each below it. */
export function tableOf(results: Readonly<Record<string, Measured>>): string {
  const rows = Object.entries(results).flatMap(([name, measured]) => {
    const { servedPerHour, makespanMs, loads, cachedShare, waste, groups } = measured;
    const all = [
      name,
      ...fateCells(measured),
      servedPerHour.toFixed(0),
      seconds(makespanMs),
      String(loads),
      String(waste.reloads),
      waste.tokensForGone.toFixed(0),
      String(waste.duplicates),
      `${(100 * cachedShare).toFixed(0)} %`,
    ];
    return [
      all,
      ...Object.entries(groups).map(([each, fate]) => [`  ${each}`, ...fateCells(fate)]),
    ];
  });
  return columns([HEAD, ...rows]);
}
