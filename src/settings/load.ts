import { existsSync } from "node:fs";
import { resolve } from "node:path";
import { isLoopback } from "../caller.ts";
import type { Config } from "../config.ts";
import {
  interpolate,
  keysFrom,
  strangers,
  treeFrom,
  variableFor,
  withoutEmpty,
  type Environment,
  type EnvironmentKey,
  type Tree,
} from "./environment.ts";
import { check, describe, type Mistake } from "./mistakes.ts";
import { readConfigFile } from "./read-file.ts";
import { pathText } from "./shape.ts";
import { valuesOf, type Value } from "./values.ts";

/** What stands on the command line, as far as it sets configuration. */
export interface Flags {
  config?: string | undefined;
  host?: string | undefined;
  port?: number | undefined;
  logLevel?: string | undefined;
}

/** Where a configuration is put together from. The same at start and at every reload. */
export interface Sources {
  flags: Flags;
  environment: Environment;
  /** Where a file is looked for that nobody named. */
  directory: string;
}

export interface Settings {
  config: Config;
  /** Keys that came from the environment, beside `config.auth.keys`. */
  environmentKeys: EnvironmentKey[];
  /** Where the configuration came from, for the banner. */
  source: string;
  /** Every value, and where it came from. */
  values: Value[];
  /** Lines a person should read at start. */
  notes: string[];
}

/** The configuration cannot be used; `mistakes` has every reason, the message all of them as text. */
export class ConfigError extends Error {
  override readonly name = "ConfigError";
  readonly mistakes: Mistake[];

  constructor(source: string, mistakes: Mistake[]) {
    const lines = mistakes.map((mistake) => `  ✖ ${describe(mistake)}`);
    const count = mistakes.length === 1 ? "1 mistake" : `${mistakes.length} mistakes`;
    super(`${source}: ${count}\n${lines.join("\n")}`);
    this.mistakes = mistakes;
  }
}

const FLAGS = [
  ["host", "--host", "server.host"],
  ["port", "--port", "server.port"],
  ["logLevel", "--log-level", "server.logLevel"],
] as const;

const FILES = ["gateway.config.ts", "gateway.config.json", "gateway.config.yaml"];

function namedFile({ flags, environment }: Sources): string | undefined {
  return flags.config ?? withoutEmpty(environment)["TIDEGATE_CONFIG"];
}

/** The files whose change means another configuration: the one named, else those looked for. */
export function watchedFiles(sources: Sources): string[] {
  const named = namedFile(sources);
  return (named === undefined ? FILES : [named]).map((file) => resolve(sources.directory, file));
}

/**
 * Reads the configuration: flag over environment over file over default.
 *
 * @throws ConfigError when anything in it is wrong, or the file named does not exist or cannot be read.
 */
export async function loadSettings(sources: Sources): Promise<Settings> {
  const { directory } = sources;
  const found = namedFile(sources) ?? FILES.find((file) => existsSync(resolve(directory, file)));
  if (found === undefined) return settle({}, "defaults", sources);
  const path = resolve(directory, found);
  const file = await readConfigFile(path).catch((error: Error) => {
    const expected = `a readable file at ${path}: ${error.message}`;
    throw new ConfigError(found, [{ path: "", value: undefined, expected, suggestion: null }]);
  });
  return settle(file, found, sources);
}

/**
 * Puts what the file says together with environment and flags, and checks the whole.
 *
 * @throws ConfigError
 */
export function settle(
  file: unknown,
  source: string,
  { flags, environment: all }: Sources,
): Settings {
  const environment = withoutEmpty(all);
  const mistakes: Mistake[] = [];
  const fileTree = withoutSchema(
    interpolate(file, environment, [], (path, mistake) => {
      mistakes.push({ ...mistake, path: pathText(path) });
    }),
  );
  const variables = treeFrom(environment);
  const { host, port, logLevel } = flags;
  const flagged = { server: { host, port, logLevel } };
  const raw = merge(merge(fileTree, variables), flagged);
  const checked = check(raw);
  const environmentKeys = keysFrom(environment);
  const wrong = [
    ...("mistakes" in checked ? checked.mistakes : []),
    ...bindMistakes(checked, raw, environmentKeys),
  ];
  mistakes.push(...wrong.map((mistake) => withSource(mistake, flags, environment)));
  if (mistakes.length > 0 || !("config" in checked)) throw new ConfigError(source, mistakes);
  const values = valuesOf(checked.config, [
    ["flag", flagged],
    ["environment", variables],
    ["file", fileTree],
  ]);
  const notes = [...strangers(environment), ...notYet(checked.config)];
  return { config: checked.config, environmentKeys, source, values, notes };
}

/** Editors find the schema by this key in a JSON file. */
function withoutSchema(file: unknown): unknown {
  if (!isTree(file) || !("$schema" in file)) return file;
  const { $schema: _, ...rest } = file;
  return rest;
}

function isTree(value: unknown): value is Tree {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** What is set in `over` wins; lists are replaced whole. What is no tree is left for the check to name. */
function merge(base: unknown, over: Tree): unknown {
  if (!isTree(base)) return base;
  const merged: Tree = { ...base };
  for (const [key, value] of Object.entries(over)) {
    if (value === undefined) continue;
    if (!isTree(value)) merged[key] = value;
    else if (Object.values(value).some((each) => each !== undefined)) {
      merged[key] = merge(merged[key] === undefined ? {} : merged[key], value);
    }
  }
  return merged;
}

/** Says so where the value did not come from the file. */
function withSource(mistake: Mistake, flags: Flags, environment: Environment): Mistake {
  const { path } = mistake;
  const flag = FLAGS.find(([key, , at]) => path === at && flags[key] !== undefined)?.[1];
  const source = flag ?? variableFor(path, environment);
  if (source === null) return mistake;
  return { ...mistake, expected: `${mistake.expected} (it comes from ${source})` };
}

function bindMistakes(
  checked: ReturnType<typeof check>,
  raw: unknown,
  environmentKeys: EnvironmentKey[],
): Mistake[] {
  // Mistakes elsewhere do not keep these two sections from being judged.
  const { server, auth } = (raw ?? {}) as { server?: unknown; auth?: unknown };
  const sections = "config" in checked ? checked : check({ server, auth });
  if (!("config" in sections)) return [];
  const { host, insecure } = sections.config.server;
  const guarded = sections.config.auth.keys.length > 0 || environmentKeys.length > 0;
  if (isLoopback(host) || insecure || guarded) return [];
  const expected =
    "who may call, since others can reach this address: set auth.keys (or TIDEGATE_API_KEYS), " +
    'or host: "127.0.0.1", or server.insecure: true to let everyone in';
  return [{ path: "server.host", value: host, expected, suggestion: null }];
}

/** Sections that must be accepted before they are in effect: said at every start. */
function notYet(config: Config): string[] {
  const models = Object.entries(config.models);
  const set = [
    ...(config.cache === undefined ? [] : ["cache"]),
    ...models
      .filter(([, each]) => each.fallback !== undefined)
      .map(([name]) => pathText(["models", name, "fallback"])),
    ...models
      .filter(([, each]) => each.maxOutputTokens !== undefined)
      .map(([name]) => pathText(["models", name, "maxOutputTokens"])),
  ];
  return set.map((key) => `${key}: accepted, in effect from a later version`);
}
