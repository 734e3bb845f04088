import type { BackendConfig, Config, Kind } from "../config.ts";
import type { Backend, Health, Model, Snapshot, Target } from "../core/snapshot.ts";
import { modelNamed, type ListedModel } from "../engines/engine.ts";
import { engineOf } from "../engines/kinds.ts";

/** What the probes of one backend have told so far. */
export interface Seen {
  kind: Kind;
  health: Health;
  reason: string;
  /** Unix milliseconds. */
  checkedAt: number | null;
  /** As last listed; kept while the engine is away. */
  models: ListedModel[];
}

export function unseen(backend: BackendConfig): Seen {
  const kind = backend.kind ?? "openai";
  return { kind, health: "unknown", reason: "not probed yet", checkedAt: null, models: [] };
}

type Content = Omit<Snapshot, "version" | "publishedAt">;

interface Offer {
  name: string;
  listed: ListedModel;
}

/** The models of one backend by public name: those named, also while it is away, else those listed. */
function offersOf(wanted: BackendConfig, seen: Seen): Offer[] {
  if (wanted.models === undefined) {
    return seen.models.map((listed) => ({ name: listed.name, listed }));
  }
  return wanted.models.map((each) => {
    const { name, upstream } = typeof each === "string" ? { name: each, upstream: each } : each;
    const there = upstream ?? name;
    const listed = seen.models.find((model) => model.name === there);
    return { name, listed: listed ?? modelNamed(there, { residency: "cold" }) };
  });
}

function widest(a: number | null, b: number | null): number | null {
  return a === null || b === null ? (a ?? b) : Math.max(a, b);
}

/**
 * Joins what is wanted with what was seen.
 *
 * @param startedAt Unix seconds, for models whose engine does not tell when they were made.
 */
export function assemble(
  config: Pick<Config, "models">,
  wanted: readonly BackendConfig[],
  seen: ReadonlyMap<string, Seen>,
  startedAt: number,
): Content {
  const models = new Map<string, Model>();
  const backends = wanted.map((backend): Backend => {
    const sight = seen.get(backend.id) ?? unseen(backend);
    for (const { name, listed } of offersOf(backend, sight)) {
      const settings = config.models[name];
      if (settings?.backends?.includes(backend.id) === false) continue;
      const model = models.get(name) ?? {
        name,
        aliases: settings?.aliases ?? [],
        fallback: [settings?.fallback ?? []].flat(),
        concurrency: settings?.concurrency ?? null,
        contextLength: null,
        capabilities: [],
        createdAt: listed.createdAt ?? startedAt,
        targets: [],
      };
      models.set(name, model);
      model.contextLength = widest(model.contextLength, listed.contextLength);
      model.capabilities = [...new Set([...model.capabilities, ...listed.capabilities])];
      const target: Target = {
        backend: backend.id,
        model: listed.name,
        residency: listed.residency,
        slots: backend.concurrency ?? listed.slots ?? engineOf(sight.kind).slots,
        sizeBytes: listed.sizeBytes,
        vramBytes: listed.vramBytes,
        digest: listed.digest,
      };
      if (!model.targets.some((each) => each.backend === backend.id)) model.targets.push(target);
    }
    const { kind, health, reason, checkedAt } = sight;
    const concurrency = backend.concurrency ?? null;
    const { id, url = "", weight } = backend;
    const drained = false;
    return { id, kind, url, health, reason, checkedAt, drained, weight, concurrency, gpu: null };
  });
  const sorted = [...models.values()].toSorted((a, b) => (a.name < b.name ? -1 : 1));
  return { backends, models: sorted, withheld: [], warnings: [] };
}

/** Everything but when it was looked at: a probe that saw nothing new publishes nothing. */
function substance({ backends, models, withheld, warnings }: Content): string {
  const unchecked = backends.map((backend) => ({ ...backend, checkedAt: null }));
  return JSON.stringify([unchecked, models, withheld, warnings]);
}

/** The owner of the truth about the fleet: publishes a new snapshot whenever it has changed. */
export class Registry {
  readonly #config: Pick<Config, "models">;
  readonly #wanted: readonly BackendConfig[];
  readonly #seen = new Map<string, Seen>();
  readonly #startedAt: number;
  readonly #publish: (snapshot: Snapshot) => void;
  #snapshot: Snapshot;

  /** @param publish receives every snapshot, the first one from within this call. */
  constructor(
    config: Pick<Config, "models">,
    wanted: readonly BackendConfig[],
    publish: (snapshot: Snapshot) => void,
  ) {
    this.#config = config;
    this.#wanted = wanted;
    this.#publish = publish;
    this.#startedAt = Math.floor(Date.now() / 1000);
    const content = assemble(config, wanted, this.#seen, this.#startedAt);
    this.#snapshot = { version: 1, publishedAt: Date.now(), ...content };
    publish(this.#snapshot);
  }

  get snapshot(): Snapshot {
    return this.#snapshot;
  }

  seen(id: string): Seen | undefined {
    return this.#seen.get(id);
  }

  /** Takes what a probe saw. */
  report(id: string, seen: Seen): void {
    this.#seen.set(id, seen);
    const content = assemble(this.#config, this.#wanted, this.#seen, this.#startedAt);
    if (substance(content) === substance(this.#snapshot)) return;
    const version = this.#snapshot.version + 1;
    this.#snapshot = { version, publishedAt: Date.now(), ...content };
    this.#publish(this.#snapshot);
  }
}
