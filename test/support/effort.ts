/** How often what is repeated many times is repeated. */
import process from "node:process";
import { runtime } from "./gateway.ts";

/**
 * The same code decides on both runtimes: all of it on Bun, on Deno a part, which shows that the runtime does
 * its own share as well. `TIDEGATE_EFFORT=full`, which `bun run check` sets: all of it on both.
 *
 * @param all how often on Bun, 1 or more
 * @param part of that on Deno, (0, 1]
 */
export function effort(all: number, part = 1 / 3): number {
  const isFull = runtime === "bun" || process.env["TIDEGATE_EFFORT"] === "full";
  return isFull ? all : Math.ceil(all * part);
}
