import type { BackendConfig, Kind } from "../config.ts";
import { isRecord, textOf } from "../dialects/dialect.ts";
import { ask, type Connection } from "../engines/engine.ts";
import { engineOf } from "../engines/kinds.ts";
import { isSamePlace, unseen, type Seen, type Wanted } from "./registry.ts";

/** Nobody listens there any more, whatever still flows from before. */
const REFUSED = "connection refused";

/** Two failed probes in a row, and a backend counts as unhealthy. */
const FAILURES_TO_UNHEALTHY = 2;

/** A longer timer would fire at once. */
const LONGEST_MS = 2 ** 31 - 1;

/** Runs `work` with a signal that is aborted after `ms`; rejects in words for people. */
export async function within<T>(ms: number, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const timer = setTimeout(
    () => controller.abort(new Error(`no answer within ${ms} ms`)),
    Math.min(ms, LONGEST_MS),
  );
  try {
    return await work(controller.signal);
  } catch (error) {
    if (controller.signal.aborted) throw new Error(`no answer within ${ms} ms`, { cause: error });
    throw new Error(reasonOf(error), { cause: error });
  } finally {
    clearTimeout(timer);
  }
}

/** The runtimes word a refused connection in three ways. */
function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const cause = error.cause instanceof Error ? error.cause.message : "";
  const text = `${(error as { code?: string }).code ?? ""} ${error.message} ${cause}`;
  if (/ECONNREFUSED|ConnectionRefused|connection refused|unable to connect/i.test(text)) {
    return REFUSED;
  }
  if (/ENOTFOUND|dns error|getaddrinfo/i.test(text)) return "host name not found";
  if (/ECONNRESET|reset|closed/i.test(text)) return "connection closed without an answer";
  return error.message;
}

/**
 * Finds out what kind of engine answers, by what only that kind has; null when none of them does.
 * The order matters: SGLang and LocalAI also answer as Ollama.
 */
export async function fingerprint(
  connection: Connection,
  signal: AbortSignal,
): Promise<Kind | null> {
  const paths = ["/v1/models", "/get_server_info", "/api/v1/models", "/props", "/"];
  const [models, serverInfo, lmstudio, props, root] = await Promise.all(
    paths.map((path) => ask(connection, path, signal).catch(() => null)),
  );
  const list = isRecord(models?.body) ? models.body["data"] : undefined;
  const first: unknown = Array.isArray(list) ? list[0] : undefined;
  const owner = isRecord(first) ? textOf(first["owned_by"]) : null;
  if (
    owner === "sglang" ||
    (serverInfo?.status === 200 && isRecord(serverInfo.body) && "version" in serverInfo.body)
  ) {
    return "sglang";
  }
  const keyed = isRecord(lmstudio?.body) ? lmstudio.body["models"] : undefined;
  if (Array.isArray(keyed) && (keyed.length === 0 || (isRecord(keyed[0]) && "key" in keyed[0]))) {
    return "lmstudio";
  }
  const slots = isRecord(props?.body) && ("total_slots" in props.body || "role" in props.body);
  if (slots || models?.server === "llama.cpp") return "llamacpp";
  if (owner === "vllm") return "vllm";
  if (root?.text.includes("Ollama is running") === true) return "ollama";
  // `data: null` is an empty list in some.
  return models?.status === 200 && list !== undefined ? "openai" : null;
}

/**
 * Looks at a backend once.
 *
 * @param known its kind as already found out; null to ask the engine.
 * @throws Error with the reason in words, within the backend's time-out
 */
export async function lookAt(backend: BackendConfig, known: Kind | null): Promise<Seen> {
  const { id, url = "", kind, timeout } = backend;
  const connection = { id, url, apiKey: backend.apiKey ?? null };
  return await within(timeout, async (signal) => {
    const found = kind ?? known ?? (await fingerprint(connection, signal)) ?? "openai";
    const { loading, models } = await engineOf(found).look(connection, signal);
    const seen = { kind: found, checkedAt: Date.now(), models };
    return loading
      ? { ...seen, health: "degraded", reason: "the engine is loading its model" }
      : { ...seen, health: "healthy", reason: "" };
  });
}

export interface ProberOptions {
  report: (id: string, seen: Seen) => void;
  seen: (id: string) => Seen | undefined;
  /** Tokens flowed from this backend within the last so many milliseconds. */
  flowing: (id: string, withinMs: number) => boolean;
  /** Its streams stand still, whatever it answers. */
  stuck: (id: string) => boolean;
  /** Requests wait for a slot there. */
  waitedFor: (id: string) => boolean;
  /** Monotonic milliseconds. */
  now: () => number;
  /** From 0 up to 1, for jitter. */
  random: () => number;
}

/** Probes come up to a tenth of the interval early, so that many gateways do not strike at once. */
const JITTER = 0.1;

/**
 * While requests wait for a backend it is probed so often at least: others use the same engine, and what
 * they have loaded or put out decides who is served next.
 */
const WAITED_FOR_MS = 2000;

/**
 * In how many milliseconds a probe is due, or it has to be asked again whether one is; 0: it is now.
 *
 * @param elapsed milliseconds since the last one began.
 */
export function untilProbe(elapsed: number, interval: number, isWaitedFor: boolean): number {
  const due = isWaitedFor ? Math.min(interval, WAITED_FOR_MS) : interval;
  // Somebody may begin to wait meanwhile.
  return Math.max(0, Math.min(due - elapsed, WAITED_FOR_MS));
}

/** One backend under watch. */
interface Watch {
  backend: Wanted;
  /** As found out, for as long as it answers: a busy engine may be too slow to say it again. */
  kind: Kind | null;
  /** Failed probes in a row. */
  failures: number;
  running: Promise<boolean> | null;
  next: ReturnType<typeof setTimeout> | undefined;
  stale: ReturnType<typeof setTimeout> | undefined;
  stopped: boolean;
}

/** Probes every backend on its own interval and says what it saw. */
export class Prober {
  readonly #options: ProberOptions;
  readonly #watches = new Map<string, Watch>();

  constructor(options: ProberOptions) {
    this.#options = options;
  }

  /**
   * Watches these backends and no others. Each new or changed one is probed now.
   *
   * @param looked those that have just been looked at: they are probed after their interval.
   * @returns resolves when every new or changed one has been looked at.
   */
  async configure(wanted: readonly Wanted[], looked: ReadonlyMap<string, Seen>): Promise<void> {
    const before = new Map(this.#watches);
    this.#watches.clear();
    const rounds: Promise<void>[] = [];
    for (const backend of wanted) {
      const known = before.get(backend.id);
      if (known !== undefined && isSamePlace(known.backend, backend)) {
        before.delete(backend.id);
        this.#watches.set(backend.id, known);
        if (JSON.stringify(known.backend) === JSON.stringify(backend)) continue;
        known.backend = backend;
        // The probe under way still goes by what was configured when it began.
        rounds.push(Promise.resolve(known.running).then(() => this.#round(known)));
        continue;
      }
      const watch: Watch = {
        backend,
        kind: looked.get(backend.id)?.kind ?? null,
        failures: 0,
        running: null,
        next: undefined,
        stale: undefined,
        stopped: false,
      };
      this.#watches.set(backend.id, watch);
      if (looked.has(backend.id)) {
        this.#outdate(watch, this.#options.seen(backend.id) ?? unseen(backend));
        this.#arm(watch, 0);
      } else {
        rounds.push(this.#round(watch));
      }
    }
    for (const watch of before.values()) stop(watch);
    await Promise.all(rounds);
  }

  stop(): void {
    for (const watch of this.#watches.values()) stop(watch);
  }

  /**
   * Probes one backend now, or waits for the probe that is under way: probes of one backend never
   * overlap. Resolves to whether it answered; never rejects.
   */
  async check(id: string): Promise<boolean> {
    const watch = this.#watches.get(id);
    return watch !== undefined && (await this.#check(watch));
  }

  /** The same with a probe that begins after this call: what it sees is no older. */
  async look(id: string): Promise<boolean> {
    const watch = this.#watches.get(id);
    if (watch === undefined) return false;
    await watch.running;
    return await this.#check(watch);
  }

  #check(watch: Watch): Promise<boolean> {
    watch.running ??= this.#probe(watch).finally(() => {
      watch.running = null;
    });
    return watch.running;
  }

  async #round(watch: Watch): Promise<void> {
    if (watch.stopped) return;
    const startedAt = this.#options.now();
    await this.#check(watch);
    // From start to start: a probe that took its whole time-out does not put the next one off.
    if (!watch.stopped) this.#arm(watch, this.#options.now() - startedAt);
  }

  #arm(watch: Watch, elapsed: number) {
    const { now, random } = this.#options;
    const interval = watch.backend.healthInterval * (1 - JITTER * random());
    this.#await(watch, now() - elapsed, interval);
  }

  /** @param since when the last probe began. */
  #await(watch: Watch, since: number, interval: number) {
    const { now, waitedFor } = this.#options;
    const left = () => untilProbe(now() - since, interval, waitedFor(watch.backend.id));
    clearTimeout(watch.next);
    watch.next = setTimeout(() => {
      if (left() === 0) void this.#round(watch);
      else this.#await(watch, since, interval);
    }, left());
  }

  async #probe(watch: Watch): Promise<boolean> {
    const { backend } = watch;
    const before = this.#options.seen(backend.id) ?? unseen(backend);
    try {
      const seen = await lookAt(backend, watch.kind);
      watch.kind = seen.kind;
      if (this.#options.stuck(backend.id)) {
        this.#fail(watch, seen, "it answers probes, but its streams stand still");
        return true;
      }
      watch.failures = 0;
      // An engine that is still loading lists nothing yet.
      this.#report(watch, seen.health === "healthy" ? seen : { ...seen, models: before.models });
      return true;
    } catch (error) {
      const seen = { ...before, checkedAt: Date.now() };
      const reason = error instanceof Error ? error.message : String(error);
      // A busy engine may be too slow for its probe and still do its work.
      if (reason !== REFUSED && this.#options.flowing(backend.id, backend.timeout)) {
        this.#report(watch, seen);
        return true;
      }
      watch.kind = null;
      this.#fail(watch, seen, reason);
      return false;
    }
  }

  #fail(watch: Watch, seen: Seen, reason: string) {
    watch.failures++;
    const health = watch.failures >= FAILURES_TO_UNHEALTHY ? "unhealthy" : "degraded";
    this.#report(watch, { ...seen, health, reason });
  }

  #report(watch: Watch, seen: Seen) {
    if (watch.stopped) return;
    this.#options.report(watch.backend.id, seen);
    this.#outdate(watch, seen);
  }

  /** Says when what was seen has become too old to go by. */
  #outdate(watch: Watch, seen: Seen) {
    const { id, healthInterval, timeout, staleAfterMs } = watch.backend;
    const lifetime = staleAfterMs ?? 3 * healthInterval + timeout;
    clearTimeout(watch.stale);
    watch.stale = setTimeout(
      () => {
        const reason = `last looked at ${lifetime} ms ago`;
        this.#options.report(id, { ...seen, health: "unknown", reason });
      },
      Math.min(lifetime, LONGEST_MS),
    );
  }
}

function stop(watch: Watch) {
  watch.stopped = true;
  clearTimeout(watch.next);
  clearTimeout(watch.stale);
}
