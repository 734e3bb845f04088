/** Did you mean …? */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { suggest } from "../../src/core/suggest.ts";

const KEYS = ["maxWaitMs", "maxLength", "heartbeatMs", "port", "host"];

describe("suggest", () => {
  it("finds a word with a letter missing, too much, wrong, or swapped", () => {
    assert.equal(suggest("prt", KEYS), "port");
    assert.equal(suggest("poort", KEYS), "port");
    assert.equal(suggest("hosT", KEYS), "host");
    assert.equal(suggest("prot", KEYS), "port");
    assert.equal(suggest("heartbeetMs", KEYS), "heartbeatMs");
  });

  it("counts a swap of neighbours as one mistake", () => {
    // Two mistakes would be beyond what a word of three letters may have.
    assert.equal(suggest("atb", ["tab"]), "tab");
    assert.equal(suggest("bta", ["tab"]), null);
  });

  it("ignores case and keeps the known spelling", () => {
    assert.equal(suggest("MAXWAITMS", KEYS), "maxWaitMs");
  });

  it("finds what begins with what was written", () => {
    assert.equal(suggest("max", ["other", "maxLength"]), "maxLength");
    assert.equal(suggest("llama3", ["mistral:7b", "llama3.1:8b-instruct"]), "llama3.1:8b-instruct");
    assert.equal(suggest("m", ["maxLength"]), null, "one letter says too little");
  });

  it("prefers the same word in another case to one that only begins alike", () => {
    assert.equal(suggest("Port", ["portable", "port"]), "port");
    assert.equal(suggest("Port", ["port", "portable"]), "port");
  });

  it("says nothing where nothing is near", () => {
    assert.equal(suggest("completely", KEYS), null);
    assert.equal(suggest("", KEYS), null);
    assert.equal(suggest("port", []), null);
  });

  it("prefers the nearest", () => {
    assert.equal(suggest("temprature", ["temperament", "temperature"]), "temperature");
  });

  it("answers quickly for any length a client sends", () => {
    const word = "x".repeat(1_000_000);
    assert.equal(suggest(word, ["y".repeat(1_000_000), "port"]), null);
    const bounded = "a".repeat(64);
    assert.equal(suggest(bounded + "b".repeat(100), [bounded]), bounded, "looks at 64 letters");
  });

  it("suggests only known words, and always one that is a single edit away", () => {
    const word = fc.string({
      unit: fc.constantFrom("a", "b", "c", "d", "e", "f"),
      minLength: 3,
      maxLength: 12,
    });
    fc.assert(
      fc.property(word, fc.array(word), fc.nat(), (known, others, place) => {
        const all = [...others, known];
        const at = place % known.length;
        const typo = `${known.slice(0, at)}z${known.slice(at + 1)}`;
        const suggestion = suggest(typo, all);
        assert(suggestion !== null && all.includes(suggestion));
        const missing = known.slice(0, at) + known.slice(at + 1);
        assert(suggest(missing, all) !== null);
      }),
    );
  });
});
