/** A refusal is a promise: whoever comes back when it was told to finds a place. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { createClock } from "./clock.ts";
import { createBatch } from "./engine-batch.ts";
import { createGateway, DEFAULTS, type GatewaySetting } from "./gateway.ts";
import { createRandom } from "../support/random.ts";
import { burst, obedient, requestOf, type Kind } from "./workload.ts";
import { runWorld, type Trace } from "./world.ts";

interface Setting {
  name: string;
  slots: number;
  serviceMs: number;
  gateway: Partial<GatewaySetting>;
}

const SETTINGS: readonly Setting[] = [
  {
    name: "that would wait for longer than queue.maxWaitMs, one slot",
    slots: 1,
    serviceMs: 10_000,
    gateway: {},
  },
  {
    name: "for whom the queue has no place, four slots",
    slots: 4,
    serviceMs: 2000,
    gateway: { maxLength: 8 },
  },
];
const SEEDS = [1, 2, 3];
/** Requests that have gone before, so that it is known how long one takes. */
const BEFORE = 30;
const TOKENS = 100;

/** Each client's asking, first to last. */
function play(
  { slots, serviceMs, gateway }: Setting,
  count: number,
  spread: number,
  seed: number,
): Trace[][] {
  const clock = createClock();
  const tokenMs = serviceMs / TOKENS;
  const speed = { slots, promptMs: 0, tokenMs, slowdown: 0, cacheTokens: 0, noticeMs: 50 };
  const backends = [{ id: "server", engine: createBatch(clock, speed), slots, weight: 1 }];
  const service = createGateway(clock, { ...DEFAULTS, backends, models: ["a"], ...gateway });
  const random = createRandom(seed);
  const kind: Kind = { model: "a", flow: "x", promptTokens: 0, answerTokens: TOKENS, spread };
  const before = Array.from({ length: BEFORE }, (_, at) => {
    return { first: { at: at * 10 * serviceMs, request: requestOf(kind, random) } };
  });
  const at = BEFORE * 10 * serviceMs;
  const clients = burst(random, [kind], count, at).map(obedient);
  const traces = runWorld(clock, service, [...before, ...clients], 86_400_000);
  const byRequest = Map.groupBy(traces, ({ request }) => request);
  return clients.map(({ first }) => byRequest.get(first.request) ?? []);
}

/** Of the slots' time from the burst until the last of it has started, the share in which they were free. */
function idleShare(clients: readonly Trace[][], slots: number): number {
  const served = clients.flatMap((each) => each.filter(({ ending }) => ending === "served"));
  const from = Math.min(...clients.map(([first]) => first?.askedAt ?? Infinity));
  const until = Math.max(...served.map(({ startedAt }) => startedAt ?? 0));
  const busy = served.map(({ startedAt, endedAt }) => {
    return Math.min(until, endedAt ?? until) - (startedAt ?? until);
  });
  return 1 - busy.reduce((sum, each) => sum + each, 0) / (slots * (until - from));
}

interface Kept {
  refused: number;
  /** Of these the ones that were served when they came back for the first time. */
  kept: number;
  idle: number;
  told: string;
}

function run(setting: Setting, count: number, spread: number, seed: number): Kept {
  const clients = play(setting, count, spread, seed);
  const refused = clients.filter(([first]) => first?.ending === "refused");
  const kept = refused.filter(([, second]) => second?.ending === "served").length;
  const idle = idleShare(clients, setting.slots);
  const told = `${refused.length} refused, ${kept} of them once, idle ${idle.toFixed(3)}, seed ${seed}`;
  assert(refused.length > 0, "nobody was refused: this shows nothing");
  assert(
    clients.every((each) => each.at(-1)?.ending === "served"),
    told,
  );
  return { refused: refused.length, kept, idle, told };
}

for (const setting of SETTINGS) {
  describe(`clients ${setting.name}`, () => {
    for (const count of [20, 80, 300]) {
      it(`are served when they were told, of ${count}`, () => {
        for (const seed of SEEDS) {
          const { refused, kept, idle, told } = run(setting, count, 0, seed);
          assert(kept >= 0.9 * refused, told);
          assert(idle <= 0.05, told);
        }
      });

      // How long an answer takes is known to a twentieth then, and what is said of an hour ahead is as wrong:
      // too late leaves slots idle, too early refuses again.
      it(`are served about when they were told where answers differ, of ${count}`, () => {
        for (const seed of SEEDS) {
          const { refused, kept, idle, told } = run(setting, count, 0.3, seed);
          assert(kept >= (count === 20 ? 0.6 : 0.9) * refused, told);
          assert(idle <= 0.12, told);
        }
      });
    }
  });
}
