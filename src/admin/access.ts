import { timingSafeEqual } from "node:crypto";
import { credentialOf, isLoopback, nameOf, sha256 } from "../caller.ts";
import { GatewayError, quote } from "../errors.ts";

/** Is this the address of the machine itself, IPv4 in IPv6 included? */
function isLocalAddress(address: string): boolean {
  return isLoopback(address.replace(/^::ffff:/i, ""));
}

/**
 * Who may operate the gateway: whoever has the admin key, or without one a caller on this machine that
 * nobody forwarded. A page of another origin never, since its visitor's browser is on this machine too.
 *
 * @param peer the address at the other end of the connection; null when the runtime does not tell.
 * @throws GatewayError `origin_not_allowed`, `invalid_api_key`, `permission_denied`
 */
export function checkOperator(
  headers: Headers,
  peer: string | null,
  key: string | undefined,
): void {
  const host = headers.get("host")?.toLowerCase() ?? "";
  const origin = headers.get("origin");
  if (origin !== null && ![`http://${host}`, `https://${host}`].includes(origin.toLowerCase())) {
    throw new GatewayError(
      "origin_not_allowed",
      `Origin ${quote(origin)} may not operate this gateway: only its own pages may`,
    );
  }
  if (key !== undefined) {
    if (timingSafeEqual(sha256(credentialOf(headers) ?? ""), sha256(key))) return;
    throw new GatewayError(
      "invalid_api_key",
      "send the admin key (admin.key) as Authorization: Bearer KEY, or x-api-key: KEY",
    );
  }
  const forwarded = headers.has("forwarded") || headers.has("x-forwarded-for");
  if (peer !== null && isLocalAddress(peer) && isLoopback(nameOf(host)) && !forwarded) return;
  throw new GatewayError(
    "permission_denied",
    "without an admin key only callers on this machine may operate the gateway: set admin.key",
  );
}
