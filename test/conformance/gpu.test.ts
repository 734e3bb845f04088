/** Two engines on one GPU: each believes that it is alone. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { openaiChat, send } from "../support/client.ts";
import { startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const LOAD_MS = 60;

type Pair = Fleet<"o" | "p">;

/** Two Ollamas; while the one has a model in memory a load of the other fails. */
async function withPair(
  gpu: string | undefined,
  work: (fleet: Pair, most: () => number) => Promise<void>,
): Promise<void> {
  const behaviour = { maxLoaded: 1, loadMs: LOAD_MS };
  const own = gpu === undefined ? {} : { gpu };
  const o = { kind: "ollama" as const, models: ["a:1"], behaviour, backend: own };
  const p = { kind: "ollama" as const, models: ["b:1"], behaviour, backend: own };
  const fleet = await startFleet({ o, p }, { cache: { enabled: false } });
  const { engines } = fleet;
  let most = 0;
  const card = setInterval(() => {
    const [atO, atP] = [engines.o.resident().length, engines.p.resident().length];
    most = Math.max(most, atO + atP);
    engines.o.behave({ loadFails: atP > 0 });
    engines.p.behave({ loadFails: atO > 0 });
  }, 2);
  try {
    await work(fleet, () => most);
  } finally {
    clearInterval(card);
    await fleet.close();
  }
}

describe("backends that share a GPU", () => {
  it("take turns, whichever engine has the model: nothing fails", TIMEOUT, async () => {
    await withPair("0", async (fleet, most) => {
      const ask = (model: string) => openaiChat(fleet.url, { model });
      assert.equal((await ask("a:1")).status, 200);
      const found = await ask("b:1");
      assert.equal(found.status, 200, found.text);
      const before = fleet.engines.o.loads.length + fleet.engines.p.loads.length;
      const answers = await Promise.all(
        Array.from({ length: 20 }, (_, at) => ask(at % 2 === 0 ? "a:1" : "b:1")),
      );
      for (const { status, text } of answers) assert.equal(status, 200, text);
      const { o, p } = fleet.engines;
      assert(o.loads.length + p.loads.length - before <= 2, "no load per request");
      assert.equal(most(), 1, "never both in memory");
      assert.equal(o.resident().length + p.resident().length, 1);
      const { text } = await send(`${fleet.url}/admin/api/backends`);
      const reports = JSON.parse(text) as { gpu: string; turn?: { model: string } }[];
      assert.deepEqual(
        reports.map(({ gpu }) => gpu),
        ["0", "0"],
      );
      assert.equal(reports[0]?.turn?.model, reports[1]?.turn?.model, "it is one turn");
    });
  });

  it("are told apart from those that do not: there the second load fails", TIMEOUT, async () => {
    await withPair(undefined, async (fleet) => {
      assert.equal((await openaiChat(fleet.url, { model: "a:1" })).status, 200);
      const { status, text } = await openaiChat(fleet.url, { model: "b:1" });
      assert.equal(status, 503);
      assert.match(text, /model_load_failed/);
    });
  });
});
