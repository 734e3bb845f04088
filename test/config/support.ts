/** Loading a configuration from a working directory of the test's own. */
import assert from "node:assert/strict";
import { rmSync } from "node:fs";
import { mkdtemp, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { Environment } from "../../src/settings/environment.ts";
import { ConfigError, loadSettings, type Flags, type Settings } from "../../src/settings/load.ts";

export const loadFrom = (
  flags: Flags,
  environment: Environment,
  directory: string,
): Promise<Settings> => loadSettings({ flags, environment, directory });

const folders: string[] = [];
process.on("exit", () => {
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
});

/** A working directory with these files in it: a text as it stands, an object as JSON. */
export async function directory(files: Record<string, string | object> = {}): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "tidegate-config-"));
  folders.push(folder);
  for (const [name, content] of Object.entries(files)) {
    const text = typeof content === "string" ? content : JSON.stringify(content);
    await writeFile(join(folder, name), text);
  }
  return folder;
}

/** Loads a file with this content, `gateway.config.json` unless named otherwise; null: there is none. */
export async function load(
  file: object | string | null,
  {
    flags = {},
    environment = {},
    name = "gateway.config.json",
  }: { flags?: Flags; environment?: Environment; name?: string } = {},
): Promise<Settings> {
  const folder = await directory(file === null ? {} : { [name]: file });
  return await loadFrom(flags, environment, folder);
}

export async function failure(loading: Promise<Settings>): Promise<ConfigError> {
  const error: unknown = await loading.then(
    () => assert.fail("was accepted"),
    (reason: unknown) => reason,
  );
  assert(error instanceof ConfigError, String(error));
  assert.doesNotMatch(error.message, /\n\s+at |load\.ts|read-file/, "no stack");
  return error;
}

export const paths = ({ mistakes }: ConfigError): string[] => mistakes.map(({ path }) => path);
