/** What fails is left alone, at the price of a few attempts, and used again once it works (design §4). */
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { chatBody, open, openaiChat, send, until } from "../support/client.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { Behaviour, Fault } from "../support/engine-behaviour.ts";
import { faults } from "../support/engine-behaviour.ts";
import { startEngineProcess } from "../support/engine-process.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import type { Gateway } from "../support/gateway.ts";
import { startGateway } from "../support/gateway.ts";
import type { Got, Load } from "./load.ts";
import { ask, startLoad } from "./load.ts";

const TIMEOUT = { timeout: 60_000 };
const LANES = 10;
const THRESHOLD = 3;
const RESET_MS = 1000;
const INTERVAL_MS = 300;
const model = ["test-model"];
/** Long enough that some are always on their way. */
const steady: Partial<Behaviour> = { tokens: 8, tokenDelayMs: 6 };
const probed = { healthInterval: INTERVAL_MS, timeout: 800 };
const timeouts = { connectMs: 1000, firstByteMs: 5000, idleMs: 3000, totalMs: 20_000 };
const circuitBreaker = { failureThreshold: THRESHOLD, resetTimeoutMs: RESET_MS };

interface Report {
  id: string;
  health: string;
  breaker: { state: string; failures: number; untilAt: number | null };
}

async function reportOf({ url }: Pick<Gateway, "url">, id: string): Promise<Report> {
  const { text } = await send(`${url}/admin/api/backends`);
  const found = (JSON.parse(text) as Report[]).find((report) => report.id === id);
  assert.ok(found !== undefined, text);
  return found;
}

function failuresOf(gateway: Gateway, backend: string): Promise<number> {
  return gateway.metric("tidegate_attempts_total", { backend_id: backend, outcome: "failure" });
}

/** The state that the metric tells: of the backend as a whole, or of a model there. */
async function stateOf(gateway: Gateway, backend: string, name = "none"): Promise<string> {
  const text = await gateway.metrics();
  const states = text.split("\n").flatMap((line) => {
    if (!line.startsWith("tidegate_breaker_state{") || !line.endsWith("} 1")) return [];
    const isMeant = line.includes(`backend_id="${backend}"`) && line.includes(`model="${name}"`);
    return isMeant ? (/state="(\w+)"/.exec(line)?.[1] ?? []) : [];
  });
  assert.equal(states.length, 1, `one state at a time, not ${states.join(" and ")}`);
  return states[0] ?? "";
}

interface Outage {
  /** From now on it fails. */
  fail: () => void;
  /** From now on it works. */
  mend: () => Promise<void>;
  /** Streams that had begun there may end with an error. */
  breaksStreams: boolean;
  /** What opens: the breaker of the backend, or that of the model there. */
  opens: "none" | "test-model";
}

/** A steady load while the first of two backends fails for a while. */
async function goThrough(name: string, gateway: Gateway, outage: Outage): Promise<void> {
  const operate = (verb: string) => send(`${gateway.url}/admin/api/backends/second/${verb}`, "");
  // Two slow answers on a busy machine, and all would go to the other for a while.
  await operate("drain");
  const load = startLoad(gateway.url, LANES);
  try {
    const isUsed = () => load.got.filter((got) => isServing(got)).length > 10;
    assert.ok(await until(isUsed, 15_000), "in use before");
    await operate("resume");
    await goOn(name, gateway, outage, load);
  } finally {
    await load.stop();
  }
}

const isServing = (got: Got): boolean => got.backend === "first" && got.error === null;

async function goOn(name: string, gateway: Gateway, outage: Outage, load: Load): Promise<void> {
  const failedBefore = await failuresOf(gateway, "first");
  outage.fail();
  const failedAt = performance.now();
  // With few attempts under way the probes may be first to find out: then it has no chance to fail more.
  const isOut = async (): Promise<boolean> =>
    (await stateOf(gateway, "first", outage.opens)) !== "closed" ||
    (await reportOf(gateway, "first")).health === "unhealthy";
  assert.ok(await until(isOut, 20_000), "left alone");
  await load.further(100);
  const lost = (await failuresOf(gateway, "first")) - failedBefore;
  const outMs = performance.now() - failedAt;
  // It is tried again whenever its open time is over: that is what trials are for.
  const trials = Math.ceil(outMs / (0.8 * RESET_MS));
  assert.ok(lost <= LANES + THRESHOLD + trials, `${lost} attempts lost`);

  await outage.mend();
  const mendedAt = performance.now();
  const served = load.got.filter(isServing).length;
  assert.ok(
    await until(() => load.got.filter(isServing).length > served + 5, 20_000),
    "used again",
  );
  const againMs = performance.now() - mendedAt;
  await load.stop();
  const isClosed = async (): Promise<boolean> =>
    (await stateOf(gateway, "first", outage.opens)) === "closed";
  assert.ok(await until(isClosed), "closed by a success");

  const errors = load.got.filter(({ error }) => error !== null);
  for (const { user, stream, backend, committed, error, text } of errors) {
    const isAllowed = outage.breaksStreams && stream && backend === "first" && committed;
    assert.ok(isAllowed, `${user}: ${error} from ${backend}: ${text}`);
  }
  assert.ok(errors.length <= LANES, "no more than were on their way");
  assert.ok(load.got.every(({ attempts }) => attempts >= 1 && attempts <= 2));
  console.log(
    `${name}: ${load.got.length} requests, ${errors.length} streams broken, ${lost} attempts lost ` +
      `(bound ${LANES} in flight + ${THRESHOLD} + ${trials} trials), ` +
      `out for ${Math.round(outMs)} ms, used again ${Math.round(againMs)} ms after it worked`,
  );
}

describe("breaker: one of two backends fails under load", () => {
  it("killed: kill -9, and started again", TIMEOUT, async () => {
    const options = { models: model, behaviour: steady };
    const second = await startEngine(options);
    let first = await startEngineProcess(options);
    const gateway = await startGateway({
      config: {
        backends: [
          { id: "first", kind: "openai", url: first.url, models: model, ...probed },
          { id: "second", kind: "openai", url: second.url, models: model, ...probed },
        ],
        circuitBreaker,
        timeouts,
      },
    });
    try {
      await goThrough("kill -9", gateway, {
        fail: () => first.kill("SIGKILL"),
        mend: async () => {
          first = await startEngineProcess({ ...options, port: first.port });
        },
        breaksStreams: true,
        opens: "none",
      });
    } finally {
      await gateway.stop();
      first.kill("SIGKILL");
      await second.close();
    }
  });

  const withFleet = async (act: (fleet: Fleet<"first" | "second">) => Promise<void>) => {
    const member = { models: model, behaviour: steady, backend: { ...probed, models: model } };
    const fleet = await startFleet({ first: member, second: member }, { circuitBreaker, timeouts });
    try {
      await act(fleet);
    } finally {
      await fleet.close();
    }
  };

  it("a black hole: connections are accepted, nothing is said", TIMEOUT, () =>
    withFleet(({ gateway, engines: { first } }) =>
      goThrough("black hole", gateway, {
        fail: () => first.freeze(),
        mend: () => Promise.resolve(first.thaw()),
        breaksStreams: true,
        opens: "none",
      }),
    ),
  );

  const answering: Record<string, Fault> = {
    "only 500": faults.ollamaLoadFailed,
    "only 200 with an error": faults.errorIn200,
    "only an error as first event, or a 500": faults.vllmFirstEvent,
  };
  for (const [name, fault] of Object.entries(answering)) {
    it(`${name}, while its probes are answered`, TIMEOUT, () =>
      withFleet(async ({ gateway, engines: { first } }) => {
        await goThrough(name, gateway, {
          fail: () => first.behave({ fault }),
          mend: () => Promise.resolve(first.behave({ fault: null })),
          breaksStreams: false,
          opens: "test-model",
        });
        assert.equal((await reportOf(gateway, "first")).health, "healthy");
      }),
    );
  }
});

describe("breaker: every backend fails", () => {
  it(
    "one tries at a time, the others get 503 with a Retry-After; then it is over",
    TIMEOUT,
    async () => {
      const backend = { models: model, healthInterval: 60_000 };
      const fleet = await startFleet(
        { a: { models: model, backend }, b: { models: model, backend } },
        { circuitBreaker: { ...circuitBreaker, resetTimeoutMs: 300 } },
      );
      const engines: FakeEngine[] = Object.values(fleet.engines);
      try {
        for (const engine of engines) engine.behave({ fault: { kind: "drop", by: "reset" } });
        const isOut = async (): Promise<boolean> => {
          expectError(await openaiChat(fleet.url), 502, "upstream_unreachable");
          const states = [await stateOf(fleet.gateway, "a"), await stateOf(fleet.gateway, "b")];
          return states.every((state) => state === "open");
        };
        assert.ok(await until(isOut), "both are open");
        for (const engine of engines) {
          engine.reset();
          engine.behave({ headersDelayMs: 100, fault: { kind: "drop", by: "reset" } });
        }
        const running = (): number =>
          engines
            .flatMap((engine) => engine.inference())
            .filter(({ completed, closedByClient }) => !completed && !closedByClient).length;
        let most = 0;
        const timer = setInterval(() => (most = Math.max(most, running())), 2);
        const all: Got[] = [];
        for (let round = 0; round < 10; round++) {
          const asked = Array.from({ length: 10 }, (_, index) =>
            ask(fleet.url, `${round}-${index}`, index % 2 === 0),
          );
          all.push(...(await Promise.all(asked)));
        }
        clearInterval(timer);
        const sent = engines.reduce((sum, engine) => sum + engine.inference().length, 0);
        assert.equal(most, 1, "one trial at a time");
        const refused = all.filter(({ status }) => status === 503);
        const tried = all.filter(({ status }) => status === 502);
        assert.equal(refused.length + tried.length, all.length);
        assert.ok(refused.length > all.length / 2 && tried.length > 0);
        assert.ok(
          refused.every(({ attempts, retryAfter }) => attempts === 0 && Number(retryAfter) >= 1),
        );
        assert.ok(refused.every(({ error }) => error === "no_backend_available"));
        assert.equal(
          all.reduce((sum, { attempts }) => sum + attempts, 0),
          sent,
        );
        console.log(`all fail: ${all.length} requests, ${sent} trials, ${refused.length} refused`);

        for (const engine of engines) engine.reset();
        assert.ok(await until(async () => (await openaiChat(fleet.url)).status === 200), "over");
        const areClosed = async (): Promise<boolean> => {
          await openaiChat(fleet.url);
          const states = [await stateOf(fleet.gateway, "a"), await stateOf(fleet.gateway, "b")];
          return states.every((state) => state === "closed");
        };
        assert.ok(await until(areClosed), "both are in use");
      } finally {
        await fleet.close();
      }
    },
  );
});

describe("breaker: of a model, and what is told of it", () => {
  let fleet: Fleet<"a" | "b">;
  const config = { circuitBreaker: { failureThreshold: THRESHOLD, resetTimeoutMs: 60_000 } };
  before(async () => {
    const backend = { models: ["x", "y"], healthInterval: 60_000 };
    fleet = await startFleet(
      {
        a: { models: ["x", "y"], backend: { ...backend, weight: 1e6 } },
        b: { models: ["x", "y"], backend },
      },
      config,
    );
  });
  after(() => fleet.close());

  const reload = async (changes: object): Promise<void> => {
    const backends = Object.entries(fleet.engines).map(([id, { kind, url }]) => {
      const weight = id === "a" ? 1e6 : 1;
      return { id, kind, url, models: ["x", "y"], healthInterval: 60_000, weight };
    });
    await fleet.gateway.writeConfig({ ...config, backends, ...changes });
    const { status, text } = await send(`${fleet.url}/admin/api/reload`, {});
    assert.equal(status, 200, text);
  };

  it(
    "a model that fails is left alone, another one on the same backend is not",
    TIMEOUT,
    async () => {
      const { a, b } = fleet.engines;
      a.behaveFor("x", { fault: faults.ollamaLoadFailed });
      for (let count = 0; count < THRESHOLD + 5; count++) {
        const answer = await openaiChat(fleet.url, { model: "x" });
        assert.deepEqual([answer.status, answer.headers.get("x-tidegate-backend")], [200, "b"]);
      }
      assert.equal(a.inference().length, THRESHOLD, "then it is left alone");
      assert.equal(await stateOf(fleet.gateway, "a", "x"), "open");
      assert.equal(await stateOf(fleet.gateway, "a", "y"), "closed");
      assert.equal(await stateOf(fleet.gateway, "a"), "closed");
      const { breaker } = await reportOf(fleet.gateway, "a");
      assert.deepEqual(breaker, { state: "closed", failures: 0, untilAt: null });
      for (let count = 0; count < 10; count++) {
        const answer = await openaiChat(fleet.url, { model: "y" });
        assert.deepEqual([answer.status, answer.headers.get("x-tidegate-backend")], [200, "a"]);
      }
      assert.equal(b.inference().length, THRESHOLD + 5);
    },
  );

  it("failures in a row, and an open breaker, survive a reload", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.reset();
    a.behave({ fault: { kind: "drop", by: "reset" } });
    for (let count = 1; count < THRESHOLD; count++) await openaiChat(fleet.url, { model: "y" });
    const { breaker: before } = await reportOf(fleet.gateway, "a");
    assert.deepEqual(before, { state: "closed", failures: THRESHOLD - 1, untilAt: null });
    await reload({ queue: { maxLength: 100 } });
    assert.deepEqual((await reportOf(fleet.gateway, "a")).breaker, before);
    await openaiChat(fleet.url, { model: "y" });
    const { breaker: open } = await reportOf(fleet.gateway, "a");
    assert.deepEqual([open.state, open.failures], ["open", THRESHOLD]);
    assert.ok((open.untilAt ?? 0) > Date.now(), `${open.untilAt}`);
    assert.equal(await stateOf(fleet.gateway, "a"), "open");
    await reload({ queue: { maxLength: 200 } });
    const { breaker: still } = await reportOf(fleet.gateway, "a");
    assert.equal(still.state, "open");
    // It is counted from two clocks.
    assert.ok(Math.abs((still.untilAt ?? 0) - (open.untilAt ?? 0)) < 1000);
    const sent = a.inference().length;
    for (const name of ["x", "y"]) {
      assert.equal((await openaiChat(fleet.url, { model: name })).status, 200);
    }
    assert.equal(a.inference().length, sent, "left alone");
  });

  it("a client that leaves says nothing of the backend", TIMEOUT, async () => {
    const { b } = fleet.engines;
    b.reset();
    b.behave({ headersDelayMs: 60_000 });
    for (let count = 0; count < THRESHOLD + 1; count++) {
      const leaving = new AbortController();
      const body = chatBody({ model: "y" });
      const asked = open(`${fleet.url}/v1/chat/completions`, body, { signal: leaving.signal });
      assert.ok(await until(() => b.inference().length === count + 1));
      leaving.abort();
      await assert.rejects(asked);
    }
    assert.ok(await until(() => b.inference().every(({ closedByClient }) => closedByClient)));
    assert.deepEqual((await reportOf(fleet.gateway, "b")).breaker, {
      state: "closed",
      failures: 0,
      untilAt: null,
    });
    b.reset();
    assert.equal((await openaiChat(fleet.url, { model: "y" })).status, 200);
  });

  for (const [how, more] of [
    ["alone", {}],
    ["with a flight", { temperature: 0, seed: 1 }],
  ] as const) {
    it(`nor does one that has little patience, ${how}`, TIMEOUT, async () => {
      const engines = Object.values(fleet.engines);
      for (const engine of engines) engine.reset();
      for (const engine of engines) engine.behave({ headersDelayMs: 60_000 });
      const hasty = { headers: { "x-stainless-timeout": "0.2" } };
      for (let count = 0; count < 2 * THRESHOLD; count++) {
        const late = await openaiChat(fleet.url, { model: "y", ...more }, hasty);
        expectError(late, 504, "upstream_timeout");
      }
      const sent = engines.map((engine) => engine.inference().length);
      assert.ok(Math.max(...sent) >= THRESHOLD, sent.join());
      assert.equal(await stateOf(fleet.gateway, "b", "y"), "closed");
      for (const engine of engines) engine.reset();
      assert.equal((await openaiChat(fleet.url, { model: "y", ...more })).status, 200);
    });
  }
});
