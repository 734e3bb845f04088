/** Where a request goes: by its first token, by what the backend has read before, else by weight (design §4). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { openaiChat, sleep, until, type Answer, type Init } from "../support/client.ts";
import { QUIET } from "../support/deterministic.ts";
import { startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
/** The stated pace of the fake engine, slow enough to be seen on a busy machine. */
const PREFILL = { msPerToken: 0.5, keeps: true };

async function withTwo(
  backends: { a?: object; b?: object },
  work: (fleet: Fleet<"a" | "b">) => Promise<void>,
  behaviour: object = {},
): Promise<void> {
  const a = { backend: { ...QUIET, ...backends.a }, behaviour };
  const b = { backend: { ...QUIET, ...backends.b }, behaviour };
  const fleet = await startFleet({ a, b }, { cache: { enabled: false } });
  try {
    await work(fleet);
  } finally {
    await fleet.close();
  }
}

const backendOf = ({ status, headers, text }: Answer): string => {
  assert.equal(status, 200, text);
  return headers.get("x-tidegate-backend") ?? "";
};
const reasonOf = ({ headers }: Answer): string => headers.get("x-tidegate-reason") ?? "";

const words = (about: string, count: number): string =>
  Array.from({ length: count }, (_, at) => `${about}${at}`).join(" ");

/** A conversation about something, with so many turns; each begins with the whole of the one before. */
function conversation(about: string, turns: number, length = 800): Record<string, unknown> {
  const messages = [{ role: "user", content: words(about, length) }];
  for (let turn = 1; turn < turns; turn++) {
    messages.push({ role: "assistant", content: "Yes." });
    messages.push({ role: "user", content: words(`${about}${turn}x`, 20) });
  }
  return { messages, stream: true };
}

describe("two idle equal backends", () => {
  it("with weights 1 and 2 get 100 and 200 of 300 requests", TIMEOUT, async () => {
    await withTwo({ a: { weight: 1 }, b: { weight: 2 } }, async ({ url }) => {
      const got: Record<string, number> = { a: 0, b: 0 };
      const reasons = new Set<string>();
      for (let each = 0; each < 300; each++) {
        const answer = await openaiChat(url, { stream: each % 2 === 0 });
        const backend = backendOf(answer);
        got[backend] = (got[backend] ?? 0) + 1;
        reasons.add(reasonOf(answer));
      }
      const { a = 0, b = 0 } = got;
      assert.ok(Math.abs(a - 100) <= 3 && Math.abs(b - 200) <= 3, `${a} and ${b}`);
      assert.ok(reasons.has("weight"), [...reasons].join());
    });
  });

  it("get a conversation back that each has read the beginning of", TIMEOUT, async () => {
    await withTwo(
      {},
      async ({ url, engines }) => {
        const topics = ["north", "south", "east", "west"];
        const homes = new Map<string, string>();
        for (const topic of topics) {
          homes.set(topic, backendOf(await openaiChat(url, conversation(topic, 1))));
        }
        assert.equal(new Set(homes.values()).size, 2, "strangers are spread");
        for (let turn = 2; turn <= 4; turn++) {
          // Not in the order in which they would go round.
          for (const topic of turn % 2 === 0 ? topics : topics.toReversed()) {
            const answer = await openaiChat(url, conversation(topic, turn));
            assert.equal(backendOf(answer), homes.get(topic), `${topic}, turn ${turn}`);
            assert.equal(reasonOf(answer), "prefix");
          }
        }
        const cached = [engines.a, engines.b]
          .flatMap((engine) => engine.inference())
          .map((request) => /"cached_tokens":(\d+)/.exec(request.sent().toString())?.[1]);
        const again = cached.filter((tokens) => Number(tokens) >= 800).length;
        assert.equal(again, 3 * topics.length, "every turn but the first: " + cached.join(" "));
      },
      { prefill: PREFILL },
    );
  });

  it("get no conversation back where an engine says that it keeps nothing", TIMEOUT, async () => {
    await withTwo(
      {},
      async ({ url }) => {
        const backends: string[] = [];
        const isSpread = () => new Set(backends.slice(-4)).size === 2;
        for (let turn = 1; turn <= 40 && (turn <= 4 || !isSpread()); turn++) {
          backends.push(backendOf(await openaiChat(url, conversation("north", turn, 300))));
        }
        assert.equal(backends[1], backends[0], "it is believed to keep it at first");
        assert.ok(isSpread(), backends.join(" "));
      },
      { prefill: { ...PREFILL, keeps: false } },
    );
  });

  it("get a session back that one of them had last", TIMEOUT, async () => {
    await withTwo({}, async ({ url }) => {
      const inSession = (name: string): Init => ({ headers: { "x-session-id": name } });
      const homes = new Map<string, string>();
      for (const name of ["one", "two", "three"]) {
        homes.set(name, backendOf(await openaiChat(url, {}, inSession(name))));
      }
      assert.equal(new Set(homes.values()).size, 2, "sessions are spread");
      for (let each = 0; each < 12; each++) {
        const name = ["three", "one", "two", "one"][each % 4] as string;
        const answer = await openaiChat(url, { stream: each % 2 === 0 }, inSession(name));
        assert.deepEqual([backendOf(answer), reasonOf(answer)], [homes.get(name), "prefix"]);
      }
      // Somebody else's session of the same name, of another model: names are not shared.
      const strangers = [];
      for (let each = 0; each < 4; each++) strangers.push(backendOf(await openaiChat(url)));
      assert.equal(new Set(strangers).size, 2, strangers.join(" "));
    });
  });

  it("get a session by the name that a client has for it in its body", TIMEOUT, async () => {
    await withTwo({}, async ({ url }) => {
      const asked = () => openaiChat(url, { prompt_cache_key: "mine" });
      const home = backendOf(await asked());
      for (let each = 0; each < 5; each++) {
        // One of somebody else in between moves the round on.
        await openaiChat(url);
        assert.equal(backendOf(await asked()), home);
      }
    });
  });
});

describe("a busy backend", () => {
  const SINGLE = { concurrency: 1 };

  it(
    "that has the prompt is waited for, where that is sooner than to read it elsewhere",
    TIMEOUT,
    async () => {
      await withTwo(
        { a: SINGLE, b: SINGLE },
        async ({ url, engines, gateway }) => {
          const long = (turns: number) => conversation("north", turns, 2000);
          const home = backendOf(await openaiChat(url, long(1))) as "a" | "b";
          const other = home === "a" ? "b" : "a";
          // Both are measured: reading 2000 words takes a second, all else next to nothing.
          for (let each = 0; each < 8; each++) {
            await openaiChat(url, { stream: true });
          }
          engines[home].behave({ headersDelayMs: 300 });
          const seen = engines[home].inference().length;
          // Somebody with the same beginning has the slot.
          const running = openaiChat(url, long(2));
          assert.ok(await until(() => engines[home].inference().length > seen));
          engines[home].behave({ headersDelayMs: 0 });
          const [waits, short] = [openaiChat(url, long(3)), openaiChat(url, { stream: true })];
          assert.equal(
            backendOf(await short),
            other,
            "who has read nothing anywhere goes elsewhere",
          );
          const answer = await waits;
          assert.equal(backendOf(answer), home);
          assert.equal(reasonOf(answer), "prefix");
          assert.match(answer.headers.get("server-timing") ?? "", /queue;dur=\d/);
          assert.equal(backendOf(await running), home);
          assert.equal(await gateway.metric("tidegate_queue_requests"), 0);
        },
        { prefill: PREFILL },
      );
    },
  );

  it("is left by one that waits when another comes free", TIMEOUT, async () => {
    await withTwo({ a: SINGLE, b: SINGLE }, async ({ url, engines: { a, b }, gateway }) => {
      a.behave({ headersDelayMs: 60_000 });
      b.behave({ headersDelayMs: 400 });
      const leaving = new AbortController();
      const both = ["1", "2"].map((user) =>
        openaiChat(url, { user }, { signal: leaving.signal }).catch(() => null),
      );
      assert.ok(await until(() => a.inference().length + b.inference().length === 2));
      b.behave({ headersDelayMs: 0 });
      const later = [];
      for (const user of ["3", "4", "5"]) {
        later.push(openaiChat(url, { user }));
        await sleep(5);
      }
      for (const answer of await Promise.all(later)) assert.equal(backendOf(answer), "b");
      assert.equal(a.inference().length, 1);
      leaving.abort();
      await Promise.all(both);
      assert.ok(await until(async () => (await gateway.metric("tidegate_slots_in_use")) === 0));
    });
  });
});
