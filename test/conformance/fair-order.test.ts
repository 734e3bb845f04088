/** Whose turn it is: weights, priorities, and a queue that nobody fills against the others. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, connect, postBytes, send, until, type Answer } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";
import { by, isQuiet, withKeys } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };
const PLACES = 12;

describe("one slot and several tenants", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["test-model"], backend: { healthInterval: 60_000, concurrency: 1 } } },
      {
        queue: { maxLength: PLACES },
        ...withKeys({
          light: {},
          heavy: { weight: 3 },
          person: { priority: "interactive" },
          nightly: { priority: "batch" },
        }),
      },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const waiting = () => fleet.gateway.metric("tidegate_queue_requests");

  /** Sends one, adds its answer, and waits until it is in the queue. Its prompt says whose it is. */
  async function ask(answers: Promise<Answer>[], tenant: string, priority?: string): Promise<void> {
    const queued = await waiting();
    const body = chatBody({ messages: [{ role: "user", content: tenant }] });
    const headers: Record<string, string> =
      priority === undefined ? {} : { "x-tidegate-priority": priority };
    answers.push(send(`${fleet.url}/v1/chat/completions`, body, by(tenant, headers)));
    assert.ok(await until(async () => (await waiting()) > queued), `${tenant} waits`);
  }

  /** Holds the slot while the others come, and tells in which order they were served. */
  async function orderOf(fill: (answers: Promise<Answer>[]) => Promise<void>): Promise<string[]> {
    fleet.engines.a.behave({ headersDelayMs: 60_000 });
    const leaving = new AbortController();
    const holder = send(`${fleet.url}/v1/chat/completions`, chatBody(), {
      ...by("light"),
      signal: leaving.signal,
    });
    holder.catch(() => {});
    assert.ok(await until(() => fleet.engines.a.activeGenerations() === 1));
    const answers: Promise<Answer>[] = [];
    await fill(answers);
    fleet.engines.a.behave({ headersDelayMs: 0 });
    leaving.abort();
    for (const answer of await Promise.all(answers)) assert.equal(answer.status, 200, answer.text);
    await isQuiet(fleet.gateway);
    return fleet.engines.a
      .inference()
      .slice(1)
      .map(({ json }) => (json.messages as [{ content: string }])[0].content);
  }

  it("share it by weight, not by who sends more", TIMEOUT, async () => {
    const order = await orderOf(async (answers) => {
      for (let each = 0; each < 4; each++) await ask(answers, "light");
      for (let each = 0; each < 6; each++) await ask(answers, "heavy");
    });
    const heavy = order.slice(0, 8).filter((each) => each === "heavy").length;
    assert.equal(heavy, 6, `three of four: ${order.join(" ")}`);
  });

  it("are served by class, which a request may lower and not raise", TIMEOUT, async () => {
    const order = await orderOf(async (answers) => {
      await ask(answers, "nightly", "interactive");
      await ask(answers, "person", "batch");
      await ask(answers, "light");
      await ask(answers, "person");
    });
    assert.deepEqual(order.slice(0, 2), ["person", "light"]);
    assert.deepEqual(order.slice(2).toSorted(), ["nightly", "person"]);
  });

  it("who fills the queue makes room for the others", TIMEOUT, async () => {
    fleet.engines.a.behave({ headersDelayMs: 60_000 });
    const leaving = new AbortController();
    const url = `${fleet.url}/v1/chat/completions`;
    const holder = send(url, chatBody(), { ...by("nightly"), signal: leaving.signal });
    holder.catch(() => {});
    assert.ok(await until(() => fleet.engines.a.activeGenerations() === 1));
    const flood = Array.from({ length: PLACES }, () => send(url, chatBody(), by("nightly")));
    assert.ok(await until(async () => (await waiting()) === PLACES));
    const tooMany = await send(url, chatBody(), by("nightly"));
    assert.equal(tooMany.status, 429);
    const person = send(url, chatBody(), by("person"));
    const refused = await Promise.race(flood);
    assert.equal(refused.status, 429);
    assert.equal((refused.json().error as { code: string }).code, "rate_limit_exceeded");
    assert.ok(Number(refused.headers.get("retry-after")) >= 1);
    fleet.engines.a.behave({ headersDelayMs: 0 });
    leaving.abort();
    assert.equal((await person).status, 200);
    const statuses = (await Promise.all(flood)).map(({ status }) => status);
    assert.equal(statuses.filter((status) => status === 200).length, PLACES - 1);
    await isQuiet(fleet.gateway);
  });
});

describe("where there are no tenants", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    const backend = { healthInterval: 60_000, concurrency: 1 };
    fleet = await startFleet({ a: { models: ["test-model"], backend } }, {});
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const waiting = () => fleet.gateway.metric("tidegate_queue_requests");
  const textOf = (content: string) => chatBody({ messages: [{ role: "user", content }] });

  /** Five of one, then one of another, behind one that runs: in which order they are served. */
  async function orderOf(
    ask: (who: "many" | "one", body: Record<string, unknown>) => Promise<unknown>,
  ): Promise<string[]> {
    const { a } = fleet.engines;
    a.behave({ headersDelayMs: 60_000 });
    const leaving = new AbortController();
    const init = { signal: leaving.signal };
    const holder = send(`${fleet.url}/v1/chat/completions`, textOf("holder"), init);
    holder.catch(() => {});
    assert.ok(await until(() => a.activeGenerations() === 1));
    const asked: Promise<unknown>[] = [];
    for (const who of ["many", "many", "many", "many", "many", "one"] as const) {
      asked.push(ask(who, textOf(who)));
      assert.ok(await until(async () => (await waiting()) === asked.length));
    }
    a.behave({ headersDelayMs: 0 });
    leaving.abort();
    assert.ok(await until(() => a.inference().length === 7));
    await Promise.all(asked);
    await isQuiet(fleet.gateway);
    const texts = a.inference().map(({ json }) => json.messages as [{ content: string }]);
    return texts.slice(1).map(([{ content }]) => content);
  }

  it("slots are shared between sessions", TIMEOUT, async () => {
    const order = await orderOf((who, body) =>
      send(`${fleet.url}/v1/chat/completions`, body, { headers: { "x-session-id": who } }),
    );
    assert.ok(order.indexOf("one") <= 1, order.join());
  });

  it("else between addresses", TIMEOUT, async () => {
    const order = await orderOf(async (who, body) => {
      const client = await connect(fleet.gateway.port, who === "one" ? "127.0.0.2" : "127.0.0.1");
      client.write(postBytes("/v1/chat/completions", body));
      assert.ok(await until(() => client.status() === 200));
      client.leave("close");
    });
    assert.ok(order.indexOf("one") <= 1, order.join());
  });
});
