/** Parts of a snapshot with nothing special about them; a test names what it is about. */
import type { Backend, Model, Snapshot, Target } from "../../src/core/snapshot.ts";

export function aBackend(id: string, more: Partial<Backend> = {}): Backend {
  return {
    id,
    kind: "openai",
    url: `http://${id}`,
    health: "healthy",
    reason: "",
    checkedAt: null,
    drained: false,
    weight: 1,
    concurrency: null,
    gpu: null,
    ...more,
  };
}

export function aTarget(backend: string, model: string, more: Partial<Target> = {}): Target {
  return {
    backend,
    model,
    residency: "loaded",
    slots: 1,
    sizeBytes: null,
    vramBytes: null,
    digest: null,
    contextLength: null,
    ...more,
  };
}

export function aModel(name: string, targets: Target[], more: Partial<Model> = {}): Model {
  return {
    name,
    aliases: [],
    fallback: [],
    concurrency: null,
    contextLength: null,
    capabilities: [],
    createdAt: 0,
    targets,
    ...more,
  };
}

export function aSnapshot(backends: Backend[], models: Model[]): Snapshot {
  return { version: 1, publishedAt: 0, backends, models, withheld: [], warnings: [] };
}
