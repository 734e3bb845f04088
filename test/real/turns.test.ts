/**
 * A real Ollama with room for one model, direct and through the gateway: how often it loads, and how long
 * everything takes (algorithms.md §2.4, the runs b, c and d). `TIDEGATE_ALONE=1` runs it.
 */
import assert from "node:assert/strict";
import process from "node:process";
import test from "node:test";
import { openaiChat, sleep, until } from "../support/client.ts";
import { startGateway, type Gateway } from "../support/gateway.ts";
import { missing, startOllama, type Service } from "./support.ts";

/** It measures times, two minutes long: beside other tests it would measure those. */
const skip = process.env.TIDEGATE_ALONE === "1" ? missing("ollama") : "needs TIDEGATE_ALONE=1";

/** One for every load of a model in Ollama's log. */
const LOAD = /msg="starting llama-server"/g;
const MODELS = ["smol-a", "smol-b"];
const BURST = 40;
/** For the user of B beside two loops on A. */
const BESIDE_MS = 25_000;

interface World {
  ollama: Service;
  gateway: Gateway;
  loads: () => number;
}

async function withOne(work: (world: World) => Promise<void>): Promise<void> {
  const ollama = await startOllama(undefined, 1);
  const backends = [{ id: "real", kind: "ollama", url: ollama.url, healthInterval: 1000 }];
  const gateway = await startGateway({ config: { backends } });
  try {
    await work({ ollama, gateway, loads: () => ollama.output().match(LOAD)?.length ?? 0 });
  } finally {
    await gateway.stop();
    await ollama.stop();
  }
}

async function ask(url: string, model: string, signal?: AbortSignal): Promise<number> {
  const startedAt = performance.now();
  const init = signal === undefined ? {} : { signal };
  const answer = await openaiChat(url, { model, max_tokens: 12, temperature: 0.7 }, init);
  assert.equal(answer.status, 200, answer.text);
  return performance.now() - startedAt;
}

async function burst(url: string): Promise<number> {
  const startedAt = performance.now();
  await Promise.all(Array.from({ length: BURST }, (_, at) => ask(url, MODELS[at % 2] as string)));
  return performance.now() - startedAt;
}

/** A user who asks for B now and then beside two loops on A: how long B waits, and what A gets done. */
async function beside(url: string): Promise<{ waits: number[]; unserved: number; done: number }> {
  const controller = new AbortController();
  const endsAt = performance.now() + BESIDE_MS;
  let done = 0;
  const loop = async () => {
    while (performance.now() < endsAt) {
      await ask(url, "smol-a");
      done++;
    }
  };
  const loops = [loop(), loop()];
  await sleep(1000);
  const waits: number[] = [];
  let asked = 0;
  const user = async () => {
    while (performance.now() < endsAt - 8000) {
      asked++;
      waits.push(await ask(url, "smol-b", controller.signal));
      await sleep(1000);
    }
  };
  const asking = user().catch(() => {});
  await Promise.all(loops);
  controller.abort();
  await asking;
  return { waits, unserved: asked - waits.length, done };
}

const seconds = (ms: number) => `${(ms / 1000).toFixed(1)} s`;

test("real Ollama, one model at a time", { skip, timeout: 300_000 }, async (suite) => {
  await withOne(async ({ ollama, gateway, loads }) => {
    await suite.test("a burst over two models", async () => {
      const report: string[] = [];
      const counts: number[] = [];
      for (const [name, url] of [
        ["direct", ollama.url],
        ["gateway", gateway.url],
      ] as const) {
        const before = loads();
        const took = await burst(url);
        counts.push(loads() - before);
        report.push(`${name}: ${loads() - before} loads, ${seconds(took)}`);
      }
      console.log(`burst of ${BURST}: ${report.join("; ")}`);
      assert.ok((counts[1] ?? Infinity) <= 3, report.join("; "));
    });

    await suite.test("a user of B beside two loops on A", async () => {
      const direct = await beside(ollama.url);
      const ours = await beside(gateway.url);
      for (const [name, { waits, unserved, done }] of Object.entries({ direct, ours })) {
        const worst =
          waits.length === 0 ? "never served" : `at most ${seconds(Math.max(...waits))}`;
        console.log(
          `beside, ${name}: B ${waits.length} served, ${worst}, ${unserved} unserved; A ${done}`,
        );
      }
      assert.equal(ours.unserved, 0);
      // Two loads per request of B within half a minute, on a machine that others use too.
      assert.ok(ours.done >= 0.5 * direct.done, `A got ${ours.done} of ${direct.done}`);
    });

    await suite.test("clients that leave during a load do not end it", async () => {
      await ask(gateway.url, "smol-a");
      const before = loads();
      for (let each = 0; each < 10; each++) {
        const controller = new AbortController();
        const asking = ask(gateway.url, "smol-b", controller.signal).catch(() => {});
        await sleep(40);
        controller.abort();
        await asking;
      }
      await until(() => gateway.stdout().includes("model loaded"), 5000);
      await ask(gateway.url, "smol-b");
      assert.equal(loads() - before, 1);
    });
  });
});
