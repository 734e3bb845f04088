import { contextFor } from "../core/context.ts";
import type { Model } from "../core/snapshot.ts";
import type { Ticket } from "../core/lanes.ts";
import { select, type Candidate, type Credit, type Selection } from "../core/select.ts";
import { GatewayError, quote } from "../errors.ts";
import type { Admission, Permit, Place } from "../fleet/permit.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";
import { canServe, resolveModel } from "./resolve.ts";

/** Where nothing is open, something unhealthy may be well again after the usual time between probes. */
const PROBED_AGAIN_MS = 5000;

/**
 * Whoever is told to choose again does so at once, before anything else in the process. After so many
 * times the others come first, lest two backends that send somebody to and fro stop everything.
 */
const MANY_CHOICES = 32;

/** What a request that waits can be told. */
export interface Waiting {
  position: number;
  reason: string;
  /** When it will start if nobody else comes, milliseconds. */
  etaMs: number;
}

/** Where an exchange stands in a queue, while it stands in one, and how it gives that place up. */
const places = new WeakMap<Exchange, { place: Place; leave: () => void }>();

export function waitingOf(exchange: Exchange): Waiting | null {
  const place = places.get(exchange)?.place;
  const position = place?.position() ?? -1;
  if (place === undefined || position < 0) return null;
  return { position, reason: place.reason(), etaMs: place.etaMs() };
}

/** Lets a request that waits choose again, since its priority or its deadline is another one now. */
export function reconsider(exchange: Exchange): void {
  places.get(exchange)?.leave();
}

export interface AdmitOptions {
  /** Backends that have failed this request: it does not go there again. */
  tried: ReadonlySet<string>;
  /** Backends that were too busy for it: anywhere else first. */
  busy: ReadonlySet<string>;
  /** Asked where it cannot start at once, and has been somewhere already. */
  mayWait: () => boolean;
}

/**
 * Chooses a target and waits for a slot there; chooses again when the scheduler says so.
 *
 * @throws GatewayError `no_backend_available`, `rate_limit_exceeded`, or what ended the exchange
 */
export async function admit(
  exchange: Exchange,
  plane: Plane,
  options: AdmitOptions,
): Promise<Permit> {
  const startedAt = plane.now();
  const loadedMs = loadedBefore(exchange);
  // Asked once: a retry that was let wait is not refused because it has to choose again.
  let waits: boolean | null = null;
  const choices: AdmitOptions = { ...options, mayWait: () => (waits ??= options.mayWait()) };
  let model = resolveModel(exchange, plane);
  let ticket = ticketFor(exchange, plane, model, options.tried);
  let endSpan: (() => void) | null = null;
  let rounds = 0;
  try {
    for (;;) {
      const { backend, reason, place, admission } = ask(exchange, plane, model, ticket, choices);
      exchange.record.backend_id = backend;
      const isRetry = options.tried.size + options.busy.size > 0;
      const isDegraded = exchange.degraded !== null;
      exchange.record.reason = isRetry ? "retry" : isDegraded ? "degraded" : reason;
      if (!("then" in admission) && admission.type === "granted") return admission.permit;
      const since = plane.now();
      let expectedAt = since;
      if ("then" in admission) {
        const etaMs = place.etaMs();
        expectedAt += etaMs;
        endSpan ??= exchange.trace.queue(Math.max(0, place.position()), place.reason(), etaMs);
      }
      const decided = await admission;
      if ("then" in admission) tellLoad(exchange, plane, model.name, backend, since);
      exchange.check();
      if (decided.type === "granted") {
        plane.metrics?.etaError(model.name, backend, Math.abs(plane.now() - expectedAt));
        return decided.permit;
      }
      if (decided.type === "refused") {
        const failed = decided.cause === "load_failed" ? plane.fleet.failedLoad(model) : null;
        throw failed === null
          ? refusal(decided, model.name, exchange)
          : notLoaded(model.name, failed);
      }
      if (++rounds % MANY_CHOICES === 0) {
        await new Promise((resolve) => setTimeout(resolve, 1));
        exchange.check();
      }
      exchange.renew();
      model = resolveModel(exchange, plane);
      ticket = ticketFor(exchange, plane, model, options.tried);
    }
  } finally {
    places.delete(exchange);
    if (endSpan !== null) {
      endSpan();
      const waitedMs = plane.now() - startedAt - (loadedBefore(exchange) - loadedMs);
      exchange.timing.queue = (exchange.timing.queue ?? 0) + waitedMs;
      exchange.record.queue_ms = Math.round(exchange.timing.queue);
    }
  }
}

/** For how long it has waited for loads, milliseconds. */
function loadedBefore({ timing }: Exchange): number {
  return timing.load ?? 0;
}

/** Of the time since `since` that a request has waited, what went into loading its model. */
function tellLoad(exchange: Exchange, plane: Plane, model: string, backend: string, since: number) {
  const load = plane.fleet.loadSince(backend, model, since);
  if (load === null) return;
  exchange.timing.load = loadedBefore(exchange) + load.to - load.from;
  exchange.record.load_ms = Math.round(exchange.timing.load);
  const offset = Date.now() - plane.now();
  exchange.trace.load(model, backend, offset + load.from, offset + load.to);
}

/** What the schedulers look at, as it is now: who joins a flight may change it. */
function ticketFor(
  exchange: Exchange,
  plane: Plane,
  model: Model,
  tried: ReadonlySet<string>,
): Ticket {
  return {
    id: exchange.id,
    model: model.name,
    flow: exchange.flow,
    priority: exchange.priority,
    weight: exchange.policy.weight,
    // What cannot be foreseen counts as a request at least.
    tokens: Math.max(1, exchange.expectedTokens),
    arrivedAt: exchange.receivedAt,
    deadlineAt: deadlineOf(exchange),
    barred: barredFor(exchange, plane, model, tried),
    cramped: crampedFor(exchange, model),
    prompt: exchange.prompt ?? undefined,
  };
}

function barredFor(
  exchange: Exchange,
  plane: Plane,
  model: Model,
  tried: ReadonlySet<string>,
): ReadonlySet<string> {
  let barred: Set<string> | null = null;
  for (const { backend } of model.targets) {
    if (canServe(exchange, plane.fleet.engineFor(backend))) continue;
    barred ??= new Set(tried);
    barred.add(backend);
  }
  return barred ?? tried;
}

const NOWHERE: ReadonlySet<string> = new Set();

/** Where prompt and answer may not fit, while they do elsewhere. */
function crampedFor(
  { promptTokens, view, outputCap }: Exchange,
  model: Model,
): ReadonlySet<string> {
  if (model.targets.length === 1) return NOWHERE;
  const asked = Math.max(0, view?.sampling.maxTokens ?? 0);
  const output = Math.min(asked, outputCap ?? Infinity);
  const { preferred } = contextFor(model.targets, promptTokens, output);
  if (preferred.length === model.targets.length) return NOWHERE;
  const others = model.targets.filter((target) => !preferred.includes(target));
  return new Set(others.map(({ backend }) => backend));
}

interface Asked {
  backend: string;
  reason: string;
  place: Place;
  admission: Admission | Promise<Admission>;
}

/** Selects, and asks the fleet; most requests are granted before this returns. */
function ask(
  exchange: Exchange,
  plane: Plane,
  model: Model,
  ticket: Ticket,
  options: AdmitOptions,
): Asked {
  const { fleet } = plane;
  const candidates = fleet.candidates(exchange.snapshot, model, ticket);
  const selection = choose(candidates, fleet.creditOf(model.name), options);
  if (selection === null) {
    const failed = fleet.failedLoad(model);
    if (failed !== null) throw notLoaded(model.name, failed);
    throw new GatewayError(
      "no_backend_available",
      `no backend with model ${quote(model.name)} is up: ${reasons(exchange, model)}`,
      { retryAfterMs: fleet.triedAgainIn(model) ?? PROBED_AGAIN_MS },
    );
  }
  const { target, reason } = selection;
  let decided: Admission | null = null;
  let resolveLater: (admission: Admission) => void = () => {};
  const place = fleet.enqueue(
    timely(exchange, plane, ticket, target.backend),
    target,
    (admission) => {
      decided = admission;
      resolveLater(admission);
    },
  );
  if (decided !== null) return { backend: target.backend, reason, place, admission: decided };
  const admission = new Promise<Admission>((resolve) => {
    resolveLater = resolve;
    // Gives back a permit that is granted too late as well; whoever awaits finds the exchange ended.
    const give = () => {
      place.leave();
      resolve({ type: "reselect" });
    };
    exchange.own(give);
    places.set(exchange, { place, leave: () => place.position() >= 0 && give() });
  });
  return { backend: target.backend, reason, place, admission };
}

/** A first attempt goes where it is best; any other into a free slot elsewhere, or waits if it may. */
function choose(
  candidates: readonly Candidate[],
  credit: Credit,
  { tried, busy, mayWait }: AdmitOptions,
): Selection | null {
  if (tried.size + busy.size === 0) return select(candidates, credit);
  const isWell = ({ health, open }: Candidate) => health !== "unhealthy" && !open;
  const elsewhere = candidates.map((candidate) => {
    const starts = candidate.free && isWell(candidate) && !busy.has(candidate.target.backend);
    return starts ? candidate : { ...candidate, barred: true };
  });
  // Where nobody is well nobody waits: one may try.
  const wouldWait = candidates.some((candidate) => isWell(candidate) && candidate.barred !== true);
  return select(elsewhere, credit) ?? (!wouldWait || mayWait() ? select(candidates, credit) : null);
}

function notLoaded(
  model: string,
  { backend, reason, retryAfterMs }: { backend: string; reason: string; retryAfterMs: number },
): GatewayError {
  const seconds = Math.ceil(retryAfterMs / 1000);
  return new GatewayError(
    "model_load_failed",
    `model ${quote(model)} could not be loaded on backend ${quote(backend)}, and is tried again in ${seconds} s`,
    { retryAfterMs, detail: reason },
  );
}

/** The same ticket, to start in time for the first token that its client still has a use for. */
function timely(exchange: Exchange, plane: Plane, ticket: Ticket, backend: string): Ticket {
  const { sloMs } = exchange.wishes;
  if (sloMs === null) return ticket;
  const startMs = Math.max(0, sloMs - plane.fleet.measuredBeginMs(backend, ticket));
  const deadlineAt = Math.min(ticket.deadlineAt, exchange.receivedAt + startMs);
  return { ...ticket, deadlineAt };
}

function refusal(
  decided: Omit<Extract<Admission, { type: "refused" }>, "type">,
  model: string,
  exchange: Exchange,
): GatewayError {
  const name = quote(model);
  const { sloMs } = exchange.wishes;
  const limit =
    sloMs === null
      ? `within ${patienceOf(exchange)} ms (queue.maxWaitMs, or the client's own time-out)`
      : `in time for a first token after ${sloMs} ms (x-slo-ttft-ms)`;
  const messages = {
    full: `the queue for model ${name} is full (queue.maxLength)`,
    late: `model ${name} is busy: the request would not start ${limit}`,
    expired: `no slot for model ${name} came free ${limit}`,
    load_failed: `model ${name} could not be loaded`,
  };
  const message = messages[decided.cause];
  return new GatewayError("rate_limit_exceeded", message, { retryAfterMs: decided.retryAfterMs });
}

function reasons(exchange: Exchange, model: Model): string {
  const ids = new Set(model.targets.map((target) => target.backend));
  return exchange.snapshot.backends
    .filter(({ id }) => ids.has(id))
    .map(({ id, drained, health, reason }) => {
      if (drained) return `${id} is drained by hand`;
      return `${id} is ${health}${reason === "" ? "" : ` (${reason})`}`;
    })
    .join(", ");
}

/** How long a request may wait for a slot, milliseconds. */
function patienceOf(exchange: Exchange): number {
  return Math.min(exchange.config.queue.maxWaitMs, exchange.wishes.timeoutMs ?? Infinity);
}

/** When waiting has become pointless, on the clock of the plane. */
export function deadlineOf(exchange: Exchange): number {
  return exchange.deadlineAt ?? exchange.receivedAt + patienceOf(exchange);
}

/** Why a request has to give up whose flight still has no slot; null where it has one. */
export function lateness(exchange: Exchange, flight: Exchange): GatewayError | null {
  const waiting = waitingOf(flight);
  if (waiting === null) return null;
  const retryAfterMs = Math.max(1, waiting.etaMs);
  const model = flight.degraded?.asked ?? flight.record.model ?? "";
  return refusal({ cause: "expired", retryAfterMs }, model, exchange);
}
