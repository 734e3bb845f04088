/** Large bodies do not make the streams of others stutter: the loop is never held for long. */
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import process from "node:process";
import { chatBody, connect, postBytes, sleep, until } from "../support/client.ts";
import type { EngineProcess } from "../support/engine-process.ts";
import { startEngineProcess } from "../support/engine-process.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { Gateway } from "../support/gateway.ts";
import { startGateway } from "../support/gateway.ts";
import { postLargeBodies } from "./large-bodies.ts";

const STREAMS = 64;
const TOKEN_MS = 50;
const MEASURED_MS = 5000;
const BODIES_PER_SECOND = 5;
/** What it should be on a machine of its own, and what fails on one that is shared. */
const WANTED_MS = 50;
const MOST_MS = 250;

/** Beside other tests it would measure those. */
const ALONE = process.env.TIDEGATE_ALONE === "1";
if (!ALONE) console.log("skipped: pacing: it needs the machine to itself: TIDEGATE_ALONE=1");

void (ALONE ? describe : describe.skip)("pacing", () => {
  let gateway: Gateway;
  let paced: FakeEngine;
  let other: EngineProcess;
  before(async () => {
    // Elsewhere, so that reading five megabytes holds up neither our clock nor the other engine.
    other = await startEngineProcess({
      models: ["large"],
      behaviour: {
        fault: { kind: "answer", status: 200, body: { choices: [] } },
      },
    });
    paced = await startEngine({ behaviour: { tokens: 2000, tokenDelayMs: TOKEN_MS } });
    const backends = [
      { id: "paced", kind: "openai", url: paced.url, concurrency: STREAMS },
      { id: "other", kind: "openai", url: other.url },
    ];
    gateway = await startGateway({ config: { backends } });
  });
  after(async () => {
    await gateway.stop("SIGKILL");
    await paced.close();
    other.kill("SIGKILL");
  });

  it(
    `${STREAMS} streams keep their pace while ${BODIES_PER_SECOND} bodies of 5 MB come each second`,
    { timeout: 60_000 },
    async () => {
      let gaps: number[] = [];
      const clients = await Promise.all(
        Array.from({ length: STREAMS }, async () => {
          const client = await connect(gateway.port);
          let last = 0;
          client.socket.on("data", () => {
            const now = performance.now();
            if (last > 0) gaps.push(now - last);
            last = now;
          });
          client.write(postBytes("/v1/chat/completions", chatBody({ stream: true })));
          return client;
        }),
      );
      assert.ok(await until(() => clients.every((client) => client.status() === 200)));
      await sleep(1000);

      const measure = async (): Promise<number> => {
        gaps = [];
        await sleep(MEASURED_MS);
        const calm = summaryOf(gaps);

        const { statuses, mib } = await postLargeBodies(
          gateway.port,
          BODIES_PER_SECOND,
          MEASURED_MS,
          () => (gaps = []),
        );
        const loaded = summaryOf(gaps);
        const delay = await gateway.metric("tidegate_event_loop_delay_seconds");
        const more = loaded.p99 - calm.p99;
        const verdict = more <= WANTED_MS ? "within" : "BEYOND";
        console.log(
          `pacing: gaps without bodies ${calm.text}; with ${statuses.length} bodies of ` +
            `${mib.toFixed(1)} MiB ${loaded.text}; p99 ${more >= 0 ? "+" : ""}${more.toFixed(1)} ms: ` +
            `${verdict} +${WANTED_MS} ms; worst event loop delay ${(delay * 1000).toFixed(1)} ms`,
        );
        assert.deepEqual([...new Set(statuses)], [200]);
        assert.ok(statuses.length >= (BODIES_PER_SECOND * MEASURED_MS) / 1000 / 2, "they did come");
        assert.ok(loaded.count > (STREAMS * MEASURED_MS) / TOKEN_MS / 3, "the streams went on");
        return more;
      };
      // Others use this machine too: what one quiet measurement in three shows, the gateway can do.
      let more = Infinity;
      for (let at = 0; at < 3 && more > MOST_MS; at++) more = Math.min(more, await measure());
      for (const client of clients) client.leave("close");
      assert.ok(more <= MOST_MS, `p99 of the gaps is ${more} ms more`);
    },
  );
});

function summaryOf(gaps: number[]) {
  const sorted = gaps.toSorted((a, b) => a - b);
  const at = (share: number): number => sorted[Math.floor((sorted.length - 1) * share)] ?? Infinity;
  const [p50, p99, most] = [at(0.5), at(0.99), at(1)];
  const text = `p50 ${p50.toFixed(1)}, p99 ${p99.toFixed(1)}, max ${most.toFixed(1)} ms`;
  return { count: gaps.length, p99, text };
}
