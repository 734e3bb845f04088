/** A busy engine is no broken one: it is waited for, and nobody is lost on the way (design §4). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { openaiChat, until } from "../support/client.ts";
import { effort } from "../support/effort.ts";
import type { FakeEngine } from "../support/engine.ts";
import { faults } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import type { Got } from "./load.ts";
import { ask } from "./load.ts";

const TIMEOUT = { timeout: 60_000 };
const MANY = { timeout: 300_000 };
const REQUESTS = effort(10_000, 1 / 5);
const LANES = 48;
const model = ["test-model"];

/** So many requests, a few at a time, every other one a stream. */
async function askAll(url: string, count: number, lanes: number): Promise<Got[]> {
  const got: Got[] = [];
  let asked = 0;
  const lane = async (): Promise<void> => {
    while (asked < count) {
      asked += 1;
      got.push(await ask(url, `${asked}`, asked % 2 === 0));
    }
  };
  await Promise.all(Array.from({ length: lanes }, lane));
  return got;
}

/** How many refusals of busy engines the gateway has met. */
function saturated({ gateway }: Pick<Fleet<string>, "gateway">): Promise<number> {
  return gateway.metric("tidegate_attempts_total", { outcome: "saturated" });
}

/** No breaker has moved, and nothing is left running or held. */
async function checkCalm({ gateway }: Pick<Fleet<string>, "gateway">): Promise<void> {
  assert.equal(await gateway.metric("tidegate_attempts_total", { outcome: "failure" }), 0);
  for (const state of ["open", "half_open"]) {
    assert.equal(await gateway.metric("tidegate_breaker_state", { state }), 0);
  }
  for (const gauge of ["tidegate_requests_in_flight", "tidegate_slots_in_use"]) {
    assert.ok(await until(async () => (await gateway.metric(gauge)) === 0), gauge);
  }
  assert.equal(await gateway.metric("tidegate_queue_requests"), 0);
  assert.equal(await gateway.metric("tidegate_held_body_bytes"), 0);
}

/** Users by how often an engine has generated an answer for them; a refused request generates none. */
function servedBy(...engines: FakeEngine[]): Map<string, number> {
  const served = new Map<string, number>();
  for (const request of engines.flatMap((engine) => engine.inference())) {
    if (!request.sent().includes("word0")) continue;
    const user = String(request.json.user);
    served.set(user, (served.get(user) ?? 0) + 1);
  }
  return served;
}

describe("busy: more than the engines take", () => {
  for (const [kind, count] of [
    ["vllm", REQUESTS],
    ["sglang", REQUESTS / 5],
  ] as const) {
    it(`${kind}: ${count} requests, none lost, none answered twice`, MANY, async () => {
      // Each takes four; the gateway believes in twice as many.
      const maxQueued = kind === "vllm" ? 4 : 0;
      const behaviour = { slots: 4, maxQueued, tokens: 2, headersDelayMs: 8 };
      const member = { kind, models: model, behaviour, backend: { concurrency: 8 } };
      const fleet = await startFleet({ a: member, b: member });
      try {
        const { a, b } = fleet.engines;
        const startedAt = performance.now();
        const got = await askAll(fleet.url, count, LANES);
        const seconds = (performance.now() - startedAt) / 1000;
        const lost = got.filter(({ error }) => error !== null);
        assert.deepEqual(lost.slice(0, 3), []);
        assert.equal(got.length, count);
        const served = servedBy(a, b);
        assert.equal(served.size, count);
        assert.ok([...served.values()].every((times) => times === 1));
        const refusals = await saturated(fleet);
        assert.ok(refusals > 0, "they were busy");
        const attempts = got.reduce((sum, each) => sum + each.attempts, 0);
        assert.equal(attempts, count + refusals, "x-tidegate-attempts counts busy refusals");
        assert.equal(a.inference().length + b.inference().length, attempts);
        await checkCalm(fleet);
        const most = Math.max(...got.map((each) => each.attempts));
        console.log(
          `busy ${kind}: ${count} requests in ${seconds.toFixed(1)} s, ${refusals} busy refusals, ` +
            `${(attempts / count).toFixed(2)} attempts per request, at most ${most}, 0 lost`,
        );
      } finally {
        await fleet.close();
      }
    });
  }
});

describe("busy: where the request goes", () => {
  it(
    "to a backend with a free slot, and the busy one is not asked again at once",
    TIMEOUT,
    async () => {
      const backend = { healthInterval: 60_000 };
      const fleet = await startFleet({
        busy: { models: model, backend: { ...backend, weight: 1e6 } },
        free: { models: model, backend },
      });
      try {
        const { busy, free } = fleet.engines;
        busy.behave({ fault: faults.vllmBusy });
        const got = await askAll(fleet.url, 200, 4);
        assert.ok(got.every(({ error, backend: id }) => error === null && id === "free"));
        assert.equal(free.inference().length, 200);
        const asked = busy.inference().length;
        assert.ok(asked >= 1 && asked < 50, `held: ${asked} of 200 requests met the busy one`);
        await checkCalm(fleet);
        console.log(`busy beside free: ${asked} of 200 requests were sent to the busy one first`);
      } finally {
        await fleet.close();
      }
    },
  );

  it("all busy: everybody waits, and is served when one of them frees", TIMEOUT, async () => {
    const backend = { concurrency: 2, healthInterval: 60_000 };
    const fleet = await startFleet({
      a: { models: model, backend },
      b: { models: model, backend },
    });
    const { a, b } = fleet.engines;
    try {
      for (const engine of [a, b]) engine.behave({ fault: faults.busyFor(7), tokens: 2 });
      const answers: Promise<Got>[] = [];
      const users = Array.from({ length: 8 }, (_, index) => `${index}`);
      for (const [index, user] of users.entries()) {
        answers.push(ask(fleet.url, user, index % 2 === 0));
        const isHere = async (): Promise<boolean> =>
          (await fleet.gateway.metric("tidegate_requests_in_flight")) === index + 1;
        assert.ok(await until(isHere), user);
      }
      const isRefused = async (): Promise<boolean> => (await saturated(fleet)) >= 2;
      assert.ok(await until(isRefused), "both said that they are busy");
      const isWaiting = async (): Promise<boolean> =>
        (await fleet.gateway.metric("tidegate_queue_requests")) === users.length;
      assert.ok(await until(isWaiting), "all wait, nobody is refused");
      // Only one frees; each backend has a queue of its own, and who waits at the other comes over.
      a.behave({ fault: null, headersDelayMs: 20 });
      const got = await Promise.all(answers);
      assert.deepEqual(
        got.filter(({ error }) => error !== null),
        [],
      );
      const order = a
        .inference()
        .filter(({ status }) => status === 200)
        .map(({ json }) => Number(json.user));
      assert.equal(new Set(order).size, users.length);
      const attempts = got.reduce((sum, each) => sum + each.attempts, 0);
      assert.equal(attempts, a.inference().length + b.inference().length);
      assert.equal(attempts, users.length + (await saturated(fleet)));
      await checkCalm(fleet);
      console.log(`all busy: served as ${order.join(" ")}, ${attempts} attempts of 8 requests`);
    } finally {
      await fleet.close();
    }
  });

  it("one slot: exactly in order of arrival, however often it was busy", TIMEOUT, async () => {
    const fleet = await startFleet({
      a: { models: model, backend: { concurrency: 1, healthInterval: 60_000 } },
    });
    const { a } = fleet.engines;
    try {
      a.behave({ fault: faults.loadingModel, faultTimes: 2 });
      const users = ["1", "2", "3", "4", "5"];
      const answers: Promise<Got>[] = [];
      for (const [index, user] of users.entries()) {
        answers.push(ask(fleet.url, user, index % 2 === 0));
        const isHere = async (): Promise<boolean> =>
          (await fleet.gateway.metric("tidegate_requests_in_flight")) === index + 1;
        assert.ok(await until(isHere), user);
      }
      const got = await Promise.all(answers);
      assert.deepEqual(
        got.map(({ error, attempts }) => [error, attempts]),
        [
          [null, 3],
          [null, 1],
          [null, 1],
          [null, 1],
          [null, 1],
        ],
      );
      assert.deepEqual(
        a.inference().map(({ json }) => json.user),
        ["1", "1", ...users],
      );
      await checkCalm(fleet);
    } finally {
      await fleet.close();
    }
  });

  it("a completion ends the hold", TIMEOUT, async () => {
    const fleet = await startFleet({
      a: { kind: "vllm", models: model, behaviour: { slots: 1, maxQueued: 1 } },
    });
    const { a } = fleet.engines;
    try {
      a.behave({ headersDelayMs: Infinity });
      const running = ask(fleet.url, "running", false);
      assert.ok(await until(() => a.activeGenerations() === 1));
      const waiting = ask(fleet.url, "waiting", false);
      const isRefused = async (): Promise<boolean> => (await saturated(fleet)) === 1;
      assert.ok(await until(isRefused));
      a.release();
      assert.equal((await running).error, null);
      const endedAt = Date.now();
      assert.deepEqual([(await waiting).error, (await waiting).attempts], [null, 2]);
      const arrivedAt = a.inference().at(-1)?.arrivedAt ?? 0;
      console.log(`hold: next sent ${arrivedAt - endedAt} ms after the completion`);
      await checkCalm(fleet);
    } finally {
      await fleet.close();
    }
  });
});

describe("busy: the end of waiting", () => {
  it("429 with the engine's Retry-After at the wait limit", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { models: model } }, { queue: { maxWaitMs: 1500 } });
    const { a } = fleet.engines;
    try {
      a.behave({ fault: faults.busyFor(7, 503) });
      const answer = await openaiChat(fleet.url);
      expectError(answer, 429, "rate_limit_exceeded");
      assert.equal(answer.headers.get("retry-after"), "7");
      assert.equal(answer.headers.get("x-tidegate-attempts"), "2", "once more after a second");
      assert.equal(a.inference().length, 2);
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.deepEqual([record.status, record.cause], [429, "rate_limit_exceeded"]);
      assert.ok(Number(record.queue_ms) > 0);
      await checkCalm(fleet);
    } finally {
      await fleet.close();
    }
  });

  it("a client that leaves while it waits is not sent again", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { models: model, backend: { healthInterval: 60_000 } } });
    const { a } = fleet.engines;
    try {
      a.behave({ fault: faults.tgiBusy, faultTimes: 1 });
      const leaving = new AbortController();
      const asked = openaiChat(fleet.url, { user: "leaver" }, { signal: leaving.signal });
      const isWaiting = async (): Promise<boolean> =>
        (await fleet.gateway.metric("tidegate_queue_requests")) === 1;
      assert.ok(await until(isWaiting));
      leaving.abort();
      await assert.rejects(asked);
      await fleet.gateway.record(({ ending }) => ending === "cancelled");
      assert.equal((await openaiChat(fleet.url, { user: "next" })).status, 200);
      assert.deepEqual(
        a.inference().map(({ json }) => json.user),
        ["leaver", "next"],
      );
      await checkCalm(fleet);
    } finally {
      await fleet.close();
    }
  });
});
