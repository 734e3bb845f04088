import { createHash } from "node:crypto";
import {
  cacheControlOf,
  canonicalFields,
  identityOf,
  isFresh,
  keyText,
  type CacheControl,
} from "../core/cachekey.ts";
import type { Model } from "../core/snapshot.ts";
import { readInputs } from "../core/vectors.ts";
import { ANSWER_FIELDS, EMBEDDING_FIELDS } from "../dialects/answer-fields.ts";
import { embeddings } from "../dialects/openai.ts";
import { GatewayError } from "../errors.ts";
import type { Answer } from "../stores/answers.ts";
import { Embedding } from "./embed.ts";
import type { Exchange } from "./exchange.ts";
import { Flight, type Landed, type Work } from "./flight.ts";
import type { Plane } from "./plane.ts";
import type { Relay } from "./relay.ts";
import { obtain } from "./upstream.ts";

/** What the cache has for a request. */
export type Lookup =
  /** Nothing, and its answer is not kept. */
  | { type: "bypass" }
  | { type: "hit"; answer: Answer }
  /** Nothing, and its answer is to be kept. */
  | { type: "miss"; key: string; control: CacheControl; work: Work };

/** How a whole answer ends, in all dialects; any other end is no answer to give again. */
const ENDS = new Set(
  (
    "stop length tool_calls function_call " +
    "end_turn max_tokens stop_sequence tool_use " +
    "completed incomplete"
  ).split(" "),
);

const STREAM = "text/event-stream";
const LARGEST_BODY = 1024 * 1024;

/**
 * Has this request been answered before, and may its answer be kept? Only where the same request gets
 * the same answer: `temperature: 0`, one choice, and embeddings.
 *
 * @throws GatewayError `not_cached`
 */
export async function look(exchange: Exchange, model: Model, plane: Plane): Promise<Lookup> {
  const { fields, body, endpoint, headers } = exchange;
  const { enabled, streamCacheDisabled, ttlMs } = exchange.config.cache;
  exchange.fields = null;
  const control = cacheControlOf(headers.get("cache-control"));
  const bypass = (reason: string): Lookup => {
    conclude(exchange, plane, "bypass", `;reason=${reason}`);
    if (control.onlyIfCached) throw notCached(`this request is never cached (${reason})`);
    return { type: "bypass" };
  };
  if (!enabled) return bypass("disabled");
  if (control.noStore) return bypass("no-store");
  // What is fetched from elsewhere may be another thing tomorrow.
  const fetches = exchange.view?.wants.some(({ what }) => what === "image_url");
  if (fields === null || body === null || fetches === true) return bypass("field");
  // Keys of large bodies would hold up the streams of others.
  if (body.bytes.length > LARGEST_BODY) return bypass("size");
  const isEmbedding = endpoint === embeddings;
  const rule = isEmbedding ? EMBEDDING_FIELDS : ANSWER_FIELDS.get(endpoint.path);
  const canonical = canonicalFields(rule, fields, body.bytes, !streamCacheDisabled);
  if ("bypass" in canonical) return bypass(canonical.bypass);
  const scope = {
    tenant: exchange.tenant,
    path: exchange.path,
    model: identityOf(model.name, model.targets),
    cap: exchange.outputCap,
    headers: {
      "anthropic-beta": headers.get("anthropic-beta"),
      "anthropic-version": headers.get("anthropic-version"),
    },
  };
  if (isEmbedding) {
    const asked = readInputs(fields);
    if (asked === null) return bypass("field");
    const keyOf = (...inputs: string[]) => digestOf(keyText(scope, canonical.fields, ...inputs));
    const embedding = new Embedding(plane, { ...asked, keyOf, control, model });
    const answer = await embedding.known();
    exchange.check();
    if (answer !== null) return hit(exchange, plane, answer);
    const key = keyOf(asked.encoding, ...asked.inputs);
    return { type: "miss", key, control, work: (worker) => embedding.compute(worker) };
  }
  const key = digestOf(keyText(scope, canonical.fields));
  const known = control.noCache ? null : plane.answers.get(key, Date.now());
  if (known !== null && isFresh(known.storedAt, control, ttlMs, Date.now()))
    return hit(exchange, plane, known);
  const work = (worker: Exchange) => compute(worker, plane, key, control);
  if (!exchange.record.stream) return { type: "miss", key, control, work };
  const shared = await sharedAnswer(plane, key, control);
  exchange.check();
  if (shared !== null) return hit(exchange, plane, shared);
  conclude(exchange, plane, "miss");
  if (control.onlyIfCached) throw notCached();
  return { type: "miss", key, control, work };
}

/** Has its answer made by a flight: that of the others who ask for the same now, or one of its own. */
export async function fly(
  exchange: Exchange,
  plane: Plane,
  { key, control, work }: Extract<Lookup, { type: "miss" }>,
): Promise<Landed> {
  // Who insists on a new answer, or on one that is there already, does not wait for that of others.
  const shares = !control.noCache && !control.onlyIfCached;
  // Nor does a flight for who takes an old answer, a late one, or that of a smaller model serve who does not.
  const { mayDegrade, sloMs } = exchange.wishes;
  const name = `${key} ${control.maxAgeMs} ${mayDegrade} ${sloMs}`;
  const under = shares ? plane.flights.get(name) : undefined;
  const flight = under ?? new Flight(plane, name, exchange);
  if (under === undefined && shares) plane.flights.set(name, flight);
  conclude(exchange, plane, under === undefined ? "miss" : "joined");
  const startedAt = plane.now();
  const waiting = flight.join(exchange);
  if (under === undefined) void flight.start(work);
  else exchange.trace.event("join", { requests: flight.size });
  const landed = await waiting;
  exchange.check();
  if (under !== undefined) exchange.timing.cache = plane.now() - startedAt;
  if (landed.type === "answer" && landed.kept) hit(exchange, plane, landed.answer);
  // Too large to hold: whoever began it gets it as it comes, the others one of their own.
  if (landed.type === "reply" && under === undefined) {
    exchange.record.cache = "bypass;reason=size";
  }
  if (landed.type === "alone") conclude(exchange, plane, "bypass", ";reason=size");
  return landed;
}

/** Keeps what a stream brings, once it has come to a good end. */
export function keepStream(exchange: Exchange, relay: Relay, plane: Plane, key: string): void {
  const parts: Uint8Array[] = [];
  let length = 0;
  relay.onBytes = (bytes) => {
    length += bytes.length;
    if (length <= exchange.config.limits.bufferBytes) parts.push(bytes);
    else parts.length = 0;
  };
  exchange.own(() => {
    const { record, lastAttempt } = exchange;
    const isWhole = record.ending === "completed" && parts.length > 0;
    if (!isWhole || !mayKeep(exchange, lastAttempt)) return;
    const body = Buffer.concat(parts);
    const storedAt = Date.now();
    keep(plane, key, { storedAt, contentType: STREAM, cacheControl: null, body, model: "" });
  });
}

async function compute(
  worker: Exchange,
  plane: Plane,
  key: string,
  control: CacheControl,
): ReturnType<Work> {
  const shared = await sharedAnswer(plane, key, control);
  worker.check();
  if (shared !== null) return { answer: shared, kept: true };
  if (control.onlyIfCached) throw notCached();
  const reply = await obtain(worker, plane);
  if (reply.more) return reply;
  const { contentType, cacheControl, head: body } = reply;
  const answer = { storedAt: Date.now(), contentType, cacheControl, body, model: "" };
  if (mayKeep(worker, worker.attempt)) keep(plane, key, answer);
  return { answer, kept: false };
}

/** What another gateway has kept. */
async function sharedAnswer(
  plane: Plane,
  key: string,
  control: CacheControl,
): Promise<Answer | null> {
  if (control.noCache || plane.sharedAnswers === null) return null;
  const shared = await plane.sharedAnswers.get(key);
  if (shared === null || !isFresh(shared.storedAt, control, plane.config.cache.ttlMs, Date.now()))
    return null;
  plane.answers.set(key, shared, Date.now());
  return shared;
}

function keep(plane: Plane, key: string, answer: Answer) {
  plane.answers.set(key, answer, answer.storedAt);
  plane.sharedAnswers?.set(key, answer, plane.config.cache.ttlMs);
}

/** Never an error, never what was cut or refused in the middle, never what another model answered. */
function mayKeep({ degraded }: Exchange, attempt: Exchange["attempt"]): boolean {
  if (degraded !== null) return false;
  const reasons = attempt?.facts.finishReasons ?? [];
  return reasons.length > 0 && reasons.every((reason) => ENDS.has(reason));
}

function hit(exchange: Exchange, plane: Plane, answer: Answer): Lookup {
  conclude(exchange, plane, "hit");
  const age = Math.max(0, Date.now() - answer.storedAt);
  exchange.headersOut["age"] = String(Math.floor(age / 1000));
  return { type: "hit", answer };
}

function conclude(
  exchange: Exchange,
  plane: Plane,
  result: "hit" | "miss" | "joined" | "bypass",
  why = "",
) {
  exchange.record.cache = result + why;
  exchange.record.cache_hit = result === "hit";
  exchange.timing.cache = plane.now() - exchange.receivedAt - (exchange.timing.accept ?? 0);
}

function digestOf(text: string): string {
  return createHash("sha256").update(text).digest("base64url");
}

function notCached(why = "nobody has asked this before"): GatewayError {
  return new GatewayError(
    "not_cached",
    `only-if-cached: ${why}; leave the Cache-Control header out to have it answered`,
  );
}
