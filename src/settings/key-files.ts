import { readFileSync, statSync } from "node:fs";
import { resolve } from "node:path";
import type { JSONWebKeySet } from "jose";
import { z } from "zod";
import { listOf, recordOf, type Mistake } from "./mistakes.ts";

/** More than any issuer publishes. */
const LARGEST_BYTES = 1024 * 1024;

/** RFC 7517, without what is not public: `d` of a key pair, `k` of a symmetric key. */
const absent = z.never().optional();
const publicKey = z.looseObject({ kty: z.string(), d: absent, k: absent });
const keySet = z.looseObject({ keys: z.array(publicKey).min(1) });

/** What the files of issuers hold, by their path as the configuration has it. */
export type KeyFiles = ReadonlyMap<string, JSONWebKeySet>;

/**
 * Reads the files that `auth.jwt[].jwksFile` names, and says of each that cannot be used why. The content
 * of a file is in no mistake, nor is its path in what was expected: a dry run must not tell variables.
 *
 * @param directory where relative paths begin.
 */
export function readKeyFiles(
  raw: unknown,
  directory: string,
): { keyFiles: KeyFiles; mistakes: Mistake[] } {
  const keyFiles = new Map<string, JSONWebKeySet>();
  const mistakes: Mistake[] = [];
  for (const [at, issuer] of listOf(recordOf(recordOf(raw)["auth"])["jwt"]).entries()) {
    const { jwksFile: file } = recordOf(issuer);
    if (typeof file !== "string" || file === "") continue;
    const read = readKeyFile(resolve(directory, file));
    if (typeof read !== "string") keyFiles.set(file, read);
    else {
      const expected = `a JSON file with the issuer's public keys (paths begin at ${directory}): ${read}`;
      mistakes.push({ path: `auth.jwt[${at}].jwksFile`, value: file, expected, suggestion: null });
    }
  }
  return { keyFiles, mistakes };
}

/** The keys, or why there are none. */
function readKeyFile(path: string): JSONWebKeySet | string {
  let text: string;
  try {
    const status = statSync(path);
    // A pipe or a device would hold the process up.
    if (!status.isFile()) return "this is no file";
    if (status.size > LARGEST_BYTES) return `it has more than ${LARGEST_BYTES} bytes`;
    text = readFileSync(path, "utf8");
  } catch (error) {
    const { code } = error as { code?: string };
    return code === "ENOENT" ? "there is none" : `it cannot be read (${code})`;
  }
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    return "it is not JSON";
  }
  const parsed = keySet.safeParse(json);
  if (parsed.success) return json as JSONWebKeySet;
  const isSecret = parsed.error.issues.some(({ path }) => ["d", "k"].includes(String(path.at(-1))));
  if (isSecret) return "it holds a key that is not public";
  return 'it has to be { "keys": […] } with at least one key';
}
