/** The control plane as a whole: another set of backends takes the place of what is served. */
import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import { schema, type Config, type ConfigInput } from "../../src/config.ts";
import { Control } from "../../src/control/control.ts";
import type { Address } from "../../src/control/names.ts";
import type { Snapshot } from "../../src/core/snapshot.ts";
import { engineOf } from "../../src/engines/kinds.ts";
import { Log } from "../../src/telemetry/log.ts";

/** The names of the models at an origin; null: it takes the connection and says nothing. */
type Models = string[] | null;

/** Lets every promise that can go on go on, without a timer. */
async function settle(): Promise<void> {
  for (let turns = 0; turns < 200; turns++) await Promise.resolve();
}

function configured(input: ConfigInput): Config {
  return schema.parse(input);
}

function at(port: number, more: object = {}) {
  const url = `http://127.0.0.1:${port}`;
  return { id: `b${port}`, kind: "openai" as const, url, healthInterval: 60_000, ...more };
}

/** The backends with their models, in short. */
function shape({ backends, models }: Snapshot): Record<string, string[]> {
  return Object.fromEntries(
    backends.map(({ id }) => [
      id,
      models
        .filter((each) => each.targets.some(({ backend }) => backend === id))
        .map((m) => m.name),
    ]),
  );
}

describe("Control", () => {
  const original = globalThis.fetch;
  /** By origin: who is not there refuses. */
  const engines = new Map<string, Models>();
  const digests = new Map<string, string>();
  /** Origins asked, oldest first, and how many of these calls are under way. */
  const asked: string[] = [];
  const open = new Map<string, number>();
  let most = 0;
  let control: Control;
  let published: Snapshot[];
  let lines: Record<string, unknown>[];
  let names: Map<string, Address[] | Error>;
  let clock = 0;

  /** What somebody asks whose request runs at that port. */
  function check(port: number): Promise<boolean> {
    const { id, url } = at(port);
    return control.check({ id, url, apiKey: null }, engineOf("openai"));
  }

  beforeEach(() => {
    engines.clear();
    digests.clear();
    asked.length = 0;
    open.clear();
    most = 0;
    published = [];
    lines = [];
    names = new Map();
    clock = 0;
    mock.timers.enable({ apis: ["setTimeout"] });
    globalThis.fetch = ((text: string, init: RequestInit) => {
      const { origin, pathname } = new URL(text);
      asked.push(origin);
      const models = engines.get(origin);
      if (models === undefined) return Promise.reject(new TypeError("connection refused"));
      if (models === null) {
        const count = (open.get(origin) ?? 0) + 1;
        open.set(origin, count);
        most = Math.max(most, count);
        return new Promise((_, reject) => {
          init.signal?.addEventListener("abort", () => {
            open.set(origin, (open.get(origin) ?? 0) - 1);
            reject(init.signal?.reason as Error);
          });
        });
      }
      if (pathname === "/api/tags") {
        const digest = digests.get(origin);
        return Promise.resolve(Response.json({ models: models.map((name) => ({ name, digest })) }));
      }
      if (pathname === "/api/show") return Promise.resolve(Response.json({}));
      return Promise.resolve(Response.json({ data: models.map((id) => ({ id })) }));
    }) as typeof fetch;
    control = new Control({
      log: new Log({
        level: "debug",
        json: true,
        colour: false,
        write: (line) => void lines.push(JSON.parse(line) as Record<string, unknown>),
      }),
      now: () => clock,
      random: () => 0,
      async resolve(host) {
        const answer = await Promise.resolve(names.get(host) ?? new Error("nobody answers"));
        if (answer instanceof Error) throw answer;
        return answer;
      },
      publish: (snapshot) => void published.push(snapshot),
      flowing: () => false,
      stuck: () => false,
      waitedFor: () => false,
    });
  });
  afterEach(() => {
    control.stop();
    globalThis.fetch = original;
    mock.timers.reset();
  });

  const serve = (port: number, ...models: string[]) => engines.set(origin(port), models);
  const origin = (port: number) => `http://127.0.0.1:${port}`;
  const said = (msg: string) => lines.filter((line) => line["msg"] === msg);

  /** Takes a configuration, and waits for the first probes. */
  async function configure(input: ConfigInput, commit = () => {}) {
    const { backends, probed } = await control.configure(configured(input), commit);
    await probed;
    return Object.fromEntries(backends.map(({ id, action }) => [id, action]));
  }

  async function pass(ms: number): Promise<void> {
    clock += ms;
    mock.timers.tick(ms);
    await settle();
  }

  it("looks at every backend before it publishes any", async () => {
    serve(1, "m");
    serve(2, "n");
    await configure({ backends: [at(1), at(2), at(3)] });
    const [first] = published;
    assert(first !== undefined);
    assert.deepEqual(shape(first), { b1: ["m"], b2: ["n"], b3: [] });
    assert.deepEqual(
      first.backends.map(({ health }) => health),
      ["healthy", "healthy", "unknown"],
    );
    assert.equal(asked.filter((each) => each === origin(1)).length, 1, "and only once");
    assert.equal(control.snapshot.backends[2]?.health, "degraded");
  });

  it("says what happens to each backend", async () => {
    await configure({ backends: [at(1), at(2), at(3)] });
    const actions = await configure({ backends: [at(1), at(2, { weight: 2 }), at(4)] });
    assert.deepEqual(actions, { b1: "kept", b2: "changed", b4: "added", b3: "removed" });
    assert.deepEqual(
      lines
        .filter(({ msg }) => /^backend (added|changed|removed)$/.test(String(msg)))
        .slice(3)
        .map(({ msg, backend_id, why }) => [msg, backend_id, why]),
      [
        ["backend changed", "b2", "configuration"],
        ["backend added", "b4", "configuration"],
        ["backend removed", "b3", "configuration"],
      ],
    );
  });

  it("calls commit in the same turn as the snapshot is published", async () => {
    serve(1, "m");
    serve(2, "m");
    await configure({ backends: [at(1)] });
    const order: string[] = [];
    await configure({ backends: [at(2)] }, () => {
      assert.deepEqual(shape(control.snapshot), { b1: ["m"] });
      queueMicrotask(() => order.push(Object.keys(shape(control.snapshot)).join()));
    });
    assert.deepEqual(order, ["b2"]);
  });

  it("does not let the old ones go before the new ones were looked at", async () => {
    serve(1, "m");
    await configure({ backends: [at(1)] });
    engines.set(origin(2), null);
    serve(3, "m", "n");
    const done = control.configure(configured({ backends: [at(2), at(3)] }), () => {});
    await settle();
    assert.deepEqual(shape(control.snapshot), { b1: ["m"] }, "one new one is still being asked");
    assert.equal(published.length, 1);
    await pass(1000);
    await done;
    assert.deepEqual(
      published.map((snapshot) => shape(snapshot)),
      [{ b1: ["m"] }, { b2: [], b3: ["m", "n"] }],
    );
  });

  it("waits a second for a first look that hangs, less where its time-out is less", async () => {
    for (const [port, timeout, limit] of [
      [8, 60_000, 1000],
      [9, 200, 200],
    ] as const) {
      engines.set(origin(port), null);
      let isDone = false;
      const done = control
        .configure(configured({ backends: [at(port, { timeout })] }), () => {})
        .then(() => {
          isDone = true;
        });
      await settle();
      await pass(limit - 1);
      assert.equal(isDone, false);
      await pass(1);
      await done;
      assert.equal(control.snapshot.backends[0]?.health, "unknown");
      await configure({ backends: [at(1)] });
    }
    assert.equal(most, 1, "the look is over before the first probe begins");
  });

  it("takes configurations one after the other, in their order", async () => {
    engines.set(origin(1), null);
    serve(2, "m");
    const commits: string[] = [];
    const first = control.configure(configured({ backends: [at(1)] }), () => commits.push("1"));
    const second = control.configure(configured({ backends: [at(2)] }), () => commits.push("2"));
    await settle();
    assert.deepEqual(commits, []);
    await pass(1000);
    await Promise.all([first, second]);
    assert.deepEqual(commits, ["1", "2"]);
    assert.deepEqual(shape(control.snapshot), { b2: ["m"] });
  });

  it("goes on after a commit that threw", async () => {
    serve(1, "m");
    const broken = control.configure(configured({ backends: [at(1)] }), () => {
      throw new Error("a bug");
    });
    await assert.rejects(broken, /a bug/);
    await configure({ backends: [at(1)] });
    assert.deepEqual(shape(control.snapshot), { b1: ["m"] });
  });

  it("previews without asking or changing anything", async () => {
    await configure({ backends: [at(1), at(2)] });
    const before = [published.length, asked.length];
    const actions = control.preview(configured({ backends: [at(1, { weight: 2 }), at(3)] }));
    await settle();
    assert.deepEqual(actions, [
      { id: "b1", action: "changed" },
      { id: "b3", action: "added" },
      { id: "b2", action: "removed" },
    ]);
    assert.deepEqual([published.length, asked.length], before);
    assert.deepEqual(
      control.preview(configured({ backends: [at(1), at(2)] })).map(({ action }) => action),
      ["kept", "kept"],
    );
  });

  it("knows the newest probe, also where the snapshot is older", async () => {
    serve(1, "m");
    await configure({ backends: [at(1)] });
    const before = control.checkedAt("b1") ?? 0;
    assert(before > 0);
    while (Date.now() === before) {
      // A millisecond is enough.
    }
    assert.equal(await check(1), true);
    assert((control.checkedAt("b1") ?? 0) > before);
    assert.equal(published.length, 1);
    assert.equal(control.checkedAt("nobody"), null);
    assert.equal(await check(2), false, "it never was there, and nobody answers");
  });

  it("looks at one that has gone or moved where it was: what runs there asks too", async () => {
    serve(1, "m");
    await configure({ backends: [at(1)] });
    await configure({ backends: [at(2)] });
    assert.equal(await check(1), true, "gone");
    serve(3, "m");
    await configure({ backends: [{ ...at(3), id: "b1" }] });
    assert.equal(await check(1), true, "moved, and there still");
    engines.delete(origin(1));
    assert.equal(await check(1), false, "moved, and dead where it was");
  });

  it("hands out the key of each backend", async () => {
    await configure({ backends: [at(1, { apiKey: "secret" }), at(2)] });
    const keys = ["b1", "b2", "b3"].map((id) => control.apiKeyOf(id));
    assert.deepEqual(keys, ["secret", null, null]);
  });

  it("takes a backend out by hand and back in, and writes it down", async () => {
    await configure({ backends: [at(1)] });
    assert.equal(control.drain("b1", true), true);
    assert.equal(control.snapshot.backends[0]?.drained, true);
    assert.equal(control.drain("b1", false), true);
    assert.equal(control.drain("nobody", true), false);
    assert.deepEqual(
      lines
        .filter(({ msg }) => String(msg).endsWith("by hand"))
        .map(({ level, msg, backend_id }) => [level, msg, backend_id]),
      [
        ["info", "backend drained by hand", "b1"],
        ["info", "backend resumed by hand", "b1"],
      ],
    );
  });

  it("writes down each change of health, and no other probe", async () => {
    serve(1, "m");
    await configure({ backends: [at(1)] });
    await check(1);
    engines.delete(origin(1));
    for (let times = 0; times < 3; times++) await check(1);
    serve(1, "m");
    await check(1);
    assert.deepEqual(
      said("backend health").map(({ level, from, to, reason }) => [level, from, to, reason]),
      [
        ["warn", "healthy", "degraded", "connection refused"],
        ["warn", "degraded", "unhealthy", "connection refused"],
        ["info", "unhealthy", "healthy", ""],
      ],
    );
  });

  it("warns once for as long as something holds", async () => {
    const backends = [at(1, { kind: "ollama" }), at(2, { kind: "ollama" })];
    serve(1, "m:1");
    serve(2, "m:1");
    digests.set(origin(1), "one").set(origin(2), "other");
    await configure({ backends });
    const warnings = () => lines.filter(({ level }) => level === "warn").length;
    assert.equal(warnings(), 1);
    serve(1, "m:1", "n:1");
    await check(1);
    assert.equal(warnings(), 1);
    digests.set(origin(2), "one");
    await check(2);
    digests.set(origin(2), "other");
    await check(2);
    assert.equal(warnings(), 2);
  });

  describe("with a name for many", () => {
    const pool = {
      id: "pool",
      kind: "openai" as const,
      url: "http://pool:8000",
      discover: "dns" as const,
      healthInterval: 600_000,
    };
    const record = (last: number): Address => ({ address: `10.0.0.${last}`, ttl: 3 });
    const replica = (last: number, ...models: string[]) =>
      engines.set(`http://10.0.0.${last}:8000`, models);

    it("follows the addresses: a new one is looked at before it is served", async () => {
      names.set("pool", [record(1)]);
      replica(1, "m");
      await configure({ backends: [pool] });
      assert.deepEqual(shape(control.snapshot), { "pool@10.0.0.1": ["m"] });
      names.set("pool", [record(1), record(2)]);
      replica(2, "m", "n");
      await pass(5000);
      assert.deepEqual(
        published.slice(1).map((snapshot) => shape(snapshot)),
        [{ "pool@10.0.0.1": ["m"], "pool@10.0.0.2": ["m", "n"] }],
      );
      names.set("pool", [record(2)]);
      await pass(5000);
      assert.deepEqual(shape(control.snapshot), { "pool@10.0.0.2": ["m", "n"] });
      assert.deepEqual(
        lines.filter(({ why }) => why === "DNS").map(({ msg, backend_id }) => [msg, backend_id]),
        [
          ["backend added", "pool@10.0.0.2"],
          ["backend removed", "pool@10.0.0.1"],
        ],
      );
    });

    it("keeps what is served while nobody answers, and writes that down", async () => {
      names.set("pool", [record(1)]);
      replica(1, "m");
      await configure({ backends: [pool] });
      names.set("pool", Object.assign(new Error("queryA ESERVFAIL pool"), { code: "ESERVFAIL" }));
      for (let times = 0; times < 3; times++) await pass(5000);
      assert.deepEqual(shape(control.snapshot), { "pool@10.0.0.1": ["m"] });
      assert.deepEqual(
        said("host name not looked up").map(({ backend_id, reason }) => [backend_id, reason]),
        [["pool", "queryA ESERVFAIL pool"]],
      );
    });

    it("lets a configuration win that comes while an address is being looked at", async () => {
      names.set("pool", [record(1)]);
      replica(1, "m");
      await configure({ backends: [pool] });
      names.set("pool", [record(1), record(2)]);
      engines.set("http://10.0.0.2:8000", null);
      await pass(5000);
      assert.equal(published.length, 1, "the new address has not answered yet");
      serve(1, "x");
      const done = configure({ backends: [at(1)] });
      await pass(1000);
      await done;
      assert.deepEqual(shape(control.snapshot), { b1: ["x"] });
      await pass(60_000);
      assert.deepEqual(Object.keys(shape(control.snapshot)), ["b1"]);
    });

    it("is known by its own name while it has no address", async () => {
      await configure({ backends: [{ ...pool, models: ["m"] }] });
      assert.deepEqual(shape(control.snapshot), { pool: ["m"] });
      names.set("pool", [record(1)]);
      replica(1, "m");
      await pass(5000);
      assert.deepEqual(shape(control.snapshot), { "pool@10.0.0.1": ["m"] });
    });
  });

  describe("without backends in the configuration", () => {
    const demo = { demo: ["demo"] };

    it("serves what is found on this machine, and the demo engine until something is", async () => {
      await configure({ backends: [] });
      assert.deepEqual(shape(control.snapshot), demo);
      assert.deepEqual(
        control.discovered.map(({ id, kind }) => [id, kind]),
        [["demo", "demo"]],
      );
      assert(control.places.length > 0);
      serve(8000, "m");
      await pass(5000);
      assert.deepEqual(shape(control.snapshot), { openai: ["m"] });
      assert.deepEqual(
        lines
          .filter(({ why }) => why === "found on this machine")
          .map(({ msg, backend_id }) => [msg, backend_id]),
        [
          ["backend added", "openai"],
          ["backend removed", "demo"],
        ],
      );
    });

    it("leaves its own port alone", async () => {
      await configure({ backends: [], server: { port: 8080 } });
      assert(!asked.includes(origin(8080)));
    });

    it("forgets what it found when backends are named, and looks no further", async () => {
      serve(8000, "m");
      await configure({ backends: [] });
      await configure({ backends: [at(1)] });
      assert.deepEqual([control.places, control.discovered], [[], []]);
      asked.length = 0;
      await pass(20_000);
      assert(!asked.includes(origin(8080)));
      await configure({ backends: [] });
      assert.deepEqual(shape(control.snapshot), { openai: ["m"] });
    });
  });

  it("stops: nobody is asked any more, and nothing is published", async () => {
    names.set("pool", [{ address: "10.0.0.1", ttl: 1 }]);
    const pool = { ...at(1), id: "pool", url: "http://pool:1", discover: "dns" as const };
    await configure({ backends: [at(1), pool] });
    control.stop();
    names.set("pool", [{ address: "10.0.0.2", ttl: 1 }]);
    const before = [asked.length, published.length];
    await pass(600_000);
    await pass(600_000);
    assert.deepEqual([asked.length, published.length], before);
  });
});
