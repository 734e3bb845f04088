/** `backends`, `models`: which engine gets a request, what it gets, and how it is watched. */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { startGateway } from "../../../src/gateway.ts";
import { loadSettings, type Sources } from "../../../src/settings/load.ts";
import { Log } from "../../../src/telemetry/log.ts";
import { send } from "../../support/client.ts";
import { faults } from "../../support/engine-behaviour.ts";
import { expectError } from "../../support/fleet.ts";
import { runtime } from "../../support/gateway.ts";
import { eventually, type KeyTests, type Rig } from "./rig.ts";

/** Which backends so many requests went to, one after the other. */
async function shares(rig: Rig, count: number): Promise<Record<string, number>> {
  const served: Record<string, number> = {};
  for (let at = 0; at < count; at++) {
    const { headers } = await rig.chat();
    const id = headers.get("x-tidegate-backend") ?? "";
    served[id] = (served[id] ?? 0) + 1;
  }
  return served;
}

/** Streams that do not end: so many of them may run at once. */
async function holdTwo(rig: Rig, model: string): Promise<() => number> {
  const { a, b } = rig.engines;
  for (const engine of [a, b]) engine.behave({ stallAfterTokens: 1 });
  void rig.hold({ model, stream: true });
  void rig.hold({ model, stream: true });
  const running = () => a.activeGenerations() + b.activeGenerations();
  await eventually("one waits", async () => {
    return running() === 1 && (await rig.gateway.metric("tidegate_queue_requests")) === 1;
  });
  return running;
}

export const backendKeys: KeyTests = {
  async "backends[].id"(rig) {
    await rig.change({ backends: { a: { id: "renamed" } } });
    const { headers } = await rig.chat({ model: "only-a" });
    assert.equal(headers.get("x-tidegate-backend"), "renamed");
  },

  async "backends[].kind"(rig) {
    const { o } = rig.engines;
    const sent = async () => {
      o.reset();
      await rig.chat({ model: "local:1b", max_completion_tokens: 7 });
      return o.inference()[0]?.json["max_tokens"];
    };
    await rig.change({ backends: { o: { kind: "openai" } } });
    assert.equal(await sent(), undefined);
    await rig.change({ backends: { o: { kind: "ollama" } } });
    assert.equal(await sent(), 7, "an Ollama is told in the words it knows");
  },

  async "backends[].url"(rig) {
    const { a, b } = rig.engines;
    await rig.change({ backends: { a: { url: `${b.url}/v1/`, models: ["only-b"] } } });
    await rig.change({ backends: { a: { url: b.url }, b: { models: [] } } });
    const { headers } = await rig.chat({ model: "only-b" });
    assert.equal(headers.get("x-tidegate-backend"), "a");
    assert.deepEqual([a.inference().length, b.inference().length], [0, 1]);
  },

  async "backends[].models"(rig) {
    assert.deepEqual(await rig.models(), ["local:1b", "m", "only-a", "only-b"]);
    await rig.change({ backends: { a: { models: ["named-by-hand"] } } });
    assert.deepEqual(await rig.models(), ["local:1b", "m", "named-by-hand", "only-b"]);
  },

  async "backends[].models[].name"(rig) {
    await rig.change({ backends: { a: { models: [{ name: "public", upstream: "only-a" }] } } });
    const { status, headers } = await rig.chat({ model: "public" });
    assert.deepEqual([status, headers.get("x-tidegate-model")], [200, "public"]);
    expectError(await rig.chat({ model: "only-a" }), 404, "model_not_found");
  },

  async "backends[].models[].upstream"(rig) {
    const { a } = rig.engines;
    for (const upstream of ["m", "only-a"]) {
      await rig.change({ backends: { a: { models: [{ name: "public", upstream }] } } });
      await rig.chat({ model: "public" });
      assert.equal(a.inference().at(-1)?.json["model"], upstream);
    }
  },

  async "backends[].include"(rig) {
    await rig.change({ backends: { a: { include: ["only*"] }, b: { include: ["*-b", "x"] } } });
    assert.deepEqual(await rig.models(), ["local:1b", "only-a", "only-b"]);
    expectError(await rig.chat(), 404, "model_not_found");
  },

  async "backends[].exclude"(rig) {
    await rig.change({ backends: { a: { exclude: ["m"] }, b: { exclude: ["on*", "none"] } } });
    assert.deepEqual(await rig.models(), ["local:1b", "m", "only-a"]);
    assert.deepEqual(await shares(rig, 3), { b: 3 });
  },

  async "backends[].allowCloud"(rig) {
    expectError(await rig.chat({ model: "big:cloud" }), 403, "permission_denied");
    await rig.change({ backends: { o: { allowCloud: true } } });
    assert((await rig.models()).includes("big:cloud"));
    assert.equal((await rig.chat({ model: "big:cloud" })).status, 200);
  },

  async "backends[].apiKey"(rig) {
    const { a } = rig.engines;
    const sent = async () => {
      await rig.chat({ model: "only-a" });
      return a.inference().at(-1)?.headers["authorization"];
    };
    assert.equal(await sent(), undefined);
    await rig.change({ backends: { a: { apiKey: "first" } } });
    assert.equal(await sent(), "Bearer first");
    await rig.change({ backends: { a: { apiKey: "second" } } });
    assert.equal(await sent(), "Bearer second");
  },

  async "backends[].concurrency"(rig) {
    await rig.change({ backends: { a: { concurrency: 1 } } });
    const running = await holdTwo(rig, "only-a");
    await rig.change({ backends: { a: { concurrency: 2 } } });
    await eventually("what waited runs", () => running() === 2);
  },

  async "backends[].weight"(rig) {
    const even = await shares(rig, 12);
    assert((even["b"] ?? 0) >= 5 && (even["b"] ?? 0) <= 7, JSON.stringify(even));
    await rig.change({ backends: { b: { weight: 5 } } });
    const uneven = await shares(rig, 12);
    assert((uneven["b"] ?? 0) >= 9, JSON.stringify(uneven));
  },

  // That they take turns is shown in conformance/gpu.test.ts.
  async "backends[].gpu"(rig) {
    await rig.change({ backends: { a: { gpu: "card-7" } } });
    const { text } = await send(`${rig.gateway.url}/admin/api/backends`);
    const backends = JSON.parse(text) as { id: string; gpu: string | null }[];
    assert.equal(backends.find(({ id }) => id === "a")?.gpu, "card-7");
    await eventually("it is said where it changes nothing", () => {
      return rig.gateway.stdout().includes("takes no turns on GPU card-7");
    });
  },

  async "backends[].healthInterval"(rig) {
    const { a } = rig.engines;
    const health = async () => (await rig.backends())["a"]?.health;
    await rig.change({ backends: { a: { healthInterval: 60_000 } } });
    // The reload itself has it probed.
    await eventually("it has been probed", () => a.requests.length > 0);
    a.behave({ probeFault: { kind: "answer", status: 500, body: {} } });
    await rig.change({ backends: { a: { healthInterval: 100 } } });
    await eventually("two probes fail", async () => (await health()) === "unhealthy");
    a.behave({ probeFault: null });
    await eventually("the next one does not", async () => (await health()) === "healthy");
    const before = a.requests.length;
    await eventually("and they go on", () => a.requests.length >= before + 5);
  },

  async "backends[].timeout"(rig) {
    rig.engines.a.behave({ probeFault: { kind: "hang" } });
    await rig.change({ backends: { a: { timeout: 123 } } });
    await eventually("a probe is given up", async () => {
      return (await rig.backends())["a"]?.reason === "no answer within 123 ms";
    });
  },

  async "backends[].staleAfterMs"(rig) {
    const seldom = { healthInterval: 60_000 };
    await rig.change({ backends: { a: seldom } });
    assert.equal((await rig.backends())["a"]?.health, "healthy");
    await rig.change({ backends: { a: { ...seldom, staleAfterMs: 50 } } });
    await eventually("what was known is too old", async () => {
      return (await rig.backends())["a"]?.health === "unknown";
    });
    assert.deepEqual(await shares(rig, 3), { b: 3 }, "whoever is known to be well comes first");
  },

  /** In this process: what DNS says has to be the test's to decide. */
  async "backends[].discover"(rig) {
    const { a } = rig.engines;
    const directory = await mkdtemp(join(tmpdir(), "tidegate-discover-"));
    const url = `http://engines.test:${a.port}/v1`;
    const write = (more: object) => {
      const backends = [{ id: "pod", kind: "openai", url, timeout: 200, ...more }];
      return writeFile(join(directory, "gateway.config.json"), JSON.stringify({ backends }));
    };
    await write({});
    const sources: Sources = { flags: {}, environment: {}, directory };
    const gateway = await startGateway(await loadSettings(sources), sources, {
      version: "test",
      runtime,
      log: new Log({ level: "error", json: true, colour: false, write: () => {} }),
      environment: {},
      upstreamLimit: Infinity,
      process,
      resolve: () => Promise.resolve([{ address: "127.0.0.1", ttl: 60 }]),
    });
    try {
      const ids = () => gateway.snapshot().backends.map(({ id }) => id);
      assert.deepEqual(ids(), ["pod"]);
      await write({ discover: "dns" });
      await gateway.reload("test");
      assert.deepEqual(ids(), ["pod@127.0.0.1"]);
      const body = JSON.stringify({ model: "m", messages: [{ role: "user", content: "x" }] });
      const request = new Request("http://localhost/v1/chat/completions", { method: "POST", body });
      const response = await gateway.fetch(request);
      await response.text();
      assert.equal(response.headers.get("x-tidegate-backend"), "pod@127.0.0.1");
    } finally {
      await gateway.close();
      await rm(directory, { recursive: true });
    }
  },
};

export const modelKeys: KeyTests = {
  async "models.<name>.backends"(rig) {
    assert.deepEqual(Object.keys(await shares(rig, 6)).toSorted(), ["a", "b"]);
    await rig.change({ models: { m: { backends: ["b"] } } });
    assert.deepEqual(await shares(rig, 6), { b: 6 });
  },

  async "models.<name>.aliases"(rig) {
    expectError(await rig.chat({ model: "default" }), 404, "model_not_found");
    await rig.change({ models: { m: { aliases: ["default"] } } });
    const { status, headers } = await rig.chat({ model: "default" });
    assert.deepEqual([status, headers.get("x-tidegate-model")], [200, "m"]);
    assert.equal((await send(`${rig.url}/v1/models/default`)).status, 200);
  },

  async "models.<name>.fallback"(rig) {
    rig.engines.a.behaveFor("only-a", { fault: faults.ollamaLoadFailed });
    expectError(await rig.chat({ model: "only-a" }), 502, "upstream_error");
    await rig.change({ models: { "only-a": { fallback: "m" } } });
    const { status, headers } = await rig.chat({ model: "only-a" });
    assert.deepEqual([status, headers.get("x-tidegate-model")], [200, "m"]);
    assert.equal(headers.get("x-tidegate-degraded"), "asked=only-a;reason=memory");
  },

  async "models.<name>.concurrency"(rig) {
    await rig.change({ models: { m: { concurrency: 1 } } });
    const running = await holdTwo(rig, "m");
    await rig.change({ models: { m: { concurrency: 2 } } });
    await eventually("what waited runs", () => running() === 2);
  },
};
