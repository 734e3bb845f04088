import {
  createLocalJWKSet,
  createRemoteJWKSet,
  customFetch,
  type FetchImplementation,
  type JSONWebKeySet,
  type JWTVerifyGetKey,
} from "jose";
import { GatewayError } from "../errors.ts";
import { shown } from "../settings/mistakes.ts";

/** How often a key server is asked, milliseconds. */
export interface Pace {
  /** One fetch; its answer is waited for. */
  timeoutMs: number;
  /** From fetch to fetch, whatever tokens come: a key that nobody has published costs nothing. */
  coolDownMs: number;
  /** The same after a failure, while there are no keys at all. */
  retryMs: number;
  /** Older keys are fetched again before they are used, so that a withdrawn one goes. */
  maxAgeMs: number;
}

const PACE: Pace = { timeoutMs: 3000, coolDownMs: 30_000, retryMs: 1000, maxAgeMs: 600_000 };

/** More than any issuer publishes. */
const LARGEST_BYTES = 1024 * 1024;

/**
 * Keys that are fetched when a token first needs them. Those that were fetched stay in use while the
 * server is away; only what none of them can decide is refused then, with `overloaded`.
 */
export function remoteKeys(url: string, pace: Pace = PACE): JWTVerifyGetKey {
  const never = -Infinity;
  let fetchedAt = never;
  let askAgainAt = never;

  const away = (detail?: string) =>
    new GatewayError(
      "overloaded",
      "the keys to check this token with cannot be had from their server (auth.jwt[].jwksUrl): try again",
      { retryAfterMs: askAgainAt - performance.now(), detail },
    );
  const fetchKeys: FetchImplementation = async (href, options) => {
    if (performance.now() < askAgainAt) throw away();
    try {
      const set = await bounded(await fetch(href, { ...options, keepalive: false }));
      fetchedAt = performance.now();
      return Response.json(set);
    } catch (error) {
      askAgainAt = performance.now() + (fetchedAt === never ? pace.retryMs : pace.coolDownMs);
      throw away(String(shown([], String(error))));
    }
  };
  const keys = createRemoteJWKSet(new URL(url), {
    timeoutDuration: pace.timeoutMs,
    cooldownDuration: pace.coolDownMs,
    // Its own would throw away what it has where it cannot have more.
    cacheMaxAge: Infinity,
    [customFetch]: fetchKeys,
  });
  return async (header, token) => {
    const now = performance.now();
    const isOld = fetchedAt !== never && now - fetchedAt > pace.maxAgeMs;
    if (isOld && now >= askAgainAt) await keys.reload().catch(() => {});
    return await keys(header, token);
  };
}

/** @throws Error unless it is a key set of reasonable size. */
async function bounded(response: Response): Promise<JSONWebKeySet> {
  if (response.status !== 200) {
    await response.body?.cancel();
    throw new Error(`it answers ${response.status}`);
  }
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of response.body ?? []) {
    size += chunk.length;
    if (size > LARGEST_BYTES) throw new Error(`it sends more than ${LARGEST_BYTES} bytes`);
    chunks.push(chunk);
  }
  const set = JSON.parse(Buffer.concat(chunks).toString()) as JSONWebKeySet;
  createLocalJWKSet(set);
  return set;
}
