import type { Permit } from "../fleet/permit.ts";
import type { RequestRecord } from "../telemetry/record.ts";
import { admit, deadlineOf } from "./admit.ts";
import { AttemptFailed, UpstreamAttempt } from "./attempt.ts";
import { degrade } from "./degrade.ts";
import type { Exchange } from "./exchange.ts";
import { forward } from "./forward.ts";
import type { Reply } from "./inspect.ts";
import type { Plane } from "./plane.ts";
import { reserve } from "./reserve.ts";

/** Attempts per request: the first, and one more elsewhere. */
const MOST_ATTEMPTS = 2;

/**
 * Everything between the cache and the relay: reserve, admit, forward; and where the asked-for model
 * cannot do it now the same with the smaller ones that may answer instead.
 */
export async function obtain(exchange: Exchange, plane: Plane): Promise<Reply> {
  await reserve(exchange, plane);
  const passed = new Set<string>();
  let first: { error: unknown; where: Partial<RequestRecord> } | null = null;
  for (;;) {
    try {
      const reply = await attempts(exchange, plane);
      const { degraded } = exchange;
      if (degraded !== null) {
        plane.metrics?.degraded(degraded.asked, degraded.served);
        plane.fleet.forgive(exchange.id, null);
      }
      return reply;
    } catch (error) {
      const { model, backend_id, reason } = exchange.record;
      first ??= { error, where: { model, backend_id, reason } };
      if (exchange.wishes.mayDegrade && degrade(exchange, plane, error, passed)) continue;
      if (passed.size > 1) plane.fleet.forgive(exchange.id, first.where.model ?? null);
      // Nothing came of the smaller ones: it is as if nobody had asked them.
      if (!exchange.ended) {
        exchange.degraded = null;
        Object.assign(exchange.record, first.where);
      }
      throw first.error;
    }
  }
}

/** Admits and forwards, and once more elsewhere where the first attempt allows it. */
export async function attempts(exchange: Exchange, plane: Plane): Promise<Reply> {
  const tried = new Set<string>();
  const busy = new Set<string>();
  let failed: AttemptFailed | null = null;
  let last = "";
  for (;;) {
    const permit = await admit(exchange, plane, {
      tried,
      busy,
      // An engine that was busy is waited for as any other; a failure's second attempt not always.
      mayWait: () =>
        plane.now() < deadlineOf(exchange) && (tried.size === 0 || plane.retries.take(plane.now())),
    }).catch((error: unknown) => {
      // Nowhere else to go: the client learns what the engine said.
      throw failed !== null && !exchange.ended ? failed.error : error;
    });
    if (failed !== null) countRetry(exchange, plane, last, failed.error.cause);
    const attempt = begin(exchange, plane, permit);
    try {
      const reply = await forward(exchange, attempt, plane);
      permit.proved();
      return reply;
    } catch (error) {
      if (!(error instanceof AttemptFailed)) throw error;
      failed = error;
      attempt.end(failed.verdict, failed.error.cause);
      last = permit.target.backend;
      (failed.fault === "busy" ? busy : tried).add(last);
      if (failed.verdict.retry === "no" || tried.size >= MOST_ATTEMPTS) throw failed.error;
      exchange.phase = "retrying";
      // What has come up meanwhile may do it.
      exchange.renew();
      exchange.timing.retry = (exchange.timing.retry ?? 0) + plane.now() - attempt.sentAt;
    }
  }
}

/** @param backend the one that failed. */
function countRetry(exchange: Exchange, plane: Plane, backend: string, cause: string) {
  exchange.trace.event("retry", { backend_id: backend, cause });
  plane.metrics?.retry(backend, cause);
}

function begin(exchange: Exchange, plane: Plane, permit: Permit): UpstreamAttempt {
  const { record, view, endpoint } = exchange;
  record.attempts++;
  const trace = exchange.trace.attempt({
    number: record.attempts,
    operation: endpoint.operation,
    model: record.model ?? "",
    upstreamModel: permit.target.model,
    kind: permit.engine.kind,
    backend: permit.target.backend,
    url: permit.connection.url,
    stream: record.stream,
    sampling: view?.sampling ?? {},
    retryCount: exchange.headers.get("x-stainless-retry-count"),
  });
  const attempt = new UpstreamAttempt(plane, permit, trace);
  exchange.attempt = attempt;
  exchange.phase = "connecting";
  return attempt;
}
