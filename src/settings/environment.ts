import { suggest } from "../core/suggest.ts";
import type { Mistake } from "./mistakes.ts";
import { coerce, scalarPaths } from "./shape.ts";

export type Environment = Readonly<Record<string, string | undefined>>;

/** A key of a client, from `TIDEGATE_API_KEYS`. */
export interface EnvironmentKey {
  key: string;
  tenant: string;
}

/** What variables set, as a tree like the file's. */
export type Tree = Record<string, unknown>;

/** `queue.maxWaitMs` → `TIDEGATE_QUEUE_MAX_WAIT_MS`. */
export function variableOf(path: readonly string[]): string {
  const words = path.map((part) => part.replaceAll(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase());
  return `TIDEGATE_${words.join("_")}`;
}

/** Each variable that sets one value, with the path of that value; the stronger of two comes last. */
export const SCALARS = new Map<string, readonly string[]>([
  ["PORT", ["server", "port"]],
  ["REDIS_URL", ["redis", "url"]],
  ["OTEL_EXPORTER_OTLP_ENDPOINT", ["telemetry", "otlpEndpoint"]],
  ["OTEL_SERVICE_NAME", ["telemetry", "serviceName"]],
  ...scalarPaths().map((path) => [variableOf(path), path] as const),
]);

const VARIABLES = ["TIDEGATE_CONFIG", "TIDEGATE_API_KEYS", "TIDEGATE_BACKENDS"];

/** An empty variable is an unset one, as the OpenTelemetry specification has it. */
export function withoutEmpty(variables: Environment): Environment {
  return Object.fromEntries(Object.entries(variables).filter(([, value]) => value !== ""));
}

/** The part of the configuration that the environment sets. */
export function treeFrom(environment: Environment): Tree {
  const tree: Record<string, Tree> = {};
  for (const [variable, path] of SCALARS) {
    const text = environment[variable];
    const [section = "", key = ""] = path;
    if (text !== undefined) (tree[section] ??= {})[key] = coerce(path, text);
  }
  const backends = environment["TIDEGATE_BACKENDS"];
  return backends === undefined ? tree : { ...tree, backends: backendsFrom(backends) };
}

/** The variable that a path got its value from, for a mistake in it. */
export function variableFor(path: string, environment: Environment): string | null {
  if (path.startsWith("backends") && environment["TIDEGATE_BACKENDS"] !== undefined) {
    return "TIDEGATE_BACKENDS";
  }
  const setting = [...SCALARS].filter(
    ([name, parts]) => parts.join(".") === path && environment[name] !== undefined,
  );
  return setting.at(-1)?.[0] ?? null;
}

/** `kind=url,kind=url`; the ids are the kind, then `kind-2`. One that needs no URL is `kind=`. */
function backendsFrom(list: string): Tree[] {
  const counts = new Map<string, number>();
  return entriesOf(list).map((entry) => {
    const [, kind, url = entry] = /^([\w-]+)=(.*)$/.exec(entry) ?? [];
    const id = numbered(kind ?? "backend", counts);
    if (kind === undefined) return { id, url };
    return url === "" ? { id, kind } : { id, kind, url };
  });
}

/** A name that is not taken: `vllm`, then `vllm-2`. */
export function numbered(name: string, counts: Map<string, number>): string {
  const count = (counts.get(name) ?? 0) + 1;
  counts.set(name, count);
  return count === 1 ? name : `${name}-${count}`;
}

function entriesOf(list: string): string[] {
  return list
    .split(",")
    .map((each) => each.trim())
    .filter((each) => each !== "");
}

/** `key,tenant=key`; a key may end in `=` itself, as base64 does. */
export function keysFrom(environment: Environment): EnvironmentKey[] {
  return entriesOf(environment["TIDEGATE_API_KEYS"] ?? "").map((each) => {
    const [, tenant, key] = /^([\w.-]+)=(.*[^=].*)$/.exec(each) ?? [];
    return tenant !== undefined && key !== undefined
      ? { tenant, key }
      : { tenant: "default", key: each };
  });
}

/** Variables that look like ours and are not: a line each. */
export function strangers(environment: Environment): string[] {
  const known = [...VARIABLES, ...SCALARS.keys()];
  return Object.keys(environment)
    .filter((name) => name.startsWith("TIDEGATE_") && !known.includes(name))
    .map((name) => {
      const meant = suggest(name, known);
      return `${name}: unknown variable, ignored${meant === null ? "" : ` (did you mean ${meant}?)`}`;
    });
}

/** More than any key of ours is deep: beyond it the stack would be in danger. */
const DEEPEST = 20;

/** Replaces `${VAR}` and `${VAR:-default}` in every string of the file. */
export function interpolate(
  value: unknown,
  environment: Environment,
  path: readonly PropertyKey[],
  mistaken: (path: readonly PropertyKey[], mistake: Omit<Mistake, "path">) => void,
): unknown {
  if (path.length > DEEPEST) {
    mistaken(path, { value: "…", expected: "nothing nested so deep", suggestion: null });
    return null;
  }
  if (typeof value === "string") {
    let whole = value;
    let complete = true;
    const text = value.replaceAll(
      /\$\{(\w+)(?::-([^}]*))?\}/g,
      (found, name: string, otherwise) => {
        whole = found;
        const replacement = environment[name] ?? (otherwise as string | undefined);
        if (replacement !== undefined) return replacement;
        complete = false;
        const expected = `environment variable ${name} to be set, or a default as in \${${name}:-…}`;
        mistaken(path, { value: found, expected, suggestion: null });
        return found;
      },
    );
    // A value that is a variable and nothing else may be a number: YAML and JSON quote it all the same.
    return complete && whole === value && text !== value ? coerce(path, text) : text;
  }
  if (Array.isArray(value)) {
    return value.map((each, at) => interpolate(each, environment, [...path, at], mistaken));
  }
  if (typeof value !== "object" || value === null) return value;
  const entries = Object.entries(value).map(
    ([key, each]) => [key, interpolate(each, environment, [...path, key], mistaken)] as const,
  );
  return Object.fromEntries(entries);
}
