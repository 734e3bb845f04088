import type { Health, Target } from "./snapshot.ts";

/** A target with what selection looks at. */
export interface Candidate {
  target: Target;
  health: Health;
  /** A request would start at once: a free slot, and nobody waiting for it. */
  free: boolean;
  /** It would, once its model is loaded; absent: as `free`. */
  vacant?: boolean;
  /** Running and waiting requests of the whole backend. */
  load: number;
  weight: number;
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
  reason: "only" | "least_busy" | "weight" | "trial";
}

/** Running credit per backend id for smooth weighted round robin; owned by the caller. */
export type Credit = Map<string, number>;

const TIERS: readonly Health[] = ["healthy", "degraded", "unknown"];

/**
 * Chooses where a request goes: the healthiest tier that has a target; in it those that can start
 * at once; of these the least load per weight; among equals smooth weighted round robin. Where only
 * unhealthy or open targets are left, one request at a time tries the least recently failed.
 *
 * @param credit changed by a choice among equals (nginx's algorithm: every contender earns its
 *   weight, the richest is chosen and pays the sum).
 * @returns null when no target may be used now.
 */
export function select(candidates: readonly Candidate[], credit: Credit): Selection | null {
  for (const health of TIERS) {
    const tier = candidates.filter(
      (candidate) => candidate.health === health && !candidate.barred && !candidate.open,
    );
    if (tier.length > 0) return leastBusy(tier, credit);
  }
  // One trial goes to the backend that has been left alone for longest; while it runs the others
  // are refused.
  if (candidates.some((candidate) => candidate.trying)) return null;
  const [trial] = candidates
    .filter((candidate) => !candidate.barred && (candidate.vacant ?? candidate.free))
    .toSorted((a, b) => (a.failedAt ?? 0) - (b.failedAt ?? 0));
  if (trial === undefined) return null;
  return { target: trial.target, reason: "trial" };
}

function leastBusy(tier: Candidate[], credit: Credit): Selection {
  const [first] = tier;
  if (first !== undefined && tier.length === 1) return { target: first.target, reason: "only" };
  const free = tier.filter((candidate) => candidate.free);
  const able = free.length > 0 ? free : tier;
  const loadOf = (candidate: Candidate) => candidate.load / candidate.weight;
  const least = Math.min(...able.map(loadOf));
  const equals = able.filter((candidate) => loadOf(candidate) === least);
  const chosen = roundRobin(equals, credit);
  return { target: chosen.target, reason: equals.length === 1 ? "least_busy" : "weight" };
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
