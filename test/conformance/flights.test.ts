/** Identical deterministic requests in the air share one generation (design §3, a flight). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, Init } from "../support/client.ts";
import {
  chatBody,
  connect,
  openaiChat,
  postBytes,
  seeded,
  sleep,
  until,
} from "../support/client.ts";
import { QUIET, cacheOf, inFlight, recordOf, sureChat } from "../support/deterministic.ts";
import type { Behaviour } from "../support/engine-behaviour.ts";
import { faults as known } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import { GC_PRELOAD } from "../support/gateway.ts";
import { isQuiet } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };
const FOR_EVER = Number.POSITIVE_INFINITY;

/** One that may leave: its answer is null then. */
interface Member {
  answer: Promise<Answer | null>;
  leave: () => void;
}

const all: Member[] = [];

function ask(url: string, body: Record<string, unknown>, headers: Init["headers"] = {}): Member {
  const leaving = new AbortController();
  const answer = openaiChat(url, body, { headers, signal: leaving.signal }).catch(() => null);
  const member = { answer, leave: () => leaving.abort() };
  all.push(member);
  return member;
}

/** Everything as at the start; a test that fails leaves nobody behind. */
async function clear(fleet: Fleet<string>): Promise<void> {
  const engines = Object.values(fleet.engines);
  for (const { leave } of all.splice(0)) leave();
  for (const engine of engines) engine.thaw();
  await inFlight(fleet.gateway, 0);
  await until(() => engines.every((engine) => engine.openConnections() === 0));
  fleet.reset();
}

/** So many that ask for the same; all are in the house, the first one first. */
async function gather({ gateway, url }: Fleet<string>, body: Record<string, unknown>, count = 5) {
  const members: Member[] = [];
  for (let at = 0; at < count; at++) {
    members.push(ask(url, body));
    if (at === 0) assert.ok(await inFlight(gateway, 1));
  }
  assert.ok(await inFlight(gateway, count));
  return members;
}

async function answersOf(members: readonly Member[]): Promise<Answer[]> {
  const answers = await Promise.all(members.map(({ answer }) => answer));
  return answers.map((answer) => {
    assert.ok(answer !== null);
    return answer;
  });
}

describe("flights", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet({ a: { backend: QUIET } });
  });
  afterEach(() => clear(fleet));
  after(() => fleet.close());

  it("50 who ask for the same at once: one generation", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    const tokens = () => gateway.metric("tidegate_tokens_total");
    const lookups = (result: string) => gateway.metric("tidegate_cache_lookups_total", { result });
    const before = [await tokens(), await lookups("miss"), await lookups("joined")];
    a.behave({ promptTokens: 7, tokens: 5 });
    a.freeze();
    const members = await gather(fleet, sureChat("fifty"), 50);
    assert.equal(await gateway.metric("tidegate_slots_in_use"), 1);
    a.thaw();
    const answers = await answersOf(members);
    assert.equal(a.inference().length, 1);
    const results = answers.map(cacheOf);
    assert.equal(results[0], "miss");
    assert.deepEqual(new Set(results.slice(1)), new Set(["joined"]));
    const sent = a.inference()[0]?.sent() ?? Buffer.alloc(0);
    assert.equal(sent.length > 0, true);
    for (const { body } of answers) assert.deepEqual(body, sent);
    const ids = new Set(answers.map(({ headers }) => headers.get("x-request-id")));
    assert.equal(ids.size, 50);

    for (const answer of answers) {
      const record = await recordOf(gateway, answer);
      const { cache, cache_hit, tokens_input, tokens_generated, tokens_estimated } = record;
      const { attempts, backend_id, status, ending, cause, model } = record;
      const isFirst = cache === "miss";
      assert.deepEqual([tokens_input, tokens_generated], isFirst ? [7, 5] : [null, null]);
      assert.deepEqual([cache_hit, tokens_estimated, attempts], [false, false, isFirst ? 1 : 0]);
      assert.equal(answer.headers.get("x-tidegate-attempts"), String(attempts));
      assert.deepEqual([backend_id, model], ["a", "test-model"]);
      assert.equal(answer.headers.get("x-tidegate-backend"), "a");
      assert.deepEqual([status, ending, cause], [200, "completed", null]);
    }
    const lines = gateway.records().filter(({ request_id }) => ids.has(request_id as string));
    assert.equal(lines.length, 50, "one line each");
    assert.equal(await gateway.metric("tidegate_requests_total"), 50);
    assert.equal(await gateway.metric("tidegate_attempts_total"), 1);
    const after = [await tokens(), await lookups("miss"), await lookups("joined")];
    assert.deepEqual(
      after.map((value, at) => value - (before[at] ?? 0)),
      [12, 1, 49],
    );
    const { text } = answers[1] as Answer;
    const again = await openaiChat(fleet.url, sureChat("fifty"));
    assert.equal(cacheOf(again), "hit");
    assert.equal(again.text, text);
    assert.equal(again.headers.get("x-tidegate-backend"), null);
    assert.match(again.headers.get("age") ?? "", /^\d+$/);
    const hit = await recordOf(gateway, again);
    assert.deepEqual(
      [hit.cache, hit.cache_hit, hit.backend_id, hit.attempts, hit.tokens_generated],
      ["hit", true, null, 0, null],
    );
    assert.equal(a.inference().length, 1);
    assert.equal(await tokens(), after[0]);
    await isQuiet(gateway);
  });

  for (const [who, leavers] of [
    ["the first", [0]],
    ["some", [1, 3]],
    ["all but the last", [0, 1, 2, 3]],
  ] as const) {
    it(`${who} may leave: the others get the answer`, TIMEOUT, async () => {
      const { gateway, engines } = fleet;
      const { a } = engines;
      a.freeze();
      const known = gateway.records().length;
      const members = await gather(fleet, sureChat(`left by ${who}`));
      for (const at of leavers) members[at]?.leave();
      assert.ok(await inFlight(gateway, members.length - leavers.length));
      const gone = gateway.records().slice(known);
      assert.equal(gone.length, leavers.length);
      for (const record of gone) {
        const { status, ending, cause, backend_id } = record;
        assert.deepEqual([status, ending, cause], [499, "cancelled", "connecting"]);
        assert.equal(backend_id, "a", "where it was");
      }
      a.thaw();
      const stayed = members.filter((_, at) => !(leavers as readonly number[]).includes(at));
      for (const answer of await answersOf(stayed)) {
        assert.deepEqual(answer.body, a.inference()[0]?.sent());
        assert.equal((await recordOf(gateway, answer)).ending, "completed");
      }
      assert.equal(a.inference().length, 1);
      assert.equal(a.inference()[0]?.closedByClient, false);
      const told = gateway.records().slice(known);
      const attempts = told.reduce((sum, record) => sum + Number(record.attempts), 0);
      assert.equal(attempts, 1, "one of them has it in its record");
      assert.equal(cacheOf(await openaiChat(fleet.url, sureChat(`left by ${who}`))), "hit");
      await isQuiet(gateway);
    });
  }

  for (const how of ["reset", "fin", "close"] as const) {
    it(`all leave (${how}): the engine is stopped`, TIMEOUT, async () => {
      const { gateway, engines } = fleet;
      const { a } = engines;
      a.behave({ headersDelayMs: FOR_EVER });
      const body = sureChat(`all left by ${how}`);
      const known = gateway.records().length;
      const clients = await Promise.all([1, 2, 3].map(() => connect(gateway.port)));
      for (const client of clients) client.write(postBytes("/v1/chat/completions", body));
      assert.ok(await inFlight(gateway, 3));
      assert.ok(await until(() => a.activeGenerations() === 1));
      for (const [at, client] of clients.entries()) {
        assert.equal(a.inference()[0]?.closedByClient, false);
        client.leave(how);
        assert.ok(await inFlight(gateway, 2 - at));
      }
      assert.ok(await until(() => a.inference()[0]?.closedByClient === true));
      assert.equal(a.inference().length, 1);
      await isQuiet(gateway);
      const told = gateway.records().slice(known);
      assert.deepEqual(
        told.map(({ ending }) => ending),
        ["cancelled", "cancelled", "cancelled"],
      );
      assert.equal(
        told.reduce((sum, { attempts }) => sum + Number(attempts), 0),
        1,
      );
      a.behave({ headersDelayMs: 0 });
      assert.equal(cacheOf(await openaiChat(fleet.url, body)), "miss", "nothing of it is kept");
    });
  }

  it("the flight has the body: the first one may leave before it is sent", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    engines.a.freeze();
    const body = sureChat("x".repeat(200_000));
    const bytes = Buffer.byteLength(JSON.stringify(body));
    const isHeld = () =>
      until(async () => (await gateway.metric("tidegate_held_body_bytes")) === 2 * bytes);
    const [first, second] = await gather(fleet, body, 2);
    assert.ok(await isHeld(), "each body once");
    first?.leave();
    assert.ok(await inFlight(gateway, 1));
    assert.ok(await isHeld(), "the flight's and the second one's");
    engines.a.thaw();
    assert.equal((await second?.answer)?.status, 200);
    assert.equal(engines.a.inference()[0]?.body, JSON.stringify(body));
    await isQuiet(gateway);
  });

  it("a deadline of one's own ends only one's own waiting", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    for (const hasty of [0, 1]) {
      const body = sureChat(`number ${hasty} is in a hurry`);
      a.freeze();
      const members: Member[] = [];
      for (const at of [0, 1, 2]) {
        members.push(ask(fleet.url, body, at === hasty ? { "x-stainless-timeout": "0.3" } : {}));
        assert.ok(await inFlight(gateway, at + 1));
      }
      const late = await members[hasty]?.answer;
      assert.ok(late);
      expectError(late, 504, "upstream_timeout");
      const cache = hasty === 0 ? "miss" : "joined";
      assert.equal(late.headers.get("x-tidegate-cache"), cache);
      assert.equal(late.headers.get("x-tidegate-backend"), "a");
      const record = await recordOf(gateway, late);
      assert.deepEqual(
        [record.status, record.ending, record.cause, record.cache],
        [504, "failed", "upstream_timeout", cache],
      );
      a.thaw();
      const rest = await answersOf(members.filter((_, at) => at !== hasty));
      for (const answer of rest) assert.equal(answer.status, 200);
      await isQuiet(gateway);
    }
    assert.equal(a.inference().length, 2);
  });

  it("an engine that fails fails all alike, and nothing is kept", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    const faults = [
      [
        { kind: "answer", status: 500, body: { error: { message: "boom" } } },
        502,
        "upstream_error",
      ],
      [{ kind: "drop", by: "reset" }, 502, "upstream_unreachable"],
      [{ kind: "cut", by: "fin" }, 502, "upstream_incomplete"],
      [{ kind: "answer", status: 200, body: "no JSON" }, 502, "upstream_invalid_response"],
      [known.vllmContext, 400, "context_length_exceeded"],
    ] as const;
    for (const [at, [fault, status, code]] of faults.entries()) {
      const body = sureChat(`failing ${at}`);
      const before = a.inference().length;
      a.behave({ headersDelayMs: Infinity, fault });
      const members = await gather(fleet, body, 4);
      a.release();
      const answers = await answersOf(members);
      const errors = answers.map((answer) => expectError(answer, status, code));
      assert.equal(new Set(errors.map(({ message }) => message)).size, 1);
      assert.deepEqual(
        answers.map(({ headers }) => headers.get("x-tidegate-cache")),
        ["miss", "joined", "joined", "joined"],
      );
      for (const answer of answers) {
        const record = await recordOf(gateway, answer);
        assert.deepEqual([record.status, record.ending, record.cause], [status, "failed", code]);
        assert.equal(record.backend_id, "a");
      }
      assert.equal(a.inference().length, before + 1);
      await isQuiet(gateway);
      a.behave({ headersDelayMs: 0, fault: null });
      assert.equal(cacheOf(await openaiChat(fleet.url, body)), "miss");
      assert.equal(cacheOf(await openaiChat(fleet.url, body)), "hit");
    }
  });

  it("who insists on a new answer shares nothing", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    a.freeze();
    const body = sureChat("anew");
    const [first] = await gather(fleet, body, 1);
    const anew = ask(fleet.url, body, { "cache-control": "no-cache" });
    assert.ok(await inFlight(gateway, 2));
    const third = ask(fleet.url, body);
    assert.ok(await inFlight(gateway, 3));
    // Nobody waits for an answer to be there already.
    const only = await openaiChat(fleet.url, body, {
      headers: { "cache-control": "only-if-cached" },
    });
    expectError(only, 504, "not_cached");
    a.thaw();
    const answers = await answersOf([first, anew, third] as Member[]);
    assert.deepEqual(answers.map(cacheOf), ["miss", "miss", "joined"]);
    assert.equal(a.inference().length, 2);
    await isQuiet(gateway);
  });

  it("waits for what is as young as it asks for only", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    engines.a.freeze();
    const body = sureChat("young");
    const young = { "cache-control": "max-age=30" };
    const members = [ask(fleet.url, body), ask(fleet.url, body, young)];
    assert.ok(await inFlight(gateway, 2));
    members.push(ask(fleet.url, body, young));
    assert.ok(await inFlight(gateway, 3));
    engines.a.thaw();
    const results = (await answersOf(members)).map(cacheOf);
    assert.equal(results.at(-1), "joined");
    assert.ok(engines.a.inference().length <= 2);
    await isQuiet(gateway);
  });

  it("an engine that is too slow for all has failed, as it had for one", TIMEOUT, async () => {
    const own = await startFleet({ a: { backend: QUIET } }, { timeouts: { totalMs: 250 } });
    try {
      const { gateway, url, engines } = own;
      engines.a.behave({ headersDelayMs: FOR_EVER });
      const failures = () => gateway.metric("tidegate_attempts_total", { outcome: "failure" });
      expectError(await openaiChat(url), 504, "upstream_timeout");
      assert.equal(await failures(), 1);
      for (const answer of await Promise.all([1, 2].map(() => openaiChat(url, sureChat("slow"))))) {
        expectError(answer, 504, "upstream_timeout");
        assert.equal(answer.headers.get("x-tidegate-backend"), "a");
      }
      assert.equal(engines.a.inference().length, 2);
      assert.equal(await failures(), 2);
      await isQuiet(gateway);
    } finally {
      await own.close();
    }
  });

  it("ends with the gateway", TIMEOUT, async () => {
    const own = await startFleet({ a: { backend: QUIET } }, { drain: { graceMs: 100 } });
    try {
      own.engines.a.behave({ headersDelayMs: FOR_EVER });
      const members = await gather(own, sureChat("the end"), 3);
      own.gateway.kill("SIGTERM");
      for (const answer of await answersOf(members)) expectError(answer, 503, "shutting_down");
      assert.equal(await own.gateway.exited, 1);
      assert.ok(await until(() => own.engines.a.inference()[0]?.closedByClient === true));
    } finally {
      await own.close();
    }
  });
});

describe("flights: what another backend can mend", () => {
  it("is mended for all", TIMEOUT, async () => {
    const fleet = await startFleet({
      bad: { backend: { ...QUIET, weight: 1e6 } },
      good: { backend: QUIET },
    });
    try {
      const { bad, good } = fleet.engines;
      bad.behave({ headersDelayMs: Infinity, fault: { kind: "drop", by: "reset" } });
      const members = await gather(fleet, sureChat("mended"), 6);
      bad.release();
      const answers = await answersOf(members);
      for (const answer of answers) {
        assert.deepEqual(answer.body, good.inference()[0]?.sent());
        assert.equal(answer.headers.get("x-tidegate-backend"), "good");
        assert.equal(answer.headers.get("x-tidegate-reason"), "retry");
        assert.equal((await recordOf(fleet.gateway, answer)).reason, "retry");
      }
      assert.deepEqual([bad.inference().length, good.inference().length], [1, 1]);
      assert.deepEqual(
        answers.map(({ headers }) => headers.get("x-tidegate-attempts")),
        ["2", "0", "0", "0", "0", "0"],
      );
      assert.equal(await fleet.gateway.metric("tidegate_retries_total"), 1);
      await isQuiet(fleet.gateway);
    } finally {
      await fleet.close();
    }
  });
});

describe("flights in the queue", () => {
  let fleet: Fleet<"a">;
  const key = { authorization: "Bearer k" };
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { ...QUIET, concurrency: 1 } } },
      {
        auth: { keys: [{ key: "k", tenant: "t" }] },
        tenants: { t: { priority: "interactive" } },
      },
    );
  });
  afterEach(() => clear(fleet));
  after(() => fleet.close());

  const isQueued = (count: number): Promise<boolean> =>
    until(async () => (await fleet.gateway.metric("tidegate_queue_requests")) === count);
  /** Holds the only slot until the engine thaws. */
  async function block(): Promise<Member> {
    fleet.engines.a.freeze();
    const blocker = ask(fleet.url, chatBody({ user: "blocker" }), key);
    assert.ok(await inFlight(fleet.gateway, 1));
    return blocker;
  }

  for (const joins of [false, true]) {
    it(joins ? "is lifted by who joins it" : "waits as its leader would", TIMEOUT, async () => {
      const { gateway, url, engines } = fleet;
      const members = [await block()];
      const body = sureChat(`batch ${joins}`, { user: "shared" });
      members.push(ask(url, body, { ...key, "x-tidegate-priority": "batch" }));
      assert.ok(await isQueued(1));
      for (const [at, user] of ["first", "second"].entries()) {
        const headers = { ...key, "x-tidegate-priority": "default" };
        members.push(ask(url, chatBody({ user }), headers));
        assert.ok(await isQueued(2 + at));
      }
      if (joins) {
        members.push(ask(url, body, key));
        assert.ok(await inFlight(gateway, 5));
        assert.ok(await isQueued(3), "one place in the queue");
      }
      engines.a.thaw();
      for (const { status } of await answersOf(members)) assert.equal(status, 200);
      assert.deepEqual(
        engines.a.inference().map(({ json }) => json.user),
        ["blocker", ...(joins ? ["shared", "first", "second"] : ["first", "second", "shared"])],
      );
      await isQuiet(gateway);
    });
  }

  it("waits as long as the most patient of all", TIMEOUT, async () => {
    const { gateway, url, engines } = fleet;
    const blocker = await block();
    const body = sureChat("patience");
    const hasty = ask(url, body, { ...key, "x-stainless-timeout": "0.4" });
    assert.ok(await isQueued(1));
    const patient = ask(url, body, key);
    assert.ok(await inFlight(gateway, 3));
    const late = await hasty.answer;
    assert.ok(late !== null && [429, 504].includes(late.status), `${late?.text}`);
    await sleep(100);
    assert.ok(await isQueued(1));
    engines.a.thaw();
    assert.equal((await blocker.answer)?.status, 200);
    assert.equal((await patient.answer)?.status, 200);
    await isQuiet(gateway);
  });

  it("is not shared by who has a use for an early first token only", TIMEOUT, async () => {
    const { gateway, url, engines } = fleet;
    const blocker = await block();
    const body = sureChat("in time");
    const soon = ask(url, body, { ...key, "x-slo-ttft-ms": "300" });
    const patient = ask(url, body, key);
    const late = await soon.answer;
    expectError(late as Answer, 429, "rate_limit_exceeded");
    assert.match((late as Answer).text, /x-slo-ttft-ms/);
    assert.ok(await isQueued(1));
    engines.a.thaw();
    assert.equal((await blocker.answer)?.status, 200);
    const served = await patient.answer;
    assert.equal(served?.status, 200, served?.text ?? "");
    await isQuiet(gateway);
  });

  it("leaves the queue with the last who waits", TIMEOUT, async () => {
    const { gateway, url, engines } = fleet;
    const blocker = await block();
    const body = sureChat("queued and left");
    const members = [ask(url, body, key)];
    assert.ok(await isQueued(1));
    members.push(ask(url, body, key));
    assert.ok(await inFlight(gateway, 3));
    members[0]?.leave();
    assert.ok(await inFlight(gateway, 2));
    assert.ok(await isQueued(1));
    members[1]?.leave();
    assert.ok(await isQueued(0));
    const gone = gateway.records().slice(-2);
    for (const record of gone) {
      const { ending, cause, attempts } = record;
      assert.deepEqual([ending, cause, attempts], ["cancelled", "queued", 0]);
    }
    engines.a.thaw();
    assert.equal((await blocker.answer)?.status, 200);
    assert.equal(engines.a.inference().length, 1);
    await isQuiet(gateway);
  });
});

describe("flights whose answer is too large to hold", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet({ a: { backend: QUIET } }, { limits: { bufferBytes: 2000 } });
  });
  afterEach(() => clear(fleet));
  after(() => fleet.close());

  const large = { tokens: ["x".repeat(50_000)] };

  function expectLarge({ status, json, text }: Answer): void {
    assert.equal(status, 200, text);
    const { choices } = json() as { choices: { message: { content: string } }[] };
    assert.equal(choices[0]?.message.content.length, 50_000);
  }

  it("one gets it as it comes, the others ask for themselves", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    a.behave(large);
    a.freeze();
    const members = await gather(fleet, sureChat("large"), 4);
    a.thaw();
    const answers = await answersOf(members);
    answers.forEach(expectLarge);
    const alone = "bypass;reason=size";
    assert.deepEqual(answers.map(cacheOf), [alone, alone, alone, alone]);
    assert.equal(a.inference().length, 4);
    for (const answer of answers) {
      const record = await recordOf(gateway, answer);
      assert.deepEqual([record.status, record.ending, record.attempts], [200, "completed", 1]);
      assert.equal(record.backend_id, "a");
    }
    await isQuiet(gateway);
    assert.equal(cacheOf(await openaiChat(fleet.url, sureChat("large"))), alone, "not kept");
  });

  it("who gets it may be another than the first", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    a.behave(large);
    a.freeze();
    const [first, second] = await gather(fleet, sureChat("large, left"), 2);
    first?.leave();
    assert.ok(await inFlight(gateway, 1));
    a.thaw();
    const answer = await second?.answer;
    assert.ok(answer);
    expectLarge(answer);
    const record = await recordOf(gateway, answer);
    assert.equal(answer.headers.get("x-tidegate-attempts"), "1");
    assert.deepEqual([record.attempts, record.cache, record.ending], [1, "joined", "completed"]);
    assert.equal(a.inference().length, 1);
    await isQuiet(gateway);
  });

  it("stops the engine when who gets it leaves, and nobody else", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    const { a } = engines;
    a.behave({ ...large, wholePauseMs: 4000 });
    const body = sureChat("large and left");
    a.freeze();
    const client = await connect(gateway.port);
    client.write(postBytes("/v1/chat/completions", body));
    assert.ok(await inFlight(gateway, 1));
    const other = ask(fleet.url, body);
    assert.ok(await inFlight(gateway, 2));
    a.thaw();
    assert.ok(await until(() => client.status() === 200));
    assert.equal(client.header("x-tidegate-cache"), "bypass;reason=size");
    // The next one begins a flight of its own.
    const next = ask(fleet.url, body);
    assert.ok(await until(() => a.activeGenerations() === 3));
    // What is on its way cannot be sent again: nothing of it is held.
    const held = (): Promise<number> => gateway.metric("tidegate_held_body_bytes");
    assert.ok(await until(async () => (await held()) === 0));
    client.leave("reset");
    assert.ok(await until(() => a.inference()[0]?.closedByClient === true));
    const answers = await answersOf([other, next]);
    answers.forEach(expectLarge);
    assert.deepEqual(answers.map(cacheOf), ["bypass;reason=size", "bypass;reason=size"]);
    await isQuiet(gateway);
    const record = await gateway.record(client.header("x-request-id") ?? "");
    assert.deepEqual(
      [record.ending, record.status, record.cause, record.cache],
      ["cancelled", 200, "streaming", "bypass;reason=size"],
    );
  });

  it("breaks off where the engine does", TIMEOUT, async () => {
    const { gateway, engines } = fleet;
    engines.a.behave({ ...large, fault: { kind: "cut", afterBytes: 30_000, by: "reset" } });
    const client = await connect(gateway.port);
    client.write(postBytes("/v1/chat/completions", sureChat("large and cut")));
    await client.closed;
    assert.equal(client.status(), 200);
    assert.equal(client.body(), null, "not whole");
    const record = await gateway.record(client.header("x-request-id") ?? "");
    assert.deepEqual([record.ending, record.cause], ["failed", "upstream_incomplete"]);
    await isQuiet(gateway);
  });
});

describe("flights, whatever happens", () => {
  const random = seeded("flights");
  const REQUESTS = 250;

  it("leave nothing behind, and records that add up", { timeout: 60_000 }, async () => {
    const fleet = await startFleet(
      {
        a: { backend: { ...QUIET, concurrency: 3 } },
        b: { backend: { ...QUIET, concurrency: 2 } },
      },
      {
        limits: { bufferBytes: 2000 },
        cache: { ttlMs: 150 },
        circuitBreaker: { failureThreshold: 1_000_000 },
        queue: { maxWaitMs: 500 },
        auth: { keys: [{ key: "k", tenant: "t" }] },
        tenants: { t: { priority: "interactive" } },
      },
      { preload: GC_PRELOAD },
    );
    const { gateway, url, engines } = fleet;
    const moods: Partial<Behaviour>[] = [
      { headersDelayMs: 20 },
      { headersDelayMs: 60 },
      { headersDelayMs: 20, tokens: ["x".repeat(9000)], wholePauseMs: 30 },
      { headersDelayMs: 10, fault: { kind: "drop", by: "reset" } },
      { headersDelayMs: 10, fault: known.ollamaLoadFailed },
      { headersDelayMs: 10, fault: known.busyFor(1) },
    ];
    try {
      const answers: Promise<Answer | null>[] = [];
      for (let at = 0; at < REQUESTS; at++) {
        if (at % 10 === 0) {
          for (const engine of Object.values(engines)) {
            engine.reset();
            engine.behave(random.pick(moods));
          }
        }
        const headers: Record<string, string> = { authorization: "Bearer k" };
        headers["x-tidegate-priority"] = random.pick(["interactive", "default", "batch"]);
        if (random.next() < 0.1) headers["cache-control"] = random.pick(["no-cache", "max-age=0"]);
        if (random.next() < 0.2) headers["x-stainless-timeout"] = String(random.next() / 10);
        const member = ask(url, sureChat(`whatever ${random.between(0, 3)}`), headers);
        answers.push(member.answer);
        if (random.next() < 0.4) setTimeout(member.leave, random.between(3, 90));
        await sleep(random.between(0, 12));
      }
      const done = await Promise.all(answers);
      await isQuiet(gateway);
      for (const answer of done) {
        if (answer?.status !== 200) continue;
        assert.equal(typeof answer.json(), "object", "whole");
        const record = await recordOf(gateway, answer);
        assert.equal(record.status, 200);
        assert.equal(record.cache, answer.headers.get("x-tidegate-cache"));
        assert.equal(String(record.attempts), answer.headers.get("x-tidegate-attempts") ?? "0");
      }
      const records = gateway.records();
      const sum = (name: string) =>
        records.reduce((total, record) => total + Number(record[name] ?? 0), 0);
      assert.equal(new Set(records.map(({ request_id }) => request_id)).size, records.length);
      assert.equal(records.length, await gateway.metric("tidegate_requests_total"));
      // Some have left before the gateway has read what they want.
      assert.ok(records.length <= REQUESTS && records.length > REQUESTS / 2, `${records.length}`);
      assert.equal(sum("attempts"), await gateway.metric("tidegate_attempts_total"));
      const tokens = await gateway.metric("tidegate_tokens_total");
      assert.equal(sum("tokens_input") + sum("tokens_generated"), tokens);
      const kinds = new Set(records.map(({ cache }) => cache));
      for (const kind of ["miss", "joined"]) assert.ok(kinds.has(kind), kind);
      assert.ok(
        await until(() => Object.values(engines).every((e) => e.activeGenerations() === 0)),
      );
    } finally {
      await fleet.close();
    }
  });
});
