/** Which models are in memory, how they get there and who has to go. */
import type { Behaviour } from "./engine-behaviour.ts";
import { pause } from "./engine-socket.ts";

export interface LoadRecord {
  model: string;
  /** Method and path of the request that caused it: a probe must not. */
  by: string;
  startedAt: number;
  endedAt: number | null;
  result: "loading" | "loaded" | "aborted" | "failed";
}

export interface LoadRequest {
  by: string;
  behaviour: Behaviour;
  left: AbortSignal;
  /** Leaving aborts the load (Ollama); else it goes on without its client (router, measured). */
  isTied: boolean;
  /** Asked for by name: not evicted by what comes by itself (LM Studio). */
  isPinned: boolean;
  /** It was put away while idle: coming back is a load like any other (wire §1.3). */
  isAsleep: boolean;
  /** How many may wait for a load. */
  maxWaiting: number;
}

type Result = "loaded" | "left" | "failed";

interface Waiting {
  model: string;
  request: LoadRequest;
  resolve(result: Result): void;
}

const NEVER = new AbortController().signal;

/**
 * Loads are strictly serial. Where they are tied to a client, the one who started a load aborts it by
 * leaving, and whoever waits beside it starts it again (wire §1.3, real §5.1).
 */
export class Residency {
  readonly loads: LoadRecord[] = [];
  /** Models whose last load failed. */
  readonly failed = new Set<string>();
  #loaded = new Map<string, { usedAt: number; isPinned: boolean }>();
  #inUse = new Map<string, number>();
  #waiting: Waiting[] = [];
  #isWorking = false;
  #wake: (() => void) | null = null;

  isLoaded(model: string): boolean {
    return this.#loaded.has(model);
  }

  isLoading(model: string): boolean {
    return this.loads.some((load) => load.model === model && load.result === "loading");
  }

  isInUse(model: string): boolean {
    return (this.#inUse.get(model) ?? 0) > 0;
  }

  names(): string[] {
    return [...this.#loaded.keys()];
  }

  unload(model: string): void {
    this.#loaded.delete(model);
    this.#wake?.();
  }

  clear(): void {
    this.#loaded.clear();
    this.failed.clear();
    this.loads.length = 0;
  }

  /** Whether a model would find a place now: one is free, or an idle one can go. */
  hasRoom(maxLoaded: number): boolean {
    const loading = this.loads.filter(({ result }) => result === "loading").length;
    return this.#evictable().length + loading < maxLoaded || this.#idle() !== null;
  }

  enter(model: string, request: LoadRequest): Promise<Result | "full"> {
    const { behaviour } = request;
    // Without a limit and a load time there is nothing to wait for.
    const isFree = behaviour.loadMs === 0 && behaviour.maxLoaded === Number.POSITIVE_INFINITY;
    const isHere = this.#loaded.has(model) || (isFree && !behaviour.loadFails);
    if (request.isAsleep) this.#loaded.delete(model);
    else if (isHere) {
      this.#use(model, request.isPinned);
      return Promise.resolve("loaded");
    }
    if (this.#waiting.length >= request.maxWaiting) return Promise.resolve("full");
    return new Promise((resolve) => {
      this.#waiting.push({ model, request, resolve });
      void this.#work();
    });
  }

  leave(model: string): void {
    this.#inUse.set(model, (this.#inUse.get(model) ?? 1) - 1);
    this.#wake?.();
  }

  #use(model: string, isPinned: boolean): void {
    const before = this.#loaded.get(model)?.isPinned ?? false;
    this.#loaded.set(model, { usedAt: performance.now(), isPinned: isPinned || before });
    this.#inUse.set(model, (this.#inUse.get(model) ?? 0) + 1);
  }

  async #work(): Promise<void> {
    if (this.#isWorking) return;
    this.#isWorking = true;
    for (let next = this.#waiting[0]; next !== undefined; next = this.#waiting[0]) {
      next.resolve(await this.#serve(next));
      this.#waiting.shift();
    }
    this.#isWorking = false;
  }

  async #serve({ model, request }: Waiting): Promise<Result> {
    const { behaviour, left, isTied, isPinned } = request;
    if (!this.#loaded.has(model)) {
      while (!isPinned && !left.aborted && this.#evictable().length >= behaviour.maxLoaded) {
        const idle = this.#idle();
        if (idle !== null) this.#loaded.delete(idle);
        else await this.#untilReleased(left);
      }
      if (left.aborted) return "left";
      const result = await this.#load(model, request.by, behaviour, isTied ? left : NEVER);
      if (result === "aborted") return "left";
      if (result === "failed") return "failed";
    }
    if (left.aborted) {
      if (!this.#loaded.has(model))
        this.#loaded.set(model, { usedAt: performance.now(), isPinned });
      return "left";
    }
    this.#use(model, isPinned);
    return "loaded";
  }

  async #load(
    model: string,
    by: string,
    behaviour: Behaviour,
    left: AbortSignal,
  ): Promise<LoadRecord["result"]> {
    const load: LoadRecord = {
      model,
      by,
      startedAt: Date.now(),
      endedAt: null,
      result: "loading",
    };
    this.loads.push(load);
    this.failed.delete(model);
    await pause(behaviour.loadMs, left);
    load.endedAt = Date.now();
    load.result = left.aborted ? "aborted" : behaviour.loadFails ? "failed" : "loaded";
    if (load.result === "failed") this.failed.add(model);
    return load.result;
  }

  #evictable(): [model: string, usedAt: number][] {
    return [...this.#loaded]
      .filter(([, { isPinned }]) => !isPinned)
      .map(([model, { usedAt }]) => [model, usedAt]);
  }

  /** The least recently used one that nobody uses. */
  #idle(): string | null {
    const [oldest] = this.#evictable()
      .filter(([model]) => !this.isInUse(model))
      .toSorted((a, b) => a[1] - b[1]);
    return oldest?.[0] ?? null;
  }

  #untilReleased(left: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const settle = (): void => {
        this.#wake = null;
        left.removeEventListener("abort", settle);
        resolve();
      };
      this.#wake = settle;
      left.addEventListener("abort", settle);
    });
  }
}
