/** An outage must not double the load: one more attempt, elsewhere, and few of them wait (design §4). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { chatBody, open, until } from "../support/client.ts";
import type { FakeEngine } from "../support/engine.ts";
import type { EngineRequest } from "../support/engine-call.ts";
import { startFleet } from "../support/fleet.ts";
import type { Got } from "./load.ts";
import { ask } from "./load.ts";

const TIMEOUT = { timeout: 60_000 };
const model = ["test-model"];
/** A backend that fails for ever is asked for ever: nothing but the budget bounds the retries. */
const noBreaker = { circuitBreaker: { failureThreshold: 1_000_000 } };
/** An attempt that fails does so after this. */
const FAILS_AFTER_MS = 40;

type Sent = EngineRequest & { engine: string };

/** What the engines got of each request, oldest first. */
function attemptsByUser(engines: Record<string, FakeEngine>): Map<string, Sent[]> {
  const all = Object.entries(engines).flatMap(([engine, fake]) =>
    fake.inference().map((request) => Object.assign(request, { engine })),
  );
  all.sort((one, other) => one.arrivedAt - other.arrivedAt);
  const byUser = new Map<string, Sent[]>();
  for (const request of all) {
    const user = String(request.json.user);
    byUser.set(user, [...(byUser.get(user) ?? []), request]);
  }
  return byUser;
}

/** One more attempt at most, on another backend, and only when the first was over. */
function checkAttempts(engines: Record<string, FakeEngine>, got: readonly Got[]): number {
  const byUser = attemptsByUser(engines);
  let retries = 0;
  for (const { user, attempts } of got) {
    const sent = byUser.get(user) ?? [];
    assert.equal(sent.length, attempts, user);
    assert.ok(sent.length >= 1 && sent.length <= 2, `${user}: ${sent.length} attempts`);
    const [first, second] = sent;
    if (first === undefined || second === undefined) continue;
    retries += 1;
    assert.notEqual(first.engine, second.engine, user);
    assert.equal(first.engine, "broken", "only what failed is sent again");
    // The clock of `arrivedAt` has whole milliseconds, and a timer may fire a little early.
    const between = second.arrivedAt - first.arrivedAt;
    assert.ok(between >= FAILS_AFTER_MS - 3, `${user}: two at the same time (${between} ms)`);
  }
  return retries;
}

describe("retry budget", () => {
  for (const [count, allowed] of [
    [40, 10],
    [200, 40],
  ] as const) {
    it(
      `${count} fail at once and nothing is free: ${allowed} wait, the others learn why`,
      TIMEOUT,
      async () => {
        const backend = { healthInterval: 60_000 };
        const fleet = await startFleet(
          {
            broken: { models: model, backend: { ...backend, concurrency: 1000 } },
            full: { models: [...model, "holder"], backend: { ...backend, concurrency: 1 } },
          },
          { ...noBreaker, queue: { maxLength: 1000 } },
        );
        const { broken, full } = fleet.engines;
        try {
          broken.behave({ headersDelayMs: FAILS_AFTER_MS, fault: { kind: "drop", by: "reset" } });
          full.behaveFor("holder", { stallAfterTokens: 1 });
          const leaving = new AbortController();
          const body = chatBody({ model: "holder", stream: true, user: "holder" });
          const init = { signal: leaving.signal };
          const holder = await open(`${fleet.url}/v1/chat/completions`, body, init);
          assert.equal(full.activeGenerations(), 1);
          // The holder is a request as well.
          const asked = Array.from({ length: count - 1 }, (_, index) =>
            ask(fleet.url, `${index}`, index % 2 === 0),
          );
          const isOver = async (): Promise<boolean> =>
            (await fleet.gateway.metric("tidegate_requests_in_flight")) === allowed + 1;
          assert.ok(await until(isOver), "the others have been told");
          assert.equal(await fleet.gateway.metric("tidegate_queue_requests"), allowed);
          assert.equal(broken.inference().length, count - 1);
          assert.equal(full.inference().length, 1, "nobody has got there yet");
          leaving.abort();
          await holder.text().catch(() => {});
          const got = await Promise.all(asked);
          const served = got.filter(({ error }) => error === null);
          assert.equal(served.length, allowed);
          assert.ok(served.every(({ backend: id, attempts }) => id === "full" && attempts === 2));
          const told = got.filter(({ error }) => error !== null);
          assert.ok(
            told.every(({ status, error }) => status === 502 && error === "upstream_unreachable"),
          );
          assert.ok(told.every(({ attempts }) => attempts === 1));
          assert.equal(checkAttempts(fleet.engines, got), allowed);
          console.log(
            `${count} requests: ${served.length} waited for a second attempt and were served, ` +
              `${told.length} got 502 at once`,
          );
        } finally {
          await fleet.close();
        }
      },
    );
  }

  it("a retry into a free slot is always allowed", TIMEOUT, async () => {
    const backend = { healthInterval: 60_000, concurrency: 1000 };
    const fleet = await startFleet(
      {
        broken: { models: model, backend: { ...backend, weight: 1e6 } },
        free: { models: model, backend },
      },
      noBreaker,
    );
    try {
      const { broken } = fleet.engines;
      broken.behave({ headersDelayMs: FAILS_AFTER_MS, fault: { kind: "drop", by: "reset" } });
      const got = await Promise.all(
        Array.from({ length: 150 }, (_, index) => ask(fleet.url, `${index}`, index % 2 === 0)),
      );
      assert.ok(got.every(({ error, backend: id }) => error === null && id === "free"));
      // One or the other goes to the idle backend at first.
      assert.ok(checkAttempts(fleet.engines, got) > 140);
    } finally {
      await fleet.close();
    }
  });

  it(
    "an outage under load that has to wait: the load on the others stays bounded",
    TIMEOUT,
    async () => {
      const backend = { healthInterval: 60_000, concurrency: 2 };
      const behaviour = { headersDelayMs: 15, tokens: 2 };
      const fleet = await startFleet(
        {
          broken: { models: model, backend: { ...backend, concurrency: 8 } },
          b: { models: model, backend, behaviour },
          c: { models: model, backend, behaviour },
        },
        noBreaker,
      );
      try {
        const { broken, b, c } = fleet.engines;
        broken.behave({ headersDelayMs: FAILS_AFTER_MS, fault: { kind: "drop", by: "reset" } });
        const got: Got[] = [];
        let asked = 0;
        const total = 600;
        const lane = async (): Promise<void> => {
          while (asked < total) {
            asked += 1;
            got.push(await ask(fleet.url, `${asked}`, asked % 2 === 0));
          }
        };
        await Promise.all(Array.from({ length: 32 }, lane));
        const retries = checkAttempts(fleet.engines, got);
        const failed = got.filter(({ error }) => error !== null);
        assert.ok(failed.every(({ error }) => error === "upstream_unreachable"));
        const served = got.length - failed.length;
        assert.equal(
          b.inference().length + c.inference().length,
          served,
          "nobody is sent for nothing",
        );
        const outOf = broken.inference().length;
        assert.equal(failed.length + retries, outOf, "every failure was sent again or told");
        const counted = await fleet.gateway.metric("tidegate_retries_total", {
          backend_id: "broken",
        });
        assert.equal(counted, retries);
        console.log(
          `outage: ${total} requests, ${outOf} failed once, ${retries} sent again, ` +
            `${failed.length} told at once; ${served} served`,
        );
        assert.equal(await fleet.gateway.metric("tidegate_slots_in_use"), 0);
        assert.equal(await fleet.gateway.metric("tidegate_queue_requests"), 0);
      } finally {
        await fleet.close();
      }
    },
  );
});
