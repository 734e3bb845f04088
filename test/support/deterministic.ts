/** Requests whose answers may be given again, and what a gateway says became of them. */
import assert from "node:assert/strict";
import type { Answer } from "./client.ts";
import { chatBody, until } from "./client.ts";
import type { Gateway, LogRecord } from "./gateway.ts";

/** Of a backend: no probe disturbs what a test does to its engine. */
export const QUIET = { healthInterval: 600_000, timeout: 600_000 };

/** A chat about something, that would be answered the same again. */
export function sureChat(about: string, more: Record<string, unknown> = {}) {
  return chatBody({ temperature: 0, messages: [{ role: "user", content: about }], ...more });
}

export function cacheOf({ status, headers, text }: Answer): string {
  assert.equal(status, 200, text);
  return headers.get("x-tidegate-cache") ?? "";
}

export function recordOf(gateway: Gateway, { headers }: Answer): Promise<LogRecord> {
  return gateway.record(headers.get("x-request-id") ?? "");
}

export function inFlight(gateway: Gateway, count: number): Promise<boolean> {
  return until(async () => (await gateway.metric("tidegate_requests_in_flight")) === count);
}
