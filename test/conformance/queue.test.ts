/** Waiting is honest: a slot, a true refusal, or a sign of life (design §1.4, contract §1 queue and timeouts). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import {
  chatBody,
  connect,
  dataOf,
  open,
  openaiChat,
  parseSse,
  postBytes,
  readEvents,
  send,
  sleep,
  until,
} from "../support/client.ts";
import type { FakeEngine } from "../support/engine.ts";
import type { Behaviour } from "../support/engine-behaviour.ts";
import { faults } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { checkEnvelope, expectError, startFleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };

/** The most requests that were at an engine at once. */
function watchPeak(...engines: FakeEngine[]): { peak: () => number; stop: () => void } {
  let peak = 0;
  const timer = setInterval(() => {
    const now = engines.reduce(
      (sum, engine) => sum + engine.activeGenerations() + engine.waiting(),
      0,
    );
    peak = Math.max(peak, now);
  }, 2);
  return { peak: () => peak, stop: () => clearInterval(timer) };
}

describe("queue", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["test-model", "other"], backend: { concurrency: 1 } } },
      { queue: { maxLength: 2 } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const isQueued = (count: number): Promise<boolean> =>
    until(async () => (await fleet.gateway.metric("tidegate_queue_requests")) === count);

  it("lets through what fits, in order of arrival, and keeps the rest", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ headersDelayMs: Infinity });
    const watch = watchPeak(a);
    const answers = [];
    for (const user of ["1", "2", "3"]) {
      answers.push(openaiChat(fleet.url, { user }));
      assert.ok(await until(() => a.inference().length > 0));
      assert.ok(await isQueued(Number(user) - 1));
    }
    const gauges = await fleet.gateway.metrics();
    assert.match(gauges, /^tidegate_queue_requests\{model="test-model"\} 2$/m);
    assert.match(gauges, /^tidegate_slots_in_use\{[^}]*\} 1$/m);
    assert.equal(await fleet.gateway.metric("tidegate_slots", { backend_id: "a" }), 1);
    assert.ok((await fleet.gateway.metric("tidegate_held_body_bytes")) > 0);
    a.release();
    for (const answer of await Promise.all(answers)) {
      assert.equal(answer.status, 200);
      const queued = /queue;dur=([\d.]+)/.exec(answer.headers.get("server-timing") ?? "");
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.ok(Math.abs(Number(queued?.[1]) - Number(record.queue_ms)) < 5);
    }
    watch.stop();
    assert.equal(watch.peak(), 1);
    assert.deepEqual(
      a.inference().map(({ json }) => json.user),
      ["1", "2", "3"],
    );
  });

  it("counts all models of a backend together", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ headersDelayMs: 60 });
    const watch = watchPeak(a);
    const models = ["test-model", "other", "test-model", "other"];
    const answers = await Promise.all(models.map((model) => openaiChat(fleet.url, { model })));
    watch.stop();
    assert.deepEqual(
      answers.map(({ status }) => status),
      [200, 200, 200, 200],
    );
    assert.equal(watch.peak(), 1);
  });

  it("refuses with a Retry-After what the queue has no room for", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ headersDelayMs: Infinity });
    const admitted = [0, 1, 2].map(() => openaiChat(fleet.url));
    assert.ok(await isQueued(2));
    const refused = await openaiChat(fleet.url);
    const error = expectError(refused, 429, "rate_limit_exceeded");
    assert.equal(error.type, "rate_limit_error");
    const after = Number(refused.headers.get("retry-after"));
    assert.ok(Number.isInteger(after) && after >= 1 && after <= 60, `${after}`);
    assert.ok(Number(refused.headers.get("retry-after-ms")) >= 1);
    const anthropic = await send(`${fleet.url}/v1/messages`, chatBody({ max_tokens: 3 }));
    assert.equal(anthropic.status, 429);
    assert.equal((anthropic.json().error as { type: string }).type, "rate_limit_error");
    assert.ok(Number(anthropic.headers.get("retry-after")) >= 1);
    a.release();
    await Promise.all(admitted);
    assert.equal(a.inference().length, 3, "the refused ones never got there");
    assert.ok((await fleet.gateway.metric("tidegate_refusals_total")) >= 2);
  });

  it("keeps a place for nobody who has left", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ headersDelayMs: Infinity });
    const running = openaiChat(fleet.url, { user: "running" });
    await until(() => a.inference().length === 1);
    for (const how of ["fin", "reset"] as const) {
      const client = await connect(fleet.gateway.port);
      client.write(postBytes("/v1/chat/completions", chatBody({ user: "leaver" })));
      assert.ok(await isQueued(1));
      client.leave(how);
      assert.ok(await isQueued(0), how);
    }
    a.release();
    await running;
    await sleep(50);
    assert.deepEqual(
      a.inference().map(({ json }) => json.user),
      ["running"],
    );
    const gone = fleet.gateway.records().filter(({ cause }) => cause === "queued");
    assert.equal(gone.length, 2);
    for (const record of gone) assert.deepEqual([record.ending, record.status], ["cancelled", 499]);
  });
});

describe("queue: limits of time and of a model", () => {
  it("queue.maxWaitMs: 429 when it is over, at once with 0", TIMEOUT, async () => {
    for (const maxWaitMs of [150, 0]) {
      const fleet = await startFleet(
        { a: { backend: { concurrency: 1 } } },
        { queue: { maxWaitMs } },
      );
      try {
        fleet.engines.a.behave({ headersDelayMs: Infinity });
        const running = openaiChat(fleet.url);
        await until(() => fleet.engines.a.inference().length === 1);
        for (const stream of [true, false]) {
          const refused = await openaiChat(fleet.url, { stream });
          expectError(refused, 429, "rate_limit_exceeded");
          assert.ok(Number(refused.headers.get("retry-after")) >= 1);
        }
        fleet.engines.a.release();
        assert.equal((await running).status, 200);
        assert.equal(fleet.engines.a.inference().length, 1);
      } finally {
        await fleet.close();
      }
    }
  });

  it("the client's own time-out ends waiting and generating", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { backend: { concurrency: 1 } } });
    try {
      fleet.engines.a.behave({ headersDelayMs: 2500 });
      const headers = { "x-stainless-timeout": "1" };
      const running = openaiChat(fleet.url, {}, { headers });
      await until(() => fleet.engines.a.inference().length === 1);
      const waiting = openaiChat(fleet.url, { stream: true }, { headers });
      expectError(await running, 504, "upstream_timeout");
      assert.ok([200, 429].includes((await waiting).status));
      assert.ok(await until(() => fleet.engines.a.activeGenerations() === 0));
      assert.equal(fleet.engines.a.inference()[0]?.closedByClient, true);
    } finally {
      await fleet.close();
    }
  });

  it("models.<name>.concurrency holds over all backends", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: { models: ["m", "free"] }, b: { models: ["m", "free"] } },
      { models: { m: { concurrency: 1 } } },
    );
    try {
      const { a, b } = fleet.engines;
      for (const [model, most, headersDelayMs] of [
        ["m", 1, 60],
        ["free", 4, Infinity],
      ] as const) {
        for (const engine of [a, b]) engine.behave({ headersDelayMs });
        const watch = watchPeak(a, b);
        const answers = [1, 2, 3, 4].map(() => openaiChat(fleet.url, { model }));
        assert.ok(await until(() => watch.peak() >= most));
        if (headersDelayMs === Infinity) for (const engine of [a, b]) engine.release();
        await Promise.all(answers);
        watch.stop();
        assert.equal(watch.peak(), most, model);
      }
    } finally {
      await fleet.close();
    }
  });

  it("a free backend takes what waits at a busy one; the load is spread", TIMEOUT, async () => {
    const fleet = await startFleet({
      a: { backend: { concurrency: 1 } },
      b: { backend: { concurrency: 1 } },
    });
    try {
      const { a, b } = fleet.engines;
      a.behave({ headersDelayMs: 60_000 });
      b.behave({ headersDelayMs: 20 });
      const leaving = new AbortController();
      const all = Promise.all(
        Array.from({ length: 6 }, () => openaiChat(fleet.url, {}, { signal: leaving.signal })),
      ).catch(() => null);
      assert.ok(await until(() => b.inference().filter(({ completed }) => completed).length === 5));
      assert.equal(a.inference().length, 1);
      leaving.abort();
      await all;
    } finally {
      await fleet.close();
    }
  });

  it("an Ollama has one slot per model unless told otherwise", TIMEOUT, async () => {
    const fleet = await startFleet({ o: { kind: "ollama", models: ["x:1", "y:1"] } });
    try {
      // Each beside the other once: then it is known that both fit.
      for (const model of ["x:1", "y:1"]) await openaiChat(fleet.url, { model });
      fleet.engines.o.behave({ headersDelayMs: 80 });
      const watch = watchPeak(fleet.engines.o);
      await Promise.all(["x:1", "x:1", "x:1"].map((model) => openaiChat(fleet.url, { model })));
      assert.equal(watch.peak(), 1);
      fleet.engines.o.behave({ headersDelayMs: Infinity });
      const both = ["x:1", "y:1"].map((model) => openaiChat(fleet.url, { model }));
      assert.ok(await until(() => watch.peak() === 2));
      fleet.engines.o.release();
      await Promise.all(both);
      watch.stop();
    } finally {
      await fleet.close();
    }
  });
});

describe("heartbeats", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { concurrency: 1, healthInterval: 60_000 } } },
      { queue: { heartbeatMs: 40 }, circuitBreaker: { failureThreshold: 1_000_000 } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const comments = (text: string): string[] =>
    parseSse(text).events.flatMap(({ comment }) => comment ?? []);

  it(
    "opens a stream that waits, and says later what the headers would have said",
    TIMEOUT,
    async () => {
      const { a } = fleet.engines;
      a.behave({ headersDelayMs: Infinity });
      const running = openaiChat(fleet.url);
      await until(() => a.inference().length === 1);
      const response = await open(`${fleet.url}/v1/chat/completions`, chatBody({ stream: true }));
      assert.equal(response.status, 200);
      assert.match(response.headers.get("content-type") ?? "", /^text\/event-stream/);
      assert.match(response.headers.get("x-request-id") ?? "", /^[a-z0-9-]{16,36}$/);
      assert.equal(a.inference().length, 1, "opened while it waits");
      let text = "";
      for await (const { raw } of readEvents(response)) {
        text += raw;
        if (comments(text).length === 3) a.release();
      }
      await running;
      const told = comments(text).map((comment) => {
        assert.match(comment, /^tidegate \{/);
        return JSON.parse(comment.slice("tidegate ".length)) as Record<string, unknown>;
      });
      assert.ok(told.length >= 3, text);
      assert.ok(
        told.some(
          ({ position, reason }) => typeof position === "number" && typeof reason === "string",
        ),
      );
      const routed = told.at(-1);
      assert.equal(routed?.["x-tidegate-backend"], "a");
      assert.equal(routed?.["x-tidegate-reason"], "only");
      assert.match(String(routed?.["server-timing"]), /queue;dur=\d/);
      const events = text.slice(text.indexOf("data:"));
      assert.doesNotMatch(events, /^:/m, "the comment stands before the first event");
      assert.equal(dataOf(events).length, 7);
      assert.ok(events.endsWith("data: [DONE]\n\n"));
    },
  );

  it(
    "keeps a stream alive before the engine's headers and before its first token",
    TIMEOUT,
    async () => {
      for (const behaviour of [{ headersDelayMs: 800 }, { firstTokenDelayMs: 800 }]) {
        fleet.reset();
        fleet.engines.a.behave(behaviour);
        const { text } = await openaiChat(fleet.url, { stream: true });
        assert.ok(comments(text).length >= 2, JSON.stringify(behaviour));
        assert.ok(text.endsWith("data: [DONE]\n\n"));
        const events = parseSse(text).events.filter(({ data }) => data !== null);
        const sent = fleet.engines.a.inference().at(-1)?.sent().toString() ?? "";
        assert.ok(events.every(({ raw }) => sent.includes(raw)));
      }
    },
  );

  it("tells an error in the stream once it is open", TIMEOUT, async () => {
    const { a } = fleet.engines;
    for (const [fault, code] of [
      [faults.ollamaLoadFailed, "upstream_error"],
      [faults.vllmFirstEvent, "upstream_error"],
      [{ kind: "drop", by: "reset" }, "upstream_unreachable"],
      [faults.ollamaBusy, "rate_limit_exceeded"],
    ] as const) {
      a.behave({ headersDelayMs: 150, fault });
      // A busy engine is waited for as long as the client has time.
      const headers = { "x-stainless-timeout": "0.1" };
      const answer = await openaiChat(fleet.url, { stream: true }, { headers });
      assert.equal(answer.status, 200);
      assert.ok(comments(answer.text).length >= 1);
      const [error, ...others] = dataOf(answer.text);
      assert.deepEqual(others, []);
      assert.equal(checkEnvelope(error?.error).code, code);
      assert.doesNotMatch(answer.text, /\[DONE\]/);
      assert.equal(parseSse(answer.text).rest, "");
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.deepEqual([record.status, record.ending, record.cause], [200, "failed", code]);
    }
    a.behave({ fault: faults.ollamaLoadFailed });
    const anthropic = await send(
      `${fleet.url}/v1/messages`,
      chatBody({ stream: true, max_tokens: 3 }),
    );
    const last = parseSse(anthropic.text).events.at(-1);
    assert.equal(last?.event, "error");
    assert.equal((JSON.parse(last?.data ?? "") as { type: string }).type, "error");
  });

  it("retries behind an open stream, since no engine byte is out", TIMEOUT, async () => {
    const two = await startFleet(
      {
        first: { backend: { weight: 1e6, healthInterval: 60_000 } },
        second: { backend: { healthInterval: 60_000 } },
      },
      { queue: { heartbeatMs: 40 } },
    );
    try {
      two.engines.first.behave({ headersDelayMs: 150, fault: { kind: "drop", by: "reset" } });
      const { status, text } = await openaiChat(two.url, { stream: true });
      assert.equal(status, 200);
      assert.ok(
        comments(text).some((comment) => comment.includes('"x-tidegate-backend":"second"')),
        text,
      );
      assert.equal(two.engines.second.inference().length, 1);
      assert.ok(text.endsWith("data: [DONE]\n\n"));
    } finally {
      await two.close();
    }
  });

  it("never speaks in an answer that is no stream", TIMEOUT, async () => {
    fleet.engines.a.behave({ headersDelayMs: Infinity });
    const client = await connect(fleet.gateway.port);
    client.write(postBytes("/v1/chat/completions", chatBody()));
    await sleep(120);
    assert.equal(client.received(), "");
    fleet.engines.a.release();
    assert.ok(await until(() => client.body() !== null));
    assert.equal(client.status(), 200);
    client.leave("close");
  });

  it("is silent with 0: the status stays honest", TIMEOUT, async () => {
    const quiet = await startFleet({ a: {} }, { queue: { heartbeatMs: 0 } });
    try {
      quiet.engines.a.behave({ headersDelayMs: 300, fault: faults.ollamaLoadFailed });
      expectError(await openaiChat(quiet.url, { stream: true }), 502, "upstream_error");
      quiet.engines.a.reset();
      quiet.engines.a.behave({ headersDelayMs: 300 });
      assert.deepEqual(comments((await openaiChat(quiet.url, { stream: true })).text), []);
    } finally {
      await quiet.close();
    }
  });
});

describe("timeouts of a stream", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { healthInterval: 60_000 } } },
      {
        timeouts: { firstByteMs: 700, idleMs: 700, clientMs: 400 },
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  it("firstByteMs: 504 while nothing is out, and the engine is stopped", TIMEOUT, async () => {
    for (const behaviour of [{ headersDelayMs: 3000 }, { firstTokenDelayMs: 3000 }]) {
      fleet.reset();
      fleet.engines.a.behave(behaviour);
      expectError(await openaiChat(fleet.url, { stream: true }), 504, "upstream_timeout");
      assert.ok(await until(() => fleet.engines.a.inference()[0]?.closedByClient === true));
    }
  });

  it("idleMs: an error event in mid-stream, and the engine is stopped", TIMEOUT, async () => {
    fleet.engines.a.behave({ stallAfterTokens: 2 });
    const answer = await openaiChat(fleet.url, { stream: true });
    assert.equal(answer.status, 200);
    const { error } = dataOf(answer.text).at(-1) as { error: unknown };
    assert.equal(checkEnvelope(error).code, "upstream_timeout");
    assert.ok(await until(() => fleet.engines.a.inference()[0]?.closedByClient === true));
    const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
    assert.deepEqual([record.ending, record.cause], ["failed", "upstream_timeout"]);
  });

  it(
    "neither looks at an answer in one piece, nor at a slow but living stream",
    TIMEOUT,
    async () => {
      fleet.engines.a.behave({ headersDelayMs: 1200 });
      assert.equal((await openaiChat(fleet.url)).status, 200);
      fleet.reset();
      fleet.engines.a.behave({ tokenDelayMs: 150, tokens: 6 });
      const { text } = await openaiChat(fleet.url, { stream: true });
      assert.ok(text.endsWith("data: [DONE]\n\n"));
    },
  );

  // In one piece it is more than is held back; both are more than the kernel's buffers hold.
  for (const [name, stream, behaviour] of [
    ["a stream", true, { flood: { bytes: 100_000_000 } }],
    ["an answer in one piece", false, { tokens: ["x".repeat(40_000_000)] }],
  ] as const) {
    it(`clientMs: who does not read ${name} is no fault of the engine's`, TIMEOUT, async () => {
      const { a } = fleet.engines;
      a.behave({ ...behaviour } as Partial<Behaviour>);
      const before = fleet.gateway.records().length;
      const client = await connect(fleet.gateway.port);
      client.pause();
      client.write(postBytes("/v1/chat/completions", chatBody({ stream })));
      try {
        assert.ok(await until(() => a.inference()[0]?.closedByClient === true), "stopped");
        // Those of requests before it may still come.
        const left = () =>
          fleet.gateway
            .records()
            .slice(before)
            .find(({ cause }) => cause !== null);
        assert.ok(await until(() => left() !== undefined));
        assert.deepEqual([left()?.ending, left()?.cause], ["cancelled", "streaming"]);
        assert.equal(await fleet.gateway.metric("tidegate_slots_in_use"), 0);
      } finally {
        client.leave("reset");
      }
    });
  }
});
