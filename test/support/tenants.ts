/** Tenants with a key each, and what the operator is told of them. */
import assert from "node:assert/strict";
import { send, until } from "./client.ts";
import type { Gateway } from "./gateway.ts";

export interface BudgetReport {
  window: string;
  limit: number;
  used: number;
  reserved: number;
  /** Unix milliseconds. */
  resetAt: number;
}

/** Contract §5, `GET /admin/api/tenants`. */
export interface TenantReport {
  id: string;
  weight: number;
  priority: string;
  inFlight: number;
  queued: number;
  requests: number;
  tokens: { input: number; output: number; estimated: number };
  budgets: BudgetReport[];
}

/** `tenants` and `auth` of a configuration. */
export function withKeys<Name extends string>(tenants: Record<Name, object>) {
  const keys = Object.keys(tenants).map((tenant) => ({ key: keyOf(tenant), tenant }));
  return { tenants, auth: { keys } };
}

function keyOf(tenant: string): string {
  return `key-of-${tenant}`;
}

/** Headers of a request by a tenant. */
export function by(
  tenant: string,
  more: Record<string, string> = {},
): { headers: Record<string, string> } {
  return { headers: { authorization: `Bearer ${keyOf(tenant)}`, ...more } };
}

export async function tenantsOf(url: string): Promise<Record<string, TenantReport>> {
  const answer = await send(`${url}/admin/api/tenants`);
  assert.equal(answer.status, 200, answer.text);
  const list = JSON.parse(answer.text) as TenantReport[];
  return Object.fromEntries(list.map((each) => [each.id, each]));
}

export async function tenantOf(url: string, id: string): Promise<TenantReport> {
  const report = (await tenantsOf(url))[id];
  assert(report !== undefined, `tenant ${id}`);
  return report;
}

/** Everything that a request may hold has been given back. */
export async function isQuiet(gateway: Gateway): Promise<void> {
  const gauges = ["requests_in_flight", "slots_in_use", "queue_requests", "held_body_bytes"];
  let held: string[] = [];
  const quiet = await until(async () => {
    const values = await Promise.all(gauges.map((name) => gateway.metric(`tidegate_${name}`)));
    const tenants = Object.values(await tenantsOf(gateway.url));
    held = [
      ...gauges.filter((_, at) => values[at] !== 0),
      ...tenants
        .filter(({ inFlight, queued, budgets }) => {
          return inFlight + queued + budgets.reduce((sum, { reserved }) => sum + reserved, 0) > 0;
        })
        .map(({ id }) => `tenant ${id}`),
    ];
    return held.length === 0;
  });
  assert(quiet, `still held: ${held.join(", ")}`);
}
