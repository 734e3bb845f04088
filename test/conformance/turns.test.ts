/** One engine with room for one model: turns instead of a load per request, and loads that nobody owns. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, open, openaiChat, readEvents, send, until } from "../support/client.ts";
import { expectError, startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const ABC = ["a:1", "b:1", "c:1"];
const LOAD_MS = 120;

async function withOne(
  work: (fleet: Fleet<"o">) => Promise<void>,
  config: Record<string, unknown> = {},
) {
  const behaviour = { maxLoaded: 1, loadMs: LOAD_MS, tokens: ["x"] };
  const o = { kind: "ollama" as const, models: ABC, behaviour };
  const fleet = await startFleet({ o }, { cache: { enabled: false }, ...config });
  try {
    await work(fleet);
  } finally {
    await fleet.close();
  }
}

async function api<T>(fleet: Fleet<"o">, path: string, body?: object): Promise<T> {
  return JSON.parse((await send(`${fleet.url}/admin/api/${path}`, body)).text) as T;
}

interface Queue {
  requests: { id: string; model: string; backend: string; position: number; reason: string }[];
  turns: { backend: string; model: string; gate: number; next: string | null }[];
}

describe("turns", () => {
  it("make three loads of a burst over three models", TIMEOUT, async () => {
    await withOne(async (fleet) => {
      fleet.engines.o.behave({ headersDelayMs: 10 });
      const answers = await Promise.all(
        Array.from({ length: 60 }, (_, at) => openaiChat(fleet.url, { model: ABC[at % 3] })),
      );
      for (const { status } of answers) assert.equal(status, 200);
      const loads = fleet.engines.o.loads.map(({ model, by }) => [model, by]);
      assert.equal(loads.length, 3, JSON.stringify(loads));
      for (const [, by] of loads) assert.equal(by, "POST /api/generate");
      const text = (await send(`${fleet.url}/metrics`)).text;
      assert.match(
        text,
        /tidegate_model_loads_total\{model="b:1",backend_id="o",result="success"\} 1/,
      );
      const waited = answers.find(({ headers }) => headers.get("server-timing")?.includes("load;"));
      assert(waited !== undefined, "who waited for a load is told so");
      const ms = Number(/load;dur=(\d+)/.exec(waited.headers.get("server-timing") ?? "")?.[1]);
      assert(ms >= LOAD_MS - 5, `${ms}`);
    });
  });

  it("finish a load though every client has left", TIMEOUT, async () => {
    await withOne(async (fleet) => {
      fleet.engines.o.behave({ loadMs: 1500 });
      const controller = new AbortController();
      const clients = Array.from({ length: 10 }, () => {
        const body = chatBody({ model: "a:1" });
        return open(`${fleet.url}/v1/chat/completions`, body, { signal: controller.signal });
      });
      const left = Promise.allSettled(clients);
      await until(() => fleet.engines.o.loads.length === 1);
      const { models } = await api<{
        models: { name: string; targets: { residency: string }[] }[];
      }>(fleet, "snapshot");
      assert.equal(models.find(({ name }) => name === "a:1")?.targets[0]?.residency, "loading");
      controller.abort();
      await left;
      const record = await fleet.gateway.record(({ ending }) => ending === "cancelled");
      assert.equal(record["cause"], "loading");
      await until(() => fleet.engines.o.loads[0]?.result !== "loading");
      assert.deepEqual(
        fleet.engines.o.loads.map(({ result }) => result),
        ["loaded"],
      );
      assert.deepEqual(fleet.engines.o.resident(), ["a:1"]);
    });
  });

  it("tell whoever waits what for", TIMEOUT, async () => {
    await withOne(
      async (fleet) => {
        assert.equal((await openaiChat(fleet.url, { model: "a:1" })).status, 200);
        fleet.engines.o.behave({ stallAfterTokens: 1, loadMs: 800 });
        const controller = new AbortController();
        const { signal } = controller;
        const path = `${fleet.url}/v1/chat/completions`;
        const first = await open(path, chatBody({ model: "a:1", stream: true }), { signal });
        const second = open(path, chatBody({ model: "b:1", stream: true }));
        await until(async () => (await api<Queue>(fleet, "queue")).requests.length === 1);
        const { requests, turns } = await api<Queue>(fleet, "queue");
        assert.equal(requests[0]?.reason, "waiting for b:1's turn");
        assert.deepEqual([requests[0]?.position, requests[0]?.backend], [0, "o"]);
        assert.deepEqual([turns[0]?.model, turns[0]?.next], ["a:1", "b:1"]);
        fleet.engines.o.behave({ stallAfterTokens: Infinity });
        controller.abort();
        await first.body?.cancel().catch(() => {});
        const reasons = new Set<string>();
        for await (const { comment } of readEvents(await second)) {
          const beat = /^tidegate (\{"position".*)/.exec(comment ?? "")?.[1];
          if (beat !== undefined) reasons.add((JSON.parse(beat) as { reason: string }).reason);
        }
        assert(reasons.has("loading b:1"), [...reasons].join());
      },
      { queue: { heartbeatMs: 40 } },
    );
  });

  it("refuse only those whose model cannot be loaded", TIMEOUT, async () => {
    await withOne(async (fleet) => {
      fleet.engines.o.behaveFor("b:1", { loadFails: true });
      assert.equal((await openaiChat(fleet.url, { model: "a:1" })).status, 200);
      const [a, b] = await Promise.all([
        openaiChat(fleet.url, { model: "a:1" }),
        openaiChat(fleet.url, { model: "b:1" }),
      ]);
      assert.equal(a.status, 200);
      expectError(b, 503, "model_load_failed");
      assert(Number(b.headers.get("retry-after")) >= 9);
      expectError(await openaiChat(fleet.url, { model: "b:1" }), 503, "model_load_failed");
      assert.equal((await openaiChat(fleet.url, { model: "c:1" })).status, 200);
    });
  });
});

describe("what others load in the same engine", () => {
  it(
    "is seen within two seconds while requests wait, and else at the next probe",
    TIMEOUT,
    async () => {
      const behaviour = { maxLoaded: 2, tokens: ["x"] };
      const backend = { healthInterval: 60_000 };
      const fleet = await startFleet({ o: { kind: "ollama", models: ABC, behaviour, backend } });
      try {
        const { o } = fleet.engines;
        const isSeen = async () => {
          const { models } = await api<{
            models: { name: string; targets: { residency: string }[] }[];
          }>(fleet, "snapshot");
          return models.find(({ name }) => name === "b:1")?.targets[0]?.residency === "loaded";
        };
        assert.equal((await openaiChat(fleet.url, { model: "a:1" })).status, 200);
        const probes = () => o.requests.filter(({ path }) => path === "/api/ps").length;
        const before = probes();
        assert.equal((await send(`${o.url}/api/generate`, { model: "b:1" })).status, 200);
        assert.equal(await until(isSeen, 2500), false);
        assert.equal(probes(), before);
        o.behave({ stallAfterTokens: 1 });
        const controller = new AbortController();
        const { signal } = controller;
        const path = `${fleet.url}/v1/chat/completions`;
        const body = chatBody({ model: "a:1", stream: true });
        const clients = [open(path, body, { signal }), open(path, body, { signal })];
        assert(await until(isSeen, 3500), "b:1 is seen");
        controller.abort();
        await Promise.allSettled(clients);
      } finally {
        await fleet.close();
      }
    },
  );
});

describe("the operator", () => {
  let fleet: Fleet<"o">;
  before(async () => {
    const behaviour = { maxLoaded: 2, loadMs: 50 };
    fleet = await startFleet({ o: { kind: "ollama", models: ABC, behaviour } });
  });
  after(() => fleet.close());
  afterEach(() => fleet.reset());

  it("has a model loaded, and put out again", TIMEOUT, async () => {
    const loaded = await send(`${fleet.url}/admin/api/models/a%3A1/load`, {});
    assert.equal(loaded.status, 202);
    assert.deepEqual(JSON.parse(loaded.text), {
      model: "a:1",
      targets: [{ backend: "o", residency: "loading" }],
    });
    await until(() => fleet.engines.o.resident().includes("a:1"));
    await until(async () => {
      const { models } = await api<{ models: { targets: { residency: string }[] }[] }>(
        fleet,
        "snapshot",
      );
      return models[0]?.targets[0]?.residency === "loaded";
    });
    const gone = await send(`${fleet.url}/admin/api/models/a%3A1/unload`, { backend: "o" });
    assert.equal(gone.status, 202);
    await until(() => fleet.engines.o.resident().length === 0);
    assert.equal(fleet.engines.o.resident().length, 0);
  });

  it("is told what there is none of", TIMEOUT, async () => {
    const path = (model: string) => `${fleet.url}/admin/api/models/${model}/load`;
    expectError(await send(path("nothing"), {}), 404, "model_not_found");
    expectError(await send(path("a%3A1"), { backend: "x" }), 404, "unknown_url");
  });

  it("is told that a backend has no such model", TIMEOUT, async () => {
    const two = await startFleet({ one: { models: ["a"] }, other: { models: ["b"] } });
    try {
      const answer = await send(`${two.url}/admin/api/models/a/load`, { backend: "other" });
      const { message } = expectError(answer, 404, "model_not_found");
      assert.equal(message, 'backend "other" has no model "a"');
    } finally {
      await two.close();
    }
  });
});
