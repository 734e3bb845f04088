/** Backends behind one name: which addresses hold, for how long, and what is made of them. */
import assert from "node:assert/strict";
import { Resolver } from "node:dns/promises";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import fc from "fast-check";
import { schema, type BackendConfig, type ConfigInput } from "../../src/config.ts";
import { addressesAfter, Names, resolveA, type Address } from "../../src/control/names.ts";
import { startDns, type FakeDns } from "../support/dns.ts";

const REFRESH_MS = 5000;

/** Lets every promise that can go on go on, without a timer. */
async function settle(): Promise<void> {
  for (let turns = 0; turns < 50; turns++) await Promise.resolve();
}

function error(code: string, message = code): Error {
  return Object.assign(new Error(message), { code });
}

function backendsOf(...backends: NonNullable<ConfigInput["backends"]>): BackendConfig[] {
  return schema.parse({ backends }).backends;
}

function pool(more: object = {}): BackendConfig {
  const [backend] = backendsOf({
    id: "pool",
    url: "http://pool:8000/v1",
    discover: "dns",
    ...more,
  });
  assert(backend !== undefined);
  return backend;
}

describe("addressesAfter", () => {
  it("has those of the answer, and earlier ones for what is left of their time", () => {
    const known = new Map([
      ["10.0.0.1", 5000],
      ["10.0.0.2", 1000],
      ["10.0.0.3", 1001],
    ]);
    const next = addressesAfter(known, [{ address: "10.0.0.4", ttl: 30 }], 1000);
    assert.deepEqual(
      [...next],
      [
        ["10.0.0.1", 5000],
        ["10.0.0.3", 1001],
        ["10.0.0.4", 31_000],
      ],
    );
  });

  it("holds each address from each answer exactly as long as that answer said", () => {
    const address = fc.constantFrom("10.0.0.1", "10.0.0.2", "10.0.0.3");
    const answer = fc.record({
      afterMs: fc.integer({ min: 1, max: 20_000 }),
      records: fc.uniqueArray(fc.record({ address, ttl: fc.integer({ min: 0, max: 20 }) }), {
        selector: (each) => each.address,
      }),
    });
    fc.assert(
      fc.property(fc.array(answer, { maxLength: 12 }), (answers) => {
        let known = new Map<string, number>();
        let now = 0;
        const latest = new Map<string, number>();
        for (const { afterMs, records } of answers) {
          now += afterMs;
          const before = new Map(known);
          known = addressesAfter(known, records, now);
          const inAnswer = new Set<string>(records.map((each) => each.address));
          for (const { address: each, ttl } of records) latest.set(each, now + ttl * 1000);
          for (const [each, until] of latest) {
            const holds = inAnswer.has(each) || until > now;
            assert.equal(known.has(each), holds, `${each} at ${now}, until ${until}`);
            if (holds) assert.equal(known.get(each), until);
          }
          assert.equal(
            [...known.keys()].every((each) => latest.has(each)),
            true,
          );
          assert.deepEqual(new Map(before), before, "what was known is not changed");
        }
      }),
    );
  });
});

describe("Names", () => {
  beforeEach(() => mock.timers.enable({ apis: ["setTimeout"] }));
  afterEach(() => {
    for (const names of started.splice(0)) names.stop();
    mock.timers.reset();
  });
  const started: Names[] = [];

  function following() {
    const clock = { now: 0 };
    const answers = new Map<string, readonly Address[] | Error | Promise<readonly Address[]>>();
    const asked: string[] = [];
    const failures: [string, string][] = [];
    let changes = 0;
    const names = new Names({
      async resolve(host) {
        asked.push(host);
        const answer = await (answers.get(host) ?? error("ENOTFOUND"));
        if (answer instanceof Error) throw answer;
        return [...answer];
      },
      now: () => clock.now,
      changed: () => void changes++,
      failed: (id, reason) => void failures.push([id, reason]),
    });
    started.push(names);
    return {
      names,
      answers,
      asked,
      failures,
      changes: () => changes,
      async pass(ms = REFRESH_MS) {
        clock.now += ms;
        mock.timers.tick(ms);
        await settle();
      },
      addresses: (backend = pool()) =>
        names.expand(backend).flatMap(({ id }) => (id.includes("@") ? [id.split("@")[1]] : [])),
    };
  }

  const records = (ttl: number, ...last: number[]): Address[] =>
    last.map((each) => ({ address: `10.0.0.${each}`, ttl }));

  it("makes a backend of each address, with everything else as configured", async () => {
    const world = following();
    world.answers.set("pool", records(30, 2, 10, 1));
    const backend = pool({ url: "http://pool:8000/some/path/v1/", apiKey: "k", weight: 3 });
    await world.names.configure([backend]);
    const { discover: _, ...plain } = backend;
    assert.deepEqual(
      world.names.expand(backend),
      ["10.0.0.1", "10.0.0.10", "10.0.0.2"].map((address) => ({
        ...plain,
        id: `pool@${address}`,
        url: `http://${address}:8000/some/path`,
        group: "pool",
      })),
    );
    assert.deepEqual(world.asked, ["pool"]);
  });

  it("keeps a URL without port and path as short as it was", async () => {
    const world = following();
    world.answers.set("pool", records(30, 1));
    const backend = pool({ url: "http://pool" });
    await world.names.configure([backend]);
    assert.equal(world.names.expand(backend)[0]?.url, "http://10.0.0.1");
  });

  it("leaves alone what is no name for many, and asks nobody about it", async () => {
    const world = following();
    const [plain] = backendsOf({ id: "a", url: "http://pool:1" });
    assert(plain !== undefined);
    await world.names.configure([plain]);
    assert.deepEqual(world.names.expand(plain), [plain]);
    await world.pass();
    assert.deepEqual(world.asked, []);
  });

  it("stands for itself while no address is known", async () => {
    const world = following();
    await world.names.configure([pool()]);
    assert.deepEqual(
      world.names.expand(pool()).map(({ id, url, discover }) => [id, url, discover]),
      [["pool", "http://pool:8000", undefined]],
    );
  });

  it("looks again every five seconds, and speaks up only when the set is another", async () => {
    const world = following();
    world.answers.set("pool", records(4, 1, 2));
    await world.names.configure([pool()]);
    assert.equal(world.changes(), 0, "whoever configures asks for it");
    world.answers.set("pool", records(9, 2, 1));
    await world.pass();
    assert.deepEqual([world.changes(), world.asked.length], [0, 2]);
    world.answers.set("pool", records(4, 1, 2, 3));
    await world.pass();
    assert.deepEqual([world.changes(), world.addresses().length], [1, 3]);
    await world.pass();
    assert.deepEqual([world.changes(), world.asked.length], [1, 4]);
  });

  it("keeps an address that is missing in an answer until its time is over", async () => {
    const world = following();
    world.answers.set("pool", records(8, 1, 2));
    await world.names.configure([pool()]);
    world.answers.set("pool", records(8, 2));
    await world.pass();
    assert.deepEqual(world.addresses(), ["10.0.0.1", "10.0.0.2"], "answers may be partial");
    await world.pass();
    assert.deepEqual([world.addresses(), world.changes()], [["10.0.0.2"], 1]);
  });

  it("keeps everything while nobody answers, and says so once", async () => {
    const world = following();
    world.answers.set("pool", records(1, 1));
    await world.names.configure([pool()]);
    for (const code of ["ESERVFAIL", "ETIMEOUT", "EREFUSED", "EAI_AGAIN"]) {
      world.answers.set("pool", error(code));
      for (let times = 0; times < 3; times++) await world.pass();
      assert.deepEqual(world.addresses(), ["10.0.0.1"], code);
    }
    assert.equal(world.changes(), 0);
    assert.deepEqual(
      world.failures.map(([id, reason]) => `${id}: ${reason}`),
      ["pool: ESERVFAIL", "pool: ETIMEOUT", "pool: EREFUSED", "pool: EAI_AGAIN"],
    );
  });

  it("says again what failed once it had worked in between", async () => {
    const world = following();
    for (const answer of [error("ESERVFAIL"), records(30, 1), error("ESERVFAIL")]) {
      world.answers.set("pool", answer);
      if (world.asked.length === 0) await world.names.configure([pool()]);
      else await world.pass();
    }
    assert.equal(world.failures.length, 2);
  });

  it("lets the time of every address run out once the name is gone", async () => {
    for (const code of ["ENOTFOUND", "ENODATA"]) {
      const world = following();
      world.answers.set("pool", records(8, 1));
      await world.names.configure([pool()]);
      world.answers.set("pool", error(code));
      await world.pass();
      assert.deepEqual(world.addresses(), ["10.0.0.1"]);
      await world.pass();
      assert.deepEqual([world.addresses(), world.changes()], [[], 1], code);
      world.names.stop();
    }
  });

  it("takes an answer without any time to live for what it is: true until the next", async () => {
    const world = following();
    world.answers.set("pool", records(0, 1));
    await world.names.configure([pool()]);
    assert.deepEqual(world.addresses(), ["10.0.0.1"]);
    await world.pass();
    assert.deepEqual([world.addresses(), world.changes()], [["10.0.0.1"], 0]);
    world.answers.set("pool", records(0, 2));
    await world.pass();
    assert.deepEqual([world.addresses(), world.changes()], [["10.0.0.2"], 1]);
  });

  it("keeps each name's addresses apart", async () => {
    const world = following();
    const other = pool({ id: "other", url: "http://others:1" });
    world.answers.set("pool", records(30, 1)).set("others", records(30, 2));
    await world.names.configure([pool(), other]);
    world.answers.set("others", error("ESERVFAIL"));
    world.answers.set("pool", records(30, 3));
    await world.pass();
    assert.deepEqual(world.addresses(), ["10.0.0.1", "10.0.0.3"]);
    assert.deepEqual(world.addresses(other), ["10.0.0.2"]);
    assert.equal(world.changes(), 1);
  });

  describe("another configuration", () => {
    it("with another host knows nothing of the first, also while nobody answers", async () => {
      const world = following();
      world.answers.set("pool", records(300, 1)).set("new", error("ESERVFAIL"));
      await world.names.configure([pool()]);
      const moved = pool({ url: "http://new:8000" });
      await world.names.configure([moved]);
      assert.deepEqual(world.addresses(moved), []);
      world.answers.set("new", records(300, 2));
      await world.pass();
      assert.deepEqual([world.addresses(moved), world.changes()], [["10.0.0.2"], 1]);
      assert.deepEqual(world.asked, ["pool", "new", "new"]);
    });

    it("with the same host keeps what is known", async () => {
      const world = following();
      world.answers.set("pool", records(300, 1));
      await world.names.configure([pool()]);
      world.answers.set("pool", error("ESERVFAIL"));
      const changed = pool({ url: "http://pool:9000" });
      await world.names.configure([changed]);
      assert.deepEqual(
        world.names.expand(changed).map(({ url }) => url),
        ["http://10.0.0.1:9000"],
      );
    });

    it("forgets what went: it comes back as a stranger", async () => {
      const world = following();
      world.answers.set("pool", records(300, 1));
      await world.names.configure([pool()]);
      await world.names.configure([]);
      await world.pass(100_000);
      assert.equal(world.asked.length, 1, "and nobody asks for it");
      world.answers.set("pool", error("ESERVFAIL"));
      await world.names.configure([pool()]);
      assert.deepEqual(world.addresses(), []);
    });

    it("hears nothing of a look-up that began before it, and goes on at one pace", async () => {
      const world = following();
      world.answers.set("pool", records(300, 1)).set("new", records(300, 9));
      await world.names.configure([pool()]);
      const late = Promise.withResolvers<readonly Address[]>();
      world.answers.set("pool", late.promise);
      await world.pass();
      const moved = pool({ url: "http://new:8000" });
      await world.names.configure([moved]);
      late.resolve(records(300, 2));
      await settle();
      assert.deepEqual([world.addresses(moved), world.changes()], [["10.0.0.9"], 0]);
      for (let times = 0; times < 4; times++) await world.pass();
      assert.equal(world.asked.filter((host) => host === "new").length, 5);
    });
  });

  it("stops: nobody is asked, nothing is said, though a look-up is under way", async () => {
    const world = following();
    world.answers.set("pool", records(300, 1));
    await world.names.configure([pool()]);
    const late = Promise.withResolvers<readonly Address[]>();
    world.answers.set("pool", late.promise);
    await world.pass();
    world.names.stop();
    late.resolve(records(300, 2));
    await settle();
    await world.pass(100_000);
    assert.deepEqual([world.asked.length, world.changes()], [2, 0]);
  });
});

describe("resolveA", () => {
  let dns: FakeDns;
  let resolver: Resolver;
  beforeEach(async () => {
    dns = await startDns();
    resolver = new Resolver({ timeout: 100, tries: 1 });
    resolver.setServers([dns.address]);
  });
  afterEach(() => dns.close());

  it("has every address, each with its time to live", async () => {
    const all = [
      { address: "10.0.0.1", ttl: 30 },
      { address: "10.0.0.250", ttl: 86_400 },
    ];
    dns.answer("engines.test", all);
    const found = await resolveA("engines.test", resolver);
    assert.deepEqual(
      found.toSorted((a, b) => a.address.localeCompare(b.address)),
      all,
    );
    assert.deepEqual(dns.asked, ["engines.test"]);
  });

  it("asks the system about a name that DNS does not know", async () => {
    for (const answer of ["NXDOMAIN", []] as const) {
      dns.answer("localhost", answer);
      const [found] = await resolveA("localhost", resolver);
      // Deno's resolver knows this one itself.
      assert.equal(found?.address, "127.0.0.1");
    }
  });

  it("rejects where nobody knows the name: it is gone", async () => {
    await assert.rejects(resolveA("engines.invalid", resolver), { code: "ENOTFOUND" });
  });

  it("rejects where the server is broken", async () => {
    dns.answer("engines.invalid", "SERVFAIL");
    await assert.rejects(resolveA("engines.invalid", resolver));
  });

  it("rejects where nobody answers, and does not take that for gone", async () => {
    dns.answer("engines.test", "silence");
    await assert.rejects(resolveA("engines.test", resolver), (thrown: { code?: string }) => {
      assert.notEqual(thrown.code, "ENOTFOUND");
      assert.notEqual(thrown.code, "ENODATA");
      return true;
    });
  });
});
