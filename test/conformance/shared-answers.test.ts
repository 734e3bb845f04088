/** Answers that gateways share in a real Redis (contract §1, redis; algorithms.md §5). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, Init } from "../support/client.ts";
import { openaiChat, send, sleep, until } from "../support/client.ts";
import { QUIET, cacheOf, recordOf, sureChat } from "../support/deterministic.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import type { Gateway } from "../support/gateway.ts";
import { startGateway } from "../support/gateway.ts";
import type { RedisServer } from "../support/redis.ts";
import { startRedis } from "../support/redis.ts";
import { by, isQuiet, withKeys } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };

type Fields = Record<string, unknown>;

describe("answers that gateways share in Redis", () => {
  /** More than a busy machine takes. */
  const WAIT_MS = 400;
  let redis: RedisServer | null = null;
  let fleet: Fleet<"a">;
  /** Beside the fleet's own, with the same engine. */
  let second: Gateway;
  before(async () => {
    redis = await startRedis();
    if (redis === null) {
      console.log("skipped: redis-server: there is none on this machine");
      return;
    }
    const config = {
      redis: { url: redis.url, timeoutMs: WAIT_MS },
      cache: { streamCacheDisabled: false },
      ...withKeys({ one: {}, two: {} }),
    };
    fleet = await startFleet(
      { a: { models: ["test-model", "some-embed"], backend: QUIET } },
      config,
    );
    const backend = { id: "a", kind: "openai", url: fleet.engines.a.url, ...QUIET };
    second = await startGateway({ config: { ...config, backends: [backend] } });
    await bothUseRedis();
  });
  afterEach(async () => {
    if (redis === null) return;
    redis.thaw();
    fleet.reset();
    await bothUseRedis();
  });
  after(async () => {
    if (redis === null) return;
    await second.stop();
    await fleet.close();
    await redis.stop();
  });

  async function bothUseRedis(): Promise<void> {
    for (const gateway of [fleet.gateway, second]) {
      const last = (text: string): number => gateway.stdout().lastIndexOf(text);
      assert.ok(await until(() => last("redis is in use") > last("redis is away")));
    }
  }

  const asked = (): number => fleet.engines.a.inference().length;
  const first = (body: Fields, init: Init = by("one")) => openaiChat(fleet.url, body, init);
  const other = (body: Fields, init: Init = by("one")) => openaiChat(second.url, body, init);
  const control = (value: string) => by("one", { "cache-control": value });

  /** Nobody waits until Redis has what is written there. */
  async function written(act: () => Promise<Answer>): Promise<Answer> {
    const count = async () =>
      ((await redis?.keys()) ?? []).filter((key) => key.includes(":answer:")).length;
    const before = await count();
    const answer = await act();
    assert.equal(cacheOf(answer), "miss");
    assert.ok(await until(async () => (await count()) > before));
    return answer;
  }

  it("what one has, the other has", TIMEOUT, async () => {
    if (redis === null) return;
    const made = await written(() => first(sureChat("shared")));
    const again = await other(sureChat("shared"));
    assert.equal(cacheOf(again), "hit");
    assert.deepEqual(again.body, made.body);
    assert.equal(again.headers.get("content-type"), made.headers.get("content-type"));
    assert.match(again.headers.get("age") ?? "", /^\d+$/);
    assert.equal(again.headers.get("x-tidegate-backend"), null);
    const record = await recordOf(second, again);
    assert.deepEqual(
      [record.cache, record.cache_hit, record.attempts, record.backend_id, record.ending],
      ["hit", true, 0, null, "completed"],
    );
    assert.equal(asked(), 1);
    redis.freeze();
    assert.equal(cacheOf(await other(sureChat("shared"))), "hit", "it is in memory by now");
    await isQuiet(second);
  });

  it("all who ask for the same at once are told the same", TIMEOUT, async () => {
    if (redis === null) return;
    await written(() => first(sureChat("shared at once")));
    const all = await Promise.all(
      Array.from({ length: 20 }, () => other(sureChat("shared at once"))),
    );
    assert.deepEqual(new Set(all.map(cacheOf)), new Set(["hit"]));
    for (const answer of all) {
      const { cache, cache_hit } = await recordOf(second, answer);
      assert.deepEqual([cache, cache_hit], ["hit", true]);
    }
    assert.equal(asked(), 1);
    await isQuiet(second);
  });

  it("streams, and vectors one by one", TIMEOUT, async () => {
    if (redis === null) return;
    const body = sureChat("shared stream", { stream: true });
    const made = await written(() => first(body));
    const played = await other(body);
    assert.equal(cacheOf(played), "hit");
    assert.equal(played.text, made.text);
    const embed = ({ url }: { url: string }, input: string[]) =>
      send(`${url}/v1/embeddings`, { model: "some-embed", input }, by("one"));
    await written(() => embed(fleet, ["s1", "s2"]));
    assert.equal(cacheOf(await embed(second, ["s2", "s1"])), "hit");
    assert.equal(cacheOf(await embed(second, ["s1", "s3"])), "miss");
    assert.deepEqual(
      fleet.engines.a.inference().map(({ json }) => json.input),
      [undefined, ["s1", "s2"], ["s3"]],
    );
  });

  it("not for another tenant, nor for who wants a younger one", TIMEOUT, async () => {
    if (redis === null) return;
    const body = sureChat("shared, not with all");
    await written(() => first(body));
    assert.equal(cacheOf(await other(body, by("two"))), "miss");
    await sleep(1100);
    expectError(await other(body, control("only-if-cached, max-age=1")), 504, "not_cached");
    assert.equal(cacheOf(await other(body, control("only-if-cached, max-age=60"))), "hit");
    assert.equal(cacheOf(await other(body, control("no-cache"))), "miss");
    assert.equal(asked(), 3);
  });

  it("a Redis that stops makes misses, and comes back", TIMEOUT, async () => {
    if (redis === null) return;
    const bodies = Array.from({ length: 8 }, (_, at) => sureChat(`stopped ${at}`));
    for (const body of bodies) await written(() => first(body));
    redis.freeze();
    for (const body of bodies.slice(0, 7)) {
      const startedAt = performance.now();
      assert.equal(cacheOf(await other(body)), "miss");
      const took = performance.now() - startedAt;
      assert.ok(took < WAIT_MS + 600, `${took} ms`);
    }
    assert.ok(await until(() => second.stdout().includes("redis is away")));
    redis.thaw();
    const seen = second.stdout().split("redis is in use").length;
    assert.ok(await until(() => second.stdout().split("redis is in use").length > seen - 1));
    const isBack = async () => cacheOf(await other(bodies[7] ?? {})) === "hit";
    assert.ok(await until(isBack));
    await isQuiet(second);
  });
});
