// What it costs to have a scheduler in front where there is nothing to schedule: a fake Ollama with memory
// for all of its three models, three loops on each, straight and through the gateway.
// `bun run fits [--service MS] [--seconds N] [--rounds N]`. How to read it: docs/performance.md.
import assert from "node:assert/strict";
import { loadavg } from "node:os";
import { parseArgs } from "node:util";
import { median } from "../src/core/pace.ts";
import { chatBody, open, readEvents } from "../test/support/client.ts";
import { startFleet } from "../test/support/fleet.ts";

const { values: flags } = parseArgs({
  options: {
    service: { type: "string", default: "1000" },
    seconds: { type: "string", default: "30" },
    rounds: { type: "string", default: "3" },
  },
});

const MODELS = ["a:1", "b:1", "c:1"];
const LOOPS = 3;
const TOKENS = 20;
const LEAST_THROUGHPUT = 0.98;
const MOST_WAIT = 1.05;

/** When the first token of an answer came, milliseconds; the answer is read to its end. */
async function ask(url: string, model: string): Promise<number> {
  const askedAt = performance.now();
  const response = await open(`${url}/v1/chat/completions`, chatBody({ model, stream: true }));
  assert.equal(response.status, 200);
  let firstAt = Number.NaN;
  let last: string | null = null;
  for await (const { data } of readEvents(response)) {
    if (data === null) continue;
    if (Number.isNaN(firstAt) && data.includes('"content":"word')) firstAt = performance.now();
    last = data;
  }
  assert.equal(last, "[DONE]");
  return firstAt - askedAt;
}

interface Shown {
  /** Answers a second. */
  throughput: number;
  /** To the first token, milliseconds. */
  meanMs: number;
}

async function play(url: string): Promise<Shown> {
  const beganAt = performance.now();
  const endAt = beganAt + Number(flags.seconds) * 1000;
  const waits: number[] = [];
  const loop = async (model: string) => {
    while (performance.now() < endAt) waits.push(await ask(url, model));
  };
  await Promise.all(MODELS.flatMap((model) => Array.from({ length: LOOPS }, () => loop(model))));
  const seconds = (performance.now() - beganAt) / 1000;
  const sum = waits.reduce((total, each) => total + each, 0);
  return { throughput: waits.length / seconds, meanMs: sum / waits.length };
}

const behaviour = { slots: 1, maxLoaded: MODELS.length, loadMs: 50, tokens: TOKENS };
const tokenDelayMs = Number(flags.service) / TOKENS;
const fleet = await startFleet({
  ollama: { kind: "ollama", models: MODELS, behaviour: { ...behaviour, tokenDelayMs } },
});
try {
  const direct = fleet.engines.ollama.url;
  for (const model of MODELS) await ask(fleet.url, model);
  const ratios: { throughput: number; wait: number }[] = [];
  for (let round = 0; round < Number(flags.rounds); round++) {
    const urls = round % 2 === 0 ? [direct, fleet.url] : [fleet.url, direct];
    const shown = new Map<string, Shown>();
    for (const url of urls) shown.set(url, await play(url));
    const [straight, ours] = [shown.get(direct) as Shown, shown.get(fleet.url) as Shown];
    const ratio = {
      throughput: ours.throughput / straight.throughput,
      wait: ours.meanMs / straight.meanMs,
    };
    ratios.push(ratio);
    const told = ({ throughput, meanMs }: Shown) =>
      `${throughput.toFixed(2)} answers a second, first token after ${meanMs.toFixed(0)} ms`;
    console.log(`round ${round + 1}: straight ${told(straight)}; gateway ${told(ours)}`);
  }
  const throughput = median(ratios.map((each) => each.throughput)) ?? 0;
  const wait = median(ratios.map((each) => each.wait)) ?? Infinity;
  const verdict = (isMet: boolean) => (isMet ? "met" : "MISSED");
  console.log(
    `service ${flags.service} ms, load average ${loadavg()[0]?.toFixed(1)}, medians of ${ratios.length} rounds:\n` +
      `- ${verdict(throughput >= LEAST_THROUGHPUT)}: throughput ≥ ${LEAST_THROUGHPUT} × straight (${throughput.toFixed(3)})\n` +
      `- ${verdict(wait <= MOST_WAIT)}: mean wait ≤ ${MOST_WAIT} × straight (${wait.toFixed(3)})`,
  );
} finally {
  await fleet.close();
}
