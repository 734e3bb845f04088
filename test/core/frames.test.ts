/** Where events end, however their bytes are cut into chunks. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { FrameCutter } from "../../src/core/frames.ts";

const encoder = new TextEncoder();

/** Offsets in the whole of what was fed in pieces. */
function cutAll(chunks: readonly Uint8Array[]): number[] {
  const cutter = new FrameCutter();
  let before = 0;
  return chunks.flatMap((chunk) => {
    const ends = cutter.cut(chunk).map((end) => before + end);
    before += chunk.length;
    return ends;
  });
}

/** The rule, said plainly: lines end with LF, one CR before it belongs to the end; blank ends an event. */
function oracle(text: string): number[] {
  const ends: number[] = [];
  let offset = 0;
  for (const line of text.split("\n").slice(0, -1)) {
    offset += encoder.encode(line).length + 1;
    if (line === "" || line === "\r") ends.push(offset);
  }
  return ends;
}

/** Cuts at the places given as fractions of the whole; repeated places make empty chunks. */
function split(bytes: Uint8Array, places: readonly number[]): Uint8Array[] {
  const at = places.map((place) => place % (bytes.length + 1)).toSorted((a, b) => a - b);
  return [0, ...at].map((from, index) => bytes.subarray(from, at[index] ?? bytes.length));
}

const eol = fc.constantFrom("\n", "\r\n");
const field = fc.constantFrom(
  "data: {}",
  'data: {"a":"ä€😀"}',
  "data:",
  "event: error",
  ": comment",
  ":",
  "id: 1",
  " ",
  "\t",
);
/** Streams as engines write them: every line with either ending, events of any number of lines. */
const stream = fc
  .array(fc.tuple(fc.oneof({ weight: 2, arbitrary: field }, fc.constant("")), eol), {
    maxLength: 30,
  })
  .map((lines) => lines.map(([line, end]) => line + end).join(""));
/** Nothing but what makes trouble. */
const hostile = fc.string({ unit: fc.constantFrom("\n", "\r", "a"), maxLength: 24 });
const places = fc.array(fc.nat({ max: 400 }), { maxLength: 20 });

describe("FrameCutter", () => {
  const cases: [what: string, text: string, ends: number[]][] = [
    ["nothing", "", []],
    ["one event", "data: a\n\n", [9]],
    ["an event without its end", "data: a\n", []],
    ["CRLF", "data: a\r\n\r\n", [11]],
    ["LF after CRLF", "data: a\r\n\n", [10]],
    ["CRLF after LF", "data: a\n\r\n", [10]],
    ["several events", "a\n\nb\n\n", [3, 6]],
    ["an event of several lines", "event: x\ndata: y\n\n", [18]],
    ["comments, alone and before an event", ":\n\n: ping\ndata: a\n\n", [3, 19]],
    ["blank lines in a row", "a\n\n\n\n", [3, 4, 5]],
    ["a blank line at the very beginning", "\ndata: a\n\n", [1, 10]],
    ["a space is no blank line", "a\n \n\n", [5]],
    ["a CR inside a line", "a\rb\n\n", [5]],
    ["a line that is one CR and an end", "a\n\r\r\n\n", [6]],
    ["what stands behind the last end", "a\n\nrest", [3]],
  ];
  for (const [what, text, ends] of cases) {
    it(`finds the ends of ${what}`, () => {
      const bytes = encoder.encode(text);
      assert.deepEqual(cutAll([bytes]), ends);
      assert.deepEqual(oracle(text), ends, "the oracle itself");
    });
  }

  it("finds a CRLF blank line cut at every place", () => {
    const bytes = encoder.encode("data: a\r\n\r\ndata: b\r\n\r\n");
    for (let at = 0; at <= bytes.length; at++) {
      assert.deepEqual(cutAll([bytes.subarray(0, at), bytes.subarray(at)]), [11, 22], `at ${at}`);
    }
  });

  it("finds them fed byte by byte", () => {
    const text = ": hi\n\ndata: {}\r\n\r\n\n";
    const bytes = encoder.encode(text);
    assert.deepEqual(cutAll(Array.from(bytes, (byte) => Uint8Array.of(byte))), oracle(text));
  });

  it("finds the same ends in any cutting of a stream of LF and CRLF lines", () => {
    fc.assert(
      fc.property(stream, places, (text, where) => {
        assert.deepEqual(cutAll(split(encoder.encode(text), where)), oracle(text));
      }),
      { numRuns: 300 },
    );
  });

  it("finds the same ends in any cutting of any mess of CR and LF", () => {
    fc.assert(
      fc.property(hostile, places, (text, where) => {
        assert.deepEqual(cutAll(split(encoder.encode(text), where)), oracle(text));
      }),
      { numRuns: 500 },
    );
  });
});
