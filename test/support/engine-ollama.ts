/** What only Ollama has: its native routes, models that come and go, names with tags. */
import type { Behaviour } from "./engine-behaviour.ts";
import type { Job, Shape } from "./engine-shapes.ts";
import { join } from "./engine-shapes.ts";

export interface ModelInfo {
  name: string;
  digest?: string;
  size?: number;
  /** Less than `size`: spilled to the CPU; 0 on a machine without GPU (real §5.1). */
  sizeVram?: number;
  contextLength?: number;
  capabilities?: string[];
  remoteHost?: string;
}

export interface LoadRecord {
  model: string;
  startedAt: number;
  endedAt: number | null;
  result: "loading" | "loaded" | "aborted" | "failed";
}

/** Ollama completes a bare name with `:latest`, nothing else (wire §1.2). */
export function withTag(name: string): string {
  return name.includes(":") ? name : `${name}:latest`;
}

export function isEmbedding(info: ModelInfo): boolean {
  return (info.capabilities ?? [/embed|minilm/.test(info.name) ? "embedding" : ""]).includes(
    "embedding",
  );
}

function digestOf(info: ModelInfo): string {
  let hash = 0x811c9dc5;
  for (const char of info.name) hash = Math.imul(hash ^ char.charCodeAt(0), 0x01000193);
  return info.digest ?? (hash >>> 0).toString(16).padStart(8, "0").repeat(8);
}

function details(info: ModelInfo): Record<string, unknown> {
  return {
    parent_model: "",
    format: "gguf",
    family: "llama",
    families: ["llama"],
    parameter_size: "8.0B",
    quantization_level: "Q4_0",
    context_length: info.contextLength ?? 8192,
  };
}

export function tags(models: ModelInfo[]): unknown {
  return {
    models: models.map((info) => ({
      name: info.name,
      model: info.name,
      modified_at: "2026-08-01T12:00:00.123456789Z",
      size: info.size ?? 4_661_224_676,
      digest: digestOf(info),
      details: details(info),
      capabilities: info.capabilities ?? [isEmbedding(info) ? "embedding" : "completion"],
      ...(info.remoteHost === undefined
        ? {}
        : { remote_model: info.name, remote_host: info.remoteHost }),
    })),
  };
}

/** Only what is loaded: a model that is loading does not show (real §5.1). */
export function ps(models: ModelInfo[], residency: Residency): unknown {
  return {
    models: models
      .filter((info) => residency.isLoaded(info.name))
      .map((info) => ({
        name: info.name,
        model: info.name,
        size: info.size ?? 4_661_224_676,
        digest: digestOf(info),
        details: details(info),
        expires_at: "2318-12-01T00:00:00Z",
        size_vram: info.sizeVram ?? info.size ?? 4_661_224_676,
        context_length: info.contextLength ?? 8192,
      })),
  };
}

export function show(info: ModelInfo): unknown {
  return {
    modelfile: `FROM ${info.name}`,
    details: details(info),
    model_info: {
      "general.architecture": "llama",
      "llama.context_length": info.contextLength ?? 8192,
      "llama.embedding_length": 4,
    },
    capabilities: info.capabilities ?? [isEmbedding(info) ? "embedding" : "completion"],
    modified_at: "2026-08-01T12:00:00.123456789Z",
  };
}

/** Names and origins that a loopback Ollama lets in; all others get an empty 403 (wire §1.8). */
export function isForeign(headers: Record<string, string>): boolean {
  const local =
    /^(localhost|[\w-]+\.(localhost|local|internal)|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?$/i;
  if (!local.test(headers.host ?? "")) return true;
  const { origin } = headers;
  if (origin === undefined) return false;
  if (/^(app|file|tauri|vscode-webview|vscode-file):\/\//.test(origin)) return false;
  const match = /^https?:\/\/(.+)$/.exec(origin);
  return match === null || !local.test(match[1] ?? "");
}

interface Waiting {
  model: string;
  behaviour: Behaviour;
  left: AbortSignal;
  resolve(result: "loaded" | "left" | "failed"): void;
}

/**
 * Which models are in memory. Loads are strictly serial; the request that started one aborts it by leaving,
 * and whoever waits beside it starts it again (wire §1.3, real §5.1).
 */
export class Residency {
  readonly loads: LoadRecord[] = [];
  #loaded = new Map<string, { usedAt: number }>();
  #inUse = new Map<string, number>();
  #waiting: Waiting[] = [];
  #isWorking = false;
  #wake: (() => void) | null = null;

  isLoaded(model: string): boolean {
    return this.#loaded.has(model);
  }

  unload(model: string): void {
    this.#loaded.delete(model);
  }

  clear(): void {
    this.#loaded.clear();
    this.loads.length = 0;
  }

  enter(
    model: string,
    behaviour: Behaviour,
    left: AbortSignal,
  ): Promise<"loaded" | "left" | "failed" | "full"> {
    // Without a limit and a load time there is nothing to wait for.
    const isFree = behaviour.loadMs === 0 && behaviour.maxLoaded === Number.POSITIVE_INFINITY;
    if (this.#loaded.has(model) || (isFree && !behaviour.loadFails)) {
      this.#use(model);
      return Promise.resolve("loaded");
    }
    if (this.#waiting.length >= behaviour.maxQueue) return Promise.resolve("full");
    return new Promise((resolve) => {
      this.#waiting.push({ model, behaviour, left, resolve });
      void this.#work();
    });
  }

  leave(model: string): void {
    this.#inUse.set(model, (this.#inUse.get(model) ?? 1) - 1);
    this.#wake?.();
  }

  #use(model: string): void {
    this.#loaded.set(model, { usedAt: performance.now() });
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

  async #serve({ model, behaviour, left }: Waiting): Promise<"loaded" | "left" | "failed"> {
    if (!this.#loaded.has(model)) {
      while (!left.aborted && this.#loaded.size >= behaviour.maxLoaded) {
        const idle = [...this.#loaded]
          .filter(([name]) => (this.#inUse.get(name) ?? 0) === 0)
          .toSorted((a, b) => a[1].usedAt - b[1].usedAt)[0];
        if (idle !== undefined) this.#loaded.delete(idle[0]);
        else await this.#untilReleased(left);
      }
      if (left.aborted) return "left";
      const load: LoadRecord = { model, startedAt: Date.now(), endedAt: null, result: "loading" };
      this.loads.push(load);
      await pause(behaviour.loadMs, left);
      load.endedAt = Date.now();
      load.result = left.aborted ? "aborted" : behaviour.loadFails ? "failed" : "loaded";
      if (load.result === "aborted") return "left";
      if (load.result === "failed") return "failed";
    }
    if (left.aborted) return "left";
    this.#use(model);
    return "loaded";
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

/** Waits, but not for a client that has left. */
export function pause(ms: number, left: AbortSignal): Promise<void> {
  if (left.aborted || ms === 0) return Promise.resolve();
  return new Promise((resolve) => {
    const timer = ms === Number.POSITIVE_INFINITY ? undefined : setTimeout(settle, ms);
    function settle(): void {
      clearTimeout(timer);
      left.removeEventListener("abort", settle);
      resolve();
    }
    left.addEventListener("abort", settle);
  });
}

/** `/api/chat` and `/api/generate`: one JSON object per line, the last with `done: true`; durations in ns. */
export function nativeShape(job: Job, route: "chat" | "generate"): Shape {
  const line = (fields: Record<string, unknown>): string =>
    `${JSON.stringify({ model: job.model, created_at: "2026-08-01T12:00:00.123456789Z", ...fields })}\n`;
  const content = (text: string, more: Record<string, unknown> = {}): Record<string, unknown> =>
    route === "chat"
      ? { message: { role: "assistant", content: text, ...more } }
      : { response: text, ...more };
  const numbers = (input: number, output: number): Record<string, unknown> => ({
    total_duration: 96_750_000,
    load_duration: 1_000_000,
    // wire §1.6: absent when 0.
    ...(input === 0 ? {} : { prompt_eval_count: input, prompt_eval_duration: 12_500_000 }),
    ...(output === 0 ? {} : { eval_count: output, eval_duration: 84_250_000 }),
  });
  return {
    contentType: "application/x-ndjson",
    open: () => [],
    piece(piece) {
      if ("text" in piece) return [line({ ...content(piece.text), done: false })];
      if ("reasoning" in piece)
        return [line({ ...content("", { thinking: piece.reasoning }), done: false })];
      const args: unknown = JSON.parse(piece.toolCall.arguments);
      const calls = [{ function: { name: piece.toolCall.name, arguments: args } }];
      return [line({ ...content("", { tool_calls: calls }), done: false })];
    },
    finish: (reason, usage) =>
      reason === null
        ? []
        : [
            line({
              ...content(""),
              done: true,
              done_reason: reason,
              ...numbers(usage.input, usage.output),
            }),
          ],
    done: () => [],
    error: (error) => {
      const message = (error as { message?: string }).message ?? String(error);
      return [`${JSON.stringify({ error: message })}\n`];
    },
    // real §5.1: here the error is told.
    swallowed: () => [
      `${JSON.stringify({ error: "an error was encountered while running the model: unexpected EOF" })}\n`,
    ],
    whole: (pieces, reason, usage) => ({
      model: job.model,
      created_at: "2026-08-01T12:00:00.123456789Z",
      ...content(join(pieces).text),
      done: true,
      done_reason: reason,
      ...numbers(usage.input, usage.output),
    }),
  };
}
