/** A backend dies, moves, freezes: how long it is out of use, and that nobody notices who need not. */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import { openaiChat, send, until } from "../support/client.ts";
import type { EngineProcess } from "../support/engine-process.ts";
import { startEngineProcess } from "../support/engine-process.ts";
import type { Gateway } from "../support/gateway.ts";
import { runtime, startGateway } from "../support/gateway.ts";

const CLIENTS = 6;
const INTERVAL_MS = 500;
const ENGINE = { models: ["m"], behaviour: { tokens: 8, tokenDelayMs: 10, headersDelayMs: 20 } };

interface Seen {
  sentAt: number;
  status: number;
  backend: string | null;
  text: string;
}

describe("outages", () => {
  let folder = "";
  let gateway: Gateway;
  let victim: EngineProcess;
  let survivor: EngineProcess;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "tidegate-outage-"));
    victim = await startEngineProcess(ENGINE);
    survivor = await startEngineProcess(ENGINE);
    await write(victim.url);
    gateway = await startGateway({ args: ["--config", join(folder, "gateway.config.json")] });
  });
  after(async () => {
    await gateway.stop();
    for (const engine of [victim, survivor]) engine.kill("SIGKILL");
    await rm(folder, { recursive: true });
  });

  async function write(url: string): Promise<void> {
    const common = { kind: "openai", concurrency: 8, healthInterval: INTERVAL_MS, timeout: 400 };
    const config = {
      server: { port: 0 },
      timeouts: { connectMs: 300, idleMs: 1500 },
      backends: [
        { ...common, id: "victim", url },
        { ...common, id: "survivor", url: survivor.url },
      ],
    };
    await writeFile(join(folder, "gateway.config.json"), JSON.stringify(config));
  }

  async function health(): Promise<string | undefined> {
    const { backends } = (await send(`${gateway.url}/ready`)).json() as {
      backends: { id: string; health: string }[];
    };
    return backends.find(({ id }) => id === "victim")?.health;
  }

  /** Steady traffic, half of it streams, while `act` runs. */
  async function underLoad(act: (seen: Seen[]) => Promise<void>): Promise<Seen[]> {
    const seen: Seen[] = [];
    let running = true;
    const clients = Array.from({ length: CLIENTS }, async (_, at) => {
      while (running) {
        const stream = at % 2 === 0;
        const sentAt = performance.now();
        const { status, headers, text } = await openaiChat(gateway.url, { model: "m", stream });
        seen.push({ sentAt, status, backend: headers.get("x-tidegate-backend"), text });
      }
    });
    try {
      await act(seen);
    } finally {
      running = false;
      await Promise.all(clients);
    }
    return seen;
  }

  /** Milliseconds until it holds. */
  async function took(name: string, holds: () => boolean | Promise<boolean>): Promise<number> {
    const startedAt = performance.now();
    assert(await until(holds, 20_000), `${name}: never`);
    const ms = Math.round(performance.now() - startedAt);
    console.log(`outage on ${runtime}: ${name} after ${ms} ms (interval ${INTERVAL_MS} ms)`);
    return ms;
  }

  /** A request sent from now on was answered by it. */
  function isUsed(seen: Seen[]): () => boolean {
    const from = performance.now();
    return () =>
      seen.some(
        ({ sentAt, status, backend }) => sentAt > from && status === 200 && backend === "victim",
      );
  }

  /** Whoever had no byte of the answer yet was served elsewhere; a stream that had begun says what happened. */
  function nobodyNoticed(seen: Seen[]): void {
    for (const { status, backend, text } of seen) {
      assert.equal(status, 200, text);
      const whole = !text.startsWith("data:") || text.includes("[DONE]");
      if (whole) continue;
      assert.equal(backend, "victim", text);
      assert.match(text, /"code":"upstream_(?:incomplete|timeout)"/);
    }
    assert(seen.length > CLIENTS);
  }

  it("killed, and back on another port by way of the file", { timeout: 60_000 }, async () => {
    const seen = await underLoad(async (sofar) => {
      await until(isUsed(sofar));
      victim.kill("SIGKILL");
      await took("killed: out of use", async () => (await health()) !== "healthy");
      victim = await startEngineProcess(ENGINE);
      await write(victim.url);
      const used = isUsed(sofar);
      await took("moved by the file: back in use", used);
    });
    nobodyNoticed(seen);
  });

  it("frozen, and thawed", { timeout: 60_000 }, async () => {
    const seen = await underLoad(async (sofar) => {
      await until(isUsed(sofar));
      victim.kill("SIGSTOP");
      await took("frozen: out of use", async () => (await health()) !== "healthy");
      await until(async () => (await health()) === "unhealthy");
      victim.kill("SIGCONT");
      await took("thawed: back in use", isUsed(sofar));
    });
    nobodyNoticed(seen);
  });
});
