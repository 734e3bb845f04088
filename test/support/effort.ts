/** How often what is repeated many times is repeated. */
import process from "node:process";
import { runtime } from "./gateway.ts";

/**
 * All of it on Bun, on Deno a part, which shows that the runtime does its own share as well.
 * `TIDEGATE_EFFORT=full`, which `bun run check` sets: all of it on both. `part`, which CI sets: a part on both.
 *
 * @param all how often, 1 or more
 * @param part of that, (0, 1]
 */
export function effort(all: number, part = 1 / 3): number {
  const wanted = process.env["TIDEGATE_EFFORT"] ?? (runtime === "bun" ? "full" : "part");
  return wanted === "full" ? all : Math.ceil(all * part);
}
