/** What an engine does not get of a body: Ollama would load the model anew for it, or put it out. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { topLevelKeys, without } from "../../src/core/splice.ts";
import { engineOf } from "../../src/engines/kinds.ts";
import type { Kind } from "../../src/config.ts";

/** Names that are told, and the body that is left. */
function withheld(text: string, kind: Kind = "ollama"): [names: string, body: string] {
  const bytes = new TextEncoder().encode(text);
  const { names, spans } = engineOf(kind).withhold(bytes, topLevelKeys(bytes));
  return [names.join(), new TextDecoder().decode(without(bytes, spans))];
}

describe("what Ollama does not get", () => {
  const cases: [what: string, text: string, names: string, left: string][] = [
    [
      "an option of the runner",
      '{"model":"m","options":{"num_ctx":8192,"seed":12345678901234567890}}',
      "num_ctx",
      '{"model":"m","options":{"seed":12345678901234567890}}',
    ],
    [
      "all of them, whatever they hold",
      '{"options":{"num_batch":1,"num_gpu":-1,"main_gpu":null,"use_mmap":false,"num_thread":"4",' +
        '"draft_num_predict":[1],"temperature":1.0e0}, "x":1}',
      "num_batch,num_gpu,main_gpu,use_mmap,num_thread,draft_num_predict",
      '{"options":{"temperature":1.0e0}, "x":1}',
    ],
    [
      "those of older versions",
      '{"options":{"low_vram":true,"f16_kv":true,"logits_all":1,"vocab_only":1,"use_mlock":1,"numa":1}}',
      "low_vram,f16_kv,logits_all,vocab_only,use_mlock,numa",
      '{"options":{}}',
    ],
    [
      "one that stands twice, with spaces around",
      '{ "options" : { "num_ctx" : 1 , "top_k" : 1.50 , "num_ctx" : 2 } }',
      "num_ctx",
      '{ "options" : { "top_k" : 1.50 } }',
    ],
    [
      "options that stand twice: it joins them",
      '{"options":{"num_ctx":1,"seed":1},"model":"m","options":{"num_ctx":2}}',
      "num_ctx",
      '{"options":{"seed":1},"model":"m","options":{}}',
    ],
    [
      "names in other letters, or with escapes",
      '{"OPTIONS":{"Num_Ctx":1,"seed":1},"optionſ":{"num\\u005fgpu":1},"Keep_Alive":0}',
      "num_ctx,num_gpu,keep_alive",
      '{"OPTIONS":{"seed":1},"optionſ":{}}',
    ],
    ["when the model leaves", '{"keep_alive":"1h","model":"m"}', "keep_alive", '{"model":"m"}'],
    ["shift", '{"model":"m","shift":false}', "shift", '{"model":"m"}'],
    [
      "several at several depths",
      '{"keep_alive":-1,"options":{"num_ctx":1},"shift":true,"prompt":"num_ctx"}',
      "num_ctx,keep_alive,shift",
      '{"options":{},"prompt":"num_ctx"}',
    ],
  ];
  for (const [what, text, names, left] of cases) {
    it(what, () => {
      assert.deepEqual(withheld(text), [names, left]);
      JSON.parse(left);
    });
  }

  it("is none of what stands elsewhere, or is no object", () => {
    for (const text of [
      '{"num_ctx":8192,"model":"m"}',
      '{"messages":[{"options":{"num_ctx":1},"keep_alive":0}]}',
      '{"options":{"nested":{"num_ctx":1},"num_predict":5,"num_keep":1}}',
      '{"options":[{"num_ctx":1}]}',
      '{"options":"{\\"num_ctx\\":1}"}',
      '{"options":null}',
      "{}",
    ]) {
      assert.deepEqual(withheld(text), ["", text]);
    }
  });
});

it("other engines get everything", () => {
  const text = '{"options":{"num_ctx":8192},"keep_alive":0,"shift":true}';
  const kinds: Kind[] = ["openai", "vllm", "llamacpp", "lmstudio", "sglang", "demo"];
  for (const kind of kinds) assert.deepEqual(withheld(text, kind), ["", text], kind);
});
