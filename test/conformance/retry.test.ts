/** A broken engine costs nobody a request that another could serve (design §1.6, contract §4). */
import assert from "node:assert/strict";
import { after, afterEach, before, beforeEach, describe, it } from "node:test";
import type { Answer } from "../support/client.ts";
import { openaiChat, send, until } from "../support/client.ts";
import type { Fault } from "../support/engine-behaviour.ts";
import { faults } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const model = ["test-model"];

const retried: Record<string, Fault> = {
  "reset before the headers": { kind: "drop", by: "reset" },
  "end before the headers": { kind: "drop", by: "fin" },
  "500": faults.ollamaLoadFailed,
  "502": faults.htmlGateway(502),
  "504": faults.htmlGateway(504),
  "200 with an error object": faults.errorIn200,
  "200 with a string error": faults.lmStudioUnexpected,
  "200 in HTML": faults.htmlGateway(200),
};

/** Its operator has to put it right; until then others serve. */
const misconfigured: Record<string, Fault> = {
  "401 wrong key": { kind: "answer", status: 401, body: { error: { message: "Invalid API Key" } } },
  "403": { kind: "answer", status: 403, body: {} },
};

const busy: Record<string, Fault> = {
  "503 busy": faults.ollamaBusy,
  "429 busy": faults.tgiBusy,
  "503 loading": faults.loadingModel,
};

/** The breaker has tests of its own: here the same backend fails again and again. */
const noBreaker = { circuitBreaker: { failureThreshold: 1_000_000 } };

describe("retry", () => {
  // The heavier one is asked first; probes are rare, so that nothing is learned between the requests.
  let fleet: Fleet<"first" | "second">;
  before(async () => {
    fleet = await startFleet(
      {
        first: { models: model, backend: { weight: 1e6, healthInterval: 60_000 } },
        second: { models: model, backend: { weight: 1, healthInterval: 60_000 } },
      },
      noBreaker,
    );
  });
  beforeEach(() => fleet.reset());
  after(() => fleet.close());

  const asked = (id: "first" | "second"): number => fleet.engines[id].inference().length;
  async function checkRetried(answer: Answer, stream: boolean): Promise<void> {
    await checkSecond(fleet, answer, stream);
    assert.equal(asked("second"), 1);
  }

  for (const [name, fault] of Object.entries({ ...retried, ...misconfigured })) {
    it(`${name}: another backend answers`, TIMEOUT, async () => {
      for (const stream of [false, true]) {
        fleet.reset();
        fleet.engines.first.behave({ fault });
        const answer = await openaiChat(fleet.url, { stream });
        assert.equal(asked("first"), 1);
        await checkRetried(answer, stream);
      }
    });
  }

  it("an error, and nothing at all, as first event: another backend answers", TIMEOUT, async () => {
    const firsts: Fault[] = [
      faults.vllmFirstEvent,
      { kind: "error", afterTokens: 0, ends: "reset" },
      { kind: "cut", afterTokens: 0, by: "reset" },
      { kind: "cut", afterTokens: 0, by: "eof" },
    ];
    for (const fault of firsts) {
      fleet.reset();
      fleet.engines.first.behave({ fault });
      await checkRetried(await openaiChat(fleet.url, { stream: true }), true);
    }
  });

  it("a whole answer that breaks off: another backend answers", TIMEOUT, async () => {
    for (const by of ["reset", "fin", "eof"] as const) {
      fleet.reset();
      fleet.engines.first.behave({ fault: { kind: "cut", afterBytes: 60, by } });
      await checkRetried(await openaiChat(fleet.url), false);
    }
  });

  it("a refused connection: another backend answers", TIMEOUT, async () => {
    fleet.engines.first.stopListening();
    try {
      for (const stream of [false, true]) {
        fleet.engines.second.reset();
        const answer = await openaiChat(fleet.url, { stream });
        assert.equal(answer.status, 200, answer.text);
        assert.equal(answer.headers.get("x-tidegate-backend"), "second");
      }
    } finally {
      await fleet.engines.first.listenAgain();
    }
    const record = fleet.gateway.records().at(-2);
    assert.equal(record?.attempts, 2);
  });
});

/** Answered whole by the second backend, after one failure elsewhere. */
async function checkSecond(
  { gateway }: Pick<Fleet<string>, "gateway">,
  answer: Answer,
  stream: boolean,
): Promise<void> {
  assert.equal(answer.status, 200, answer.text);
  assert.match(answer.text, /word4/);
  assert.doesNotMatch(answer.text, /"error"/);
  assert.equal(answer.headers.get("x-tidegate-backend"), "second");
  assert.equal(answer.headers.get("x-tidegate-attempts"), "2");
  assert.equal(answer.headers.get("x-tidegate-reason"), "retry");
  assert.match(answer.headers.get("server-timing") ?? "", /retry;dur=\d/);
  const record = await gateway.record(answer.headers.get("x-request-id") ?? "");
  assert.deepEqual(
    [record.backend_id, record.attempts, record.reason, record.ending, record.stream],
    ["second", 2, "retry", "completed", stream],
  );
}

describe("retry: a busy engine", () => {
  // One that said so gets nothing more for a second: a backend and a model for each request.
  const models = ["whole", "streamed"];
  let fleet: Fleet<string>;
  before(async () => {
    const all = Object.keys(busy).flatMap((name) => models.map((each) => `${name} ${each}`));
    const first = all.map((name) => {
      return [name, { models: [name], backend: { weight: 1e6, healthInterval: 60_000 } }] as const;
    });
    fleet = await startFleet(
      {
        ...Object.fromEntries(first),
        second: { models: all, backend: { healthInterval: 60_000 } },
      },
      noBreaker,
    );
  });
  beforeEach(() => fleet.reset());
  after(() => fleet.close());

  for (const [name, fault] of Object.entries(busy)) {
    it(`${name}: another backend answers`, TIMEOUT, async () => {
      for (const [index, each] of models.entries()) {
        const id = `${name} ${each}`;
        fleet.engines[id]?.behave({ fault });
        const stream = index === 1;
        await checkSecond(fleet, await openaiChat(fleet.url, { model: id, stream }), stream);
        assert.equal(fleet.engines[id]?.inference().length, 1);
        assert.equal(fleet.engines["second"]?.inference().length, index + 1);
      }
    });
  }
});

describe("retry: where it has to end", () => {
  let fleet: Fleet<"first" | "second" | "third">;
  before(async () => {
    fleet = await startFleet(
      {
        first: { models: model, backend: { weight: 1e6, healthInterval: 60_000 } },
        second: { models: model, backend: { weight: 1000, healthInterval: 60_000 } },
        third: { models: model, backend: { weight: 1, healthInterval: 60_000 } },
      },
      noBreaker,
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const total = (): number =>
    Object.values(fleet.engines).reduce((sum, engine) => sum + engine.inference().length, 0);

  it("no request is sent more than twice", TIMEOUT, async () => {
    for (const engine of Object.values(fleet.engines))
      engine.behave({ fault: faults.ollamaLoadFailed });
    const answer = await openaiChat(fleet.url);
    expectError(answer, 502, "upstream_error");
    assert.equal(answer.headers.get("x-tidegate-attempts"), "2");
    assert.equal(total(), 2);
    assert.ok(Object.values(fleet.engines).every((engine) => engine.inference().length <= 1));
  });

  it("what the client did wrong is not sent again", TIMEOUT, async () => {
    for (const fault of [
      faults.sglangFlat,
      faults.llamacppContext,
      faults.ollamaNoModel,
      faults.tgiValidation,
    ]) {
      fleet.reset();
      for (const engine of Object.values(fleet.engines)) engine.behave({ fault });
      const answer = await openaiChat(fleet.url);
      assert.ok(answer.status >= 400 && answer.status < 500, answer.text);
      assert.equal(total(), 1);
    }
  });

  it("a stream is not sent again once its first token is out", TIMEOUT, async () => {
    for (const engine of Object.values(fleet.engines)) {
      engine.behave({ tokenDelayMs: 5, fault: { kind: "cut", afterTokens: 1, by: "reset" } });
    }
    const answer = await openaiChat(fleet.url, { stream: true });
    assert.equal(answer.status, 200);
    assert.match(answer.text, /"code":"upstream_incomplete"/);
    assert.equal(total(), 1);
  });

  it("the client that leaves between two attempts is not sent again", TIMEOUT, async () => {
    fleet.engines.first.behave({ headersDelayMs: Infinity, fault: { kind: "drop", by: "reset" } });
    const leaving = new AbortController();
    const answer = openaiChat(fleet.url, {}, { signal: leaving.signal });
    assert.ok(await until(() => total() === 1));
    leaving.abort();
    await assert.rejects(answer);
    assert.ok(
      await until(() => fleet.engines.first.requests.some(({ closedByClient }) => closedByClient)),
    );
    const record = await fleet.gateway.record(({ ending }) => ending === "cancelled");
    assert.equal(record.status, 499);
    assert.equal(total(), 1);
  });
});

describe("retry: all busy", () => {
  for (const maxWaitMs of [0, 300]) {
    it(`429 with the engine's Retry-After once ${maxWaitMs} ms are over`, TIMEOUT, async () => {
      const backend = { healthInterval: 60_000 };
      const fleet = await startFleet(
        { a: { models: model, backend }, b: { models: model, backend } },
        { queue: { maxWaitMs } },
      );
      try {
        const { a, b } = fleet.engines;
        for (const engine of [a, b]) engine.behave({ fault: faults.busyFor(7) });
        const answer = await openaiChat(fleet.url);
        expectError(answer, 429, "rate_limit_exceeded");
        assert.equal(answer.headers.get("retry-after"), "7");
        assert.ok(Number(answer.headers.get("retry-after-ms")) > 0);
        const sent = a.inference().length + b.inference().length;
        assert.equal(answer.headers.get("x-tidegate-attempts"), String(sent));
        assert.equal(sent, 2, "each was asked, and nobody twice");
      } finally {
        await fleet.close();
      }
    });
  }
});

it("a retry goes to what has come up since the request began", TIMEOUT, async () => {
  const backend = { healthInterval: 60_000 };
  const timeouts = { firstByteMs: 1000 };
  const fleet = await startFleet(
    { first: { models: model, backend }, second: { models: model, backend } },
    { timeouts },
  );
  try {
    const operate = (verb: string) => send(`${fleet.url}/admin/api/backends/second/${verb}`, "");
    await operate("drain");
    fleet.engines.first.behave({ headersDelayMs: 60_000 });
    const asked = openaiChat(fleet.url, { stream: true });
    assert.ok(await until(() => fleet.engines.first.inference().length === 1));
    await operate("resume");
    const answer = await asked;
    assert.equal(answer.status, 200, answer.text);
    assert.equal(answer.headers.get("x-tidegate-backend"), "second");
  } finally {
    await fleet.close();
  }
});
