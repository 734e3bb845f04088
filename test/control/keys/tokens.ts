/** `auth.jwt`: whose tokens are taken, for whom, and how they have to be signed. */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { ConfigInput } from "../../../src/config.ts";
import {
  AUDIENCE,
  ISSUER,
  aKeyPair,
  startKeyServer,
  tokenBy,
  type KeyPair,
  type KeyServer,
  type TokenOptions,
} from "../../support/issuer.ts";
import type { KeyTests, Rig } from "./rig.ts";

type Terms = NonNullable<NonNullable<ConfigInput["auth"]>["jwt"]>[number];

interface Issuing {
  pair: KeyPair;
  server: KeyServer;
  /** Takes tokens of the issuer on these terms. */
  take: (terms?: Partial<Terms>) => Promise<void>;
  /** The status of a request with such a token. */
  status: (options?: TokenOptions, by?: KeyPair) => Promise<number>;
}

/** An issuer whose keys are on loopback, and its tokens, which are for tenant `one` unless they say more. */
async function withIssuer(rig: Rig, work: (issuing: Issuing) => Promise<void>): Promise<void> {
  const pair = await aKeyPair("first");
  const server = await startKeyServer(pair);
  try {
    await work({
      pair,
      server,
      async take(terms = {}) {
        const known = { issuer: ISSUER, audience: AUDIENCE, jwksUrl: server.url };
        await rig.change({
          tenants: { one: {}, two: {} },
          auth: { jwt: [{ ...known, ...terms }] },
        });
      },
      async status(options = {}, signer = pair) {
        const token = await tokenBy(signer, { claims: { tenant: "one" }, ...options });
        return (await rig.chat({}, { authorization: `Bearer ${token}` })).status;
      },
    });
  } finally {
    await server.stop();
  }
}

export const tokenKeys: KeyTests = {
  "auth.jwt[].issuer": (rig) =>
    withIssuer(rig, async ({ take, status }) => {
      const issuer = "https://other.example";
      await take();
      assert.deepEqual([await status(), await status({ issuer })], [200, 401]);
      await take({ issuer });
      assert.deepEqual([await status(), await status({ issuer })], [401, 200]);
    }),

  "auth.jwt[].audience": (rig) =>
    withIssuer(rig, async ({ take, status }) => {
      const audience = "somebody-else";
      await take();
      assert.deepEqual([await status(), await status({ audience })], [200, 401]);
      await take({ audience });
      assert.deepEqual([await status(), await status({ audience })], [401, 200]);
    }),

  "auth.jwt[].jwksUrl": (rig) =>
    withIssuer(rig, async ({ pair, take, status }) => {
      const another = await aKeyPair("second");
      const server = await startKeyServer(another);
      try {
        await take();
        assert.deepEqual([await status({}, pair), await status({}, another)], [200, 401]);
        await take({ jwksUrl: server.url });
        assert.deepEqual([await status({}, pair), await status({}, another)], [401, 200]);
      } finally {
        await server.stop();
      }
    }),

  "auth.jwt[].jwksFile": (rig) =>
    withIssuer(rig, async ({ pair, server, take, status }) => {
      const folder = await mkdtemp(join(tmpdir(), "tidegate-jwks-"));
      try {
        const another = await aKeyPair("second");
        for (const each of [pair, another]) {
          const jwksFile = join(folder, `${each.kid}.json`);
          await writeFile(jwksFile, JSON.stringify({ keys: [each.jwk] }));
          await take({ jwksUrl: undefined, jwksFile });
          const statuses = [await status({}, pair), await status({}, another)];
          assert.deepEqual(statuses, each === pair ? [200, 401] : [401, 200]);
        }
        assert.equal(server.asked, 0);
      } finally {
        await rm(folder, { recursive: true, force: true });
      }
    }),

  "auth.jwt[].algorithms": (rig) =>
    withIssuer(rig, async ({ take, status }) => {
      await take({ algorithms: ["RS256"] });
      assert.equal(await status(), 401);
      await take({ algorithms: ["ES256"] });
      assert.equal(await status(), 200);
    }),

  "auth.jwt[].toleranceS": (rig) =>
    withIssuer(rig, async ({ take, status }) => {
      await take({ toleranceS: 0 });
      assert.equal(await status({ expiresInS: -30 }), 401);
      await take({ toleranceS: 300 });
      assert.equal(await status({ expiresInS: -30 }), 200);
    }),

  "auth.jwt[].tenantClaim": (rig) =>
    withIssuer(rig, async ({ pair, take }) => {
      const token = await tokenBy(pair, { claims: { tenant: "one", org: { team: "two" } } });
      for (const [tenantClaim, tenant] of [
        ["tenant", "one"],
        ["org.team", "two"],
      ] as const) {
        await take({ tenantClaim });
        const { headers } = await rig.chat({}, { authorization: `Bearer ${token}` });
        const record = await rig.gateway.record(headers.get("x-request-id") ?? "");
        assert.equal(record["tenant"], tenant);
      }
    }),
};
