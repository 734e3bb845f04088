/** Who may call, from where (contract §1 server and auth, §4). */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer, Init } from "../support/client.ts";
import { chatBody, connect, openaiChat, send, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { expectAnthropicError, expectError, startFleet } from "../support/fleet.ts";
import { startGateway } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };

describe("keys", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    const hash = `sha256:${createHash("sha256").update("hashed-key").digest("hex")}`;
    fleet = await startFleet(
      { a: {} },
      { auth: { keys: [{ key: "clear-key" }, { hash }, { key: "${KEY_OF_TEST}" }] } },
      { env: { TIDEGATE_API_KEYS: "env-key", KEY_OF_TEST: "interpolated-key" } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const by = (headers: Record<string, string>): Promise<Answer> =>
    openaiChat(fleet.url, {}, { headers });

  it("opens to every key, by either header", TIMEOUT, async () => {
    for (const key of ["clear-key", "hashed-key", "env-key", "interpolated-key"]) {
      assert.equal((await by({ authorization: `Bearer ${key}` })).status, 200, key);
      assert.equal((await by({ authorization: `bearer ${key}` })).status, 200, key);
      assert.equal((await by({ "x-api-key": key })).status, 200, key);
    }
    assert.doesNotMatch(
      JSON.stringify(fleet.engines.a.inference().map(({ rawHeaders }) => rawHeaders)),
      /-key/,
      "no key reaches the engine",
    );
  });

  it("stays shut for all others", TIMEOUT, async () => {
    const wrong: Record<string, string>[] = [
      {},
      { authorization: "Bearer nope" },
      { authorization: "Bearer " },
      { authorization: "clear-key" },
      { authorization: "Basic Y2xlYXIta2V5" },
      { "x-api-key": "clear-ke" },
      { "x-api-key": "clear-keyy" },
      { "x-api-key": "sha256:" },
    ];
    for (const headers of wrong) {
      const error = expectError(await by(headers), 401, "invalid_api_key");
      assert.equal(error.type, "invalid_request_error");
    }
    expectError(await send(`${fleet.url}/v1/models`), 401, "invalid_api_key");
    const anthropic = await send(`${fleet.url}/v1/messages`, chatBody({ max_tokens: 3 }));
    expectAnthropicError(anthropic, 401, "authentication_error");
    assert.equal(fleet.engines.a.inference().length, 0);
  });

  it("lets browsers ask first, and read the refusal", TIMEOUT, async () => {
    const origin = "http://localhost:3000";
    const preflight = await send(`${fleet.url}/v1/chat/completions`, undefined, {
      method: "OPTIONS",
      headers: { origin, "access-control-request-method": "POST" },
    });
    assert.equal(preflight.status, 204);
    assert.match(preflight.headers.get("x-request-id") ?? "", /^[\da-f-]{36}$/);
    const refused = await by({ origin });
    expectError(refused, 401, "invalid_api_key");
    assert.equal(refused.headers.get("access-control-allow-origin"), origin);
  });

  it("needs no key for /, /health, /ready and metrics", TIMEOUT, async () => {
    for (const path of ["/", "/health", "/ready", "/metrics"]) {
      assert.equal((await send(fleet.url + path)).status, 200, path);
    }
  });

  it("asks for the key before it reads the body", TIMEOUT, async () => {
    const client = await connect(fleet.gateway.port);
    client.write(
      "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{",
    );
    assert.ok(await until(() => client.status() === 401), client.received());
    client.leave("close");
  });

  it("writes no key down", TIMEOUT, async () => {
    await by({ authorization: "Bearer clear-key" });
    await by({ authorization: "Bearer a-wrong-key" });
    const said = fleet.gateway.stdout() + fleet.gateway.stderr() + (await fleet.gateway.metrics());
    assert.doesNotMatch(said, /clear-key|hashed-key|env-key|interpolated-key|a-wrong-key/);
  });
});

describe("origins and hosts", () => {
  let open: Fleet<"a">;
  before(async () => {
    open = await startFleet(
      { a: {} },
      { server: { allowedOrigins: ["https://chat.example"], allowedHosts: ["gateway.lan"] } },
    );
  });
  afterEach(() => open.reset());
  after(() => open.close());

  const from = (origin: string, init: Init = {}): Promise<Answer> =>
    send(`${open.url}/v1/models`, undefined, { ...init, headers: { ...init.headers, origin } });
  async function statusForHost(host: string): Promise<{ status: number | null; body: string }> {
    const client = await connect(open.gateway.port);
    client.write(`GET /v1/models HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n\r\n`);
    await until(() => client.body() !== null);
    client.leave("close");
    return { status: client.status(), body: client.body() ?? "" };
  }

  it("lets loopback, apps and configured origins in, with CORS headers", TIMEOUT, async () => {
    const origins = [
      `http://127.0.0.1:${open.gateway.port}`,
      "http://localhost:3000",
      "https://localhost",
      "http://[::1]:8080",
      "app://obsidian.md",
      "file://",
      "tauri://localhost",
      "vscode-webview://1q2w3e",
      "https://chat.example",
    ];
    for (const origin of origins) {
      const answer = await from(origin);
      assert.equal(answer.status, 200, origin);
      assert.equal(answer.headers.get("access-control-allow-origin"), origin);
      assert.match(answer.headers.get("vary") ?? "", /origin/i);
      const exposed = (answer.headers.get("access-control-expose-headers") ?? "").toLowerCase();
      for (const name of [
        "x-request-id",
        "x-tidegate-backend",
        "x-tidegate-degraded",
        "server-timing",
        "retry-after",
      ]) {
        assert.ok(exposed.includes(name), `${name} in ${exposed}`);
      }
    }
  });

  it("answers their preflights", TIMEOUT, async () => {
    const answer = await send(`${open.url}/v1/chat/completions`, undefined, {
      method: "OPTIONS",
      headers: {
        origin: "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-os",
      },
    });
    assert.deepEqual([answer.status, answer.text], [204, ""]);
    assert.equal(answer.headers.get("access-control-allow-origin"), "http://localhost:3000");
    assert.match(answer.headers.get("access-control-allow-methods") ?? "", /POST/);
    const allowed = (answer.headers.get("access-control-allow-headers") ?? "").toLowerCase();
    for (const name of ["authorization", "content-type", "x-stainless-os"]) {
      assert.ok(allowed === "*" || allowed.includes(name), allowed);
    }
  });

  it("refuses foreign origins, preflights too, before anything is done", TIMEOUT, async () => {
    const origins = [
      "https://evil.example",
      "http://localhost.evil.example",
      "http://127.0.0.1.evil.example",
      "https://chat.example.evil",
      "http://chat.example",
      "null",
    ];
    for (const origin of origins) {
      const answer = await from(origin);
      const error = expectError(answer, 403, "origin_not_allowed");
      assert.equal(error.type, "permission_error");
      assert.equal(answer.headers.get("access-control-allow-origin"), null, origin);
      const preflight = await from(origin, {
        method: "OPTIONS",
        headers: { "access-control-request-method": "POST" },
      });
      assert.equal(preflight.status, 403, origin);
      const chat = await openaiChat(open.url, {}, { headers: { origin } });
      expectError(chat, 403, "origin_not_allowed");
      const id = chat.headers.get("x-request-id") ?? "";
      const { status, cause, cache } = await open.gateway.record(id);
      assert.deepEqual(
        [status, cause, cache],
        [403, "origin_not_allowed", "bypass;reason=refused"],
      );
    }
    assert.equal(open.engines.a.inference().length, 0);
  });

  it("gives errors CORS headers too, or no browser could read them", TIMEOUT, async () => {
    const answer = await openaiChat(
      open.url,
      { model: "nope" },
      { headers: { origin: "http://localhost:3000" } },
    );
    expectError(answer, 404, "model_not_found");
    assert.equal(answer.headers.get("access-control-allow-origin"), "http://localhost:3000");
  });

  it("knows its own names on loopback, no other (DNS rebinding)", TIMEOUT, async () => {
    const { port } = open.gateway;
    for (const host of [
      "localhost",
      `localhost:${port}`,
      "a.localhost:1",
      "127.0.0.1",
      "127.9.9.9:80",
      "[::1]:4000",
      "gateway.lan:4000",
      "LOCALHOST",
    ]) {
      assert.equal((await statusForHost(host)).status, 200, host);
    }
    for (const host of [
      "evil.example",
      "evil.example:4000",
      "localhost.evil.example",
      "127.0.0.1.evil.example",
      "10.0.0.1",
      "gateway.lan.evil",
    ]) {
      const { status, body } = await statusForHost(host);
      assert.equal(status, 403, host);
      assert.match(body, /"code":"host_not_allowed"/);
    }
  });

  it('lets every origin in with "*"', TIMEOUT, async () => {
    const any = await startFleet({ a: {} }, { server: { allowedOrigins: ["*"] } });
    try {
      const answer = await send(`${any.url}/v1/models`, undefined, {
        headers: { origin: "https://evil.example" },
      });
      assert.equal(answer.status, 200);
      assert.match(
        answer.headers.get("access-control-allow-origin") ?? "",
        /^(\*|https:\/\/evil\.example)$/,
      );
    } finally {
      await any.close();
    }
  });
});

describe("the address it binds", () => {
  const backends = [{ id: "d", kind: "demo" }];
  const check = (server: object, more: object = {}): ReturnType<typeof startGateway> =>
    startGateway({ config: { backends, server, ...more }, args: ["--check"], expectExit: true });

  it("refuses the world without keys, and says the three ways out", TIMEOUT, async () => {
    for (const host of ["0.0.0.0", "::", "192.168.1.5"]) {
      const refused = await startGateway({
        config: { backends, server: { host } },
        expectExit: true,
      });
      assert.equal(await refused.exited, 1);
      for (const way of [/auth\.keys/, /127\.0\.0\.1/, /server\.insecure/]) {
        assert.match(refused.stderr(), way);
      }
      assert.doesNotMatch(refused.stderr(), /\n\s+at /);
    }
  });

  it("allows it with keys or when told so; loopback always", TIMEOUT, async () => {
    const allowed = [
      check({ host: "0.0.0.0", insecure: true }),
      check({ host: "0.0.0.0" }, { auth: { keys: [{ key: "k" }] } }),
      check({ host: "127.0.0.2" }),
      check({ host: "localhost" }),
      check({ host: "::1" }),
    ];
    for (const gateway of await Promise.all(allowed))
      assert.equal(await gateway.exited, 0, gateway.stderr());
  });
});
