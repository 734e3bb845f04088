/** Backends behind a host name: replicas come and go with the answers of DNS, without a restart. */
import assert from "node:assert/strict";
import { Resolver } from "node:dns/promises";
import process from "node:process";
import { after, before, describe, it } from "node:test";
import { resolveA } from "../../src/control/names.ts";
import { startGateway, type Gateway } from "../../src/gateway.ts";
import { settle } from "../../src/settings/load.ts";
import { Log } from "../../src/telemetry/log.ts";
import { chatBody, until } from "../support/client.ts";
import { startDns, type FakeDns } from "../support/dns.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import { runtime } from "../support/gateway.ts";

describe("replicas behind a name", () => {
  let dns: FakeDns;
  let engines: FakeEngine[];
  let gateway: Gateway;

  before(async () => {
    dns = await startDns();
    const first = await startEngine({ models: ["m"], host: "127.0.0.2" });
    const second = await startEngine({ models: ["m"], host: "127.0.0.3", port: first.port });
    engines = [first, second];
    dns.answer("replicas.test", [{ address: "127.0.0.2", ttl: 1 }]);
    const sources = { flags: {}, environment: {}, directory: "/" };
    const url = `http://replicas.test:${first.port}/v1`;
    const settings = settle(
      { backends: [{ id: "r", kind: "openai", url, discover: "dns", healthInterval: 300 }] },
      "test",
      sources,
    );
    const resolver = new Resolver({ timeout: 500, tries: 1 });
    resolver.setServers([`127.0.0.1:${dns.port}`]);
    gateway = await startGateway(settings, sources, {
      version: "test",
      runtime,
      log: new Log({ level: "error", json: true, colour: false, write: () => {} }),
      environment: {},
      upstreamLimit: 100,
      process,
      resolve: (host) => resolveA(host, resolver),
    });
  });
  after(async () => {
    await gateway.close();
    for (const engine of engines) await engine.close();
    await dns.close();
  });

  const ids = (): string[] => gateway.snapshot().backends.map(({ id }) => id);

  async function chat(): Promise<string | null> {
    const response = await gateway.fetch(
      new Request("http://localhost/v1/chat/completions", {
        method: "POST",
        body: JSON.stringify(chatBody({ model: "m" })),
      }),
    );
    assert.equal(response.status, 200, await response.clone().text());
    await response.text();
    return response.headers.get("x-tidegate-backend");
  }

  it("are backends of their own, id@address", { timeout: 60_000 }, async () => {
    assert.deepEqual(ids(), ["r@127.0.0.2"]);
    assert.equal(await chat(), "r@127.0.0.2");
  });

  it("come with the next answer, and go when their time is over", { timeout: 60_000 }, async () => {
    const startedAt = performance.now();
    dns.answer("replicas.test", [{ address: "127.0.0.3", ttl: 1 }]);
    assert(await until(() => ids().includes("r@127.0.0.3"), 15_000));
    console.log(
      `replica on ${runtime}: in use ${Math.round(performance.now() - startedAt)} ms after DNS`,
    );
    assert(await until(() => !ids().includes("r@127.0.0.2"), 15_000));
    assert.equal(await chat(), "r@127.0.0.3");
  });

  it("stay while DNS does not answer at all", { timeout: 60_000 }, async () => {
    dns.answer("replicas.test", "silence");
    await new Promise((resolve) => setTimeout(resolve, 6500));
    assert.deepEqual(ids(), ["r@127.0.0.3"]);
    assert.equal(await chat(), "r@127.0.0.3");
  });
});
