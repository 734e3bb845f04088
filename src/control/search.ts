import { backend, type BackendConfig, type Kind } from "../config.ts";
import { isRecord } from "../dialects/dialect.ts";
import { ask } from "../engines/engine.ts";
import { numbered } from "../settings/environment.ts";
import { fingerprint, within } from "./probe.ts";

/** Where the engines listen unless told otherwise. Several share a port: the fingerprint decides. */
const USUAL_PORTS: readonly [name: string, port: number][] = [
  ["ollama", 11_434],
  ["vllm", 8000],
  ["llama.cpp", 8080],
  ["llama.cpp", 9931],
  ["lmstudio", 1234],
  ["sglang", 30_000],
];
const LOOK_MS = 500;
/** From search to search. */
const AGAIN_MS = 5000;

/** One place that was tried. */
export interface Place {
  /** The engine usually found there, or the kind that answered. */
  name: string;
  url: string;
  kind: Kind | null;
  /** Why nothing there is served; empty when it is. */
  reason: string;
  /** Something answers: there is no point in asking it again. */
  answered: boolean;
}

async function look(name: string, port: number): Promise<Place> {
  const url = `http://127.0.0.1:${port}`;
  const connection = { id: name, url, apiKey: null };
  const place = { name, url, kind: null };
  try {
    return await within(LOOK_MS, async (signal) => {
      // A refused connection should say so; the fingerprint alone would only find nothing.
      const { body } = await ask(connection, "/", signal);
      if (isRecord(body) && body["name"] === "tidegate") {
        return { ...place, reason: "is a Tidegate gateway itself", answered: true };
      }
      const kind = await fingerprint(connection, signal);
      const reason = kind === null ? "answers, but is no inference engine" : "";
      return { name: kind ?? name, url, kind, reason, answered: true };
    });
  } catch (error) {
    return { ...place, reason: error instanceof Error ? error.message : "", answered: false };
  }
}

/**
 * Looks for engines on the usual loopback ports, for a configuration that names no backends. Goes on
 * looking where nothing answered: an engine that is started later is found as well.
 */
export class Search {
  readonly #found: () => void;
  readonly #ports: typeof USUAL_PORTS;
  readonly #counts = new Map<string, number>();
  readonly #ids = new Map<string, string>();
  #places: Place[] = [];
  #ownPort = 0;
  /** Counts starts and stops: what a look finds that began under an earlier one is too late. */
  #turn = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /** @param found is called when an engine has come up. */
  constructor(found: () => void, ports = USUAL_PORTS) {
    this.#found = found;
    this.#ports = ports;
  }

  /** Every place and what is there; empty while nobody searches. */
  get places(): readonly Place[] {
    return this.#places;
  }

  /**
   * Looks wherever no engine is known, and from then on where nothing answered.
   *
   * @param ownPort is left out: the gateway does not serve itself.
   */
  async start(ownPort: number): Promise<void> {
    clearTimeout(this.#timer);
    const turn = ++this.#turn;
    this.#ownPort = ownPort;
    await this.#look(turn, ({ kind }) => kind !== null);
    this.#arm(turn);
  }

  stop(): void {
    this.#turn++;
    clearTimeout(this.#timer);
    this.#places = [];
  }

  /** A backend for each engine found; the built-in demo engine where there is none. */
  backends(): BackendConfig[] {
    const found = this.#places.flatMap(({ kind, url }): BackendConfig[] =>
      kind === null ? [] : [backend.parse({ id: this.#idOf(kind, url), kind, url })],
    );
    return found.length > 0 ? found : [backend.parse({ id: "demo", kind: "demo" })];
  }

  /** Kept for each place: what is found later must not rename what is there. */
  #idOf(kind: Kind, url: string): string {
    const key = `${kind} ${url}`;
    const id = this.#ids.get(key) ?? numbered(kind, this.#counts);
    this.#ids.set(key, id);
    return id;
  }

  #arm(turn: number) {
    if (turn !== this.#turn) return;
    this.#timer = setTimeout(() => {
      void this.#look(turn, ({ answered }) => answered).then((isMore) => {
        if (isMore) this.#found();
        this.#arm(turn);
      });
    }, AGAIN_MS);
  }

  /**
   * @param leave which places need not be looked at again.
   * @returns true when an engine was found that was not there before.
   */
  async #look(turn: number, leave: (place: Place) => boolean): Promise<boolean> {
    const before = this.#places;
    const ports = this.#ports.filter(([, port]) => port !== this.#ownPort);
    const looks = ports.map(async ([name, port]) => {
      const known = before.find(({ url }) => url.endsWith(`:${port}`));
      return known !== undefined && leave(known) ? known : await look(name, port);
    });
    const places = await Promise.all(looks);
    if (turn !== this.#turn) return false;
    this.#places = places;
    return places.some(
      ({ kind, url }) => kind !== null && before.find((was) => was.url === url)?.kind !== kind,
    );
  }
}
