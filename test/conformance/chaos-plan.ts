/** What happens in one run of the chaos, all of it drawn from the run's seed before anything begins. */
import { randomOf, type Random } from "../support/client.ts";
import type { Behaviour, Fault } from "../support/engine-behaviour.ts";
import { calm, faults } from "../support/engine-behaviour.ts";

/** The engines; the last one is in the configuration only after some of the reloads. */
export const ENGINES = ["a", "b", "c", "spare"] as const;
export type EngineId = (typeof ENGINES)[number];

/** Milliseconds within which everything begins. */
const LASTS_MS = 260;
const LARGE_BYTES = 1.2 * 1024 * 1024;

/** How a client leaves: behind the first half of its body, some time after its request, or at an answer's first byte. */
export interface Leave {
  after: "half" | "request" | "answer";
  ms: number;
  by: "fin" | "close" | "reset";
}

export interface Ask {
  at: number;
  model: "m" | "n";
  stream: boolean;
  /** Of the prompt; a large body is looked at in several turns of the event loop. */
  bytes: number;
  leave: Leave | null;
}

/** `frozen`: as after kill -STOP. */
export interface Weather {
  at: number;
  engine: EngineId;
  behaviour: Partial<Behaviour> | "frozen";
}

const RELOADS = ["remove", "move", "add", "settings", "invalid"] as const;
export type Reload = (typeof RELOADS)[number];

export interface Plan {
  requests: Ask[];
  weather: Weather[];
  reload: { at: number; how: Reload } | null;
}

function someFault(random: Random): Fault | null {
  const by = random.pick(["reset", "fin", "eof", "silence"] as const);
  if (random.next() < 0.6) return null;
  return random.pick<Fault>([
    { kind: "hang" },
    { kind: "drop", by: "reset" },
    { kind: "cut", afterTokens: random.between(0, 5), by },
    { kind: "cut", afterBytes: random.between(1, 900), by },
    {
      kind: "error",
      afterTokens: random.between(0, 4),
      ends: random.pick(["done", "eof", "reset"]),
    },
    { kind: "endless", finish: random.next() < 0.5 },
    { kind: "unstreamed" },
    faults.ollamaSwallowed(1),
    faults.ollamaBusy,
    faults.busyFor(2),
    faults.loadingModel,
    faults.ollamaLoadFailed,
    faults.htmlGateway(random.pick([200, 502])),
    faults.sglangFlat,
    faults.errorIn200,
  ]);
}

function someBehaviour(random: Random): Weather["behaviour"] {
  if (random.next() < 0.02) return "frozen";
  return {
    ...calm,
    fault: someFault(random),
    probeFault:
      random.next() < 0.1 ? random.pick<Fault>([{ kind: "hang" }, faults.htmlGateway(500)]) : null,
    headersDelayMs: random.pick([0, 0, 5, 30, 120]),
    firstTokenDelayMs: random.pick([0, 0, 10, 90]),
    tokenDelayMs: random.pick([0, 2, 8, 30]),
    tokens: random.between(0, 8),
    chunking: random.pick(["event", "once", 5, 64] as const),
    lineEnd: random.pick(["\n", "\r\n"] as const),
    pings: random.pick(["none", "bare", "comment"] as const),
  };
}

function someLeave(random: Random): Leave {
  const after = random.pick(["half", "request", "request", "answer", "answer"] as const);
  const ms = after === "request" ? random.between(1, 200) : random.between(0, 40);
  return { after, ms, by: random.pick(["fin", "close", "reset"] as const) };
}

export function planOf(seed: number): Plan {
  const random = randomOf(seed);
  const at = (): number => random.between(0, LASTS_MS);
  const requests = Array.from({ length: random.between(5, 9) }, (): Ask => {
    const isLarge = random.next() < 0.06;
    return {
      at: at(),
      model: random.pick(["m", "m", "n"] as const),
      // The first token of so long a prompt may take minutes, whatever `timeouts.firstByteMs` is.
      stream: !isLarge && random.next() < 0.6,
      bytes: isLarge ? LARGE_BYTES : 20,
      leave: random.next() < 0.4 ? someLeave(random) : null,
    };
  });
  const some = (engine: EngineId, when: number): Weather => ({
    at: when,
    engine,
    behaviour: someBehaviour(random),
  });
  return {
    requests,
    weather: [
      ...ENGINES.map((engine) => some(engine, 0)),
      ...Array.from({ length: random.between(4, 12) }, () => some(random.pick(ENGINES), at())),
    ],
    reload: random.next() < 0.25 ? { at: at(), how: random.pick(RELOADS) } : null,
  };
}
