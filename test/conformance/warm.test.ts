/** `models.<name>.warm`: there before anybody asks, also in a backend that comes up later. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { openaiChat, send, sleep, until } from "../support/client.ts";
import { startEngine, type FakeEngine } from "../support/engine.ts";
import { startGateway, type Gateway } from "../support/gateway.ts";

const TIMEOUT = { timeout: 20_000 };
const WARM = { models: { "w:1": { warm: true } } };
/** Many probes, and a load takes some of them. */
const INTERVAL_MS = 100;
const LOAD_MS = 250;

/** An engine that is there or not when its gateway starts. */
async function withEngine(
  isThere: boolean,
  work: (engine: FakeEngine, gateway: Gateway) => Promise<void>,
  models = ["w:1", "x:1"],
) {
  const behaviour = { maxLoaded: 1, loadMs: LOAD_MS };
  const engine = await startEngine({ kind: "ollama", models, behaviour });
  if (!isThere) engine.stopListening();
  const backend = { id: "o", kind: "ollama", url: engine.url, healthInterval: INTERVAL_MS };
  const gateway = await startGateway({ config: { ...WARM, backends: [backend] } });
  try {
    await work(engine, gateway);
  } finally {
    await gateway.stop();
    await engine.close();
  }
}

async function healthOf({ url }: Gateway): Promise<unknown> {
  const { backends } = (await send(`${url}/ready`)).json() as { backends: { health: string }[] };
  return backends[0]?.health;
}

const isWarm = (engine: FakeEngine) => until(() => engine.resident().includes("w:1"), 5000);
const loadsOf = ({ loads }: FakeEngine) => loads.map(({ model, result }) => `${model} ${result}`);

describe("a warm model", () => {
  it("is loaded at the start, once", TIMEOUT, async () => {
    await withEngine(true, async (engine) => {
      assert(await isWarm(engine));
      await sleep(6 * INTERVAL_MS);
      assert.deepEqual(loadsOf(engine), ["w:1 loaded"]);
    });
  });

  it("is loaded in a backend that was away then", TIMEOUT, async () => {
    await withEngine(false, async (engine, gateway) => {
      await sleep(3 * INTERVAL_MS);
      await engine.listenAgain();
      assert(await isWarm(engine));
      assert.equal((await openaiChat(gateway.url, { model: "w:1" })).status, 200);
      await sleep(6 * INTERVAL_MS);
      assert.deepEqual(loadsOf(engine), ["w:1 loaded"]);
    });
  });

  it("is loaded again in one that was restarted", TIMEOUT, async () => {
    await withEngine(true, async (engine, gateway) => {
      assert(await isWarm(engine));
      engine.stopListening();
      assert(await until(async () => (await healthOf(gateway)) !== "healthy"));
      engine.reset();
      assert.deepEqual(engine.resident(), []);
      await engine.listenAgain();
      assert(await isWarm(engine));
      await sleep(6 * INTERVAL_MS);
      assert.deepEqual(loadsOf(engine), ["w:1 loaded"]);
    });
  });

  it("is loaded when its backend lists it at last", TIMEOUT, async () => {
    await withEngine(
      true,
      async (engine) => {
        await sleep(3 * INTERVAL_MS);
        assert.deepEqual(loadsOf(engine), []);
        engine.setModels(["x:1", "w:1"]);
        assert(await isWarm(engine));
      },
      ["x:1"],
    );
  });

  it("is left out once others put it out", TIMEOUT, async () => {
    await withEngine(true, async (engine) => {
      assert(await isWarm(engine));
      await send(`${engine.url}/api/generate`, { model: "w:1", keep_alive: 0 });
      await sleep(8 * INTERVAL_MS);
      assert.deepEqual(engine.resident(), []);
      assert.deepEqual(loadsOf(engine), ["w:1 loaded"]);
    });
  });

  it("does not put out a model that is known not to fit beside it", TIMEOUT, async () => {
    await withEngine(true, async (engine, gateway) => {
      assert(await isWarm(engine));
      // That the two do not fit is learned from this.
      assert.equal((await openaiChat(gateway.url, { model: "x:1" })).status, 200);
      assert.deepEqual(engine.resident(), ["x:1"]);
      engine.stopListening();
      assert(await until(async () => (await healthOf(gateway)) !== "healthy"));
      await engine.listenAgain();
      assert(await until(async () => (await healthOf(gateway)) === "healthy"));
      await sleep(6 * INTERVAL_MS);
      const log = `${gateway.stdout()}\n${JSON.stringify(engine.loads)}`;
      assert.deepEqual(engine.resident(), ["x:1"], log);
      assert.deepEqual(loadsOf(engine), ["w:1 loaded", "x:1 loaded"], log);
    });
  });

  it(
    "that cannot be loaded is left alone for its time, however often its backend comes up",
    TIMEOUT,
    async () => {
      await withEngine(false, async (engine, gateway) => {
        engine.behave({ loadFails: true, loadMs: 10 });
        for (let round = 0; round < 3; round++) {
          await engine.listenAgain();
          assert(await until(async () => (await healthOf(gateway)) === "healthy"));
          await sleep(4 * INTERVAL_MS);
          engine.stopListening();
          assert(await until(async () => (await healthOf(gateway)) !== "healthy"));
        }
        assert.deepEqual(loadsOf(engine), ["w:1 failed"]);
      });
    },
  );
});
