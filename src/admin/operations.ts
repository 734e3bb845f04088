import type { BackendAction, Control } from "../control/control.ts";
import type { Difference, LastReload, Reloader } from "../control/reload.ts";
import type { Backend, Residency, Snapshot } from "../core/snapshot.ts";
import { tenantOf } from "../config.ts";
import { limitsOf } from "../core/budget.ts";
import type { Priority } from "../core/fairness.ts";
import type { Fleet } from "../fleet/fleet.ts";
import type { BreakerReport, TurnReport } from "../fleet/live.ts";
import type { BudgetReport, Ledger } from "../stores/ledger.ts";
import type { TenantUsage, Used } from "../telemetry/tenants.ts";
import { valuesOf, type Value } from "../settings/values.ts";

/** A backend as the snapshot has it, and how it is doing. Durations in milliseconds. */
export interface BackendReport extends Backend {
  inFlight: number;
  queued: number;
  /** Requests at once. */
  slots: number;
  /** Of the backend as a whole. */
  breaker: BreakerReport;
  /** Where not all models are loaded. */
  turn?: TurnReport;
  ttftMs: { p50: number | null; p95: number | null; p99: number | null };
  tokensPerSecond: number | null;
  lastError: { at: number; code: string } | null;
}

/** A tenant, what it is doing and what it has used since the start. */
export interface TenantReport extends Used {
  id: string;
  weight: number;
  priority: Priority;
  inFlight: number;
  queued: number;
  budgets: BudgetReport[];
}

/** Where the operator's view of tenants comes from. */
export interface Tenants {
  /** Whose the requests in the house are, and whether they wait. */
  running: () => Iterable<{ tenant: string; queued: boolean }>;
  ledger: () => Ledger;
  usage: TenantUsage;
}

/** A request that waits. Durations in milliseconds. */
export interface QueuedRequest {
  id: string;
  tenant: string;
  model: string | null;
  priority: Priority;
  backend: string | null;
  /** Requests of its model that start before it. */
  position: number;
  waitedMs: number;
  /** When it starts if nobody else comes. */
  etaMs: number;
  reason: string;
}

export interface QueueReport {
  requests: QueuedRequest[];
  /** Of backends where not everything is loaded. */
  turns: (TurnReport & { backend: string })[];
}

export type Reloaded = Difference & { backends: BackendAction[] };

/** What the operator may see and do; every change is also in the log. */
export class Operations {
  readonly #control: Control;
  readonly #fleet: Fleet;
  readonly #reloader: Reloader;
  readonly #tenants: Tenants;
  readonly #waiting: () => QueuedRequest[];

  /** @param waiting the requests that wait now. */
  constructor(
    control: Control,
    fleet: Fleet,
    reloader: Reloader,
    tenants: Tenants,
    waiting: () => QueuedRequest[],
  ) {
    this.#waiting = waiting;
    this.#control = control;
    this.#fleet = fleet;
    this.#reloader = reloader;
    this.#tenants = tenants;
  }

  /** `admin` of the configuration in effect. */
  get settings() {
    return this.#reloader.settings.config.admin;
  }

  /** The newest snapshot, with the time of the newest probe. */
  snapshot(): Snapshot {
    const { snapshot } = this.#control;
    const backends = snapshot.backends.map((backend) => {
      return { ...backend, checkedAt: this.#control.checkedAt(backend.id) };
    });
    const models = snapshot.models.map((model) => {
      const targets = model.targets.map((target) => {
        // A load of our own is known here first, and of some engines nowhere else.
        const isLoading = this.#fleet.isLoading(target.backend, model.name);
        return isLoading ? { ...target, residency: "loading" as const } : target;
      });
      return { ...model, targets };
    });
    return { ...snapshot, backends, models };
  }

  backends(): BackendReport[] {
    const usage = new Map(this.#fleet.usage().map((each) => [each.backend, each]));
    return this.snapshot().backends.map((backend) => {
      const { running = 0, waiting = 0, slots = 0, observed } = usage.get(backend.id) ?? {};
      const turn = this.#fleet.turnOf(backend.id);
      return {
        ...backend,
        ...(turn === null ? {} : { turn }),
        inFlight: running,
        queued: waiting,
        slots,
        breaker: this.#fleet.breakerOf(backend.id),
        ttftMs: {
          p50: observed?.ttftMs(0.5) ?? null,
          p95: observed?.ttftMs(0.95) ?? null,
          p99: observed?.ttftMs(0.99) ?? null,
        },
        tokensPerSecond: observed?.tokensPerSecond ?? null,
        lastError: observed?.lastError ?? null,
      };
    });
  }

  queue(): QueueReport {
    const turns = this.#control.snapshot.backends.flatMap(({ id }) => {
      const turn = this.#fleet.turnOf(id);
      return turn === null ? [] : [{ backend: id, ...turn }];
    });
    return { requests: this.#waiting(), turns };
  }

  /** Has a model loaded, when its turn comes. @param backend null: wherever it can be. */
  load(model: string, backend: string | null): { backend: string; residency: Residency }[] {
    this.#fleet.warm(model, true, backend);
    return this.#targetsOf(model, backend);
  }

  /** Has a model put out of memory, as soon as nothing runs there. */
  unload(model: string, backend: string | null): { backend: string; residency: Residency }[] {
    this.#fleet.unload(model, backend);
    return this.#targetsOf(model, backend);
  }

  #targetsOf(model: string, backend: string | null) {
    const targets = this.snapshot().models.find(({ name }) => name === model)?.targets ?? [];
    return targets
      .filter((target) => backend === null || target.backend === backend)
      .map((target) => ({ backend: target.backend, residency: target.residency }));
  }

  async tenants(): Promise<TenantReport[]> {
    const { config } = this.#reloader.settings;
    const { running, ledger, usage } = this.#tenants;
    const inHouse = [...running()];
    const ids = new Set(["default", ...Object.keys(config.tenants)]);
    return Promise.all(
      [...ids].map(async (id) => {
        const policy = tenantOf(config, id);
        const own = inHouse.filter(({ tenant }) => tenant === id);
        const queued = own.filter((each) => each.queued).length;
        return {
          id,
          weight: policy.weight,
          priority: policy.priority,
          inFlight: own.length - queued,
          queued,
          ...usage.of(id),
          budgets: await ledger().report(id, limitsOf(policy)),
        };
      }),
    );
  }

  /** @returns false when there is no such backend. */
  drain(id: string, drained: boolean): boolean {
    return this.#control.drain(id, drained);
  }

  /** @throws ConfigError */
  reload(): Promise<Reloaded> {
    return this.#reloader.reload("api");
  }

  /** What this configuration would change in the place of the file. @throws ConfigError */
  compare(file: unknown): Reloaded {
    const { settings, ...difference } = this.#reloader.compare(file);
    return { ...difference, backends: this.#control.preview(settings.config) };
  }

  /** Every value in effect, with its origin. */
  values(): Value[] {
    const { values } = this.#reloader.settings;
    const backends = this.#control.discovered;
    if (backends.length === 0) return values;
    const found = valuesOf({ backends }, [["discovered", { backends }]]);
    return values.flatMap((value) => (value.path === "backends" ? found : [value]));
  }

  /** Null before the first. */
  get lastReload(): LastReload | null {
    return this.#reloader.last;
  }
}
