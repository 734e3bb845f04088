/** A place to send a request to, and how many tokens prompt and answer may be there; null: not known. */
export interface Place {
  contextLength: number | null;
}

/** No estimate is wrong by more. */
const MARGIN = 1.5;

/**
 * Where a request of about so many tokens fits.
 *
 * What is not known counts as enough. Only the prompt can be too long: an answer that runs out of context
 * is shorter than its client would have let it be, and clients ask for far more than they get.
 *
 * @param output what the client asks for at most; 0: it does not say.
 * @returns `preferred`: the places with room for both, or else those with the most room. `exceeded`: the
 *   largest context, where the prompt is too long for it beyond doubt; else null.
 */
export function contextFor<T extends Place>(
  places: readonly T[],
  prompt: number,
  output: number,
): { preferred: readonly T[]; exceeded: number | null } {
  const roomOf = ({ contextLength }: Place) => contextLength ?? Infinity;
  const largest = Math.max(0, ...places.map(roomOf));
  const enough = places.filter((place) => roomOf(place) >= prompt + output);
  const preferred = enough.length > 0 ? enough : places.filter((each) => roomOf(each) === largest);
  return { preferred, exceeded: prompt > MARGIN * largest && largest > 0 ? largest : null };
}
