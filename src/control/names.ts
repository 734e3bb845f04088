import { lookup, Resolver } from "node:dns/promises";
import type { BackendConfig } from "../config.ts";
import type { Wanted } from "./registry.ts";

/** From look-up to look-up. */
const REFRESH_MS = 5000;

/** A start or a reload waits for it. */
const PATIENCE = { timeout: 1000, tries: 2 };

/** One A record. */
export interface Address {
  address: string;
  /** Seconds for which it may be taken for true. */
  ttl: number;
}

/**
 * The A records of a host name. A name that DNS does not know is asked of the system as well, which
 * completes short names and reads its hosts file, but tells no time to live. On Deno a name whose server
 * is broken looks unknown as well: there the system's words, which tell the two apart, are the last.
 *
 * @throws Error when nobody could be asked, or nobody knows the name
 */
export async function resolveA(
  host: string,
  resolver = new Resolver(PATIENCE),
): Promise<Address[]> {
  try {
    return await resolver.resolve4(host, { ttl: true });
  } catch (error) {
    const { code } = error as { code?: string };
    if (code !== "ENOTFOUND" && code !== "ENODATA") throw error;
    const found = await lookup(host, { all: true, family: 4 });
    return found.map(({ address }) => ({ address, ttl: 0 }));
  }
}

function hostOf({ url = "" }: BackendConfig): string {
  return new URL(url).hostname;
}

/** The name is known to have no address, as opposed to nobody having answered. */
function isGone(error: unknown): boolean {
  const { code } = error as { code?: string };
  return code === "ENOTFOUND" || code === "ENODATA";
}

/**
 * Which addresses hold now: those of the answer for their time to live, and those of earlier answers
 * for what is left of theirs, since a server may answer with a part of them only.
 *
 * @param known until when each address holds, milliseconds of the clock of `now`.
 */
export function addressesAfter(
  known: ReadonlyMap<string, number>,
  answer: readonly Address[],
  now: number,
): Map<string, number> {
  const next = new Map([...known].filter(([, until]) => until > now));
  for (const { address, ttl } of answer) next.set(address, now + ttl * 1000);
  return next;
}

export interface NamesOptions {
  resolve: (host: string) => Promise<Address[]>;
  /** Monotonic milliseconds. */
  now: () => number;
  /** Another set of addresses holds than before. */
  changed: () => void;
  /** A name could not be looked up: what was known stays. */
  failed: (id: string, reason: string) => void;
}

/** Backends whose URL is a name for many: one backend per address, coming and going with the answers. */
export class Names {
  readonly #options: NamesOptions;
  /** By id of the configured backend. */
  readonly #known = new Map<string, { host: string; addresses: Map<string, number> }>();
  /** Why a name could not be looked up the last time, by the same id: said once. */
  readonly #failures = new Map<string, string>();
  #backends: readonly BackendConfig[] = [];
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(options: NamesOptions) {
    this.#options = options;
  }

  /** Follows the names of these backends and no others. Resolves when each has been looked up once. */
  async configure(backends: readonly BackendConfig[]): Promise<void> {
    this.stop();
    this.#failures.clear();
    const followed = backends.filter(({ discover }) => discover === "dns");
    this.#backends = followed;
    for (const [id, { host }] of this.#known) {
      const isSame = followed.some((backend) => backend.id === id && hostOf(backend) === host);
      if (!isSame) this.#known.delete(id);
    }
    await this.#lookUp(followed);
    this.#arm(followed);
  }

  stop(): void {
    this.#backends = [];
    clearTimeout(this.#timer);
  }

  /**
   * What stands for a configured backend: itself, or one per address of its name. While no address is
   * known it stands for itself too, so that its models are away and not unknown.
   */
  expand(backend: BackendConfig): Wanted[] {
    if (backend.discover !== "dns") return [backend];
    const { discover: _, ...plain } = backend;
    const addresses = [...(this.#known.get(backend.id)?.addresses.keys() ?? [])].toSorted();
    if (addresses.length === 0) return [plain];
    return addresses.map((address) => {
      const url = new URL(backend.url ?? "");
      url.hostname = address;
      const id = `${backend.id}@${address}`;
      return { ...plain, id, url: url.href.replace(/\/$/, ""), group: backend.id };
    });
  }

  #arm(followed: readonly BackendConfig[]) {
    if (followed !== this.#backends || followed.length === 0) return;
    this.#timer = setTimeout(() => {
      void this.#lookUp(followed).then((isOther) => {
        if (isOther) this.#options.changed();
        this.#arm(followed);
      });
    }, REFRESH_MS);
  }

  /**
   * @param followed those that were followed when it began: an answer for others is none.
   * @returns true when another set of addresses holds than before.
   */
  async #lookUp(followed: readonly BackendConfig[]): Promise<boolean> {
    const looks = followed.map(async (backend) => {
      const answer = await this.#options.resolve(hostOf(backend)).catch((error: Error) => error);
      return followed === this.#backends && this.#take(backend, answer);
    });
    return (await Promise.all(looks)).includes(true);
  }

  #take(backend: BackendConfig, answer: readonly Address[] | Error): boolean {
    const { id } = backend;
    const before = this.#known.get(id)?.addresses ?? new Map<string, number>();
    if (answer instanceof Error) {
      const { message } = answer;
      if (this.#failures.get(id) !== message) this.#options.failed(id, message);
      this.#failures.set(id, message);
      // Whoever does not answer has not said that they are gone.
      if (!isGone(answer)) return false;
    } else {
      this.#failures.delete(id);
    }
    const fresh = answer instanceof Error ? [] : answer;
    const addresses = addressesAfter(before, fresh, this.#options.now());
    this.#known.set(id, { host: hostOf(backend), addresses });
    return [...addresses.keys()].toSorted().join() !== [...before.keys()].toSorted().join();
  }
}
