/** Tenants' limits over HTTP: what a request costs, when it is refused, and what it is told (contract §1, §3, §4). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, RawClient } from "../support/client.ts";
import {
  chatBody,
  connect,
  open,
  openaiChat,
  postBytes,
  readEvents,
  seeded,
  send,
  sleep,
  until,
} from "../support/client.ts";
import { faults } from "../support/engine-behaviour.ts";
import { checkEnvelope, expectError, startFleet, type Fleet } from "../support/fleet.ts";
import type { LogRecord } from "../support/gateway.ts";
import { by, isQuiet, tenantOf, withKeys, type BudgetReport } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };
const DAY_MS = 86_400_000;
/** Nobody comes near it. */
const AMPLE = { budgets: [{ tokens: 1_000_000, window: "day" }] };

const idOf = ({ headers }: Answer): string => headers.get("x-request-id") ?? "";

/** Tokens that a prompt is expected to be before anything was learned of the model (algorithms.md §6). */
function expectedPrompt(body: object): number {
  return Math.ceil(Buffer.byteLength(JSON.stringify(body)) * 0.28 + 4);
}

async function budgetOf(fleet: Fleet<"a">, tenant: string): Promise<BudgetReport> {
  await isQuiet(fleet.gateway);
  const [budget] = (await tenantOf(fleet.url, tenant)).budgets;
  assert(budget !== undefined);
  return budget;
}

/** What a tenant has used of its first budget, with nothing under way. */
async function usedBy(fleet: Fleet<"a">, tenant: string): Promise<number> {
  const { used, reserved } = await budgetOf(fleet, tenant);
  assert.equal(reserved, 0);
  return used;
}

const isQueued = (fleet: Fleet<"a">, count: number): Promise<boolean> =>
  until(async () => (await fleet.gateway.metric("tidegate_queue_requests")) === count);

const areHere = (fleet: Fleet<"a">, count: number): Promise<boolean> =>
  until(async () => (await fleet.gateway.metric("tidegate_requests_in_flight")) === count);

/** A chat whose client can leave. */
async function raw(fleet: Fleet<"a">, tenant: string, body: object = {}): Promise<RawClient> {
  const client = await connect(fleet.gateway.port);
  const bytes = postBytes("/v1/chat/completions", chatBody({ ...body }), by(tenant).headers);
  client.write(bytes);
  return client;
}

describe("what a request costs", () => {
  const NAMES = [
    "whole",
    "stream",
    "leaver",
    "early",
    "piece",
    "queued",
    "hit",
    "joined",
    "broken",
    "cut",
    "embeds",
    "counts",
    "changed",
    "silent",
    "several",
    "endless",
    "partial",
  ] as const;
  type Name = (typeof NAMES)[number];
  let fleet: Fleet<"a">;
  before(async () => {
    const tenants = Object.fromEntries(NAMES.map((name) => [name, AMPLE])) as Record<Name, object>;
    const models = [...NAMES, "embed", "embed-partly"];
    fleet = await startFleet(
      { a: { models, backend: { concurrency: 2 } } },
      {
        ...withKeys({ ...tenants, changed: { ...AMPLE, concurrency: 1 } }),
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  /** Each tenant has a model of its own, of which nobody has learned anything. */
  const ask = (name: Name, body: object = {}): Promise<Answer> =>
    openaiChat(fleet.url, { model: name, ...body }, by(name));
  const bodyOf = (name: Name, more: object): object => chatBody({ model: name, ...more });

  for (const [name, body] of [
    ["whole", {}],
    ["stream", { stream: true }],
  ] as const) {
    it(`${name}: what the engine counted, whatever was reserved`, TIMEOUT, async () => {
      fleet.engines.a.behave({ promptTokens: 50, tokens: 20 });
      for (const times of [1, 2]) {
        const answer = await ask(name, body);
        assert.equal(answer.status, 200);
        assert.equal((await fleet.gateway.record(idOf(answer))).tokens_estimated, false);
        assert.equal(await usedBy(fleet, name), 70 * times);
      }
      const { tokens } = await tenantOf(fleet.url, name);
      assert.deepEqual(tokens, { input: 100, output: 40, estimated: 0 });
    });
  }

  it("shows while it runs what is reserved", TIMEOUT, async () => {
    fleet.engines.a.behave({ promptTokens: 50, tokens: 20, headersDelayMs: Infinity });
    const body = bodyOf("silent", { max_tokens: 33 });
    const answer = ask("silent", { max_tokens: 33 });
    assert(await until(() => fleet.engines.a.activeGenerations() === 1));
    const [budget] = (await tenantOf(fleet.url, "silent")).budgets;
    assert.deepEqual([budget?.used, budget?.reserved], [0, expectedPrompt(body) + 33]);
    fleet.engines.a.release();
    await answer;
    assert.equal(await usedBy(fleet, "silent"), 70);
  });

  for (const [name, what, more, output] of [
    ["several", "each of several answers", { n: 4, max_tokens: 25 }, 100],
    ["endless", "what usually comes, where no limit is asked for", { max_tokens: -1 }, 1000],
  ] as const) {
    it(`reserves for ${what}`, TIMEOUT, async () => {
      fleet.engines.a.behave({ headersDelayMs: Infinity });
      const answer = ask(name, more);
      assert(await until(() => fleet.engines.a.activeGenerations() === 1));
      const [budget] = (await tenantOf(fleet.url, name)).budgets;
      assert.equal(budget?.reserved, expectedPrompt(bodyOf(name, more)) + output);
      fleet.engines.a.release();
      assert.equal((await answer).status, 200);
    });
  }

  it("a stream whose client leaves: its prompt and what flowed, flagged", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ promptTokens: 50, tokens: 1000, tokenDelayMs: 5 });
    const body = bodyOf("leaver", { stream: true });
    const leaving = new AbortController();
    const init = { ...by("leaver"), signal: leaving.signal };
    const response = await open(`${fleet.url}/v1/chat/completions`, body, init);
    let events = 0;
    for await (const event of readEvents(response)) {
      void event;
      events += 1;
      if (events === 10) break;
    }
    leaving.abort();
    const record = await fleet.gateway.record(({ tenant }) => tenant === "leaver");
    assert.deepEqual(
      [record.ending, record.cause, record.tokens_estimated, record.tokens_input],
      ["cancelled", "streaming", true, null],
    );
    const flowed = Number(record.tokens_generated);
    assert(flowed >= 9 && flowed < 1000, `${flowed}`);
    assert.equal(await usedBy(fleet, "leaver"), expectedPrompt(body) + flowed);
    const { tokens } = await tenantOf(fleet.url, "leaver");
    assert.deepEqual(tokens, { input: 0, output: flowed, estimated: flowed });
    assert(await until(() => a.inference()[0]?.closedByClient === true));
  });

  it("a stream whose client leaves before the first token: its prompt", TIMEOUT, async () => {
    fleet.engines.a.behave({ headersDelayMs: 60_000 });
    const client = await raw(fleet, "early", { model: "early", stream: true });
    assert(await until(() => fleet.engines.a.activeGenerations() === 1));
    client.leave("close");
    const record = await fleet.gateway.record(({ tenant }) => tenant === "early");
    assert.deepEqual([record.ending, record.status, record.attempts], ["cancelled", 499, 1]);
    const body = bodyOf("early", { stream: true });
    assert.equal(await usedBy(fleet, "early"), expectedPrompt(body));
  });

  it("an answer in one piece whose client leaves: as expected, flagged", TIMEOUT, async () => {
    fleet.engines.a.behave({ headersDelayMs: 60_000 });
    const client = await raw(fleet, "piece", { model: "piece", max_tokens: 40 });
    assert(await until(() => fleet.engines.a.activeGenerations() === 1));
    client.leave("reset");
    const record = await fleet.gateway.record(({ tenant }) => tenant === "piece");
    assert.deepEqual([record.ending, record.tokens_estimated], ["cancelled", true]);
    const body = bodyOf("piece", { max_tokens: 40 });
    assert.equal(await usedBy(fleet, "piece"), expectedPrompt(body) + 40);
  });

  it("nothing, for who leaves the queue", TIMEOUT, async () => {
    fleet.engines.a.behave({ headersDelayMs: 60_000 });
    const running = [await raw(fleet, "whole", { model: "whole" })];
    running.push(await raw(fleet, "whole", { model: "whole" }));
    assert(await until(() => fleet.engines.a.activeGenerations() === 2));
    for (const body of [{}, { stream: true }, { temperature: 0 }]) {
      const client = await raw(fleet, "queued", { model: "queued", ...body });
      assert(await isQueued(fleet, 1));
      const { queued, budgets } = await tenantOf(fleet.url, "queued");
      assert.equal(queued, 1);
      assert((budgets[0]?.reserved ?? 0) > 0, "it has a reservation");
      client.leave("fin");
      assert(await isQueued(fleet, 0));
    }
    for (const client of running) client.leave("close");
    assert.equal(await usedBy(fleet, "queued"), 0);
    const records = fleet.gateway.records().filter(({ tenant }) => tenant === "queued");
    assert.deepEqual(
      records.map(({ cause, attempts, tokens_estimated }) => [cause, attempts, tokens_estimated]),
      [1, 2, 3].map(() => ["queued", 0, false]),
    );
  });

  it("nothing, for what is in the cache", TIMEOUT, async () => {
    fleet.engines.a.behave({ promptTokens: 50, tokens: 20 });
    const caches = [];
    for (let each = 0; each < 3; each++) {
      const { headers } = await ask("hit", { temperature: 0 });
      caches.push(headers.get("x-tidegate-cache"));
    }
    assert.deepEqual(caches, ["miss", "hit", "hit"]);
    assert.equal(await usedBy(fleet, "hit"), 70);
    const { requests, tokens } = await tenantOf(fleet.url, "hit");
    assert.deepEqual([requests, tokens], [3, { input: 50, output: 20, estimated: 0 }]);
  });

  it("once, for those who ask for the same at once", TIMEOUT, async () => {
    fleet.engines.a.behave({ promptTokens: 50, tokens: 20, headersDelayMs: Infinity });
    const same = Array.from({ length: 8 }, () => ask("joined", { temperature: 0 }));
    assert(await areHere(fleet, 8));
    fleet.engines.a.release();
    const caches = (await Promise.all(same)).map(({ headers }) => headers.get("x-tidegate-cache"));
    const count = (wanted: string) => caches.filter((each) => each === wanted).length;
    assert.deepEqual([count("miss"), count("joined")], [1, 7]);
    assert.equal(await usedBy(fleet, "joined"), 70);
    const { requests, tokens } = await tenantOf(fleet.url, "joined");
    assert.deepEqual([requests, tokens], [8, { input: 50, output: 20, estimated: 0 }]);
  });

  it("nothing but what flowed, when the engine fails", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ fault: faults.ollamaLoadFailed });
    for (const body of [{}, { stream: true }]) {
      expectError(await ask("broken", body), 502, "upstream_error");
    }
    a.behave({ fault: { kind: "drop", by: "reset" } });
    expectError(await ask("broken"), 502, "upstream_unreachable");
    assert.equal(await usedBy(fleet, "broken"), 0);
    a.behave({ fault: { kind: "cut", afterTokens: 3, by: "reset" } });
    const cut = await ask("cut", { stream: true });
    const record = await fleet.gateway.record(idOf(cut));
    assert.deepEqual([record.cause, record.tokens_generated], ["upstream_incomplete", 3]);
    assert.equal(await usedBy(fleet, "cut"), 3);
  });

  it("only what was not there, for embeddings", TIMEOUT, async () => {
    const embed = async (input: string[]) => {
      const answer = await send(
        `${fleet.url}/v1/embeddings`,
        { model: "embed", input },
        by("embeds"),
      );
      assert.equal(answer.status, 200, answer.text);
      return (answer.json()["usage"] as { prompt_tokens: number }).prompt_tokens;
    };
    const first = await embed(["one two three", "four five"]);
    assert.equal(await usedBy(fleet, "embeds"), first);
    const all = await embed(["one two three", "four five", "six"]);
    const last = fleet.engines.a.inference().at(-1);
    assert.deepEqual(last?.json["input"], ["six"]);
    assert.equal(await usedBy(fleet, "embeds"), all, "the third alone was charged");
  });

  it(
    "reserves for embeddings what they will cost, when most of them are there",
    TIMEOUT,
    async () => {
      const { a } = fleet.engines;
      const texts = (about: string): string[] =>
        Array.from({ length: 30 }, (_, at) => `${about}${at} word `.repeat(60));
      const embed = (input: string[]) =>
        send(`${fleet.url}/v1/embeddings`, { model: "embed-partly", input }, by("partial"));
      const known = texts("known");
      assert.equal((await embed(known)).status, 200);
      const all = await usedBy(fleet, "partial");
      const reservedFor = async (input: string[]): Promise<number> => {
        a.behave({ headersDelayMs: Infinity });
        const answer = embed(input);
        assert(await until(() => a.activeGenerations() === 1));
        const [budget] = (await tenantOf(fleet.url, "partial")).budgets;
        a.release();
        assert.equal((await answer).status, 200);
        await isQuiet(fleet.gateway);
        return budget?.reserved ?? 0;
      };
      const one = await reservedFor([...known, "another word ".repeat(60)]);
      assert(one < all / 5, `${one} for one of 31 that were ${all} without it`);
      const others = await reservedFor(texts("other"));
      assert(others > all * 0.8, `${others} for as many as took ${all}`);
    },
  );

  it("once, for embeddings that are made again since the model has changed", TIMEOUT, async () => {
    const { a } = fleet.engines;
    const embed = (input: string[]) =>
      send(`${fleet.url}/v1/embeddings`, { model: "embed", input }, by("changed"));
    const before = await embed(["kept"]);
    assert.equal(before.status, 200);
    const cost = await usedBy(fleet, "changed");
    const vector = (index: number) => ({ object: "embedding", index, embedding: [1, 2] });
    const body = {
      object: "list",
      model: "another",
      data: [vector(0)],
      usage: { prompt_tokens: 10, total_tokens: 10 },
    };
    a.behave({ fault: { kind: "answer", status: 200, body }, faultTimes: 1 });
    const answer = await embed(["kept", "new"]);
    assert.equal(answer.status, 200, answer.text);
    const asked = a.inference().map(({ json }) => json["input"]);
    assert.deepEqual(asked, [["kept"], ["new"], ["kept", "new"]]);
    const again = (answer.json()["usage"] as { prompt_tokens: number }).prompt_tokens;
    assert.equal(await usedBy(fleet, "changed"), cost + 10 + again);
  });

  it("nothing, to have tokens counted", TIMEOUT, async () => {
    const body = bodyOf("counts", {});
    const answer = await send(`${fleet.url}/v1/messages/count_tokens`, body, by("counts"));
    assert.equal(answer.status, 200, answer.text);
    assert.equal(await usedBy(fleet, "counts"), 0);
  });
});

/** When it comes free, as an answer has it: between these times of this clock. */
interface Freed {
  earliest: number;
  latest: number;
}

describe("a budget that is used up", () => {
  const HUNDRED = (window: string) => ({ budgets: [{ tokens: 100, window }] });
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { concurrency: 1 } } },
      withKeys({
        other: {},
        soon: HUNDRED("4s"),
        later: HUNDRED("24h"),
        day: HUNDRED("day"),
        month: HUNDRED("month"),
        straight: HUNDRED("1h"),
        anthropic: HUNDRED("1h"),
        two: { budgets: [...HUNDRED("2s").budgets, ...HUNDRED("2h").budgets] },
      }),
    );
    fleet.engines.a.behave({ promptTokens: 30, tokens: 30 });
  });
  afterEach(async () => {
    await isQuiet(fleet.gateway);
    fleet.reset();
    fleet.engines.a.behave({ promptTokens: 30, tokens: 30 });
  });
  after(() => fleet.close());

  const ask = (tenant: string, body: object = {}): Promise<Answer> =>
    openaiChat(fleet.url, { ...body }, by(tenant));

  /** A refusal, and when the gateway says that it would not be one any more. */
  async function refused(tenant: string): Promise<Answer & Freed> {
    const sentAt = Date.now();
    const answer = await ask(tenant);
    const gotAt = Date.now();
    assert.equal(answer.status, 429, answer.text);
    const ms = Number(answer.headers.get("retry-after-ms"));
    assert(Number.isInteger(ms) && ms >= 1, `${ms}`);
    assert.equal(answer.headers.get("retry-after"), String(Math.ceil(ms / 1000)));
    return { ...answer, earliest: sentAt + ms, latest: gotAt + ms };
  }

  it("within 60 s: 429 with the very time after which it passes", TIMEOUT, async () => {
    assert.equal((await ask("soon")).status, 200);
    const first = await refused("soon");
    const error = expectError(first, 429, "rate_limit_exceeded");
    assert.equal(error.type, "rate_limit_error");
    assert.match(error.message, /tenant "soon" .* 100 tokens per 4s/);
    assert.equal(first.headers.get("x-should-retry"), null);
    // 60 of 100 tokens are used, and the request may need all of the budget: 60 % of 4 s.
    assert(first.latest - Date.now() <= 2400 && first.earliest - Date.now() > 1000);
    await sleep((first.earliest - Date.now()) / 2);
    const second = await refused("soon");
    const [earliest, latest] = [
      Math.max(first.earliest, second.earliest),
      Math.min(first.latest, second.latest),
    ];
    assert(earliest <= latest + 2, `${earliest} ${latest}: both name the same moment`);
    await sleep(Math.min(first.latest, second.latest) - Date.now() + 2);
    assert.equal((await ask("soon")).status, 200);
  });

  it("later: insufficient_quota, with the true time, and no retry", TIMEOUT, async () => {
    assert.equal((await ask("later")).status, 200);
    const answer = await refused("later");
    const error = expectError(answer, 429, "insufficient_quota");
    assert.equal(error.type, "insufficient_quota");
    assert.equal(answer.headers.get("x-should-retry"), "false");
    const seconds = Number(answer.headers.get("retry-after"));
    const whole = 51_840;
    assert(seconds <= whole && seconds > whole - 60, `${seconds}`);
  });

  for (const window of ["day", "month"] as const) {
    it(`of the calendar: until the ${window} is over, UTC`, TIMEOUT, async () => {
      const now = new Date();
      const [year, month, day] = [now.getUTCFullYear(), now.getUTCMonth(), now.getUTCDate()];
      const end = window === "day" ? Date.UTC(year, month, day + 1) : Date.UTC(year, month + 1);
      assert.equal((await ask(window)).status, 200);
      const answer = await refused(window);
      assert(answer.earliest <= end + 1 && answer.latest >= end - 1);
      const isSoon = end - now.getTime() < 60_000;
      expectError(answer, 429, isSoon ? "rate_limit_exceeded" : "insufficient_quota");
      const [budget] = (await tenantOf(fleet.url, window)).budgets;
      assert(Math.abs((budget?.resetAt ?? 0) - end) <= 2);
      assert.deepEqual([budget?.window, budget?.limit, budget?.used], [window, 100, 60]);
    });
  }

  it("of several the one that takes longest decides", TIMEOUT, async () => {
    assert.equal((await ask("two")).status, 200);
    const error = expectError(await refused("two"), 429, "insufficient_quota");
    assert.match(error.message, /per 2h/);
  });

  it("is told to Anthropic's clients in their words", TIMEOUT, async () => {
    const body = chatBody({ max_tokens: 40 });
    const first = await send(`${fleet.url}/v1/messages`, body, by("anthropic"));
    assert.equal(first.status, 200);
    const answer = await send(`${fleet.url}/v1/messages`, body, by("anthropic"));
    assert.equal(answer.status, 429);
    const { type, error } = answer.json() as { type: string; error: { type: string } };
    assert.deepEqual([type, error.type], ["error", "rate_limit_error"]);
    assert.equal(answer.headers.get("x-should-retry"), "false");
  });

  it("never lets a request near a queue or an engine", TIMEOUT, async () => {
    const { a } = fleet.engines;
    assert.equal((await ask("straight")).status, 200);
    a.behave({ headersDelayMs: 60_000 });
    const running = await raw(fleet, "other");
    assert(await until(() => a.activeGenerations() === 1));
    const waiting = await raw(fleet, "other");
    assert(await isQueued(fleet, 1));
    const sent = a.inference().length;
    const before = await fleet.gateway.metric("tidegate_refusals_total");
    for (const body of [{}, { stream: true }, { temperature: 0 }]) {
      const answer = await ask("straight", body);
      expectError(answer, 429, "insufficient_quota");
      for (const name of ["backend", "reason", "attempts"]) {
        assert.equal(answer.headers.get(`x-tidegate-${name}`), null);
      }
      const record = await fleet.gateway.record(idOf(answer));
      assert.deepEqual(
        [record.status, record.ending, record.cause, record.attempts, record.backend_id],
        [429, "failed", "insufficient_quota", 0, null],
      );
    }
    assert(await isQueued(fleet, 1));
    assert.equal(a.inference().length, sent);
    const causes = { cause: "insufficient_quota" };
    const after = await fleet.gateway.metric("tidegate_refusals_total");
    assert.equal(after - before, 3);
    assert((await fleet.gateway.metric("tidegate_refusals_total", causes)) >= 3);
    for (const client of [waiting, running]) client.leave("close");
    assert.equal(await usedBy(fleet, "straight"), 60, "and costs nothing");
  });
});

describe("x-ratelimit-*", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["test-model", "embed"] } },
      withKeys({
        none: { concurrency: 5 },
        hour: { budgets: [{ tokens: 36_000, window: "1h" }], requestsPerMinute: 600 },
        several: {
          budgets: [
            { tokens: 100_000, window: "1h" },
            { tokens: 2000, window: "day" },
            { tokens: 1_000_000, window: "month" },
          ],
        },
        rates: { requestsPerMinute: 60 },
        spent: { budgets: [{ tokens: 50, window: "1h" }] },
      }),
    );
    fleet.engines.a.behave({ promptTokens: 30, tokens: 30 });
  });
  after(() => fleet.close());

  const NAMES = ["limit", "remaining", "reset"].flatMap((what) => [
    `x-ratelimit-${what}-requests`,
    `x-ratelimit-${what}-tokens`,
  ]);
  const limitsIn = ({ headers }: Answer): Record<string, string> =>
    Object.fromEntries(
      NAMES.flatMap((name) => {
        const value = headers.get(name);
        return value === null ? [] : [[name.slice("x-ratelimit-".length), value]];
      }),
    );
  const ask = (tenant: string, body: object = {}): Promise<Answer> =>
    openaiChat(fleet.url, { ...body }, by(tenant));

  it("stand on the answers of tenants with such limits, and on no others", TIMEOUT, async () => {
    assert.deepEqual(limitsIn(await ask("none")), {});
    for (const body of [{}, { stream: true }, { temperature: 0 }]) {
      const names = Object.keys(limitsIn(await ask("hour", body)));
      assert.equal(names.length, 6, names.join(" "));
    }
    assert.deepEqual(Object.keys(limitsIn(await ask("rates"))), [
      "limit-requests",
      "remaining-requests",
      "reset-requests",
    ]);
    const embedded = await send(
      `${fleet.url}/v1/embeddings`,
      { model: "embed", input: ["x"] },
      by("several"),
    );
    assert.equal(Object.keys(limitsIn(embedded)).length, 3);
  });

  it("tell what is left beside this request and all others under way", TIMEOUT, async () => {
    await isQuiet(fleet.gateway);
    const [budget] = (await tenantOf(fleet.url, "hour")).budgets;
    const used = budget?.used ?? 0;
    const seen = limitsIn(await ask("hour", { max_tokens: 30 }));
    assert.deepEqual([seen["limit-requests"], seen["limit-tokens"]], ["600", "36000"]);
    const remaining = Number(seen["remaining-tokens"]);
    // A second gives ten tokens back.
    const reserved = 36_000 - used - remaining;
    assert(reserved >= 30 && reserved <= 100, `${reserved} for 30 tokens and their prompt`);
    assert.match(seen["reset-tokens"] ?? "", /^\d+(\.\d)?s$/);
    const reset = Number.parseFloat(seen["reset-tokens"] ?? "");
    assert(Math.abs(reset - (36_000 - remaining) / 10) <= 0.2, `${reset} ${remaining}`);
    const requests = Number(seen["remaining-requests"]);
    assert(requests <= 599 && requests >= 590, "ten come back every second");
    const resetRequests = Number.parseFloat(seen["reset-requests"] ?? "");
    assert(resetRequests > 0 && resetRequests <= 1, `${resetRequests}`);
  });

  it("tell of the tightest window", TIMEOUT, async () => {
    const seen = limitsIn(await ask("several", { max_tokens: 30 }));
    assert.equal(seen["limit-tokens"], "2000", "one and a half percent is more than others have");
    const reset = Number.parseFloat(seen["reset-tokens"] ?? "");
    const left = (DAY_MS - (Date.now() % DAY_MS)) / 1000;
    assert(Math.abs(reset - left) < 5, `${reset} until midnight, UTC, not ${left}`);
  });

  it("stand on refusals too, where they say that nothing is left", TIMEOUT, async () => {
    assert.equal((await ask("spent")).status, 200);
    const answer = await ask("spent", { stream: true });
    expectError(answer, 429, "insufficient_quota");
    const seen = limitsIn(answer);
    assert.deepEqual([seen["limit-tokens"], seen["remaining-tokens"]], ["50", "0"]);
    const reset = Number.parseFloat(seen["reset-tokens"] ?? "");
    assert(reset > 4200 && reset <= 4320, `60 of 50 tokens an hour, not ${reset} s`);
  });
});

describe("requestsPerMinute", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    const rate = { requestsPerMinute: 60 };
    fleet = await startFleet(
      { a: {} },
      withKeys({
        plain: rate,
        caching: { requestsPerMinute: 2 },
        strict: { requestsPerMinute: 1 },
      }),
    );
  });
  after(() => fleet.close());

  it("lets a minute's requests through at once, then each as one comes free", TIMEOUT, async () => {
    const ask = () => openaiChat(fleet.url, {}, by("plain"));
    const all = await Promise.all(Array.from({ length: 70 }, ask));
    const passed = all.filter(({ status }) => status === 200).length;
    // One more for every second that this took.
    assert(passed >= 60 && passed <= 65, `${passed}`);
    const answer = all.find(({ status }) => status === 429) ?? (await ask());
    // It was refused before this, all of them have ended since.
    const refusedBy = Date.now();
    expectError(answer, 429, "rate_limit_exceeded");
    assert.equal(answer.headers.get("x-ratelimit-remaining-requests"), "0");
    const ms = Number(answer.headers.get("retry-after-ms"));
    assert(ms > 0 && ms <= 1000, `${ms}`);
    await sleep(refusedBy + ms + 2 - Date.now());
    assert.equal((await ask()).status, 200);
  });

  it("does not count what the cache answers, nor what it has refused", TIMEOUT, async () => {
    const ask = (seed: number) => openaiChat(fleet.url, { temperature: 0, seed }, by("caching"));
    for (const [seed, cache] of [
      [1, "miss"],
      [1, "hit"],
      [1, "hit"],
      [2, "miss"],
      [2, "hit"],
    ] as const) {
      const { status, headers } = await ask(seed);
      assert.deepEqual([status, headers.get("x-tidegate-cache")], [200, cache]);
    }
    const first = Number((await ask(3)).headers.get("retry-after-ms"));
    const second = Number((await ask(3)).headers.get("retry-after-ms"));
    assert(first > 0 && second > 0 && second <= first, `${first} ${second}`);
  });

  it("counts what an engine failed, and who left", TIMEOUT, async () => {
    fleet.engines.a.behave({ fault: faults.ollamaLoadFailed, faultTimes: 1 });
    const ask = () => openaiChat(fleet.url, {}, by("strict"));
    expectError(await ask(), 502, "upstream_error");
    expectError(await ask(), 429, "rate_limit_exceeded");
  });
});

describe("concurrency", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["test-model", "small"], backend: { concurrency: 2 } } },
      {
        ...withKeys({
          one: { concurrency: 1 },
          two: { concurrency: 2 },
          other: {},
          poor: { concurrency: 1, budgets: [{ tokens: 10, window: "1h" }] },
        }),
        models: { small: { concurrency: 1 } },
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    );
  });
  afterEach(async () => {
    fleet.reset();
    await isQuiet(fleet.gateway);
  });
  after(() => fleet.close());

  const ask = (tenant: string, body: object = {}): Promise<Answer> =>
    openaiChat(fleet.url, { ...body }, by(tenant));

  it("refuses at once what is one too many, and nobody else", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ headersDelayMs: 60_000 });
    const clients = [await raw(fleet, "one"), await raw(fleet, "two", { model: "small" })];
    assert(await until(() => a.activeGenerations() === 2));
    // Of two this one waits, and counts all the same.
    clients.push(await raw(fleet, "two", { model: "small" }));
    assert(await isQueued(fleet, 1));
    for (const tenant of ["one", "two"]) {
      const answer = await ask(tenant);
      const error = expectError(answer, 429, "rate_limit_exceeded");
      assert.match(error.message, /concurrency/);
      const after = Number(answer.headers.get("retry-after"));
      assert(Number.isInteger(after) && after >= 1 && after <= 60, `${after}`);
      assert.equal((await fleet.gateway.record(idOf(answer))).attempts, 0);
    }
    clients.push(await raw(fleet, "other"));
    assert(await isQueued(fleet, 2));
    for (const client of clients) client.leave("close");
  });

  it("does not count what the cache answers, nor who joins", TIMEOUT, async () => {
    const { a } = fleet.engines;
    const same = { temperature: 0, seed: 1 };
    assert.equal((await ask("one", same)).status, 200);
    a.behave({ headersDelayMs: Infinity });
    const flight = { temperature: 0, seed: 2 };
    const leader = ask("one", flight);
    assert(await until(() => a.activeGenerations() === 1));
    const joined = ask("one", flight);
    assert(await areHere(fleet, 2));
    const hit = await ask("one", same);
    assert.deepEqual([hit.status, hit.headers.get("x-tidegate-cache")], [200, "hit"]);
    a.release();
    const statuses = (await Promise.all([leader, joined])).map(({ status, headers }) => {
      return [status, headers.get("x-tidegate-cache")];
    });
    assert.deepEqual(statuses, [
      [200, "miss"],
      [200, "joined"],
    ]);
  });

  const ENDINGS: Record<string, () => Promise<void>> = {
    async "an answer"() {
      assert.equal((await ask("one")).status, 200);
      assert.equal((await ask("one", { stream: true })).status, 200);
      assert.equal((await ask("one", { temperature: 0 })).status, 200);
    },
    async "an engine's failure"() {
      fleet.engines.a.behave({ fault: faults.ollamaLoadFailed, faultTimes: 1 });
      expectError(await ask("one"), 502, "upstream_error");
    },
    async "a stream that breaks off"() {
      fleet.engines.a.behave({
        fault: { kind: "cut", afterTokens: 2, by: "reset" },
        faultTimes: 1,
      });
      const { text } = await ask("one", { stream: true });
      assert.match(text, /upstream_incomplete/);
    },
    async "a client that leaves a stream"() {
      fleet.engines.a.behave({ stallAfterTokens: 2 });
      const client = await raw(fleet, "one", { stream: true });
      assert(await until(() => client.received().includes("word1")));
      client.leave("reset");
    },
    async "a client that leaves before anything came"() {
      for (const body of [{ stream: true }, {}, { temperature: 0, seed: 9 }]) {
        fleet.engines.a.behave({ headersDelayMs: 60_000 });
        const client = await raw(fleet, "one", body);
        assert(await until(() => fleet.engines.a.activeGenerations() === 1));
        client.leave("fin");
        await isQuiet(fleet.gateway);
      }
    },
    async "a client that leaves the queue"() {
      fleet.engines.a.behave({ headersDelayMs: 60_000 });
      const running = await raw(fleet, "other", { model: "small" });
      assert(await until(() => fleet.engines.a.activeGenerations() === 1));
      const client = await raw(fleet, "one", { model: "small" });
      assert(await isQueued(fleet, 1));
      client.leave("close");
      assert(await isQueued(fleet, 0));
      running.leave("close");
    },
    async "a wait that was too long"() {
      fleet.engines.a.behave({ headersDelayMs: 60_000 });
      const running = await raw(fleet, "other", { model: "small" });
      assert(await until(() => fleet.engines.a.activeGenerations() === 1));
      const init = by("one", { "x-stainless-timeout": "0.05" });
      const answer = await openaiChat(fleet.url, { model: "small", stream: true }, init);
      expectError(answer, 429, "rate_limit_exceeded");
      running.leave("close");
    },
  };
  for (const [ending, end] of Object.entries(ENDINGS)) {
    it(`has its place back after ${ending}`, TIMEOUT, async () => {
      await end();
      await isQuiet(fleet.gateway);
      fleet.reset();
      assert.equal((await ask("one")).status, 200);
    });
  }

  it("has its place back after a budget's refusal", TIMEOUT, async () => {
    assert.equal((await ask("poor")).status, 200);
    for (let each = 0; each < 3; each++) expectError(await ask("poor"), 429, "insufficient_quota");
  });
});

describe("twenty clients at a small limit", () => {
  const CLIENTS = 20;
  const LEAST = 20;
  const MOST = 200;
  const PROMPT = 30;
  const DAY = 20_000;
  const WINDOW_MS = 3000;
  const SLIDING = 6000;
  let fleet: Fleet<"a">;
  let stopChanging: () => void;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { concurrency: 64 }, behaviour: { promptTokens: PROMPT } } },
      withKeys({
        day: { budgets: [{ tokens: DAY, window: "day" }] },
        sliding: { budgets: [{ tokens: SLIDING, window: `${WINDOW_MS / 1000}s` }] },
      }),
      { args: ["--log-level", "info"] },
    );
    const random = seeded("budgets");
    // No answer is as long as the one before, and nobody says how long it is to be.
    const timer = setInterval(() => {
      fleet.engines.a.behave({ tokens: random.between(LEAST, MOST), headersDelayMs: 15 });
    }, 2);
    stopChanging = () => clearInterval(timer);
  });
  after(async () => {
    stopChanging();
    await fleet.close();
  });

  let underWay = 0;
  async function ask(tenant: string, stream: boolean): Promise<Answer> {
    underWay += 1;
    try {
      return await openaiChat(fleet.url, { stream }, by(tenant));
    } finally {
      underWay -= 1;
    }
  }

  const settledBy = (tenant: string): { tokens: number; count: number } => {
    const records = fleet.gateway
      .records()
      .filter((record) => record.tenant === tenant && record.status === 200);
    const sum = (total: number, { tokens_input, tokens_generated }: LogRecord): number =>
      total + Number(tokens_input) + Number(tokens_generated);
    return { tokens: records.reduce(sum, 0), count: records.length };
  };
  /** A reservation is the prompt's and the 90th percentile: it may be short by no more than an answer. */
  const ERROR = PROMPT + MOST;

  it("a day's budget: used to 95 % and over by one answer at most", TIMEOUT, async () => {
    let answered = 0;
    const client = async (at: number): Promise<void> => {
      for (;;) {
        const before = answered;
        const { status } = await ask("day", at % 2 === 0);
        if (status === 200) answered += 1;
        else assert.equal(status, 429);
        // Who was refused waits until something is given back; where nothing runs nothing will be.
        await until(() => answered !== before || underWay === 0);
        if (answered === before) return;
      }
    };
    await Promise.all(Array.from({ length: CLIENTS }, (_, at) => client(at)));
    const used = await usedBy(fleet, "day");
    assert(await until(() => settledBy("day").count === answered), "every answer is in the log");
    const { tokens, count } = settledBy("day");
    console.log(`budget of a day: ${tokens} of ${DAY} tokens in ${count} answers`);
    assert.equal(used, tokens, "the ledger has what the log has");
    assert(tokens <= DAY + ERROR, `${tokens}`);
    assert(tokens >= 0.95 * DAY, `${tokens}`);
  });

  it("one that slides: the same over any time, for who retries when told", TIMEOUT, async () => {
    const startedAt = performance.now();
    const endsAt = startedAt + 2 * WINDOW_MS;
    const client = async (at: number): Promise<void> => {
      while (performance.now() < endsAt) {
        const { status, headers } = await ask("sliding", at % 2 === 0);
        if (status === 200) continue;
        const waitMs = Number(headers.get("retry-after-ms"));
        assert(waitMs > 0 && waitMs <= WINDOW_MS, `${status} ${waitMs}`);
        await sleep(Math.max(0, Math.min(waitMs + 1, endsAt - performance.now())));
      }
    };
    await Promise.all(Array.from({ length: CLIENTS }, (_, at) => client(at)));
    const windows = (performance.now() - startedAt) / WINDOW_MS;
    await isQuiet(fleet.gateway);
    const { tokens, count } = settledBy("sliding");
    const most = SLIDING * (1 + windows);
    console.log(`budget that slides: ${tokens} of ${Math.round(most)} tokens in ${count} answers`);
    assert(tokens <= most + ERROR, `${tokens} ${most}`);
    // Who comes late on a busy machine leaves some of it; test/core/budget.test.ts has the 95 %.
    assert(tokens >= 0.8 * SLIDING * 3, `${tokens} of ${SLIDING * 3}`);
  });
});

describe("a reload", () => {
  let fleet: Fleet<"a">;
  const config = (tenants: Record<string, object>, more: object = {}): Record<string, unknown> => ({
    ...withKeys(tenants),
    ...more,
  });
  const budget = (tokens: number, window: string) => ({ budgets: [{ tokens, window }] });
  const STEADY = { day: budget(1000, "day"), sliding: budget(1000, "10h") };
  before(async () => {
    fleet = await startFleet({ a: {} }, config(STEADY));
    fleet.engines.a.behave({ promptTokens: 300, tokens: 300 });
  });
  after(() => fleet.close());

  async function reload(next: Record<string, unknown>): Promise<void> {
    const { url, kind } = fleet.engines.a;
    await fleet.gateway.writeConfig({ ...next, backends: [{ id: "a", url, kind }] });
    const answer = await send(`${fleet.url}/admin/api/reload`, {});
    assert.equal(answer.status, 200, answer.text);
  }
  const ask = (tenant: string): Promise<Answer> => openaiChat(fleet.url, {}, by(tenant));

  for (const [name, window] of [
    ["day", "day"],
    ["sliding", "10h"],
  ] as const) {
    it(`keeps what was used of a budget that it changes: ${window}`, TIMEOUT, async () => {
      assert.equal((await ask(name)).status, 200);
      for (const [tokens, status] of [
        [700, 429],
        [50_000, 200],
      ] as const) {
        await reload(config({ ...STEADY, [name]: budget(tokens, window) }));
        const { limit, used } = await budgetOf(fleet, name);
        assert.equal(limit, tokens);
        // A sliding one forgets one or two tokens a second at most.
        const isKept = used <= 600 && used >= (name === "day" ? 600 : 570);
        assert(isKept, `${used} of the 600 that were used`);
        assert.equal((await ask(name)).status, status, `${tokens}`);
      }
    });
  }

  it("keeps what was used when it changes something else", TIMEOUT, async () => {
    await reload(config(STEADY));
    const before = await usedBy(fleet, "day");
    assert(before > 0);
    await reload(config(STEADY, { server: { logLevel: "debug" } }));
    assert.equal(await usedBy(fleet, "day"), before);
    await reload(config(STEADY, { cache: { enabled: false } }));
    assert.equal(await usedBy(fleet, "day"), before, "cache.enabled");
  });

  it("settles what runs, once", TIMEOUT, async () => {
    await reload(config({ ...STEADY, running: budget(5000, "day") }));
    fleet.engines.a.behave({ headersDelayMs: Infinity });
    const answer = ask("running");
    assert(await until(() => fleet.engines.a.activeGenerations() === 1));
    await reload(config({ ...STEADY, running: budget(2000, "day") }));
    const { budgets, inFlight } = await tenantOf(fleet.url, "running");
    assert.equal(inFlight, 1);
    assert((budgets[0]?.reserved ?? 0) > 0, "still reserved");
    fleet.engines.a.release();
    assert.equal((await answer).status, 200);
    assert.equal(await usedBy(fleet, "running"), 600);
  });
});

describe("an error in a stream that is open already", () => {
  it("is a budget's refusal never: it comes before any heartbeat", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: {} },
      {
        ...withKeys({ one: { budgets: [{ tokens: 5, window: "1h" }] } }),
        queue: { heartbeatMs: 1 },
      },
    );
    try {
      const ask = () => openaiChat(fleet.url, { stream: true }, by("one"));
      assert.equal((await ask()).status, 200);
      const answer = await ask();
      checkEnvelope(answer.json()["error"]);
      assert.equal(answer.status, 429);
    } finally {
      await fleet.close();
    }
  });
});
