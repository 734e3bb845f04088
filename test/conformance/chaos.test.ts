/**
 * Everything at once: whatever engines, clients and operators do, nothing is lost, nothing is left (design §8
 * invariants). Many short runs, each with a weather, clients and backends of its own, side by side at several
 * gateways; what `test/resilience/virtual.test.ts` does in virtual time, on sockets.
 *
 * `RUNS=10000 bun test test/conformance/chaos.test.ts` runs more; `SEED=… RUNS=1` repeats a run.
 */
import assert from "node:assert/strict";
import process from "node:process";
import { describe, it } from "node:test";
import type { RawClient } from "../support/client.ts";
import {
  chatBody,
  connect,
  openaiChat,
  parseSse,
  postBytes,
  seeded,
  send,
  sleep,
  until,
} from "../support/client.ts";
import type { FakeEngine } from "../support/engine.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";
import type { LogRecord } from "../support/gateway.ts";
import { sumOf } from "../support/gateway.ts";
import type { Ask, EngineId, Plan, Reload } from "./chaos-plan.ts";
import { ENGINES, planOf } from "./chaos-plan.ts";

/** So many that everything happens. */
const MANY_RUNS = 300;
const RUNS = Number(process.env.RUNS ?? MANY_RUNS);
/** Most of a run is waiting. */
const GATEWAYS = Math.min(6, RUNS);
/** Its log is read again after each. */
const RUNS_PER_GATEWAY = 100;
const SLOTS = 2;
/** Longer than any wait that a run's settings allow. */
const PATIENCE_MS = 10_000;

const GAUGES = [
  "tidegate_requests_in_flight",
  "tidegate_slots_in_use",
  "tidegate_queue_requests",
  "tidegate_held_body_bytes",
];

const SETTINGS = {
  queue: { maxWaitMs: 500, maxLength: 4, heartbeatMs: 40 },
  timeouts: { connectMs: 150, firstByteMs: 350, idleMs: 120, clientMs: 400, totalMs: 600 },
  circuitBreaker: { failureThreshold: 2, resetTimeoutMs: 60 },
  models: { n: { concurrency: 3 } },
};
const OTHER_SETTINGS = {
  ...SETTINGS,
  queue: { maxWaitMs: 100, maxLength: 1, heartbeatMs: 0 },
  circuitBreaker: { failureThreshold: 1, resetTimeoutMs: 300 },
};

/** A gateway with its engines, one run after the other. */
interface Lane {
  fleet: Fleet<EngineId>;
  /** How often its configuration was put back. */
  turn: number;
  /** The run before has left another one. */
  isChanged: boolean;
  /** As the run before left them. */
  metrics: string;
  records: number;
}

/** What all runs saw together. */
const seen = {
  requests: 0,
  attempts: 0,
  busy: 0,
  /** Requests of clients that left at once. */
  unread: 0,
  /** At one engine at a time. */
  most: 0,
  statuses: {} as Record<string, number>,
  left: {} as Record<string, number>,
  reloads: {} as Record<string, number>,
};

function count(counts: Record<string, number>, key: string): void {
  counts[key] = (counts[key] ?? 0) + 1;
}

/** @param reload null: as every run begins, with ids that are new where another one has to be put back. */
function configOf({ fleet: { engines }, turn }: Lane, reload: Reload | null): object {
  const { a, b, c, spare } = engines;
  const all = { a: reload === "move" ? spare : a, b, c, spare };
  const leftOut = { a: false, b: reload === "remove", c: false, spare: reload !== "add" };
  const ids = ENGINES.filter((id) => !leftOut[id]);
  return {
    ...(reload === "settings" ? OTHER_SETTINGS : SETTINGS),
    ...(reload === "invalid" && { queue: { maxLength: "many" } }),
    backends: ids.map((id) => ({
      id: `${id}${turn % 2}`,
      kind: "openai",
      url: all[id].url,
      models: id === "b" ? ["m"] : ["m", "n"],
      concurrency: SLOTS,
      healthInterval: 500,
      timeout: 300,
    })),
  };
}

async function reload(lane: Lane, how: Reload | null): Promise<void> {
  await lane.fleet.gateway.writeConfig(configOf(lane, how));
  const { status, text } = await send(`${lane.fleet.url}/admin/api/reload`, "");
  assert.equal(status, how === "invalid" ? 400 : 200, text);
  lane.isChanged = how !== null;
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

/** Sends one request and leaves, or stays for the whole answer and on the connection. */
async function ask(port: number, asked: Ask, id: string): Promise<RawClient> {
  await sleep(asked.at);
  const { model, stream, bytes, leave } = asked;
  const messages = [{ role: "user", content: "word ".repeat(bytes / 5) }];
  const body = chatBody({ model, stream, messages });
  const request = postBytes("/v1/chat/completions", body, { "X-Request-Id": id });
  const client = await connect(port);
  client.write(leave?.after === "half" ? request.slice(0, -request.length / 3) : request);
  if (leave === null) {
    const isOver = (): boolean => client.body() !== null || client.isClosed();
    assert.ok(await until(isOver, PATIENCE_MS), `somebody waits for ever:\n${client.received()}`);
    return client;
  }
  if (leave.after === "answer") await until(() => client.received() !== "", PATIENCE_MS);
  await sleep(leave.ms);
  client.leave(leave.by);
  await sleep(5);
  client.leave("close");
  return client;
}

/** Behind the end of a run nothing runs, waits, is held or is open. */
async function checkNothingLeft({ fleet }: Lane): Promise<string> {
  const engines = Object.values(fleet.engines);
  const open = (): string[] =>
    engines.flatMap((engine, at) => {
      const counts = [engine.activeGenerations(), engine.waiting(), engine.openConnections()];
      if (counts.every((each) => each === 0)) return [];
      const lasting = engine.requests.filter(({ completed, closedAt }) => !completed && !closedAt);
      const which = lasting.map(({ method, path, status }) => `${method} ${path} ${status}`);
      return [`${ENGINES[at]} ${counts.join("/")}: ${which.join(", ")}`];
    });
  assert.ok(await until(() => open().length === 0), `an upstream is open: ${open().join("; ")}`);
  let text = "";
  const left = async (): Promise<string[]> => {
    text = await fleet.gateway.metrics();
    return GAUGES.filter((gauge) => sumOf(text, gauge) !== 0);
  };
  const isOver = await until(async () => (await left()).length === 0);
  assert.ok(isOver, `not zero: ${(await left()).join()}`);
  return text;
}

/** Of a request's attempts at engines that were not busy there is one, and one more elsewhere. */
function checkAttempts(engines: Record<EngineId, FakeEngine>, most: number): void {
  const attempts = new Map<string, string[]>();
  let reached = 0;
  for (const id of ENGINES) {
    for (const { headers, status } of engines[id].inference()) {
      reached++;
      const request = headers["x-request-id"] ?? "";
      if (status === 429 || status === 503) seen.busy++;
      else attempts.set(request, [...(attempts.get(request) ?? []), id]);
    }
  }
  assert.ok(reached <= most, `${reached} attempts at the engines, ${most} in the records`);
  for (const [request, ids] of attempts) {
    assert.ok(ids.length <= 2 && new Set(ids).size === ids.length, `${request}: ${ids.join()}`);
  }
}

async function reloadLater(lane: Lane, { at, how }: { at: number; how: Reload }): Promise<void> {
  await sleep(at);
  await reload(lane, how);
  count(seen.reloads, how);
}

/** Lets all of it happen. Resolves with the clients, whether they stayed or not. */
async function happen(lane: Lane, plan: Plan, idOf: (at: number) => string): Promise<RawClient[]> {
  const { engines, gateway } = lane.fleet;
  const asking = Promise.all(plan.requests.map((each, at) => ask(gateway.port, each, idOf(at))));
  const blowing = plan.weather.map(async ({ at, engine, behaviour }) => {
    await sleep(at);
    for (const each of Object.values(engines)) {
      seen.most = Math.max(seen.most, each.activeGenerations() + each.waiting());
    }
    if (behaviour === "frozen") engines[engine].freeze();
    else engines[engine].behave(behaviour);
  });
  const reloading = plan.reload === null ? null : reloadLater(lane, plan.reload);
  const [clients] = await Promise.all([asking, reloading, ...blowing]);
  for (const engine of Object.values(engines)) {
    engine.thaw();
    // A probe that hangs would be one that is open, again and again.
    engine.behave({ probeFault: null });
  }
  return clients;
}

/** Whoever stayed was answered once and truly; whoever sent a request has one record of it. */
function checkClient({ leave, stream }: Ask, client: RawClient, own: readonly LogRecord[]): void {
  const status = client.status();
  const answers = client.received().match(/^HTTP\/1\.1 /gm)?.length ?? 0;
  if (leave !== null) {
    // One that left at once was perhaps never read.
    assert.ok(own.length <= 1 && answers <= 1, `${own.length} records, ${answers} answers`);
    if (own.length === 0) seen.unread++;
    else if (own[0]?.ending === "cancelled") count(seen.left, String(own[0].cause));
    return;
  }
  checkAnswer(stream, status ?? 0, client.body() ?? "");
  assert.equal(own.length, 1, `a request with ${own.length} records`);
  assert.equal(own[0]?.status, status);
  assert.equal(answers, 1, `answered ${answers} times:\n${client.received()}`);
  count(seen.statuses, String(status));
  client.leave("close");
}

async function run(lane: Lane, seed: number): Promise<void> {
  const plan = planOf(seed);
  const { gateway, engines } = lane.fleet;
  if (lane.isChanged) {
    lane.turn++;
    await reload(lane, null);
  }
  lane.fleet.reset();
  const idOf = (at: number): string => `${seed}-${at}`;
  const clients = await happen(lane, plan, idOf);
  const metrics = await checkNothingLeft(lane);

  const increase = (name: string, labels = {}): number =>
    sumOf(metrics, name, labels) - sumOf(lane.metrics, name, labels);
  const ended = increase("tidegate_requests_total");
  const newRecords = (): LogRecord[] => gateway.records().slice(lane.records);
  assert.ok(await until(() => newRecords().length >= ended), "every end has a record");
  const records = newRecords();
  assert.equal(records.length, ended, "no end has two records");
  assert.equal(increase("tidegate_endings_total"), ended);
  const attempts = records.reduce((sum, record) => sum + Number(record.attempts), 0);
  assert.equal(increase("tidegate_attempts_total"), attempts);
  // Those that found a busy engine use up nobody's second attempt.
  const saturated = increase("tidegate_attempts_total", { outcome: "saturated" });
  assert.ok(attempts - saturated <= 2 * records.length);
  checkAttempts(engines, attempts);
  for (const [at, client] of clients.entries()) {
    const own = records.filter(({ client_request_id }) => client_request_id === idOf(at));
    checkClient(plan.requests[at] as Ask, client, own);
  }
  lane.metrics = metrics;
  lane.records += records.length;
  seen.requests += clients.length;
  seen.attempts += attempts;
}

/** The weather is over: all is as before. */
async function checkWell({ fleet }: Lane): Promise<void> {
  fleet.reset();
  for (const model of ["m", "n"]) {
    const isWell = async (): Promise<boolean> =>
      (await openaiChat(fleet.url, { model })).status === 200;
    assert.ok(await until(isWell), model);
  }
}

async function startLane(): Promise<Lane> {
  const member = { models: ["m", "n"] };
  const fleet = await startFleet({ a: member, b: member, c: member, spare: member });
  return { fleet, turn: 0, isChanged: true, metrics: "", records: 0 };
}

describe("chaos", () => {
  it(`${RUNS} runs, nothing lost and nothing left`, { timeout: 60_000 + RUNS * 1000 }, async () => {
    const { seed: first } = seeded("chaos");
    const began = performance.now();
    let next = 0;
    const runs = async (lane: Lane): Promise<void> => {
      for (let at = 0; at < RUNS_PER_GATEWAY && next < RUNS; at++) {
        const seed = first + next++;
        await run(lane, seed).catch((error: unknown) => {
          next = RUNS;
          const said = error instanceof Error ? error.message : String(error);
          throw new Error(`SEED=${seed} RUNS=1 repeats this run: ${said}`, { cause: error });
        });
      }
      await checkWell(lane);
    };
    const work = async (): Promise<void> => {
      while (next < RUNS) {
        const lane = await startLane();
        const ran = await Promise.allSettled([runs(lane)]);
        const closed = await Promise.allSettled([lane.fleet.close()]);
        for (const end of [...ran, ...closed]) if (end.status === "rejected") throw end.reason;
      }
    };
    await Promise.all(Array.from({ length: GATEWAYS }, work));
    const { requests, attempts, most, ...counts } = seen;
    const seconds = ((performance.now() - began) / 1000).toFixed(0);
    console.log(
      `chaos: ${RUNS} runs, ${requests} requests, ${attempts} attempts, at most ${most} at an engine, in ${seconds} s: ${JSON.stringify(counts)}`,
    );
    assert.ok(most <= SLOTS, "never more than the slots");
    if (RUNS < MANY_RUNS) return;
    assert.ok((counts.statuses[200] ?? 0) > requests / 10, "much of the weather is fine");
    for (const phase of ["queued", "connecting", "first_token", "streaming"]) {
      assert.ok((counts.left[phase] ?? 0) > 0, `nobody left ${phase}`);
    }
  });
});
