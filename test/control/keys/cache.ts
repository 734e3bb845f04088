/** `cache` and `redis`: what is kept, for how long, and with whom it is shared. */
import assert from "node:assert/strict";
import { sleep } from "../../support/client.ts";
import { startRedis, type RedisServer } from "../../support/redis.ts";
import { eventually, type KeyTests, type Patch, type Rig } from "./rig.ts";

/** What the cache had for a request with this text. */
async function lookup(rig: Rig, text: string, more: object = {}): Promise<string | null> {
  const messages = [{ role: "user", content: text }];
  const { status, headers } = await rig.chat({ messages, temperature: 0, ...more });
  assert.equal(status, 200);
  return headers.get("x-tidegate-cache");
}

async function lookups(rig: Rig, texts: readonly string[]): Promise<(string | null)[]> {
  const seen = [];
  for (const text of texts) seen.push(await lookup(rig, text));
  return seen;
}

export const cacheKeys: KeyTests = {
  async "cache.enabled"(rig) {
    assert.deepEqual(await lookups(rig, ["enabled", "enabled"]), ["miss", "hit"]);
    await rig.change({ cache: { enabled: false } });
    assert.equal(await lookup(rig, "enabled"), "bypass;reason=disabled");
    assert.equal(await rig.gateway.metric("tidegate_cache_entries"), 0);
  },

  async "cache.maxItems"(rig) {
    const texts = ["items 1", "items 2", "items 1"];
    assert.deepEqual(await lookups(rig, texts), ["miss", "miss", "hit"]);
    await rig.change({ cache: { maxItems: 1 } });
    assert.equal(await rig.gateway.metric("tidegate_cache_entries"), 1);
    assert.deepEqual(await lookups(rig, ["items 2", "items 1"]), ["miss", "miss"]);
  },

  async "cache.maxBytes"(rig) {
    assert.deepEqual(await lookups(rig, ["bytes", "bytes"]), ["miss", "hit"]);
    await rig.change({ cache: { maxBytes: 100 } });
    assert.deepEqual(await lookups(rig, ["bytes", "bytes"]), ["miss", "miss"]);
    assert.equal(await rig.gateway.metric("tidegate_cache_bytes"), 0);
  },

  async "cache.ttlMs"(rig) {
    assert.equal(await lookup(rig, "ttl"), "miss");
    await sleep(60);
    assert.equal(await lookup(rig, "ttl"), "hit");
    await rig.change({ cache: { ttlMs: 50 } });
    await sleep(60);
    assert.equal(await lookup(rig, "ttl"), "miss");
  },

  async "cache.streamCacheDisabled"(rig) {
    const stream = { stream: true };
    assert.equal(await lookup(rig, "stream", stream), "bypass;reason=stream");
    await rig.change({ cache: { streamCacheDisabled: false } });
    assert.equal(await lookup(rig, "stream", stream), "miss");
    assert.equal(await lookup(rig, "stream", stream), "hit");
  },
};

async function withRedis(work: (redis: RedisServer) => Promise<void>): Promise<void> {
  const redis = await startRedis();
  if (redis === null) return console.log("skipped: redis-server: there is none on this machine");
  try {
    await work(redis);
  } finally {
    await redis.stop();
  }
}

/** Changes the configuration and waits until the gateway has a connection to it. */
async function shareOver(rig: Rig, redis: NonNullable<Patch["redis"]>): Promise<void> {
  const count = () => rig.gateway.stdout().split("redis is in use").length;
  const before = count();
  await rig.change({ redis });
  await eventually("it is in use", () => count() > before);
}

export const redisKeys: KeyTests = {
  "redis.url": (rig) =>
    withRedis((one) =>
      withRedis(async (other) => {
        const answers = async ({ keys }: RedisServer) =>
          (await keys()).filter((key) => key.startsWith("tidegate:answer:")).length;
        await shareOver(rig, { url: one.url });
        assert.equal(await lookup(rig, "url 1"), "miss");
        await eventually("it is there", async () => (await answers(one)) === 1);
        await shareOver(rig, { url: other.url });
        assert.equal(await lookup(rig, "url 2"), "miss");
        await eventually("it is in the other", async () => (await answers(other)) === 1);
        assert.equal(await answers(one), 1);
      }),
    ),

  "redis.prefix": (rig) =>
    withRedis(async ({ url, keys }) => {
      await shareOver(rig, { url, prefix: "mine/" });
      await lookup(rig, "prefix");
      await eventually("it is kept", async () => (await keys()).length >= 2);
      assert.deepEqual(
        (await keys()).filter((key) => !key.startsWith("mine/")),
        [],
      );
    }),

  "redis.timeoutMs": (rig) =>
    withRedis(async (redis) => {
      const waited = async (timeoutMs: number, text: string) => {
        await shareOver(rig, { url: redis.url, timeoutMs });
        redis.freeze();
        const startedAt = performance.now();
        assert.equal(await lookup(rig, text), "miss");
        redis.thaw();
        return performance.now() - startedAt;
      };
      assert((await waited(1500, "slow")) >= 1490);
      assert((await waited(10, "quick")) < 1000);
    }),
};
