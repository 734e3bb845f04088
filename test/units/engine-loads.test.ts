/** Loading and unloading a model, against the fakes of the three kinds that have it. */
import assert from "node:assert/strict";
import { afterEach, describe, it } from "node:test";
import type { Kind } from "../../src/config.ts";
import { LoadFailed } from "../../src/engines/engine.ts";
import { engineOf } from "../../src/engines/kinds.ts";
import { startEngine, type EngineOptions, type FakeEngine } from "../support/engine.ts";

let fake: FakeEngine | null = null;

afterEach(async () => {
  await fake?.close();
  fake = null;
});

async function start(kind: NonNullable<EngineOptions["kind"]>, more: EngineOptions = {}) {
  fake = await startEngine({ kind, ...more });
  const engine = engineOf(fake.kind as Kind);
  const connection = { id: "b", url: fake.url, apiKey: null };
  const { signal } = new AbortController();
  return {
    fake,
    load: (model: string, until = signal) => engine.load?.(connection, model, until),
    unload: (model: string) => engine.unload?.(connection, model, signal),
  };
}

const KINDS = [
  ["ollama", ["a:latest", "b:latest"]],
  ["llamacpp-router", ["a", "b"]],
  ["lmstudio", ["a", "b"]],
] as const;

for (const [kind, models] of KINDS) {
  describe(kind, () => {
    const [a] = models;

    it("loads a model, waits until it is there, and puts it out again", async () => {
      const { fake, load, unload } = await start(kind, {
        models: [...models],
        behaviour: { loadMs: 120 },
      });
      assert.equal(await load(a), true);
      assert.deepEqual(fake.resident(), [a]);
      assert.deepEqual(
        fake.loads.map(({ model, result }) => [model, result]),
        [[a, "loaded"]],
      );
      await unload(a);
      assert.deepEqual(fake.resident(), []);
      assert.equal(fake.inference().length, 0);
    });

    it("says why it failed", async () => {
      const { load } = await start(kind, { models: [...models], behaviour: { loadFails: true } });
      await assert.rejects(async () => load(a), LoadFailed);
    });

    it("leaves it to a request to find out that there is no such model", async () => {
      const { load, unload } = await start(kind, { models: [...models] });
      assert.equal(await load("none"), false);
      await unload("none");
    });

    it("rejects when there is nobody, and when it is given up", async () => {
      const { fake, load } = await start(kind, {
        models: [...models],
        behaviour: { loadMs: 5000 },
      });
      const controller = new AbortController();
      const loading = load(a, controller.signal);
      setTimeout(() => controller.abort(new Error("given up")), 50);
      await assert.rejects(
        async () => loading,
        (error) => !(error instanceof LoadFailed),
      );
      await fake.close();
      await assert.rejects(
        async () => load(a),
        (error) => !(error instanceof LoadFailed),
      );
    });
  });
}

describe("ollama, a model that embeds", () => {
  it("is loaded and put out by the route it has", async () => {
    const models = [{ name: "e:latest", capabilities: ["embedding"] }];
    const { fake, load, unload } = await start("ollama", { models, behaviour: { loadMs: 10 } });
    assert.equal(await load("e:latest"), true);
    assert.deepEqual(fake.resident(), ["e:latest"]);
    await unload("e:latest");
    assert.equal(fake.inference().length, 0);
  });

  it("keeps what the gateway loads for half an hour", async () => {
    const { fake, load } = await start("ollama", { models: ["a:latest"] });
    await load("a:latest");
    assert.equal(fake.requests.at(-1)?.json["keep_alive"], "30m");
  });
});

describe("kinds that have what they have in memory", () => {
  it("load nothing", () => {
    for (const kind of ["openai", "demo", "vllm", "sglang"] as const) {
      assert.equal(engineOf(kind).load, null);
      assert.equal(engineOf(kind).unload, null);
    }
  });
});
