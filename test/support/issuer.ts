/** An issuer of tokens: its keys, the server that publishes them, and tokens that are not as they should be. */
import { createHmac } from "node:crypto";
import { createServer, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { exportJWK, exportSPKI, generateKeyPair, SignJWT, type CryptoKey, type JWK } from "jose";

export const ISSUER = "https://id.example";
export const AUDIENCE = "tidegate-tests";

export interface KeyPair {
  kid: string;
  alg: string;
  privateKey: CryptoKey;
  publicKey: CryptoKey;
  /** As it is published. */
  jwk: JWK;
}

export async function aKeyPair(kid: string, alg = "ES256"): Promise<KeyPair> {
  const { privateKey, publicKey } = await generateKeyPair(alg, { extractable: true });
  const jwk = { ...(await exportJWK(publicKey)), kid, alg, use: "sig" };
  return { kid, alg, privateKey, publicKey, jwk };
}

export interface TokenOptions {
  claims?: Record<string, unknown>;
  /** Null leaves it out. */
  issuer?: string | null;
  audience?: string | string[] | null;
  /** Seconds from now; null for a token without an end. */
  expiresInS?: number | null;
  kid?: string | undefined;
}

/** Signed by that key, and good for a minute unless it says otherwise. */
export function tokenBy(pair: KeyPair, options: TokenOptions = {}): Promise<string> {
  const { claims = {}, issuer = ISSUER, audience = AUDIENCE, expiresInS = 60 } = options;
  const kid = "kid" in options ? options.kid : pair.kid;
  const token = new SignJWT(claims).setProtectedHeader({
    alg: pair.alg,
    ...(kid === undefined ? {} : { kid }),
  });
  if (issuer !== null) token.setIssuer(issuer);
  if (audience !== null) token.setAudience(audience);
  if (expiresInS !== null) token.setExpirationTime(new Date(Date.now() + expiresInS * 1000));
  return token.sign(pair.privateKey);
}

const encoded = (value: unknown): string =>
  Buffer.from(JSON.stringify(value)).toString("base64url");

/** What a forger says: everything as it should be. */
export function claimsOf(more: Record<string, unknown> = {}): Record<string, unknown> {
  const exp = Math.floor(Date.now() / 1000) + 60;
  return { iss: ISSUER, aud: AUDIENCE, exp, ...more };
}

/** Signed by nobody, with whatever spelling of `none`. */
export function unsigned(claims: Record<string, unknown>, alg = "none"): string {
  return `${encoded({ alg })}.${encoded(claims)}.`;
}

/** Algorithm confusion: the published key, which everybody has, taken for a secret. */
export async function confused(pair: KeyPair, claims: Record<string, unknown>): Promise<string> {
  const text = `${encoded({ alg: "HS256", kid: pair.kid })}.${encoded(claims)}`;
  const secret = await exportSPKI(pair.publicKey);
  return `${text}.${createHmac("sha256", secret).update(text).digest("base64url")}`;
}

export interface KeyServer {
  url: string;
  /** How often it was asked. */
  asked: number;
  /** What it publishes. */
  publish(...pairs: KeyPair[]): void;
  /** Answers that way in the place of the keys; null: as it should again. */
  misbehave(answer: ((response: ServerResponse) => void) | null): void;
  /** Nobody listens any more. */
  stop(): Promise<void>;
  /** On the same port again. */
  start(): Promise<void>;
}

export async function startKeyServer(...pairs: KeyPair[]): Promise<KeyServer> {
  let published = pairs;
  let answer: ((response: ServerResponse) => void) | null = null;
  let server: Server | null = null;
  let port = 0;
  const self: KeyServer = {
    url: "",
    asked: 0,
    publish: (...next) => void (published = next),
    misbehave: (next) => void (answer = next),
    async stop() {
      const stopped = server;
      server = null;
      if (stopped === null) return;
      stopped.closeAllConnections();
      await new Promise((resolve) => stopped.close(resolve));
    },
    async start() {
      const started = createServer((_, response) => {
        self.asked += 1;
        if (answer !== null) return answer(response);
        response.setHeader("content-type", "application/json");
        response.end(JSON.stringify({ keys: published.map(({ jwk }) => jwk) }));
      });
      await new Promise<void>((resolve) => started.listen(port, "127.0.0.1", resolve));
      ({ port } = started.address() as AddressInfo);
      self.url = `http://127.0.0.1:${port}/jwks.json`;
      server = started;
    },
  };
  await self.start();
  return self;
}
