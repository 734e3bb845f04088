/** What has to hold after anything that was done to the gateway. */
import assert from "node:assert/strict";
import { openaiChat, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";

const MIB = 1024 * 1024;

/** More than any one test here may leave behind; a leak of what is sent would be far beyond. */
const MOST_GROWTH = 256 * MIB;

/** Nothing is held, a normal request works, and memory is where it was. */
export async function checkWell(
  fleet: Fleet<"a">,
  model: string,
  residentBefore: number,
): Promise<void> {
  fleet.reset();
  const isWell = async (): Promise<boolean> =>
    (await openaiChat(fleet.url, { model })).status === 200;
  assert.ok(await until(isWell), "a normal request works");
  for (const gauge of [
    "tidegate_requests_in_flight",
    "tidegate_slots_in_use",
    "tidegate_queue_requests",
    "tidegate_held_body_bytes",
  ]) {
    const isZero = async (): Promise<boolean> => (await fleet.gateway.metric(gauge)) === 0;
    assert.ok(await until(isZero), `${gauge} is 0`);
  }
  let growth = 0;
  const isBounded = async (): Promise<boolean> => {
    growth = (await fleet.gateway.residentBytes()) - residentBefore;
    return growth <= MOST_GROWTH;
  };
  assert.ok(await until(isBounded), `grew by ${Math.round(growth / MIB)} MiB`);
  console.log(`hostile: resident memory ${growth < 0 ? "" : "+"}${Math.round(growth / MIB)} MiB`);
}
