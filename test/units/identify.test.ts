/** Who may call: Host and Origin (contract §1), keys and tenants. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { describe, it } from "node:test";
import { schema, type ConfigInput } from "../../src/config.ts";
import { checkOrigin, identify, prepareAccess, type Access } from "../../src/data/identify.ts";
import type { EnvironmentKey } from "../../src/settings/environment.ts";
import { GatewayError } from "../../src/errors.ts";

function access(input: ConfigInput = {}, keys: EnvironmentKey[] = []): Access {
  return prepareAccess(schema.parse(input), keys);
}

/** The code of the refusal, or null. */
function refusal(action: () => unknown): string | null {
  try {
    action();
    return null;
  } catch (error) {
    assert(error instanceof GatewayError, String(error));
    return error.code;
  }
}

function visit(to: Access, headers: Record<string, string>): string | null {
  return refusal(() => checkOrigin(new Headers(headers), to));
}

describe("Host", () => {
  const local = access();

  for (const host of [
    "localhost",
    "localhost:4000",
    "LOCALHOST:80",
    "127.0.0.1",
    "127.0.0.1:4000",
    "127.8.9.10:1",
    "[::1]",
    "[::1]:4000",
    "api.localhost",
    "a.b.localhost:4000",
  ]) {
    it(`${host} is a name of this machine`, () => assert.equal(visit(local, { host }), null));
  }

  for (const host of [
    "evil.example",
    "evil.example:4000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evillocalhost",
    "192.168.0.1:4000",
    "0.0.0.0:4000",
    "[::]:4000",
    "[fe80::1]:4000",
    "1127.0.0.1",
    "",
  ]) {
    it(`${JSON.stringify(host)} is none`, () => {
      assert.equal(visit(local, { host }), "host_not_allowed");
    });
  }

  it("may be added, with any port and in any case", () => {
    const box = access({ server: { allowedHosts: ["My.Box"] } });
    for (const host of ["my.box", "MY.BOX:4000"]) assert.equal(visit(box, { host }), null);
    assert.equal(visit(box, { host: "other.box" }), "host_not_allowed");
    assert.equal(visit(box, { host: "sub.my.box" }), "host_not_allowed");
  });

  it("is not looked at on other binds, which anybody may reach by any name", () => {
    const open = access({ server: { host: "0.0.0.0", insecure: true } });
    assert.equal(visit(open, { host: "gateway.example" }), null);
    for (const host of ["127.0.0.2", "::1", "localhost"]) {
      assert.equal(
        visit(access({ server: { host } }), { host: "evil.example" }),
        "host_not_allowed",
      );
    }
  });

  it("may be absent, as in HTTP/1.0", () => assert.equal(visit(local, {}), null));
});

describe("Origin", () => {
  const host = "localhost:4000";
  const local = access();

  for (const origin of [
    "http://localhost:4000",
    "http://localhost:5173",
    "https://localhost",
    "http://127.0.0.1:3000",
    "http://[::1]:3000",
    "https://app.localhost:8443",
    "app://obsidian.md",
    "file://",
    "tauri://localhost",
    "vscode-webview://0a1b2c",
  ]) {
    it(`${origin} may call`, () => assert.equal(visit(local, { host, origin }), null));
  }

  for (const origin of [
    "https://evil.example",
    "http://localhost.evil.example",
    "http://evil.example:4000",
    "http://192.168.0.1:4000",
    "null",
    "",
    "chrome-extension://abc",
    "ftp://localhost",
    "not an origin",
    "javascript:alert(1)",
  ]) {
    it(`${JSON.stringify(origin)} may not`, () => {
      assert.equal(visit(local, { host, origin }), "origin_not_allowed");
    });
  }

  it("may be the own one of another bind", () => {
    const open = access({ server: { host: "0.0.0.0", insecure: true } });
    const visitFrom = (origin: string) => visit(open, { host: "Gateway.example:4000", origin });
    assert.equal(visitFrom("http://gateway.example:4000"), null);
    assert.equal(visitFrom("http://gateway.example:5000"), "origin_not_allowed");
    assert.equal(visitFrom("http://evil.example"), "origin_not_allowed");
    assert.equal(visitFrom("http://localhost:3000"), null);
  });

  it("may be added, to the letter, or all at once", () => {
    const one = access({ server: { allowedOrigins: ["https://app.example"] } });
    assert.equal(visit(one, { host, origin: "https://app.example" }), null);
    assert.equal(visit(one, { host, origin: "http://app.example" }), "origin_not_allowed");
    assert.equal(visit(one, { host, origin: "https://app.example:8443" }), "origin_not_allowed");
    const all = access({ server: { allowedOrigins: ["*"] } });
    assert.equal(visit(all, { host, origin: "https://anything.example" }), null);
    assert.equal(visit(all, { host, origin: "null" }), null);
  });

  it("does not open a foreign Host", () => {
    const all = access({ server: { allowedOrigins: ["*"] } });
    const both = { host: "evil.example", origin: "http://evil.example" };
    assert.equal(visit(all, both), "host_not_allowed");
    assert.equal(visit(local, both), "host_not_allowed");
  });

  it("may be absent, as with every client that is no browser", () => {
    assert.equal(visit(local, { host }), null);
  });
});

describe("identify", () => {
  const hash = `sha256:${createHash("sha256").update("hashed").digest("hex")}`;
  const guarded = access({ auth: { keys: [{ key: "clear" }, { hash }] } }, [
    { key: "of the environment", tenant: "default" },
    { key: "of a team", tenant: "team" },
  ]);
  const tenant = (headers: Record<string, string>, to = guarded): string => {
    const known = identify(new Headers(headers), to);
    assert(typeof known === "string", "a key is no promise");
    return known;
  };
  const bearer = (key: string) => ({ authorization: `Bearer ${key}` });

  it("lets everybody in where there are no keys, whatever they send", () => {
    const open = access();
    assert.equal(tenant({}, open), "default");
    assert.equal(tenant(bearer("anything"), open), "default");
  });

  it("knows keys in clear, as hash, and from the environment, with their tenant", () => {
    assert.equal(tenant(bearer("clear")), "default");
    assert.equal(tenant(bearer("hashed")), "default");
    assert.equal(tenant(bearer("of the environment")), "default");
    assert.equal(tenant(bearer("of a team")), "team");
  });

  it("knows several keys of one tenant, and each key's tenant", () => {
    const shared = access({
      auth: {
        keys: [
          { key: "a1", tenant: "a" },
          { key: "b1", tenant: "b" },
          { hash, tenant: "a" },
        ],
      },
      tenants: { a: {}, b: {} },
    });
    const tenants = ["a1", "b1", "hashed"].map((key) => tenant(bearer(key), shared));
    assert.deepEqual(tenants, ["a", "b", "a"]);
  });

  it("takes them as Authorization or as x-api-key, in any case of the scheme", () => {
    assert.equal(tenant({ "x-api-key": "of a team" }), "team");
    assert.equal(tenant({ authorization: "bearer of a team" }), "team");
    assert.equal(tenant({ authorization: "BEARER   of a team " }), "team");
    assert.equal(tenant({ ...bearer("of a team"), "x-api-key": "clear" }), "team");
  });

  it("refuses none, an unknown one, and what only looks like one", () => {
    const code = (headers: Record<string, string>) => refusal(() => tenant(headers));
    assert.equal(code({}), "invalid_api_key");
    for (const headers of [
      bearer("wrong"),
      bearer("clea"),
      bearer("clear2"),
      bearer(hash),
      { authorization: "Basic clear" },
      { authorization: "clear" },
      { authorization: "Bearer" },
      { "x-api-key": "" },
    ]) {
      assert.equal(code(headers), "invalid_api_key", JSON.stringify(headers));
    }
  });

  it("guards with the environment's keys alone", () => {
    const alone = access({}, [{ key: "k", tenant: "t" }]);
    assert.equal(tenant(bearer("k"), alone), "t");
    assert.equal(
      refusal(() => tenant({}, alone)),
      "invalid_api_key",
    );
  });

  it("says what to send, and never what was sent", () => {
    for (const headers of [{}, bearer("a secret of somebody")]) {
      try {
        tenant(headers);
        assert.fail("was let in");
      } catch (error) {
        assert(error instanceof GatewayError);
        assert.equal(error.status, 401);
        assert(!error.message.includes("secret"));
      }
    }
  });
});
