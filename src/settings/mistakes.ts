import type { z } from "zod";
import { schema, type Config } from "../config.ts";
import { suggest } from "../core/suggest.ts";
import { knownKeys, pathText, type Path } from "./shape.ts";

/** One thing that is wrong in a configuration, with what is needed to put it right. */
export interface Mistake {
  path: string;
  /** As written, secrets as `***`; undefined when the key is missing. */
  value: unknown;
  expected: string;
  suggestion: string | null;
}

/** Keys of the contract that this version does not have yet: said so instead of guessed at. */
const LATER = new Set(["slowMs"]);

const SECRET = /key|hash|auth|secret|pass|token(?!s)|credential|bearer|admin/i;

/** Below `auth`, where whatever is misspelt or misplaced may be a secret, what is none. */
const NO_SECRET =
  /^auth\.(?:keys\.\d+\.tenant|jwt\.\d+\.(?:issuer|audience|jwksUrl|jwksFile|algorithms|tenantClaim))(?:\.\d+)?$/;

/** A URL as it may be printed: without user, password and query, any of which may be a secret. */
function shownUrl(text: string): string {
  return text
    .replaceAll(/(\w+:\/\/|(?:https?|rediss?):)\S*@/gi, "$1***@")
    .replaceAll(/(\w+:\/\/[^\s?#]*[?#])\S+/g, "$1***");
}

/**
 * A value as it may be printed: nothing below a key that could hold a secret, and no secret in a URL.
 *
 * @param path of the value; names of models and tenants in it are nobody's secret.
 */
export function shown(path: Path, value: unknown): unknown {
  if (typeof value !== "string" && (typeof value !== "object" || value === null)) return value;
  if (Array.isArray(value) && value.length === 0) return value;
  const keys = path[0] === "models" || path[0] === "tenants" ? path.toSpliced(1, 1) : path;
  const mayBeSecret = keys.some((part) => SECRET.test(String(part)));
  if (mayBeSecret && !NO_SECRET.test(path.map(String).join("."))) return "***";
  if (typeof value === "string") return shownUrl(value);
  if (Array.isArray(value)) return value.map((each, at) => shown([...path, at], each));
  const entries = Object.entries(value).map(([key, each]) => [key, shown([...path, key], each)]);
  return Object.fromEntries(entries);
}

function valueAt(raw: unknown, path: Path): unknown {
  return path.reduce<unknown>(
    (value, part) => (value as Record<PropertyKey, unknown> | null | undefined)?.[part],
    raw,
  );
}

function mistakesOf(issue: z.core.$ZodIssue, raw: unknown, base: Path = []): Mistake[] {
  const path = [...base, ...issue.path];
  if (issue.code === "unrecognized_keys") {
    return issue.keys.map((key) => {
      const known = knownKeys(path);
      return {
        path: pathText([...path, key]),
        value: shown([...path, key], valueAt(raw, [...path, key])),
        expected: LATER.has(key)
          ? "nothing yet: this key comes with a later version"
          : `one of ${known.join(", ")}`,
        // A key of the other alternative of a union is known, and still not allowed here.
        suggestion: LATER.has(key) || known.includes(key) ? null : suggest(key, known),
      };
    });
  }
  // Of a union the alternative that fits best is the one with the fewest complaints.
  if (issue.code === "invalid_union" && issue.errors.length > 0) {
    const [nearest] = issue.errors.toSorted((a, b) => a.length - b.length);
    if (typeof valueAt(raw, path) === "object" && nearest !== undefined) {
      const deepest = issue.errors.find((errors) => errors.every((each) => each.path.length > 0));
      return (deepest ?? nearest).flatMap((each) => mistakesOf(each, raw, path));
    }
  }
  const text = pathText(path);
  // Of a name that may not be one, the rule for names and not for what stands there.
  if (issue.code === "invalid_key") {
    const expected = issue.issues.map(({ message }) => wanted(message)).join(", ");
    return [{ path: text, value: path.at(-1), expected, suggestion: null }];
  }
  const value = valueAt(raw, path);
  const options = issue.code === "invalid_value" ? issue.values.map(String) : [];
  return [
    {
      path: text,
      value: shown(path, value),
      expected: expectedBy(issue),
      suggestion: typeof value === "string" ? suggest(value, options) : null,
    },
  ];
}

function expectedBy(issue: z.core.$ZodIssue): string {
  if (issue.code === "invalid_value") {
    return `${issue.values.length > 1 ? "one of " : ""}${issue.values.map(String).join(", ")}`;
  }
  // Of a union each alternative says what it would take of this very value.
  if (issue.code === "invalid_union" && issue.errors.length > 0) {
    const alternatives = issue.errors.flatMap((errors) =>
      errors.filter(({ path }) => path.length === 0).map(expectedBy),
    );
    return [...new Set(alternatives)].join(", or ");
  }
  return wanted(issue.message);
}

/** zod's sentence behind "expected". */
function wanted(message: string): string {
  return message
    .replace(/^(?:Invalid input|Too small|Too big): /, "")
    .replace(/^expected (?:number to be (?=[<>]))?/, "")
    .replace(/, received \S+$/, "");
}

export function listOf(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

export function recordOf(value: unknown): Record<string, unknown> {
  return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : {};
}

/** Keys that could have no effect beside the others of the same backend. */
function uselessKeys(backend: Record<string, unknown>, at: number): Mistake[] {
  const mistakes: Mistake[] = [];
  const useless = (key: string, expected: string) => {
    const path = `backends[${at}].${key}`;
    mistakes.push({ path, value: shown([key], backend[key]), expected, suggestion: null });
  };
  for (const key of ["include", "exclude"]) {
    if (backend[key] === undefined || backend["models"] === undefined) continue;
    useless(key, "no such key beside models, which already says what is served");
  }
  if (backend["discover"] === undefined) return mistakes;
  const url = URL.parse(String(backend["url"]));
  if (backend["kind"] === "demo") {
    useless("discover", "no such key: the demo engine is in this process");
  } else if (url?.protocol === "https:") {
    useless("discover", "an http URL: a certificate is not for the addresses behind a name");
  } else if (url !== null && /^[\d.]+$|^\[/.test(url.hostname)) {
    useless("discover", "a host name in url, whose A records are looked up; this is an address");
  }
  return mistakes;
}

/** The tenants there are, `default` among them; of a raw configuration. */
export function tenantsIn(raw: unknown): string[] {
  return [...new Set(["default", ...Object.keys(recordOf(recordOf(raw)["tenants"]))])];
}

/** Tenants that keys name, and issuers that say where their keys are. */
function accessMistakes(root: Record<string, unknown>): Mistake[] {
  const mistakes: Mistake[] = [];
  const auth = recordOf(root["auth"]);
  const tenants = tenantsIn(root);
  for (const [at, key] of listOf(auth["keys"]).entries()) {
    const { tenant } = recordOf(key);
    if (typeof tenant !== "string" || tenants.includes(tenant)) continue;
    const suggestion = suggest(tenant, tenants);
    const expected = `a name that is listed in tenants: ${tenants.join(", ")}`;
    mistakes.push({ path: `auth.keys[${at}].tenant`, value: tenant, expected, suggestion });
  }
  for (const [at, issuer] of listOf(auth["jwt"]).map(recordOf).entries()) {
    const path = `auth.jwt[${at}]`;
    const { jwksUrl, jwksFile } = issuer;
    if ((jwksUrl === undefined) === (jwksFile === undefined)) {
      const expected = "either jwksUrl or jwksFile: where the issuer's public keys are";
      const value = jwksUrl === undefined ? undefined : "both";
      mistakes.push({ path, value, expected, suggestion: null });
    }
    const url = URL.parse(String(jwksUrl));
    if (url !== null && url.username + url.password !== "") {
      const expected = "a URL without user and password: public keys need none";
      const value = shown(["auth", "jwt", at, "jwksUrl"], jwksUrl);
      mistakes.push({ path: `${path}.jwksUrl`, value, expected, suggestion: null });
    }
  }
  return mistakes;
}

/** What no single key can know. Reads the raw value, so that it is reported beside all the rest. */
function crossCheck(raw: unknown): Mistake[] {
  const root = recordOf(raw);
  const mistakes = accessMistakes(root);
  const backends = listOf(root["backends"]).map(recordOf);
  const ids = backends.map((backend) => backend["id"]).filter((id) => typeof id === "string");
  for (const [at, backend] of backends.entries()) {
    if (backends.findIndex((other) => other["id"] === backend["id"]) !== at) {
      const expected = "an id that no other backend has";
      mistakes.push({
        path: `backends[${at}].id`,
        value: backend["id"],
        expected,
        suggestion: null,
      });
    }
    if (backend["url"] === undefined && backend["kind"] !== "demo") {
      const expected = "a URL (only kind demo needs none)";
      mistakes.push({ path: `backends[${at}].url`, value: undefined, expected, suggestion: null });
    }
    mistakes.push(...uselessKeys(backend, at));
  }
  const named = backends.map((backend) =>
    listOf(backend["models"]).map((each) =>
      typeof each === "string" ? each : String(recordOf(each)["name"]),
    ),
  );
  const allNamed = backends.length > 0 && backends.every((each) => each["models"] !== undefined);
  const names = new Set(named.flat());
  const owners = new Map<string, string>();
  for (const [name, value] of Object.entries(recordOf(root["models"]))) {
    const model = recordOf(value);
    for (const [at, id] of listOf(model["backends"]).entries()) {
      if (backends.length === 0 || ids.includes(id as string)) continue;
      mistakes.push({
        path: pathText(["models", name, "backends", at]),
        value: id,
        expected: `the id of a backend: ${ids.join(", ")}`,
        suggestion: suggest(String(id), ids),
      });
    }
    for (const [at, alias] of listOf(model["aliases"]).entries()) {
      const owner = owners.get(String(alias));
      const taken = names.has(String(alias)) ? "a model of that name exists" : null;
      const clash = owner === undefined ? taken : `it already belongs to ${owner}`;
      owners.set(String(alias), name);
      if (clash === null) continue;
      const expected = `an alias of its own: ${clash}`;
      mistakes.push({
        path: pathText(["models", name, "aliases", at]),
        value: alias,
        expected,
        suggestion: null,
      });
    }
    const fallback = [model["fallback"]].flat().filter((each) => typeof each === "string");
    for (const each of fallback) {
      if (!allNamed || names.has(each)) continue;
      mistakes.push({
        path: pathText(["models", name, "fallback"]),
        value: each,
        expected: `a model of a backend: ${[...names].join(", ")}`,
        suggestion: suggest(each, names),
      });
    }
  }
  return mistakes;
}

/** Checks a raw configuration: the typed one, or every mistake in it at once. */
export function check(raw: unknown): { config: Config } | { mistakes: Mistake[] } {
  const parsed = schema.safeParse(raw);
  const mistakes = parsed.success
    ? []
    : parsed.error.issues.flatMap((issue) => mistakesOf(issue, raw));
  mistakes.push(...crossCheck(raw));
  if (parsed.success && mistakes.length === 0) return { config: parsed.data };
  return { mistakes };
}

/** As JSON shows them, with null where a key is missing. */
export function reported(mistakes: readonly Mistake[]): Mistake[] {
  return mistakes.map((mistake) => ({ ...mistake, value: mistake.value ?? null }));
}

/** One line for people. */
export function describe({ path, value, expected, suggestion }: Mistake): string {
  const seen = value === undefined ? "missing" : `found ${JSON.stringify(value)}`;
  const hint = suggestion === null ? "" : ` (did you mean ${suggestion}?)`;
  return `${path === "" ? "configuration" : path}: ${seen}, expected ${expected}${hint}`;
}
