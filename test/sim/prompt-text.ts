import type { Ticket } from "../../src/core/lanes.ts";
import { chainOf } from "../../src/core/prefix.ts";
import { sizeOf, type Request } from "./service.ts";

/** Characters of a token. */
const TOKEN_LENGTH = 4;

/** A prompt as the gateway sees it: text as long as its tokens are, the same for the same segments. */
export function promptOf({
  model,
  prompt,
  flow,
  answerId,
}: Request): NonNullable<Ticket["prompt"]> {
  const pieces = prompt.map(({ id, tokens }) => {
    const length = Math.round(tokens * TOKEN_LENGTH);
    return `${id} `.repeat(Math.ceil(length / (id.length + 1))).slice(0, length);
  });
  // Only conversations go on.
  const session = answerId === null ? null : flow;
  return { tokens: sizeOf(prompt), chain: chainOf(model, pieces), session, shows: true };
}
