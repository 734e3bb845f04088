import type { EngineKind } from "./engine-call.ts";
import { llamacpp } from "./engine-llamacpp.ts";
import { lmstudio } from "./engine-lmstudio.ts";
import { ollama } from "./engine-ollama.ts";
import { openai } from "./engine-openai.ts";
import type { Profile } from "./engine-profile.ts";
import { router } from "./engine-router.ts";
import { sglang } from "./engine-sglang.ts";
import { vllm } from "./engine-vllm.ts";

export const profiles: Record<EngineKind, Profile> = {
  ollama,
  openai,
  llamacpp,
  "llamacpp-router": router,
  vllm,
  lmstudio,
  sglang,
};
