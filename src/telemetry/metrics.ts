import { Counter, Gauge, Histogram, Registry } from "prom-client";
import type { MetricLabel } from "../config.ts";
import type { Outcome } from "../core/outcome.ts";
import type { Snapshot } from "../core/snapshot.ts";
import type { RequestRecord } from "./record.ts";

const SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600];
const RESIDENCIES = ["cold", "loading", "loaded"] as const;
const BREAKER_STATES = ["closed", "open", "half_open"] as const;
const HEALTHS = ["healthy", "degraded", "unhealthy", "unknown"] as const;

/** What a scrape reads beside what was counted. */
export interface Gauges {
  snapshot: () => Snapshot;
  usage: () => {
    backend: string;
    slots: number;
    models: { model: string; running: number; waiting: number }[];
  }[];
  /** The records of the requests that are in the house. */
  running: () => Iterable<Pick<RequestRecord, "model" | "backend_id">>;
  heldBytes: () => number;
  cache: () => { entries: number; bytes: number };
  /** How much of each token budget is used: 1 is all of it. */
  budgets: () => Promise<{ tenant: string; window: string; ratio: number }[]>;
  breakers: () => { backend: string; model: string | null; state: string }[];
  /** Did the last reload succeed? The start counts as one. */
  reloaded: () => boolean;
}

/** What a request's record does not say. */
export interface Extras {
  /** Mean time between two tokens of this answer. */
  interTokenMs: number | null;
  /** An engine saw it. */
  dispatched: boolean;
}

type Process = {
  memoryUsage: { rss(): number };
  cpuUsage(): { user: number; system: number };
};

const DELAY_SAMPLE_MS = 100;
const DELAY_SAMPLES = 100;

/** By how many milliseconds timers were late, over the last ten seconds. */
function watchEventLoop(): { delays: readonly number[]; stop: () => void } {
  const delays = Array.from({ length: DELAY_SAMPLES }, () => 0);
  let at = 0;
  let last = performance.now();
  const timer = setInterval(() => {
    const now = performance.now();
    delays[at] = Math.max(0, now - last - DELAY_SAMPLE_MS);
    at = (at + 1) % DELAY_SAMPLES;
    last = now;
  }, DELAY_SAMPLE_MS);
  timer.unref();
  return { delays, stop: () => clearInterval(timer) };
}

/** Prometheus metrics. Label values come from configuration and snapshot, never from a client. */
export class Metrics {
  readonly #registry = new Registry();
  #labels: readonly MetricLabel[];
  #requests;
  readonly #attempts;
  readonly #retries;
  readonly #endings;
  readonly #aborts;
  readonly #refusals;
  readonly #tokens;
  readonly #tenantTokens;
  readonly #lookups;
  readonly #ttft;
  readonly #interToken;
  readonly #duration;
  readonly #queueWait;
  readonly #degraded;
  readonly #etaError;
  readonly #loads;
  readonly #loadTime;
  readonly #reloads;
  readonly #stopWatching: () => void;

  constructor(
    labels: readonly MetricLabel[],
    gauges: Gauges,
    build: { version: string; runtime: string; process: Process },
  ) {
    this.#labels = labels;
    this.#requests = this.#requestCounter();
    this.#attempts = this.#counter("attempts_total", "Requests sent to engines, by verdict", [
      "backend_id",
      "outcome",
    ]);
    this.#retries = this.#counter("retries_total", "Attempts that were tried again elsewhere", [
      "backend_id",
      "cause",
    ]);
    this.#endings = this.#counter("endings_total", "How requests ended", [
      "model",
      "ending",
      "cause",
    ]);
    this.#aborts = this.#counter("aborts_total", "Clients that left, by phase", ["model", "phase"]);
    this.#refusals = this.#counter(
      "refusals_total",
      "Requests refused before any engine saw them",
      ["model", "cause"],
    );
    this.#tokens = this.#counter("tokens_total", "Tokens", ["model", "backend_id", "type"]);
    this.#tenantTokens = this.#counter("tenant_tokens_total", "Tokens of tenants", [
      "tenant",
      "type",
    ]);
    this.#lookups = this.#counter("cache_lookups_total", "What the cache had for requests", [
      "result",
    ]);
    this.#ttft = this.#histogram("ttft_seconds", "From accept to the first token, streams");
    this.#interToken = this.#histogram(
      "inter_token_seconds",
      "Mean time between tokens, per stream",
    );
    this.#duration = this.#histogram(
      "request_duration_seconds",
      "From accept to the end of the body",
    );
    this.#queueWait = this.#histogram(
      "queue_wait_seconds",
      "Waiting for a slot, requests that were admitted",
    );
    this.#degraded = this.#counter(
      "degraded_total",
      "Requests that a smaller model answered, by the one that was asked for",
      ["model", "served"],
    );
    this.#etaError = this.#histogram(
      "eta_error_seconds",
      "How far off the start was that a request in a queue was told",
    );
    this.#loads = this.#counter("model_loads_total", "Models that the gateway had loaded", [
      "model",
      "backend_id",
      "result",
    ]);
    this.#loadTime = this.#histogram("model_load_seconds", "From the call to the loaded model");
    this.#reloads = this.#counter("config_reloads_total", "Reloads of the configuration", [
      "result",
    ]);
    // What begins at one is no increase.
    for (const result of ["success", "failure"]) this.#reloads.inc({ result }, 0);
    this.#observe(gauges);
    this.#stopWatching = this.#observeProcess(build);
  }

  /** Counts by other labels from now on: what was counted by the old ones is dropped. */
  relabel(labels: readonly MetricLabel[]): void {
    if (labels.join() === this.#labels.join()) return;
    this.#registry.removeSingleMetric("tidegate_requests_total");
    this.#labels = labels;
    this.#requests = this.#requestCounter();
  }

  #requestCounter() {
    return this.#counter("requests_total", "Requests, each once, at its end", this.#labels);
  }

  close(): void {
    this.#stopWatching();
  }

  reload(ok: boolean): void {
    this.#reloads.inc({ result: ok ? "success" : "failure" });
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  text(): Promise<string> {
    return this.#registry.metrics();
  }

  attempt(backend: string, outcome: Outcome): void {
    this.#attempts.inc({ backend_id: backend, outcome });
  }

  degraded(model: string, served: string): void {
    this.#degraded.inc({ model, served });
  }

  /** @param ms how far off it was, in either direction. */
  etaError(model: string, backend: string, ms: number): void {
    this.#etaError.observe({ model, backend_id: backend }, ms / 1000);
  }

  retry(backend: string, cause: string): void {
    this.#retries.inc({ backend_id: backend, cause });
  }

  request(record: RequestRecord, extras: Extras): void {
    const model = record.model ?? "none";
    const backend_id = record.backend_id ?? "none";
    const own: Record<MetricLabel, string> = {
      model,
      backend_id,
      cache_hit: String(record.cache_hit),
      status: String(record.status),
      tenant: record.tenant ?? "none",
      endpoint: record.endpoint,
    };
    this.#requests.inc(Object.fromEntries(this.#labels.map((label) => [label, own[label]])));
    const cause = record.cause ?? "none";
    this.#endings.inc({ model, ending: record.ending, cause });
    if (record.ending === "cancelled") this.#aborts.inc({ model, phase: cause });
    if (record.ending === "failed" && !extras.dispatched) this.#refusals.inc({ model, cause });
    const where = { model, backend_id };
    this.#duration.observe(where, record.latency_ms / 1000);
    if (record.ttft !== null) this.#ttft.observe(where, record.ttft / 1000);
    if (extras.interTokenMs !== null) this.#interToken.observe(where, extras.interTokenMs / 1000);
    if (extras.dispatched) this.#queueWait.observe(where, record.queue_ms / 1000);
  }

  /** @param result `success`, `failure`, or `unknown` where the engine did not say */
  load(model: string, backend: string, result: string, ms: number): void {
    const where = { model, backend_id: backend };
    this.#loads.inc({ ...where, result });
    if (result === "success") this.#loadTime.observe(where, ms / 1000);
  }

  /** @param result `hit`, `miss`, `joined`, `bypass` */
  lookup(result: string): void {
    this.#lookups.inc({ result });
  }

  /** What an engine did for a request, or for several at once. */
  tokens(tenant: string, record: RequestRecord, cached: number): void {
    const where = { model: record.model ?? "none", backend_id: record.backend_id ?? "none" };
    const counts = { input: record.tokens_input, output: record.tokens_generated, cached };
    for (const [type, count] of Object.entries(counts)) {
      if (!count) continue;
      this.#tokens.inc({ ...where, type }, count);
      if (type !== "cached") this.#tenantTokens.inc({ tenant, type }, count);
    }
  }

  #counter<Label extends string>(name: string, help: string, labels: readonly Label[]) {
    return new Counter({
      name: `tidegate_${name}`,
      help,
      labelNames: [...labels],
      registers: [this.#registry],
    });
  }

  #histogram(name: string, help: string) {
    return new Histogram({
      name: `tidegate_${name}`,
      help,
      labelNames: ["model", "backend_id"] as const,
      buckets: SECONDS,
      registers: [this.#registry],
    });
  }

  #gauge<Label extends string>(
    name: string,
    help: string,
    labels: readonly Label[],
    read: (set: (labels: Record<Label, string>, value: number) => void) => void | Promise<void>,
  ) {
    new Gauge({
      name,
      help,
      labelNames: [...labels],
      registers: [this.#registry],
      collect() {
        this.reset();
        return read((values, value) => this.inc(values, value));
      },
    });
  }

  #observe({ snapshot, usage, running, heldBytes, breakers, reloaded, cache, budgets }: Gauges) {
    const pair = ["model", "backend_id"] as const;
    this.#gauge("tidegate_requests_in_flight", "Requests in the house", pair, (add) => {
      for (const { model, backend_id } of running()) {
        add({ model: model ?? "none", backend_id: backend_id ?? "none" }, 1);
      }
    });
    this.#gauge("tidegate_queue_requests", "Requests that wait for a slot", ["model"], (add) => {
      for (const { models } of usage()) {
        for (const { model, waiting } of models) add({ model }, waiting);
      }
    });
    this.#gauge("tidegate_slots", "Requests at once", ["backend_id"], (add) => {
      for (const { backend, slots } of usage()) add({ backend_id: backend }, slots);
    });
    this.#gauge("tidegate_slots_in_use", "Slots that are taken", pair, (add) => {
      for (const { backend, models } of usage()) {
        for (const { model, running: used } of models) add({ model, backend_id: backend }, used);
      }
    });
    const state = ["backend_id", "state"] as const;
    this.#gauge("tidegate_backend_health", "1 for the state it is in", state, (add) => {
      for (const { id, health } of snapshot().backends) {
        for (const each of HEALTHS) add({ backend_id: id, state: each }, each === health ? 1 : 0);
      }
    });
    const where = ["model", "backend_id", "state"] as const;
    this.#gauge("tidegate_model_residency", "1 for the state it is in", where, (add) => {
      for (const { name, targets } of snapshot().models) {
        for (const { backend, residency } of targets) {
          for (const each of RESIDENCIES) {
            const labels = { model: name, backend_id: backend, state: each };
            add(labels, each === residency ? 1 : 0);
          }
        }
      }
    });
    const guarded = ["backend_id", "model", "state"] as const;
    this.#gauge("tidegate_breaker_state", "1 for the state it is in", guarded, (add) => {
      for (const { backend, model, state: current } of breakers()) {
        for (const each of BREAKER_STATES) {
          const labels = { backend_id: backend, model: model ?? "none", state: each };
          add(labels, each === current ? 1 : 0);
        }
      }
    });
    this.#gauge("tidegate_cache_entries", "Answers that are kept", [], (add) => {
      add({}, cache().entries);
    });
    this.#gauge("tidegate_cache_bytes", "Bytes of the answers that are kept", [], (add) => {
      add({}, cache().bytes);
    });
    const budget = ["tenant", "window"] as const;
    this.#gauge("tidegate_budget_used_ratio", "Used of a token budget", budget, async (add) => {
      for (const { tenant, window, ratio } of await budgets()) add({ tenant, window }, ratio);
    });
    this.#gauge("tidegate_held_body_bytes", "Request bodies in memory", [], (add) => {
      add({}, heldBytes());
    });
    this.#gauge(
      "tidegate_config_last_reload_success",
      "1 when the file as it stands is in effect",
      [],
      (add) => add({}, reloaded() ? 1 : 0),
    );
  }

  #observeProcess({
    version,
    runtime,
    process,
  }: {
    version: string;
    runtime: string;
    process: Process;
  }) {
    const { delays, stop } = watchEventLoop();
    this.#gauge("tidegate_event_loop_delay_seconds", "Worst of the last 10 s", [], (add) => {
      add({}, Math.max(...delays) / 1000);
    });
    this.#gauge("tidegate_build_info", "Always 1", ["version", "runtime"], (add) => {
      add({ version, runtime }, 1);
    });
    this.#gauge("process_resident_memory_bytes", "Resident memory", [], (add) => {
      add({}, process.memoryUsage.rss());
    });
    this.#gauge("process_start_time_seconds", "Start, Unix seconds", [], (add) => {
      add({}, performance.timeOrigin / 1000);
    });
    new Counter({
      name: "process_cpu_seconds_total",
      help: "User and system CPU time",
      registers: [this.#registry],
      collect() {
        const { user, system } = process.cpuUsage();
        this.reset();
        this.inc((user + system) / 1e6);
      },
    });
    return stop;
  }
}
