/** Where the configuration comes from: flag over environment over file over default. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, it } from "node:test";
import type { Environment } from "../../src/settings/environment.ts";
import { isLoopback } from "../../src/caller.ts";
import type { Settings } from "../../src/settings/load.ts";
import { directory, failure, load, loadFrom, paths } from "./support.ts";

describe("precedence", () => {
  it("of the port: flag, PORT, file, default", async () => {
    const file = { server: { port: 3 } };
    const environment = { PORT: "2" };
    const port = async (settings: Promise<Settings>) => (await settings).config.server.port;
    assert.equal(await port(load(file, { environment, flags: { port: 1 } })), 1);
    assert.equal(await port(load(file, { environment })), 2);
    assert.equal(await port(load(file)), 3);
    assert.equal(await port(load({})), 4000);
    assert.equal(await port(load(file, { flags: { port: 0 } })), 0);
  });

  it("of host and log level: flag, file, default", async () => {
    const file = { server: { host: "127.0.0.2", logLevel: "warn", allowedHosts: ["box"] } };
    const flags = { host: "127.0.0.3", logLevel: "debug" };
    const { server } = (await load(file, { flags })).config;
    assert.deepEqual([server.host, server.logLevel], ["127.0.0.3", "debug"]);
    assert.deepEqual(server.allowedHosts, ["box"], "the rest of the section stays");
    const other = (await load(file)).config.server;
    assert.deepEqual([other.host, other.logLevel], ["127.0.0.2", "warn"]);
  });

  it("of telemetry: OTEL variables, file, default", async () => {
    const file = { telemetry: { otlpEndpoint: "http://file:1", serviceName: "file", sampling: 0 } };
    const environment = {
      OTEL_EXPORTER_OTLP_ENDPOINT: "http://variable:2",
      OTEL_SERVICE_NAME: "variable",
    };
    const { telemetry } = (await load(file, { environment })).config;
    assert.deepEqual(telemetry, {
      otlpEndpoint: "http://variable:2",
      serviceName: "variable",
      sampling: 0,
    });
    assert.equal((await load(file)).config.telemetry.serviceName, "file");
  });

  it("does not save a wrong value: a flag and a variable are checked like the file", async () => {
    assert.deepEqual(paths(await failure(load({}, { flags: { port: 70_000 } }))), ["server.port"]);
    assert.deepEqual(paths(await failure(load({}, { flags: { logLevel: "loud" } }))), [
      "server.logLevel",
    ]);
    const error = await failure(load({}, { environment: { PORT: "http" } }));
    assert.deepEqual(
      error.mistakes.map(({ path, value }) => [path, value]),
      [["server.port", "http"]],
    );
  });

  for (const name of [
    "PORT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_SERVICE_NAME",
    "TIDEGATE_CONFIG",
    "TIDEGATE_API_KEYS",
  ]) {
    it(`takes an empty ${name} for one that is not set`, async () => {
      const file = { server: { port: 7 } };
      const { config, source, environmentKeys } = await load(file, { environment: { [name]: "" } });
      assert.deepEqual([config.server.port, source], [7, "gateway.config.json"]);
      assert.deepEqual(config.telemetry, { serviceName: "tidegate", sampling: 1 });
      assert.deepEqual(environmentKeys, []);
    });
  }

  it("lets a wrong section be reported as what it is, beside a variable for it", async () => {
    const error = await failure(load({ server: "x" }, { environment: { PORT: "4001" } }));
    assert.deepEqual(paths(error), ["server"]);
  });
});

describe("TIDEGATE_API_KEYS", () => {
  const forms: [string, [tenant: string, key: string][]][] = [
    ["secret", [["default", "secret"]]],
    ["team=secret", [["team", "secret"]]],
    [
      "one,team=two",
      [
        ["default", "one"],
        ["team", "two"],
      ],
    ],
    [
      " one , team=two ,, ",
      [
        ["default", "one"],
        ["team", "two"],
      ],
    ],
    ["c2VjcmV0cw==", [["default", "c2VjcmV0cw=="]]],
    ["team=c2VjcmV0cw==", [["team", "c2VjcmV0cw=="]]],
    ["a.b-c_d=x=y", [["a.b-c_d", "x=y"]]],
    [
      "team=one,team=two",
      [
        ["team", "one"],
        ["team", "two"],
      ],
    ],
    ["", []],
    [",", []],
  ];
  for (const [value, expected] of forms) {
    it(`reads "${value}"`, async () => {
      const file = { tenants: { team: {}, "a.b-c_d": {} } };
      const { environmentKeys } = await load(file, { environment: { TIDEGATE_API_KEYS: value } });
      assert.deepEqual(
        environmentKeys.map(({ tenant, key }) => [tenant, key]),
        expected,
      );
    });
  }

  it("adds to the file's keys", async () => {
    const file = { auth: { keys: [{ key: "of the file" }] } };
    const { config, environmentKeys } = await load(file, {
      environment: { TIDEGATE_API_KEYS: "another" },
    });
    assert.deepEqual(config.auth.keys, [{ key: "of the file", tenant: "default" }]);
    assert.equal(environmentKeys.length, 1);
  });

  it("names tenants that are listed, and shows no key where it does not", async () => {
    const environment = { TIDEGATE_API_KEYS: "taem=sk-secret,team=a,other=b,default=c" };
    const error = await failure(load({ tenants: { team: {} } }, { environment }));
    assert.deepEqual(
      error.mistakes.map(({ path, value, suggestion }) => [path, value, suggestion]),
      [
        ["TIDEGATE_API_KEYS", "taem=***", "team"],
        ["TIDEGATE_API_KEYS", "other=***", null],
      ],
    );
    assert.match(error.message, /listed in tenants: default, team/);
    assert.doesNotMatch(error.message, /sk-secret/);
  });
});

describe("a key", () => {
  const hash = `sha256:${createHash("sha256").update("one").digest("hex")}`;
  const tenants = { a: {}, b: {} };

  it("is one tenant's, in whatever form it is written", async () => {
    const keys = [
      { key: "one", tenant: "a" },
      { hash, tenant: "b" },
    ];
    const environment = { TIDEGATE_API_KEYS: "one" };
    const error = await failure(load({ tenants, auth: { keys } }, { environment }));
    assert.deepEqual(paths(error), ["auth.keys[1]", "TIDEGATE_API_KEYS"]);
    assert.match(error.message, /auth\.keys\[0\] has this one, for tenant a/);
    assert.doesNotMatch(error.message, /"one"|sha256/);
  });

  it("may stand there twice for the same one", async () => {
    const environment = { TIDEGATE_API_KEYS: "a=one" };
    await load({ tenants, auth: { keys: [{ hash, tenant: "a" }] } }, { environment });
  });

  it("of the operator is no client's", async () => {
    const admin = { key: "one" };
    const own = await failure(load({ tenants, auth: { keys: [{ hash }] }, admin }));
    assert.deepEqual(paths(own), ["admin.key"]);
    assert.match(own.message, /no client's: auth\.keys\[0\]/);
    const environment = { TIDEGATE_API_KEYS: "two,one", TIDEGATE_ADMIN_KEY: "two" };
    const [mistake] = (await failure(load({}, { environment }))).mistakes;
    assert.match(mistake?.expected ?? "", /TIDEGATE_API_KEYS has it.*from TIDEGATE_ADMIN_KEY/);
    await load({ admin }, { environment: { TIDEGATE_API_KEYS: "two" } });
  });
});

describe("jwksFile", () => {
  const publicKey = {
    kty: "OKP",
    crv: "Ed25519",
    x: "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
  };
  const issuing = (jwksFile: string) => ({
    auth: { jwt: [{ issuer: "i", audience: "a", jwksFile }] },
  });

  it("is read, from the working directory or by its whole path", async () => {
    const folder = await directory({ "keys.json": { keys: [{ ...publicKey, kid: "1" }] } });
    for (const file of ["keys.json", "./keys.json", join(folder, "keys.json")]) {
      await writeFile(join(folder, "gateway.config.json"), JSON.stringify(issuing(file)));
      const { keyFiles } = await loadFrom({}, {}, folder);
      assert.deepEqual([...keyFiles], [[file, { keys: [{ ...publicKey, kid: "1" }] }]]);
    }
  });

  const broken: [string, string | object, RegExp][] = [
    ["missing", "", /there is none/],
    ["no JSON", "-----BEGIN sk-secret", /not JSON/],
    ["no key set", { kty: "OKP", x: "sk-secret" }, /"keys"/],
    ["without keys", { keys: [] }, /at least one key/],
    [
      "one with a private key",
      { keys: [publicKey, { ...publicKey, d: "sk-secret" }] },
      /not public/,
    ],
    ["one with a symmetric key", { keys: [{ kty: "oct", k: "sk-secret" }] }, /not public/],
    ["too large", " ".repeat(1024 * 1024 + 1), /more than/],
  ];
  for (const [what, content, words] of broken) {
    it(`that is ${what} is a mistake, beside all others, and not quoted`, async () => {
      const config = { ...issuing("keys.json"), queue: { maxLength: 0 } };
      const files = what === "missing" ? {} : { "keys.json": content };
      const folder = await directory({ "gateway.config.json": config, ...files });
      const error = await failure(loadFrom({}, {}, folder));
      assert.deepEqual(paths(error), ["queue.maxLength", "auth.jwt[0].jwksFile"]);
      const [, mistake] = error.mistakes;
      assert.equal(mistake?.value, "keys.json");
      assert.match(mistake.expected, words);
      assert(mistake.expected.includes(folder), "says where paths begin");
      assert.doesNotMatch(error.message, /sk-secret/);
    });
  }

  it("that is a folder or a device is a mistake, and holds nothing up", async () => {
    for (const file of ["/", "/dev/zero", "."]) {
      assert.match((await failure(load(issuing(file)))).message, /this is no file/);
    }
  });

  it("does not tell in words what a variable holds", async () => {
    const environment = { SECRET: "sk-secret" };
    const [mistake] = (await failure(load(issuing("${SECRET}"), { environment }))).mistakes;
    assert.doesNotMatch(mistake?.expected ?? "sk-secret", /sk-secret/);
  });
});

describe("${VAR}", () => {
  const keysOf = async (key: string, environment: Environment) => {
    const { config } = await load({ auth: { keys: [{ key }] } }, { environment });
    return (config.auth.keys[0] as { key: string }).key;
  };

  it("stands for a variable, also within a text and several times", async () => {
    const environment = { A: "1", B_2: "two" };
    assert.equal(await keysOf("${A}", environment), "1");
    assert.equal(await keysOf("x${A}y${B_2}z${A}", environment), "x1ytwoz1");
  });

  it("has a default", async () => {
    assert.equal(await keysOf("${A:-none}", {}), "none");
    assert.equal(await keysOf("${A:-none}", { A: "some" }), "some");
    assert.equal(await keysOf("a${A:-}b", {}), "ab");
    assert.equal(await keysOf("${A:-http://x:1/y}", {}), "http://x:1/y");
  });

  it("takes its default for an empty variable too, as a shell does", async () => {
    assert.equal(await keysOf("${A:-none}", { A: "" }), "none");
  });

  it("is replaced once: what a variable holds is taken as it is", async () => {
    assert.equal(await keysOf("${A}", { A: "${B}", B: "deep" }), "${B}");
    assert.equal(await keysOf("${A}", { A: "$&$1" }), "$&$1");
  });

  it("leaves other dollars and braces alone", async () => {
    assert.equal(await keysOf("$A {B} $${C", { A: "1" }), "$A {B} $${C");
  });

  it("works wherever text stands, in .ts too", async () => {
    const text =
      'export default { backends: [{ id: "${ID}", url: "http://${HOST:-127.0.0.1}:1", ' +
      'models: ["${M}"] }] };\n';
    const folder = await directory({ "gateway.config.ts": text });
    const { config } = await loadFrom({}, { ID: "one", M: "a:b" }, folder);
    const [backend] = config.backends;
    assert.deepEqual(
      [backend?.id, backend?.url, backend?.models],
      ["one", "http://127.0.0.1:1", ["a:b"]],
    );
  });

  it("that is not set is a mistake at its place that names it, with all the others", async () => {
    const file = {
      auth: { keys: [{ key: "${MY_KEY}" }] },
      backends: [{ id: "${MY_ID}", url: "http://127.0.0.1:1" }],
      queue: { maxLength: 0 },
    };
    const error = await failure(load(file));
    const missing = error.mistakes.filter(({ expected }) => expected.includes("MY_"));
    assert.deepEqual(
      missing.map(({ path }) => path),
      ["auth.keys[0].key", "backends[0].id"],
    );
    assert.match(error.message, /MY_KEY/);
    assert(paths(error).includes("queue.maxLength"));
  });

  it("writes its path as every other mistake does", async () => {
    const error = await failure(load({ models: { "llama3:8b": { aliases: ["${NONE}"] } } }));
    assert.deepEqual(paths(error), ['models."llama3:8b".aliases[0]']);
  });
});

describe("the bind rule", () => {
  const open = { server: { host: "0.0.0.0" } };

  it("does not start beyond loopback without keys, and says the three ways out", async () => {
    const error = await failure(load(open));
    assert.deepEqual(paths(error), ["server.host"]);
    for (const way of ["auth.keys", "auth.jwt", "127.0.0.1", "server.insecure"]) {
      assert(error.message.includes(way), way);
    }
  });

  it("counts a host from the command line too", async () => {
    assert.deepEqual(paths(await failure(load({}, { flags: { host: "::" } }))), ["server.host"]);
  });

  it("is content with keys of the file, keys of the environment, tokens, or insecure", async () => {
    await load({ ...open, auth: { keys: [{ key: "k" }] } });
    const issuer = { issuer: "i", audience: "a", jwksUrl: "http://127.0.0.1:1" };
    await load({ ...open, auth: { jwt: [issuer] } });
    await load(open, { environment: { TIDEGATE_API_KEYS: "k" } });
    await load({ server: { host: "0.0.0.0", insecure: true } });
  });

  it("is reported beside every other mistake", async () => {
    const error = await failure(load({ server: { host: "0.0.0.0" }, queue: { maxLength: 0 } }));
    assert.deepEqual(paths(error).toSorted(), ["queue.maxLength", "server.host"]);
    const tenants = { team: { weight: 1 } };
    const guarded = { tenants, auth: { keys: [{ key: "k", tenant: "team" }] } };
    const other = await failure(load({ ...open, ...guarded, queue: { maxLength: 0 } }));
    assert.deepEqual(paths(other), ["queue.maxLength"], "and not where a tenant's key guards");
  });

  it("knows what loopback is", () => {
    for (const host of ["127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "::1", "[::1]"]) {
      assert.equal(isLoopback(host), true, host);
    }
    const others = ["0.0.0.0", "::", "192.168.0.1", "box", "127.0.0.1.evil.com", "localhost.com"];
    for (const host of [...others, "1127.0.0.1", "128.0.0.1", ""]) {
      assert.equal(isLoopback(host), false, host);
    }
  });
});

describe("notes", () => {
  it("warn of a variable that nobody reads, with a guess", async () => {
    const environment = { TIDEGATE_API_KEY: "k", TIDEGATE_ZZZZZZZZ: "1", OTHER: "1" };
    const { notes, environmentKeys } = await load({}, { environment });
    assert.equal(notes.length, 2);
    const [guessed, plain] = notes;
    assert.match(guessed ?? "", /^TIDEGATE_API_KEY: .*did you mean TIDEGATE_API_KEYS\?/);
    assert.match(plain ?? "", /^TIDEGATE_ZZZZZZZZ: unknown variable, ignored$/);
    assert.deepEqual(environmentKeys, []);
  });
});
