/** What was learned of which models one backend can have loaded at once; nothing of it is configured. */
export interface Fit {
  /** Models that have been seen loaded at once. */
  together: ReadonlySet<string>[];
  /** Models of which one had gone when the last of them was loaded, and when that was. */
  apart: { models: ReadonlySet<string>; at: number }[];
}

/** A model may have gone for another reason (Ollama's keep_alive): then it is tried again. */
const APART_MS = 3_600_000;
const MOST_LEARNED = 32;

export function createFit(): Fit {
  return { together: [], apart: [] };
}

export function includes(all: ReadonlySet<string>, some: Iterable<string>): boolean {
  for (const each of some) if (!all.has(each)) return false;
  return true;
}

/** Are they known not to fit? */
export function areApart(fit: Fit, models: ReadonlySet<string>): boolean {
  return fit.apart.some((each) => includes(models, each.models));
}

/** Who must leave for a model. */
export interface Placing {
  leaving: string[];
  /** False: these have never been tried together, and whoever is in memory may have to go. */
  known: boolean;
}

/**
 * Where these were seen together nobody leaves. Where they are known not to fit, those stay that were
 * seen beside the new one and have the most to do.
 *
 * @param workOf how much a model has to do: requests that run or wait.
 */
export function placing(
  fit: Fit,
  resident: ReadonlySet<string>,
  model: string,
  workOf: (model: string) => number,
): Placing {
  const all = new Set([...resident, model]);
  if (resident.size === 0 || fit.together.some((seen) => includes(seen, all))) {
    return { leaving: [], known: true };
  }
  if (!areApart(fit, all)) {
    return { leaving: [...resident], known: false };
  }
  let staying = new Set<string>();
  let most = 0;
  for (const seen of fit.together) {
    if (!seen.has(model)) continue;
    const beside = new Set([...resident].filter((each) => seen.has(each)));
    let work = 0;
    for (const each of beside) work += 1 + workOf(each);
    if (work > most) [staying, most] = [beside, work];
  }
  return { leaving: [...resident].filter((each) => !staying.has(each)), known: true };
}

/** These are loaded at once. */
export function seenTogether(fit: Fit, models: ReadonlySet<string>) {
  if (models.size < 2 || fit.together.some((seen) => includes(seen, models))) return;
  const others = fit.together.filter((seen) => !includes(models, seen));
  fit.together = [...others, models].slice(-MOST_LEARNED);
  fit.apart = fit.apart.filter((each) => !includes(models, each.models));
}

/** One of these had gone when the last of them was loaded. */
export function seenApart(fit: Fit, models: ReadonlySet<string>, at: number) {
  fit.together = fit.together.filter((seen) => !includes(seen, models));
  const others = fit.apart.filter((each) => !includes(each.models, models));
  fit.apart = [...others, { models, at }]
    .filter((each) => at - each.at < APART_MS)
    .slice(-MOST_LEARNED);
}
