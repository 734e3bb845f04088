import type { Peer } from "./admin/api.ts";
import { Operations, type QueuedRequest } from "./admin/operations.ts";
import { createApp } from "./app.ts";
import { tenantOf, type Config } from "./config.ts";
import { Control } from "./control/control.ts";
import type { Address } from "./control/names.ts";
import { Reloader } from "./control/reload.ts";
import type { Place } from "./control/search.ts";
import { limitsOf } from "./core/budget.ts";
import { Estimates } from "./core/estimate.ts";
import { RetryBudget } from "./core/retries.ts";
import type { Snapshot } from "./core/snapshot.ts";
import { comingUp } from "./core/warm.ts";
import { waitingOf } from "./data/admit.ts";
import type { Exchange } from "./data/exchange.ts";
import { prepareAccess } from "./data/identify.ts";
import { shuttingDown } from "./data/pipeline.ts";
import type { Plane } from "./data/plane.ts";
import type { Loaded } from "./fleet/change.ts";
import { Fleet } from "./fleet/fleet.ts";
import type { Settings, Sources } from "./settings/load.ts";
import { Answers } from "./stores/answers.ts";
import { MemoryLedger } from "./stores/ledger.ts";
import { RedisAnswers } from "./stores/redis-answers.ts";
import { RedisLedger } from "./stores/redis-ledger.ts";
import { RedisLink } from "./stores/redis.ts";
import type { Log } from "./telemetry/log.ts";
import { Metrics } from "./telemetry/metrics.ts";
import { TenantUsage } from "./telemetry/tenants.ts";
import { startTracing, tracingWanted, untraced, type Tracing } from "./telemetry/tracing.ts";

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
  /** The A records of a host. */
  resolve: (host: string) => Promise<Address[]>;
}

export interface Gateway {
  fetch(request: Request, peer?: Peer): Response | Promise<Response>;
  /** The configuration in effect. */
  config(): Config;
  /** The places that were looked at because the configuration names no backends. */
  places(): readonly Place[];
  snapshot(): Snapshot;
  /** Loads the exporter where there is one to export to. To be called once the server listens. */
  startTracing(): Promise<void>;
  /** Reloads whenever the file changes. */
  watch(): void;
  /** Reads the configuration again; its mistakes go to the log. Never rejects. */
  reload(trigger: string): Promise<void>;
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

/** How often it is looked whether requests have ended. */
const POLL_MS = 20;

/** Forgets what was kept. */
const NO_CACHE = { maxItems: 1, maxBytes: 0, ttlMs: 1 };

/** Puts everything together and looks at every backend once. */
export async function startGateway(
  settings: Settings,
  sources: Sources,
  host: Host,
): Promise<Gateway> {
  const { log } = host;
  const now = () => performance.now();
  const startedAt = now();
  /** Where models have been asked for that are to be there before anybody asks. */
  let warmed: ReadonlySet<string> = new Set();
  const fleet = new Fleet({
    now,
    upstreamLimit: host.upstreamLimit,
    maxLength: settings.config.queue.maxLength,
    breaker: settings.config.circuitBreaker,
    random: Math.random,
    apiKeyOf: (id) => control.apiKeyOf(id),
    look: (connection, engine) => control.look(connection, engine),
    loaded: tellLoad,
  });
  timeLoads(settings.config);
  const control: Control = new Control({
    log,
    now,
    random: Math.random,
    resolve: host.resolve,
    publish(snapshot) {
      fleet.apply(snapshot);
      warm(snapshot);
    },
    stuck: (id) => fleet.isStuck(id),
    waitedFor: (id) => fleet.usage().some(({ backend, waiting }) => backend === id && waiting > 0),
    flowing: (id, withinMs) => now() - fleet.lastChunkAt(id) < withinMs,
  });
  const exchanges = new Set<Exchange>();
  const plane: Plane = {
    config: settings.config,
    access: prepareAccess(settings.config, settings.environmentKeys, settings.keyFiles),
    fleet,
    log,
    metrics: null,
    tracing: untraced,
    exchanges,
    retries: new RetryBudget(),
    answers: new Answers(settings.config.cache),
    sharedAnswers: null,
    flights: new Map(),
    ledger: new MemoryLedger(Date.now),
    estimates: new Estimates(),
    tenants: new TenantUsage(),
    atOnce: new Map(),
    heldBytes: 0,
    admitting: true,
    now,
    snapshot: () => control.snapshot,
    probe: ({ connection, engine }) => control.check(connection, engine),
  };
  const reloader = new Reloader(settings, {
    sources,
    log,
    async swap(next) {
      const { backends } = await control.configure(next.config, () => take(next));
      warm(control.snapshot);
      return backends;
    },
    done: (ok) => plane.metrics?.reload(ok),
  });
  const tenants = {
    running: () =>
      [...exchanges].map((exchange) => {
        const queued = waitingOf(exchange.flight ?? exchange) !== null;
        return { tenant: exchange.tenant, queued };
      }),
    ledger: () => plane.ledger,
    usage: plane.tenants,
  };
  const operations = new Operations(control, fleet, reloader, tenants, waitingNow);
  const gauges = {
    snapshot: () => operations.snapshot(),
    usage: () => fleet.usage(),
    running: () => [...exchanges].map((exchange) => (exchange.flight ?? exchange).record),
    cache: () => plane.answers,
    budgets: budgetsInUse,
    heldBytes: () => plane.heldBytes,
    breakers: () => fleet.breakers(),
    reloaded: () => reloader.last?.ok ?? true,
  };

  let link: RedisLink | null = null;
  shareOver(settings.config);
  shareAnswers(settings.config);
  let traced: Promise<void> = Promise.resolve();
  let firstRound = false;
  let draining = false;
  measure();
  let app = createApp(plane, appOptions());
  const { probed } = await control.configure(settings.config, () => {});
  void probed.then(() => {
    firstRound = true;
  });

  function appOptions() {
    return {
      version: host.version,
      startedAt,
      operations,
      readiness() {
        if (draining) return { ready: false, reason: "draining" };
        if (!firstRound) return { ready: false, reason: "the first probe round is not done" };
        return { ready: true, reason: "ok" };
      },
    };
  }

  /** Limits and answers are shared with other gateways where there is a Redis to do it. */
  function shareOver({ redis }: Config) {
    void link?.close();
    link = null;
    if (redis.url === undefined) {
      plane.ledger = new MemoryLedger(Date.now);
      return;
    }
    link = new RedisLink({ ...redis, url: redis.url }, (isUp, reason) => {
      if (isUp) log.info("redis is in use");
      else log.warn("redis is away: limits are held by share, answers are not shared", { reason });
    });
    plane.ledger = new RedisLedger(link, Date.now);
  }

  function shareAnswers({ cache }: Config) {
    plane.sharedAnswers = link === null || !cache.enabled ? null : new RedisAnswers(link);
  }

  function timeLoads({ queue, timeouts }: Config) {
    fleet.turnMs = queue.turnMs;
    fleet.loadMs = timeouts.loadMs;
  }

  /** Has the models loaded that are to be there before anybody asks, wherever they have come up. */
  function warm(snapshot: Snapshot) {
    const models = Object.entries(plane.config.models).filter(([, model]) => model.warm);
    const { up, arrived } = comingUp(
      snapshot,
      models.map(([name]) => name),
      warmed,
    );
    warmed = up;
    for (const { model, backend } of arrived) fleet.warm(model, false, backend);
  }

  function tellLoad({ backend, model, loaded, reason, ms }: Loaded) {
    const result = loaded === null ? "unknown" : loaded ? "success" : "failure";
    plane.metrics?.load(model, backend, result, ms);
    const fields = { backend_id: backend, model, load_ms: Math.round(ms) };
    if (loaded === false) log.warn("model not loaded", { ...fields, reason });
    else if (loaded) log.info("model loaded", fields);
  }

  function waitingNow(): QueuedRequest[] {
    return [...exchanges].flatMap((exchange) => {
      const { id, tenant, priority, receivedAt } = exchange;
      const asking = exchange.flight ?? exchange;
      const waiting = waitingOf(asking);
      if (waiting === null) return [];
      const { model, backend_id: backend } = asking.record;
      const waitedMs = Math.round(now() - receivedAt);
      return [{ id, tenant, model, priority, backend, waitedMs, ...waiting }];
    });
  }

  async function budgetsInUse() {
    const { config, ledger } = plane;
    const all = Object.keys(config.tenants).map(async (tenant) => {
      const reports = await ledger.report(tenant, limitsOf(tenantOf(config, tenant)));
      return reports.map(({ window, limit, used, reserved }) => {
        return { tenant, window, ratio: (used + reserved) / limit };
      });
    });
    return (await Promise.all(all)).flat();
  }

  function measure() {
    const { enabled, labels } = plane.config.metrics;
    if (!enabled) {
      plane.metrics?.close();
      plane.metrics = null;
    } else if (plane.metrics === null) {
      plane.metrics = new Metrics(labels, gauges, host);
    } else {
      plane.metrics.relabel(labels);
    }
  }

  /** Another configuration is in effect from here on, for whoever asks next. */
  function take({ config, environmentKeys, keyFiles }: Settings) {
    const before = plane.config;
    plane.config = config;
    // A reload asks for them once more.
    warmed = new Set();
    plane.access = prepareAccess(config, environmentKeys, keyFiles, plane.access);
    fleet.maxLength = config.queue.maxLength;
    fleet.breaker = config.circuitBreaker;
    timeLoads(config);
    plane.answers.configure(config.cache.enabled ? config.cache : NO_CACHE);
    if (JSON.stringify(before.redis) !== JSON.stringify(config.redis)) shareOver(config);
    shareAnswers(config);
    log.level = config.server.logLevel;
    measure();
    app = createApp(plane, appOptions());
    if (JSON.stringify(before.telemetry) !== JSON.stringify(config.telemetry)) {
      trace().catch((error: unknown) =>
        log.error("tracing not started", { detail: String(error) }),
      );
    }
  }

  /** Exports as the configuration says from now on; one change after the other, the newest last. */
  function trace(): Promise<void> {
    const changed = traced.then(async () => {
      const { telemetry } = plane.config;
      const wanted = tracingWanted(telemetry, host.environment);
      const next = wanted ? await startTracing(telemetry, host.environment) : untraced;
      void retire(plane.tracing, [...exchanges]);
      plane.tracing = next;
    });
    traced = changed.catch(() => {});
    return changed;
  }

  /** Spans of running requests still go the old way. */
  async function retire(tracing: Tracing, running: readonly Exchange[]) {
    while (running.some((exchange) => !exchange.ended)) await pause(POLL_MS);
    await tracing.stop();
  }

  return {
    fetch: (request, peer = {}) => app.fetch(request, peer),
    config: () => plane.config,
    places: () => control.places,
    snapshot: () => control.snapshot,
    startTracing: trace,
    watch: () => reloader.watch(),
    async reload(trigger) {
      await reloader.reload(trigger).catch(() => {});
    },
    startDraining() {
      draining = true;
    },
    async drain(graceMs) {
      draining = true;
      plane.admitting = false;
      const deadline = now() + graceMs;
      while (exchanges.size > 0 && now() < deadline) await pause(POLL_MS);
      const clean = exchanges.size === 0;
      for (const exchange of exchanges) exchange.fail(shuttingDown());
      return clean;
    },
    async close() {
      reloader.stop();
      control.stop();
      fleet.close();
      await link?.close();
      plane.metrics?.close();
      await plane.tracing.stop();
    },
  };
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
