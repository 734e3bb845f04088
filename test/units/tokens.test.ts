/** Tokens of issuers (contract §1 `auth.jwt`): who is let in by one, and every way that does not lead in. */
import assert from "node:assert/strict";
import type { ServerResponse } from "node:http";
import { afterEach, before, beforeEach, describe, it } from "node:test";
import { schema, type ConfigInput } from "../../src/config.ts";
import { identify, prepareAccess, type Access } from "../../src/data/identify.ts";
import { remoteKeys, type Pace } from "../../src/data/key-sets.ts";
import { GatewayError } from "../../src/errors.ts";
import { sleep } from "../support/client.ts";
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
  type TokenOptions,
} from "../support/issuer.ts";

type IssuerInput = NonNullable<NonNullable<ConfigInput["auth"]>["jwt"]>[number];

const TENANTS = { team: {}, other: {} };
const BY_FILE = { issuer: ISSUER, audience: AUDIENCE, jwksFile: "keys.json" };
const UNKNOWN = /^this API key is not known here$/;

let pair: KeyPair;
before(async () => {
  pair = await aKeyPair("one");
});

/** Whoever may call with tokens that `pairs` sign. */
function byFile(pairs: KeyPair[], more: Partial<IssuerInput>[] = [{}]): Access {
  const config = schema.parse({
    auth: {
      keys: [{ key: "a-key", tenant: "other" }],
      jwt: more.map((each) => ({ ...BY_FILE, ...each })),
    },
    tenants: TENANTS,
  });
  return prepareAccess(config, [], new Map([["keys.json", { keys: pairs.map(({ jwk }) => jwk) }]]));
}

async function called(access: Access, credential: string): Promise<string> {
  return await identify(new Headers({ authorization: `Bearer ${credential}` }), access);
}

/** The refusal; nothing of what was sent stands in it. */
async function refusal(access: Access, credential: string): Promise<GatewayError> {
  const error: unknown = await called(access, credential).then(
    (tenant) => assert.fail(`was let in as ${tenant}`),
    (reason: unknown) => reason,
  );
  assert(error instanceof GatewayError, String(error));
  const said = `${error.message} ${error.detail}`;
  for (const part of credential.split(".")) {
    assert(part.length < 6 || !said.includes(part.slice(0, 12)), said);
  }
  return error;
}

async function isRefused(access: Access, credential: string, words: RegExp): Promise<void> {
  const { code, status, message } = await refusal(access, credential);
  assert.deepEqual([code, status], ["invalid_api_key", 401], message);
  assert.match(message, words);
}

describe("a token", () => {
  const team = { claims: { tenant: "team" } };

  it("lets in as the tenant it names, by either header", async () => {
    const access = byFile([pair]);
    const token = await tokenBy(pair, team);
    assert.equal(await called(access, token), "team");
    assert.equal(await identify(new Headers({ "x-api-key": token }), access), "team");
  });

  for (const alg of ["RS256", "PS256", "ES256", "ES384", "EdDSA"] as const) {
    it(`may be signed by ${alg}, where that is allowed`, async () => {
      const own = await aKeyPair("k", alg);
      const token = await tokenBy(own, team);
      assert.equal(await called(byFile([own], [{ algorithms: [alg] }]), token), "team");
      const others = (["RS256", "ES256"] as const).filter((each) => each !== alg);
      await isRefused(byFile([own], [{ algorithms: others }]), token, /not allowed here \(alg\)/);
    });
  }

  it("is a promise; a key is known at once, before any token", () => {
    const access = byFile([pair]);
    assert.equal(identify(new Headers({ "x-api-key": "a-key" }), access), "other");
    const shaped = schema.parse({ auth: { keys: [{ key: "a.b.c" }], jwt: [BY_FILE] } });
    assert.equal(
      identify(new Headers({ "x-api-key": "a.b.c" }), prepareAccess(shaped, [])),
      "default",
    );
  });

  it("may be for several, and say so", async () => {
    const token = await tokenBy(pair, { ...team, audience: ["elsewhere", AUDIENCE] });
    assert.equal(await called(byFile([pair]), token), "team");
  });

  it("is judged by the entry with its issuer, and of two by the one with its audience", async () => {
    const second = await aKeyPair("two");
    const access = byFile(
      [pair, second],
      [
        { issuer: "https://first.example" },
        { audience: "their-audience", tenantClaim: "group" },
        {},
      ],
    );
    const theirs = { claims: { group: "other" }, audience: "their-audience" };
    assert.equal(await called(access, await tokenBy(second, theirs)), "other");
    assert.equal(await called(access, await tokenBy(second, team)), "team");
    const first = await tokenBy(pair, { ...team, issuer: "https://first.example" });
    assert.equal(await called(access, first), "team");
  });

  it("names its tenant where the configuration says", async () => {
    const claims: [string, Record<string, unknown>][] = [
      ["realm.tenant", { realm: { tenant: "team" } }],
      ["a.b.c", { a: { b: { c: "team" } } }],
      ["https://id.example/tenant", { "https://id.example/tenant": "team" }],
      ["realm.tenant", { "realm.tenant": "team", realm: { tenant: "other" } }],
    ];
    for (const [tenantClaim, each] of claims) {
      const token = await tokenBy(pair, { claims: each });
      assert.equal(await called(byFile([pair], [{ tenantClaim }]), token), "team", tenantClaim);
    }
    const token = await tokenBy(pair, { claims: { tenant: "default" } });
    assert.equal(await called(byFile([pair]), token), "default", "which is always there");
  });

  it("that names no tenant of ours may not, and says which claim", async () => {
    const claims: [string, Record<string, unknown>][] = [
      ["tenant", {}],
      ["tenant", { tenant: "nobody" }],
      ["tenant", { tenant: "Team" }],
      ["tenant", { tenant: ["team"] }],
      ["tenant", { tenant: null }],
      ["tenant", { tenant: "constructor" }],
      ["constructor.name", {}],
      ["__proto__.tenant", {}],
      ["realm.toString", { realm: {} }],
      ["realm.tenant", { realm: "team" }],
      ["realm.length", { realm: "team" }],
    ];
    for (const [tenantClaim, each] of claims) {
      const token = await tokenBy(pair, { claims: each });
      const { code, status, message } = await refusal(byFile([pair], [{ tenantClaim }]), token);
      assert.deepEqual([code, status], ["permission_denied", 403], message);
      assert(
        message.includes(`"${tenantClaim}"`) && message.includes("listed in tenants"),
        message,
      );
    }
  });

  it("opens nothing where there are no issuers", async () => {
    const config = schema.parse({ auth: { keys: [{ key: "k" }] } });
    await isRefused(prepareAccess(config, []), await tokenBy(pair, team), UNKNOWN);
  });
});

describe("attacks", () => {
  const claims = () => claimsOf({ tenant: "team" });
  const aim = (options: TokenOptions = {}) =>
    tokenBy(pair, { claims: { tenant: "team" }, ...options });

  it("alg: none, however it is spelt", async () => {
    for (const alg of ["none", "None", "NONE", ""]) {
      await isRefused(byFile([pair]), unsigned(claims(), alg), /\(alg\)|malformed/);
    }
  });

  it("the public key taken for a secret", async () => {
    const rsa = await aKeyPair("rsa", "RS256");
    for (const each of [pair, rsa]) {
      await isRefused(byFile([each]), await confused(each, claims()), /\(alg\)/);
    }
  });

  it("an expired one, one without an end, one from tomorrow", async () => {
    await isRefused(byFile([pair]), await aim({ expiresInS: -30 }), /expired \(exp\)/);
    await isRefused(byFile([pair]), await aim({ expiresInS: null }), /no exp/);
    const nbf = Math.floor(Date.now() / 1000) + 3600;
    await isRefused(byFile([pair]), await aim({ claims: { tenant: "team", nbf } }), /\(nbf\)/);
  });

  it("clocks may differ by the tolerance and no more", async () => {
    const late = await aim({ expiresInS: -20 });
    await isRefused(byFile([pair], [{ toleranceS: 10 }]), late, /expired/);
    assert.equal(await called(byFile([pair], [{ toleranceS: 60 }]), late), "team");
  });

  it("one for others, or for nobody", async () => {
    await isRefused(byFile([pair]), await aim({ audience: "billing" }), /\(aud\)/);
    await isRefused(byFile([pair]), await aim({ audience: null }), /no aud/);
  });

  it("one of an issuer that is not ours, or of none", async () => {
    await isRefused(byFile([pair]), await aim({ issuer: "https://evil.example" }), /\(iss\)/);
    await isRefused(byFile([pair]), await aim({ issuer: null }), /\(iss\)/);
  });

  it("one that says it is of an issuer of ours, signed by another key", async () => {
    const forger = await aKeyPair("one");
    const forged = await tokenBy(forger, { claims: { tenant: "team" } });
    await isRefused(byFile([pair]), forged, /signature is wrong/);
    const stranger = await aKeyPair("stranger");
    await isRefused(byFile([pair]), await tokenBy(stranger), /\(kid\)/);
  });

  it("one of two issuers with the keys of the other", async () => {
    const theirs = await aKeyPair("one");
    const config = schema.parse({
      tenants: TENANTS,
      auth: { jwt: [BY_FILE, { ...BY_FILE, issuer: "https://b.example", jwksFile: "b.json" }] },
    });
    const keyFiles = new Map([
      ["keys.json", { keys: [pair.jwk] }],
      ["b.json", { keys: [theirs.jwk] }],
    ]);
    const access = prepareAccess(config, [], keyFiles);
    await isRefused(access, await tokenBy(theirs, { claims: { tenant: "team" } }), /signature/);
    const own = await tokenBy(theirs, { claims: { tenant: "team" }, issuer: "https://b.example" });
    assert.equal(await called(access, own), "team");
  });

  it("one whose claims were changed", async () => {
    const [header, , signature] = (await aim()).split(".");
    const changed = Buffer.from(JSON.stringify(claimsOf({ tenant: "other" }))).toString(
      "base64url",
    );
    await isRefused(byFile([pair]), `${header}.${changed}.${signature}`, /signature/);
  });

  it("one that brings its own key, or says where it is", async () => {
    const forger = await aKeyPair("one");
    const { SignJWT } = await import("jose");
    for (const header of [
      { alg: "ES256", jwk: forger.jwk },
      { alg: "ES256", jku: "http://127.0.0.1:1/keys", kid: "one" },
    ]) {
      const token = await new SignJWT(claims()).setProtectedHeader(header).sign(forger.privateKey);
      await isRefused(byFile([pair]), token, /signature/);
    }
  });

  it("without a kid where several keys might be meant", async () => {
    const access = byFile([pair, await aKeyPair("two")]);
    await isRefused(access, await aim({ kid: undefined }), /\(kid\)/);
    assert.equal(await called(byFile([pair]), await aim({ kid: undefined })), "team");
  });

  it("what only looks like a token", async () => {
    const access = byFile([pair]);
    for (const text of ["aaaaaa.bbbbbb.cccccc", "eyJhbGci.W10.", "bnVsbA.bnVsbA.bnVsbA"]) {
      await isRefused(access, text, /malformed/);
    }
    for (const text of ["a.b", "a.b.c.d", "..", "sk-123", "a.b.c.d.e", "ä.b.c"]) {
      await isRefused(access, text, UNKNOWN);
    }
    const deep = Buffer.from("[".repeat(6000)).toString("base64url");
    await isRefused(access, `${deep}.${deep}.x`, /malformed/);
  });
});

describe("keys that are fetched", () => {
  const QUICK: Pace = { timeoutMs: 300, coolDownMs: 400, retryMs: 300, maxAgeMs: 60_000 };
  const SLOW: Pace = { ...QUICK, coolDownMs: 60_000 };
  let server: KeyServer;
  beforeEach(async () => {
    server = await startKeyServer(pair);
  });
  afterEach(() => server.stop());

  /** At that pace, as a reload hands key sets on. */
  function fetching(pace: Pace): Access {
    const { url: jwksUrl } = server;
    const jwt = [{ issuer: ISSUER, audience: AUDIENCE, jwksUrl }];
    const config = schema.parse({ auth: { jwt }, tenants: TENANTS });
    const [terms] = config.auth.jwt;
    assert(terms !== undefined);
    const issuers = [{ terms, published: null, keys: remoteKeys(jwksUrl, pace) }];
    return prepareAccess(config, [], new Map(), { issuers });
  }

  const by = (pairOfToken: KeyPair, options: TokenOptions = {}) =>
    tokenBy(pairOfToken, { claims: { tenant: "team" }, ...options });

  async function isOverloaded(access: Access, token: string, withinMs: number): Promise<void> {
    const error = await refusal(access, token);
    assert.deepEqual([error.code, error.status], ["overloaded", 503], error.message);
    const { retryAfterMs } = error;
    assert(
      retryAfterMs !== null && retryAfterMs > 0 && retryAfterMs <= withinMs,
      `${retryAfterMs}`,
    );
    assert.match(error.headers()["retry-after"] ?? "", /^\d+$/);
    assert(!error.message.includes("127.0.0.1"), error.message);
  }

  it("are fetched once, when a token first needs them", async () => {
    const access = fetching(SLOW);
    assert.equal(server.asked, 0);
    const token = await by(pair);
    const all = await Promise.all(Array.from({ length: 20 }, () => called(access, token)));
    assert.deepEqual([...new Set(all), server.asked], ["team", 1]);
  });

  it("are kept over a reload while the URL stays", async () => {
    const access = fetching(SLOW);
    const token = await by(pair);
    await called(access, token);
    const [{ terms }] = access.issuers as [Access["issuers"][number]];
    const config = schema.parse({
      tenants: { team: { weight: 2 } },
      auth: { jwt: [{ ...terms, issuer: ISSUER }] },
    });
    const next = prepareAccess(config, [], new Map(), access);
    assert.deepEqual([await called(next, token), server.asked], ["team", 1]);
    const moved = { ...terms, jwksUrl: `${terms.jwksUrl}?moved` };
    const other = prepareAccess(
      schema.parse({ ...config, auth: { jwt: [moved] } }),
      [],
      new Map(),
      next,
    );
    assert.deepEqual([await called(other, token), server.asked], ["team", 2]);
  });

  it("are fetched again for a key that is new, once it has cooled down", async () => {
    const access = fetching(QUICK);
    const next = await aKeyPair("next");
    const [old, fresh] = [await by(pair), await by(next)];
    const unknown = await by(await aKeyPair("unknown"));
    await called(access, old);
    server.publish(pair, next);
    await isRefused(access, fresh, /\(kid\)/);
    assert.equal(server.asked, 1, "not so soon");
    await sleep(QUICK.coolDownMs + 50);
    assert.equal(await called(access, fresh), "team");
    assert.equal(await called(access, old), "team");
    assert.equal(server.asked, 2);
    server.publish(next);
    await sleep(QUICK.coolDownMs + 50);
    await isRefused(access, unknown, /\(kid\)/);
    await isRefused(access, old, /\(kid\)/);
  });

  it("are not fetched for a flood of keys that nobody publishes", async () => {
    const access = fetching(QUICK);
    const forger = await aKeyPair("x");
    const tokens = await Promise.all(
      Array.from({ length: 40 }, (_, at) => by(forger, { kid: `k${at}` })),
    );
    const began = performance.now();
    const flood = async () => {
      await Promise.all(tokens.map((token) => isRefused(access, token, /\(kid\)/)));
      const most = 1 + Math.floor((performance.now() - began) / QUICK.coolDownMs);
      assert(server.asked <= most, `${server.asked} of ${most}`);
    };
    for (let count = 0; count < 5; count += 1) await flood();
    await sleep(QUICK.coolDownMs + 50);
    for (let count = 0; count < 5; count += 1) await flood();
    assert(server.asked >= 2, "a key may be new after all");
  });

  it("stay in use while the server is away, and a new key cannot be judged then", async () => {
    const access = fetching(QUICK);
    await called(access, await by(pair));
    await server.stop();
    await sleep(QUICK.coolDownMs + 50);
    const next = await aKeyPair("next");
    await isOverloaded(access, await by(next), QUICK.coolDownMs);
    await isOverloaded(access, await by(next), QUICK.coolDownMs);
    assert.equal(await called(access, await by(pair)), "team");
    server.publish(pair, next);
    await server.start();
    await sleep(QUICK.coolDownMs + 50);
    assert.equal(await called(access, await by(next)), "team");
  });

  it("are looked at again when they are old; while that fails the old ones do", async () => {
    const access = fetching({ ...QUICK, coolDownMs: 100, maxAgeMs: 400 });
    const token = await by(pair);
    const next = await aKeyPair("next");
    await called(access, token);
    server.publish(next);
    assert.deepEqual([await called(access, token), server.asked], ["team", 1]);
    await sleep(450);
    await isRefused(access, token, /\(kid\)/);
    assert.equal(server.asked, 2);
    server.publish(pair);
    await sleep(450);
    assert.equal(await called(access, token), "team");
    await server.stop();
    await sleep(450);
    for (let count = 0; count < 3; count += 1) assert.equal(await called(access, token), "team");
  });

  it("that cannot be had leave no way in, and the server is not asked by every request", async () => {
    const access = fetching(QUICK);
    server.misbehave((response) => void response.writeHead(500).end("sk-secret"));
    const token = await by(pair);
    const errors = await Promise.all(Array.from({ length: 20 }, () => refusal(access, token)));
    for (const { status, message } of errors)
      assert.deepEqual([status, message.includes("sk-")], [503, false]);
    await isOverloaded(access, token, QUICK.retryMs);
    assert.equal(server.asked, 1);
    server.misbehave(null);
    await sleep(QUICK.retryMs + 50);
    assert.deepEqual([await called(access, token), server.asked], ["team", 2]);
  });

  it("are not waited for longer than the time-out, before and inside the answer", async () => {
    const hanging: ((response: ServerResponse) => void)[] = [
      () => {},
      (response) => void response.writeHead(200).write('{"keys":['),
    ];
    for (const behaviour of hanging) {
      const access = fetching(QUICK);
      server.misbehave(behaviour);
      const began = performance.now();
      await isOverloaded(access, await by(pair), QUICK.retryMs);
      const took = performance.now() - began;
      assert(took < QUICK.timeoutMs + 1000, `${took} ms`);
    }
  });

  it("are not looked for elsewhere, nor in what is no key set", async () => {
    const elsewhere = await startKeyServer(pair);
    try {
      const answers: ((response: ServerResponse) => void)[] = [
        (response) => void response.writeHead(302, { location: elsewhere.url }).end(),
        (response) => void response.writeHead(200).end("<html>"),
        (response) => void response.writeHead(200).end('{"keys":{}}'),
        (response) => void response.writeHead(200).end(" ".repeat(2 * 1024 * 1024)),
        (response) => void response.destroy(),
      ];
      for (const behaviour of answers) {
        server.misbehave(behaviour);
        await isOverloaded(fetching(QUICK), await by(pair), QUICK.retryMs);
      }
      assert.equal(elsewhere.asked, 0);
    } finally {
      await elsewhere.stop();
    }
  });

  it("are needed by nobody whose key is known, or whose token is refused anyway", async () => {
    const config = schema.parse({
      auth: {
        keys: [{ key: "k" }],
        jwt: [{ issuer: ISSUER, audience: AUDIENCE, jwksUrl: server.url }],
      },
      tenants: TENANTS,
    });
    const access = prepareAccess(config, []);
    await server.stop();
    assert.equal(await called(access, "k"), "default");
    await isRefused(access, unsigned(claimsOf({ tenant: "team" })), /\(alg\)/);
    await isRefused(access, await confused(pair, claimsOf({ tenant: "team" })), /\(alg\)/);
    await isRefused(access, await by(pair, { issuer: "https://evil.example" }), /\(iss\)/);
    assert.equal(server.asked, 0);
  });
});
