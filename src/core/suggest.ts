/**
 * Optimal string alignment distance (edits and swaps of neighbours), case ignored.
 * Source: https://en.wikipedia.org/wiki/Damerau%E2%80%93Levenshtein_distance
 */
function distance(left: string, right: string): number {
  let beforePrevious: number[] = [];
  let previous = Array.from({ length: right.length + 1 }, (_, index) => index);
  for (let row = 1; row <= left.length; row++) {
    const current = [row];
    for (let column = 1; column <= right.length; column++) {
      const same = left[row - 1] === right[column - 1];
      let best = Math.min(
        (previous[column] ?? 0) + 1,
        (current[column - 1] ?? 0) + 1,
        (previous[column - 1] ?? 0) + (same ? 0 : 1),
      );
      const swapped = left[row - 1] === right[column - 2] && left[row - 2] === right[column - 1];
      if (row > 1 && column > 1 && swapped) {
        best = Math.min(best, (beforePrevious[column - 2] ?? 0) + 1);
      }
      current.push(best);
    }
    beforePrevious = previous;
    previous = current;
  }
  return previous[right.length] ?? 0;
}

/**
 * The known word that was most likely meant, or null when none is close: at most a third of the
 * letters may differ, or the word must begin with what was written.
 */
export function suggest(written: string, known: Iterable<string>): string | null {
  // A client may send any length: the comparison is quadratic, so it looks at a bounded part.
  const needle = written.slice(0, 64).toLowerCase();
  let best: string | null = null;
  let bestScore = Math.max(1, Math.floor(needle.length / 3)) + 0.5;
  for (const word of known) {
    const candidate = word.slice(0, 64).toLowerCase();
    const score =
      needle.length >= 2 && candidate !== needle && candidate.startsWith(needle)
        ? 0.5
        : distance(needle, candidate);
    if (score < bestScore) {
      best = word;
      bestScore = score;
    }
  }
  return best;
}
