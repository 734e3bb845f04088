import type { BackendConfig, Kind } from "../config.ts";
import { isRecord, textOf } from "../dialects/dialect.ts";
import { ask, type Connection, type Sighting } from "../engines/engine.ts";
import { engineOf } from "../engines/kinds.ts";
import { unseen, type Seen } from "./registry.ts";

/** Two failed probes in a row, and a backend counts as unhealthy. */
const FAILURES_TO_UNHEALTHY = 2;

/** Runs `work` with a signal that is aborted after `ms`; rejects in words for people. */
async function within<T>(ms: number, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(new Error(`no answer within ${ms} ms`)), ms);
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
    return "connection refused";
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

async function lookAt(
  backend: BackendConfig,
  connection: Connection,
  signal: AbortSignal,
): Promise<{ kind: Kind; sighting: Sighting }> {
  const kind = backend.kind ?? (await fingerprint(connection, signal)) ?? "openai";
  return { kind, sighting: await engineOf(kind).look(connection, signal) };
}

export interface ProberOptions {
  report: (id: string, seen: Seen) => void;
  seen: (id: string) => Seen | undefined;
  /** Tokens flowed from this backend within the last so many milliseconds. */
  flowing: (id: string, withinMs: number) => boolean;
}

/** Probes every backend on its own interval and says what it saw. */
export class Prober {
  readonly #backends: ReadonlyMap<string, BackendConfig>;
  readonly #options: ProberOptions;
  readonly #running = new Map<string, Promise<boolean>>();
  readonly #timers = new Map<string, ReturnType<typeof setTimeout>>();
  readonly #failures = new Map<string, number>();
  #stopped = false;

  constructor(backends: readonly BackendConfig[], options: ProberOptions) {
    this.#backends = new Map(backends.map((backend) => [backend.id, backend]));
    this.#options = options;
  }

  /** Starts the loops; resolves when every backend has been looked at once. */
  async start(): Promise<void> {
    await Promise.all([...this.#backends.keys()].map((id) => this.#round(id)));
  }

  stop(): void {
    this.#stopped = true;
    for (const timer of this.#timers.values()) clearTimeout(timer);
  }

  /**
   * Probes one backend now, or waits for the probe that is under way: probes of one backend never
   * overlap. Resolves to whether it answered; never rejects.
   */
  check(id: string): Promise<boolean> {
    const backend = this.#backends.get(id);
    if (backend === undefined) return Promise.resolve(false);
    let running = this.#running.get(id);
    if (running === undefined) {
      running = this.#probe(backend).finally(() => this.#running.delete(id));
      this.#running.set(id, running);
    }
    return running;
  }

  async #round(id: string): Promise<void> {
    await this.check(id);
    const backend = this.#backends.get(id);
    if (this.#stopped || backend === undefined) return;
    const timer = setTimeout(() => void this.#round(id), backend.healthInterval);
    this.#timers.set(id, timer);
  }

  async #probe(backend: BackendConfig): Promise<boolean> {
    const { id, url = "", apiKey = null, timeout } = backend;
    const before = this.#options.seen(id) ?? unseen(backend);
    const checked = () => ({ ...before, checkedAt: Date.now() });
    try {
      const { kind, sighting } = await within(timeout, (signal) =>
        lookAt(backend, { id, url, apiKey }, signal),
      );
      this.#failures.set(id, 0);
      const seen: Seen = sighting.loading
        ? { ...checked(), kind, health: "degraded", reason: "the engine is loading its model" }
        : { ...checked(), kind, health: "healthy", reason: "", models: sighting.models };
      this.#options.report(id, seen);
      return true;
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      // A busy engine may be too slow for its probe and still do its work.
      if (this.#options.flowing(id, timeout)) return true;
      const failures = (this.#failures.get(id) ?? 0) + 1;
      this.#failures.set(id, failures);
      const health = failures >= FAILURES_TO_UNHEALTHY ? "unhealthy" : "degraded";
      this.#options.report(id, { ...checked(), health, reason });
      return false;
    }
  }
}

/** Where the engines listen unless told otherwise. Several share a port: the fingerprint decides. */
const USUAL_PORTS: readonly [name: string, port: number][] = [
  ["ollama", 11_434],
  ["vllm", 8000],
  ["llama.cpp", 8080],
  ["llama.cpp", 9931],
  ["lmstudio", 1234],
  ["sglang", 30_000],
];
const DISCOVERY_MS = 500;

/** One place that was tried. */
export interface Discovery {
  /** The engine usually found there, or the kind that answered. */
  name: string;
  url: string;
  kind: Kind | null;
  /** Why nothing there is served; empty when it is. */
  reason: string;
}

/**
 * Looks for engines on the usual loopback ports, all at once.
 *
 * @param ownPort is left out: the gateway does not serve itself.
 */
export function discover(ownPort: number): Promise<Discovery[]> {
  const places = USUAL_PORTS.filter(([, port]) => port !== ownPort);
  return Promise.all(
    places.map(async ([name, port]): Promise<Discovery> => {
      const url = `http://127.0.0.1:${port}`;
      const connection = { id: name, url, apiKey: null };
      try {
        const kind = await within(DISCOVERY_MS, async (signal) => {
          // A refused connection should say so; the fingerprint alone would only find nothing.
          await ask(connection, "/v1/models", signal);
          return await fingerprint(connection, signal);
        });
        if (kind === null)
          return { name, url, kind, reason: "answers, but is no inference engine" };
        return { name: kind, url, kind, reason: "" };
      } catch (error) {
        return { name, url, kind: null, reason: error instanceof Error ? error.message : "" };
      }
    }),
  );
}
