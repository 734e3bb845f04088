/** Reading the configuration again: swap it in whole, or keep the last good one. Real files. */
import assert from "node:assert/strict";
import { mkdir, mkdtemp, rename, rm, symlink, unlink, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, it } from "node:test";
import type { BackendAction } from "../../src/control/control.ts";
import { Reloader } from "../../src/control/reload.ts";
import { ConfigError, loadSettings, type Flags, type Settings } from "../../src/settings/load.ts";
import { Log } from "../../src/telemetry/log.ts";
import { sleep, until } from "../support/client.ts";

/** Files are looked at once a second. */
const WATCHED = { timeout: 60_000 };
const NAME = "gateway.config.json";

let folder = "";
const made: Reloader[] = [];
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "tidegate-reload-"));
});
afterEach(async () => {
  for (const reloader of made.splice(0)) reloader.stop();
  await rm(folder, { recursive: true, force: true });
});

const write = (config: unknown, name = NAME) =>
  writeFile(join(folder, name), typeof config === "string" ? config : JSON.stringify(config));

interface World {
  reloader: Reloader;
  /** What was swapped in, oldest first. */
  swapped: Settings[];
  results: boolean[];
  lines: Record<string, unknown>[];
  /** Awaited by every swap. */
  hold: () => Promise<void>;
  actions: BackendAction[];
}

async function started(
  flags: Flags = { config: NAME },
  environment: Record<string, string> = {},
): Promise<World> {
  const sources = { flags, environment, directory: folder };
  const world: World = {
    reloader: new Reloader(await loadSettings(sources), {
      sources,
      log: new Log({
        level: "debug",
        json: true,
        colour: false,
        write: (line) => void world.lines.push(JSON.parse(line) as Record<string, unknown>),
      }),
      async swap(settings) {
        await world.hold();
        world.swapped.push(settings);
        return world.actions;
      },
      done: (ok) => void world.results.push(ok),
    }),
    swapped: [],
    results: [],
    lines: [],
    hold: () => Promise.resolve(),
    actions: [],
  };
  made.push(world.reloader);
  return world;
}

const queue = (maxLength: number) => ({ queue: { maxLength } });

describe("a reload", () => {
  it("swaps in what the file says now, and says what is different", async () => {
    await write({ backends: [{ id: "a", url: "http://a:1", weight: 2 }], ...queue(1) });
    const world = await started();
    const { reloader } = world;
    assert.deepEqual([reloader.last], [null]);
    await write({ backends: [{ id: "b", url: "http://b:1" }], ...queue(2) });
    world.actions = [
      { id: "b", action: "added" },
      { id: "a", action: "removed" },
    ];
    const before = Date.now();
    const { changes, restart, backends } = await reloader.reload("api");
    const byPath = Object.fromEntries(changes.map(({ path, from, to }) => [path, [from, to]]));
    assert.deepEqual(byPath["queue.maxLength"], [1, 2]);
    assert.deepEqual(byPath["backends[b].url"], [null, "http://b:1"]);
    assert.deepEqual(byPath["backends[a].weight"], [2, null]);
    assert.deepEqual([restart, backends], [[], world.actions]);
    assert.deepEqual(
      world.swapped.map(({ config }) => config.queue.maxLength),
      [2],
    );
    assert.equal(reloader.settings, world.swapped[0]);
    const { last } = reloader;
    assert(last !== null && last.at >= before && last.at <= Date.now());
    assert.deepEqual(last, { at: last.at, ok: true, changes, errors: [] });
    assert.deepEqual(world.results, [true]);
    const [line] = world.lines;
    assert.deepEqual(
      [line?.["level"], line?.["msg"], line?.["trigger"], line?.["changes"]],
      ["info", "configuration reloaded", "api", changes],
    );
  });

  it("is one also where nothing has changed", async () => {
    await write(queue(1));
    const world = await started();
    const { changes } = await world.reloader.reload("SIGHUP");
    assert.deepEqual([changes, world.swapped.length, world.results], [[], 1, [true]]);
  });

  it("reads the file and what it imports anew, a TypeScript file too", async () => {
    await write("export const length = 1;", "length.ts");
    const config = "gateway.config.ts";
    await write(
      'import { length } from "./length.ts"; export default { queue: { maxLength: length } };',
      config,
    );
    const { reloader } = await started({ config });
    await write("export const length = 7;", "length.ts");
    await reloader.reload("api");
    assert.equal(reloader.settings.config.queue.maxLength, 7);
  });

  it("says the notes of the new configuration again", async () => {
    await write({});
    const world = await started({ config: NAME }, { TIDEGATE_ZZZZZZZZ: "1" });
    await world.reloader.reload("api");
    assert.deepEqual(
      world.lines.filter(({ level }) => level === "warn").map(({ msg }) => msg),
      ["TIDEGATE_ZZZZZZZZ: unknown variable, ignored"],
    );
  });

  it("shows no secret anywhere", async () => {
    await write({ auth: { keys: [{ key: "secret-one" }] } });
    const world = await started();
    const backends = [{ id: "a", url: "http://a:1", apiKey: "secret-two" }];
    await write({
      auth: { keys: [{ key: "secret-three" }] },
      backends,
      admin: { key: "secret-4" },
    });
    const result = await world.reloader.reload("api");
    assert.match(JSON.stringify(result), /\*\*\*/);
    const { last, settings } = world.reloader;
    assert.doesNotMatch(JSON.stringify([result, last, world.lines, settings.values]), /secret-/);
  });
});

describe("a configuration with mistakes", () => {
  it("changes nothing; every mistake is kept and written down", async () => {
    await write(queue(1));
    const world = await started();
    const { reloader } = world;
    const { settings } = reloader;
    await write({ queue: { maxLength: 0 }, servr: {} });
    const before = Date.now();
    await assert.rejects(reloader.reload("SIGHUP"), (error: unknown) => {
      assert(error instanceof ConfigError);
      assert.deepEqual(
        error.mistakes.map(({ path }) => path),
        ["queue.maxLength", "servr"],
      );
      assert.deepEqual(reloader.last?.errors, error.mistakes);
      return true;
    });
    assert.equal(reloader.settings, settings);
    assert.deepEqual([world.swapped, world.results], [[], [false]]);
    const { last } = reloader;
    assert(last !== null && last.at >= before && !last.ok);
    assert.deepEqual(last.changes, []);
    const [line] = world.lines;
    assert.deepEqual([line?.["level"], line?.["trigger"]], ["error", "SIGHUP"]);
    assert.match(String(line?.["msg"]), /the last good one stays/);
    assert.match(String(line?.["detail"]), /queue\.maxLength.*\n.*servr/);
  });

  it("is compared with the last good one when it has been put right", async () => {
    await write(queue(1));
    const world = await started();
    await write({ queue: { maxLength: "x" } });
    await assert.rejects(world.reloader.reload("api"));
    await write(queue(3));
    const { changes } = await world.reloader.reload("api");
    assert.deepEqual(changes, [{ path: "queue.maxLength", from: 1, to: 3 }]);
    assert.deepEqual([world.reloader.last?.ok, world.results], [true, [false, true]]);
  });

  const broken: [what: string, text: string][] = [
    ["no JSON", "{"],
    ["empty", ""],
    ["no object", "[1]"],
  ];
  for (const [what, text] of broken) {
    it(`may be one because the file is ${what}`, async () => {
      await write(queue(1));
      const world = await started();
      await write(text);
      await assert.rejects(world.reloader.reload("api"), ConfigError);
      assert.equal(world.reloader.last?.errors.length, 1);
      assert.deepEqual(world.swapped, []);
    });
  }

  it("is what a file that has gone is, named or looked for", async () => {
    for (const flags of [{ config: NAME }, {}]) {
      await write({ backends: [{ id: "a", url: "http://a:1" }] });
      const world = await started(flags);
      await unlink(join(folder, NAME));
      await assert.rejects(world.reloader.reload("api"), ConfigError);
      assert.deepEqual([world.swapped, world.reloader.settings.config.backends.length], [[], 1]);
      await write({ backends: [] });
      await world.reloader.reload("api");
      assert.equal(world.swapped.length, 1);
    }
  });

  it("is no longer one when a variable sets it right, or the other way round", async () => {
    await write({});
    const environment: Record<string, string> = {};
    const { reloader } = await started({ config: NAME }, environment);
    environment["TIDEGATE_QUEUE_MAX_LENGTH"] = "none";
    await assert.rejects(reloader.reload("api"), /TIDEGATE_QUEUE_MAX_LENGTH/);
    environment["TIDEGATE_QUEUE_MAX_LENGTH"] = "9";
    await reloader.reload("api");
    assert.equal(reloader.settings.config.queue.maxLength, 9);
  });
});

describe("the open socket", () => {
  it("keeps its address and port; the reload says what needs a restart", async () => {
    await write({ server: { port: 4001 }, ...queue(1) });
    const world = await started({ config: NAME, host: "127.0.0.1" });
    await write({ server: { port: 4002, logLevel: "debug" }, ...queue(2) });
    const { changes, restart } = await world.reloader.reload("api");
    assert.deepEqual(restart, ["server.port"]);
    assert.deepEqual(
      changes.find(({ path }) => path === "server.port"),
      { path: "server.port", from: 4001, to: 4002 },
    );
    const [{ config, values } = assert.fail()] = world.swapped;
    assert.deepEqual([config.server.port, config.server.logLevel], [4001, "debug"]);
    assert.deepEqual(
      values.find(({ path }) => path === "server.port"),
      { path: "server.port", value: 4001, origin: "file" },
    );
    assert.deepEqual((await world.reloader.reload("api")).restart, ["server.port"], "still so");
  });

  it("is not laid open by a configuration that would bind elsewhere", async () => {
    await write({ server: { host: "0.0.0.0" }, auth: { keys: [{ key: "k" }] } });
    const world = await started();
    await write({ server: { host: "127.0.0.1" } });
    await assert.rejects(world.reloader.reload("api"), (error: unknown) => {
      assert(error instanceof ConfigError);
      const [mistake] = error.mistakes;
      assert.equal(mistake?.path, "auth.keys");
      assert.match(mistake.expected, /0\.0\.0\.0 until a restart/);
      return true;
    });
    assert.deepEqual(world.swapped, []);
    assert.throws(() => world.reloader.compare({ server: { host: "127.0.0.1" } }), ConfigError);
    const issuer = { issuer: "i", audience: "a", jwksUrl: "http://127.0.0.1:1/keys" };
    for (const guard of [{ server: { insecure: true } }, { auth: { jwt: [issuer] } }]) {
      await write(guard);
      await world.reloader.reload("api");
    }
    assert.equal(world.swapped.length, 2);
  });
});

describe("several reloads", () => {
  it("happen one after the other, each from the file as it stands then", async () => {
    await write(queue(1));
    const world = await started();
    const held = Promise.withResolvers<void>();
    world.hold = () => held.promise;
    await write(queue(2));
    const first = world.reloader.reload("one");
    await sleep(300);
    await write(queue(3));
    const second = world.reloader.reload("two");
    await sleep(300);
    assert.deepEqual(
      [world.swapped.length, world.reloader.settings.config.queue.maxLength],
      [0, 1],
      "what is not swapped in yet is not in effect",
    );
    held.resolve();
    const [one, two] = await Promise.all([first, second]);
    assert.deepEqual(
      [one, two].map(({ changes }) => changes.map(({ from, to }) => [from, to])),
      [[[1, 2]], [[2, 3]]],
    );
    assert.deepEqual(
      world.swapped.map(({ config }) => config.queue.maxLength),
      [2, 3],
    );
  });

  it("go on after one that failed", async () => {
    await write("{");
    await assert.rejects(started());
    await write(queue(1));
    const world = await started();
    await write("{");
    const results = [world.reloader.reload("one"), world.reloader.reload("two")];
    await Promise.allSettled(results);
    await write(queue(2));
    await world.reloader.reload("three");
    assert.deepEqual(world.results, [false, false, true]);
  });

  it("go on after a swap that threw, which is written down", async () => {
    await write(queue(1));
    const world = await started();
    world.hold = () => Promise.reject(new Error("a bug"));
    await assert.rejects(world.reloader.reload("one"), /a bug/);
    assert.match(String(world.lines[0]?.["detail"]), /a bug/);
    assert.deepEqual([world.reloader.last?.ok, world.results], [false, [false]]);
    world.hold = () => Promise.resolve();
    await world.reloader.reload("two");
    assert.deepEqual(world.results, [false, true]);
  });
});

describe("a comparison", () => {
  it("says what would be different and changes nothing", async () => {
    await write(queue(1));
    const world = await started({ config: NAME }, { TIDEGATE_QUEUE_HEARTBEAT_MS: "7" });
    const { changes, restart, settings } = world.reloader.compare({
      server: { port: 9 },
      queue: { maxLength: 2, heartbeatMs: 8 },
    });
    assert.deepEqual(
      changes.map(({ path, to }) => [path, to]),
      [
        ["server.port", 9],
        ["queue.maxLength", 2],
      ],
      "the environment is stronger than any file",
    );
    assert.deepEqual([restart, settings.config.queue.heartbeatMs], [["server.port"], 7]);
    assert.equal(world.reloader.settings.config.queue.maxLength, 1);
    assert.deepEqual([world.reloader.last, world.swapped, world.results], [null, [], []]);
  });

  it("tells nobody what stands in the environment", async () => {
    await write({});
    const { reloader } = await started({ config: NAME }, { TOKEN: 's3"cret' });
    const file = {
      telemetry: { serviceName: "name-${TOKEN}" },
      server: { allowedHosts: ["${TOKEN}"] },
    };
    const { changes } = reloader.compare(file);
    assert.deepEqual(
      changes.map(({ to }) => to),
      ["***", "***"],
    );
    assert.throws(
      () => reloader.compare({ server: { logLevel: "${TOKEN}" } }),
      ({ message, mistakes }: ConfigError) =>
        !`${message}${JSON.stringify(mistakes)}`.includes("cret"),
    );
  });

  it("throws every mistake, also of what is no object", async () => {
    await write(queue(1));
    const { reloader } = await started();
    for (const file of [null, [], "text", 7, { queue: { maxLength: -1 } }, { nonsense: 1 }]) {
      assert.throws(() => reloader.compare(file), ConfigError, JSON.stringify(file));
    }
    assert.equal(reloader.last, null);
  });
});

describe("watching the file", () => {
  const lengthOf = (world: World) => world.swapped.at(-1)?.config.queue.maxLength;
  async function watching(flags: Flags = { config: NAME }): Promise<World> {
    const world = await started(flags);
    world.reloader.watch();
    // The first look at the file is what the next is compared with.
    await sleep(300);
    return world;
  }
  const becomes = (world: World, length: number) => until(() => lengthOf(world) === length);

  it("sees it written in place, and says so", WATCHED, async () => {
    await write(queue(1));
    const world = await watching();
    await write(queue(2));
    assert(await becomes(world, 2));
    assert.equal(world.lines[0]?.["trigger"], "file");
  });

  it("sees another file put in its place", WATCHED, async () => {
    await write(queue(1));
    // Of the same size and age: it is the file that is another.
    const old = new Date("2026-01-01");
    await utimes(join(folder, NAME), old, old);
    const world = await watching();
    await write(queue(3), "new");
    await utimes(join(folder, "new"), old, old);
    await rename(join(folder, "new"), join(folder, NAME));
    assert(await becomes(world, 3));
  });

  it("keeps the last good one while it is away, and sees it come back", WATCHED, async () => {
    await write(queue(1));
    const world = await watching();
    await unlink(join(folder, NAME));
    assert(await until(() => world.results.includes(false)));
    assert.deepEqual(world.swapped, []);
    await write(queue(4));
    assert(await becomes(world, 4));
  });

  it("sees a mounted ConfigMap change: a symlink behind a symlink", WATCHED, async () => {
    for (const [version, length] of [
      ["..2026_01", 1],
      ["..2026_02", 5],
    ] as const) {
      await mkdir(join(folder, version));
      await write(queue(length), join(version, NAME));
    }
    await symlink("..2026_01", join(folder, "..data"));
    await symlink(join("..data", NAME), join(folder, NAME));
    const world = await watching();
    await symlink("..2026_02", join(folder, "..data_tmp"));
    await rename(join(folder, "..data_tmp"), join(folder, "..data"));
    await rm(join(folder, "..2026_01"), { recursive: true });
    assert(await becomes(world, 5));
  });

  it(
    "sees a file appear where none was, by any of the names that are looked for",
    WATCHED,
    async () => {
      const world = await watching({});
      assert.equal(world.reloader.settings.source, "defaults");
      await write("queue: { maxLength: 6 }", "gateway.config.yaml");
      assert(await becomes(world, 6));
      assert.equal(world.reloader.settings.source, "gateway.config.yaml");
      await write(queue(7));
      assert(await becomes(world, 7));
      assert.equal(world.reloader.settings.source, NAME, "the stronger name wins");
    },
  );

  it("goes on after a mistake, and does not read again what has not changed", WATCHED, async () => {
    await write(queue(1));
    const world = await watching();
    await write("{");
    assert(await until(() => world.results.length === 1));
    await sleep(1500);
    assert.deepEqual(world.results, [false], "once is enough");
    await write(queue(8));
    assert(await becomes(world, 8));
  });

  it("ends with stop", WATCHED, async () => {
    await write(queue(1));
    const world = await watching();
    world.reloader.stop();
    await write(queue(2));
    await sleep(1500);
    assert.deepEqual(world.results, []);
  });
});
