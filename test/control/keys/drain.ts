/** `drain`: the end of the process. Each has one of its own, since it ends. */
import assert from "node:assert/strict";
import { openaiChat, send } from "../../support/client.ts";
import { startFleet, type Fleet } from "../../support/fleet.ts";
import { eventually, type KeyTests } from "./rig.ts";

/** A gateway with one engine that answers without end, whose file then says this of its drain. */
async function withDrain(drain: object, work: (fleet: Fleet<"a">) => Promise<void>): Promise<void> {
  const fleet = await startFleet({ a: {} });
  const backends = [{ id: "a", kind: "openai", url: fleet.engines.a.url }];
  await fleet.gateway.writeConfig({ drain, backends });
  assert.equal((await send(`${fleet.url}/admin/api/reload`, {})).status, 200);
  try {
    await work(fleet);
  } finally {
    await fleet.close();
  }
}

export const drainKeys: KeyTests = {
  "drain.delayMs": () =>
    withDrain({ delayMs: 60_000 }, async ({ gateway, url }) => {
      gateway.kill("SIGTERM");
      await eventually("it is not ready", async () => (await send(`${url}/ready`)).status === 503);
      assert.equal((await openaiChat(url)).status, 200, "and still admits");
      gateway.kill("SIGTERM");
      assert.equal(await gateway.exited, 1);
    }),

  "drain.graceMs": () =>
    withDrain({ graceMs: 100 }, async ({ gateway, url, engines }) => {
      engines.a.behave({ stallAfterTokens: 1 });
      const answer = openaiChat(url, { stream: true });
      await eventually("it runs", () => engines.a.activeGenerations() === 1);
      gateway.kill("SIGTERM");
      assert.equal(await gateway.exited, 1);
      assert.match((await answer).text, /shutting_down/);
    }),
};
