import {
  createLocalJWKSet,
  decodeJwt,
  errors,
  jwtVerify,
  type JSONWebKeySet,
  type JWTPayload,
  type JWTVerifyGetKey,
} from "jose";
import type { Config } from "../config.ts";
import { GatewayError } from "../errors.ts";
import { remoteKeys } from "./key-sets.ts";

/** Whose tokens are taken. */
export interface Issuer {
  readonly terms: Config["auth"]["jwt"][number];
  /** The keys of its file; null where they are fetched. */
  readonly published: JSONWebKeySet | null;
  /** Made for its first token, and kept over reloads while the URL stays. */
  keys: JWTVerifyGetKey | null;
}

/**
 * The tenant that a token names, once its issuer's signature, its audience and its times are checked.
 *
 * @param tenants that are configured.
 * @throws GatewayError `invalid_api_key`, `permission_denied`; `overloaded` when the keys cannot be had
 */
export async function tenantOfToken(
  token: string,
  issuers: readonly Issuer[],
  tenants: ReadonlySet<string>,
): Promise<string> {
  const issuer = issuerOf(token, issuers);
  const { terms } = issuer;
  issuer.keys ??= keysOf(issuer);
  const { payload } = await jwtVerify(token, issuer.keys, {
    issuer: terms.issuer,
    audience: terms.audience,
    algorithms: terms.algorithms,
    clockTolerance: terms.toleranceS,
    requiredClaims: ["exp"],
  }).catch((error: unknown) => {
    throw error instanceof GatewayError ? error : refused(reasonOf(error));
  });
  const tenant = claimAt(payload, terms.tenantClaim);
  if (typeof tenant === "string" && tenants.has(tenant)) return tenant;
  throw new GatewayError(
    "permission_denied",
    `this token is good, but its claim ${JSON.stringify(terms.tenantClaim)} ` +
      (tenant === undefined ? "is missing" : "names no tenant of this gateway") +
      ": it has to be a name that is listed in tenants",
  );
}

/** By what the token says of itself; whether that is true is seen when it is verified. */
function issuerOf(token: string, issuers: readonly Issuer[]): Issuer {
  const { iss, aud } = unverified(token);
  const named = issuers.filter(({ terms }) => terms.issuer === iss);
  const audiences = [aud].flat();
  const issuer = named.find(({ terms }) => audiences.includes(terms.audience)) ?? named[0];
  if (issuer === undefined) throw refused("its issuer (iss) is none of those in auth.jwt");
  return issuer;
}

function unverified(token: string): JWTPayload {
  try {
    return decodeJwt(token);
  } catch (error) {
    throw refused(reasonOf(error));
  }
}

/** `realm.tenant` is a claim of that very name, else `tenant` in the object `realm`. */
function claimAt(claims: JWTPayload, name: string): unknown {
  let value: unknown = claims;
  for (const part of Object.hasOwn(claims, name) ? [name] : name.split(".")) {
    // What every object inherits is no claim.
    if (typeof value !== "object" || value === null || !Object.hasOwn(value, part))
      return undefined;
    value = Reflect.get(value, part);
  }
  return value;
}

function refused(why: string): GatewayError {
  return new GatewayError("invalid_api_key", `this token is not accepted: ${why}`);
}

/** Why a token is not what it should be, and what to do; never a word of the token itself. */
function reasonOf(error: unknown): string {
  if (error instanceof errors.JWTExpired) return "it has expired (exp): get a new one";
  if (error instanceof errors.JWTClaimValidationFailed) {
    if (error.reason === "missing") return `it has no ${error.claim}, which is needed`;
    if (error.claim === "aud") {
      return "it is for others (aud): ask its issuer for one with the audience of auth.jwt";
    }
    if (error.claim === "nbf") return "it is not good yet (nbf): wait, or set the clocks right";
    return `its ${error.claim} is not what it has to be`;
  }
  if (error instanceof errors.JOSEAlgNotAllowed) {
    return "it is signed in a way that is not allowed here (alg): see auth.jwt[].algorithms";
  }
  if (error instanceof errors.JWKSNoMatchingKey) {
    return "it is signed with a key that its issuer does not publish (kid): get a new one";
  }
  if (error instanceof errors.JWKSMultipleMatchingKeys) {
    return "it does not say with which of its issuer's keys it is signed (kid)";
  }
  if (error instanceof errors.JWSSignatureVerificationFailed) {
    return "its signature is wrong: get a new one from its issuer";
  }
  return "it is malformed, or signed in a way that is not known here";
}

function keysOf({ terms, published }: Issuer): JWTVerifyGetKey {
  if (published !== null) return createLocalJWKSet(published);
  return remoteKeys(terms.jwksUrl ?? "");
}
