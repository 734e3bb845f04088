/** What whoever waits is told, and who is refused rather than kept waiting in vain (design §4, contract §3). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { chatBody, open, openaiChat, readEvents, send, until } from "../support/client.ts";
import type { Answer, Init } from "../support/client.ts";
import { expectError, startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
/** Nothing probes, and nothing but the requests of a test runs. */
const ONE_SLOT = { concurrency: 1, healthInterval: 600_000 };

async function withOne(
  config: Record<string, unknown>,
  work: (fleet: Fleet<"a">) => Promise<void>,
): Promise<void> {
  const fleet = await startFleet({ a: { backend: ONE_SLOT } }, config);
  try {
    await work(fleet);
  } finally {
    await fleet.close();
  }
}

/** Takes the slot for as long as the test wants; then frees it. */
async function hold({ engines: { a }, url }: Fleet<"a">): Promise<() => Promise<void>> {
  const seen = a.inference().length;
  a.behave({ headersDelayMs: 60_000 });
  const leaving = new AbortController();
  const held = openaiChat(url, { user: "holder" }, { signal: leaving.signal }).catch(() => {});
  assert.ok(await until(() => a.inference().length > seen && a.activeGenerations() === 1, 5000));
  a.behave({ headersDelayMs: 0 });
  return async () => {
    leaving.abort();
    await held;
  };
}

async function waiting({ gateway }: Fleet<"a">, count: number): Promise<void> {
  const queued = () => gateway.metric("tidegate_queue_requests");
  assert.ok(await until(async () => (await queued()) === count, 5000), `${await queued()} wait`);
}

interface Queued {
  position: number;
  etaMs: number;
}

async function queueOf({ url }: Fleet<"a">): Promise<Queued[]> {
  const report = (await send(`${url}/admin/api/queue`)).json() as { requests: Queued[] };
  return report.requests.toSorted((one, other) => one.position - other.position);
}

const retryAfterMs = ({ headers }: Answer) => Number(headers.get("retry-after-ms"));

/** @returns once it has been refused, with the slot still taken. */
async function refused(fleet: Fleet<"a">, init: Init = {}, body = {}): Promise<Answer> {
  const answer = await openaiChat(fleet.url, body, init);
  expectError(answer, 429, "rate_limit_exceeded");
  assert.ok(retryAfterMs(answer) > 0);
  const seconds = Math.max(1, Math.ceil(retryAfterMs(answer) / 1000));
  assert.equal(Number(answer.headers.get("retry-after")), seconds);
  const isLong = retryAfterMs(answer) > 60_000;
  assert.equal(answer.headers.get("x-should-retry"), isLong ? "false" : null);
  return answer;
}

describe("whoever waits", () => {
  it(
    "is told when it will start, sooner and sooner, in the queue and in heartbeats",
    TIMEOUT,
    async () => {
      await withOne({ queue: { heartbeatMs: 40 } }, async (fleet) => {
        const { a } = fleet.engines;
        a.behave({ headersDelayMs: 600 });
        await openaiChat(fleet.url);
        const first = openaiChat(fleet.url);
        await until(() => a.inference().length === 2);
        const path = `${fleet.url}/v1/chat/completions`;
        const streams = [];
        for (const count of [1, 2]) {
          streams.push(await open(path, chatBody({ stream: true })));
          await waiting(fleet, count);
        }
        const [next, last] = await queueOf(fleet);
        assert.ok(next !== undefined && last !== undefined);
        // One service lies between them.
        assert.ok(next.etaMs > 0 && last.etaMs >= next.etaMs + 500, JSON.stringify([next, last]));
        const told = await Promise.all(
          streams.map(async (stream) => {
            const etas: number[] = [];
            for await (const { comment } of readEvents(stream)) {
              const beat = /^tidegate (\{"position".*)/.exec(comment ?? "")?.[1];
              // Once it has its slot there is nothing to tell.
              const { position = null, etaMs } = JSON.parse(beat ?? "{}") as Partial<Queued>;
              if (position !== null) etas.push(etaMs ?? Number.NaN);
            }
            return etas;
          }),
        );
        await first;
        for (const etas of told) {
          assert.ok(etas.length > 2, JSON.stringify(told));
          for (const eta of etas)
            assert.ok(Number.isInteger(eta) && eta >= 0, JSON.stringify(etas));
          assert.ok((etas.at(-1) as number) < (etas[0] as number), JSON.stringify(etas));
        }
        assert.deepEqual(await queueOf(fleet), []);
        const text = (await send(`${fleet.url}/metrics`)).text;
        const count = /^tidegate_eta_error_seconds_count\{[^}]*backend_id="a"[^}]*\} (\d+)$/m.exec(
          text,
        );
        assert.equal(
          Number(count?.[1]),
          2,
          "two have waited, and have been held against what was told",
        );
      });
    },
  );

  it("is admitted where nothing has been measured, whatever is guessed", TIMEOUT, async () => {
    await withOne({ queue: { maxWaitMs: 5000 } }, async (fleet) => {
      // Ten seconds would be guessed.
      const free = await hold(fleet);
      const answer = openaiChat(fleet.url);
      await waiting(fleet, 1);
      const [one] = await queueOf(fleet);
      assert.ok(one !== undefined && one.etaMs > 5000, JSON.stringify(one));
      await free();
      assert.equal((await answer).status, 200);
    });
  });
});

describe("whoever would start too late", () => {
  it("is refused at once, and told when it would be in time", TIMEOUT, async () => {
    await withOne({ queue: { maxWaitMs: 2000 } }, async (fleet) => {
      const { a } = fleet.engines;
      a.behave({ headersDelayMs: 1500 });
      assert.equal((await openaiChat(fleet.url)).status, 200);
      const free = await hold(fleet);
      const waits = openaiChat(fleet.url);
      await waiting(fleet, 1);
      // Behind the one that runs and one more: some 3000 ms.
      const before = await queueOf(fleet);
      const answers = [await refused(fleet), await refused(fleet, {}, { stream: true })];
      for (const answer of answers) {
        assert.match(answer.text, /would not start within 2000 ms/);
      }
      await waiting(fleet, 1);
      assert.equal(a.inference().length, 2, "none of them has been at the engine");
      // In time is 2000 ms before its start, which comes one service after that of the one that waits.
      const [one] = await queueOf(fleet);
      assert.ok(before[0] !== undefined && one !== undefined);
      const [sooner, later] = answers.map(retryAfterMs) as [number, number];
      assert.ok(sooner >= one.etaMs + 1500 - 2000, `${sooner} with ${one.etaMs}`);
      assert.ok(sooner <= 1.1 * (before[0].etaMs + 3000), `${sooner} with ${before[0].etaMs}`);
      assert.ok(later >= sooner + 500, `the second comes behind the first: ${sooner}, ${later}`);
      await free();
      assert.equal((await waits).status, 200);
    });
  });

  it(
    "is told a later time than those before, and beyond a minute not to come back",
    TIMEOUT,
    async () => {
      await withOne({ queue: { maxLength: 1 } }, async (fleet) => {
        const free = await hold(fleet);
        const waits = openaiChat(fleet.url);
        await waiting(fleet, 1);
        const times: number[] = [];
        for (let each = 0; each < 8; each++) times.push(retryAfterMs(await refused(fleet)));
        for (const [at, time] of times.entries()) {
          assert.ok(time > (times[at - 1] ?? 0), JSON.stringify(times));
        }
        // Nothing is measured: ten seconds each, and a tenth more at most.
        assert.ok((times[0] as number) <= 11_000, JSON.stringify(times));
        assert.ok((times[7] as number) > 60_000, JSON.stringify(times));
        await free();
        await waits;
      });
    },
  );

  it("is refused before its own time-out, which a time-out of 0 is none", TIMEOUT, async () => {
    await withOne({}, async (fleet) => {
      const { a } = fleet.engines;
      a.behave({ headersDelayMs: 1500 });
      await openaiChat(fleet.url);
      const free = await hold(fleet);
      const headers = { "x-stainless-timeout": "0.5" };
      const answer = await refused(fleet, { headers });
      assert.match(answer.text, /within 500 ms/);
      const patient = ["0", "-1", "soon", ""].map((timeout) =>
        openaiChat(fleet.url, {}, { headers: { "x-stainless-timeout": timeout } }),
      );
      await waiting(fleet, 4);
      await free();
      for (const each of await Promise.all(patient)) assert.equal(each.status, 200);
    });
  });
});

describe("x-slo-ttft-ms", () => {
  const within = (ms: string): Init => ({ headers: { "x-slo-ttft-ms": ms } });

  it("is a number of milliseconds above 0", TIMEOUT, async () => {
    await withOne({}, async ({ url, engines }) => {
      for (const ms of ["soon", "0", "-5", " ", "Infinity", "1e999", "NaN"]) {
        const error = expectError(await openaiChat(url, {}, within(ms)), 400, "invalid_parameter");
        assert.equal(error.param, "x-slo-ttft-ms");
      }
      assert.equal(engines.a.inference().length, 0);
      for (const ms of ["1", "2500", "1e3", "0.5"]) {
        assert.equal((await openaiChat(url, {}, within(ms))).status, 200, ms);
      }
    });
  });

  it("is looked at before the cache, like any wish", TIMEOUT, async () => {
    await withOne({}, async ({ url, engines }) => {
      const sure = { temperature: 0, seed: 1 };
      assert.equal((await openaiChat(url, sure)).status, 200);
      const [again, wrong] = [
        await openaiChat(url, sure),
        await openaiChat(url, sure, within("soon")),
      ];
      assert.equal(again.headers.get("x-tidegate-cache"), "hit");
      expectError(wrong, 400, "invalid_parameter");
      const other = { headers: { "x-tidegate-degrade": "always" } };
      expectError(await openaiChat(url, sure, other), 400, "invalid_parameter");
      assert.equal(engines.a.inference().length, 1);
    });
  });

  it("refuses at once where what was measured says that it cannot be", TIMEOUT, async () => {
    await withOne({}, async (fleet) => {
      fleet.engines.a.behave({ headersDelayMs: 1500 });
      await openaiChat(fleet.url);
      const free = await hold(fleet);
      const answer = await refused(fleet, within("300"));
      assert.match(answer.text, /would not start in time for a first token after 300 ms/);
      const waits = openaiChat(fleet.url, {}, within("60000"));
      await waiting(fleet, 1);
      await free();
      assert.equal((await waits).status, 200);
    });
  });

  it("counts how long the prompt takes to read", TIMEOUT, async () => {
    await withOne({}, async (fleet) => {
      const { a } = fleet.engines;
      a.behave({ prefill: { msPerToken: 2, keeps: false } });
      const long = { messages: [{ role: "user", content: "word ".repeat(600) }], stream: true };
      assert.equal((await openaiChat(fleet.url, long)).status, 200);
      // Half a second for the slot is enough for a short prompt, and not for 1200 ms of reading.
      const free = await hold(fleet);
      await refused(fleet, within("900"), long);
      const short = openaiChat(fleet.url, { stream: true }, within("30000"));
      await waiting(fleet, 1);
      await free();
      assert.equal((await short).status, 200);
    });
  });

  it("never refuses at once for what nobody has measured", TIMEOUT, async () => {
    await withOne({}, async (fleet) => {
      const free = await hold(fleet);
      const waits = openaiChat(fleet.url, {}, within("4000"));
      await waiting(fleet, 1);
      const late = await refused(fleet, within("200"));
      assert.match(late.text, /no slot for model .* came free in time for a first token/);
      await free();
      assert.equal((await waits).status, 200);
    });
  });
});

describe("timeouts.firstByteMs", () => {
  const long = { messages: [{ role: "user", content: "abc ".repeat(300) }], stream: true };

  it("gives a long prompt six times what the backend usually takes for it", TIMEOUT, async () => {
    const config = { timeouts: { firstByteMs: 200 }, circuitBreaker: { failureThreshold: 100 } };
    await withOne(config, async (fleet) => {
      const { a } = fleet.engines;
      // Twelve times the guess of 1 ms a token.
      a.behave({ prefill: { msPerToken: 12, keeps: false } });
      expectError(await openaiChat(fleet.url, long), 504, "upstream_timeout");
      a.behave({ prefill: { msPerToken: 3, keeps: false } });
      assert.equal((await openaiChat(fleet.url, long)).status, 200);
      a.behave({ prefill: { msPerToken: 12, keeps: false } });
      assert.equal((await openaiChat(fleet.url, long)).status, 200, "four times as slow as usual");
    });
  });
});

describe("flows", () => {
  /** Holds the slot while all of these come, and tells in which order they were served. */
  async function orderOf(fleet: Fleet<"a">, sends: [user: string, Init][]): Promise<string[]> {
    const free = await hold(fleet);
    const answers = [];
    for (const [at, [user, init]] of sends.entries()) {
      answers.push(openaiChat(fleet.url, { user }, init));
      await waiting(fleet, at + 1);
    }
    await free();
    for (const answer of await Promise.all(answers)) assert.equal(answer.status, 200);
    return fleet.engines.a
      .inference()
      .map(({ json }) => json.user as string)
      .filter((user) => user !== "holder");
  }

  it(
    "are sessions where there are no tenants: a flood of one does not bury another",
    TIMEOUT,
    async () => {
      await withOne({}, async (fleet) => {
        const session = (name: string): Init => ({ headers: { "x-session-id": name } });
        const flood = Array.from({ length: 8 }, (): [string, Init] => ["flood", session("one")]);
        const order = await orderOf(fleet, [...flood, ["light", session("two")]]);
        assert.ok(order.indexOf("light") <= 1, order.join(" "));
      });
    },
  );

  it("are addresses where no session is named: one after the other", TIMEOUT, async () => {
    await withOne({}, async (fleet) => {
      const users = ["1", "2", "3", "4"];
      const order = await orderOf(
        fleet,
        users.map((user) => [user, {}]),
      );
      assert.deepEqual(order, users);
    });
  });

  it("charge an answer that becomes longer than expected while it flows", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { backend: { ...ONE_SLOT, concurrency: 2 } } }, {});
    try {
      const { a } = fleet.engines;
      const session = (name: string): Init => ({ headers: { "x-session-id": name } });
      const path = `${fleet.url}/v1/chat/completions`;
      // Both slots: one by a session whose answer goes on and on, beyond the 1000 tokens expected.
      a.behave({ tokens: 3000, stallAfterTokens: 2500 });
      const leaving = new AbortController();
      const { signal } = leaving;
      const endless = await open(path, chatBody({ stream: true, user: "holder" }), {
        ...session("long"),
        signal,
      });
      const reader = endless.body?.getReader();
      let bytes = 0;
      // 2500 chunks of at least 100 bytes.
      while (bytes < 250_000) bytes += (await reader?.read())?.value?.length ?? Infinity;
      a.behave({ tokens: 5, stallAfterTokens: null, headersDelayMs: 60_000 });
      const other = open(path, chatBody({ user: "holder" }), { ...session("other"), signal });
      other.catch(() => {});
      assert.ok(await until(() => a.activeGenerations() === 2, 5000));
      a.behave({ headersDelayMs: 0 });
      // The one that came first has had 2500 tokens, and 1000 were expected of both.
      const answers = [];
      for (const [at, name] of ["long", "other"].entries()) {
        answers.push(openaiChat(fleet.url, { user: name }, session(name)));
        assert.ok(
          await until(
            async () => (await fleet.gateway.metric("tidegate_queue_requests")) === at + 1,
            5000,
          ),
        );
      }
      leaving.abort();
      await reader?.cancel().catch(() => {});
      for (const answer of await Promise.all(answers)) assert.equal(answer.status, 200);
      const order = a.inference().map(({ json }) => json.user);
      assert.deepEqual(order.slice(2), ["other", "long"]);
    } finally {
      await fleet.close();
    }
  });
});
