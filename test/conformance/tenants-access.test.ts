/** Keys, tokens and what tenants may see (contract §1 auth and tenants, §4), with every attack on them. */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, openaiChat, send, type Answer } from "../support/client.ts";
import { expectAnthropicError, expectError, startFleet, type Fleet } from "../support/fleet.ts";
import {
  AUDIENCE,
  ISSUER,
  aKeyPair,
  claimsOf,
  confused,
  startKeyServer,
  tokenBy,
  unsigned,
  type KeyPair,
  type KeyServer,
} from "../support/issuer.ts";
import { startSink, type Sink } from "../support/sink.ts";

const TIMEOUT = { timeout: 60_000 };
const ADMIN_KEY = "the-operators-own-key";
const ANTHROPIC = { "anthropic-version": "2023-06-01" };

const by = (credential: string) => ({ headers: { authorization: `Bearer ${credential}` } });

async function listed(url: string, credential: string): Promise<string[]> {
  const answer = await send(`${url}/v1/models`, undefined, by(credential));
  assert.equal(answer.status, 200, answer.text);
  return (answer.json()["data"] as { id: string }[]).map(({ id }) => id);
}

describe("what a tenant may see", () => {
  const KEYS = { a: "key-of-a", b: "key-of-b", all: "key-of-default" };
  let fleet: Fleet<"plain" | "ollama">;
  before(async () => {
    fleet = await startFleet(
      {
        plain: { models: ["alpha-small", "alpha-large", "beta-secret", "shared"] },
        ollama: {
          kind: "ollama",
          models: ["beta:7b", { name: "beta:cloud", remoteHost: "https://ollama.com" }],
        },
      },
      {
        models: { "beta-secret": { aliases: ["best"] }, "alpha-small": { aliases: ["quick"] } },
        tenants: {
          a: { models: ["alpha-*", "shared"] },
          b: { models: ["beta*", "shared"] },
        },
        auth: {
          keys: [
            { key: KEYS.a, tenant: "a" },
            { key: "second-key-of-a", tenant: "a" },
            { key: KEYS.all },
          ],
        },
        admin: { key: ADMIN_KEY },
      },
      { env: { TIDEGATE_API_KEYS: `b=${KEYS.b}` } },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const chat = (key: string, model: string): Promise<Answer> =>
    openaiChat(fleet.url, { model }, by(key));
  const card = (key: string, id: string): Promise<Answer> =>
    send(`${fleet.url}/v1/models/${encodeURIComponent(id)}`, undefined, by(key));
  const reached = (): number =>
    Object.values(fleet.engines).reduce((sum, engine) => sum + engine.inference().length, 0);

  it("is listed, and nothing else, whichever of its keys asks", TIMEOUT, async () => {
    const ofA = ["alpha-large", "alpha-small", "shared"];
    assert.deepEqual((await listed(fleet.url, KEYS.a)).toSorted(), ofA);
    assert.deepEqual((await listed(fleet.url, "second-key-of-a")).toSorted(), ofA);
    const ofB = ["beta-secret", "beta:7b", "shared"];
    assert.deepEqual((await listed(fleet.url, KEYS.b)).toSorted(), ofB);
    assert.equal((await listed(fleet.url, KEYS.all)).length, 5);
    const headers = { ...by(KEYS.a).headers, ...ANTHROPIC };
    const anthropic = await send(`${fleet.url}/v1/models`, undefined, { headers });
    assert.doesNotMatch(anthropic.text, /beta/);
    assert.equal((anthropic.json()["data"] as unknown[]).length, 3);
  });

  it("is served, by name and by alias, and the record says for whom", TIMEOUT, async () => {
    for (const model of ["alpha-small", "quick", "shared"]) {
      const answer = await chat(KEYS.a, model);
      assert.equal(answer.status, 200, answer.text);
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.equal(record["tenant"], "a");
      assert.equal((await card(KEYS.a, model)).status, 200);
    }
    assert.equal((await chat(KEYS.b, "best")).status, 200);
    assert.equal((await chat(KEYS.all, "best")).status, 200);
  });

  it("is all there is: another's model is a 404 like one that nobody has", TIMEOUT, async () => {
    for (const name of ["beta-secret", "best", "beta:7b", "beta", "beta:cloud"]) {
      for (const ask of [chat, card]) {
        const there = expectError(await ask(KEYS.a, name), 404, "model_not_found");
        const nowhere = expectError(await ask(KEYS.a, "zzzzzz"), 404, "model_not_found");
        const { message, ...others } = there;
        assert.deepEqual({ ...others, message: message.replace(`"${name}"`, '"zzzzzz"') }, nowhere);
        assert.match(message, /\(3\)/, "it counts what this caller sees");
      }
    }
    const headers = { ...by(KEYS.a).headers, ...ANTHROPIC };
    const body = chatBody({ model: "beta-secret", max_tokens: 3 });
    for (const path of ["/v1/messages", "/v1/messages/count_tokens"]) {
      const answer = await send(fleet.url + path, body, { headers });
      assert.match(expectAnthropicError(answer, 404, "not_found_error"), /is not here/);
    }
    for (const [path, fields] of [
      ["/v1/completions", { prompt: "x" }],
      ["/v1/embeddings", { input: "x" }],
      ["/v1/responses", { input: "x" }],
      ["/v1/rerank", { query: "x", documents: ["y"] }],
    ] as const) {
      const asked = { model: "beta-secret", ...fields };
      expectError(await send(fleet.url + path, asked, by(KEYS.a)), 404, "model_not_found");
    }
    assert.equal(reached(), 0, "no engine was asked");
    const record = await fleet.gateway.record(({ asked_model }) => asked_model === "beta-secret");
    assert.deepEqual([record["model"], record["backend_id"], record["status"]], [null, null, 404]);
  });

  it("is all that is guessed at", TIMEOUT, async () => {
    for (const name of ["beta-secre", "beta-secrets", "besst", "beta:8b", "beta:clod"]) {
      for (const ask of [chat, card]) {
        const { message } = expectError(await ask(KEYS.a, name), 404, "model_not_found");
        assert.doesNotMatch(message, /did you mean|beta-secret"|best"|beta:7b/, message);
      }
    }
    assert.match(expectError(await chat(KEYS.b, "beta-secre"), 404).message, /"beta-secret"/);
    assert.match(expectError(await chat(KEYS.a, "alpha-smal"), 404).message, /"alpha-small"/);
  });

  it("holds what is withheld only where the name may be seen", TIMEOUT, async () => {
    expectError(await chat(KEYS.b, "beta:cloud"), 403, "permission_denied");
    expectError(await chat(KEYS.a, "beta:cloud"), 404, "model_not_found");
  });

  it("does not open the operator's side, nor does no key at all", TIMEOUT, async () => {
    for (const path of ["snapshot", "backends", "config", "tenants", "no-such-thing"]) {
      for (const headers of [
        {},
        by(KEYS.a).headers,
        by(KEYS.all).headers,
        { "x-api-key": KEYS.b },
        { "x-api-key": `${ADMIN_KEY}x` },
      ]) {
        const answer = await send(`${fleet.url}/admin/api/${path}`, undefined, { headers });
        expectError(answer, 401, "invalid_api_key");
      }
    }
    for (const path of ["reload", "backends/plain/drain"]) {
      expectError(await send(`${fleet.url}/admin/api/${path}`, "", by(KEYS.a)), 401);
      expectError(await send(`${fleet.url}/admin/api/${path}`, ""), 401);
    }
    expectError(await chat(ADMIN_KEY, "shared"), 401, "invalid_api_key");
    const operator = await send(`${fleet.url}/admin/api/snapshot`, undefined, by(ADMIN_KEY));
    assert.equal(operator.status, 200);
  });
});

describe("tokens", () => {
  const A_KEY = "tg_a-key-of-somebody-in-the-team";
  let folder = "";
  let sink: Sink;
  let fetched: KeyPair;
  let filed: KeyPair;
  let stranger: KeyPair;
  let keyServer: KeyServer;
  let away: KeyServer;
  let fleet: Fleet<"e">;
  let config: Record<string, unknown>;
  /** Every credential that was sent. */
  const sent: string[] = [A_KEY, ADMIN_KEY];
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "tidegate-tokens-"));
    sink = await startSink();
    [fetched, filed, stranger] = await Promise.all([
      aKeyPair("fetched"),
      aKeyPair("filed", "EdDSA"),
      aKeyPair("stranger"),
    ]);
    keyServer = await startKeyServer(fetched);
    away = await startKeyServer();
    await away.stop();
    const jwksFile = join(folder, "keys.json");
    await writeFile(jwksFile, JSON.stringify({ keys: [filed.jwk] }));
    config = {
      server: { logLevel: "debug" },
      tenants: { team: { models: ["one"] }, other: { models: ["two"] } },
      auth: {
        keys: [{ key: A_KEY, tenant: "team" }],
        jwt: [
          { issuer: ISSUER, audience: AUDIENCE, jwksUrl: keyServer.url },
          {
            issuer: "https://files.example",
            audience: AUDIENCE,
            jwksFile,
            tenantClaim: "org.name",
          },
          { issuer: "https://away.example", audience: AUDIENCE, jwksUrl: away.url },
        ],
      },
      telemetry: { otlpEndpoint: sink.url },
      admin: { key: ADMIN_KEY },
    };
    fleet = await startFleet({ e: { models: ["one", "two"] } }, config, {
      env: { OTEL_BSP_SCHEDULE_DELAY: "20" },
    });
  });
  afterEach(() => fleet.reset());
  after(async () => {
    await fleet.close();
    await keyServer.stop();
    sink.close();
    await rm(folder, { recursive: true });
  });

  const team = { tenant: "team" };
  function chat(credential: string, model = "one", headers = {}): Promise<Answer> {
    sent.push(credential);
    return openaiChat(fleet.url, { model }, { headers: { ...by(credential).headers, ...headers } });
  }
  const reload = (): Promise<Answer> => send(`${fleet.url}/admin/api/reload`, {}, by(ADMIN_KEY));

  it("let in by keys from a URL and from a file, as the tenant they name", TIMEOUT, async () => {
    const org = { issuer: "https://files.example", claims: { org: { name: "other" } } };
    const cases: [token: string, tenant: string, model: string][] = [
      [await tokenBy(fetched, { claims: team }), "team", "one"],
      [await tokenBy(filed, org), "other", "two"],
    ];
    for (const [token, tenant, model] of cases) {
      const answer = await chat(token, model);
      assert.equal(answer.status, 200, answer.text);
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.equal(record["tenant"], tenant);
      assert.deepEqual(await listed(fleet.url, token), [model]);
      const other = model === "one" ? "two" : "one";
      expectError(await chat(token, other), 404, "model_not_found");
    }
    const upstream = fleet.engines.e.inference().map(({ rawHeaders }) => rawHeaders);
    assert.doesNotMatch(JSON.stringify(upstream), /eyJ/, "no token reaches the engine");
  });

  it("that are attacks are refused, and no engine hears of them", TIMEOUT, async () => {
    const forger = await aKeyPair(fetched.kid);
    const claims = claimsOf(team);
    const attacks: Record<string, string> = {
      "alg none": unsigned(claims),
      "algorithm confusion": await confused(fetched, claims),
      expired: await tokenBy(fetched, { claims: team, expiresInS: -3600 }),
      "without an end": await tokenBy(fetched, { claims: team, expiresInS: null }),
      "wrong audience": await tokenBy(fetched, { claims: team, audience: "somebody else" }),
      "wrong issuer": await tokenBy(fetched, { claims: team, issuer: "https://evil.example" }),
      "another issuer's key": await tokenBy(fetched, { issuer: "https://files.example" }),
      "a forged signature": await tokenBy(forger, { claims: team }),
      "an unknown kid": await tokenBy(stranger, { claims: team }),
      malformed: "eyJhbGciOiJFUzI1NiJ9.bm90IGpzb24.c2lnbmF0dXJl",
      "no token": "tg_nobody-has-this-key",
    };
    for (const [what, credential] of Object.entries(attacks)) {
      const error = expectError(await chat(credential), 401, "invalid_api_key");
      assert.equal(error.type, "invalid_request_error", what);
      for (const part of credential.split(".")) {
        assert(part.length < 6 || !error.message.includes(part), error.message);
      }
      const asAnthropic = { headers: { "x-api-key": credential, ...ANTHROPIC } };
      const list = await send(`${fleet.url}/v1/models`, undefined, asAnthropic);
      expectAnthropicError(list, 401, "authentication_error");
    }
    assert.equal(fleet.engines.e.inference().length, 0);
  });

  it("of a key that nobody publishes do not make the key server work", TIMEOUT, async () => {
    await chat(await tokenBy(fetched, { claims: team }));
    const before = keyServer.asked;
    const tokens = await Promise.all(
      Array.from({ length: 30 }, (_, at) => tokenBy(stranger, { kid: `k${at}`, claims: team })),
    );
    for (const answer of await Promise.all(tokens.map((token) => chat(token)))) {
      expectError(answer, 401, "invalid_api_key");
    }
    assert(keyServer.asked - before <= 1, `${keyServer.asked - before} fetches in a flood`);
  });

  it("that name no tenant here may not", TIMEOUT, async () => {
    for (const claims of [{}, { tenant: "nobody" }, { tenant: "constructor" }]) {
      const token = await tokenBy(fetched, { claims });
      const { message } = expectError(await chat(token), 403, "permission_denied");
      assert.match(message, /"tenant".*listed in tenants/);
      expectError(await send(`${fleet.url}/v1/models`, undefined, by(token)), 403);
    }
  });

  it("whose keys cannot be had are asked to come again; others go on", TIMEOUT, async () => {
    const token = await tokenBy(stranger, { issuer: "https://away.example", claims: team });
    const answer = await chat(token);
    expectError(answer, 503, "overloaded");
    assert.match(answer.headers.get("retry-after") ?? "", /^[1-9]\d*$/);
    const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
    assert.equal(record["cause"], "overloaded");
    assert.equal((await chat(A_KEY)).status, 200);
    assert.equal((await chat(await tokenBy(fetched, { claims: team }))).status, 200);
  });

  it("do not open the operator's side", TIMEOUT, async () => {
    const claims = { tenant: "team", admin: true, scope: "admin", role: "admin" };
    const token = await tokenBy(fetched, { claims });
    sent.push(token);
    for (const path of ["snapshot", "config"]) {
      const answer = await send(`${fleet.url}/admin/api/${path}`, undefined, by(token));
      expectError(answer, 401, "invalid_api_key");
    }
  });

  it(
    "go by the file as the last reload found it, and a broken one keeps the old",
    TIMEOUT,
    async () => {
      const path = join(folder, "keys.json");
      const claims = { org: { name: "other" } };
      const issuer = "https://files.example";
      const next = await aKeyPair("next");
      const [old, fresh] = [
        await tokenBy(filed, { issuer, claims }),
        await tokenBy(next, { issuer, claims }),
      ];
      expectError(await chat(fresh, "two"), 401);
      await writeFile(path, "{ broken");
      const refused = await reload();
      assert.equal(
        expectError({ ...refused, json: withoutErrors(refused) }, 400).code,
        "invalid_config",
      );
      assert.match(refused.text, /auth\.jwt\[1\]\.jwksFile.*it is not JSON/);
      assert.equal((await chat(old, "two")).status, 200);
      await writeFile(path, JSON.stringify({ keys: [next.jwk] }));
      assert.equal((await reload()).status, 200);
      assert.equal((await chat(fresh, "two")).status, 200);
      expectError(await chat(old, "two"), 401, "invalid_api_key");
      const asked = keyServer.asked;
      assert.equal((await chat(await tokenBy(fetched, { claims: team }))).status, 200);
      assert.equal(keyServer.asked, asked, "fetched keys are kept over a reload");
    },
  );

  it(
    "and keys stand in no log, no metric, no trace and nothing the operator sees",
    TIMEOUT,
    async () => {
      const answer = await chat(await tokenBy(fetched, { claims: team }));
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      const traced = String(record["trace_id"]);
      const endsAt = performance.now() + 5000;
      while (!sink.has(String(record["request_id"])) && performance.now() < endsAt) {
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      assert(sink.has(String(record["request_id"])), `traced: ${traced}`);
      const seen = await Promise.all(
        ["config", "snapshot", "backends"].map((path) =>
          send(`${fleet.url}/admin/api/${path}`, undefined, by(ADMIN_KEY)),
        ),
      );
      const { gateway } = fleet;
      const told = [
        gateway.stdout(),
        gateway.stderr(),
        await gateway.metrics(),
        sink.received(),
        ...seen.map(({ text }) => text),
      ].join("\n");
      assert(told.includes("invalid_api_key") && sent.length > 50, "there was something to tell");
      for (const credential of sent) {
        for (const part of [credential, ...credential.split(".")]) {
          assert(part.length < 6 || !told.includes(part), `${part} was told`);
        }
      }
    },
  );
});

/** An `invalid_config` has its mistakes beside the four fields of every error. */
function withoutErrors(answer: Answer): () => Record<string, unknown> {
  const { error } = answer.json() as { error: Record<string, unknown> };
  const { errors: _, ...others } = error;
  return () => ({ error: others });
}
