import type { Fault } from "../core/outcome.ts";
import { backendOf, resolve, type Residency } from "../core/snapshot.ts";
import { quote, type ErrorCode } from "../errors.ts";
import type { Permit } from "../fleet/permit.ts";
import type { UpstreamAttempt } from "./attempt.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/** So much longer than predicted may it take before that is a fault. */
const PREFILL_FACTOR = 6;
const LOAD_LOOK_MS = 1000;

type GiveUp = (fault: Fault, code: ErrorCode, message: string) => void;

/**
 * Watches an attempt that has brought nothing yet. `fetch` does not tell connecting from waiting, and an
 * engine that reads a long prompt is as silent as a dead one, so the backend itself is asked.
 *
 * @param giveUp is called when there is no point in waiting any longer.
 * @returns `connected`: the headers are here; `stop`: all that was waited for is.
 */
export function watchSilence(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  plane: Plane,
  giveUp: GiveUp,
): { connected: () => void; stop: () => void } {
  const connected = watchConnection(exchange, attempt, plane, giveUp);
  const isStream = exchange.view?.stream === true;
  const begun = isStream ? watchFirstByte(exchange, attempt, plane, giveUp) : () => {};
  return {
    connected,
    stop() {
      connected();
      begun();
    },
  };
}

/**
 * No headers for `timeouts.connectMs`: the backend is probed, and again whenever it has been found
 * unhealthy since. Only what does not answer that either, and sends nothing to others, is given up.
 */
function watchConnection(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  plane: Plane,
  giveUp: GiveUp,
): () => void {
  const { permit } = attempt;
  const { backend } = permit.target;
  const { connectMs } = exchange.config.timeouts;
  let stop = () => {};
  let stopped = false;
  const isDead = async (): Promise<boolean> => {
    if (await plane.probe(permit)) return false;
    // Tokens that still flow from it overrule a failed probe.
    return plane.now() - plane.fleet.lastChunkAt(backend) >= connectMs;
  };
  const look = async (isFirst: boolean) => {
    const isSuspect = isFirst || backendOf(plane.snapshot(), backend)?.health !== "healthy";
    const dead = isSuspect && (await isDead());
    if (stopped) return;
    if (!dead) return wait(false);
    const message = `backend ${quote(backend)} does not answer, nor does it answer a probe (timeouts.connectMs)`;
    giveUp("unreachable", "upstream_unreachable", message);
  };
  const wait = (isFirst: boolean) => {
    stop = exchange.after(connectMs, () => void look(isFirst));
  };
  wait(true);
  return () => {
    stopped = true;
    stop();
  };
}

/**
 * A stream that has not begun: `timeouts.firstByteMs` from when its model is loaded, and longer for a
 * prompt that takes long to read.
 */
function watchFirstByte(
  exchange: Exchange,
  attempt: UpstreamAttempt,
  plane: Plane,
  giveUp: GiveUp,
): () => void {
  const { firstByteMs, loadMs } = exchange.config.timeouts;
  if (firstByteMs === 0) return () => {};
  const isLoaded = () => residencyOf(exchange, plane, attempt.permit) === "loaded";
  const { backend } = attempt.permit.target;
  const limit = Math.max(firstByteMs, PREFILL_FACTOR * attempt.permit.beginMs);
  let loadedAt = isLoaded() ? attempt.sentAt : null;
  let stop = () => {};
  const look = () => {
    const now = plane.now();
    const isTooLong = now - attempt.sentAt > loadMs;
    if (loadedAt === null && (isTooLong || isLoaded())) loadedAt = now;
    const left = loadedAt === null ? LOAD_LOOK_MS : loadedAt + limit - now;
    // A timer may fire a little early by this clock.
    if (left > 0.5) {
      stop = exchange.after(left, look);
      return;
    }
    const message = `backend ${quote(backend)} sent nothing for ${Math.round(limit)} ms (timeouts.firstByteMs)`;
    giveUp("timeout", "upstream_timeout", message);
  };
  look();
  return () => stop();
}

/** As the newest probe saw it; where nobody tells, or nobody knows any more, nothing loads. */
function residencyOf(exchange: Exchange, plane: Plane, { engine, target }: Permit): Residency {
  const resolution = resolve(plane.snapshot(), exchange.record.model ?? "");
  if (!engine.tellsResidency || !resolution.found) return "loaded";
  const now = resolution.model.targets.find(({ backend }) => backend === target.backend);
  return now?.residency ?? "loaded";
}
