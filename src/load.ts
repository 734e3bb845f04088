import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { resolve } from "node:path";
import type { Config } from "./config.ts";
import { check, describe, type Mistake } from "./mistakes.ts";
import { suggest } from "./core/suggest.ts";

/** What stands on the command line, as far as it sets configuration. */
export interface Flags {
  config?: string | undefined;
  host?: string | undefined;
  port?: number | undefined;
  logLevel?: string | undefined;
}

export type Environment = Readonly<Record<string, string | undefined>>;

/** A key of a client, from `TIDEGATE_API_KEYS`. */
export interface EnvironmentKey {
  key: string;
  tenant: string;
}

export interface Settings {
  config: Config;
  /** Keys that came from the environment, beside `config.auth.keys`. */
  environmentKeys: EnvironmentKey[];
  /** Where the configuration came from, for the banner. */
  source: string;
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

const FILES = ["gateway.config.ts", "gateway.config.json"];
const VARIABLES = ["TIDEGATE_CONFIG", "TIDEGATE_API_KEYS"];

/**
 * Reads the configuration: flag over environment over file over default.
 *
 * @throws ConfigError when anything in it is wrong, or the file named does not exist or cannot be read.
 */
export async function loadSettings(
  flags: Flags,
  variables: Environment,
  directory: string,
): Promise<Settings> {
  // An empty variable is an unset one, as the OpenTelemetry specification has it.
  const environment: Environment = Object.fromEntries(
    Object.entries(variables).filter(([, value]) => value !== ""),
  );
  const named = flags.config ?? environment["TIDEGATE_CONFIG"];
  const found = named ?? FILES.find((file) => existsSync(resolve(directory, file)));
  const source = found ?? "defaults";
  const file = found === undefined ? {} : await readConfigFile(resolve(directory, found), found);
  const missing: Mistake[] = [];
  const raw = overlay(interpolate(file, environment, "", missing), flags, environment);
  const checked = check(raw);
  const mistakes = [...missing, ...("mistakes" in checked ? checked.mistakes : [])];
  const environmentKeys = keysOf(environment["TIDEGATE_API_KEYS"] ?? "");
  mistakes.push(...bindMistakes(checked, raw, environmentKeys));
  if (mistakes.length > 0 || !("config" in checked)) throw new ConfigError(source, mistakes);
  const notes = [...strangers(environment), ...notYet(checked.config)];
  return { config: checked.config, environmentKeys, source, notes };
}

async function readConfigFile(path: string, shown: string): Promise<unknown> {
  const unreadable = (reason: string) =>
    new ConfigError(shown, [
      {
        path: "",
        value: undefined,
        expected: `a readable file at ${path}: ${reason}`,
        suggestion: null,
      },
    ]);
  if (!/\.(ts|json)$/.test(path)) throw unreadable("its name has to end in .ts or .json");
  if (!existsSync(path)) throw unreadable("there is none");
  try {
    if (path.endsWith(".json")) return JSON.parse(await readFile(path, "utf8"));
    const module: unknown = await import(path);
    const exported = (module as { default?: unknown }).default;
    if (exported === undefined) throw new Error("it has no export default");
    return exported;
  } catch (error) {
    throw unreadable(error instanceof Error ? error.message : String(error));
  }
}

/** Replaces `${VAR}` and `${VAR:-default}` in every string of the file. */
function interpolate(
  value: unknown,
  environment: Environment,
  path: string,
  missing: Mistake[],
): unknown {
  if (typeof value === "string") {
    return value.replaceAll(/\$\{(\w+)(?::-([^}]*))?\}/g, (whole, name: string, otherwise) => {
      const found = environment[name] ?? (otherwise as string | undefined);
      if (found !== undefined) return found;
      const expected = `environment variable ${name} to be set, or a default as in \${${name}:-…}`;
      missing.push({ path, value: whole, expected, suggestion: null });
      return whole;
    });
  }
  if (Array.isArray(value)) {
    return value.map((each, at) => interpolate(each, environment, `${path}[${at}]`, missing));
  }
  if (typeof value !== "object" || value === null) return value;
  const entries = Object.entries(value).map(([key, each]) => {
    const name = /^[\w-]+$/.test(key) ? key : JSON.stringify(key);
    const below = path === "" ? name : `${path}.${name}`;
    return [key, interpolate(each, environment, below, missing)] as const;
  });
  return Object.fromEntries(entries);
}

function overlay(file: unknown, flags: Flags, environment: Environment): unknown {
  if (typeof file !== "object" || file === null || Array.isArray(file)) return file;
  const raw = { ...file } as Record<string, Record<string, unknown> | undefined>;
  const set = (section: string, key: string, value: unknown) => {
    // A section that is no section is left for the check to name.
    const given: unknown = raw[section] ?? {};
    if (value === undefined || typeof given !== "object") return;
    raw[section] = { ...raw[section], [key]: value };
  };
  const port = environment["PORT"];
  // A port that is no number is left as it stands: the check names it.
  set(
    "server",
    "port",
    flags.port ?? (port !== undefined && /^\d+$/.test(port) ? Number(port) : port),
  );
  set("server", "host", flags.host);
  set("server", "logLevel", flags.logLevel);
  set("telemetry", "otlpEndpoint", environment["OTEL_EXPORTER_OTLP_ENDPOINT"]);
  set("telemetry", "serviceName", environment["OTEL_SERVICE_NAME"]);
  return raw;
}

/** `key,tenant=key`; a key may end in `=` itself, as base64 does. */
function keysOf(list: string): EnvironmentKey[] {
  return list
    .split(",")
    .map((each) => each.trim())
    .filter((each) => each !== "")
    .map((each) => {
      const [, tenant, key] = /^([\w.-]+)=(.*[^=].*)$/.exec(each) ?? [];
      return tenant !== undefined && key !== undefined
        ? { tenant, key }
        : { tenant: "default", key: each };
    });
}

/** Loopback by name or number: 127.0.0.0/8, `::1`, `localhost`. */
export function isLoopback(host: string): boolean {
  const bare = host.replace(/^\[|\]$/g, "").toLowerCase();
  return bare === "localhost" || bare === "::1" || /^127\.\d+\.\d+\.\d+$/.test(bare);
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

function strangers(environment: Environment): string[] {
  return Object.keys(environment)
    .filter((name) => name.startsWith("TIDEGATE_") && !VARIABLES.includes(name))
    .map((name) => {
      const meant = suggest(name, VARIABLES);
      return `${name}: unknown variable, ignored${meant === null ? "" : ` (did you mean ${meant}?)`}`;
    });
}

/** Sections that must be accepted before they are in effect: said at every start. */
function notYet(config: Config): string[] {
  const models = Object.entries(config.models);
  const set = [
    ...(config.cache === undefined ? [] : ["cache"]),
    ...(config.circuitBreaker === undefined ? [] : ["circuitBreaker"]),
    ...models
      .filter(([, each]) => each.fallback !== undefined)
      .map(([name]) => `models.${name}.fallback`),
    ...models
      .filter(([, each]) => each.maxOutputTokens !== undefined)
      .map(([name]) => `models.${name}.maxOutputTokens`),
  ];
  return set.map((key) => `${key}: accepted, in effect from a later version`);
}
