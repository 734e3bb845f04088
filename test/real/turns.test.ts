/**
 * A real Ollama with room for one model, direct and through the gateway. `TIDEGATE_ALONE=1` runs it. Only
 * what a noisy machine cannot change is asserted: `bun run turns` has the times.
 */
import assert from "node:assert/strict";
import process from "node:process";
import test from "node:test";
import { missing } from "./support.ts";
import {
  beside,
  burst,
  leavers,
  mix,
  startWorld,
  unloadAll,
  type Shown,
  type World,
} from "./turn-runs.ts";

/** Minutes long, and beside other tests both would suffer. */
const skip =
  process.env.TIDEGATE_ALONE === "1" ? missing("ollama of three") : "needs TIDEGATE_ALONE=1";

function tell(name: string, { loads, tookMs, asked }: Shown): void {
  const endings = Map.groupBy(asked, ({ model, ending }) => `${model} ${ending}`);
  const counts = [...endings].map(([ending, { length }]) => `${length} ${ending}`);
  console.log(`${name}: ${loads} loads, ${(tookMs / 1000).toFixed(1)} s; ${counts.join(", ")}`);
}

/** The same work at both addresses. */
async function both<Result extends Shown>(
  world: World,
  name: string,
  work: (url: string) => Promise<Result>,
): Promise<{ direct: Result; ours: Result }> {
  await unloadAll(world);
  const direct = await work(world.ollama.url);
  tell(`${name}, direct`, direct);
  await unloadAll(world);
  const ours = await work(world.gateway.url);
  tell(`${name}, gateway`, ours);
  const failed = ours.asked.filter(({ ending }) => ending === "failed");
  assert.deepEqual(failed, [], "through the gateway nothing fails");
  return { direct, ours };
}

test("real Ollama, three models, one at a time", { skip, timeout: 400_000 }, async (suite) => {
  const world = await startWorld();
  try {
    await suite.test("a burst over three models needs three loads", async () => {
      const { ours } = await both(world, "burst", (url) => burst(world, url, 30));
      assert.equal(ours.loads, 3);
    });

    await suite.test("a mix of three models needs fewer loads", async () => {
      const { direct, ours } = await both(world, "mix", (url) => mix(world, url, 1, 3, 12_000));
      assert.ok(ours.loads < direct.loads, `${direct.loads} loads direct, ${ours.loads} ours`);
    });

    await suite.test("a user of B beside two loops on A is served", async () => {
      // The longest turn is a minute.
      const options = { everyMs: 2000, askForMs: 4000, endMs: 100_000, endsWhenServed: true };
      await unloadAll(world);
      const ours = await beside(world, world.gateway.url, options);
      tell("beside, gateway", ours);
      const unserved = ours.asked.filter(({ ending }) => ending !== "served");
      assert.deepEqual(unserved, []);
    });

    await suite.test("clients that leave during a load do not end it", async () => {
      const { ours } = await both(world, "leavers", (url) => leavers(world, url, 40));
      assert.deepEqual([ours.loads, ours.resident], [1, true]);
      assert.equal(ours.asked.at(-1)?.ending, "served");
    });
  } finally {
    await world.stop();
  }
});
