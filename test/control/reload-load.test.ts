/** Reloads under streaming load: no stream is lost, no request is stuck, nothing invalid goes live. */
import assert from "node:assert/strict";
import { mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import { dataOf, openaiChat, send, sleep, until } from "../support/client.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import { effort } from "../support/effort.ts";
import type { Gateway } from "../support/gateway.ts";
import { runtime, startGateway } from "../support/gateway.ts";

const RELOADS = effort(300);
/** So many of them are one that takes a backend away, moves one or is invalid, in turn. */
const SPECIAL = RELOADS / 10;
const CLIENTS = 24;
const SLOTS = 4;
const TOKENS = 12;
/** What the two streams that last the whole test hold at the backend that nothing happens to. */
const HELD = 2;
const FAILURES = 2;
/** Nobody waits longer than this, however slow the machine is. */
const LONGEST_MS = 90_000;
/** The engines are in this process: busy as it is, they take their time. */
const patient = { timeout: 60_000 };

type Tree = Record<string, unknown>;
interface BackendReport {
  id: string;
  url: string;
  inFlight: number;
  breaker: { failures: number };
  ttftMs: { p50: number | null };
}

describe("reloads under load", () => {
  let folder = "";
  let gateway: Gateway;
  const engines: Record<string, FakeEngine> = {};

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "tidegate-reload-"));
    const behaviour = { tokens: TOKENS, tokenDelayMs: 50 };
    for (const id of ["kept", "leaving", "here", "there", "also"]) {
      engines[id] = await startEngine({ models: ["m"], behaviour });
    }
    engines["held"] = await startEngine({ models: ["held"], behaviour: { tokenDelayMs: 50 } });
    await write(configuration({ leaving: true, moved: false, turn: 0 }));
    gateway = await startGateway({ args: ["--config", join(folder, "gateway.config.json")] });
  });
  after(async () => {
    await gateway.stop();
    for (const engine of Object.values(engines)) await engine.close();
    await rm(folder, { recursive: true });
  });

  function urlOf(id: string): string {
    return engines[id]?.url ?? "";
  }

  function configuration(state: { leaving: boolean; moved: boolean; turn: number }): Tree {
    const common = {
      kind: "openai",
      models: ["m"],
      concurrency: SLOTS,
      healthInterval: 500,
      ...patient,
    };
    return {
      server: { port: 0 },
      timeouts: { connectMs: 60_000, idleMs: 60_000 },
      queue: { maxLength: 200 + state.turn },
      backends: [
        {
          id: "held",
          kind: "openai",
          url: urlOf("held"),
          models: ["held"],
          concurrency: 8,
          ...patient,
        },
        { ...common, id: "kept", url: urlOf("kept") },
        { ...common, id: "also", url: urlOf("also"), weight: 1 + (state.turn % 3) },
        { ...common, id: "moving", url: urlOf(state.moved ? "there" : "here") },
        ...(state.leaving ? [{ ...common, id: "leaving", url: urlOf("leaving") }] : []),
      ],
    };
  }

  /** As an editor or a deployment does: the new file takes the place of the old one at once. */
  async function write(config: Tree | string): Promise<void> {
    const path = join(folder, "gateway.config.json");
    const text = typeof config === "string" ? config : JSON.stringify(config);
    await writeFile(`${path}.new`, text);
    await rename(`${path}.new`, path);
  }

  async function reports(): Promise<Record<string, BackendReport>> {
    const answer = await send(`${gateway.url}/admin/api/backends`);
    const list = JSON.parse(answer.text) as BackendReport[];
    return Object.fromEntries(list.map((report) => [report.id, report]));
  }

  it(`${RELOADS} of them on ${runtime}`, { timeout: 300_000 }, async () => {
    engines["held"]?.behave({
      fault: { kind: "drop", by: "reset" },
      faultTimes: FAILURES,
    });
    for (let at = 0; at < FAILURES; at++) await openaiChat(gateway.url, { model: "held" });
    engines["held"]?.behave({ fault: null, tokens: 1_000_000 });
    const leave = new AbortController();
    let heldTokens = 0;
    const bad: string[] = [];
    const holding = Array.from({ length: HELD }, () =>
      hold().catch((error: unknown) => {
        if (!leave.signal.aborted) bad.push(String(error));
      }),
    );

    async function hold(): Promise<void> {
      const response = await fetch(`${gateway.url}/v1/chat/completions`, {
        method: "POST",
        body: JSON.stringify({
          model: "held",
          messages: [{ role: "user", content: "x" }],
          stream: true,
        }),
        signal: leave.signal,
      });
      const reader = response.body?.getReader();
      for (;;) {
        const result = await reader?.read();
        assert.equal(result?.done, false, "a held stream ended by itself");
        heldTokens++;
      }
    }

    let running = true;
    let streams = 0;
    const clients = Array.from({ length: CLIENTS }, async () => {
      while (running) {
        const init = { signal: AbortSignal.timeout(LONGEST_MS) };
        const { status, text } = await openaiChat(
          gateway.url,
          { model: "m", stream: true },
          init,
        ).catch((error: unknown) => ({ status: 0, text: `waits for ever: ${String(error)}` }));
        streams++;
        const whole = text.trimEnd().endsWith("data: [DONE]");
        const tokens = dataOf(text).filter((event) =>
          JSON.stringify(event).includes("content"),
        ).length;
        if (status !== 200 || !whole || tokens < TOKENS) bad.push(`${status} ${text.slice(-300)}`);
      }
    });
    assert(await until(() => heldTokens > HELD && streams > CLIENTS, 60_000));

    const state = { leaving: true, moved: false, turn: 0 };
    const seen = { removed: 0, moved: 0, invalid: 0, withQueue: 0, withRunning: 0 };
    for (let at = 1; at <= RELOADS; at++) {
      const before = await reports();
      state.turn = at;
      const special =
        at % 10 === 0 ? (["remove", "move", "invalid"] as const)[(at / 10) % 3] : null;
      if (!state.leaving) state.leaving = true;
      else if (special === "remove") {
        state.leaving = false;
        seen.removed++;
        if ((before["leaving"]?.inFlight ?? 0) > 0) seen.withRunning++;
        if ((await gateway.metric("tidegate_queue_requests", { model: "m" })) > 0) seen.withQueue++;
      } else if (special === "move") {
        state.moved = !state.moved;
        seen.moved++;
      }
      if (special === "invalid") {
        seen.invalid++;
        await write({ ...configuration(state), queue: { maxLength: "many" } });
      } else await write(configuration(state));

      const { status, text } = await send(`${gateway.url}/admin/api/reload`, "");
      assert.equal(status, special === "invalid" ? 400 : 200, text);
      const now = await reports();
      assert.equal(
        now["moving"]?.url,
        special === "invalid" ? before["moving"]?.url : urlOf(state.moved ? "there" : "here"),
      );
      assert.equal("leaving" in now, special === "invalid" ? "leaving" in before : state.leaving);
      const [was, is] = [before["held"], now["held"]];
      assert.deepEqual(
        [is?.inFlight, is?.breaker.failures, is?.ttftMs],
        [HELD, FAILURES, was?.ttftMs],
      );
      if (at % 50 === 0) await sleep(50);
    }
    const { values } = (await send(`${gateway.url}/admin/api/config`)).json() as {
      values: { path: string; value: unknown }[];
    };
    assert.equal(values.find(({ path }) => path === "queue.maxLength")?.value, 200 + RELOADS);

    running = false;
    await Promise.all(clients);
    const heldBefore = heldTokens;
    assert(await until(() => heldTokens > heldBefore + HELD), "the held streams still flow");
    leave.abort();
    await Promise.all(holding);
    assert.deepEqual(bad, []);
    const often = Math.floor(SPECIAL / 3);
    assert(
      seen.removed >= often && seen.moved >= often && seen.invalid >= often,
      JSON.stringify(seen),
    );
    assert(seen.withRunning > 0 && seen.withQueue > 0, JSON.stringify(seen));
    console.log(
      `reloads under load on ${runtime}: ${RELOADS} reloads, ${streams} streams, ${JSON.stringify(seen)}`,
    );

    for (const name of [
      "tidegate_requests_in_flight",
      "tidegate_queue_requests",
      "tidegate_slots_in_use",
      "tidegate_held_body_bytes",
    ]) {
      assert(await until(async () => (await gateway.metric(name)) === 0), name);
    }
    for (const engine of Object.values(engines)) {
      assert(await until(() => engine.activeGenerations() === 0 && engine.waiting() === 0));
    }
    assert.equal(
      (await gateway.metric("tidegate_config_reloads_total", { result: "failure" })) >=
        seen.invalid,
      true,
    );
    assert.doesNotMatch(gateway.stderr() + gateway.stdout(), /unhandled|uncaught|internal_error/i);
  });
});
