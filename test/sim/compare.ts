import { createClock } from "./clock.ts";
import { policiesFor, type Policy } from "./machine.ts";
import type { GatewaySetting } from "./gateway.ts";
import { measure, type Measured } from "./measure.ts";
import type { Scenario } from "./scenarios.ts";
import { runWorld, type Trace } from "./world.ts";

/** One scenario under one policy, from its beginning to its end. */
export function play(
  scenario: Scenario,
  seed: number,
  policy: Policy,
  gateway: Partial<GatewaySetting> = {},
): { measured: Measured; traces: Trace[] } {
  const clock = createClock();
  const setup = policy(clock, scenario.machine, gateway);
  const from = clock.now();
  const clients = scenario.clients(seed);
  const traces = runWorld(clock, setup.service, clients, from + scenario.untilMs);
  return { measured: measure(traces, setup, scenario.groupBy), traces };
}

/** One scenario under every policy for its machine, the same requests for each. */
export function compare(scenario: Scenario, seed: number): Record<string, Measured> {
  const policies = Object.entries(policiesFor(scenario.machine));
  return Object.fromEntries(
    policies.map(([name, policy]) => [name, play(scenario, seed, policy).measured]),
  );
}
