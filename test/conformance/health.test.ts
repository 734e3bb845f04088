/** What probes see and what follows from it (contract §1 health, timeouts.connectMs; design §1.6). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { chatBody, open, openaiChat, readEvents, send, sleep, until } from "../support/client.ts";
import type { Fault } from "../support/engine-behaviour.ts";
import { faults } from "../support/engine-behaviour.ts";
import { startEngine } from "../support/engine.ts";
import { expectError, startFleet } from "../support/fleet.ts";
import { freePort, startGateway } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };
/** Probes as quick as the configuration allows. */
const quick = { healthInterval: 100, timeout: 500 };
const rare = { healthInterval: 600_000 };
const model = ["test-model"];

async function healthOf(url: string, id: string): Promise<string> {
  const { backends } = (await send(`${url}/ready`)).json() as {
    backends: { id: string; health: string }[];
  };
  return backends.find((backend) => backend.id === id)?.health ?? "missing";
}

describe("health", () => {
  const failures: Record<string, Fault> = {
    "answers 500": faults.htmlGateway(500),
    "answers 200 without a list": faults.lmStudioUnexpected,
    "answers in HTML": faults.htmlGateway(200),
    hangs: { kind: "hang" },
    resets: { kind: "drop", by: "reset" },
  };
  for (const [name, probeFault] of Object.entries(failures)) {
    it(`an engine that ${name} is unhealthy, until it is well again`, TIMEOUT, async () => {
      const fleet = await startFleet({ a: { models: model, backend: quick } });
      try {
        fleet.engines.a.behave({ probeFault });
        assert.ok(await until(async () => (await healthOf(fleet.url, "a")) === "unhealthy"));
        assert.equal(
          (await send(`${fleet.url}/ready`)).status,
          200,
          "ready is not the backends' health",
        );
        const labels = { backend_id: "a", state: "unhealthy" };
        assert.equal(await fleet.gateway.metric("tidegate_backend_health", labels), 1);
        const { data } = (await send(`${fleet.url}/v1/models`)).json() as {
          data: { id: string }[];
        };
        assert.deepEqual(
          data.map(({ id }) => id),
          model,
          "what it had is kept",
        );
        fleet.engines.a.reset();
        assert.ok(await until(async () => (await healthOf(fleet.url, "a")) === "healthy"));
        assert.equal((await openaiChat(fleet.url)).headers.get("x-tidegate-reason"), "only");
      } finally {
        await fleet.close();
      }
    });
  }

  it(
    "one trial at a time goes to an unhealthy backend, the others are refused",
    TIMEOUT,
    async () => {
      const fleet = await startFleet({ a: { models: model, backend: quick } });
      try {
        fleet.engines.a.behave({ probeFault: faults.htmlGateway(500), headersDelayMs: Infinity });
        assert.ok(await until(async () => (await healthOf(fleet.url, "a")) === "unhealthy"));
        const trial = openaiChat(fleet.url);
        assert.ok(await until(() => fleet.engines.a.inference().length === 1));
        const refused = await openaiChat(fleet.url);
        expectError(refused, 503, "no_backend_available");
        assert.ok(Number(refused.headers.get("retry-after")) >= 1);
        fleet.engines.a.release();
        const answer = await trial;
        assert.equal(answer.status, 200);
        assert.equal(answer.headers.get("x-tidegate-reason"), "trial");
        assert.equal(fleet.engines.a.inference().length, 1);
      } finally {
        await fleet.close();
      }
    },
  );

  it("ready means that the first round of probes is done", TIMEOUT, async () => {
    const engine = await startEngine({
      models: model,
      behaviour: { probeFault: { kind: "hang" } },
    });
    const backends = [{ id: "a", kind: "openai", url: engine.url, models: model, timeout: 1000 }];
    const port = await freePort();
    const starting = startGateway({ config: { server: { port }, backends }, skipReady: true });
    const isReady = async (): Promise<boolean> => {
      const ready = await send(`http://127.0.0.1:${port}/ready`).catch(() => null);
      if (ready === null) return false;
      if (ready.status === 200) return true;
      assert.equal(ready.json().ready, false);
      assert.match(String(ready.json().reason), /\w/);
      return false;
    };
    assert.ok(await until(isReady));
    assert.equal(engine.requests[0]?.closedByClient, true, "the first probe had timed out");
    const gateway = await starting;
    await gateway.stop();
    await engine.close();
  });

  it("a healthy backend is preferred, whatever the weights", TIMEOUT, async () => {
    const fleet = await startFleet({
      sick: { models: model, backend: { ...quick, weight: 1000 } },
      well: { models: model, backend: rare },
    });
    try {
      fleet.engines.sick.behave({ probeFault: faults.htmlGateway(500) });
      assert.ok(await until(async () => (await healthOf(fleet.url, "sick")) !== "healthy"));
      for (let count = 0; count < 5; count += 1) {
        assert.equal((await openaiChat(fleet.url)).headers.get("x-tidegate-backend"), "well");
      }
      assert.equal(fleet.engines.sick.inference().length, 0);
    } finally {
      await fleet.close();
    }
  });

  it(
    "an engine that loads is not failing; tokens that flow overrule a failed probe",
    TIMEOUT,
    async () => {
      const fleet = await startFleet({
        loading: { models: model, backend: quick },
        flowing: { models: ["flow"], behaviour: { tokens: 40, tokenDelayMs: 30 }, backend: quick },
      });
      try {
        fleet.engines.loading.behave({ probeFault: faults.loadingModel });
        const response = await open(
          `${fleet.url}/v1/chat/completions`,
          chatBody({ model: "flow", stream: true }),
        );
        fleet.engines.flowing.behave({ probeFault: { kind: "hang" } });
        for (let count = 0; count < 8; count += 1) {
          await sleep(100);
          assert.notEqual(await healthOf(fleet.url, "loading"), "unhealthy");
          assert.notEqual(await healthOf(fleet.url, "flowing"), "unhealthy");
        }
        for await (const event of readEvents(response)) void event;
        assert.ok(await until(async () => (await healthOf(fleet.url, "flowing")) === "unhealthy"));
      } finally {
        await fleet.close();
      }
    },
  );

  it("probes only read, and never overlap", TIMEOUT, async () => {
    const fleet = await startFleet({
      plain: { models: model, backend: { healthInterval: 100, timeout: 600 } },
      ollama: { kind: "ollama", models: ["llama3:8b"], backend: quick },
    });
    try {
      const { plain, ollama } = fleet.engines;
      assert.ok(await until(() => ollama.requests.length >= 5));
      plain.behave({ probeFault: { kind: "hang" } });
      let most = 0;
      for (let count = 0; count < 60; count += 1) {
        most = Math.max(most, plain.openConnections());
        await sleep(10);
      }
      assert.equal(most, 1);
      for (const { method, path } of [...plain.requests, ...ollama.requests]) {
        assert.equal(`${method} ${path}`.replace(/^GET \/(v1\/models|api\/\w+|)$/, "read"), "read");
      }
      assert.ok(ollama.requests.some(({ path }) => path === "/api/tags"));
    } finally {
      await fleet.close();
    }
  });

  it("a backend without a kind is known by its fingerprint", TIMEOUT, async () => {
    const fleet = await startFleet({
      any: { kind: "ollama", models: ["llama3:8b"], backend: { kind: undefined } },
    });
    try {
      const answer = await openaiChat(fleet.url, { model: "llama3", max_completion_tokens: 2 });
      assert.equal(answer.status, 200);
      assert.equal(fleet.engines.any.inference()[0]?.json.max_tokens, 2, "spoken to as an Ollama");
      assert.equal(await fleet.gateway.metric("tidegate_slots", { backend_id: "any" }), 1);
    } finally {
      await fleet.close();
    }
  });

  it("a backend's URL may end in /v1, in a slash, in both", { timeout: 60_000 }, async () => {
    for (const suffix of ["", "/", "/v1", "/v1/"]) {
      for (const kind of ["openai", "ollama"] as const) {
        const engine = await startEngine({ kind, models: ["m:1"] });
        const backends = [{ id: "a", kind, url: engine.url + suffix }];
        const gateway = await startGateway({ config: { backends } });
        assert.equal(
          (await openaiChat(gateway.url, { model: "m:1" })).status,
          200,
          `${kind} ${suffix}`,
        );
        assert.equal(engine.inference()[0]?.path, "/v1/chat/completions");
        await gateway.stop();
        await engine.close();
      }
    }
  });
});

describe("timeouts.connectMs", () => {
  it("an engine that answers neither request nor probe is left for another", TIMEOUT, async () => {
    const fleet = await startFleet(
      {
        dead: { models: model, backend: { ...rare, timeout: 150, weight: 1e6 } },
        well: { models: model, backend: rare },
      },
      { timeouts: { connectMs: 150 } },
    );
    try {
      for (const stream of [true, false]) {
        fleet.reset();
        fleet.engines.dead.behave({ fault: { kind: "hang" }, probeFault: { kind: "hang" } });
        const answer = await openaiChat(fleet.url, { stream });
        assert.equal(answer.status, 200, answer.text);
        assert.equal(answer.headers.get("x-tidegate-backend"), "well");
        assert.ok(
          await until(() => fleet.engines.dead.inference().every((one) => one.closedByClient)),
        );
      }
    } finally {
      await fleet.close();
    }
  });

  it("one that answers probes may take its time", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: { models: model, backend: rare } },
      { timeouts: { connectMs: 100 } },
    );
    try {
      fleet.engines.a.behave({ headersDelayMs: 600 });
      for (const stream of [true, false])
        assert.equal((await openaiChat(fleet.url, { stream })).status, 200);
    } finally {
      await fleet.close();
    }
  });
});

describe("what an engine cannot do", () => {
  it("501 when none of them can, each asked at most once", TIMEOUT, async () => {
    const fleet = await startFleet({
      one: { kind: "ollama", models: ["llama3:8b"], backend: rare },
      two: { kind: "ollama", models: ["llama3:8b"], backend: rare },
    });
    try {
      const count = await send(
        `${fleet.url}/v1/messages/count_tokens`,
        chatBody({ model: "llama3" }),
      );
      assert.equal(count.status, 501);
      assert.equal(fleet.engines.one.inference().length + fleet.engines.two.inference().length, 0);
      // real §6.7: Ollama's own 501 is the client's mistake.
      const vector = await send(`${fleet.url}/v1/embeddings`, { model: "llama3", input: "x" });
      expectError(vector, 501);
      assert.equal(fleet.engines.one.inference().length + fleet.engines.two.inference().length, 2);
    } finally {
      await fleet.close();
    }
  });
});
