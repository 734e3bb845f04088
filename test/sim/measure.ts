import type { Setup } from "./machine.ts";
import type { Trace } from "./world.ts";

/** Of some values: milliseconds, null where there are none. */
export interface Spread {
  mean: number | null;
  p50: number | null;
  p95: number | null;
  max: number | null;
}

/** How some requests fared. Times are milliseconds. */
export interface Fate {
  asked: number;
  served: number;
  refused: number;
  left: number;
  /** Still waiting or running at the end of the run. */
  unserved: number;
  /** From asking to the first token. */
  ttft: Spread;
  /** From asking to having a slot. */
  wait: Spread;
}

/** What a run has cost that it need not have. */
export interface Waste {
  /** Loads beyond one per model. */
  reloads: number;
  /** Answer tokens made for clients that had gone. */
  tokensForGone: number;
  /** Identical deterministic requests that were computed again. */
  duplicates: number;
}

export interface Measured extends Fate {
  loads: number;
  /** From the first request to the last that was served. */
  makespanMs: number;
  servedPerHour: number;
  answerTokens: number;
  /** Of the prompts' tokens those that were in a prefix cache, 0 to 1. */
  cachedShare: number;
  waste: Waste;
  /** By model or flow. */
  groups: Record<string, Fate>;
}

export function spreadOf(values: readonly number[]): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (share: number) => sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] ?? null;
  const sum = sorted.reduce((total, each) => total + each, 0);
  const mean = sorted.length === 0 ? null : sum / sorted.length;
  return { mean, p50: at(0.5), p95: at(0.95), max: at(1) };
}

function fateOf(traces: readonly Trace[]): Fate {
  const count = (ending: Trace["ending"]) => traces.filter((each) => each.ending === ending).length;
  const since = (time: "startedAt" | "firstTokenAt") => {
    return spreadOf(
      traces.flatMap((each) => (each[time] === null ? [] : each[time] - each.askedAt)),
    );
  };
  return {
    asked: traces.length,
    served: count("served"),
    refused: count("refused"),
    left: count("left"),
    unserved: count("unserved"),
    ttft: since("firstTokenAt"),
    wait: since("startedAt"),
  };
}

function sumOf<T>(of: readonly T[], value: (each: T) => number): number {
  return of.reduce((sum, each) => sum + value(each), 0);
}

export function measure(
  traces: readonly Trace[],
  { engines }: Setup,
  groupBy: "model" | "flow" | null,
): Measured {
  const works = engines.map(({ work }) => work);
  const first = Math.min(...traces.map(({ askedAt }) => askedAt));
  const served = traces.filter(({ ending }) => ending === "served");
  const last = Math.max(first, ...served.map(({ endedAt }) => endedAt ?? first));
  const makespanMs = traces.length === 0 ? 0 : last - first;
  const loads = sumOf(works, (work) => work.loads.length);
  const computed = works.flatMap((work) => [...work.computed]);
  const names = new Set(computed.map(([name]) => name));
  const prompts = sumOf(works, (work) => work.promptTokens);
  const groups = Map.groupBy(groupBy === null ? [] : traces, ({ request }) => {
    return request[groupBy as "model" | "flow"];
  });
  return {
    ...fateOf(traces),
    loads,
    makespanMs,
    servedPerHour: makespanMs === 0 ? 0 : (served.length / makespanMs) * 3_600_000,
    answerTokens: sumOf(works, (work) => work.answerTokens),
    cachedShare: prompts === 0 ? 0 : sumOf(works, (work) => work.cachedTokens) / prompts,
    waste: {
      reloads: sumOf(works, (work) => work.loads.length - new Set(work.loads).size),
      tokensForGone: sumOf(works, (work) => work.wastedTokens),
      duplicates: sumOf(computed, ([, times]) => times) - names.size,
    },
    groups: Object.fromEntries([...groups].map(([name, own]) => [name, fateOf(own)])),
  };
}
