import type { Kind } from "../config.ts";
import { demo } from "./demo.ts";
import { openai, type Engine } from "./engine.ts";
import { ollama } from "./ollama.ts";

/** The engine of each kind. Those without a file of their own are served as plain OpenAI engines. */
const ENGINES: Record<Kind, Engine> = {
  ollama,
  openai,
  demo,
  llamacpp: { ...openai, kind: "llamacpp", slots: 4 },
  vllm: { ...openai, kind: "vllm", slots: 64 },
  lmstudio: { ...openai, kind: "lmstudio", slots: 4 },
  sglang: { ...openai, kind: "sglang", slots: 64 },
};

export function engineOf(kind: Kind): Engine {
  return ENGINES[kind];
}
