/** What the process says of its configuration: `--check --print`, the admin routes, the log. No secret in any. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { send } from "../support/client.ts";
import { startGateway } from "../support/gateway.ts";
import type { Value } from "../../src/settings/values.ts";

const TIMEOUT = { timeout: 60_000 };
const SECRET = "correct-horse-battery";
const CONFIG = {
  server: { port: 0, logLevel: "debug" },
  backends: [
    { id: "demo", kind: "demo" },
    {
      id: "key-box",
      kind: "openai",
      url: "http://127.0.0.1:9",
      models: ["keyhole"],
      apiKey: SECRET,
    },
  ],
  auth: {
    keys: [{ key: SECRET, tenant: "key-users" }],
    jwt: [
      { issuer: "https://id.example", audience: "us", jwksUrl: `http://127.0.0.1:9/?k=${SECRET}` },
    ],
  },
  tenants: { "key-users": { models: ["key*"] } },
  redis: { url: `redis://:${SECRET}@127.0.0.1:9/1` },
  admin: { key: "${ADMIN_KEY}" },
};
const OPERATORS = `${SECRET}-of-operators`;
const ENV = {
  ADMIN_KEY: OPERATORS,
  TIDEGATE_QUEUE_MAX_LENGTH: "7",
  TIDEGATE_API_KEYS: `key-users=${SECRET}-of-environment`,
};
const OPERATOR = { headers: { "x-api-key": OPERATORS } };

describe("--check --print", () => {
  it("shows every value and where it comes from", TIMEOUT, async () => {
    const args = ["--check", "--print", "--host", "localhost"];
    const run = await startGateway({ config: CONFIG, args, env: ENV, expectExit: true });
    assert.equal(await run.exited, 0);
    const said = run.stdout();
    assert(!said.includes(SECRET), said);
    for (const line of [
      /^ {2}server\.host +"localhost" {2}\(flag\)$/m,
      /^ {2}server\.port +0 {2}\(file\)$/m,
      /^ {2}queue\.maxLength +7 {2}\(environment\)$/m,
      /^ {2}queue\.maxWaitMs +120000 {2}\(default\)$/m,
      /^ {2}backends\[key-box\]\.models +\["keyhole"\] {2}\(file\)$/m,
      /^ {2}backends\[key-box\]\.apiKey +"\*\*\*" {2}\(file\)$/m,
      /^ {2}auth\.keys\[0\]\.key +"\*\*\*" {2}\(file\)$/m,
      /^ {2}auth\.keys\[0\]\.tenant +"key-users" {2}\(file\)$/m,
      /^ {2}auth\.jwt\[0\]\.issuer +"https:\/\/id\.example" {2}\(file\)$/m,
      /^ {2}auth\.jwt\[0\]\.jwksUrl +"http:\/\/127\.0\.0\.1:9\/\?\*\*\*" {2}\(file\)$/m,
      /^ {2}tenants\.key-users\.models +\["key\*"\] {2}\(file\)$/m,
      /^ {2}redis\.url +"redis:\/\/\*\*\*@127\.0\.0\.1:9\/1" {2}\(file\)$/m,
      /^ {2}redis\.prefix +"tidegate:" {2}\(default\)$/m,
      /^ {2}admin\.key +"\*\*\*" {2}\(file\)$/m,
    ]) {
      assert.match(said, line);
    }
  });

  it("shows the same to programs", TIMEOUT, async () => {
    const args = ["--check", "--print", "--json"];
    const run = await startGateway({ config: CONFIG, args, env: ENV, expectExit: true });
    const { ok, values } = JSON.parse(run.stdout()) as { ok: boolean; values: Value[] };
    assert(ok);
    assert.deepEqual(
      values.find(({ path }) => path === "admin.key"),
      { path: "admin.key", value: "***", origin: "file" },
    );
    assert(!run.stdout().includes(SECRET));
  });

  it("shows no secret among the mistakes", TIMEOUT, async () => {
    const config = { ...CONFIG, admin: { key: [SECRET] }, auth: { keys: [{ hash: SECRET }] } };
    for (const args of [["--check"], ["--check", "--json"], []]) {
      const run = await startGateway({ config, args, env: ENV, expectExit: true });
      assert.equal(await run.exited, 1);
      const said = run.stdout() + run.stderr();
      assert.match(said, /admin\.key/);
      assert(!said.includes(SECRET), said);
    }
  });
});

describe("a gateway that runs", () => {
  it("says no secret in its log, nor to its operator", TIMEOUT, async () => {
    const gateway = await startGateway({ config: CONFIG, env: ENV });
    try {
      const told: string[] = [];
      const ask = async (path: string, body?: object) => {
        told.push((await send(`${gateway.url}/admin/api/${path}`, body, OPERATOR)).text);
      };
      await ask("config");
      const other = {
        ...CONFIG,
        auth: { keys: [{ key: `${SECRET}-2`, tenant: "key-users" }] },
        redis: { url: `redis://:${SECRET}-2@127.0.0.1:9/1` },
      };
      await ask("reload?dry_run=true", other);
      assert.match(told.at(-1) ?? "", /"auth\.keys\[0\]\.key","from":"\*\*\*","to":"\*\*\*"/);
      assert.match(told.at(-1) ?? "", /"redis\.url","from":"redis:\/\/\*\*\*@127/);
      await gateway.writeConfig(other);
      await ask("reload", {});
      await gateway.writeConfig({ ...other, admin: { kye: SECRET } });
      await ask("reload", {});
      assert.match(told.at(-1) ?? "", /invalid_config/);
      await ask("reload?dry_run=true", { backends: [{ id: "x", url: `http://u:${SECRET}@a` }] });
      await ask("snapshot");
      await ask("backends");
      await ask("config");
      assert.match(told.at(-1) ?? "", /"lastReload":\{"at":\d+,"ok":false/);
      const said = [...told, gateway.stdout(), gateway.stderr()].join("\n");
      assert(!said.includes(SECRET), said);
      assert(said.includes("keyhole"), "what is none is shown");
    } finally {
      assert.equal(await gateway.stop(), 0);
    }
  });
});
