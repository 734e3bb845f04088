import { createHash } from "node:crypto";

/** What callers' credentials are compared by: of one length, whatever was sent. */
export function sha256(text: string): Uint8Array {
  return createHash("sha256").update(text).digest();
}

/** The key a caller sent: a bearer token, else `x-api-key`; null where there is none. */
export function credentialOf(headers: Headers): string | null {
  const [, bearer] = /^bearer\s+(.+)$/i.exec(headers.get("authorization")?.trim() ?? "") ?? [];
  return bearer ?? headers.get("x-api-key");
}

/** The name in a `Host` header, without its port. */
export function nameOf(host: string): string {
  return host.replace(/:\d*$/, "").toLowerCase();
}

/** Loopback by name or number: 127.0.0.0/8, `::1`, `localhost`. */
export function isLoopback(host: string): boolean {
  const bare = host.replace(/^\[|\]$/g, "").toLowerCase();
  return bare === "localhost" || bare === "::1" || /^127\.\d+\.\d+\.\d+$/.test(bare);
}
