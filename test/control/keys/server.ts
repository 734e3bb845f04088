/** `server`, `auth`, `admin`: who may reach it, and where. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { connect, send, until } from "../../support/client.ts";
import { expectError } from "../../support/fleet.ts";
import { freePort, startGateway } from "../../support/gateway.ts";
import { eventually, type KeyTests, type Rig } from "./rig.ts";

const answers = (url: string): Promise<boolean> =>
  fetch(`${url}/health`).then(
    (response) => response.ok,
    () => false,
  );

async function statusForHost(rig: Rig, host: string): Promise<number | null> {
  const client = await connect(rig.gateway.port);
  client.write(`GET /v1/models HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n\r\n`);
  await until(() => client.body() !== null);
  client.leave("close");
  return client.status();
}

async function keyed(rig: Rig, keys: object[], key: string): Promise<void> {
  assert.equal((await rig.chat()).status, 200);
  await rig.change({ auth: { keys: keys as [] } });
  expectError(await rig.chat(), 401, "invalid_api_key");
  assert.equal((await rig.chat({}, { authorization: `Bearer ${key}` })).status, 200);
}

export const serverKeys: KeyTests = {
  async "server.host"(rig) {
    const { restart } = await rig.change({ server: { host: "127.0.0.2" } });
    assert.deepEqual(restart, ["server.host"]);
    assert(await answers(rig.url), "the socket that is open stays");
    assert.equal(await answers(`http://127.0.0.2:${rig.gateway.port}`), false);
    const config = { server: { host: "127.0.0.2" }, backends: [{ id: "d", kind: "demo" }] };
    const other = await startGateway({ config, skipReady: true });
    try {
      assert(await answers(`http://127.0.0.2:${other.port}`), "after a restart it is there");
      assert.equal(await answers(`http://127.0.0.1:${other.port}`), false);
    } finally {
      await other.stop();
    }
  },

  async "server.port"(rig) {
    const port = await freePort();
    const { restart } = await rig.change({ server: { port } });
    assert.deepEqual(restart, ["server.port"]);
    assert(await answers(rig.url), "the socket that is open stays");
    assert.equal(await answers(`http://127.0.0.1:${port}`), false);
    const config = { server: { port }, backends: [{ id: "d", kind: "demo" }] };
    const other = await startGateway({ config });
    assert.equal(other.port, port, "after a restart it is there");
    await other.stop();
  },

  async "server.logLevel"(rig) {
    await rig.change({ server: { logLevel: "error" } });
    const silent = await rig.chat();
    await rig.change({});
    const told = await rig.chat();
    await rig.gateway.record(told.headers.get("x-request-id") ?? "");
    const ids = rig.gateway.records().map((record) => record["request_id"]);
    assert(!ids.includes(silent.headers.get("x-request-id")), "requests are told of at level info");
  },

  async "server.insecure"(rig) {
    const refused = await rig.tryChange({ server: { host: "0.0.0.0" } });
    assert.deepEqual([refused.status, refused.text.includes("invalid_config")], [400, true]);
    const { restart } = await rig.change({ server: { host: "0.0.0.0", insecure: true } });
    assert.deepEqual(restart, ["server.host"]);
  },

  async "server.allowedHosts"(rig) {
    assert.equal(await statusForHost(rig, "gateway.lan"), 403);
    await rig.change({ server: { allowedHosts: ["gateway.lan"] } });
    assert.equal(await statusForHost(rig, "gateway.lan"), 200);
    assert.equal(await statusForHost(rig, "other.lan"), 403);
  },

  async "server.allowedOrigins"(rig) {
    const origin = "https://chat.example";
    const ask = () => send(`${rig.url}/v1/models`, undefined, { headers: { origin } });
    expectError(await ask(), 403, "origin_not_allowed");
    await rig.change({ server: { allowedOrigins: [origin] } });
    const { status, headers } = await ask();
    assert.deepEqual([status, headers.get("access-control-allow-origin")], [200, origin]);
  },

  "auth.keys[].key": (rig) => keyed(rig, [{ key: "a-key" }], "a-key"),

  async "auth.keys[].hash"(rig) {
    const hash = `sha256:${createHash("sha256").update("hashed").digest("hex")}`;
    await keyed(rig, [{ hash }], "hashed");
  },

  async "admin.enabled"(rig) {
    const status = async () => (await send(`${rig.url}/admin/api/config`)).status;
    assert.equal(await status(), 200);
    await rig.change({ admin: { enabled: false } });
    assert.equal(await status(), 404);
    assert.equal((await rig.tryChange({})).status, 404, "nor can it be switched on from there");
    rig.gateway.kill("SIGHUP");
    await eventually("a signal reloads as well", async () => (await status()) === 200);
  },

  async "admin.key"(rig) {
    const status = async (headers: Record<string, string> = {}) =>
      (await send(`${rig.url}/admin/api/config`, undefined, { headers })).status;
    assert.equal(await status(), 200);
    await rig.change({ admin: { key: "the-admin-key" } });
    assert.equal(await status(), 401);
    assert.equal(await status({ authorization: "Bearer another" }), 401);
    assert.equal(await status({ authorization: "Bearer the-admin-key" }), 200);
  },
};
