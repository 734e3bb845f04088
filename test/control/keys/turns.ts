/** What models on one engine have to share. Each has a fleet of its own: what was learned of it stays. */
import assert from "node:assert/strict";
import { openaiChat, sleep } from "../../support/client.ts";
import { expectError, startFleet, type Fleet } from "../../support/fleet.ts";
import { eventually, type KeyTests } from "./rig.ts";

/** An Ollama that has room for one of two models. */
async function withOllama(
  config: Record<string, unknown>,
  work: (fleet: Fleet<"o">) => Promise<void>,
): Promise<void> {
  const behaviour = { maxLoaded: 1, loadMs: 50 };
  const fleet = await startFleet({ o: { kind: "ollama", models: ["x:1", "y:1"], behaviour } });
  try {
    await fleet.reconfigure(config);
    await work(fleet);
  } finally {
    await fleet.close();
  }
}

function chat(fleet: Fleet<"o">, model: string) {
  return openaiChat(fleet.url, { model });
}

/** Longer than a request, a load and the shortest turn take together. */
const A_WHILE_MS = 1500;

export const turnKeys: KeyTests = {
  "queue.turnMs": () =>
    withOllama({ queue: { turnMs: 600_000 } }, async (fleet) => {
      // Each beside the other once: it is known that they do not fit, and what a load takes.
      for (const model of ["x:1", "y:1", "x:1"]) await chat(fleet, model);
      // So many and so long that somebody always waits for x: else its turn ends by itself.
      fleet.engines.o.behave({ headersDelayMs: 100 });
      let isOver = false;
      const loop = async () => {
        while (!isOver) await chat(fleet, "x:1");
      };
      const loops = Array.from({ length: 6 }, loop);
      const waiting = chat(fleet, "y:1").finally(() => {
        isOver = true;
      });
      await sleep(A_WHILE_MS);
      assert.equal(isOver, false, "it is the turn of x, for ten minutes");
      await fleet.reconfigure({ queue: { turnMs: 0 } });
      assert.equal((await waiting).status, 200);
      await Promise.all(loops);
    }),

  "timeouts.loadMs": () =>
    withOllama({ timeouts: { loadMs: 60_000 } }, async (fleet) => {
      assert.equal((await chat(fleet, "x:1")).status, 200);
      fleet.engines.o.behave({ loadMs: 100_000 });
      await fleet.reconfigure({ timeouts: { loadMs: 100 } });
      const answer = await chat(fleet, "y:1");
      expectError(answer, 503, "model_load_failed");
      assert(Number(answer.headers.get("retry-after")) >= 9);
      assert.equal((await chat(fleet, "x:1")).status, 503, "nor can the other come back");
    }),

  "models.<name>.warm": () =>
    withOllama({}, async (fleet) => {
      assert.deepEqual(fleet.engines.o.resident(), []);
      await fleet.reconfigure({ models: { "y:1": { warm: true } } });
      await eventually("it is loaded", () => fleet.engines.o.resident().includes("y:1"));
      assert.equal(fleet.engines.o.inference().length, 0);
    }),
};
