import type { Priority } from "../../src/core/fairness.ts";

/** A part of a prompt. The same parts in the same order at the beginning are a shared prefix. */
export interface Segment {
  id: string;
  tokens: number;
}

export interface Request {
  model: string;
  flow: string;
  priority: Priority;
  prompt: readonly Segment[];
  answerTokens: number;
  /** The answer as a part of the prompt of the next turn; null: nobody will send it back. */
  answerId: string | null;
  /** Its client leaves so long after it asked, milliseconds. */
  patienceMs: number;
  /** Requests with the same name are identical and deterministic; null: its answer is its own. */
  sameAs: string | null;
}

export type Answer =
  | { type: "served"; tokens: number }
  /** `retryAfterMs` null: nothing was said. */
  | { type: "refused"; retryAfterMs: number | null };

/** What happens to a request. Of one whose client has left only `released` is told. */
export interface Listener {
  started?(): void;
  /** @param cachedTokens of its prompt, as the engine counts them. */
  firstToken?(cachedTokens: number): void;
  ended(answer: Answer): void;
  /** The engine has let go of it; `tokens` were made. Once, whatever became of it. */
  released?(tokens: number): void;
}

/** What a client can ask: an engine, or what stands in front of engines. */
export interface Service {
  /** @returns the client leaves. */
  ask(request: Request, listener: Listener): () => void;
}

/** What an engine has done. */
export interface Work {
  /** Models, one for each load that was begun. */
  loads: string[];
  promptTokens: number;
  /** Of the prompts' tokens those that were in the prefix cache. */
  cachedTokens: number;
  answerTokens: number;
  /** Of the answers' tokens those made after the client had gone. */
  wastedTokens: number;
  /** How often each deterministic request was computed. */
  computed: Map<string, number>;
}

/** One inference server. */
export interface Engine extends Service {
  work: Work;
  /** Models in memory, ready to be used. */
  loaded(): string[];
  /** Null where it cannot be told to load or to unload: then it does so by itself alone. */
  load: ((model: string, done: () => void) => void) | null;
  unload: ((model: string, done: () => void) => void) | null;
}

export function createWork(): Work {
  return {
    loads: [],
    promptTokens: 0,
    cachedTokens: 0,
    answerTokens: 0,
    wastedTokens: 0,
    computed: new Map(),
  };
}

export function sizeOf(prompt: readonly Segment[]): number {
  return prompt.reduce((sum, { tokens }) => sum + tokens, 0);
}
