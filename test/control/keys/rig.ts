/** One gateway in front of three engines, whose configuration file the tests of the keys change. */
import assert from "node:assert/strict";
import type { ConfigInput } from "../../../src/config.ts";
import { chatBody, open, openaiChat, send, until } from "../../support/client.ts";
import type { Answer } from "../../support/client.ts";
import type { FakeEngine } from "../../support/engine.ts";
import { startEngine } from "../../support/engine.ts";
import type { Gateway } from "../../support/gateway.ts";
import { startGateway } from "../../support/gateway.ts";

type BackendInput = NonNullable<ConfigInput["backends"]>[number];

/** What a test changes: keys of sections, and keys of backends by id. */
export type Patch = Omit<ConfigInput, "backends"> & {
  backends?: Partial<Record<"a" | "b" | "o", Partial<BackendInput>>>;
};

/** The answer to a reload. */
export interface Reloaded {
  version: number;
  changes: { path: string }[];
  restart: string[];
}

interface BackendReport {
  id: string;
  health: string;
  reason: string;
  queued: number;
}

export interface Rig {
  gateway: Gateway;
  url: string;
  /** Two plain engines with model `m`, each with one of its own; and an Ollama. */
  engines: { a: FakeEngine; b: FakeEngine; o: FakeEngine };
  /** Writes the file, with these changes to what stands there at the beginning, and has it read. */
  change(patch: Patch): Promise<Reloaded>;
  /** The answer to a reload of such a file, whatever it is. */
  tryChange(patch: Patch): Promise<Answer>;
  chat(body?: Record<string, unknown>, headers?: Record<string, string>): Promise<Answer>;
  /** A request that is on its way until the test is over. */
  hold(body?: Record<string, unknown>, headers?: Record<string, string>): Promise<Response>;
  /** Names of the models that are listed. */
  models(): Promise<string[]>;
  /** By id. */
  backends(): Promise<Record<string, BackendReport>>;
  /** As at the beginning. */
  reset(): Promise<void>;
  close(): Promise<void>;
}

/** What a test of a key does: it changes the file, and sees that the gateway behaves otherwise. */
export type KeyTests = Record<string, (rig: Rig) => Promise<void>>;

/** No limit strikes unless a test says so: one whose key had no effect would wait for ever. */
const LONG_MS = 600_000;
const ADMIN = { "x-api-key": "the-admin-key" };

export async function startRig(): Promise<Rig> {
  const a = await startEngine({ models: ["m", "only-a"] });
  const b = await startEngine({ models: ["m", "only-b"] });
  const o = await startEngine({
    kind: "ollama",
    models: ["local:1b", { name: "big:cloud", remoteHost: "https://ollama.com" }],
  });
  const engines = { a, b, o };
  const base = {
    queue: { maxWaitMs: LONG_MS, heartbeatMs: 0 },
    timeouts: {
      connectMs: LONG_MS,
      firstByteMs: LONG_MS,
      idleMs: LONG_MS,
      clientMs: LONG_MS,
      totalMs: LONG_MS,
    },
    backends: Object.entries(engines).map(([id, { kind, url }]) => {
      return { id, kind, url, healthInterval: 500 };
    }),
  } satisfies ConfigInput;
  const gateway = await startGateway({ config: base, env: { OTEL_BSP_SCHEDULE_DELAY: "50" } });
  const { url } = gateway;
  /** The answers too: a runtime may abort what nobody can read any more. */
  let held: { controller: AbortController; response: Promise<Response> }[] = [];

  function patched({ backends = {}, ...sections }: Patch): object {
    const config: Record<string, object> = { ...base };
    for (const [section, keys] of Object.entries(sections)) {
      config[section] = { ...config[section], ...(keys as object) };
    }
    const known: Record<string, object> = backends;
    return { ...config, backends: base.backends.map((each) => ({ ...each, ...known[each.id] })) };
  }

  const rig: Rig = {
    gateway,
    url,
    engines,
    async tryChange(patch) {
      await gateway.writeConfig(patched(patch));
      return await send(`${url}/admin/api/reload`, {}, { headers: ADMIN });
    },
    async change(patch) {
      const answer = await rig.tryChange(patch);
      assert.equal(answer.status, 200, answer.text);
      return answer.json() as unknown as Reloaded;
    },
    chat: (body = {}, headers = {}) => openaiChat(url, { model: "m", ...body }, { headers }),
    hold(body = {}, headers = {}) {
      const controller = new AbortController();
      const init = { headers, signal: controller.signal };
      const response = open(`${url}/v1/chat/completions`, chatBody({ model: "m", ...body }), init);
      // Whoever waits for it sees the rejection; for the others it is no failure.
      response.catch(() => {});
      held.push({ controller, response });
      return response;
    },
    async models() {
      const { data } = (await send(`${url}/v1/models`)).json() as { data: { id: string }[] };
      return data.map(({ id }) => id);
    },
    async backends() {
      const answer = await send(`${url}/admin/api/backends`, undefined, { headers: ADMIN });
      const list = JSON.parse(answer.text) as BackendReport[];
      return Object.fromEntries(list.map((each) => [each.id, each]));
    },
    async reset() {
      for (const { controller } of held) controller.abort();
      held = [];
      for (const engine of Object.values(engines)) engine.reset();
      await rig.change({});
      const isQuiet = await until(async () => {
        const all = Object.values(await rig.backends());
        const running = await gateway.metric("tidegate_slots_in_use");
        return running === 0 && all.every(({ health }) => health === "healthy");
      }, 4000);
      assert(isQuiet, JSON.stringify(await rig.backends()));
      for (const engine of Object.values(engines)) engine.reset();
    },
    async close() {
      assert.equal(await gateway.stop(), 0);
      for (const engine of Object.values(engines)) await engine.close();
      assert.doesNotMatch(
        gateway.stderr() + gateway.stdout(),
        /unhandled|uncaught|internal_error/i,
      );
    },
  };
  return rig;
}

/** Waits until it holds. */
export async function eventually(
  what: string,
  predicate: () => boolean | Promise<boolean>,
  ms = 5000,
): Promise<void> {
  assert(await until(predicate, ms), what);
}
