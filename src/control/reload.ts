import { unwatchFile, watchFile } from "node:fs";
import { isLoopback } from "../caller.ts";
import {
  ConfigError,
  loadSettings,
  settle,
  watchedFiles,
  type Settings,
  type Sources,
} from "../settings/load.ts";
import { reported, type Mistake } from "../settings/mistakes.ts";
import { changesBetween, type Change, type Value } from "../settings/values.ts";
import type { Log } from "../telemetry/log.ts";
import type { BackendAction } from "./control.ts";

/** What a reload did, or would do. */
export interface Difference {
  changes: Change[];
  /** Changed, and in effect only after a restart. */
  restart: string[];
}

/** How the last reload went. */
export interface LastReload {
  /** Unix milliseconds. */
  at: number;
  ok: boolean;
  changes: Change[];
  errors: Mistake[];
}

/** The socket is open already. */
const NEED_RESTART = ["server.host", "server.port"];
/** The source of a configuration that no file is part of. */
const NO_FILE = "defaults";
const WATCH_MS = 1000;

export interface ReloaderOptions {
  sources: Sources;
  log: Log;
  /** Puts other settings in the place of those in effect, all at once. Must not throw. */
  swap: (settings: Settings) => Promise<BackendAction[]>;
  /** A reload is over. */
  done: (ok: boolean) => void;
}

/**
 * Whoever may ask what a configuration would change may not read the environment that way.
 *
 * @returns a value as it may be shown: `***` where it holds what a `${VAR}` of the file stands for.
 */
function hidingVariables(file: unknown, environment: Sources["environment"]) {
  const names = JSON.stringify(file).matchAll(/\$\{(\w+)/g);
  const values = [...names].flatMap(([, name = ""]) => environment[name] || []);
  return (value: unknown): unknown => {
    const text = String(JSON.stringify(value));
    return values.some((each) => text.includes(JSON.stringify(each).slice(1, -1))) ? "***" : value;
  };
}

/** Reads the configuration again, and swaps it in or keeps the last good one. */
export class Reloader {
  readonly #options: ReloaderOptions;
  #settings: Settings;
  #last: LastReload | null = null;
  /** One at a time, in the order they were asked for. */
  #queue: Promise<unknown> = Promise.resolve();
  #watched: string[] = [];

  constructor(settings: Settings, options: ReloaderOptions) {
    this.#settings = settings;
    this.#options = options;
  }

  /** Those in effect. */
  get settings(): Settings {
    return this.#settings;
  }

  /** Null before the first. */
  get last(): LastReload | null {
    return this.#last;
  }

  /**
   * Reads and checks everything, then swaps.
   *
   * @throws ConfigError when there is a mistake in it: nothing has changed then.
   */
  reload(trigger: string): Promise<Difference & { backends: BackendAction[] }> {
    const result = this.#queue.then(() => this.#reload(trigger));
    this.#queue = result.catch(() => {});
    return result;
  }

  /**
   * What a configuration would change, in the place of the file.
   *
   * @throws ConfigError
   */
  compare(file: unknown): Difference & { settings: Settings } {
    const { sources } = this.#options;
    const source = "the request's body";
    const hide = hidingVariables(file, sources.environment);
    try {
      const settings = settle(file, source, sources);
      const { changes, restart } = this.#difference(settings);
      const shown = changes.map((change) => ({ ...change, to: hide(change.to) }));
      return { changes: shown, restart, settings: this.#onSocket(settings) };
    } catch (error) {
      if (!(error instanceof ConfigError)) throw error;
      const mistakes = error.mistakes.map((each) => ({ ...each, value: hide(each.value) }));
      throw new ConfigError(source, mistakes);
    }
  }

  /** Reloads whenever the file has changed: by polling, which sees renames and symlinks as well. */
  watch(): void {
    this.#watched = watchedFiles(this.#options.sources);
    for (const path of this.#watched) {
      watchFile(path, { interval: WATCH_MS, persistent: false }, (now, before) => {
        if (now.mtimeMs === before.mtimeMs && now.ino === before.ino && now.size === before.size) {
          return;
        }
        // The mistakes are in the log and in `last`.
        this.reload("file").catch(() => {});
      });
    }
  }

  stop(): void {
    for (const path of this.#watched) unwatchFile(path);
  }

  #difference({ config }: Settings): Difference {
    const changes = changesBetween(this.#settings.config, config);
    const paths = changes.map(({ path }) => path);
    return { changes, restart: NEED_RESTART.filter((path) => paths.includes(path)) };
  }

  /** What was read, but on the socket that is open: its address and port stay. */
  #onSocket(settings: Settings): Settings {
    const { config, values } = this.#settings;
    const { host, port } = config.server;
    const { insecure } = settings.config.server;
    const { keys, jwt } = settings.config.auth;
    const guards = keys.length + jwt.length + settings.environmentKeys.length;
    if (!isLoopback(host) && !insecure && guards === 0) {
      const expected =
        `who may call, since the socket stays open on ${host} until a restart: keep a key, ` +
        "or set server.insecure: true to let everyone in";
      throw new ConfigError(settings.source, [
        { path: "auth.keys", value: [], expected, suggestion: null },
      ]);
    }
    const stays = (value: Value) =>
      values.find(({ path }) => path === value.path && NEED_RESTART.includes(path)) ?? value;
    return {
      ...settings,
      config: { ...settings.config, server: { ...settings.config.server, host, port } },
      values: settings.values.map(stays),
    };
  }

  async #load(): Promise<Settings> {
    const settings = await loadSettings(this.#options.sources);
    const { source } = this.#settings;
    if (settings.source === source || settings.source !== NO_FILE) return settings;
    // Editors and deployments take a file away before they put the next one there.
    const expected = "the file, which is gone: put it back, or restart to go without";
    throw new ConfigError(source, [{ path: "", value: undefined, expected, suggestion: null }]);
  }

  async #reload(trigger: string): Promise<Difference & { backends: BackendAction[] }> {
    const { log, swap, done } = this.#options;
    try {
      const read = await this.#load();
      const settings = this.#onSocket(read);
      const { changes, restart } = this.#difference(read);
      const backends = await swap(settings);
      this.#settings = settings;
      this.#last = { at: Date.now(), ok: true, changes, errors: [] };
      log.info("configuration reloaded", { trigger, changes, restart });
      for (const note of settings.notes) log.warn(note);
      done(true);
      return { changes, restart, backends };
    } catch (error) {
      const errors = error instanceof ConfigError ? error.mistakes : [];
      this.#last = { at: Date.now(), ok: false, changes: [], errors: reported(errors) };
      const detail = error instanceof Error ? error.message : String(error);
      log.error("configuration not reloaded: the last good one stays", { trigger, detail });
      done(false);
      throw error;
    }
  }
}
