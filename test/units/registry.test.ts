/** What is wanted and what was seen, joined into a snapshot. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { schema, type Config, type ConfigInput } from "../../src/config.ts";
import {
  assemble,
  Registry,
  unseen,
  type Facts,
  type Seen,
  type Wanted,
} from "../../src/control/registry.ts";
import { resolve, type Model, type Snapshot } from "../../src/core/snapshot.ts";
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

function assembled(input: ConfigInput, seen: Record<string, Seen> = {}, more: Partial<Facts> = {}) {
  const { models, backends: wanted } = configured(input);
  return assemble({
    models,
    wanted,
    seen: new Map(Object.entries(seen)),
    drained: new Set(),
    startedAt: STARTED,
    ...more,
  });
}

/** The names that are served. */
function served(content: { models: readonly Model[] }): string[] {
  return content.models.map(({ name }) => name);
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
        gpu: null,
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
    assert.deepEqual(
      coder.targets.map(({ backend, model, digest }) => ({ backend, model, digest })),
      [{ backend: "a", model: "Qwen/Coder", digest: "d1" }],
    );
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
    const [backend] = configured({ backends: [{ id: "a", url }] }).backends as [Wanted];
    assert.equal(unseen(backend).kind, "openai");
  });

  it("passes on what the engine tells of a model, and what it does not tell as null", () => {
    const told = {
      residency: "loading",
      sizeBytes: 8,
      vramBytes: 0,
      digest: "d",
      contextLength: 4096,
    } as const;
    const { models } = assembled(
      { backends: [{ id: "a", url }] },
      { a: sight([listed("told", told), listed("untold")]) },
    );
    assert.deepEqual(named(models, "told").targets, [
      { backend: "a", model: "told", slots: 32, ...told },
    ]);
    assert.deepEqual(named(models, "untold").targets, [
      {
        backend: "a",
        model: "untold",
        slots: 32,
        residency: "loaded",
        sizeBytes: null,
        vramBytes: null,
        digest: null,
        contextLength: null,
      },
    ]);
  });

  it("has a named model that the engine does not list cold", () => {
    const { models } = assembled(
      { backends: [{ id: "a", url, models: ["m"] }] },
      { a: sight([listed("other"), listed("another")]) },
    );
    assert.equal(models[0]?.targets[0]?.residency, "cold");
  });

  it("goes by what is configured, then by what the engine says, then by its kind, for slots", () => {
    const slotsOf = (concurrency?: number, slots: number | null = null) =>
      assembled(
        { backends: [{ id: "a", url, kind: "llamacpp", concurrency }] },
        { a: sight([listed("m", { slots })], { kind: "llamacpp" }) },
      ).models[0]?.targets[0]?.slots;
    assert.deepEqual([slotsOf(), slotsOf(undefined, 9), slotsOf(2, 9)], [4, 9, 2]);
  });

  describe("include and exclude", () => {
    const lists = (...names: string[]) => ({ a: sight(names.map((name) => listed(name))) });
    const narrowed = (more: { include?: string[]; exclude?: string[] }, ...names: string[]) =>
      served(assembled({ backends: [{ id: "a", url, ...more }] }, lists(...names)));

    it("narrow what is discovered, the one before the other", () => {
      const names = ["llama3:8b", "llama3:70b", "mistral:7b", "my-llama3"];
      assert.deepEqual(narrowed({ include: ["llama3:*"] }, ...names), ["llama3:70b", "llama3:8b"]);
      assert.deepEqual(narrowed({ include: ["*llama3*"], exclude: ["*:70b", "my*"] }, ...names), [
        "llama3:8b",
      ]);
      assert.deepEqual(narrowed({ exclude: ["*"] }, ...names), []);
      assert.deepEqual(narrowed({ include: [] }, ...names), []);
      assert.deepEqual(narrowed({ exclude: [] }, ...names).length, 4);
    });

    it("mean a name whole, and know no other wildcard than *", () => {
      assert.deepEqual(narrowed({ include: ["llama"] }, "llama3", "llama", "my llama"), ["llama"]);
      const odd = ["a.b", "a+b", "(a|b)", "[ab]", "a?b", "^a$", "a\\b", "a{2}", "a/b:c-d_e"];
      for (const name of odd) {
        assert.deepEqual(narrowed({ include: [name] }, "aab", "axb", "a", "aa", name), [name]);
      }
      assert.deepEqual(narrowed({ include: ["a*b"] }, "ab", "a\nb", "a*b", "abc"), [
        "a\nb",
        "a*b",
        "ab",
      ]);
    });

    it("match exactly what a reader would say", () => {
      const fits = (pattern: string, name: string): boolean => {
        if (pattern === "") return name === "";
        const [first, rest] = [pattern[0], pattern.slice(1)];
        if (first !== "*") return name[0] === first && fits(rest, name.slice(1));
        return fits(rest, name) || (name !== "" && fits(pattern, name.slice(1)));
      };
      const unit = fc.constantFrom(
        "a",
        "b",
        ".",
        "*",
        "+",
        "?",
        "(",
        "]",
        "|",
        "\\",
        "^",
        "$",
        "/",
      );
      const text = fc.string({ unit, minLength: 1, maxLength: 6 });
      fc.assert(
        fc.property(text, text, (pattern, name) => {
          const isIn = fits(pattern, name);
          assert.deepEqual(narrowed({ include: [pattern] }, name), isIn ? [name] : []);
          assert.deepEqual(narrowed({ exclude: [pattern] }, name), isIn ? [] : [name]);
        }),
      );
    });
  });

  describe("models whose answers are made elsewhere", () => {
    const seen = { a: sight([listed("here"), listed("far", { remote: true })]) };

    it("are not served, but known as withheld", () => {
      const content = assembled({ backends: [{ id: "a", url }] }, seen);
      assert.deepEqual([served(content), content.withheld], [["here"], ["far"]]);
    });

    it("are served where that is allowed", () => {
      const content = assembled({ backends: [{ id: "a", url, allowCloud: true }] }, seen);
      assert.deepEqual([served(content), content.withheld], [["far", "here"], []]);
    });

    it("are withheld by name too, and under the name that is given them", () => {
      const models = ["here", { name: "mine", upstream: "far" }];
      const content = assembled({ backends: [{ id: "a", url, models }] }, seen);
      assert.deepEqual([served(content), content.withheld], [["here"], ["mine"]]);
    });

    it("are not withheld where another backend serves that name", () => {
      const content = assembled(
        {
          backends: [
            { id: "a", url },
            { id: "b", url },
          ],
        },
        { ...seen, b: sight([listed("far")]) },
      );
      assert.deepEqual(content.withheld, []);
      assert.deepEqual(
        named(content.models, "far").targets.map(({ backend }) => backend),
        ["b"],
      );
    });

    it("are not withheld where nobody would see them anyway", () => {
      const content = assembled({ backends: [{ id: "a", url, exclude: ["far"] }] }, seen);
      assert.deepEqual(content.withheld, []);
    });
  });

  describe("warnings", () => {
    const abc: ConfigInput = { backends: ["a", "b", "c"].map((id) => ({ id, url })) };
    const version = (digest: string | null) => sight([listed("m", { digest })]);

    it("say once where versions of a model differ, and which", () => {
      const { warnings } = assembled(abc, {
        a: version("sha256-aaaaaaaaaaaa"),
        b: version("sha256-bbbbbbbbbbbb"),
        c: version("sha256-aaaaaaaaaaaa"),
      });
      assert.equal(warnings.length, 1);
      assert.match(warnings[0] ?? "", /^model m is not the same everywhere: /);
      assert.match(warnings[0] ?? "", /\bb has sha256-bbbbb\b/);
      assert.match(warnings[0] ?? "", /\b[ac] has sha256-aaaaa\b/);
    });

    it("say nothing where they are the same, or not told", () => {
      const none = { a: version("x"), b: version("x"), c: version(null) };
      assert.deepEqual(assembled(abc, none).warnings, []);
    });

    it("say that an alias is hidden by a model of that name, and whose it was", () => {
      const input: ConfigInput = {
        backends: [{ id: "a", url }],
        models: { m: { aliases: ["fast", "other"] } },
      };
      const { models, warnings } = assembled(input, { a: sight([listed("m"), listed("fast")]) });
      assert.deepEqual(warnings, ["alias fast of m is not in use: there is a model of that name"]);
      const content = { version: 1, publishedAt: 0, backends: [], withheld: [], warnings: [] };
      const found = resolve({ ...content, models }, "fast");
      assert(found.found);
      assert.equal(found.model.name, "fast");
    });
  });

  it("takes the id in the configuration for all the addresses behind a name", () => {
    const [backend] = configured({ backends: [{ id: "pool", url }] }).backends as [Wanted];
    const wanted = [
      { ...backend, id: "pool@10.0.0.1", group: "pool" },
      { ...backend, id: "pool@10.0.0.2", group: "pool" },
      { ...backend, id: "other" },
    ];
    const seen = new Map(wanted.map(({ id }) => [id, sight([listed("m"), listed("n")])]));
    const { models } = configured({
      backends: [
        { id: "pool", url },
        { id: "other", url },
      ],
      models: { m: { backends: ["pool"] }, n: { backends: ["other"] } },
    });
    const content = assembled({ backends: [] }, {}, { models, wanted, seen });
    const ids = (name: string) => named(content.models, name).targets.map((each) => each.backend);
    assert.deepEqual(ids("m"), ["pool@10.0.0.1", "pool@10.0.0.2"]);
    assert.deepEqual(ids("n"), ["other"]);
  });

  it("gives a model its fallbacks as a list", () => {
    const backends = [{ id: "a", url, models: ["l", "m", "s"] }];
    const models = { l: { fallback: ["m", "s"] }, m: { fallback: "s" } };
    const content = assembled({ backends, models });
    const fallbacks = content.models.map(({ fallback }) => fallback);
    assert.deepEqual(fallbacks, [["m", "s"], ["s"], []]);
  });

  it("knows who has been taken out by hand", () => {
    const drained = new Set(["b", "gone"]);
    const { backends } = assembled(
      {
        backends: [
          { id: "a", url },
          { id: "b", url },
        ],
      },
      {},
      { drained },
    );
    assert.deepEqual(
      backends.map(({ id, drained: isOut }) => [id, isOut]),
      [
        ["a", false],
        ["b", true],
      ],
    );
  });

  it("is plain JSON, in an order that does not depend on the engines'", () => {
    const input: ConfigInput = { backends: [{ id: "a", url }] };
    const one = assembled(input, { a: sight([listed("b"), listed("a"), listed("c")]) });
    const other = assembled(input, { a: sight([listed("c"), listed("b"), listed("a")]) });
    assert.deepEqual(one, other);
    assert.deepEqual(JSON.parse(JSON.stringify(one)), one);
  });
});

function freeze(value: unknown): void {
  if (typeof value !== "object" || value === null) return;
  Object.freeze(value);
  for (const each of Object.values(value)) freeze(each);
}

describe("Registry", () => {
  const NOTHING: ReadonlyMap<string, Seen> = new Map();

  function registry(input: ConfigInput = { backends: [{ id: "a", url }] }) {
    const published: Snapshot[] = [];
    const made = new Registry((snapshot) => {
      assert.deepEqual(JSON.parse(JSON.stringify(snapshot)), snapshot, "plain JSON");
      // Nobody may change it any more, the registry neither.
      freeze(snapshot);
      published.push(snapshot);
    });
    const configure = (next: ConfigInput, looked = NOTHING) => {
      const { models, backends } = configured(next);
      made.configure(models, backends, looked);
    };
    configure(input);
    return { made, published, configure };
  }

  it("is empty before it is told anything, and has published nothing", () => {
    const published: Snapshot[] = [];
    const { snapshot } = new Registry((each) => void published.push(each));
    const { version, backends, models } = snapshot;
    assert.deepEqual([version, backends, models, published], [0, [], [], []]);
  });

  it("publishes whenever something has changed, each time a higher version", () => {
    const { made, published, configure } = registry();
    made.report("a", sight([listed("m")]));
    made.report("a", sight([listed("m")], { health: "degraded", reason: "slow" }));
    made.report("a", sight([listed("n")], { health: "degraded", reason: "slow" }));
    made.report("a", sight([listed("n", { residency: "cold" })], { health: "healthy" }));
    made.drain("a", true);
    configure({ backends: [{ id: "a", url, weight: 2 }] });
    configure({ backends: [{ id: "a", url, weight: 2 }], models: { n: { aliases: ["x"] } } });
    assert.deepEqual(
      published.map(({ version }) => version),
      [1, 2, 3, 4, 5, 6, 7, 8],
    );
    assert.equal(published.at(-1), made.snapshot);
    assert.deepEqual(made.seen("a")?.models, [listed("n", { residency: "cold" })]);
  });

  it("publishes nothing for a probe that saw nothing new, however the list is ordered", () => {
    const { made, published } = registry();
    made.report("a", sight([listed("m"), listed("n")], { checkedAt: 1 }));
    made.report("a", sight([listed("n"), listed("m")], { checkedAt: 2 }));
    made.report("a", sight([listed("n"), listed("m")], { checkedAt: 3 }));
    assert.equal(published.length, 2);
    assert.equal(made.seen("a")?.checkedAt, 3, "but it knows when that was");
  });

  it("publishes nothing for the same configuration, or what changes nothing that is served", () => {
    const { published, configure, made } = registry();
    configure({ backends: [{ id: "a", url }] });
    configure({ backends: [{ id: "a", url, apiKey: "k", healthInterval: 100, timeout: 100 }] });
    made.drain("a", false);
    assert.equal(published.length, 1);
  });

  it("hears nothing of a backend that is not wanted", () => {
    const { made, published, configure } = registry();
    made.report("b", sight([listed("m")]));
    configure({ backends: [{ id: "b", url }] });
    made.report("a", sight([listed("m")]));
    assert.deepEqual(made.snapshot.models, []);
    assert.equal(made.seen("a"), undefined);
    assert.equal(published.length, 2);
  });

  describe("another configuration", () => {
    const a = { id: "a", url };

    it("keeps what was seen of a backend that stays where it is", () => {
      const { made, configure } = registry();
      made.report("a", sight([listed("m")]));
      configure({
        backends: [
          { ...a, weight: 3 },
          { id: "b", url },
        ],
      });
      assert.equal(made.snapshot.backends[0]?.health, "healthy");
      assert.deepEqual(served(made.snapshot), ["m"]);
    });

    it("keeps the models of one that moved, and nothing else, until it is seen", () => {
      const { made, configure } = registry();
      made.report("a", sight([listed("m")]));
      configure({ backends: [{ ...a, url: "http://127.0.0.1:2" }] });
      const [backend] = made.snapshot.backends;
      assert.deepEqual(
        [backend?.health, backend?.reason, backend?.checkedAt, backend?.url],
        ["unknown", "not probed yet", null, "http://127.0.0.1:2"],
      );
      assert.deepEqual(served(made.snapshot), ["m"]);
      made.report("a", sight([listed("n")]));
      assert.deepEqual(served(made.snapshot), ["n"]);
    });

    it("takes what a first look showed, in the same snapshot", () => {
      const { made, published, configure } = registry();
      made.report("a", sight([listed("m")]));
      const looked = new Map([["b", sight([listed("n")], { kind: "vllm" })]]);
      configure({ backends: [{ id: "b", url: "http://127.0.0.1:2" }] }, looked);
      assert.equal(published.length, 3);
      assert.deepEqual(
        made.snapshot.backends.map(({ id, kind, health }) => [id, kind, health]),
        [["b", "vllm", "healthy"]],
      );
      assert.deepEqual(served(made.snapshot), ["n"]);
    });

    it("keeps the models of one that moved to where an engine is still loading", () => {
      const { made, configure } = registry();
      made.report("a", sight([listed("m")]));
      const loading = sight([], { health: "degraded", reason: "the engine is loading its model" });
      configure({ backends: [{ ...a, url: "http://127.0.0.1:2" }] }, new Map([["a", loading]]));
      assert.equal(made.snapshot.backends[0]?.health, "degraded");
      assert.deepEqual(served(made.snapshot), ["m"]);
    });

    it("does not take a look for one that was not new", () => {
      const { made, configure } = registry();
      made.report("a", sight([listed("m")]));
      configure({ backends: [a] }, new Map([["a", sight([])]]));
      assert.deepEqual(served(made.snapshot), ["m"]);
    });

    it("forgets what was seen of one that went: it comes back as a stranger", () => {
      const { made, configure } = registry();
      made.report("a", sight([listed("m")]));
      configure({ backends: [{ id: "b", url }] });
      configure({ backends: [a] });
      assert.deepEqual([made.snapshot.backends[0]?.health, served(made.snapshot)], ["unknown", []]);
    });

    it("knows the key of each backend, and keeps it out of every snapshot", () => {
      const { made, published, configure } = registry();
      assert.equal(made.apiKeyOf("a"), null);
      configure({
        backends: [
          { ...a, apiKey: "secret" },
          { id: "b", url, apiKey: "other" },
        ],
      });
      assert.deepEqual([made.apiKeyOf("a"), made.apiKeyOf("b")], ["secret", "other"]);
      configure({ backends: [a] });
      assert.deepEqual([made.apiKeyOf("a"), made.apiKeyOf("b")], [null, null]);
      assert(!JSON.stringify(published).includes("secret"));
    });
  });

  describe("drain", () => {
    const isDrained = (made: Registry, id: string) =>
      made.snapshot.backends.find((backend) => backend.id === id)?.drained;

    it("takes out and back in, and knows only who is wanted", () => {
      const { made } = registry();
      assert.equal(made.drain("a", true), true);
      assert.equal(isDrained(made, "a"), true);
      assert.equal(made.drain("a", true), true);
      assert.equal(made.drain("nobody", true), false);
      assert.equal(made.drain("a", false), true);
      assert.equal(isDrained(made, "a"), false);
    });

    it("survives probes and configurations, also one that moves the backend", () => {
      const { made, configure } = registry();
      made.drain("a", true);
      made.report("a", sight([listed("m")]));
      assert.equal(isDrained(made, "a"), true);
      configure({ backends: [{ id: "a", url: "http://127.0.0.1:2", weight: 2 }] });
      assert.equal(isDrained(made, "a"), true);
    });

    it("is forgotten when the backend goes", () => {
      const { made, configure } = registry();
      made.drain("a", true);
      configure({ backends: [{ id: "b", url }] });
      configure({ backends: [{ id: "a", url }] });
      assert.equal(isDrained(made, "a"), false);
    });
  });

  it("has a higher version exactly when the content is another, whatever happens", () => {
    const ids = fc.constantFrom("a", "b", "c");
    const step = fc.oneof(
      fc.record({
        type: fc.constant("report" as const),
        id: ids,
        health: fc.constantFrom("healthy" as const, "degraded" as const),
        names: fc.subarray(["m", "n"]),
        checkedAt: fc.nat(),
      }),
      fc.record({
        type: fc.constant("configure" as const),
        ids: fc.uniqueArray(ids),
        port: fc.constantFrom(1, 2),
      }),
      fc.record({ type: fc.constant("drain" as const), id: ids, drained: fc.boolean() }),
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 30 }), (steps) => {
        const { made, published, configure } = registry({ backends: [] });
        const bare = ({ backends, ...rest }: Snapshot) => {
          const unchecked = backends.map((each) => ({ ...each, checkedAt: 0 }));
          return JSON.stringify([unchecked, { ...rest, version: 0, publishedAt: 0 }]);
        };
        for (const each of steps) {
          const before = made.snapshot;
          if (each.type === "drain") made.drain(each.id, each.drained);
          else if (each.type === "configure") {
            const place = `http://127.0.0.1:${each.port}`;
            configure({ backends: each.ids.map((id) => ({ id, url: place })) });
          } else {
            const { health, checkedAt } = each;
            made.report(
              each.id,
              sight(
                each.names.map((name) => listed(name)),
                { health, checkedAt },
              ),
            );
          }
          const after = made.snapshot;
          const isOther = bare(before) !== bare(after);
          assert.equal(after.version - before.version, isOther ? 1 : 0);
          assert.equal(published.at(-1) ?? before, after);
          const wanted = made.wanted.map(({ id }) => id);
          assert.deepEqual(
            after.backends.map(({ id }) => id),
            wanted,
          );
        }
      }),
    );
  });
});
