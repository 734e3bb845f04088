/** Embeddings taken apart into single inputs and put together again. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  areAlike,
  merge,
  plan,
  readInputs,
  readVectors,
  type Encoding,
  type Vector,
} from "../../src/core/vectors.ts";

const float32 = fc.float({ noNaN: true, noDefaultInfinity: true });
const text = fc.string({ unit: fc.constantFrom("a", "b", "é", '"'), minLength: 1, maxLength: 2 });
const tokens = fc.array(fc.nat({ max: 3 }), { minLength: 1, maxLength: 2 });
const inputList = fc.oneof(
  fc.array(text, { minLength: 1, maxLength: 12 }),
  fc.array(tokens, { minLength: 1, maxLength: 12 }),
);
const encoding = fc.constantFrom<Encoding>("float", "base64");

interface Answer {
  object: string;
  data: { object: string; index: number; embedding: number[] | string }[];
  model: string;
  usage: { prompt_tokens: number; total_tokens: number };
}

const base64Of = (floats: readonly number[]) =>
  new Uint8Array(new Float32Array(floats).buffer).toBase64();

const floatsOf = (embedding: number[] | string): number[] => {
  const floats =
    typeof embedding === "string"
      ? new Float32Array(Uint8Array.fromBase64(embedding).buffer)
      : new Float32Array(embedding);
  return Array.from(floats);
};

/** An engine whose vectors and tokens follow from each input alone. */
function engine(inputs: readonly string[], answersWith: Encoding): Answer {
  const data = inputs.map((input, index) => {
    const floats = Array.from(input.padEnd(8), (unit) => unit.charCodeAt(0) / 300 - input.length);
    return {
      object: "embedding",
      index,
      embedding: answersWith === "base64" ? base64Of(floats) : floats,
    };
  });
  const used = inputs.reduce((sum, input) => sum + input.length, 0);
  return { object: "list", data, model: "e", usage: { prompt_tokens: used, total_tokens: used } };
}

const inputsOf = (input: unknown) => readInputs({ input })?.inputs ?? null;

function vectorsOf(answer: unknown, batch: readonly string[]): Vector[] {
  const vectors = readVectors(answer, batch);
  assert(typeof vectors !== "string");
  return vectors;
}

/** Its vector printed and read again. */
function printed(float: number): string {
  const [vector] = vectorsOf({ data: [{ index: 0, embedding: [float] }] }, ['"a"']);
  assert(vector !== undefined);
  const body = [...merge(['"a"'], new Map([['"a"', vector]]), "float")].join("");
  return /\[([^\][{]*)\]/.exec(body ?? "")?.[1] ?? "";
}

describe("readInputs", () => {
  it("takes a text, texts, tokens and lists of tokens", () => {
    assert.deepEqual(inputsOf("a"), ['"a"']);
    assert.deepEqual(inputsOf(["a", "b\n", "a"]), ['"a"', String.raw`"b\n"`, '"a"']);
    assert.deepEqual(inputsOf([1, 2]), ["[1,2]"]);
    assert.deepEqual(inputsOf([[1, 2], [0]]), ["[1,2]", "[0]"]);
  });

  it("leaves anything else to the engine", () => {
    const odd = [undefined, null, 1, true, {}, "", [], [""], ["a", ""], [[]], [[1], []], ["a", 1]];
    const odder = [[1, "a"], [[1], "a"], [-1], [1.5], [2 ** 53], [null], [[[1]]], [{ text: "a" }]];
    for (const input of [...odd, ...odder]) {
      assert.equal(inputsOf(input), null, JSON.stringify(input));
    }
  });

  it("says how the client wants its vectors", () => {
    const wanted = (format: unknown) =>
      readInputs({ input: "a", encoding_format: format })?.encoding ?? null;
    assert.equal(wanted(undefined), "float");
    assert.equal(wanted(null), "float");
    assert.equal(wanted("float"), "float");
    assert.equal(wanted("base64"), "base64");
    for (const other of ["bytes", "Base64", "", 1]) assert.equal(wanted(other), null);
  });

  it("is one-to-one", () => {
    fc.assert(
      fc.property(inputList, inputList, (left, right) => {
        const isSame = JSON.stringify(left) === JSON.stringify(right);
        assert.equal(JSON.stringify(inputsOf(left)) === JSON.stringify(inputsOf(right)), isSame);
      }),
    );
  });
});

describe("merge of what plan asked for", () => {
  it("equals the answer that was not taken apart, for any batches, known inputs and encodings", () => {
    fc.assert(
      fc.property(
        inputList,
        fc.array(fc.boolean()),
        fc.integer({ min: 1, max: 13 }),
        encoding,
        encoding,
        (list, isKnown, batchSize, wanted, answersWith) => {
          const { inputs } = readInputs({ input: list }) ?? { inputs: [] };
          const vectors = new Map<string, Vector>();
          const computed = new Map<string, number>();
          const compute = (batch: string[]) => {
            for (const [index, vector] of vectorsOf(engine(batch, answersWith), batch).entries()) {
              const input = batch[index] ?? "";
              vectors.set(input, vector);
              computed.set(input, (computed.get(input) ?? 0) + 1);
            }
          };
          // As earlier requests have left it: some inputs, each asked for alone.
          for (const input of new Set(inputs.filter((_, at) => isKnown[at]))) compute([input]);
          const batches = plan(inputs, vectors, batchSize);
          const missing = batches.flat();
          assert(batches.every((batch) => batch.length > 0 && batch.length <= batchSize));
          assert(
            batches.slice(0, -1).every((batch) => batch.length === batchSize),
            "full ones",
          );
          assert.deepEqual(
            missing,
            [...new Set(inputs)].filter((each) => !vectors.has(each)),
          );
          for (const batch of batches) compute(batch);
          assert.deepEqual([...computed.values()], Array(computed.size).fill(1), "each once");

          const merged = JSON.parse([...merge(inputs, vectors, wanted)].join("")) as Answer;
          const whole = engine(inputs, wanted);
          for (const { embedding } of merged.data)
            assert.equal(typeof embedding, typeof whole.data[0]?.embedding);
          const readable = ({ data, object, model }: Answer) => ({
            object,
            model,
            data: data.map((each) => ({ ...each, embedding: floatsOf(each.embedding) })),
          });
          assert.deepEqual(readable(merged), readable(whole));
          // A repeated input counts as often as it stands there, with its share of a batch.
          if (new Set(inputs).size === inputs.length) assert.deepEqual(merged.usage, whole.usage);
          assert.equal(merged.usage.prompt_tokens, merged.usage.total_tokens);
          const parts = inputs.map((input) => vectors.get(input)?.tokens ?? 0);
          assert.equal(
            merged.usage.prompt_tokens,
            parts.reduce((sum, each) => sum + each, 0),
          );
        },
      ),
      { numRuns: 300 },
    );
  });

  it("gives nothing where vectors of two models would stand side by side", () => {
    const vector = (length: number): Vector => ({
      bytes: new Uint8Array(length),
      tokens: 1,
      model: "m",
    });
    const mixed = new Map([
      ['"a"', vector(8)],
      ['"b"', vector(16)],
    ]);
    assert.equal(areAlike(['"a"', '"b"'], mixed), false);
    assert.equal(areAlike(['"b"', '"b"'], mixed), true);
  });

  it("refuses an input whose vector is missing", () => {
    assert.throws(() => [...merge(['"a"'], new Map(), "float")], /without a vector/);
  });

  it("takes vectors from anywhere in a buffer", () => {
    const bytes = new Uint8Array(new Float32Array([0.1]).buffer);
    const shifted = new Uint8Array(5);
    shifted.set(bytes, 1);
    const vector: Vector = { bytes: shifted.subarray(1), tokens: 1, model: "m" };
    assert.match(
      [...merge(['"a"'], new Map([['"a"', vector]]), "float")].join(""),
      /"embedding":\[0\.1\]/,
    );
  });
});

describe("readVectors", () => {
  it("reads the same from numbers and from base64, in any order", () => {
    fc.assert(
      fc.property(
        fc.array(fc.array(float32, { minLength: 3, maxLength: 3 }), { minLength: 1, maxLength: 5 }),
        (lists) => {
          const batch = lists.map((_, index) => `"${index}"`);
          const data = lists.map((floats, index) => ({ index, embedding: floats }));
          const coded = data.map(({ index, embedding }) => ({
            index,
            embedding: base64Of(embedding),
          }));
          const vectors = vectorsOf({ data }, batch);
          assert.deepEqual(vectorsOf({ data: coded.toReversed() }, batch), vectors);
          for (const [at, { bytes }] of vectors.entries()) {
            assert.equal(bytes.toBase64(), coded[at]?.embedding);
          }
        },
      ),
    );
  });

  it("shares the engine's tokens out, exactly, and more to longer inputs", () => {
    fc.assert(
      fc.property(
        fc.uniqueArray(fc.string(), { minLength: 1, maxLength: 9 }),
        fc.nat(),
        (list, total) => {
          const batch = list.map((each) => JSON.stringify(each));
          const data = batch.map((_, index) => ({ index, embedding: [1] }));
          const shares = vectorsOf({ data, usage: { prompt_tokens: total } }, batch).map(
            (each) => each.tokens,
          );
          assert.equal(
            shares.reduce((sum, each) => sum + each, 0),
            total,
          );
          assert(shares.every((each) => Number.isInteger(each) && each >= 0));
          const sizes = batch.map((each) => Buffer.byteLength(each));
          const size = sizes.reduce((sum, each) => sum + each, 0);
          for (const [at, share] of shares.entries()) {
            assert(Math.abs(share - (total * (sizes[at] ?? 0)) / size) <= 1);
          }
        },
      ),
    );
    const data = [{ index: 0, embedding: [1] }];
    for (const usage of [undefined, null, {}, { prompt_tokens: -1 }, { prompt_tokens: "3" }]) {
      assert.equal(vectorsOf({ data, usage }, ['"a"'])[0]?.tokens, 0);
    }
  });

  it("says what is wrong with an answer", () => {
    const one = { index: 0, embedding: [1] };
    const two = { index: 1, embedding: [2] };
    const cases: [answer: unknown, why: RegExp][] = [
      [null, /no list/],
      [[], /no list/],
      [{ data: {} }, /no list/],
      [{ data: [one] }, /1 embeddings for 2 inputs/],
      [{ data: [one, two, two] }, /3 embeddings for 2 inputs/],
      [{ data: [one, null] }, /no object/],
      [{ data: [one, { embedding: [1] }] }, /not asked for/],
      [{ data: [one, { index: 2, embedding: [1] }] }, /not asked for/],
      [{ data: [one, { index: 0.5, embedding: [1] }] }, /not asked for/],
      [{ data: [one, one] }, /index 0 stands twice/],
      [{ data: [one, { index: 1, embedding: [1, 2] }] }, /differ in length/],
    ];
    for (const [answer, why] of cases) {
      const wrong = readVectors(answer, ['"a"', '"b"']);
      assert(typeof wrong === "string");
      assert.match(wrong, why);
    }
    const odd = [undefined, null, {}, [], "", "AAA=", "****", [null], ["1"], [[1]]];
    const infinite = [[1, 1e39], [Number.NaN], base64Of([Number.NaN]), base64Of([-Infinity])];
    for (const embedding of [...odd, ...infinite]) {
      const wrong = readVectors({ data: [{ index: 0, embedding }] }, ['"a"']);
      assert.equal(wrong, "embedding 0 is no list of finite numbers", JSON.stringify(embedding));
    }
  });
});

describe("a printed float", () => {
  const SMALLEST_NORMAL = 2 ** -126;

  it("is the same float when it is read, and no shorter decimal is", () => {
    fc.assert(
      fc.property(float32, (float) => {
        const decimal = Number(printed(float));
        assert.equal(Math.fround(decimal), float === 0 ? 0 : float);
        if (Math.abs(float) < SMALLEST_NORMAL) return;
        const digits = decimal.toExponential().replace(/^-/, "").split("e")[0]?.replace(".", "");
        const shorter = Number(float.toPrecision(Math.max(1, (digits ?? "").length - 1)));
        if ((digits ?? "").length > 1) assert.notEqual(Math.fround(shorter), float);
      }),
      { numRuns: 3000 },
    );
  });

  it("looks as it was meant", () => {
    const cases: [float: number, decimal: string][] = [
      [0.1, "0.1"],
      [-0.025, "-0.025"],
      [1 / 3, "0.33333334"],
      [16777216, "16777216"],
      [1e-7, "1e-7"],
      [3.4028234663852886e38, "3.4028235e+38"],
      [0, "0"],
      [-0, "0"],
    ];
    for (const [float, decimal] of cases) assert.equal(printed(float), decimal);
  });
});
