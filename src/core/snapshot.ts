import { matches } from "./pattern.ts";
import { suggest } from "./suggest.ts";

/** What the probes say of a backend; `unknown` is never probed, or too long ago. */
export type Health = "healthy" | "degraded" | "unhealthy" | "unknown";

/** Where a model is: on disk, on its way into memory, or in it. */
export type Residency = "cold" | "loading" | "loaded";

/** One server at one URL, as the control plane last saw it. */
export interface Backend {
  id: string;
  kind: string;
  url: string;
  health: Health;
  /** Why it is in that state, in words for people; empty when healthy. */
  reason: string;
  /** Unix milliseconds of the last finished probe, null before the first. */
  checkedAt: number | null;
  drained: boolean;
  weight: number;
  /** Requests at once in this backend, all models together; null when the configuration sets none. */
  concurrency: number | null;
  /** Backends with the same name share one GPU; null where nothing is said. */
  gpu: string | null;
}

/** One backend that can serve a model, and the name the model has there. */
export interface Target {
  backend: string;
  model: string;
  residency: Residency;
  /** Requests of this model at once in this backend. */
  slots: number;
  /** In all, and of that on the GPU; null where the engine does not tell. */
  sizeBytes: number | null;
  vramBytes: number | null;
  digest: string | null;
  /** Tokens that prompt and answer may be there, of one slot; null where the engine does not tell. */
  contextLength: number | null;
}

export interface Model {
  name: string;
  aliases: string[];
  /** Smaller models that may answer instead, in this order. */
  fallback: string[];
  /** Cap over all backends, null for none. */
  concurrency: number | null;
  /** Of its targets the largest. */
  contextLength: number | null;
  capabilities: string[];
  /** Unix seconds. */
  createdAt: number;
  targets: Target[];
}

/**
 * An immutable view of the fleet, plain JSON. A request reads one snapshot from beginning to end,
 * and a data plane could follow a control plane in another process by receiving these.
 */
export interface Snapshot {
  version: number;
  /** Unix milliseconds. */
  publishedAt: number;
  backends: Backend[];
  models: Model[];
  /** Names a backend has and does not serve, since their answers are made elsewhere. */
  withheld: string[];
  /** What a person should know about how the backends fit together. */
  warnings: string[];
}

interface Index {
  models: Map<string, Model>;
  backends: Map<string, Backend>;
}

// Snapshots stay plain JSON, so what speeds up looking things up lives beside them.
const indexes = new WeakMap<Snapshot, Index>();

function indexOf(snapshot: Snapshot): Index {
  let index = indexes.get(snapshot);
  if (index === undefined) {
    const models = new Map<string, Model>();
    for (const model of snapshot.models) {
      for (const alias of model.aliases) models.set(alias, model);
    }
    // After the aliases: a model's own name wins over an alias of another.
    for (const model of snapshot.models) models.set(model.name, model);
    index = { models, backends: new Map(snapshot.backends.map((each) => [each.id, each])) };
    indexes.set(snapshot, index);
  }
  return index;
}

export type Resolution =
  | { found: true; model: Model }
  | { found: false; suggestion: string | null };

/**
 * Finds the model a client means: its name, an alias, or, for a name without a tag, `name:latest`
 * or else the only `name:*`. Otherwise the answer carries the nearest known name.
 */
export function resolve(snapshot: Snapshot, asked: string): Resolution {
  const { models } = indexOf(snapshot);
  const exact = models.get(asked);
  if (exact !== undefined) return { found: true, model: exact };
  if (!asked.includes(":")) {
    const latest = models.get(`${asked}:latest`);
    if (latest !== undefined) return { found: true, model: latest };
    const tagged = snapshot.models.filter((model) => model.name.startsWith(`${asked}:`));
    const [only] = tagged;
    if (only !== undefined && tagged.length === 1) return { found: true, model: only };
  }
  return { found: false, suggestion: suggest(asked, models.keys()) };
}

/** The backend of that id in this snapshot. */
export function backendOf(snapshot: Snapshot, id: string): Backend | undefined {
  return indexOf(snapshot).backends.get(id);
}

// For each snapshot, by the list of patterns itself: whoever asks has it from the configuration.
const views = new WeakMap<Snapshot, WeakMap<readonly string[], Snapshot>>();

/**
 * The snapshot of whoever may use only models whose public name matches: nothing in it tells that there
 * are others. The same object every time for the same snapshot and list.
 */
export function visibleTo(snapshot: Snapshot, patterns: readonly string[]): Snapshot {
  if (patterns.includes("*")) return snapshot;
  let ofSnapshot = views.get(snapshot);
  if (ofSnapshot === undefined) views.set(snapshot, (ofSnapshot = new WeakMap()));
  let view = ofSnapshot.get(patterns);
  if (view === undefined) {
    const isVisible = (name: string) => matches(patterns, name);
    view = {
      ...snapshot,
      models: snapshot.models.filter(({ name }) => isVisible(name)),
      withheld: snapshot.withheld.filter(isVisible),
      warnings: [],
    };
    ofSnapshot.set(patterns, view);
  }
  return view;
}
