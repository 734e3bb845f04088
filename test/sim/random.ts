/** From 0 up to 1; the same seed gives the same sequence everywhere. */
export type Random = () => number;

/** mulberry32: 32 bits of state are plenty for a workload, and it is the same on every runtime. */
export function createRandom(seed: number): Random {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

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
