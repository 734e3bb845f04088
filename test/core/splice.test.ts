/** Replacing top-level keys of a JSON object by byte range: everything else stays as it was written. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { concat, spansOf, splice, topLevelKeys, without } from "../../src/core/splice.ts";

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

/** Key -> its value as it is written. */
function keysOf(text: string): [name: string, value: string][] {
  const bytes = encoder.encode(text);
  return topLevelKeys(bytes).map(({ name, value }) => [
    name,
    decoder.decode(bytes.subarray(value.start, value.end)),
  ]);
}

function spliced(text: string, edits: Record<string, string>): string {
  const bytes = encoder.encode(text);
  return decoder.decode(splice(bytes, topLevelKeys(bytes), new Map(Object.entries(edits))));
}

/** A body whose every byte is known by its part. */
interface Body {
  lead: string;
  members: { before: string; name: string; colon: string; value: string; after: string }[];
  /** Between the braces of an object without members. */
  inner: string;
  tail: string;
}

function textOf(body: Body, replaced: ReadonlyMap<string, string> = new Map()): string {
  const members = body.members.map(({ before, name, colon, value, after }) => {
    const decoded = JSON.parse(name) as string;
    return before + name + colon + (replaced.get(decoded) ?? value) + after;
  });
  const inside = members.length === 0 ? body.inner : members.join(",");
  return `${body.lead}{${inside}}${body.tail}`;
}

const space = fc.string({ unit: fc.constantFrom(" ", "\n", "\t", "\r"), maxLength: 3 });
const number = fc.constantFrom(
  "0",
  "-0",
  "-1",
  "1.0e5",
  "1E+2",
  "0.10",
  "12345678901234567890",
  "0.1000000000000000055511151231257827",
  "1e400",
);
/** What a string may be made of, as it is written. */
const PIECES = [
  "a",
  "é",
  "€😀\u2028\u007f",
  "{",
  "}",
  "[",
  "]",
  ",",
  ":",
  " ",
  String.raw`\"`,
  String.raw`\/\n\u0000`,
  String.raw`\u0022`,
  String.raw`\ud83d\ude00`,
  String.raw`\ud800`,
];
const BACKSLASHES = ["\\\\", String.raw`\u005c`];

const written = (pieces: readonly string[]) =>
  fc.array(fc.constantFrom(...pieces), { maxLength: 6 }).map((each) => `"${each.join("")}"`);
const string = written([...PIECES, ...BACKSLASHES]);
/**
 * A key that may go through `JSON.parse`: the one of V8 15 (Deno 2.9) takes the key "\n" for "\\"
 * once it has seen an object with a key that ends in a backslash.
 */
const plainKey = written(PIECES);

const { value } = fc.letrec<{ value: string; list: string; object: string }>((tie) => {
  const padded = fc.tuple(space, tie("value"), space).map((parts) => parts.join(""));
  const member = fc
    .tuple(space, plainKey, space, padded)
    .map(([before, name, after, each]) => `${before}${name}${after}:${each}`);
  return {
    value: fc.oneof(
      { maxDepth: 3, withCrossShrink: true },
      number,
      string,
      fc.constantFrom("true", "false", "null"),
      tie("list"),
      tie("object"),
    ),
    list: fc
      .tuple(space, fc.array(padded, { maxLength: 3 }))
      .map(([inner, each]) => `[${each.length === 0 ? inner : each.join(",")}]`),
    object: fc
      .tuple(space, fc.array(member, { maxLength: 3 }))
      .map(([inner, each]) => `{${each.length === 0 ? inner : each.join(",")}}`),
  };
});

const body = (name: fc.Arbitrary<string>, isUnique: boolean): fc.Arbitrary<Body> => {
  const special = fc.constantFrom('"model"', String.raw`"mod\u0065l"`, '"__proto__"', '""');
  const member = fc.record({
    before: space,
    name: fc.oneof({ weight: 2, arbitrary: name }, special),
    colon: fc.tuple(space, space).map(([before, after]) => `${before}:${after}`),
    value,
    after: space,
  });
  const nameOf = (each: { name: string }) => JSON.parse(each.name) as string;
  const members = isUnique
    ? fc.uniqueArray(member, { maxLength: 6, selector: nameOf })
    : fc.array(member, { maxLength: 6 });
  return fc.record({ lead: space, inner: space, tail: space, members });
};
const newKeys = fc.uniqueArray(
  fc.constantFrom("model", "stream", "stream_options", "max_tokens", 'a "quoted" one', "é"),
  { maxLength: 4 },
);

describe("topLevelKeys", () => {
  it("finds keys and values, with spaces or without", () => {
    assert.deepEqual(keysOf('{"a":1,"b":"x"}'), [
      ["a", "1"],
      ["b", '"x"'],
    ]);
    assert.deepEqual(keysOf('\n{ "a" : [1, 2] ,\t"b":\r\n{"c":{}} } '), [
      ["a", "[1, 2]"],
      ["b", '{"c":{}}'],
    ]);
    assert.deepEqual(keysOf("{}"), []);
    assert.deepEqual(keysOf(" { } "), []);
  });

  it("does not take nested keys, or what stands in strings, for keys", () => {
    assert.deepEqual(keysOf(String.raw`{"a":{"model":"x"},"b":"\",\"model\":\"y","model":"z"}`), [
      ["a", '{"model":"x"}'],
      ["b", String.raw`"\",\"model\":\"y"`],
      ["model", '"z"'],
    ]);
  });

  it("reads escaped names", () => {
    assert.deepEqual(keysOf(String.raw`{"\u006dodel":1,"a\"b":2,"\\":3}`), [
      ["model", "1"],
      ['a"b', "2"],
      ["\\", "3"],
    ]);
  });

  it("ends a string only at its own quote, whatever backslashes stand before it", () => {
    assert.deepEqual(keysOf(String.raw`{"a":"\\","b":"\\\"","c":"\\\\"}`), [
      ["a", String.raw`"\\"`],
      ["b", String.raw`"\\\""`],
      ["c", String.raw`"\\\\"`],
    ]);
  });

  it("names a repeated key as often as it stands there, escaped or not", () => {
    const text = String.raw`{"model":1,"a":2,"model":3,"mod\u0065l":4}`;
    assert.deepEqual(
      keysOf(text).map(([name]) => name),
      ["model", "a", "model", "model"],
    );
  });

  it("finds exactly what was written, for any object", () => {
    fc.assert(
      fc.property(body(string, false), (each) => {
        assert.deepEqual(
          keysOf(textOf(each)),
          each.members.map((one) => [JSON.parse(one.name), one.value]),
        );
      }),
      { numRuns: 500 },
    );
  });

  it("finds what JSON.stringify has written, however it is laid out", () => {
    fc.assert(
      fc.property(
        fc.dictionary(fc.string(), fc.jsonValue()),
        fc.nat({ max: 3 }),
        (each, indent) => {
          const keys = keysOf(JSON.stringify(each, null, indent));
          const flat = keys.map(([name, text]) => [name, text.replaceAll(/\n */g, "")]);
          const wanted = Object.entries(each).map(([name, one]) => {
            return [name, JSON.stringify(one, null, indent).replaceAll(/\n */g, "")];
          });
          assert.deepEqual(flat, wanted);
        },
      ),
    );
  });
});

describe("splice", () => {
  it("replaces a value and leaves numbers as they were written", () => {
    const text = '{"seed":12345678901234567890,"model":"a","temperature":1.0e5}';
    assert.equal(
      spliced(text, { model: '"b"' }),
      '{"seed":12345678901234567890,"model":"b","temperature":1.0e5}',
    );
  });

  it("adds what is not there, also to an empty object", () => {
    assert.equal(spliced("{}", { a: "1" }), '{"a":1}');
    assert.equal(spliced("{}", { a: "1", b: "[2]" }), '{"a":1,"b":[2]}');
    assert.deepEqual(JSON.parse(spliced(" { } ", { a: "1" })), { a: 1 });
    assert.deepEqual(JSON.parse(spliced('{"x":0}', { a: "1" })), { a: 1, x: 0 });
  });

  it("replaces a key that was written with escapes, and does not add it again", () => {
    assert.equal(
      spliced(String.raw`{"mod\u0065l":"a"}`, { model: '"b"' }),
      String.raw`{"mod\u0065l":"b"}`,
    );
  });

  it("replaces every repetition, so that no reader sees the old value", () => {
    assert.equal(spliced('{"a":1,"b":2,"a":3}', { a: "9" }), '{"a":9,"b":2,"a":9}');
  });

  it("leaves a nested key of that name alone", () => {
    const text = '{"x":{"model":"inner"},"model":"outer"}';
    assert.equal(spliced(text, { model: '"new"' }), '{"x":{"model":"inner"},"model":"new"}');
  });

  it("hands back the same bytes when there is nothing to do", () => {
    const bytes = encoder.encode('{"a":1}');
    assert.equal(splice(bytes, topLevelKeys(bytes), new Map()), bytes);
  });

  it("takes bytes as well as text, also a view into the same body", () => {
    const bytes = encoder.encode('{"max_completion_tokens":17}');
    const keys = topLevelKeys(bytes);
    const [limit] = keys;
    assert(limit !== undefined);
    const view = bytes.subarray(limit.value.start, limit.value.end);
    assert.equal(
      decoder.decode(splice(bytes, keys, new Map([["max_tokens", view]]))),
      '{"max_tokens":17,"max_completion_tokens":17}',
    );
    assert.equal(decoder.decode(bytes), '{"max_completion_tokens":17}', "unchanged itself");
  });

  it("parses to the expected object, with every other byte as it was, for any object and edits", () => {
    fc.assert(
      fc.property(
        body(plainKey, true),
        fc.array(fc.tuple(fc.nat(), value), { maxLength: 3 }),
        newKeys,
        fc.array(value, { minLength: 4, maxLength: 4 }),
        (each, changes, added, addedValues) => {
          const text = textOf(each);
          const names = each.members.map((one) => JSON.parse(one.name) as string);
          const edits = new Map<string, string>();
          for (const [at, change] of changes) {
            const name = names[at % Math.max(1, names.length)];
            if (name !== undefined) edits.set(name, change);
          }
          for (const [at, name] of added.entries()) edits.set(name, addedValues[at] ?? "null");
          const bytes = encoder.encode(text);
          const result = decoder.decode(splice(bytes, topLevelKeys(bytes), edits));

          const before = Object.entries(JSON.parse(text) as object);
          const wanted = new Map<string, unknown>(before);
          for (const [name, edit] of edits) wanted.set(name, JSON.parse(edit));
          assert.deepEqual(JSON.parse(result), Object.fromEntries(wanted));

          const kept = textOf(each, edits);
          const missing = [...edits.keys()].filter((name) => !names.includes(name));
          if (missing.length === 0) {
            assert.equal(result, kept);
          } else {
            const brace = kept.indexOf("{") + 1;
            assert.equal(result.slice(0, brace), kept.slice(0, brace));
            assert(result.endsWith(kept.slice(brace)));
          }
          const order = keysOf(result).map(([name]) => name);
          assert.deepEqual(
            order.filter((name) => !missing.includes(name)),
            names,
            "the order of the keys is kept",
          );
          assert.deepEqual(
            order.filter((name) => missing.includes(name)).toSorted(),
            missing.toSorted(),
            "each missing key is added once",
          );
        },
      ),
      { numRuns: 500 },
    );
  });
});

describe("concat", () => {
  it("puts parts together, and copies nothing where there is one", () => {
    const [one, two] = [Uint8Array.of(1, 2), Uint8Array.of(3)];
    assert.deepEqual(concat([one, new Uint8Array(), two]), Uint8Array.of(1, 2, 3));
    assert.equal(concat([one]), one);
    assert.equal(concat([]).length, 0);
  });
});

describe("leaving members out", () => {
  function left(text: string, ...names: string[]): string {
    const bytes = encoder.encode(text);
    const spans = spansOf(topLevelKeys(bytes), (name) => names.includes(name));
    return decoder.decode(without(bytes, spans));
  }

  const cases: [text: string, names: string[], expected: string][] = [
    ['{"a":1,"b":2,"c":3}', ["a"], '{"b":2,"c":3}'],
    ['{"a":1,"b":2,"c":3}', ["b"], '{"a":1,"c":3}'],
    ['{"a":1,"b":2,"c":3}', ["c"], '{"a":1,"b":2}'],
    ['{"a":1,"b":2,"c":3}', ["a", "b"], '{"c":3}'],
    ['{"a":1,"b":2,"c":3}', ["b", "c"], '{"a":1}'],
    ['{"a":1,"b":2,"c":3}', ["a", "c"], '{"b":2}'],
    ['{ "a" : 1 , "b" : 2 }', ["a", "b"], "{  }"],
    ['{ "a" : 1 , "b" : 2 }', ["b"], '{ "a" : 1 }'],
    ['{"a":1,"b":2,"a":{"a":[1]}}', ["a"], '{"b":2}'],
    [String.raw`{"\u0061":1,"b":"a"}`, ["a"], '{"b":"a"}'],
    ['{"b":{"a":1}}', ["a"], '{"b":{"a":1}}'],
    ["{}", ["a"], "{}"],
  ];
  for (const [text, names, expected] of cases) {
    it(`makes ${expected} of ${text}`, () => assert.equal(left(text, ...names), expected));
  }

  it("leaves the others as they were written, in their order", () => {
    fc.assert(
      fc.property(body(plainKey, false), fc.infiniteStream(fc.boolean()), (written, isGone) => {
        const text = textOf(written);
        const bytes = encoder.encode(text);
        const keys = topLevelKeys(bytes);
        const gone = new Set(keys.filter(() => isGone.next().value).map(({ name }) => name));
        const result = without(
          bytes,
          spansOf(keys, (name) => gone.has(name)),
        );
        const others = keysOf(text).filter(([name]) => !gone.has(name));
        assert.deepEqual(keysOf(decoder.decode(result)), others);
        JSON.parse(decoder.decode(result));
        if (gone.size === 0) assert.equal(decoder.decode(result), text);
      }),
      { numRuns: 500 },
    );
  });
});
