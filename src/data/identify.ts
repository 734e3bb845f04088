import { timingSafeEqual } from "node:crypto";
import { credentialOf, isLoopback, nameOf, sha256 } from "../caller.ts";
import type { Config } from "../config.ts";
import { GatewayError, quote } from "../errors.ts";
import type { EnvironmentKey } from "../settings/environment.ts";

interface Key {
  digest: Uint8Array;
  tenant: string;
}

/** Who may call, made ready once at start. */
export interface Access {
  /** Empty: everyone may. */
  keys: readonly Key[];
  /** Only a loopback bind can be reached by a page that rebinds its name. */
  checksHost: boolean;
  allowedHosts: ReadonlySet<string>;
  allowedOrigins: ReadonlySet<string>;
}

export function prepareAccess(config: Config, environmentKeys: readonly EnvironmentKey[]): Access {
  const configured = config.auth.keys.map((each): Key => {
    const hex = "hash" in each ? each.hash.slice("sha256:".length) : null;
    const digest = "key" in each ? sha256(each.key) : Buffer.from(hex ?? "", "hex");
    return { digest, tenant: "default" };
  });
  const further = environmentKeys.map(({ key, tenant }) => ({ digest: sha256(key), tenant }));
  return {
    keys: [...configured, ...further],
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

/**
 * Who calls, from the headers alone: the tenant of the key.
 *
 * @throws GatewayError `invalid_api_key`
 */
export function identify(headers: Headers, access: Access): string {
  if (access.keys.length === 0) return "default";
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
  for (const key of access.keys) if (timingSafeEqual(key.digest, digest)) tenant = key.tenant;
  if (tenant === null) throw new GatewayError("invalid_api_key", "this API key is not known here");
  return tenant;
}
