/** What is wanted and what was seen, joined into a snapshot. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { schema, type BackendConfig, type Config, type ConfigInput } from "../../src/config.ts";
import { assemble, Registry, unseen, type Seen } from "../../src/control/registry.ts";
import type { Model, Snapshot } from "../../src/core/snapshot.ts";
import { modelNamed, type ListedModel } from "../../src/engines/engine.ts";

const STARTED = 1_700_000_000;

function configured(input: ConfigInput): Config {
  return schema.parse(input);
}

function listed(name: string, more: Partial<ListedModel> = {}): ListedModel {
  return modelNamed(name, more);
}

function sight(models: ListedModel[], more: Partial<Seen> = {}): Seen {
  return { kind: "openai", health: "healthy", reason: "", checkedAt: 1, models, ...more };
}

function assembled(input: ConfigInput, seen: Record<string, Seen> = {}) {
  const config = configured(input);
  return assemble(config, config.backends, new Map(Object.entries(seen)), STARTED);
}

const url = "http://127.0.0.1:1";
const named = (models: readonly Model[], name: string): Model => {
  const model = models.find((each) => each.name === name);
  assert(model !== undefined, `no model ${name}`);
  return model;
};

describe("assemble", () => {
  it("knows a backend before it was seen, as unknown", () => {
    const { backends, models } = assembled({
      backends: [{ id: "a", kind: "vllm", url: `${url}/v1`, concurrency: 3, weight: 2 }],
    });
    assert.deepEqual(backends, [
      {
        id: "a",
        kind: "vllm",
        url,
        health: "unknown",
        reason: "not probed yet",
        checkedAt: null,
        drained: false,
        weight: 2,
        concurrency: 3,
      },
    ]);
    assert.deepEqual(models, []);
  });

  it("serves named models also while the engine is away, and exactly these", () => {
    const input: ConfigInput = { backends: [{ id: "a", url, models: ["x", "y"] }] };
    const names = (seen: Record<string, Seen>) => assembled(input, seen).models.map((m) => m.name);
    assert.deepEqual(names({}), ["x", "y"]);
    assert.deepEqual(names({ a: sight([listed("y"), listed("z")]) }), ["x", "y"]);
    assert.deepEqual(names({ a: sight([], { health: "unhealthy" }) }), ["x", "y"]);
  });

  it("serves what is discovered where no models are named, and nothing where none may be", () => {
    const seen = { a: sight([listed("x"), listed("b")]) };
    const found = assembled({ backends: [{ id: "a", url }] }, seen).models;
    assert.deepEqual(
      found.map((model) => model.name),
      ["b", "x"],
    );
    assert.deepEqual(assembled({ backends: [{ id: "a", url, models: [] }] }, seen).models, []);
  });

  it("keeps what was discovered while the engine is away", () => {
    const away = sight([listed("x")], { health: "unhealthy", reason: "connection refused" });
    const { backends, models } = assembled({ backends: [{ id: "a", url }] }, { a: away });
    assert.equal(models[0]?.name, "x");
    assert.deepEqual(
      [backends[0]?.health, backends[0]?.reason],
      ["unhealthy", "connection refused"],
    );
  });

  it("asks the engine for a model by the engine's own name", () => {
    const models = [{ name: "coder", upstream: "Qwen/Coder" }, { name: "plain" }];
    const seen = { a: sight([listed("Qwen/Coder", { digest: "d1", contextLength: 4096 })]) };
    const content = assembled({ backends: [{ id: "a", url, models }] }, seen);
    const coder = named(content.models, "coder");
    assert.deepEqual(coder.targets, [
      { backend: "a", model: "Qwen/Coder", slots: 32, digest: "d1" },
    ]);
    assert.equal(coder.contextLength, 4096);
    assert.equal(named(content.models, "plain").targets[0]?.model, "plain");
  });

  it("makes one model of the same name on several backends", () => {
    const { models } = assembled(
      {
        backends: [
          { id: "a", url, models: [{ name: "m", upstream: "at-a" }] },
          { id: "b", url },
          { id: "c", url, models: ["other"] },
        ],
      },
      {
        a: sight([listed("at-a", { contextLength: 2048, capabilities: ["tools"], createdAt: 5 })]),
        b: sight([listed("m", { contextLength: 8192, capabilities: ["tools", "vision"] })]),
      },
    );
    assert.equal(models.length, 2);
    const model = named(models, "m");
    assert.deepEqual(
      model.targets.map(({ backend, model: upstream }) => [backend, upstream]),
      [
        ["a", "at-a"],
        ["b", "m"],
      ],
    );
    assert.equal(model.contextLength, 8192);
    assert.deepEqual(model.capabilities, ["tools", "vision"]);
    assert.equal(model.createdAt, 5);
    assert.equal(named(models, "other").createdAt, STARTED, "an engine that does not tell");
  });

  it("has one target per backend, though it lists a model twice", () => {
    const { models } = assembled(
      { backends: [{ id: "a", url, models: ["m", { name: "m", upstream: "n" }] }] },
      {},
    );
    assert.deepEqual(
      models[0]?.targets.map((target) => target.model),
      ["m"],
    );
  });

  it("serves a model only from the backends its settings name", () => {
    const backends = ["a", "b", "c"].map((id) => ({ id, url, models: ["m", "free"] }));
    const { models } = assembled({ backends, models: { m: { backends: ["c", "a"] } } });
    const ids = (name: string) => named(models, name).targets.map(({ backend }) => backend);
    assert.deepEqual(ids("m"), ["a", "c"]);
    assert.deepEqual(ids("free"), ["a", "b", "c"]);
  });

  it("gives a model its aliases and its cap", () => {
    const { models } = assembled({
      backends: [{ id: "a", url, models: ["m", "n"] }],
      models: { m: { aliases: ["default"], concurrency: 4 }, unserved: { aliases: ["x"] } },
    });
    const { aliases, concurrency } = named(models, "m");
    assert.deepEqual([aliases, concurrency], [["default"], 4]);
    assert.deepEqual([named(models, "n").aliases, named(models, "n").concurrency], [[], null]);
    assert.equal(models.length, 2, "settings alone serve nothing");
  });

  const slots: [Seen["kind"], number][] = [
    ["vllm", 64],
    ["sglang", 64],
    ["ollama", 1],
    ["openai", 32],
    ["lmstudio", 4],
    ["llamacpp", 4],
    ["demo", 8],
  ];
  for (const [kind, expected] of slots) {
    it(`gives a model of ${kind} ${expected} slots, or what is configured`, () => {
      const backend = { id: "a", url, models: ["m"] };
      const seen = { a: sight([], { kind }) };
      const slotsOf = (more: object) =>
        assembled({ backends: [{ ...backend, ...more }] }, seen).models[0]?.targets[0]?.slots;
      assert.equal(slotsOf({}), expected);
      assert.equal(slotsOf({ concurrency: 7 }), 7);
    });
  }

  it("takes the kind that was seen where none is configured", () => {
    const { backends } = assembled(
      { backends: [{ id: "a", url }] },
      { a: sight([], { kind: "sglang" }) },
    );
    assert.equal(backends[0]?.kind, "sglang");
    assert.equal(unseen({ id: "a", weight: 1, healthInterval: 1, timeout: 1 }).kind, "openai");
  });

  it("is plain JSON, in an order that does not depend on the engines'", () => {
    const input: ConfigInput = { backends: [{ id: "a", url }] };
    const one = assembled(input, { a: sight([listed("b"), listed("a"), listed("c")]) });
    const other = assembled(input, { a: sight([listed("c"), listed("b"), listed("a")]) });
    assert.deepEqual(one, other);
    assert.deepEqual(JSON.parse(JSON.stringify(one)), one);
  });
});

describe("Registry", () => {
  function registry(backends: BackendConfig[]) {
    const published: Snapshot[] = [];
    const made = new Registry({ models: {} }, backends, (snapshot) => published.push(snapshot));
    return { made, published };
  }

  const [wanted] = configured({ backends: [{ id: "a", url }] }).backends as [BackendConfig];

  it("publishes at once, and again whenever something has changed", () => {
    const { made, published } = registry([wanted]);
    assert.deepEqual([published.length, made.snapshot.version], [1, 1]);
    made.report("a", sight([listed("m")]));
    made.report("a", sight([listed("m")], { health: "degraded", reason: "slow" }));
    made.report("a", sight([listed("n")], { health: "degraded", reason: "slow" }));
    assert.deepEqual(
      published.map(({ version }) => version),
      [1, 2, 3, 4],
    );
    assert.equal(published.at(-1), made.snapshot);
    assert.deepEqual(made.seen("a")?.models, [listed("n")]);
  });

  it("publishes nothing for a probe that saw nothing new, however the list is ordered", () => {
    const { made, published } = registry([wanted]);
    made.report("a", sight([listed("m"), listed("n")], { checkedAt: 1 }));
    made.report("a", sight([listed("n"), listed("m")], { checkedAt: 2 }));
    assert.equal(published.length, 2);
    assert.equal(made.seen("a")?.checkedAt, 2);
  });

  it("leaves a published snapshot as it was", () => {
    const { made, published } = registry([wanted]);
    made.report("a", sight([listed("m")]));
    const before = JSON.stringify(published[1]);
    made.report("a", sight([listed("m", { contextLength: 1 }), listed("n")]));
    assert.equal(JSON.stringify(published[1]), before);
  });
});
