import process from "node:process";
import { parseArgs, type ParseArgsConfig } from "node:util";
import { suggest } from "./core/suggest.ts";

/** Ends the process with 2: what stands on the command line is wrong, and `message` says how. */
export function usageError(message: string): never {
  process.stderr.write(`tidegate: ${message}\nTry --help.\n`);
  process.exit(2);
}

/** What stands on the command line; where that cannot be understood, it is a {@link usageError}. */
export function readArguments<T extends ParseArgsConfig>(config: T) {
  try {
    return parseArgs(config);
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    const message = said.replace(/\. To specify a positional .*$/s, "");
    const [, unknown = ""] = /Unknown option '--([^']+)'/.exec(message) ?? [];
    const meant = suggest(unknown, Object.keys(config.options ?? {}));
    usageError(meant === null ? message : `${message}; did you mean --${meant}?`);
  }
}
