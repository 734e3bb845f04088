/**
 * When the client leaves, the work stops: in every phase, streaming or not, however it leaves, with garbage
 * collected all the time (design §1.3, §3 Abort; runtimes §a).
 */
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import type { Random } from "../support/client.ts";
import {
  chatBody,
  connect,
  openaiChat,
  postBytes,
  seeded,
  sleep,
  until,
  writeInParts,
} from "../support/client.ts";
import { effort } from "../support/effort.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { FullPort } from "../support/full-port.ts";
import { startFullPort } from "../support/full-port.ts";
import type { Gateway } from "../support/gateway.ts";
import { GC_PRELOAD, startGateway } from "../support/gateway.ts";

const FOR_EVER = Number.POSITIVE_INFINITY;
const ABORTS = effort(150);
const LANES = 10;
/** Shorter, and a RST may take the request back before the gateway has read it. */
const LEAST_STAY_MS = 4;

interface Phase {
  models: string[];
  /** What the record calls it, for streams. */
  cause: string;
  mostStayMs: number;
  /** Wait for a byte of the answer before the clock starts. */
  afterFirstByte?: boolean;
}

const phases: Record<string, Phase> = {
  queued: { models: ["queued"], cause: "queued", mostStayMs: 25 },
  connecting: { models: ["connecting"], cause: "connecting", mostStayMs: 25 },
  "waiting for headers": { models: ["headers"], cause: "connecting", mostStayMs: 25 },
  "before the first token": { models: ["first-token"], cause: "first_token", mostStayMs: 30 },
  "mid-stream": { models: ["middle"], cause: "streaming", mostStayMs: 30, afterFirstByte: true },
  "between retries": { models: ["retried", "retried-in-vain"], cause: "retrying", mostStayMs: 120 },
};

describe("clients that leave", () => {
  let random: Random;
  let gateway: Gateway;
  let full: FullPort;
  const engines = {} as Record<"queue" | "main" | "breaks" | "waits" | "narrow", FakeEngine>;
  const blockers = new AbortController();
  let blocked: Promise<unknown>[] = [];

  before(async () => {
    random = seeded("abort");
    full = await startFullPort();
    engines.queue = await startEngine({
      models: ["queued"],
      behaviour: { headersDelayMs: FOR_EVER },
    });
    engines.main = await startEngine({ models: ["headers", "first-token", "middle", "well"] });
    engines.main.behaveFor("headers", { headersDelayMs: FOR_EVER });
    engines.main.behaveFor("first-token", { firstTokenDelayMs: FOR_EVER });
    engines.main.behaveFor("middle", {
      tokens: 5000,
      tokenDelayMs: 3,
      wholePauseMs: FOR_EVER,
    });
    engines.breaks = await startEngine({
      models: ["retried", "retried-in-vain"],
      behaviour: { headersDelayMs: 20, fault: { kind: "drop", by: "reset" } },
    });
    // The second attempt waits for its headers at the one, for a slot at the other.
    const behaviour = { headersDelayMs: FOR_EVER };
    engines.waits = await startEngine({ models: ["retried-in-vain"], behaviour });
    engines.narrow = await startEngine({ models: ["retried", "holder"], behaviour });
    const backends: Record<string, unknown>[] = [
      { id: "queue", url: engines.queue.url, concurrency: 1 },
      { id: "main", url: engines.main.url },
      { id: "breaks", url: engines.breaks.url, weight: 1e6 },
      { id: "waits", url: engines.waits.url },
      { id: "narrow", url: engines.narrow.url, concurrency: 1 },
      { id: "full", url: full.url, models: ["connecting"], timeout: 200 },
    ];
    gateway = await startGateway({
      preload: GC_PRELOAD,
      config: {
        backends: backends.map((backend) => ({
          kind: "openai",
          healthInterval: 600_000,
          concurrency: 64,
          ...backend,
        })),
        // The full port fails its probe; a second failure would make it a matter of trials.
        timeouts: { connectMs: 600_000 },
        // Nor may those that break off: then nothing would be tried again.
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    });
    // Whoever holds the only slot, there and there.
    blocked = ["queued", "holder"].map((model) =>
      openaiChat(gateway.url, { model }, { signal: blockers.signal }).catch(() => null),
    );
    const held = (): number =>
      engines.queue.activeGenerations() + engines.narrow.activeGenerations();
    assert.ok(await until(() => held() === 2));
  });

  after(async () => {
    blockers.abort();
    await Promise.all(blocked);
    await gateway.stop();
    full.close();
    for (const engine of Object.values(engines)) await engine.close();
  });

  let sent = 0;
  async function abortOnce(phase: Phase, stream: boolean, mostStayMs: number): Promise<void> {
    // An answer in one piece that is half there is held: nothing of it is seen.
    // A stream's headers may be held back until its first byte: nothing is seen before it either.
    const body = chatBody({
      model: random.pick(phase.models),
      stream,
      pad: "x".repeat(random.pick([0, 0, 3000, 70_000])),
    });
    const bytes = postBytes("/v1/chat/completions", body);
    const client = await connect(gateway.port);
    sent += 1;
    await writeInParts(client, bytes, random.pick([1, 1, 2, 3]));
    if (phase.afterFirstByte === true && stream) await until(() => client.received().length > 0);
    await sleep(LEAST_STAY_MS + random.next() * mostStayMs);
    client.leave(random.pick(["fin", "close", "reset"] as const));
    // The half-closed one is closed by the gateway.
    await Promise.race([client.closed, sleep(1000)]);
    client.leave("close");
  }

  const generating = (): number =>
    engines.main.activeGenerations() +
    engines.breaks.activeGenerations() +
    engines.waits.activeGenerations();

  for (const [name, phase] of Object.entries(phases)) {
    for (const stream of [true, false]) {
      it(
        `${ABORTS} times ${name}, ${stream ? "streaming" : "in one piece"}`,
        { timeout: 300_000 },
        async () => {
          const before = gateway.records().length;
          const reached = (): boolean =>
            gateway
              .records()
              .slice(before)
              .some(({ cause }) => cause === phase.cause);
          // On a machine that is busy it takes longer to get there.
          for (let slower = 1; slower <= 256; slower *= 4) {
            let left = ABORTS;
            const lane = async (): Promise<void> => {
              while (left > 0) {
                left -= 1;
                await abortOnce(phase, stream, phase.mostStayMs * slower);
              }
            };
            await Promise.all(Array.from({ length: LANES }, lane));
            if (!stream || (await until(reached, 500))) break;
          }
          const inFlight = (): Promise<number> => gateway.metric("tidegate_requests_in_flight");
          // Those that hold the slots go on.
          assert.ok(
            await until(async () => (await inFlight()) === blocked.length),
            `${await inFlight()} in flight`,
          );
          assert.ok(await until(() => generating() === 0), `${generating()} still generate`);
          const records = gateway.records().slice(before);
          assert.ok(records.length >= ABORTS * 0.9, `${records.length} records`);
          // Of those who stay for long some learn that no further one may wait for a second attempt.
          const beyond = phase.cause === "retrying" ? "upstream_unreachable" : "none";
          const left = records.filter(({ cause }) => cause !== beyond);
          assert.deepEqual([...new Set(left.map(({ ending }) => ending))], ["cancelled"]);
          const causes = new Set(left.map(({ cause }) => String(cause)));
          if (stream) assert.ok(causes.has(phase.cause), `${phase.cause} in ${[...causes].join()}`);
          for (const cause of causes) {
            assert.match(
              cause,
              /^(accepting|queued|loading|connecting|first_token|streaming|retrying)$/,
            );
          }
        },
      );
    }
  }

  it("nothing is left of all that", { timeout: 60_000 }, async () => {
    blockers.abort();
    await Promise.all(blocked);
    const all = Object.values(engines);
    const connections = (): number =>
      all.reduce((sum, engine) => sum + engine.openConnections(), 0);
    const active = (): number => all.reduce((sum, engine) => sum + engine.activeGenerations(), 0);
    assert.ok(
      await until(() => connections() + active() === 0),
      `${connections()} open, ${active()} active`,
    );
    for (const gauge of [
      "tidegate_requests_in_flight",
      "tidegate_slots_in_use",
      "tidegate_queue_requests",
      "tidegate_held_body_bytes",
    ]) {
      assert.ok(await until(async () => (await gateway.metric(gauge)) === 0), `${gauge} is not 0`);
    }
    assert.equal((await openaiChat(gateway.url, { model: "well" })).status, 200);
    assert.ok(
      await until(
        async () => (await gateway.metric("tidegate_requests_total")) === gateway.records().length,
      ),
    );
    const records = gateway.records();
    const endings = await gateway.metric("tidegate_endings_total");
    assert.equal(endings, records.length, "every request has one ending");
    const ids = new Set(records.map(({ request_id }) => request_id));
    assert.equal(ids.size, records.length, "one record per request");
    assert.ok(
      records.length <= sent + 3 && records.length >= sent * 0.95,
      `${records.length} of ${sent}`,
    );
    assert.match(gateway.stderr(), /gc: every/);
    assert.doesNotMatch(gateway.stderr(), /unhandled|uncaught|rejection/i);
  });
});
