/** `tenants`, and the caps of models: who may what, how much of it, and who comes first. */
import assert from "node:assert/strict";
import type { ConfigInput } from "../../../src/config.ts";
import type { Answer } from "../../support/client.ts";
import { chatBody, open, send } from "../../support/client.ts";
import { expectError } from "../../support/fleet.ts";
import { by, tenantOf, withKeys } from "../../support/tenants.ts";
import { eventually, type KeyTests, type Rig } from "./rig.ts";

type TenantInput = NonNullable<ConfigInput["tenants"]>[string];

/** Tenants `one` and `two` with these settings; one request at once at backend a. */
async function changeTenants(rig: Rig, one: TenantInput, two: TenantInput = {}): Promise<void> {
  const tenants = { one, two, blocker: {} };
  await rig.change({ ...withKeys(tenants), backends: { a: { concurrency: 1 } } });
}

function ask(rig: Rig, tenant = "one", body: Record<string, unknown> = {}): Promise<Answer> {
  return rig.chat(body, by(tenant).headers);
}

/** By whom backend a was asked for answers, in that order, once these have all waited for one slot. */
async function orderOf(rig: Rig, tenants: readonly string[]): Promise<string> {
  const { a } = rig.engines;
  a.reset();
  a.behave({ stallAfterTokens: 1 });
  const blocking = new AbortController();
  const init = { ...by("blocker"), signal: blocking.signal };
  const blocker = await open(
    `${rig.url}/v1/chat/completions`,
    chatBody({ model: "only-a", stream: true, user: "-" }),
    init,
  );
  a.behave({ stallAfterTokens: null });
  const answers = [];
  for (const [at, tenant] of tenants.entries()) {
    answers.push(ask(rig, tenant, { model: "only-a", user: tenant }));
    await eventually("it waits", async () => (await rig.backends())["a"]?.queued === at + 1);
  }
  blocking.abort();
  await blocker.text().catch(() => {});
  for (const { status } of await Promise.all(answers)) assert.equal(status, 200);
  const users = a.inference().map(({ json }) => String(json["user"]));
  return users.slice(1).join(" ");
}

/** What the engine was told to generate at most. */
async function toldLimit(rig: Rig): Promise<unknown> {
  assert.equal((await ask(rig, "one", { model: "only-a" })).status, 200);
  return rig.engines.a.inference().at(-1)?.json["max_tokens"];
}

export const tenantKeys: KeyTests = {
  async "auth.keys[].tenant"(rig) {
    for (const tenant of ["one", "two"]) {
      await rig.change({ tenants: { one: {}, two: {} }, auth: { keys: [{ key: "k", tenant }] } });
      const { headers } = await rig.chat({}, { authorization: "Bearer k" });
      const record = await rig.gateway.record(headers.get("x-request-id") ?? "");
      assert.equal(record["tenant"], tenant);
    }
  },

  async "tenants.<name>.weight"(rig) {
    const all = ["one", "one", "one", "one", "two", "two", "two", "two"];
    const firstOnes = (order: string) =>
      order
        .split(" ")
        .slice(0, 4)
        .filter((each) => each === "one");
    await changeTenants(rig, {}, {});
    assert.equal(firstOnes(await orderOf(rig, all)).length, 2);
    await changeTenants(rig, {}, { weight: 100 });
    assert(firstOnes(await orderOf(rig, all)).length <= 1, "two has a hundred times the share");
  },

  async "tenants.<name>.priority"(rig) {
    await changeTenants(rig, {}, { priority: "interactive" });
    assert.equal(await orderOf(rig, ["one", "two"]), "two one");
    await changeTenants(rig, {}, { priority: "batch" });
    assert.equal(await orderOf(rig, ["two", "one"]), "one two");
  },

  async "tenants.<name>.models"(rig) {
    const listed = async () => {
      const { data } = (await send(`${rig.url}/v1/models`, undefined, by("one"))).json();
      return (data as { id: string }[]).map(({ id }) => id);
    };
    await changeTenants(rig, {});
    assert.deepEqual(await listed(), ["local:1b", "m", "only-a", "only-b"]);
    await changeTenants(rig, { models: ["only-*"] });
    assert.deepEqual(await listed(), ["only-a", "only-b"]);
    expectError(await ask(rig), 404, "model_not_found");
    assert.equal((await ask(rig, "one", { model: "only-a" })).status, 200);
  },

  async "tenants.<name>.concurrency"(rig) {
    await changeTenants(rig, { concurrency: 1 });
    rig.engines.b.behave({ stallAfterTokens: 1 });
    void rig.hold({ model: "only-b", stream: true }, by("one").headers);
    await eventually("it runs", () => rig.engines.b.activeGenerations() === 1);
    expectError(await ask(rig), 429, "rate_limit_exceeded");
    await changeTenants(rig, { concurrency: 2 });
    assert.equal((await ask(rig, "one", { model: "only-a" })).status, 200);
  },

  async "tenants.<name>.requestsPerMinute"(rig) {
    await changeTenants(rig, { requestsPerMinute: 1 });
    assert.equal((await ask(rig)).status, 200);
    expectError(await ask(rig), 429, "rate_limit_exceeded");
    await changeTenants(rig, {});
    assert.equal((await ask(rig)).status, 200);
  },

  async "tenants.<name>.maxOutputTokens"(rig) {
    await changeTenants(rig, {});
    assert.equal(await toldLimit(rig), undefined);
    await changeTenants(rig, { maxOutputTokens: 7 });
    assert.equal(await toldLimit(rig), 7);
  },

  async "tenants.<name>.budgets[].tokens"(rig) {
    const budget = (tokens: number) => ({ budgets: [{ tokens, window: "day" }] });
    await changeTenants(rig, budget(1));
    assert.equal((await ask(rig)).status, 200, "what never fits is let in where nothing is used");
    assert.equal((await ask(rig)).status, 429);
    await changeTenants(rig, budget(1_000_000));
    assert.equal((await ask(rig)).status, 200);
    assert.equal((await tenantOf(rig.url, "one")).budgets[0]?.limit, 1_000_000);
  },

  /** Each answer is ten tokens, half of the budget, which half the window gives back. */
  async "tenants.<name>.budgets[].window"(rig) {
    for (const engine of [rig.engines.a, rig.engines.b]) engine.behave({ promptTokens: 5 });
    for (const [window, seconds] of [
      ["3h", 5400],
      ["40s", 20],
    ] as const) {
      await changeTenants(rig, { budgets: [{ tokens: 20, window }] });
      assert.equal((await ask(rig)).status, 200);
      const answer = await ask(rig);
      expectError(answer, 429, seconds > 60 ? "insufficient_quota" : "rate_limit_exceeded");
      const after = Number(answer.headers.get("retry-after"));
      assert(after > seconds - 15 && after <= seconds, `${after} s`);
    }
  },
};

export const capKeys: KeyTests = {
  async "models.<name>.maxOutputTokens"(rig) {
    await rig.change({ ...withKeys({ one: {} }), models: { "only-b": { maxOutputTokens: 9 } } });
    assert.equal(await toldLimit(rig), undefined);
    await rig.change({ ...withKeys({ one: {} }), models: { "only-a": { maxOutputTokens: 9 } } });
    assert.equal(await toldLimit(rig), 9);
  },
};
