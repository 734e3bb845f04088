import { isRecord } from "../../src/core/is-record.ts";
import type { Box } from "./machine.ts";
import { spreadOf } from "./measure.ts";
import type { Scenario } from "./scenarios.ts";
import type { Request } from "./service.ts";

/** One line of a request log, as far as it is of use here. Times are milliseconds. */
interface Entry {
  arrivedAt: number;
  model: string;
  flow: string;
  promptTokens: number;
  answerTokens: number | null;
  latencyMs: number;
  ttftMs: number | null;
  queueMs: number;
  loadMs: number;
  ending: "completed" | "cancelled" | "failed";
}

/** A request log as a workload, on a machine guessed from it. */
export interface Replay {
  scenario: Scenario;
  /** What was left out or assumed, in words for people. */
  notes: string[];
}

/** What is known of the machine; what is left out is taken from the log. */
export interface MachineHints {
  /** Models in memory at once. */
  fits: number;
  slots: number;
  loadMs: number | null;
}

/** Where a log tells nothing. */
const USUAL = { promptMs: 1, tokenMs: 20, loadMs: 6000, answerTokens: 200 };
/** After the last request. */
const GRACE_MS = 3_600_000;

function numberIn(line: Record<string, unknown>, name: string): number | null {
  const value = line[name];
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : null;
}

function textIn(line: Record<string, unknown>, name: string): string | null {
  const value = line[name];
  return typeof value === "string" && value !== "" ? value : null;
}

/** Why a line is no request that an engine would have to do; else the request. */
function entryOf(line: Record<string, unknown>): Entry | string {
  if (line["msg"] !== "request") return "other log lines";
  if (line["cache_hit"] === true) return "answered from the cache";
  const model = textIn(line, "model");
  const latencyMs = numberIn(line, "latency_ms");
  const time = line["time"];
  const endedAt = typeof time === "number" ? time : Date.parse(String(time));
  if (model === null) return "without a model";
  if (latencyMs === null || Number.isNaN(endedAt)) return "without a time";
  const ending = line["ending"];
  return {
    arrivedAt: endedAt - latencyMs,
    model,
    flow: textIn(line, "tenant") ?? "default",
    promptTokens: numberIn(line, "tokens_input") ?? 0,
    answerTokens: numberIn(line, "tokens_generated"),
    latencyMs,
    ttftMs: line["stream"] === true ? numberIn(line, "ttft") : null,
    queueMs: numberIn(line, "queue_ms") ?? 0,
    loadMs: numberIn(line, "load_ms") ?? 0,
    ending: ending === "cancelled" || ending === "failed" ? ending : "completed",
  };
}

function parse(text: string): Record<string, unknown> | null {
  try {
    const value: unknown = JSON.parse(text);
    return isRecord(value) ? value : null;
  } catch {
    return null;
  }
}

function medianOf(values: readonly number[]): number | null {
  return spreadOf(values).p50;
}

/** Per token, from streams that tell when their first token came. */
function speedOf(entries: readonly Entry[]): { promptMs: number | null; tokenMs: number | null } {
  const streams = entries.filter(({ ending, ttftMs }) => ending === "completed" && ttftMs !== null);
  const tokenMs = streams.flatMap(({ latencyMs, ttftMs, answerTokens }) => {
    return (answerTokens ?? 0) > 1 ? [(latencyMs - (ttftMs ?? 0)) / (answerTokens ?? 1)] : [];
  });
  const promptMs = streams.flatMap(({ ttftMs, queueMs, promptTokens }) => {
    return promptTokens > 0 ? [Math.max(0, (ttftMs ?? 0) - queueMs) / promptTokens] : [];
  });
  return { promptMs: medianOf(promptMs), tokenMs: medianOf(tokenMs) };
}

/** How long answers are, for requests whose own was never seen to its end. */
function usualAnswers(entries: readonly Entry[]): (model: string) => number {
  const whole = entries.filter(({ ending }) => ending === "completed");
  const byModel = Map.groupBy(whole, ({ model }) => model);
  return (model) => {
    const own = byModel.get(model) ?? [];
    return medianOf(own.flatMap(({ answerTokens }) => answerTokens ?? [])) ?? USUAL.answerTokens;
  };
}

function requestOf(entry: Entry, at: number, usual: (model: string) => number): Request {
  const { model, flow, promptTokens, ending, latencyMs } = entry;
  const seen = entry.answerTokens ?? 0;
  return {
    model,
    flow,
    priority: "default",
    prompt: [{ id: `line ${at}`, tokens: promptTokens }],
    answerTokens: ending === "completed" ? seen : Math.max(seen + 1, usual(model)),
    answerId: null,
    // Whoever left was as patient as it was: under another order it may get its answer first.
    patienceMs: ending === "cancelled" ? latencyMs : Infinity,
    sameAs: null,
  };
}

/**
 * Reads a request log, one JSON object per line.
 *
 * @throws Error when there is no request in it.
 */
export function readLog(text: string, hints: MachineHints): Replay {
  const entries: Entry[] = [];
  const skipped = new Map<string, number>();
  for (const line of text.split("\n")) {
    if (line.trim() === "") continue;
    const fields = parse(line);
    const entry = fields === null ? "not JSON" : entryOf(fields);
    if (typeof entry === "string") skipped.set(entry, (skipped.get(entry) ?? 0) + 1);
    else entries.push(entry);
  }
  const notes = [...skipped].map(([why, count]) => `${count} lines left out: ${why}`);
  if (entries.length === 0) {
    const found = notes.length === 0 ? "it is empty" : notes.join("; ");
    throw new Error(`no request in this log (${found}); a line looks like {"msg":"request",…}`);
  }
  entries.sort((a, b) => a.arrivedAt - b.arrivedAt);
  const from = entries[0]?.arrivedAt ?? 0;
  const models = [...new Set(entries.map(({ model }) => model))].toSorted();
  const usual = usualAnswers(entries);
  const clients = entries.map((entry, at) => {
    return { first: { at: entry.arrivedAt - from, request: requestOf(entry, at, usual) } };
  });
  const box = boxOf(entries, hints, notes);
  const lastAt = (entries.at(-1)?.arrivedAt ?? 0) - from;
  const scenario: Scenario = {
    about: `${entries.length} requests of a log, ${models.length} models`,
    machine: { type: "box", models, box },
    groupBy: "model",
    untilMs: lastAt + GRACE_MS,
    clients: () => clients,
  };
  return { scenario, notes };
}

function boxOf(entries: readonly Entry[], hints: MachineHints, notes: string[]): Box {
  const { promptMs, tokenMs } = speedOf(entries);
  const seenLoad = medianOf(entries.flatMap(({ loadMs }) => (loadMs > 0 ? [loadMs] : [])));
  const known = (name: string, value: number | null, usual: number, unit: string) => {
    const from = value === null ? "assumed: the log does not tell" : "from the log";
    notes.push(`${name}: ${(value ?? usual).toFixed(unit === "ms" ? 0 : 2)} ${unit} (${from})`);
    return value ?? usual;
  };
  const loadMs = hints.loadMs ?? known("a load", seenLoad, USUAL.loadMs, "ms");
  return {
    speed: {
      slots: hints.slots,
      promptMs: known("a prompt", promptMs, USUAL.promptMs, "ms per token"),
      tokenMs: Math.max(0.001, known("an answer", tokenMs, USUAL.tokenMs, "ms per token")),
      slowdown: 0,
      cacheTokens: 0,
      noticeMs: 50,
    },
    maxLoaded: hints.fits,
    loadMs,
    unloadMs: 0,
    maxQueue: 512,
  };
}
