import { timingSafeEqual } from "node:crypto";
import { credentialOf, isLoopback, nameOf, sha256 } from "../caller.ts";
import type { Config } from "../config.ts";
import { GatewayError, quote } from "../errors.ts";
import type { EnvironmentKey } from "../settings/environment.ts";
import type { KeyFiles } from "../settings/key-files.ts";
import type { Issuer } from "./tokens.ts";

interface Key {
  digest: Uint8Array;
  tenant: string;
}

/** Who may call, made ready at start and at every reload. */
export interface Access {
  /** No keys and no issuers: everyone may. */
  keys: readonly Key[];
  issuers: readonly Issuer[];
  /** Whom a token may name. */
  tenants: ReadonlySet<string>;
  /** Only a loopback bind can be reached by a page that rebinds its name. */
  checksHost: boolean;
  allowedHosts: ReadonlySet<string>;
  allowedOrigins: ReadonlySet<string>;
}

/**
 * @param keyFiles what the configuration's `jwksFile`s hold.
 * @param before what was in effect: keys that were fetched from a URL which stays are kept.
 */
export function prepareAccess(
  config: Config,
  environmentKeys: readonly EnvironmentKey[],
  keyFiles: KeyFiles = new Map(),
  before: Pick<Access, "issuers"> = { issuers: [] },
): Access {
  const configured = config.auth.keys.map((each): Key => {
    const hex = "hash" in each ? each.hash.slice("sha256:".length) : null;
    const digest = "key" in each ? sha256(each.key) : Buffer.from(hex ?? "", "hex");
    return { digest, tenant: each.tenant };
  });
  const further = environmentKeys.map(({ key, tenant }) => ({ digest: sha256(key), tenant }));
  const issuers = config.auth.jwt.map((terms): Issuer => {
    const { jwksUrl, jwksFile } = terms;
    const published = jwksFile === undefined ? null : (keyFiles.get(jwksFile) ?? { keys: [] });
    const known = before.issuers.find((each) => each.terms.jwksUrl === jwksUrl);
    return { terms, published, keys: published === null ? (known?.keys ?? null) : null };
  });
  return {
    keys: [...configured, ...further],
    issuers,
    tenants: new Set(["default", ...Object.keys(config.tenants)]),
    checksHost: isLoopback(config.server.host),
    allowedHosts: new Set(config.server.allowedHosts.map((host) => host.toLowerCase())),
    allowedOrigins: new Set(config.server.allowedOrigins),
  };
}

function isLocalName(name: string): boolean {
  return isLoopback(name) || name.endsWith(".localhost");
}

const LOCAL_APPS = new Set(["app:", "file:", "tauri:", "vscode-webview:"]);

function isAllowedOrigin(origin: string, host: string, access: Access): boolean {
  if (access.allowedOrigins.has("*") || access.allowedOrigins.has(origin)) return true;
  const url = URL.parse(origin);
  if (url === null) return false;
  if (LOCAL_APPS.has(url.protocol)) return true;
  if (url.protocol !== "http:" && url.protocol !== "https:") return false;
  return url.host === host.toLowerCase() || isLocalName(url.hostname);
}

/**
 * Refuses pages of other sites: a foreign `Origin`, and on a loopback bind a `Host` that is not a
 * name of this machine (DNS rebinding).
 *
 * @throws GatewayError `origin_not_allowed`, `host_not_allowed`
 */
export function checkOrigin(headers: Headers, access: Access): void {
  const host = headers.get("host");
  if (access.checksHost && host !== null) {
    const name = nameOf(host);
    if (!isLocalName(name) && !access.allowedHosts.has(name)) {
      throw new GatewayError(
        "host_not_allowed",
        `Host ${quote(host)} is no name of this machine: use localhost, or add it to server.allowedHosts`,
      );
    }
  }
  const origin = headers.get("origin");
  if (origin !== null && !isAllowedOrigin(origin, host ?? "", access)) {
    throw new GatewayError(
      "origin_not_allowed",
      `Origin ${quote(origin)} may not call this gateway: add it to server.allowedOrigins`,
    );
  }
}

/** A header, a payload, and a signature that may be missing. */
const TOKEN = /^[\w-]+\.[\w-]+\.[\w-]*$/;

/**
 * Who calls, from the headers alone: the tenant of the key, else the one that the token names. A key is
 * known at once; only a token is a promise, since its issuer's keys may have to be fetched.
 *
 * @throws GatewayError `invalid_api_key`; for a token `permission_denied` and `overloaded` as well
 */
export function identify(headers: Headers, access: Access): string | Promise<string> {
  const { keys, issuers, tenants } = access;
  if (keys.length === 0 && issuers.length === 0) return "default";
  const credential = credentialOf(headers);
  if (credential === null) {
    throw new GatewayError(
      "invalid_api_key",
      "no API key: send Authorization: Bearer KEY, or x-api-key: KEY",
    );
  }
  const digest = sha256(credential);
  // Every key is compared, so that the time tells nothing about which one was near.
  let tenant: string | null = null;
  for (const key of keys) if (timingSafeEqual(key.digest, digest)) tenant = key.tenant;
  if (tenant !== null) return tenant;
  if (issuers.length > 0 && TOKEN.test(credential)) {
    return import("./tokens.ts").then(({ tenantOfToken }) =>
      tenantOfToken(credential, issuers, tenants),
    );
  }
  throw new GatewayError("invalid_api_key", "this API key is not known here");
}
