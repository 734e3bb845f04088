/** Who is served first, and what the operator is told of whom (contract §1 tenants, §2, §5, §6). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, RawClient } from "../support/client.ts";
import {
  chatBody,
  connect,
  openaiChat,
  postBytes,
  seeded,
  send,
  sleep,
  until,
} from "../support/client.ts";
import { faults } from "../support/engine-behaviour.ts";
import { expectError, startFleet, type Fleet } from "../support/fleet.ts";
import type { LogRecord } from "../support/gateway.ts";
import { by, isQuiet, tenantOf, tenantsOf, withKeys } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };

describe("one slot and many who want it", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { backend: { concurrency: 1 } } },
      withKeys({
        blocker: {},
        vip: { priority: "interactive" },
        plain: {},
        bulk: { priority: "batch" },
        light: { weight: 1 },
        heavy: { weight: 2 },
      }),
    );
  });
  afterEach(async () => {
    await isQuiet(fleet.gateway);
    fleet.reset();
  });
  after(() => fleet.close());

  const isQueued = (count: number): Promise<boolean> =>
    until(async () => (await fleet.gateway.metric("tidegate_queue_requests")) === count);

  async function raw(tenant: string, body: object): Promise<RawClient> {
    const client = await connect(fleet.gateway.port);
    client.write(postBytes("/v1/chat/completions", chatBody({ ...body }), by(tenant).headers));
    return client;
  }

  interface Wish {
    tenant: string;
    /** Of the body, to be known by. */
    user: string;
    /** As the header has it. */
    priority?: string;
    body?: object;
  }

  /** In which order these are served, once all of them have waited for the slot, in this order. */
  async function order(wishes: readonly Wish[]): Promise<string[]> {
    const { a } = fleet.engines;
    a.behave({ stallAfterTokens: 1 });
    const blocker = await raw("blocker", { stream: true, user: "blocker" });
    assert(await until(() => a.activeGenerations() === 1));
    a.behave({ stallAfterTokens: null });
    const answers: Promise<Answer>[] = [];
    for (const { tenant, user, priority, body } of wishes) {
      const more = priority === undefined ? {} : { "x-tidegate-priority": priority };
      answers.push(openaiChat(fleet.url, { user, ...body }, by(tenant, more)));
      assert(await isQueued(answers.length), user);
    }
    blocker.leave("close");
    for (const answer of await Promise.all(answers)) assert.equal(answer.status, 200, answer.text);
    return a
      .inference()
      .map(({ json }) => String(json["user"]))
      .slice(1);
  }

  it("interactive before default before batch, however late", TIMEOUT, async () => {
    const wishes = ["bulk", "plain", "vip", "bulk", "plain", "vip"].map((tenant, at) => {
      return { tenant, user: `${tenant} ${at}` };
    });
    assert.deepEqual(await order(wishes), [
      "vip 2",
      "vip 5",
      "plain 1",
      "plain 4",
      "bulk 0",
      "bulk 3",
    ]);
  });

  it("a request may go back in the line, and never forward", TIMEOUT, async () => {
    const served = await order([
      { tenant: "bulk", user: "bulk, interactive?", priority: "interactive" },
      { tenant: "vip", user: "vip as batch", priority: "batch" },
      { tenant: "plain", user: "plain, interactive?", priority: "interactive" },
      { tenant: "vip", user: "vip as default", priority: "Default" },
      { tenant: "vip", user: "vip", priority: "interactive" },
      { tenant: "bulk", user: "bulk, default?", priority: "default" },
    ]);
    const classes = [served.slice(0, 1), served.slice(1, 3), served.slice(3)];
    assert.deepEqual(
      classes.map((each) => each.toSorted()),
      [
        ["vip"],
        ["plain, interactive?", "vip as default"],
        ["bulk, default?", "bulk, interactive?", "vip as batch"],
      ],
    );
  });

  it("refuses a priority that does not exist, and names the header", TIMEOUT, async () => {
    for (const priority of ["urgent", "", "1", "interactive, batch"]) {
      const init = by("vip", { "x-tidegate-priority": priority });
      const error = expectError(await openaiChat(fleet.url, {}, init), 400, "invalid_parameter");
      assert.equal(error.param, "x-tidegate-priority");
      assert.match(error.message, /x-tidegate-priority .*interactive, default, batch/);
    }
    assert.equal(fleet.engines.a.inference().length, 0);
  });

  it("tenants with weights 1 and 2 get slots as 1 to 2 while both wait", TIMEOUT, async () => {
    fleet.engines.a.behave({ promptTokens: 40, tokens: 25 });
    const each = Array.from({ length: 12 }, (_, at) => at);
    const wishes = [
      ...each.map((at) => ({ tenant: "light", user: `light ${at}` })),
      ...each.map((at) => ({ tenant: "heavy", user: `heavy ${at}` })),
    ];
    const served = await order(wishes);
    for (const tenant of ["light", "heavy"]) {
      const own = served.filter((user) => user.startsWith(tenant));
      assert.deepEqual(
        own,
        each.map((at) => `${tenant} ${at}`),
        "in a tenant by arrival",
      );
    }
    // The heavy one has work for 18 grants, of which it gets 12.
    const bothWait = served.slice(0, 18);
    let lead = 0;
    for (const user of bothWait) {
      lead += user.startsWith("light") ? 2 : -1;
      assert(Math.abs(lead) <= 3, `${bothWait.join(", ")}`);
    }
    assert(Math.abs(lead) <= 1, `${bothWait.join(", ")}`);
  });

  it("an answer twice as long counts twice", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ promptTokens: 10, tokens: 1000 });
    const each = Array.from({ length: 9 }, (_, at) => at);
    const wish = (tenant: string, max_tokens: number) => (at: number) => {
      return { tenant, user: `${tenant} ${at}`, body: { max_tokens } };
    };
    const served = await order([...each.map(wish("plain", 190)), ...each.map(wish("light", 90))]);
    const plain = served.slice(0, 12).filter((user) => user.startsWith("plain")).length;
    assert(
      plain >= 3 && plain <= 5,
      `${plain} of 12 for who asks for twice as much: ${served.join(", ")}`,
    );
  });

  it("who joins a flight lifts it to its own priority", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ stallAfterTokens: 1 });
    const blocker = await raw("blocker", { stream: true, user: "blocker" });
    assert(await until(() => a.activeGenerations() === 1));
    a.behave({ stallAfterTokens: null });
    const same = { temperature: 0, user: "flight" };
    const batch = by("vip", { "x-tidegate-priority": "batch" });
    const answers = [openaiChat(fleet.url, same, batch)];
    assert(await isQueued(1));
    answers.push(openaiChat(fleet.url, { user: "plain" }, by("plain")));
    assert(await isQueued(2));
    answers.push(openaiChat(fleet.url, same, by("vip")));
    assert(await until(async () => (await tenantOf(fleet.url, "vip")).queued === 2));
    blocker.leave("close");
    for (const answer of await Promise.all(answers)) assert.equal(answer.status, 200, answer.text);
    const users = a.inference().map(({ json }) => json["user"]);
    assert.deepEqual(users, ["blocker", "flight", "plain"]);
  });

  it("is seen in the operator's report while it lasts", TIMEOUT, async () => {
    const { a } = fleet.engines;
    a.behave({ stallAfterTokens: 1 });
    const clients = [await raw("vip", { stream: true })];
    assert(await until(() => a.activeGenerations() === 1));
    for (const [at, tenant] of ["bulk", "bulk", "plain"].entries()) {
      clients.push(await raw(tenant, {}));
      assert(await isQueued(at + 1));
    }
    const seen = Object.values(await tenantsOf(fleet.url)).map(
      ({ id, weight, priority, inFlight, queued }) => [id, weight, priority, inFlight, queued],
    );
    assert.deepEqual(seen, [
      ["default", 1, "default", 0, 0],
      ["blocker", 1, "default", 0, 0],
      ["vip", 1, "interactive", 1, 0],
      ["plain", 1, "default", 0, 1],
      ["bulk", 1, "batch", 0, 2],
      ["light", 1, "default", 0, 0],
      ["heavy", 2, "default", 0, 0],
    ]);
    for (const client of clients) client.leave("close");
  });
});

describe("the ledger", () => {
  const TENANTS = ["one", "two", "three"] as const;
  let fleet: Fleet<"a" | "b">;
  before(async () => {
    const budgets = [
      { tokens: 100_000_000, window: "1h" },
      { tokens: 100_000_000, window: "day" },
    ];
    fleet = await startFleet(
      { a: { models: ["test-model", "embed"] }, b: { models: ["test-model"] } },
      {
        ...withKeys({ one: { budgets }, two: { budgets }, three: { requestsPerMinute: 10 } }),
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    );
  });
  after(() => fleet.close());

  const numberIn = (value: unknown): number => (typeof value === "number" ? value : 0);
  const sumOf = (records: readonly LogRecord[], key: string): number =>
    records.reduce((sum, record) => sum + numberIn(record[key]), 0);

  /** What was counted for a tenant, by the ledger, the log and the metrics. */
  async function check(): Promise<void> {
    await isQuiet(fleet.gateway);
    await sleep(50);
    for (const [id, { requests, tokens, budgets }] of Object.entries(await tenantsOf(fleet.url))) {
      const own = fleet.gateway.records().filter(({ tenant }) => tenant === id);
      const estimated = own.filter(({ tokens_estimated: is }) => is === true);
      const logged = {
        requests: own.length,
        input: sumOf(own, "tokens_input"),
        output: sumOf(own, "tokens_generated"),
        estimated: sumOf(estimated, "tokens_input") + sumOf(estimated, "tokens_generated"),
      };
      assert.deepEqual({ requests, ...tokens }, logged, id);
      const counted = async (type: string) =>
        fleet.gateway.metric("tidegate_tenant_tokens_total", { tenant: id, type });
      assert.deepEqual(
        [await counted("input"), await counted("output")],
        [tokens.input, tokens.output],
        `${id}: metrics`,
      );
      for (const { window, used, limit } of budgets) {
        const labels = { tenant: id, window };
        const ratio = await fleet.gateway.metric("tidegate_budget_used_ratio", labels);
        assert(Math.abs(ratio - used / limit) < 0.01);
        // The budget has the prompts of those that left as well, which nobody counted.
        if (window === "day") assert(used >= tokens.input + tokens.output, `${id}: budget`);
      }
    }
  }

  it(
    "says what the log and the metrics say, whatever came and however it ended",
    TIMEOUT,
    async () => {
      const random = seeded("ledger");
      const { a, b } = fleet.engines;
      const chaos = setInterval(() => {
        for (const engine of [a, b]) {
          const fault = random.pick([
            null,
            null,
            null,
            null,
            faults.ollamaLoadFailed,
            { kind: "cut", afterTokens: 3, by: "reset" } as const,
            { kind: "drop", by: "reset" } as const,
          ]);
          engine.behave({ tokens: random.between(1, 30), tokenDelayMs: 2, fault });
        }
      }, 5);
      const client = async (): Promise<void> => {
        for (let each = 0; each < 12; each++) {
          const init = by(random.pick(TENANTS));
          const seed = random.between(1, 3);
          const leaving = new AbortController();
          const signal = leaving.signal;
          const kind = random.pick(["stream", "whole", "same", "embed", "leave", "leave"]);
          const answer =
            kind === "embed"
              ? send(
                  `${fleet.url}/v1/embeddings`,
                  { model: "embed", input: ["a", `b ${seed}`] },
                  init,
                )
              : openaiChat(
                  fleet.url,
                  {
                    stream: kind === "stream" || kind === "leave",
                    ...(kind === "same" ? { temperature: 0, seed } : {}),
                  },
                  { ...init, signal },
                );
          if (kind === "leave") setTimeout(() => leaving.abort(), random.between(1, 40));
          await answer.catch(() => {});
        }
      };
      await Promise.all(Array.from({ length: 12 }, client));
      clearInterval(chaos);
      fleet.reset();
      for (const engine of [a, b]) engine.behave({ headersDelayMs: Infinity });
      const same = () => openaiChat(fleet.url, { temperature: 0, seed: 50 }, by("two"));
      const all = [same(), same(), same()];
      assert(await until(async () => (await tenantOf(fleet.url, "two")).inFlight === all.length));
      for (const engine of [a, b]) engine.release();
      await Promise.all(all);
      await same();
      await check();
      const records = fleet.gateway.records();
      for (const ending of ["completed", "cancelled", "failed"]) {
        assert(
          records.some((record) => record.ending === ending),
          ending,
        );
      }
      for (const cache of ["hit", "miss", "joined"]) {
        assert(
          records.some((record) => record.cache === cache),
          cache,
        );
      }
      assert(
        records.some(({ cause }) => cause === "rate_limit_exceeded"),
        "refused",
      );
      assert(
        records.some(({ tokens_estimated: is }) => is === true),
        "estimated",
      );
    },
  );

  it("and so when the first of those who ask for the same has left", TIMEOUT, async () => {
    const { a, b } = fleet.engines;
    for (const engine of [a, b]) engine.behave({ headersDelayMs: Infinity });
    const same = { temperature: 0, seed: 99 };
    const leaving = new AbortController();
    const init = { ...by("one"), signal: leaving.signal };
    const first = openaiChat(fleet.url, same, init).catch(() => {});
    assert(await until(() => a.activeGenerations() + b.activeGenerations() === 1));
    const second = openaiChat(fleet.url, same, by("one"));
    assert(await until(async () => (await tenantOf(fleet.url, "one")).inFlight === 2));
    leaving.abort();
    await first;
    assert(await until(async () => (await tenantOf(fleet.url, "one")).inFlight === 1));
    for (const engine of [a, b]) engine.release();
    const answer = await second;
    assert.deepEqual([answer.status, answer.headers.get("x-tidegate-cache")], [200, "joined"]);
    await check();
  });
});
