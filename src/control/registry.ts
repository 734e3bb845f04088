import type { BackendConfig, Config, Kind } from "../config.ts";
import { matches } from "../core/pattern.ts";
import type { Backend, Health, Model, Snapshot, Target } from "../core/snapshot.ts";
import { modelNamed, type ListedModel } from "../engines/engine.ts";
import { engineOf } from "../engines/kinds.ts";

/** A backend to be served: as configured, found on this machine, or one address behind a name. */
export interface Wanted extends BackendConfig {
  /** The id in the configuration, where an address made a backend of its own. */
  group?: string;
}

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

/** Everything the truth about the fleet is made of. */
export interface Facts {
  models: Config["models"];
  wanted: readonly Wanted[];
  seen: ReadonlyMap<string, Seen>;
  drained: ReadonlySet<string>;
  /** Unix seconds, for models whose engine does not tell when they were made. */
  startedAt: number;
}

interface Offer {
  name: string;
  listed: ListedModel;
}

/** The models of one backend by public name: those named, also while it is away, else those listed. */
function offersOf(wanted: Wanted, seen: Seen): Offer[] {
  const { models, include = ["*"], exclude = [] } = wanted;
  if (models === undefined) {
    return seen.models
      .filter(({ name }) => matches(include, name) && !matches(exclude, name))
      .map((listed) => ({ name: listed.name, listed }));
  }
  return models.map((each) => {
    const { name, upstream } = typeof each === "string" ? { name: each, upstream: each } : each;
    const there = upstream ?? name;
    return { name, listed: listedAs(there, seen) };
  });
}

/** What the engine lists under that name, or what can be said without. */
function listedAs(name: string, { kind, models }: Seen): ListedModel {
  const listed = models.find((model) => model.name === name);
  if (listed !== undefined) return listed;
  const engine = engineOf(kind);
  const [only] = models;
  if (engine.takesAnyName && only !== undefined && models.length === 1) return { ...only, name };
  return modelNamed(name, { residency: "cold", remote: engine.isRemote(name) });
}

function widest(a: number | null, b: number | null): number | null {
  return a === null || b === null ? (a ?? b) : Math.max(a, b);
}

/** Joins what is wanted with what was seen. */
export function assemble({ models: settings, wanted, seen, drained, startedAt }: Facts): Content {
  const models = new Map<string, Model>();
  const withheld = new Set<string>();
  const backends = wanted.map((backend): Backend => {
    const sight = seen.get(backend.id) ?? unseen(backend);
    for (const { name, listed } of offersOf(backend, sight)) {
      const own = settings[name];
      if (own?.backends !== undefined && !serves(own.backends, backend)) continue;
      if (listed.remote && !backend.allowCloud) {
        withheld.add(name);
        continue;
      }
      const model = models.get(name) ?? {
        name,
        aliases: own?.aliases ?? [],
        fallback: [own?.fallback ?? []].flat(),
        concurrency: own?.concurrency ?? null,
        contextLength: null,
        capabilities: [],
        createdAt: listed.createdAt ?? startedAt,
        targets: [],
      };
      models.set(name, model);
      if (model.targets.some((each) => each.backend === backend.id)) continue;
      model.contextLength = widest(model.contextLength, listed.contextLength);
      model.capabilities = [...new Set([...model.capabilities, ...listed.capabilities])];
      model.targets.push(targetOf(backend, sight.kind, listed));
    }
    const { kind, health, reason, checkedAt } = sight;
    const { id, url = "", weight, concurrency = null, gpu = null } = backend;
    const isDrained = drained.has(id);
    const known = { id, kind, url, health, reason, checkedAt, drained: isDrained };
    return { ...known, weight, concurrency, gpu };
  });
  const sorted = [...models.values()].toSorted((a, b) => (a.name < b.name ? -1 : 1));
  const hidden = [...withheld].filter((name) => !models.has(name)).toSorted();
  return {
    backends,
    models: sorted,
    withheld: hidden,
    warnings: [...warningsOf(sorted), ...aloneOn(backends)],
  };
}

function serves(ids: readonly string[], { id, group }: Wanted): boolean {
  return ids.includes(id) || (group !== undefined && ids.includes(group));
}

function targetOf(backend: Wanted, kind: Kind, listed: ListedModel): Target {
  const { residency, sizeBytes, vramBytes, digest, contextLength } = listed;
  const slots = backend.concurrency ?? listed.slots ?? engineOf(kind).slots;
  return {
    backend: backend.id,
    model: listed.name,
    residency,
    slots,
    sizeBytes,
    vramBytes,
    digest,
    contextLength,
  };
}

/** Where a GPU is named for nothing. */
function aloneOn(backends: readonly Backend[]): string[] {
  return backends
    .filter(({ gpu, kind, health }) => {
      return gpu !== null && health !== "unknown" && engineOf(kind as Kind).load === null;
    })
    .map(({ id, kind, gpu }) => {
      return `backend ${id} takes no turns on GPU ${gpu}: ${kind} keeps its model in memory, and cannot be asked to let go of it`;
    });
}

/** Where a name means two things. */
function warningsOf(models: readonly Model[]): string[] {
  const names = new Set(models.map(({ name }) => name));
  return models.flatMap(({ name, aliases, targets }) => {
    const hidden = aliases
      .filter((alias) => names.has(alias))
      .map((alias) => `alias ${alias} of ${name} is not in use: there is a model of that name`);
    const digests = new Map(
      targets.flatMap(({ backend, digest }) => (digest === null ? [] : [[digest, backend]])),
    );
    if (digests.size < 2) return hidden;
    const where = [...digests].map(([digest, backend]) => `${backend} has ${digest.slice(0, 12)}`);
    const differing =
      `model ${name} is not the same everywhere: ${where.join(", ")}; answers depend on where a ` +
      "request goes, until the same version is pulled everywhere";
    return [...hidden, differing];
  });
}

/** Everything but when it was looked at: a probe that saw nothing new publishes nothing. */
function substance({ backends, models, withheld, warnings }: Content): string {
  const unchecked = backends.map((backend) => ({ ...backend, checkedAt: null }));
  return JSON.stringify([unchecked, models, withheld, warnings]);
}

function sameSight(a: Seen, b: Seen): boolean {
  return JSON.stringify({ ...a, checkedAt: null }) === JSON.stringify({ ...b, checkedAt: null });
}

/** The owner of the truth about the fleet: publishes a new snapshot whenever it has changed. */
export class Registry {
  readonly #publish: (snapshot: Snapshot) => void;
  readonly #startedAt = Math.floor(Date.now() / 1000);
  readonly #seen = new Map<string, Seen>();
  readonly #drained = new Set<string>();
  #apiKeys: ReadonlyMap<string, string | undefined> = new Map();
  #models: Config["models"] = {};
  #wanted: readonly Wanted[] = [];
  #snapshot: Snapshot;

  /** @param publish receives every snapshot after the first, which is empty. */
  constructor(publish: (snapshot: Snapshot) => void) {
    this.#publish = publish;
    this.#snapshot = { version: 0, publishedAt: Date.now(), ...this.#assemble() };
  }

  get snapshot(): Snapshot {
    return this.#snapshot;
  }

  get wanted(): readonly Wanted[] {
    return this.#wanted;
  }

  /** The key to send to a backend. */
  apiKeyOf(id: string): string | null {
    return this.#apiKeys.get(id) ?? null;
  }

  seen(id: string): Seen | undefined {
    return this.#seen.get(id);
  }

  /**
   * Takes another configuration. What was seen of a backend stays as long as its id and URL do; of
   * one that moved the models stay, so that nobody gets a 404 before its first probe.
   *
   * @param looked what a first look at new backends showed.
   */
  configure(
    models: Config["models"],
    wanted: readonly Wanted[],
    looked: ReadonlyMap<string, Seen>,
  ): void {
    const before = new Map(this.#wanted.map((backend) => [backend.id, backend]));
    this.#models = models;
    this.#wanted = wanted;
    this.#apiKeys = new Map(wanted.map(({ id, apiKey }) => [id, apiKey]));
    for (const backend of wanted) {
      const { id } = backend;
      const was = before.get(id);
      const seen = this.#seen.get(id);
      if (was !== undefined && seen !== undefined && isSamePlace(was, backend)) continue;
      const sight = looked.get(id) ?? unseen(backend);
      const models = sight.health === "healthy" ? sight.models : (seen?.models ?? []);
      this.#seen.set(id, { ...sight, models });
    }
    const ids = new Set(wanted.map(({ id }) => id));
    for (const id of this.#seen.keys()) if (!ids.has(id)) this.#seen.delete(id);
    for (const id of this.#drained) if (!ids.has(id)) this.#drained.delete(id);
    this.#refresh();
  }

  /** Takes what a probe saw of a backend that is still wanted. */
  report(id: string, seen: Seen): void {
    const before = this.#seen.get(id);
    if (before === undefined) return;
    this.#seen.set(id, seen);
    if (!sameSight(before, seen)) this.#refresh();
  }

  /**
   * Takes a backend out of use by hand, or back in. It stays so over reloads.
   * @returns false when there is none of that id.
   */
  drain(id: string, drained: boolean): boolean {
    if (!this.#seen.has(id)) return false;
    if (drained) this.#drained.add(id);
    else this.#drained.delete(id);
    this.#refresh();
    return true;
  }

  #assemble(): Content {
    return assemble({
      models: this.#models,
      wanted: this.#wanted,
      seen: this.#seen,
      drained: this.#drained,
      startedAt: this.#startedAt,
    });
  }

  #refresh() {
    const content = this.#assemble();
    if (substance(content) === substance(this.#snapshot)) return;
    const version = this.#snapshot.version + 1;
    this.#snapshot = { version, publishedAt: Date.now(), ...content };
    this.#publish(this.#snapshot);
  }
}

/** Whatever changes besides, it is the same server: what was learned of it stays true. */
export function isSamePlace(a: BackendConfig, b: BackendConfig): boolean {
  return a.url === b.url && a.kind === b.kind;
}
