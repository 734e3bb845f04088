import { createApp } from "./app.ts";
import type { BackendConfig } from "./config.ts";
import type { Snapshot } from "./core/snapshot.ts";
import { discover, Prober, type Discovery } from "./control/probe.ts";
import { Registry } from "./control/registry.ts";
import type { Exchange } from "./data/exchange.ts";
import { prepareAccess } from "./data/identify.ts";
import { shuttingDown } from "./data/pipeline.ts";
import type { Plane } from "./data/plane.ts";
import { Fleet } from "./fleet/fleet.ts";
import type { Settings } from "./load.ts";
import type { Log } from "./telemetry/log.ts";
import { Metrics } from "./telemetry/metrics.ts";
import { startTracing, tracingWanted, untraced } from "./telemetry/tracing.ts";

/** What only the process knows. */
export interface Host {
  version: string;
  /** Name and version, for `tidegate_build_info`. */
  runtime: string;
  log: Log;
  /** The process's own: the OpenTelemetry SDK reads it. */
  environment: Record<string, string | undefined>;
  /** Requests to engines at once; Infinity where the runtime sets no limit. */
  upstreamLimit: number;
  process: { memoryUsage: { rss(): number }; cpuUsage(): { user: number; system: number } };
}

export interface Gateway {
  fetch(request: Request): Response | Promise<Response>;
  /** The places that were looked at because the configuration names no backends. */
  discovered: Discovery[];
  snapshot(): Snapshot;
  /** Loads the exporter where there is one to export to. To be called once the server listens. */
  startTracing(): Promise<void>;
  /** Not ready from now on, but still admitting. */
  startDraining(): void;
  /**
   * Admits nothing further and waits for what runs, at most `graceMs`; then ends the rest.
   * @returns true when nothing had to be ended.
   */
  drain(graceMs: number): Promise<boolean>;
  /** Stops the loops and exports what is left. */
  close(): Promise<void>;
}

/** How long the first answers may have to wait for slow first probes. */
const FIRST_ROUND_MS = 1000;

/** Puts everything together and looks at every backend once. */
export async function startGateway(settings: Settings, host: Host): Promise<Gateway> {
  const { config } = settings;
  const discovered = config.backends.length > 0 ? [] : await discover(config.server.port);
  const backends = config.backends.length > 0 ? config.backends : backendsFrom(discovered);
  const now = () => performance.now();
  const fleet = new Fleet({
    now,
    maxLength: config.queue.maxLength,
    upstreamLimit: host.upstreamLimit,
    apiKeys: new Map(
      backends.flatMap(({ id, apiKey }) => (apiKey === undefined ? [] : [[id, apiKey] as const])),
    ),
  });
  const registry = new Registry(config, backends, (snapshot) => fleet.apply(snapshot));
  const prober = new Prober(backends, {
    report(id, seen) {
      const before = registry.seen(id)?.health ?? "unknown";
      registry.report(id, seen);
      if (before === seen.health) return;
      const level = seen.health === "healthy" ? "info" : "warn";
      host.log[level]("backend health", {
        backend_id: id,
        from: before,
        to: seen.health,
        reason: seen.reason,
      });
    },
    seen: (id) => registry.seen(id),
    flowing: (id, withinMs) => now() - fleet.lastChunkAt(id) < withinMs,
  });
  const exchanges = new Set<Exchange>();
  const plane: Plane = {
    config,
    access: prepareAccess(config, settings.environmentKeys),
    fleet,
    log: host.log,
    metrics: config.metrics.enabled ? new Metrics(config.metrics.labels, gauges(), host) : null,
    tracing: untraced,
    exchanges,
    heldBytes: 0,
    admitting: true,
    now,
    snapshot: () => registry.snapshot,
    probe: (id) => prober.check(id),
  };

  function gauges() {
    return {
      snapshot: () => registry.snapshot,
      usage: () => fleet.usage(),
      running: () => [...exchanges].map((exchange) => exchange.record),
      heldBytes: () => plane.heldBytes,
    };
  }

  let firstRound = false;
  let draining = false;
  const round = prober.start().then(() => {
    firstRound = true;
  });
  await Promise.race([round, new Promise((resolve) => setTimeout(resolve, FIRST_ROUND_MS))]);
  const app = createApp(plane, {
    version: host.version,
    readiness() {
      if (draining) return { ready: false, reason: "draining" };
      if (!firstRound) return { ready: false, reason: "the first probe round is not done" };
      return { ready: true, reason: "ok" };
    },
  });

  return {
    fetch: (request) => app.fetch(request),
    discovered,
    snapshot: () => registry.snapshot,
    async startTracing() {
      if (!tracingWanted(config.telemetry, host.environment)) return;
      plane.tracing = await startTracing(config.telemetry, host.environment);
    },
    startDraining() {
      draining = true;
    },
    async drain(graceMs) {
      draining = true;
      plane.admitting = false;
      const deadline = now() + graceMs;
      while (exchanges.size > 0 && now() < deadline) {
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      const clean = exchanges.size === 0;
      for (const exchange of exchanges) exchange.fail(shuttingDown());
      return clean;
    },
    async close() {
      prober.stop();
      fleet.close();
      await plane.tracing.stop();
    },
  };
}

/** What answered becomes a backend each; nothing did: the demo engine. */
function backendsFrom(discovered: readonly Discovery[]): BackendConfig[] {
  const defaults = { weight: 1, healthInterval: 5000, timeout: 3000 };
  const counts = new Map<string, number>();
  const found = discovered.flatMap(({ kind, url }): BackendConfig[] => {
    if (kind === null) return [];
    const count = (counts.get(kind) ?? 0) + 1;
    counts.set(kind, count);
    return [{ ...defaults, id: count === 1 ? kind : `${kind}-${count}`, kind, url }];
  });
  return found.length > 0 ? found : [{ ...defaults, id: "demo", kind: "demo" }];
}
