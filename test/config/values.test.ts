/** What is printed of a configuration, and of the difference between two: every value, no secret. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { schema, type ConfigInput } from "../../src/config.ts";
import { changesBetween, valuesOf, type Change, type Value } from "../../src/settings/values.ts";

/** As the documentation would have it printed: `path = value (origin)`. */
function lines(values: readonly Value[]): string[] {
  return values.map(({ path, value, origin }) => `${path} = ${JSON.stringify(value)} (${origin})`);
}

function changes(before: ConfigInput, after: ConfigInput): Change[] {
  return changesBetween(schema.parse(before), schema.parse(after));
}

const A = { id: "a", url: "http://127.0.0.1:1" };
const B = { id: "b", url: "http://127.0.0.1:2" };

describe("values", () => {
  it("are every single value and every list of single values, in the order of the schema", () => {
    const config = schema.parse({});
    const values = valuesOf(config, []);
    assert.deepEqual(values.slice(0, 3), [
      { path: "server.host", value: "127.0.0.1", origin: "default" },
      { path: "server.port", value: 4000, origin: "default" },
      { path: "server.logLevel", value: "info", origin: "default" },
    ]);
    const paths = values.map(({ path }) => path);
    for (const path of ["backends", "server.allowedHosts", "metrics.labels", "admin.enabled"]) {
      assert(paths.includes(path), path);
    }
    assert.equal(new Set(paths).size, paths.length);
  });

  it("name backends by their ids and models by their names", () => {
    const raw = {
      backends: [
        { ...A, models: ["x", "y"] },
        { ...B, models: ["x", { name: "z", upstream: "org/Z" }] },
      ],
      models: { "llama3:8b": { concurrency: 2 }, plain: {} },
    };
    const values = valuesOf(schema.parse(raw), [["file", raw]]);
    const ours = lines(values).filter((line) => /^(?:backends|models)/.test(line));
    for (const line of [
      'backends[a].id = "a" (file)',
      'backends[a].models = ["x","y"] (file)',
      "backends[a].weight = 1 (default)",
      'backends[b].models[0] = "x" (file)',
      'backends[b].models[1].name = "z" (file)',
      'models."llama3:8b".concurrency = 2 (file)',
      'models."llama3:8b".aliases = [] (default)',
      "models.plain.aliases = [] (default)",
    ]) {
      assert(ours.includes(line), `${line} in\n${ours.join("\n")}`);
    }
  });

  it("come from the strongest layer that has them", () => {
    const config = schema.parse({ queue: { maxLength: 1, maxWaitMs: 2, heartbeatMs: 3 } });
    const values = valuesOf(config, [
      ["flag", { queue: { maxLength: 1, maxWaitMs: undefined } }],
      ["environment", { queue: { maxLength: 7, maxWaitMs: 2 } }],
      ["file", { queue: { maxLength: 8, maxWaitMs: 9, heartbeatMs: 3 } }],
    ]);
    assert.deepEqual(
      lines(values).filter((line) => line.startsWith("queue")),
      [
        "queue.maxWaitMs = 2 (environment)",
        "queue.maxLength = 1 (flag)",
        'queue.turnMs = "auto" (default)',
        "queue.heartbeatMs = 3 (file)",
      ],
    );
  });

  it("of a list that a stronger layer gives are not another list's", () => {
    const config = schema.parse({ backends: [A] });
    const values = valuesOf(config, [
      ["environment", { backends: [A] }],
      ["file", { backends: [{ ...B, weight: 1, timeout: 3000 }] }],
    ]);
    const weight = values.find(({ path }) => path === "backends[a].weight");
    assert.equal(weight?.origin, "default");
  });
});

describe("secrets in values and changes", () => {
  const SECRET = "correct-horse-battery";
  const secrets: ConfigInput = {
    backends: [{ ...A, apiKey: SECRET }],
    auth: {
      keys: [{ key: SECRET }, { hash: `sha256:${"5ec2e7".repeat(10)}0000` }],
      jwt: [{ issuer: "i", audience: "a", jwksUrl: `https://id.example/keys?token=${SECRET}` }],
    },
    redis: { url: `redis://user:${SECRET}@box:6379/1` },
    admin: { key: SECRET },
    telemetry: { otlpEndpoint: `http://user:${SECRET}@collector:4318/v1?token=${SECRET}` },
  };

  it("are ***, so that one sees that something is there", () => {
    const values = valuesOf(schema.parse(secrets), [["file", secrets]]);
    const text = JSON.stringify(values);
    assert(!text.includes(SECRET), text);
    assert(!text.includes("5ec2e7"), text);
    const shown = lines(values).filter((line) => line.includes("***"));
    assert.deepEqual(shown, [
      'backends[a].apiKey = "***" (file)',
      'auth.keys[0].key = "***" (file)',
      'auth.keys[1].hash = "***" (file)',
      'auth.jwt[0].jwksUrl = "https://id.example/keys?***" (file)',
      'redis.url = "redis://***@box:6379/1" (file)',
      'telemetry.otlpEndpoint = "http://***@collector:4318/v1?***" (file)',
      'admin.key = "***" (file)',
    ]);
  });

  it("are *** before and after, and a change of one is a change", () => {
    const other = JSON.parse(
      JSON.stringify(secrets).replaceAll(SECRET, `${SECRET}2`),
    ) as ConfigInput;
    const made = changes(secrets, other);
    assert.deepEqual(made.map(({ path }) => path).toSorted(), [
      "admin.key",
      "auth.jwt[0].jwksUrl",
      "auth.keys[0].key",
      "backends[a].apiKey",
      "redis.url",
      "telemetry.otlpEndpoint",
    ]);
    assert(!JSON.stringify(made).includes(SECRET), JSON.stringify(made));
    for (const { from, to } of made)
      assert.match(`${String(from)} ${String(to)}`, /\*\*\*.*\*\*\*/);
    const gone = JSON.stringify(changes(secrets, {}));
    assert(!gone.includes(SECRET), gone);
  });

  it("are not the names of models, backends and tenants that only sound so", () => {
    const raw = {
      backends: [{ id: "key-box", url: A.url, models: ["keyhole:7b", "secret-agent"] }],
      models: { "keyhole:7b": { aliases: ["hash-brown"], backends: ["key-box"] } },
      tenants: { "key-users": { models: ["keyhole*"] } },
      redis: { url: "redis://127.0.0.1:6379", prefix: "hash:" },
    };
    const text = JSON.stringify(valuesOf(schema.parse(raw), [["file", raw]]));
    const names = ["key-box", "keyhole:7b", "secret-agent", "hash-brown", "keyhole*", "hash:"];
    for (const name of names) assert(text.includes(`"${name}"`), `${name} in ${text}`);
    assert(text.includes("tenants.key-users.weight"), text);
    assert(!text.includes("***"), text);
  });

  it("are not what an issuer is known by, nor whose key it is", () => {
    const jwt = {
      issuer: "https://id.example",
      audience: "the-key-club",
      jwksFile: "/etc/keys.json",
      algorithms: ["ES256" as const],
      tenantClaim: "realm.secretary",
    };
    const raw = { tenants: { t: {} }, auth: { keys: [{ key: SECRET, tenant: "t" }], jwt: [jwt] } };
    const shown = lines(valuesOf(schema.parse(raw), [["file", raw]]));
    for (const line of [
      'auth.keys[0].key = "***" (file)',
      'auth.keys[0].tenant = "t" (file)',
      'auth.jwt[0].issuer = "https://id.example" (file)',
      'auth.jwt[0].audience = "the-key-club" (file)',
      'auth.jwt[0].jwksFile = "/etc/keys.json" (file)',
      'auth.jwt[0].algorithms = ["ES256"] (file)',
      'auth.jwt[0].tenantClaim = "realm.secretary" (file)',
      "auth.jwt[0].toleranceS = 5 (default)",
    ]) {
      assert(shown.includes(line), `${line} in\n${shown.join("\n")}`);
    }
  });

  it("are not times and numbers either", () => {
    const values = valuesOf(schema.parse({ models: { m: { maxOutputTokens: 9 } } }), []);
    const shown = Object.fromEntries(values.map(({ path, value }) => [path, value]));
    assert.deepEqual([shown["models.m.maxOutputTokens"], shown["admin.enabled"]], [9, true]);
  });
});

describe("changes", () => {
  it("are none between two that say the same", () => {
    assert.deepEqual(changes({}, { server: {}, backends: [], queue: { maxLength: 512 } }), []);
    assert.deepEqual(changes({ backends: [A, B] }, { backends: [B, A] }), [], "in another order");
  });

  it("say what a value was and what it is", () => {
    assert.deepEqual(changes({}, { queue: { maxLength: 1 }, server: { allowedHosts: ["x"] } }), [
      { path: "server.allowedHosts", from: [], to: ["x"] },
      { path: "queue.maxLength", from: 512, to: 1 },
    ]);
  });

  it("say null for what was not there, and for what is no more", () => {
    assert.deepEqual(changes({ admin: {} }, { telemetry: { otlpEndpoint: "http://a" } }), [
      { path: "telemetry.otlpEndpoint", from: null, to: "http://a" },
    ]);
    assert.deepEqual(changes({ tenants: { t: { budgets: [{ tokens: 9, window: "day" }] } } }, {}), [
      { path: "tenants.t.weight", from: 1, to: null },
      { path: "tenants.t.priority", from: "default", to: null },
      { path: "tenants.t.models", from: ["*"], to: null },
      { path: "tenants.t.budgets[0].tokens", from: 9, to: null },
      { path: "tenants.t.budgets[0].window", from: "day", to: null },
    ]);
  });

  it("follow a backend by its id, wherever it stands", () => {
    const made = changes({ backends: [A, B] }, { backends: [{ ...B, weight: 2 }] });
    assert.deepEqual(
      made.filter(({ path }) => path.startsWith("backends[b]")),
      [{ path: "backends[b].weight", from: 1, to: 2 }],
    );
    assert(made.every(({ path, to }) => !path.startsWith("backends[a]") || to === null));
    assert(made.some(({ path, from }) => path === "backends[a].url" && from === A.url));
  });

  it("follow a model by its name", () => {
    const made = changes({ models: { "a:1": {} } }, { models: { "a:1": { aliases: ["x"] } } });
    assert.deepEqual(made, [{ path: 'models."a:1".aliases', from: [], to: ["x"] }]);
  });
});
