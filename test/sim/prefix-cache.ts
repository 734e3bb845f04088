import type { Segment } from "./service.ts";

/** What an engine remembers of prompts, the longest unused going first. */
export interface PrefixCache {
  /** How many tokens at the beginning of this prompt need not be computed. */
  match(prompt: readonly Segment[]): number;
  store(prompt: readonly Segment[]): void;
}

/** Each segment under the name of everything up to it. */
function chainOf(prompt: readonly Segment[]): { key: string; tokens: number }[] {
  let key = "";
  return prompt.map(({ id, tokens }) => {
    key += `/${id}`;
    return { key, tokens };
  });
}

/** @param capacity in tokens. */
export function createPrefixCache(capacity: number): PrefixCache {
  const kept = new Map<string, number>();
  let total = 0;
  const put = (key: string, tokens: number) => {
    if (!kept.delete(key)) total += tokens;
    kept.set(key, tokens);
  };
  return {
    match(prompt) {
      let tokens = 0;
      for (const segment of chainOf(prompt)) {
        if (!kept.has(segment.key)) break;
        tokens += segment.tokens;
      }
      return tokens;
    },
    store(prompt) {
      // The end first: what comes after a forgotten beginning would be of no use.
      for (const { key, tokens } of chainOf(prompt).toReversed()) put(key, tokens);
      for (const [key, tokens] of kept) {
        if (total <= capacity) break;
        kept.delete(key);
        total -= tokens;
      }
    },
  };
}
