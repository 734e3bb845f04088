import { createRandom } from "../support/random.ts";

/** From 0 up to 1; the same seed gives the same sequence everywhere. */
export type Random = () => number;

/** A sequence of its own for each part of a workload: what one does never changes another's. */
export function fork(random: Random): Random {
  return createRandom(Math.floor(random() * 2 ** 32));
}

/** The time to the next of independent arrivals that come `mean` apart. */
export function exponential(random: Random, mean: number): number {
  return -Math.log(1 - random()) * mean;
}

/** Lognormal, as lengths of answers are. @param spread standard deviation per mean; 0: always the mean. */
export function lognormal(random: Random, mean: number, spread: number): number {
  if (spread === 0) return mean;
  const variance = Math.log(1 + spread * spread);
  const normal = Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  return Math.exp(Math.log(mean) - variance / 2 + Math.sqrt(variance) * normal);
}

export function pick<T>(random: Random, from: readonly T[]): T {
  return from[Math.floor(random() * from.length)] as T;
}
