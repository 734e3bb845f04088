/** An engine notices a little later than the gateway that a client has gone. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { createClock } from "./clock.ts";
import { createOllama } from "./engine-ollama.ts";
import { createGateway, DEFAULTS } from "./gateway.ts";
import { createRandom } from "../support/random.ts";
import { SMALL, small } from "./scenarios.ts";
import type { Request } from "./service.ts";
import { regularly, requestOf } from "./workload.ts";
import { runWorld, type Client } from "./world.ts";

function once(at: number, model: string, more: Partial<Request> = {}): Client {
  return { first: { at, request: { ...requestOf(small(model), createRandom(1)), ...more } } };
}

function later({ first }: Client, byMs: number): Client {
  return { first: { at: first.at + byMs, request: first.request } };
}

describe("a client that leaves just before its model is put out", () => {
  it("does not make the gateway believe that what fits together does not", () => {
    const clock = createClock();
    // Beside a there is room for b or for c.
    const memory = { total: 10, sizes: { a: 2, b: 8, c: 8 } };
    const engine = createOllama(clock, { ...SMALL, maxLoaded: 3, memory });
    const backends = [{ id: "ollama", engine, slots: 1, weight: 1 }];
    const gateway = createGateway(clock, { ...DEFAULTS, backends, models: ["a", "b", "c"] });
    // It finds out what fits, each model once in the others' company.
    const learning = ["a", "b", "a", "c", "a", "b", "a", "c", "a"].map((model, at) => {
      return once(at * 5000, model);
    });
    // b is in use and c waits for its memory when b's client leaves. Ollama, which has been told to put b
    // out, still has it in use, and puts out a, which is idle, for c.
    const leaver = once(60_000, "b", { answerTokens: 5000, patienceMs: 30_000 });
    const next = once(61_000, "c");
    const random = createRandom(1);
    const both = [
      ...regularly(random, small("a"), 2000, 600_000),
      ...regularly(random, small("c"), 3000, 600_000),
    ].map((client) => later(client, 95_000));
    runWorld(clock, gateway, [...learning, leaver, next, ...both], 1e9);
    const { loads } = engine.work;
    assert(loads.length <= 12, `${loads.length} loads, and a and c fit together`);
  });
});
