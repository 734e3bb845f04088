/** Who may operate the gateway (contract §5): a key, or a caller on this machine that nobody sent. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { checkOperator } from "../../src/admin/access.ts";
import { GatewayError } from "../../src/errors.ts";

interface Call {
  headers?: Record<string, string>;
  peer?: string | null;
  key?: string;
}

const HOST = { host: "localhost:4000" };

/** The status a caller gets: 200 where it may. */
function statusOf({ headers = {}, peer = "127.0.0.1", key }: Call): number {
  try {
    checkOperator(new Headers({ ...HOST, ...headers }), peer, key);
    return 200;
  } catch (error) {
    assert(error instanceof GatewayError, String(error));
    return error.status;
  }
}

function codeOf(call: Call): string | null {
  try {
    checkOperator(new Headers({ ...HOST, ...call.headers }), call.peer ?? null, call.key);
    return null;
  } catch (error) {
    return error instanceof GatewayError ? error.code : String(error);
  }
}

describe("with an admin key", () => {
  const key = "sesame open up";
  const from: [what: string, call: Call, status: number][] = [
    ["the key as a bearer token", { headers: { authorization: `Bearer ${key}` } }, 200],
    ["in whatever case", { headers: { authorization: `bearer   ${key}` } }, 200],
    ["the key as x-api-key", { headers: { "x-api-key": key } }, 200],
    ["the key from anywhere", { headers: { "x-api-key": key }, peer: "203.0.113.9" }, 200],
    ["the key from who knows where", { headers: { "x-api-key": key }, peer: null }, 200],
    [
      "the key at any Host, forwarded",
      { headers: { "x-api-key": key, host: "llm.example", "x-forwarded-for": "203.0.113.9" } },
      200,
    ],
    ["no key, though from this machine", {}, 401],
    ["no key from elsewhere", { peer: "203.0.113.9" }, 401],
    ["another key", { headers: { authorization: "Bearer other" } }, 401],
    ["a part of it", { headers: { "x-api-key": "sesame open" } }, 401],
    ["more than it", { headers: { "x-api-key": `${key}!` } }, 401],
    ["an empty one", { headers: { "x-api-key": "" } }, 401],
    ["the key in the wrong scheme", { headers: { authorization: `Basic ${key}` } }, 401],
    ["the key without a scheme", { headers: { authorization: key } }, 401],
    [
      "a wrong bearer token, whatever else there is",
      { headers: { authorization: "Bearer other", "x-api-key": key } },
      401,
    ],
    [
      "the key from the gateway's own page",
      { headers: { "x-api-key": key, origin: "http://localhost:4000" } },
      200,
    ],
    [
      "the key from another page",
      { headers: { "x-api-key": key, origin: "http://evil.example" } },
      403,
    ],
  ];
  for (const [what, call, status] of from) {
    it(`${status}: ${what}`, () => assert.equal(statusOf({ ...call, key }), status));
  }

  it("lets nobody in with any other credential", () => {
    const visible = fc.string({ unit: fc.constantFrom("a", "B", "7", " ", ":", "é") });
    fc.assert(
      fc.property(visible, (text) => {
        const credential = text.trim();
        fc.pre(credential !== key);
        for (const headers of [
          { authorization: `Bearer ${credential}` },
          { "x-api-key": credential },
        ]) {
          assert.equal(statusOf({ headers, key }), 401);
        }
      }),
    );
  });

  it("says where the key goes, and not what it is", () => {
    assert.equal(codeOf({ key }), "invalid_api_key");
    assert.throws(
      () => checkOperator(new Headers(HOST), "127.0.0.1", key),
      (error: Error) => error.message.includes("admin.key") && !error.message.includes(key),
    );
  });
});

describe("without one", () => {
  const loopback = ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "::FFFF:127.0.0.1"];
  for (const peer of loopback) {
    it(`200: from ${peer}`, () => assert.equal(statusOf({ peer }), 200));
  }
  const others = [
    null,
    "",
    "10.0.0.1",
    "192.168.1.4",
    "203.0.113.9",
    "128.0.0.1",
    "::",
    "0.0.0.0",
    "fe80::1",
    "2001:db8::1",
    "::ffff:10.0.0.1",
    "127.0.0.1.evil.example",
  ];
  for (const peer of others) {
    it(`403: from ${peer}`, () => assert.equal(statusOf({ peer }), 403));
  }

  const hosts = [
    ["localhost", 200],
    ["localhost:4000", 200],
    ["LOCALHOST:4000", 200],
    ["127.0.0.1:4000", 200],
    ["127.1.2.3", 200],
    ["[::1]:4000", 200],
    ["[::1]", 200],
    ["llm.example", 403],
    ["llm.example:4000", 403],
    ["localhost.evil.example:4000", 403],
    ["127.0.0.1.evil.example", 403],
    ["evil.example:127.0.0.1", 403],
    ["0.0.0.0:4000", 403],
    ["192.168.1.4:4000", 403],
    ["", 403],
  ] as const;
  for (const [host, status] of hosts) {
    it(`${status}: at Host ${host}`, () => assert.equal(statusOf({ headers: { host } }), status));
  }

  it("403: without a Host", () => {
    assert.throws(() => checkOperator(new Headers(), "127.0.0.1", undefined), { status: 403 });
  });

  for (const name of ["forwarded", "x-forwarded-for", "X-Forwarded-For"]) {
    it(`403: with ${name}, whatever it says`, () => {
      for (const value of ["203.0.113.9", "127.0.0.1", "for=127.0.0.1", ""]) {
        assert.equal(statusOf({ headers: { [name]: value } }), 403);
      }
    });
  }

  it("lets credentials of tenants open nothing that is not open anyway", () => {
    const headers = { authorization: "Bearer tenant-key" };
    assert.equal(statusOf({ headers }), 200);
    assert.equal(statusOf({ headers, peer: "203.0.113.9" }), 403);
  });

  it("says what to do", () => {
    assert.equal(codeOf({ peer: "203.0.113.9" }), "permission_denied");
  });
});

describe("a page", () => {
  const origins = [
    ["http://localhost:4000", 200],
    ["http://LOCALHOST:4000", 200],
    ["null", 403],
    ["", 403],
    ["file://", 403],
    ["http://localhost", 403],
    ["http://localhost:3000", 403],
    ["http://127.0.0.1:4000", 403],
    ["http://evil.example", 403],
    ["http://localhost:4000.evil.example", 403],
    ["http://evil.example/localhost:4000", 403],
    ["app://obsidian.md", 403],
    ["tauri://localhost", 403],
    ["tauri://localhost:4000", 403],
    ["vscode-webview://localhost:4000", 403],
  ] as const;
  for (const [origin, status] of origins) {
    it(`${status}: of ${origin === "" ? "an empty origin" : origin}, with and without a key`, () => {
      assert.equal(statusOf({ headers: { origin } }), status);
      assert.equal(statusOf({ headers: { origin, "x-api-key": "k" }, key: "k" }), status);
    });
  }

  it("200: of the gateway itself behind a proxy that ends TLS", () => {
    const headers = { host: "llm.example", origin: "https://llm.example", "x-api-key": "k" };
    assert.equal(statusOf({ headers, peer: "10.0.0.1", key: "k" }), 200);
  });

  it("403: of a name that was made to mean this machine", () => {
    const headers = { host: "evil.example:4000", origin: "http://evil.example:4000" };
    assert.equal(statusOf({ headers }), 403);
  });

  it("is refused as such before any key is looked at", () => {
    const headers = { origin: "http://evil.example", authorization: "Bearer wrong" };
    assert.equal(codeOf({ headers, key: "k" }), "origin_not_allowed");
  });
});
