/** The cap of an answer, in the field that each kind of engine obeys; every other byte as it was. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import type { Kind } from "../../src/config.ts";
import { splice, topLevelKeys } from "../../src/core/splice.ts";
import { anthropic, countTokens, messages } from "../../src/dialects/anthropic.ts";
import {
  chatCompletions,
  completions,
  embeddings,
  rerank,
  responses,
} from "../../src/dialects/openai.ts";
import { capOutput } from "../../src/engines/cap.ts";
import { engineOf } from "../../src/engines/kinds.ts";
import { GatewayError } from "../../src/errors.ts";

const CAP = 100;
const KINDS: Kind[] = ["openai", "vllm", "sglang", "lmstudio", "llamacpp", "ollama", "demo"];
const CHAT = "/v1/chat/completions";
const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** The body as the engine gets it. */
function sent(kind: Kind, path: string, body: string, cap: number = CAP): string {
  const engine = engineOf(kind);
  const bytes = encoder.encode(body);
  const keys = topLevelKeys(bytes);
  const edits = new Map<string, string | Uint8Array>(engine.adapt(bytes, keys));
  capOutput(bytes, keys, edits, engine.limitFields[path] ?? [], cap);
  return decoder.decode(splice(bytes, keys, edits));
}

describe("where the client set no limit", () => {
  for (const kind of KINDS) {
    it(`one is put in for ${kind}, where it generates`, () => {
      for (const path of [CHAT, "/v1/completions", "/v1/messages"]) {
        assert.equal(sent(kind, path, '{"model":"m"}'), '{"max_tokens":100,"model":"m"}', path);
      }
      const answer = sent(kind, "/v1/responses", '{"model":"m"}');
      assert.equal(answer, '{"max_output_tokens":100,"model":"m"}');
      for (const { path } of [embeddings, rerank, countTokens]) {
        assert.equal(sent(kind, path, '{"model":"m","max_tokens":900}').includes("100"), false);
      }
    });

    it(`null is none for ${kind}`, () => {
      assert.equal(sent(kind, CHAT, '{ "max_tokens" : null }'), '{ "max_tokens" : 100 }');
      const both = sent(kind, CHAT, '{"max_completion_tokens":null,"max_tokens":null}');
      assert.equal(both, '{"max_completion_tokens":null,"max_tokens":100}');
    });
  }
});

describe("a limit of the client", () => {
  const CASES: [path: string, field: string][] = [
    [CHAT, "max_tokens"],
    [CHAT, "max_completion_tokens"],
    ["/v1/completions", "max_tokens"],
    ["/v1/messages", "max_tokens"],
    ["/v1/responses", "max_output_tokens"],
  ];
  for (const kind of KINDS) {
    it(`that is within the cap is left as it is written, for ${kind}`, () => {
      for (const [path, field] of CASES) {
        for (const value of ["1", "99", "100", "1e2", "5.0e1", "100.0"]) {
          const body = `{ "a": 1e400, "${field}" :${value} , "b":"${field}" }`;
          const got = sent(kind, path, body);
          // Ollama ignores one of the two, so it gets the other with the client's own bytes.
          const isCopied = kind === "ollama" && field === "max_completion_tokens";
          assert.equal(got, isCopied ? `{"max_tokens":${value},${body.slice(1)}` : body);
        }
      }
    });

    it(`that is beyond it, or none at all, becomes the cap, for ${kind}`, () => {
      for (const [path, field] of CASES) {
        for (const value of [
          "101",
          "1e9",
          "1e999",
          "0",
          "-1",
          "-2",
          "50.5",
          '"50"',
          "true",
          "[5]",
          "1".repeat(80),
          `[${"1,".repeat(99)}1]`,
        ]) {
          const got = JSON.parse(sent(kind, path, `{"x":1,"${field}":${value},"y":2}`));
          assert.equal(got[field], CAP, `${path} ${field} ${value}`);
          if (kind === "ollama") assert.equal(got[field.replace("completion_", "")], CAP);
          assert.deepEqual([got.x, got.y], [1, 2]);
        }
      }
    });
  }

  it("counts only where the engine obeys it", () => {
    const body = '{"n_predict":50}';
    assert.equal(sent("llamacpp", CHAT, body), body);
    assert.equal(sent("llamacpp", "/v1/completions", body), body);
    assert.equal(sent("llamacpp", "/v1/responses", body), body);
    assert.equal(sent("llamacpp", "/v1/messages", body), '{"max_tokens":100,"n_predict":50}');
    for (const kind of KINDS.filter((each) => each !== "llamacpp")) {
      assert.equal(sent(kind, CHAT, body), '{"max_tokens":100,"n_predict":50}', kind);
    }
    const other = '{"max_completion_tokens":50}';
    assert.equal(sent("vllm", "/v1/completions", other), `{"max_tokens":100,${other.slice(1)}`);
  });

  it("is no way around another one: all of them are lowered", () => {
    for (const kind of KINDS) {
      const got = JSON.parse(
        sent(kind, CHAT, '{"max_tokens":7,"max_completion_tokens":5000,"n_predict":-1}'),
      );
      const { max_tokens, max_completion_tokens, n_predict } = got;
      assert.deepEqual([max_tokens, max_completion_tokens, n_predict], [7, CAP, CAP], kind);
    }
  });

  it("that Ollama ignores is sent as the one it obeys, without a cap as well", () => {
    const engine = engineOf("ollama");
    for (const more of ["", ',"max_tokens":null']) {
      const bytes = encoder.encode(`{"max_completion_tokens":5${more}}`);
      const [edit] = engine.adapt(bytes, topLevelKeys(bytes));
      assert.equal(edit?.[0], "max_tokens");
      assert.equal(decoder.decode(edit?.[1]), "5");
    }
    const own = encoder.encode('{"max_completion_tokens":5,"max_tokens":9}');
    assert.equal(engine.adapt(own, topLevelKeys(own)).size, 0);
  });
});

it("whatever stands in the body, no field lets the answer run longer", () => {
  const FIELDS = ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict", "x"];
  const anyBody = fc.dictionary(
    fc.constantFrom(...FIELDS),
    fc.oneof(fc.integer({ min: -3, max: 300 }), fc.jsonValue()),
  );
  const paths = [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"];
  fc.assert(
    fc.property(
      anyBody,
      fc.constantFrom(...KINDS),
      fc.constantFrom(...paths),
      fc.integer({ min: 1, max: 200 }),
      (body, kind, path, cap) => {
        const got = JSON.parse(sent(kind, path, JSON.stringify(body), cap));
        const obeyed = engineOf(kind).limitFields[path] ?? [];
        const limits = obeyed.map((field) => got[field]).filter((value) => value != null);
        assert(limits.length > 0, "a limit at least");
        for (const field of FIELDS.slice(0, 4)) {
          const value = got[field];
          if (value == null) continue;
          assert(Number.isInteger(value) && value >= 1 && value <= cap, `${field}: ${value}`);
          const asked = body[field];
          const isLess = Number.isInteger(asked) && Number(asked) >= 1 && Number(asked) <= cap;
          if (isLess) assert.equal(value, asked, "what asks for less stays");
        }
        assert.deepEqual(got.x, JSON.parse(JSON.stringify(body)).x);
      },
    ),
  );
});

it("every field that limits an answer may stand in a body only once", () => {
  for (const { keys } of [chatCompletions, completions, messages, responses]) {
    for (const field of ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"]) {
      assert(keys.includes(field), field);
    }
  }
});

it("the error has its place in every API", () => {
  const error = new GatewayError("output_limit_exceeded", "too long");
  assert.deepEqual([error.code, error.type], ["output_limit_exceeded", "server_error"]);
  assert.match(anthropic.errorEvent(error, "id"), /^event: error\ndata: .*"api_error"/);
  const quota = new GatewayError("insufficient_quota", "used up");
  assert.deepEqual([quota.status, quota.type], [429, "insufficient_quota"]);
  const absent = new GatewayError("not_cached", "not there");
  assert.deepEqual([absent.status, absent.type], [504, "invalid_request_error"]);
});
