import type { Health, Target } from "./snapshot.ts";

/** A target with what selection looks at. Times are milliseconds from now. */
export interface Candidate {
  target: Target;
  health: Health;
  weight: number;
  /** When a request would start there, and when its first token would come. */
  startMs: number;
  firstTokenMs: number;
  /** A request would start at once: its model loaded, a free slot, and nobody waiting for it. */
  free: boolean;
  /** It would, once its model is loaded. */
  vacant: boolean;
  resident: boolean;
  /** Tokens of the prompt that the engine is expected to have computed before. */
  cachedTokens: number;
  /** The last request of the same session went there. */
  familiar: boolean;
  /** By what has been measured it would start too late, and be refused. */
  late: boolean;
  /** It has the larger context that the prompt may need, or nobody is known to. */
  roomy: boolean;
  /** Not for this request; it still counts where one trial at a time is allowed. */
  barred?: boolean;
  /** Its breaker lets nobody through now. */
  open: boolean;
  /** A request is under way there to find out whether it works again. */
  trying: boolean;
  /** When this backend last failed a request or a probe (same clock throughout), null for never. */
  failedAt: number | null;
}

export interface Selection {
  target: Target;
  reason: "only" | "least_busy" | "resident" | "prefix" | "weight" | "trial";
}

/** Running credit per backend id for smooth weighted round robin; owned by the caller. */
export type Credit = Map<string, number>;

const TIERS: readonly Health[] = ["healthy", "degraded", "unknown"];
/** Those that answer so little later than the first are equals: weights decide. */
const EQUAL_MS = 50;
const EQUAL_SHARE = 0.1;

/** The latest first token that is as good as this one, milliseconds. */
export function asGoodAs(firstTokenMs: number): number {
  return firstTokenMs + Math.max(EQUAL_MS, firstTokenMs * EQUAL_SHARE);
}

/**
 * Chooses where a request goes: the healthiest tier that has a target; in it, of those that have room for
 * the prompt and start in time, the target whose first token is expected first; among those that are as
 * good as that one, those that can start at once; then the one that knows the session; then smooth weighted
 * round robin. Where only unhealthy or open targets are left, one request at a time tries the least
 * recently failed.
 *
 * @param credit changed by a choice among equals (nginx's algorithm: every contender earns its
 *   weight, the richest is chosen and pays the sum).
 * @returns null when no target may be used now.
 */
export function select(candidates: readonly Candidate[], credit: Credit): Selection | null {
  const [only] = candidates;
  // Most have one place to go.
  if (only !== undefined && candidates.length === 1 && isUsable(only, "healthy")) {
    return { target: only.target, reason: "only" };
  }
  for (const health of TIERS) {
    const tier = candidates.filter((candidate) => isUsable(candidate, health));
    if (tier.length === 0) continue;
    const roomy = preferred(tier, ({ roomy }) => roomy);
    return soonest(
      preferred(roomy, ({ late }) => !late),
      credit,
    );
  }
  // One trial goes to the backend that has been left alone for longest; while it runs the others
  // are refused.
  if (candidates.some((candidate) => candidate.trying)) return null;
  const [trial] = candidates
    .filter((candidate) => !candidate.barred && candidate.vacant)
    .toSorted((a, b) => (a.failedAt ?? 0) - (b.failedAt ?? 0));
  if (trial === undefined) return null;
  return { target: trial.target, reason: "trial" };
}

/** Those for which it is so, or all where it is so for none. */
function preferred(tier: Candidate[], isPreferred: (candidate: Candidate) => boolean): Candidate[] {
  const some = tier.filter(isPreferred);
  return some.length > 0 ? some : tier;
}

function isUsable(candidate: Candidate, health: Health): boolean {
  return candidate.health === health && !candidate.barred && !candidate.open;
}

function soonest(tier: Candidate[], credit: Credit): Selection {
  const [first] = tier;
  if (first !== undefined && tier.length === 1) return { target: first.target, reason: "only" };
  const latest = asGoodAs(Math.min(...tier.map(({ firstTokenMs }) => firstTokenMs)));
  const near = tier.filter(({ firstTokenMs }) => firstTokenMs <= latest);
  const free = near.filter((candidate) => candidate.free);
  const equals = free.length > 0 ? free : near;
  const [only] = equals;
  if (only !== undefined && equals.length === 1) {
    return { target: only.target, reason: reasonFor(only, tier) };
  }
  const known = equals.find((candidate) => candidate.familiar);
  if (known !== undefined) return { target: known.target, reason: "prefix" };
  return { target: roundRobin(equals, credit).target, reason: "weight" };
}

/** What sets the one that is chosen apart from the others. */
function reasonFor(chosen: Candidate, tier: readonly Candidate[]): Selection["reason"] {
  const others = tier.filter((candidate) => candidate !== chosen);
  if (others.every(({ cachedTokens }) => cachedTokens < chosen.cachedTokens)) return "prefix";
  return chosen.resident && !others.some((each) => each.resident) ? "resident" : "least_busy";
}

function roundRobin(equals: Candidate[], credit: Credit): Candidate {
  let total = 0;
  let chosen = equals[0] as Candidate;
  let most = -Infinity;
  for (const candidate of equals) {
    const earned = (credit.get(candidate.target.backend) ?? 0) + candidate.weight;
    credit.set(candidate.target.backend, earned);
    total += candidate.weight;
    if (earned > most) {
      most = earned;
      chosen = candidate;
    }
  }
  credit.set(chosen.target.backend, most - total);
  return chosen;
}
