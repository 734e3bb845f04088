/** Which requests may share an answer, and that no two others ever do (design §4, Cache). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { isDeepStrictEqual } from "node:util";
import fc from "fast-check";
import {
  cacheControlOf,
  canonicalFields,
  identityOf,
  keyText,
  type Scope,
} from "../../src/core/cachekey.ts";
import { ANSWER_FIELDS, EMBEDDING_FIELDS } from "../../src/dialects/answer-fields.ts";

const encoder = new TextEncoder();
const CHAT = ANSWER_FIELDS.get("/v1/chat/completions");
assert(CHAT !== undefined);

/** The fields of a body as it is written, or why it is not cached. */
function read(text: string, rule = CHAT, streams = false): string {
  const body = JSON.parse(text) as Record<string, unknown>;
  const result = canonicalFields(rule, body, encoder.encode(text), streams);
  return "fields" in result ? result.fields : `bypass: ${result.bypass}`;
}

const isCached = (fields: string) => !fields.startsWith("bypass");

/** A chat with further members, as they are written. */
const chat = (members: string) =>
  `{"model":"m","temperature":0,"messages":[{"role":"user","content":"hi"}]${members}}`;

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };

/** Words that happen to meet, so that values are equal now and then. */
const word = fc.string({
  unit: fc.constantFrom("a", "b", " ", '"', "\\", "é", "😀"),
  maxLength: 3,
});
const name = fc.string({ unit: fc.constantFrom("a", "b", "é", "😀", ":", "{"), maxLength: 2 });
const number = fc.oneof(
  fc.constantFrom(0, -0, 1, -1, 0.1, 100, 1e21, 5e-324, 2 ** 53),
  fc.double({ noNaN: true, noDefaultInfinity: true }),
);
const { value } = fc.letrec<{ value: Json; list: Json[]; record: Record<string, Json> }>((tie) => ({
  value: fc.oneof(
    { maxDepth: 3, withCrossShrink: true },
    fc.constantFrom(null, true, false),
    number,
    word,
    tie("list"),
    tie("record"),
  ),
  list: fc.array(tie("value"), { maxLength: 3 }),
  record: fc.dictionary(fc.oneof(name, fc.constant("__proto__")), tie("value"), { maxKeys: 3 }),
}));
const FIELDS = ["messages", "top_p", "seed", "tools", "response_format", "stop", "logit_bias"];
const body = fc
  .dictionary(fc.constantFrom(...FIELDS), value, { maxKeys: 4 })
  .map((fields) => ({ temperature: 0, ...fields }))
  // Tools that the engine runs have a test of their own.
  .filter(({ tools }: Record<string, Json>) => !JSON.stringify(tools ?? null).includes('"type"'));

/** Numbers below `size`, always the same ones for a seed. */
function dice(seed: number): (size: number) => number {
  let state = seed >>> 0;
  return (size) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * size);
  };
}

/** Writes a value in one of the many ways that mean the same. */
function write(each: Json, roll: (size: number) => number): string {
  const space = () => ["", "", " ", "\n\t"][roll(4)] ?? "";
  if (typeof each === "number") return writeNumber(each, roll);
  if (typeof each === "string") return writeString(each, roll);
  if (Array.isArray(each)) {
    const items = each.map((item) => space() + write(item, roll) + space());
    return `[${items.join(",")}]`;
  }
  if (each !== null && typeof each === "object") {
    const members = Object.entries(each).map(
      ([key, item]) =>
        `${space()}${JSON.stringify(key)}${space()}:${space()}${write(item, roll)}${space()}`,
    );
    for (let at = members.length - 1; at > 0; at--) {
      const other = roll(at + 1);
      [members[at], members[other]] = [members[other] ?? "", members[at] ?? ""];
    }
    return `{${members.join(",")}}`;
  }
  return JSON.stringify(each);
}

function writeNumber(each: number, roll: (size: number) => number): string {
  if (each === 0) return ["0", "-0", "0.00", "-0.0e7"][roll(4)] ?? "";
  const [mantissa = "", exponent = "0"] = JSON.stringify(each).split("e");
  const dotted = mantissa.includes(".") ? mantissa : `${mantissa}.0`;
  const ways = [
    JSON.stringify(each),
    each.toExponential(),
    `${mantissa}E${exponent}`,
    `${dotted}00e${exponent}`,
    mantissa.includes(".") ? `${mantissa}0e${exponent}` : `${mantissa}00e${Number(exponent) - 2}`,
  ];
  return ways[roll(ways.length)] ?? "";
}

function writeString(each: string, roll: (size: number) => number): string {
  const units = each.split("").map((unit) => {
    const escaped = `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
    // One half of a pair cannot stand as it is.
    return roll(2) === 0 || /[\ud800-\udfff]/.test(unit)
      ? escaped
      : JSON.stringify(unit).slice(1, -1);
  });
  return roll(2) === 0 ? JSON.stringify(each) : `"${units.join("")}"`;
}

/** What JSON says of a value: no -0. */
const plain = (each: unknown): unknown => JSON.parse(JSON.stringify(each));

describe("canonicalFields", () => {
  it("is the same for the same values, however they are written", () => {
    fc.assert(
      fc.property(body, fc.nat(), fc.nat(), (each, one, other) => {
        const left = read(write(each, dice(one)));
        assert(isCached(left), left);
        assert.equal(left, read(write(each, dice(other))));
      }),
      { numRuns: 500 },
    );
  });

  it("differs for different values, and only then", () => {
    fc.assert(
      fc.property(body, body, fc.nat(), (left, right, seed) => {
        const isSame = isDeepStrictEqual(plain(left), plain(right));
        const texts = [left, right].map((each) => read(write(each, dice(seed))));
        assert.equal(texts[0] === texts[1], isSame, texts.join("\n"));
      }),
      { numRuns: 1000 },
    );
  });

  it("differs when any part of a body changes: a value, an item, the order of a list", () => {
    fc.assert(
      fc.property(body, fc.nat(), value, (each, at, other) => {
        const changed = replaced(each, at, other);
        fc.pre(!isDeepStrictEqual(plain(each), plain(changed)));
        assert.notEqual(read(JSON.stringify(each)), read(JSON.stringify(changed)));
      }),
      { numRuns: 500 },
    );
    assert.notEqual(read(chat(',"stop":["a","b"]')), read(chat(',"stop":["b","a"]')));
    assert.notEqual(read(chat(',"stop":["a","b"]')), read(chat(',"stop":["a,b"]')));
    assert.notEqual(read(chat(',"stop":"1"')), read(chat(',"stop":1')));
  });

  it("differs for every byte of a message", () => {
    const content = "How many r's are in “strawberry”?\u0000 😀";
    const texts = new Set([read(chatAbout(content))]);
    for (let at = 0; at < content.length; at++) {
      texts.add(read(chatAbout(`${content.slice(0, at)}x${content.slice(at + 1)}`)));
      texts.add(read(chatAbout(content.slice(0, at) + content.slice(at + 1))));
    }
    // Without one r or the other: "strawbery" both times.
    assert.equal(texts.size, 1 + 2 * content.length - 1);
  });

  it("differs for each field that changes the answer, on every endpoint", () => {
    for (const [path, rule] of ANSWER_FIELDS) {
      const texts = new Set([read('{"temperature":0}', rule)]);
      let fields = 1;
      for (const field of rule.answer) {
        if (field === "temperature" || field === "n" || field === "best_of") continue;
        for (const each of ["1", '"1"', "null", "[1]"]) {
          texts.add(read(`{"temperature":0,"${field}":${each}}`, rule));
          fields++;
        }
      }
      assert.equal(texts.size, fields, path);
    }
  });

  it("takes no notice of fields that cannot change it", () => {
    for (const [path, rule] of ANSWER_FIELDS) {
      for (const field of rule.ignored) {
        assert(!rule.answer.has(field), `${path}: ${field} in one list only`);
        assert.equal(
          read(`{"temperature":0,"${field}":{"a":1}}`, rule),
          read('{"temperature":0}', rule),
          `${path}: ${field}`,
        );
      }
    }
    assert.equal(read(chat(',"stream":false,"stream_options":null')), read(chat("")));
  });

  it("is bypassed by a field it does not know, whatever its value", () => {
    for (const rule of [...ANSWER_FIELDS.values(), EMBEDDING_FIELDS]) {
      for (const field of ["xtc_probability", "__proto__", "constructor", "Messages", ""]) {
        const name = JSON.stringify(field);
        assert.equal(read(`{"temperature":0,${name}:null}`, rule), "bypass: field", field);
      }
    }
    const responses = ANSWER_FIELDS.get("/v1/responses");
    for (const field of ["previous_response_id", "background", "conversation"]) {
      assert.equal(read(`{"temperature":0,"${field}":"x"}`, responses), "bypass: field");
    }
  });

  it("is for endpoints that have a rule", () => {
    assert.deepEqual(canonicalFields(undefined, {}, encoder.encode("{}"), true), {
      bypass: "endpoint",
    });
    assert.equal(ANSWER_FIELDS.get("/v1/rerank"), undefined);
    assert.equal(ANSWER_FIELDS.get("/v1/messages/count_tokens"), undefined);
  });

  it("needs a temperature that is explicitly zero", () => {
    for (const zero of ["0", "0.0", "-0", "0e5"]) {
      assert.equal(read(`{"temperature":${zero}}`), '{"temperature":0}');
    }
    for (const other of ["1e-9", "1", "null", '"0"', "false"]) {
      assert.equal(read(`{"temperature":${other}}`), "bypass: temperature", other);
    }
    assert.equal(read("{}"), "bypass: temperature");
    assert.equal(read('{"temperature":1e-400}'), "bypass: number");
  });

  it("needs one choice", () => {
    for (const field of ["n", "best_of"]) {
      for (const one of ["1", "1.0", "null"]) assert(isCached(read(chat(`,"${field}":${one}`))));
      for (const other of ["2", "0", '"1"']) {
        assert.equal(read(chat(`,"${field}":${other}`)), "bypass: n");
      }
    }
  });

  it("takes streams only where they are wanted, and their options as a part of them", () => {
    const stream = (options: string) => read(chat(`,"stream":true${options}`), CHAT, true);
    assert.equal(read(chat(',"stream":true')), "bypass: stream");
    const texts = [
      read(chat(""), CHAT, true),
      stream(""),
      stream(',"stream_options":{"include_usage":true}'),
      stream(',"stream_options":{"include_usage":false}'),
    ];
    assert(texts.every(isCached), texts.join("\n"));
    assert.equal(new Set(texts).size, texts.length);
  });

  it("is bypassed by tools that the engine runs itself", () => {
    const responses = ANSWER_FIELDS.get("/v1/responses");
    for (const [tool, isClients] of [
      ['{"type":"function","function":{}}', true],
      ['{"type":"custom","name":"a"}', true],
      ['{"name":"a","input_schema":{"type":"object"}}', true],
      ['{"type":"web_search"}', false],
      ['{"type":"mcp","server_url":"http://a"}', false],
    ] as const) {
      const fields = read(`{"temperature":0,"tools":[${tool}]}`, responses);
      assert.equal(isCached(fields), isClients, tool);
    }
  });

  it("never takes two numbers for one", () => {
    const digits = fc.string({
      unit: fc.constantFrom(...Array.from("0123456789")),
      minLength: 1,
      maxLength: 20,
    });
    const decimal = fc
      .tuple(
        fc.boolean(),
        digits,
        fc.option(digits),
        fc.option(fc.integer({ min: -340, max: 320 })),
      )
      .map(([isNegative, whole, fraction, exponent]) => {
        const stem = (isNegative ? "-" : "") + whole.replace(/^0+(?=\d)/, "");
        return (
          stem +
          (fraction === null ? "" : `.${fraction}`) +
          (exponent === null ? "" : `e${exponent}`)
        );
      });
    const neighbour = fc.nat({ max: 9 }).map((last) => `900719925474099${last}`);
    const any = fc.oneof(decimal, neighbour);
    fc.assert(
      fc.property(any, any, (one, other) => {
        const [left = "", right = ""] = [one, other].map((each) => read(chat(`,"seed":${each}`)));
        if (isCached(left) && isCached(right)) {
          assert.equal(left === right, isSameDecimal(one, other));
        } else {
          for (const each of [left, right]) assert(isCached(each) || each === "bypass: number");
        }
        // Ordinary ones are never refused.
        if (/^-?[\d.]{1,15}$/.test(one)) assert(isCached(left), one);
      }),
      { numRuns: 1000 },
    );
  });

  it("is bypassed by a number that a double does not hold, wherever it stands", () => {
    for (const bad of [
      "9007199254740993",
      "18446744073709551615",
      "0.1000000000000000055511151231257827",
      "1e400",
      "-1e400",
      "1e-400",
      `1${"0".repeat(200)}`,
    ]) {
      assert.equal(read(chat(`,"seed":${bad}`)), "bypass: number", bad);
      assert.equal(read(chat(`,"tools":[{"a":[[${bad}]]}]`)), "bypass: number", bad);
      assert.equal(read(chat(`,"metadata":{"a":${bad}}`)), "bypass: number", bad);
      assert(isCached(read(chat(`,"user":"${bad}"`))), "in a string it is no number");
    }
    for (const good of ["9007199254740991", "0.30000000000000004", "1e21", "1.50", "5e-324"]) {
      assert(isCached(read(chat(`,"seed":${good}`))), good);
    }
  });

  it("is bypassed by a key that stands twice, at any depth", () => {
    fc.assert(
      fc.property(body, fc.nat(), fc.nat(), (each, at, seed) => {
        const text = write(each, dice(seed));
        // Behind an opening brace, outside strings, another member with the key of one that is there.
        const braces = [...text.matchAll(/"(?:[^"\\]|\\.)*"|\{(?=\s*("[^"\\]*")\s*:)/g)];
        const places = braces.filter((brace) => brace[0] === "{");
        const place = places[at % places.length];
        assert(place !== undefined);
        const inside = place.index + 1;
        const repeated = `${text.slice(0, inside)}${place[1]}:0,${text.slice(inside)}`;
        const fields = read(repeated);
        assert(!isCached(fields), repeated);
      }),
      { numRuns: 500 },
    );
    assert.equal(read(chat(',"seed":1,"seed":1')), "bypass: field");
    assert.equal(read(chat(',"metadata":{"a":1,"a":2}')), "bypass: field");
  });

  it("is bypassed by a key with an escape, which V8 may take for another", () => {
    assert.equal(read(chat(String.raw`,"s\u0065ed":1`)), "bypass: field");
    assert.equal(read(chat(String.raw`,"response_format":{"b\n":1}`)), "bypass: field");
    assert(isCached(read(chat(String.raw`,"response_format":{"b":"\\\n\":"}`))));
  });

  it("is bypassed by a body that nests too deeply, without running out of stack", () => {
    const nested = (depth: number) => `${"[".repeat(depth)}${"]".repeat(depth)}`;
    assert(isCached(read(chat(`,"tools":${nested(60)}`))));
    for (const depth of [64, 5000]) {
      assert.equal(read(chat(`,"tools":${nested(depth)}`)), "bypass: field");
      assert.equal(read(chat(`,"metadata":${nested(depth)}`)), "bypass: field");
    }
  });

  it("needs neither temperature nor choices for embeddings, and leaves their inputs out", () => {
    const fields = read('{"model":"m","input":["a"],"user":"u"}', EMBEDDING_FIELDS);
    assert.equal(fields, "{}");
    assert.equal(read('{"input":["b"],"encoding_format":"base64"}', EMBEDDING_FIELDS), "{}");
    assert.notEqual(read('{"dimensions":64}', EMBEDDING_FIELDS), fields);
    assert.equal(read('{"input":"a","embed_dtype":"float16"}', EMBEDDING_FIELDS), "bypass: field");
    assert.equal(read('{"input":[9007199254740993]}', EMBEDDING_FIELDS), "bypass: number");
  });
});

const chatAbout = (content: string) =>
  JSON.stringify({ temperature: 0, messages: [{ role: "user", content }] });

/** The value with one of its parts, counted through, replaced by another. */
function replaced<T extends Json>(each: T, at: number, other: Json): Json {
  const paths: (string | number)[][] = [];
  const visit = (part: Json, path: (string | number)[]) => {
    if (path.length > 0 && path[0] !== "temperature") paths.push(path);
    if (part === null || typeof part !== "object") return;
    const entries = Array.isArray(part) ? part.entries() : Object.entries(part);
    for (const [key, item] of entries) visit(item, [...path, key]);
  };
  visit(each, []);
  const target = paths[at % Math.max(1, paths.length)];
  const rebuild = (part: Json, path: (string | number)[]): Json => {
    const [key, ...rest] = path;
    if (key === undefined) return other;
    if (Array.isArray(part))
      return part.with(Number(key), rebuild(part[Number(key)] ?? null, rest));
    if (part === null || typeof part !== "object") return part;
    return Object.fromEntries(
      Object.entries(part).map(([each, item]) => [each, each === key ? rebuild(item, rest) : item]),
    );
  };
  return target === undefined ? { ...(each as object), seed: other } : rebuild(each, target);
}

/** Compares decimals as exact fractions. */
function isSameDecimal(one: string, other: string): boolean {
  const scaled = (text: string): bigint => {
    const [mantissa = "", exponent = "0"] = text.split("e");
    const [whole = "", fraction = ""] = mantissa.split(".");
    return BigInt(whole + fraction) * 10n ** BigInt(400 + Number(exponent) - fraction.length);
  };
  return scaled(one) === scaled(other);
}

const scope: Scope = { tenant: "a", path: "/v1/x", model: "m", cap: null, headers: {} };

describe("keyText", () => {
  it("keeps tenants, paths, models, caps and headers apart", () => {
    const scopes: Scope[] = [
      scope,
      { ...scope, tenant: "b" },
      { ...scope, path: "/v1/x?beta=true" },
      { ...scope, model: "n" },
      { ...scope, cap: 0 },
      { ...scope, cap: 100 },
      { ...scope, headers: { "anthropic-beta": null } },
      { ...scope, headers: { "anthropic-beta": "a" } },
      { ...scope, headers: { "anthropic-version": "a" } },
    ];
    assert.equal(new Set(scopes.map((each) => keyText(each, "{}"))).size, scopes.length);
    const headers = { a: "1", b: "2" };
    const turned = { b: "2", a: "1" };
    assert.equal(keyText({ ...scope, headers }), keyText({ ...scope, headers: turned }));
  });

  it("is one-to-one: no other scope or parts give the same text", () => {
    const text = fc.string({
      unit: fc.constantFrom("a", "1", ":", '"', "{", "}", ","),
      maxLength: 4,
    });
    const parts = fc.tuple(text, fc.array(text, { maxLength: 3 }));
    fc.assert(
      fc.property(parts, parts, (left, right) => {
        const [one, other] = [left, right].map(([tenant, rest]) =>
          keyText({ ...scope, tenant }, ...rest),
        );
        assert.equal(one === other, isDeepStrictEqual(left, right));
      }),
      { numRuns: 500 },
    );
  });
});

describe("identityOf", () => {
  const target = (model: string, digest: string | null = null) => ({ model, digest });

  it("is what the targets really are, in no order, each once", () => {
    const targets = [target("x", "sha256:1"), target("y", "sha256:2"), target("z", "sha256:1")];
    assert.equal(identityOf("m", targets), '[["sha256:1"],["sha256:2"]]');
    assert.equal(identityOf("alias", targets.toReversed()), identityOf("m", targets));
    assert.notEqual(identityOf("m", targets.slice(1)), identityOf("m", [target("x", "sha256:9")]));
  });

  it("does not take an engine's own name for the same model under two public names", () => {
    assert.notEqual(identityOf("a", [target("default")]), identityOf("b", [target("default")]));
    assert.equal(identityOf("a", [target("d"), target("d")]), identityOf("a", [target("d")]));
    assert.notEqual(identityOf("a", [target("d")]), identityOf("a", [target("d", "d")]));
  });
});

describe("cacheControlOf", () => {
  const nothing = { noStore: false, noCache: false, maxAgeMs: null, onlyIfCached: false };
  const cases: [header: string | null, asked: Partial<typeof nothing> | { maxAgeMs: number }][] = [
    [null, {}],
    ["", {}],
    ["no-store", { noStore: true }],
    [" No-Cache , ONLY-IF-CACHED,,", { noCache: true, onlyIfCached: true }],
    ["max-age=60", { maxAgeMs: 60_000 }],
    ['Max-Age = "5" , x', { maxAgeMs: 5000 }],
    ["max-age=0", { maxAgeMs: 0 }],
    ["max-age=-5", { maxAgeMs: 0 }],
    ["max-age=60, max-age=30", { maxAgeMs: 30_000 }],
    ["max-age=99999999999999999999", { maxAgeMs: 2 ** 31 * 1000 }],
    ["max-age=soon, max-age=, max-age, max-age=NaN", {}],
    ["no-transform, max-stale=5, stale-if-error, =, =5", {}],
    ['ext="no-store, no-cache", max-age=1', { maxAgeMs: 1000 }],
    ['ext="no-store', {}],
  ];
  for (const [header, asked] of cases) {
    it(`reads ${JSON.stringify(header)}`, () => {
      assert.deepEqual(cacheControlOf(header), { ...nothing, ...asked });
    });
  }

  it("takes anything", () => {
    fc.assert(fc.property(fc.string(), (header) => void cacheControlOf(header)));
  });
});
