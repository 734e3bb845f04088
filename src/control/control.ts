import type { Config } from "../config.ts";
import type { Snapshot } from "../core/snapshot.ts";
import type { Connection, Engine } from "../engines/engine.ts";
import type { Log } from "../telemetry/log.ts";
import { Names, type Address } from "./names.ts";
import { lookAt, Prober, within } from "./probe.ts";
import { isSamePlace, Registry, type Seen, type Wanted } from "./registry.ts";
import { Search, type Place } from "./search.ts";

/** What happens to one backend when another set takes the place of what is served. */
export interface BackendAction {
  id: string;
  action: "added" | "removed" | "changed" | "kept";
}

/** What happens to each backend when one list takes the place of another. */
function actionsBetween(before: readonly Wanted[], after: readonly Wanted[]): BackendAction[] {
  const old = new Map(before.map((backend) => [backend.id, backend]));
  const actions = after.map((backend): BackendAction => {
    const was = old.get(backend.id);
    old.delete(backend.id);
    if (was === undefined) return { id: backend.id, action: "added" };
    const same = JSON.stringify(was) === JSON.stringify(backend);
    return { id: backend.id, action: same ? "kept" : "changed" };
  });
  return [...actions, ...[...old.keys()].map((id): BackendAction => ({ id, action: "removed" }))];
}

export interface ControlOptions {
  log: Log;
  /** Monotonic milliseconds. */
  now: () => number;
  /** From 0 up to 1. */
  random: () => number;
  /** The A records of a host. */
  resolve: (host: string) => Promise<Address[]>;
  /** Takes every new snapshot. */
  publish: (snapshot: Snapshot) => void;
  /** Tokens flowed from this backend within the last so many milliseconds. */
  flowing: (id: string, withinMs: number) => boolean;
  /** Its streams stand still, whatever it answers. */
  stuck: (id: string) => boolean;
  /** Requests wait for a slot there. */
  waitedFor: (id: string) => boolean;
}

/** How long a first look at new backends may hold up what waits for them. */
const FIRST_LOOK_MS = 1000;
/** For a probe of a backend that is no longer in the configuration, which would say how long. */
const LEFT_LOOK_MS = 3000;

/** The control plane: which backends there are to be, watched, and published as snapshots. */
export class Control {
  readonly #log: Log;
  readonly #registry: Registry;
  readonly #prober: Prober;
  readonly #names: Names;
  readonly #search = new Search(() => void this.#follow("found on this machine"));
  #config: Config | null = null;
  /** Whatever changes the set of backends happens one after the other, each from the newest facts. */
  #queue: Promise<unknown> = Promise.resolve();
  #warnings: readonly string[] = [];

  constructor(options: ControlOptions) {
    const { log, now, random, resolve, flowing, stuck, waitedFor } = options;
    this.#log = log;
    this.#registry = new Registry((snapshot) => {
      options.publish(snapshot);
      this.#warn(snapshot.warnings);
    });
    this.#prober = new Prober({
      report: (id, seen) => this.#report(id, seen),
      seen: (id) => this.#registry.seen(id),
      flowing,
      stuck,
      waitedFor,
      now,
      random,
    });
    this.#names = new Names({
      resolve,
      now,
      changed: () => void this.#follow("DNS"),
      failed: (id, reason) => log.warn("host name not looked up", { backend_id: id, reason }),
    });
  }

  get snapshot(): Snapshot {
    return this.#registry.snapshot;
  }

  /** What was tried because the configuration names no backends. */
  get places(): readonly Place[] {
    return this.#search.places;
  }

  /** The backends that were found, as they would stand in a configuration; none where it names some. */
  get discovered(): readonly Wanted[] {
    return this.#config?.backends.length === 0 ? this.#registry.wanted : [];
  }

  /** When a backend was last looked at, Unix milliseconds: the snapshot is older where nothing changed. */
  checkedAt(id: string): number | null {
    return this.#registry.seen(id)?.checkedAt ?? null;
  }

  /** The key to send to a backend. */
  apiKeyOf(id: string): string | null {
    return this.#registry.apiKeyOf(id);
  }

  /**
   * Probes a backend at once; true when it answers. One that has been taken out or has moved is looked
   * at where it was: what runs there has to know as well. Never rejects.
   */
  check(connection: Connection, engine: Engine): Promise<boolean> {
    if (this.#isHere(connection)) return this.#prober.check(connection.id);
    const look = within(LEFT_LOOK_MS, (signal) => engine.look(connection, signal));
    return look.then(
      () => true,
      () => false,
    );
  }

  /** Looks at a backend that something has just been done to; true when it answered. Never rejects. */
  look(connection: Connection, engine: Engine): Promise<boolean> {
    if (this.#isHere(connection)) return this.#prober.look(connection.id);
    return this.check(connection, engine);
  }

  #isHere({ id, url }: Connection): boolean {
    return this.#registry.wanted.some((each) => each.id === id && (each.url ?? "") === url);
  }

  /**
   * Takes a backend out of use by hand, or back in.
   * @returns false when there is none of that id.
   */
  drain(id: string, drained: boolean): boolean {
    if (!this.#registry.drain(id, drained)) return false;
    this.#log.info(drained ? "backend drained by hand" : "backend resumed by hand", {
      backend_id: id,
    });
    return true;
  }

  /**
   * Serves another configuration. New backends are looked at before the old ones go.
   *
   * @param commit is called in the same turn as the new snapshot is published.
   * @returns what happened to each backend, and when the first probes of all of them are done.
   */
  configure(
    config: Config,
    commit: () => void,
  ): Promise<{ backends: BackendAction[]; probed: Promise<void> }> {
    return this.#inTurn(async () => {
      await this.#names.configure(config.backends);
      if (config.backends.length === 0) await this.#search.start(config.server.port);
      else this.#search.stop();
      const wanted = this.#wantedBy(config);
      const looked = await this.#firstLook(wanted);
      this.#config = config;
      commit();
      return this.#serve(config, wanted, looked, "configuration");
    });
  }

  /** What serving another configuration would mean for each backend. */
  preview(config: Config): BackendAction[] {
    return actionsBetween(this.#registry.wanted, this.#wantedBy(config));
  }

  stop(): void {
    this.#config = null;
    this.#prober.stop();
    this.#names.stop();
    this.#search.stop();
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#queue.then(work);
    this.#queue = result.catch(() => {});
    return result;
  }

  /** What there is has changed under the same configuration. */
  #follow(why: string): Promise<void> {
    return this.#inTurn(async () => {
      const config = this.#config;
      if (config === null) return;
      const wanted = this.#wantedBy(config);
      const looked = await this.#firstLook(wanted);
      if (this.#config === config) this.#serve(config, wanted, looked, why);
    });
  }

  #wantedBy(config: Config): Wanted[] {
    if (config.backends.length === 0) return this.#search.backends();
    return config.backends.flatMap((backend) => this.#names.expand(backend));
  }

  /** Looks at those that are not known yet, so that their models are there from the first moment. */
  async #firstLook(wanted: readonly Wanted[]): Promise<Map<string, Seen>> {
    const known = new Map(this.#registry.wanted.map((backend) => [backend.id, backend]));
    const looked = new Map<string, Seen>();
    const looks = wanted.map(async (backend) => {
      const was = known.get(backend.id);
      if (was !== undefined && isSamePlace(was, backend)) return;
      const timeout = Math.min(backend.timeout, FIRST_LOOK_MS);
      const seen = await lookAt({ ...backend, timeout }, null).catch(() => null);
      if (seen !== null) looked.set(backend.id, seen);
    });
    await Promise.all(looks);
    return looked;
  }

  #serve(config: Config, wanted: Wanted[], looked: ReadonlyMap<string, Seen>, why: string) {
    const backends = actionsBetween(this.#registry.wanted, wanted);
    this.#registry.configure(config.models, wanted, looked);
    for (const { id, action } of backends) {
      if (action === "kept") continue;
      const { kind, health } = this.#registry.seen(id) ?? {};
      this.#log.info(`backend ${action}`, { backend_id: id, why, kind, health });
    }
    return { backends, probed: this.#prober.configure(wanted, looked) };
  }

  #report(id: string, seen: Seen) {
    const before = this.#registry.seen(id)?.health ?? "unknown";
    this.#registry.report(id, seen);
    if (before === seen.health) return;
    const level = seen.health === "healthy" ? "info" : "warn";
    const { health: to, reason } = seen;
    this.#log[level]("backend health", { backend_id: id, from: before, to, reason });
  }

  /** Each warning once, for as long as it holds. */
  #warn(warnings: readonly string[]) {
    for (const warning of warnings) {
      if (!this.#warnings.includes(warning)) this.#log.warn(warning);
    }
    this.#warnings = warnings;
  }
}
