/** Everything at once: whatever engines and clients do, nothing is lost, nothing is left (design §8 invariants). */
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import type { Random } from "../support/client.ts";
import {
  chatBody,
  connect,
  openaiChat,
  parseSse,
  postBytes,
  seeded,
  sleep,
  until,
} from "../support/client.ts";
import type { Behaviour, Fault } from "../support/engine-behaviour.ts";
import { calm, faults } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";

const REQUESTS = 800;
const LANES = 24;
const SLOTS = 3;

describe("chaos", () => {
  let random: Random;
  let fleet: Fleet<"a" | "b" | "c">;
  before(async () => {
    random = seeded("chaos");
    const backend = { concurrency: SLOTS, healthInterval: 300, timeout: 200 };
    fleet = await startFleet(
      {
        a: { models: ["m", "n"], backend },
        b: { models: ["m"], backend },
        c: { models: ["m", "n"], backend },
      },
      {
        queue: { maxWaitMs: 1500, maxLength: 12, heartbeatMs: 60 },
        timeouts: { connectMs: 300, firstByteMs: 700, idleMs: 250, clientMs: 500, totalMs: 1500 },
        models: { n: { concurrency: 4 } },
        circuitBreaker: { resetTimeoutMs: 60 },
      },
    );
  });
  after(() => fleet.close());

  function someFault(): Fault | null {
    const by = random.pick(["reset", "fin", "eof", "silence"] as const);
    if (random.next() < 0.35) return null;
    return random.pick<Fault>([
      { kind: "hang" },
      { kind: "drop", by: "reset" },
      { kind: "cut", afterTokens: random.between(0, 5), by },
      { kind: "cut", afterBytes: random.between(1, 900), by },
      {
        kind: "error",
        afterTokens: random.between(0, 4),
        ends: random.pick(["done", "eof", "reset"]),
      },
      { kind: "endless", finish: random.next() < 0.5 },
      { kind: "unstreamed" },
      faults.ollamaSwallowed(1),
      faults.ollamaBusy,
      faults.busyFor(2),
      faults.loadingModel,
      faults.ollamaLoadFailed,
      faults.htmlGateway(random.pick([200, 502])),
      faults.sglangFlat,
      faults.errorIn200,
    ]);
  }

  function someBehaviour(): Partial<Behaviour> {
    return {
      ...calm,
      fault: someFault(),
      probeFault:
        random.next() < 0.1
          ? random.pick<Fault>([{ kind: "hang" }, faults.htmlGateway(500)])
          : null,
      headersDelayMs: random.pick([0, 0, 5, 30, 120]),
      firstTokenDelayMs: random.pick([0, 0, 10, 90]),
      tokenDelayMs: random.pick([0, 0, 2, 8]),
      tokens: random.between(0, 8),
      chunking: random.pick(["event", "once", 5, 64] as const),
      lineEnd: random.pick(["\n", "\r\n"] as const),
      pings: random.pick(["none", "bare", "comment"] as const),
    };
  }

  /** What a client that stays is entitled to. */
  function checkAnswer(stream: boolean, status: number, text: string): void {
    if (status !== 200) {
      const { error } = JSON.parse(text) as { error: { message: string; code: string | null } };
      assert.ok(error.message.length > 0, text);
      assert.notEqual(error.code, "internal_error", text);
      assert.ok([400, 429, 502, 503, 504].includes(status), `${status} ${text}`);
      return;
    }
    if (!stream) return void JSON.parse(text);
    const { events, rest } = parseSse(text);
    assert.equal(rest, "", "ends at a boundary");
    const errors = events.filter(({ data }) => data?.startsWith('{"error":') === true);
    assert.ok(errors.length <= 1, text);
    const isDone = text.includes("[DONE]");
    if (errors.length === 1) {
      assert.equal(events.at(-1), errors[0], "nothing after an error");
      assert.ok(!isDone, text);
    } else assert.ok(isDone || /"finish_reason":"\w/.test(text), `whole without an end: ${text}`);
  }

  it(`${REQUESTS} requests, a third of them left`, { timeout: 90_000 }, async () => {
    const engines = Object.values(fleet.engines);
    let isOver = false;
    let most = 0;
    const weather = (async (): Promise<void> => {
      while (!isOver) {
        random.pick(engines).behave(someBehaviour());
        for (const engine of engines)
          most = Math.max(most, engine.activeGenerations() + engine.waiting());
        await sleep(15);
      }
    })();
    let left = REQUESTS;
    const statuses: Record<string, number> = {};
    const one = async (): Promise<void> => {
      const stream = random.next() < 0.6;
      const body = chatBody({ model: random.pick(["m", "m", "n"]), stream });
      if (random.next() < 0.33) {
        const client = await connect(fleet.gateway.port);
        client.write(postBytes("/v1/chat/completions", body));
        await sleep(4 + random.next() * 150);
        client.leave(random.pick(["fin", "close", "reset"] as const));
        await sleep(5);
        return client.leave("close");
      }
      const { status, text } = await openaiChat(fleet.url, body);
      statuses[status] = (statuses[status] ?? 0) + 1;
      checkAnswer(stream, status, text);
    };
    const lane = async (): Promise<void> => {
      while (left > 0) {
        left -= 1;
        await one();
      }
    };
    await Promise.all(Array.from({ length: LANES }, lane));
    isOver = true;
    await weather;
    console.log(`chaos: ${JSON.stringify(statuses)}, at most ${most} at an engine`);
    assert.ok((statuses[200] ?? 0) > REQUESTS / 10, "most of the weather is fine");
    assert.ok(most <= SLOTS, "never more than the slots");
    for (const engine of engines) engine.reset();
    for (const gauge of [
      "tidegate_requests_in_flight",
      "tidegate_slots_in_use",
      "tidegate_queue_requests",
      "tidegate_held_body_bytes",
    ]) {
      assert.ok(
        await until(async () => (await fleet.gateway.metric(gauge)) === 0, 5000),
        `${gauge} is not 0`,
      );
    }
    assert.ok(await until(() => engines.every((engine) => engine.activeGenerations() === 0)));
    const records = fleet.gateway.records();
    assert.ok(
      records.length <= REQUESTS && records.length >= REQUESTS * 0.95,
      `${records.length} records`,
    );
    assert.equal(new Set(records.map(({ request_id }) => request_id)).size, records.length);
    assert.equal(await fleet.gateway.metric("tidegate_requests_total"), records.length);
    assert.equal(await fleet.gateway.metric("tidegate_endings_total"), records.length);
    const attempts = records.reduce((sum, record) => sum + Number(record.attempts), 0);
    assert.equal(await fleet.gateway.metric("tidegate_attempts_total"), attempts);
    // Busy refusals count as attempts and as retries, but use up nobody's second attempt.
    const failures = await fleet.gateway.metric("tidegate_attempts_total", { outcome: "failure" });
    const saturated = await fleet.gateway.metric("tidegate_attempts_total", {
      outcome: "saturated",
    });
    assert.ok(attempts - saturated <= 2 * records.length);
    console.log(
      `chaos: ${attempts} attempts, ${failures} failed, ${saturated} found a busy engine`,
    );
    // The weather is over: all is as before.
    for (const model of ["m", "n"]) {
      const isWell = async (): Promise<boolean> =>
        (await openaiChat(fleet.url, { model })).status === 200;
      assert.ok(await until(isWell, 5000), model);
    }
  });
});
