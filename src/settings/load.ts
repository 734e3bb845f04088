import { existsSync } from "node:fs";
import { resolve } from "node:path";
import { isLoopback, sha256 } from "../caller.ts";
import type { Config } from "../config.ts";
import { suggest } from "../core/suggest.ts";
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
import { readKeyFiles, type KeyFiles } from "./key-files.ts";
import { check, describe, tenantsIn, type Mistake } from "./mistakes.ts";
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
  /** Public keys of the issuers that name a file for them. */
  keyFiles: KeyFiles;
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
  { flags, environment: all, directory }: Sources,
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
  const read = readKeyFiles(raw, directory);
  const wrong = [
    ...("mistakes" in checked ? checked.mistakes : []),
    ...guardMistakes(checked, raw, environmentKeys),
    ...strangeTenants(raw, environmentKeys),
    ...read.mistakes,
  ];
  mistakes.push(...wrong.map((mistake) => withSource(mistake, flags, environment)));
  if (mistakes.length > 0 || !("config" in checked)) throw new ConfigError(source, mistakes);
  const values = valuesOf(checked.config, [
    ["flag", flagged],
    ["environment", variables],
    ["file", fileTree],
  ]);
  const notes = strangers(environment);
  const { keyFiles } = read;
  return { config: checked.config, environmentKeys, keyFiles, source, values, notes };
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

/** Nobody may get in by accident, nor further than meant. */
function guardMistakes(
  checked: ReturnType<typeof check>,
  raw: unknown,
  environmentKeys: EnvironmentKey[],
): Mistake[] {
  // Mistakes elsewhere do not keep these sections from being judged.
  const { server, auth, tenants, admin } = (raw ?? {}) as Tree;
  const sections = "config" in checked ? checked : check({ server, auth, tenants, admin });
  if (!("config" in sections)) return [];
  const mistakes = sharedKeys(sections.config, environmentKeys);
  const { host, insecure } = sections.config.server;
  const { keys, jwt } = sections.config.auth;
  const guarded = keys.length + jwt.length + environmentKeys.length > 0;
  if (isLoopback(host) || insecure || guarded) return mistakes;
  const expected =
    "who may call, since others can reach this address: set auth.keys (or TIDEGATE_API_KEYS), " +
    'or auth.jwt, or host: "127.0.0.1", or server.insecure: true to let everyone in';
  return [...mistakes, { path: "server.host", value: host, expected, suggestion: null }];
}

/** A key is one tenant's, and the operator's is no client's. */
function sharedKeys({ auth, admin }: Config, environmentKeys: EnvironmentKey[]): Mistake[] {
  const hashOf = (key: string) => `sha256:${Buffer.from(sha256(key)).toString("hex")}`;
  const keys = [
    ...auth.keys.map((each, at) => {
      const hash = "key" in each ? hashOf(each.key) : each.hash;
      return { path: `auth.keys[${at}]`, tenant: each.tenant, hash };
    }),
    ...environmentKeys.map(({ key, tenant }) => {
      return { path: "TIDEGATE_API_KEYS", tenant, hash: hashOf(key) };
    }),
  ];
  const mistakes: Mistake[] = [];
  const mistaken = (path: string, expected: string) =>
    mistakes.push({ path, value: "***", expected, suggestion: null });
  for (const { path, tenant, hash } of keys) {
    const first = keys.find((each) => each.hash === hash);
    if (first === undefined || first.tenant === tenant) continue;
    mistaken(path, `a key of its own: ${first.path} has this one, for tenant ${first.tenant}`);
  }
  const adminHash = admin.key === undefined ? null : hashOf(admin.key);
  const same = keys.find(({ hash }) => hash === adminHash);
  if (same !== undefined) mistaken("admin.key", `a key that is no client's: ${same.path} has it`);
  return mistakes;
}

/** Keys of the environment may name only tenants that are listed. */
function strangeTenants(raw: unknown, environmentKeys: EnvironmentKey[]): Mistake[] {
  const known = tenantsIn(raw);
  const strange = new Set(environmentKeys.map(({ tenant }) => tenant));
  for (const name of known) strange.delete(name);
  return [...strange].map((name) => ({
    path: "TIDEGATE_API_KEYS",
    value: `${name}=***`,
    expected: `a tenant that is listed in tenants: ${known.join(", ")}`,
    suggestion: suggest(name, known),
  }));
}
