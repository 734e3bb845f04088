/** Which backend has seen how much of a prompt: chains, the bounded index, what engines report. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  chainOf,
  correct,
  createPrefixIndex,
  expectedCached,
  matched,
  remember,
  Sessions,
  type Chain,
  type Match,
  type PrefixIndex,
} from "../../src/core/prefix.ts";

const MINUTE = 60_000;

/** Text that does not repeat itself. */
function prose(length: number, start = 0): string {
  let text = "";
  for (let at = start; text.length < length; at++) text += `${at} ways to say ${at * at}. `;
  return text.slice(0, length);
}

function blocksOf(text: string, seed = "m"): readonly number[] {
  return chainOf(seed, [text]).blocks;
}

/** A chain of invented blocks. */
function chain(...blocks: number[]): Chain {
  return { blocks, length: blocks.length * 256 };
}

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, at) => from + at);
}

function sizeOf({ recent, older }: PrefixIndex): number {
  return new Set([...recent.keys(), ...older.keys()]).size;
}

function isKnown({ recent, older }: PrefixIndex, block: number): boolean {
  return recent.has(block) || older.has(block);
}

describe("a chain", () => {
  it("has a block for each 256 characters, and none for what is left", () => {
    for (const [length, blocks] of [
      [0, 0],
      [255, 0],
      [256, 1],
      [511, 1],
      [512, 2],
      [10_000, 39],
    ] as const) {
      const made = chainOf("m", [prose(length)]);
      assert.deepEqual([made.blocks.length, made.length], [blocks, length]);
    }
  });

  it("is the same wherever the pieces part", () => {
    const text = prose(2000);
    fc.assert(
      fc.property(fc.array(fc.nat(2000)), (cuts) => {
        const ends = [0, ...cuts.toSorted((one, other) => one - other), 2000];
        const pieces = ends.slice(1).map((end, at) => text.slice(ends[at], end));
        assert.deepEqual(chainOf("m", pieces), chainOf("m", [text]));
      }),
    );
  });

  it("goes on where text is appended", () => {
    const code = fc.integer({ min: 0, max: 0xffff }).map((each) => String.fromCharCode(each));
    const unit = fc.string({ unit: code, minLength: 1, maxLength: 4 });
    fc.assert(
      fc.property(unit, fc.nat(1000), unit, fc.nat(1000), (one, times, other, more) => {
        const before = blocksOf(one.repeat(times));
        const after = blocksOf(one.repeat(times) + other.repeat(more));
        assert.deepEqual(after.slice(0, before.length), before);
      }),
    );
  });

  it("parts from another in the block that differs, and stays apart", () => {
    const text = prose(5000);
    const unit = fc.integer({ min: 0, max: 0xffff });
    fc.assert(
      fc.property(fc.nat(4863), unit, (at, code) => {
        fc.pre(text.charCodeAt(at) !== code);
        const other = text.slice(0, at) + String.fromCharCode(code) + text.slice(at + 1);
        const [one, two] = [blocksOf(text), blocksOf(other)];
        const equal = one.map((block, index) => block === two[index]);
        assert.deepEqual(
          equal,
          one.map((_, index) => index < Math.floor(at / 256)),
        );
      }),
    );
  });

  it("has no block in common with one of another model", () => {
    fc.assert(
      fc.property(fc.string(), fc.string(), (one, other) => {
        fc.pre(one !== other);
        const blocks = new Set(blocksOf(prose(3000), one));
        assert(blocksOf(prose(3000), other).every((block) => !blocks.has(block)));
      }),
    );
  });

  it("tells apart what differs little", () => {
    const blocks = new Set<number>();
    for (let at = 0; at < 150_000; at++) {
      for (const block of blocksOf(`${at}, ${at * at}, ${at ** 3}; `.repeat(30).slice(0, 256))) {
        blocks.add(block);
      }
    }
    assert.equal(blocks.size, 150_000);
    for (const block of blocks) assert(Number.isSafeInteger(block) && block >= 0);
  });

  it("grows coarser and ends, so that the longest body costs little", () => {
    const text = "x".repeat(32 * 1024 * 1024);
    const { blocks, length } = chainOf("m", [text]);
    assert.deepEqual([blocks.length, length], [2560, text.length]);
    const index = createPrefixIndex();
    const longest = chainOf("m", [text]);
    remember(index, longest);
    const seen = matched(index, longest);
    assert.equal(seen.share * length, 4_063_232);
  });
});

describe("what was seen of a prompt", () => {
  it("is nothing at first, then all of its blocks, then the beginning of what goes on otherwise", () => {
    const index = createPrefixIndex();
    const system = prose(1024);
    const first = chainOf("m", [system, prose(1024, 500)]);
    assert.deepEqual(matched(index, first), { blocks: 0, share: 0, use: 0 });
    remember(index, first);
    assert.deepEqual(matched(index, first), { blocks: 8, share: 1, use: 1 });
    const second = chainOf("m", [system, prose(3072, 900)]);
    assert.deepEqual(matched(index, second), { blocks: 4, share: 0.25, use: 1 });
    remember(index, second);
    assert.equal(matched(index, second).use, 2);
    assert.equal(matched(index, first).use, 1);
  });

  it("is a share of the text up to where another one parts from it, also of long ones", () => {
    const length = 1_000_000;
    const text = prose(length);
    const index = createPrefixIndex();
    remember(index, chainOf("m", [text]));
    for (const at of [0, 255, 256, 131_071, 131_072, 131_583, 131_584, 400_000, 999_999]) {
      const { share } = matched(
        index,
        chainOf("m", [text.slice(0, at), "\u0000".repeat(length - at)]),
      );
      const missed = at - share * length;
      assert(missed >= 0 && missed < Math.max(256, at / 128), `${at}: ${missed}`);
    }
  });

  it("is nothing of what follows something else", () => {
    const index = createPrefixIndex();
    remember(index, chain(1, 2, 3));
    assert.equal(matched(index, chain(9, 2, 3)).blocks, 0);
  });

  it("is the longest beginning of it that was remembered", () => {
    // Prompts as paths in a tree: a block is known by all that came before it.
    const path = fc.array(fc.nat(2), { maxLength: 8 });
    const toChain = (steps: number[]) =>
      chain(...steps.map((_, at) => Number.parseInt(`1${steps.slice(0, at + 1).join("")}`, 3)));
    fc.assert(
      fc.property(fc.array(path), path, (prompts, asked) => {
        const index = createPrefixIndex();
        for (const prompt of prompts) remember(index, toChain(prompt));
        const common = (prompt: number[]) => {
          const at = asked.findIndex((step, place) => prompt[place] !== step);
          return at === -1 ? asked.length : at;
        };
        const { blocks } = matched(index, toChain(asked));
        assert.equal(blocks, Math.max(0, ...prompts.map(common)));
      }),
    );
  });
});

describe("the index", () => {
  it("never holds more than it may, and loses no beginning before its end", () => {
    // Conversations that begin alike and go on by themselves.
    const turn = fc.record({ conversation: fc.nat(5), blocks: fc.integer({ min: 1, max: 30 }) });
    fc.assert(
      fc.property(fc.integer({ min: 2, max: 60 }), fc.array(turn), (most, turns) => {
        const index = createPrefixIndex(most);
        const chains: Chain[] = [];
        for (const { conversation, blocks } of turns) {
          const own = range(conversation * 100 + 10, conversation * 100 + 10 + blocks);
          const asked = chain(...[1, 2, 3, ...own].slice(0, blocks));
          chains.push(asked);
          remember(index, asked);
          assert(sizeOf(index) <= most, `${sizeOf(index)} > ${most}`);
          const { blocks: seen } = matched(index, asked);
          assert(seen >= Math.min(asked.blocks.length, Math.floor(most / 2)), `${seen} of ${most}`);
        }
        for (const { blocks } of chains) {
          const known = blocks.map((block) => isKnown(index, block));
          assert(!known.includes(false) || !known.slice(known.indexOf(false)).includes(true));
        }
      }),
    );
  });

  it("keeps the half seen last, and loses what was seen longest ago", () => {
    const index = createPrefixIndex(100);
    const kept = chain(...range(0, 10));
    const left = chain(...range(10, 20));
    remember(index, kept);
    remember(index, left);
    for (let at = 100; at < 300; at += 10) {
      remember(index, chain(...range(at, at + 10)));
      remember(index, kept);
    }
    assert.equal(matched(index, kept).blocks, 10);
    assert.equal(matched(index, left).blocks, 0);
    assert.equal(matched(index, chain(...range(260, 270))).blocks, 10);
  });

  it("holds 50,000 blocks", () => {
    const index = createPrefixIndex();
    let largest = 0;
    for (let at = 0; at < 120_000; at += 1000) {
      remember(index, chain(...range(at, at + 1000)));
      largest = Math.max(largest, sizeOf(index));
      assert(isKnown(index, Math.max(0, at - 24_000)), `${at}`);
    }
    assert(largest > 48_000 && largest <= 50_000, `${largest}`);
  });
});

/** An index that has seen a prompt, and what is expected of the next like it. */
function seen(share = 1): { index: PrefixIndex; match: Match; ratio: (now: number) => number } {
  const index = createPrefixIndex();
  const match = { blocks: 4, share, use: 0 };
  return {
    index,
    match,
    ratio: (now) => expectedCached(index, { ...match, share: 1 }, 1e9, now) / 1e9,
  };
}

const MISS = { input: 4000, cached: 0 };
const HIT = { input: 4000, cached: 3900 };

describe("what is expected to be cached", () => {
  it("is the share of the tokens that was seen", () => {
    const { index } = seen();
    assert.equal(expectedCached(index, { blocks: 4, share: 0.5, use: 1 }, 1001, 0), 500);
    assert.equal(expectedCached(index, { blocks: 0, share: 0, use: 0 }, 1001, 0), 0);
    assert.equal(expectedCached(index, { blocks: 4, share: 1, use: 1 }, 1001, 0), 1001);
  });

  it("follows what the engine reports of what was expected before any doubt", () => {
    const { index, match, ratio } = seen(0.5);
    for (let at = 0; at < 40; at++) correct(index, match, { input: 4000, cached: 500 }, 0);
    assert(Math.abs(ratio(0) - 0.25) < 0.001, `${ratio(0)}`);
  });

  it("is lowered by reports of nothing, and comes back with the engine's cache", () => {
    const { index, match, ratio } = seen();
    correct(index, match, MISS, 0);
    assert.equal(ratio(0), 0.8);
    for (let at = 0; at < 50; at++) correct(index, match, MISS, 0);
    assert(ratio(0) < 0.001);
    for (let at = 0; at < 15; at++) correct(index, match, HIT, 0);
    assert(ratio(0) > 0.9, `${ratio(0)}`);
  });

  it("comes back by itself where nothing is reported because nothing is sent", () => {
    const { index, match, ratio } = seen();
    for (let at = 0; at < 50; at++) correct(index, match, MISS, 7 * MINUTE);
    assert(ratio(8 * MINUTE) < 0.06);
    assert(Math.abs(ratio(22 * MINUTE) - 0.5) < 0.001);
    assert(ratio(120 * MINUTE) > 0.99);
    correct(index, match, MISS, 22 * MINUTE);
    assert(Math.abs(ratio(22 * MINUTE) - 0.4) < 0.001);
    // Reports that go on being bad are believed, minutes apart as well.
    for (let at = 120; at < 240; at += 2) correct(index, match, MISS, at * MINUTE);
    assert(ratio(240 * MINUTE) < 0.5, `${ratio(240 * MINUTE)}`);
  });

  it("is changed little by a report on few tokens", () => {
    const { index, match, ratio } = seen();
    correct(index, { ...match, use: 1 }, { input: 32, cached: 0 }, 0);
    assert.equal(ratio(0), 1 - 0.2 / 16);
    assert.equal(index.goneUntil, 0);
  });

  it("is not changed where nothing was expected, or no number is reported", () => {
    const { index, match, ratio } = seen();
    correct(index, { ...match, share: 0 }, MISS, 0);
    correct(index, match, { input: 0, cached: 0 }, 0);
    correct(index, match, { input: Number.NaN, cached: 0 }, 0);
    correct(index, match, { input: 4000, cached: Number.NaN }, 0);
    correct(index, match, { input: 4000, cached: -1 }, 0);
    assert.equal(ratio(0), 1);
  });

  it("stays between nothing and all, whatever engines report and clocks do", () => {
    const tokens = fc.oneof(fc.nat(10_000), fc.double());
    const report = fc.record({
      share: fc.double({ min: 0, max: 1, noNaN: true }),
      usage: fc.record({ input: tokens, cached: tokens }),
      now: fc.integer({ min: -1e9, max: 1e9 }),
    });
    fc.assert(
      fc.property(fc.array(report), fc.integer(), (reports, at) => {
        const { index, match, ratio } = seen();
        for (const { share, usage, now } of reports)
          correct(index, { ...match, share }, usage, now);
        assert(ratio(at) >= 0 && ratio(at) <= 1, `${ratio(at)}`);
        const latest = Math.max(at, ...reports.map(({ now }) => now));
        assert(ratio(latest + 300 * MINUTE) > 0.99);
      }),
    );
  });
});

describe("what the engine has lost", () => {
  const first = chain(1, 10, 11);
  const second = chain(1, 20, 21);
  const third = chain(1, 30, 31);

  function talked(): PrefixIndex {
    const index = createPrefixIndex();
    for (const each of [first, second, third]) remember(index, each);
    return index;
  }

  it("is what nobody asked for since, too", () => {
    const index = talked();
    const match = matched(index, second);
    remember(index, second);
    correct(index, match, MISS, 0);
    assert.equal(matched(index, first).blocks, 1);
    assert.equal(matched(index, third).blocks, 3);
  });

  it("is not what it has just computed again", () => {
    const index = talked();
    const match = matched(index, second);
    remember(index, second);
    correct(index, match, MISS, 0);
    assert.equal(matched(index, second).blocks, 3);
    remember(index, first);
    assert.equal(matched(index, first).blocks, 3);
  });

  it("is nothing where it had the better half", () => {
    const index = talked();
    const match = matched(index, second);
    remember(index, second);
    correct(index, match, { input: 4000, cached: 2000 }, 0);
    assert.equal(matched(index, first).blocks, 3);
  });

  it("is not found again by a late report on an older prompt", () => {
    const index = talked();
    const [early, late] = [matched(index, first), matched(index, second)];
    remember(index, third);
    correct(index, late, MISS, 0);
    correct(index, early, MISS, 0);
    assert.equal(matched(index, second).blocks, 1);
  });
});

describe("a session", () => {
  it("is with the backend that served it last", () => {
    const sessions = new Sessions();
    assert.equal(sessions.last("s"), null);
    sessions.remember("s", "a");
    sessions.remember("t", "b");
    sessions.remember("s", "c");
    assert.deepEqual([sessions.last("s"), sessions.last("t")], ["c", "b"]);
  });

  it("is forgotten after 10,000 others", () => {
    const sessions = new Sessions();
    sessions.remember("first", "a");
    sessions.remember("kept", "a");
    for (let at = 0; at < 9998; at++) sessions.remember(`s${at}`, "b");
    sessions.remember("kept", "a");
    assert.equal(sessions.last("first"), "a");
    sessions.remember("one more", "b");
    assert.equal(sessions.last("first"), null);
    assert.equal(sessions.last("s0"), "b");
    sessions.remember("and one more", "b");
    assert.equal(sessions.last("kept"), "a");
    assert.equal(sessions.last("s0"), null);
  });
});
