/** Which model a name means (design §3, point 3). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  backendOf,
  resolve,
  visibleTo,
  type Model,
  type Snapshot,
} from "../../src/core/snapshot.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";

function model(name: string, aliases: string[] = []): Model {
  return aModel(name, [aTarget("b", name)], { aliases });
}

function snapshot(...models: Model[]): Snapshot {
  return aSnapshot([aBackend("b")], models);
}

/** The name that was found, or what was suggested instead. */
function found(of: Snapshot, asked: string): string {
  const resolution = resolve(of, asked);
  return resolution.found ? resolution.model.name : `not found, ${resolution.suggestion}`;
}

describe("resolve", () => {
  it("takes a name as it stands", () => {
    const here = snapshot(model("llama3:8b"), model("llama3:70b"), model("org/some-model"));
    assert.equal(found(here, "llama3:8b"), "llama3:8b");
    assert.equal(found(here, "org/some-model"), "org/some-model");
  });

  it("takes an alias for the model it belongs to", () => {
    const here = snapshot(model("llama3:8b", ["default", "gpt-4o"]), model("mistral:7b"));
    assert.equal(found(here, "default"), "llama3:8b");
    assert.equal(found(here, "gpt-4o"), "llama3:8b");
  });

  it("prefers a model's own name to another's alias, whichever comes first", () => {
    const borrower = model("borrower", ["owner"]);
    assert.equal(found(snapshot(borrower, model("owner")), "owner"), "owner");
    assert.equal(found(snapshot(model("owner"), borrower), "owner"), "owner");
  });

  it("takes a name without a tag for its :latest, though there are others", () => {
    const here = snapshot(model("qwen:7b"), model("qwen:latest"), model("qwen:14b"));
    assert.equal(found(here, "qwen"), "qwen:latest");
  });

  it("takes a name without a tag for the only tag there is", () => {
    const here = snapshot(model("qwen:7b"), model("qwen2.5:14b"), model("llama3:8b"));
    assert.equal(found(here, "qwen"), "qwen:7b");
    assert.equal(found(here, "qwen2.5"), "qwen2.5:14b");
    assert.equal(found(snapshot(model("hf.co/org/m:Q4_K_M")), "hf.co/org/m"), "hf.co/org/m:Q4_K_M");
  });

  it("does not guess between several tags", () => {
    const here = snapshot(model("qwen:7b"), model("qwen:14b"));
    assert.match(found(here, "qwen"), /^not found, qwen:/);
  });

  it("prefers the exact name to :latest", () => {
    assert.equal(found(snapshot(model("qwen"), model("qwen:latest")), "qwen"), "qwen");
  });

  it("adds no tag to a name that has one", () => {
    const here = snapshot(model("qwen:7b:latest"), model("qwen:7b-instruct"));
    assert.match(found(here, "qwen:7b"), /^not found/);
  });

  it("does not take the beginning of a name for the name", () => {
    assert.equal(found(snapshot(model("qwen2.5:14b")), "qwen2"), "not found, qwen2.5:14b");
  });

  it("suggests what was most likely meant, and nothing where nothing is near", () => {
    const here = snapshot(model("llama3:8b", ["default"]), model("mistral:7b"));
    assert.equal(found(here, "lama3:8b"), "not found, llama3:8b");
    assert.equal(found(here, "defualt"), "not found, default");
    assert.equal(found(here, "gpt-5-turbo-preview"), "not found, null");
    assert.equal(found(snapshot(), "llama3"), "not found, null");
  });

  it("finds every model by its name and, where no name takes it, every alias", () => {
    const name = fc.constantFrom("a", "b", "a:1", "a:2", "b:latest", "c:1", "d");
    const models = fc.uniqueArray(fc.record({ name, aliases: fc.array(name, { maxLength: 2 }) }), {
      selector: (each) => each.name,
    });
    fc.assert(
      fc.property(models, (each) => {
        const here = snapshot(...each.map((one) => model(one.name, one.aliases)));
        const names = new Set<string>(each.map((one) => one.name));
        for (const one of each) assert.equal(found(here, one.name), one.name);
        for (const alias of each.flatMap((one) => one.aliases)) {
          const owners = each.filter((one) => one.aliases.includes(alias));
          const taker = found(here, alias);
          assert(names.has(alias) || owners.some((one) => one.name === taker));
        }
      }),
    );
  });

  it("sees each snapshot as it is, though they are looked up through an index", () => {
    const before = snapshot(model("a"));
    assert.equal(found(before, "a"), "a");
    const after = snapshot(model("a", ["x"]), model("b"));
    assert.equal(found(after, "b"), "b");
    assert.equal(found(before, "b"), "not found, a");
  });

  it("works on a snapshot that came as JSON", () => {
    const copy = JSON.parse(JSON.stringify(snapshot(model("qwen:7b", ["q"])))) as Snapshot;
    assert.equal(found(copy, "q"), "qwen:7b");
    assert.equal(found(copy, "qwen"), "qwen:7b");
  });
});

describe("backendOf", () => {
  it("finds by id", () => {
    const here = snapshot();
    assert.equal(backendOf(here, "b"), here.backends[0]);
    assert.equal(backendOf(here, "c"), undefined);
  });
});

describe("visibleTo", () => {
  const here = {
    ...snapshot(
      model("llama3:8b", ["default"]),
      model("llama3:70b", ["big"]),
      model("mistral:7b"),
      model("org/secret-project"),
    ),
    withheld: ["llama3:cloud", "secret:cloud"],
    warnings: ["alias secret is taken"],
  };
  const names = (patterns: string[]) => visibleTo(here, patterns).models.map(({ name }) => name);

  it("is the snapshot itself where everything is allowed", () => {
    assert.equal(visibleTo(here, ["*"]), here);
    assert.equal(visibleTo(here, ["a", "*"]), here);
  });

  it("has the models whose public name fits one of the patterns, and no others", () => {
    assert.deepEqual(names(["llama3:*"]), ["llama3:8b", "llama3:70b"]);
    assert.deepEqual(names(["*:7b", "llama3:8b"]), ["llama3:8b", "mistral:7b"]);
    assert.deepEqual(names(["*/*"]), ["org/secret-project"]);
    assert.deepEqual(names(["llama3", "LLAMA3:8b", "mistral.7b"]), [], "to the letter");
    assert.deepEqual(names([]), []);
  });

  it("knows a visible model by its alias, and no alias of another", () => {
    const view = visibleTo(here, ["llama3:8b"]);
    assert.equal(found(view, "default"), "llama3:8b");
    assert.equal(found(view, "llama3"), "llama3:8b", "the only tag there is, for this one");
    assert.equal(found(view, "big"), "not found, null");
    assert.equal(found(visibleTo(here, ["default"]), "default"), "not found, null");
  });

  it("tells of no other: not by a guess, not by what is withheld, not by a warning", () => {
    const view = visibleTo(here, ["llama3:*"]);
    for (const asked of ["org/secret-project", "org/secret-projec", "mistral", "mistral:8b"]) {
      assert.equal(found(view, asked), "not found, null");
    }
    assert.deepEqual(view.withheld, ["llama3:cloud"]);
    assert.doesNotMatch(JSON.stringify(view), /secret|mistral/);
  });

  it("is made once for a snapshot and a list, and anew for another of either", () => {
    const patterns = ["mistral*"];
    const view = visibleTo(here, patterns);
    assert.equal(visibleTo(here, patterns), view);
    const next = { ...here, version: 2, models: [...here.models, model("mistral:22b")] };
    assert.equal(visibleTo(next, patterns).version, 2);
    assert.equal(visibleTo(next, patterns).models.length, 2);
    assert.equal(visibleTo(here, ["llama3:8b"]).models.length, 1);
    assert.deepEqual([view.backends, view.version], [here.backends, here.version]);
  });
});
