import type { Kind } from "../config.ts";
import { demo } from "./demo.ts";
import { openai, type Engine } from "./engine.ts";
import { llamacpp } from "./llamacpp.ts";
import { lmstudio } from "./lmstudio.ts";
import { ollama } from "./ollama.ts";
import { sglang } from "./sglang.ts";
import { vllm } from "./vllm.ts";

const ENGINES: Record<Kind, Engine> = {
  ollama,
  openai,
  demo,
  llamacpp,
  vllm,
  lmstudio,
  sglang,
};

/** The engine of a kind. */
export function engineOf(kind: Kind): Engine {
  return ENGINES[kind];
}
