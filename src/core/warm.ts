import { backendOf, type Snapshot } from "./snapshot.ts";

/** A model in a backend that can be used again, or for the first time. */
export interface Arrival {
  model: string;
  backend: string;
}

/**
 * Which of these models have come up: their backend is healthy and in use, has them, and was not or had
 * not before. What is loaded there is another question: an engine that has put a model out by itself, or
 * by hand, has not come up.
 *
 * @param before what was up, as returned for the snapshot before this one; empty for a new start.
 */
export function comingUp(
  snapshot: Snapshot,
  models: Iterable<string>,
  before: ReadonlySet<string>,
): { up: ReadonlySet<string>; arrived: Arrival[] } {
  const wanted = new Set(models);
  const up = new Set<string>();
  const arrived: Arrival[] = [];
  for (const { name: model, targets } of snapshot.models) {
    if (!wanted.has(model)) continue;
    for (const { backend } of targets) {
      const { health, drained = true } = backendOf(snapshot, backend) ?? {};
      if (health !== "healthy" || drained) continue;
      const name = JSON.stringify([backend, model]);
      up.add(name);
      if (!before.has(name)) arrived.push({ model, backend });
    }
  }
  return { up, arrived };
}
