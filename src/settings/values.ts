import { shown } from "./mistakes.ts";
import { pathText, type Path } from "./shape.ts";

/** Where a value came from; the stronger wins, in this order. */
export type Origin = "flag" | "environment" | "file" | "discovered" | "default";

/** One value of a configuration as it may be printed. */
export interface Value {
  path: string;
  /** Secrets as `***`. */
  value: unknown;
  origin: Origin;
}

/** One difference between two configurations; null where there is nothing. */
export interface Change {
  path: string;
  from: unknown;
  to: unknown;
}

interface Leaf {
  path: Path;
  /** The path with ids in the place of positions: what stays the same when a list shifts. */
  name: string;
  value: unknown;
}

function isTree(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Every single value, and every list of single values, in the order of the configuration. */
function leavesOf(value: unknown, path: Path = [], name = ""): Leaf[] {
  if (Array.isArray(value) && value.some(isTree)) {
    return value.flatMap((each, at) => {
      const id = isTree(each) && typeof each["id"] === "string" ? each["id"] : String(at);
      return leavesOf(each, [...path, at], `${name}[${id}]`);
    });
  }
  if (!isTree(value)) return value === undefined ? [] : [{ path, name, value }];
  return Object.entries(value).flatMap(([key, each]) => {
    const below = pathText([key]);
    return leavesOf(each, [...path, key], name === "" ? below : `${name}.${below}`);
  });
}

/** Where a value comes from, given what was set, the strongest first. */
function originOf(path: Path, layers: readonly [Origin, unknown][]): Origin {
  for (const [origin, tree] of layers) {
    let value = tree;
    let inList = false;
    for (const part of path) {
      inList ||= Array.isArray(value);
      value = isTree(value) || Array.isArray(value) ? Reflect.get(value, part) : undefined;
    }
    if (value !== undefined) return origin;
    // A list is replaced whole: what it leaves out is nobody else's.
    if (inList) return "default";
  }
  return "default";
}

/**
 * Every value of a checked configuration with its origin.
 *
 * @param layers what was set, the strongest first.
 */
export function valuesOf(config: object, layers: readonly [Origin, unknown][]): Value[] {
  return leavesOf(config).map(({ path, name, value }) => {
    return { path: name, value: shown(path, value), origin: originOf(path, layers) };
  });
}

/** What differs between two checked configurations. */
export function changesBetween(before: object, after: object): Change[] {
  const old = new Map(leavesOf(before).map((leaf) => [leaf.name, leaf]));
  const changes: Change[] = [];
  for (const leaf of leavesOf(after)) {
    const was = old.get(leaf.name);
    old.delete(leaf.name);
    if (JSON.stringify(was?.value) === JSON.stringify(leaf.value)) continue;
    const from = was === undefined ? null : shown(was.path, was.value);
    changes.push({ path: leaf.name, from, to: shown(leaf.path, leaf.value) });
  }
  for (const leaf of old.values()) {
    changes.push({ path: leaf.name, from: shown(leaf.path, leaf.value), to: null });
  }
  return changes;
}
