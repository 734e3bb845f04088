import type { Clock } from "./clock.ts";
import { createBatch, type Speed } from "./engine-batch.ts";
import { createLlamaSwap } from "./engine-llamaswap.ts";
import { createOllama, type OllamaSetting } from "./engine-ollama.ts";
import { createGateway, DEFAULTS, type GatewaySetting } from "./gateway.ts";
import { createLeastBusy, createRoundRobin } from "./routers.ts";
import type { Engine, Service } from "./service.ts";
import { createFront, grouped, inOrderOfArrival, type SwapOrder } from "./swap-front.ts";

/** One box that loads its models as they are wanted. */
export interface Box extends OllamaSetting {
  /** In memory at the beginning. */
  preloaded?: readonly string[];
}

/** One of several servers of the same model. */
export interface Server {
  speed: Speed;
  weight: number;
}

export type Machine =
  | { type: "box"; models: readonly string[]; box: Box }
  | { type: "servers"; models: readonly string[]; servers: readonly Server[] };

/** What clients ask in one run, and the engines behind it. */
export interface Setup {
  service: Service;
  engines: readonly Engine[];
}

/** A way to run a machine. @param gateway what differs from the gateway's defaults. */
export type Policy = (clock: Clock, machine: Machine, gateway?: Partial<GatewaySetting>) => Setup;

function boxOf(machine: Machine): Box {
  if (machine.type !== "box") throw new Error("several servers, and a policy for one box");
  return machine.box;
}

function ollamaOf(clock: Clock, box: Box): Engine {
  const engine = createOllama(clock, box);
  for (const model of box.preloaded ?? []) engine.load?.(model, () => {});
  if (box.preloaded !== undefined) {
    clock.run(box.preloaded.length * (box.loadMs + 1000));
    engine.work.loads.length = 0;
  }
  return engine;
}

/** The engine as it is. */
export const direct: Policy = (clock, machine) => {
  const engine = ollamaOf(clock, boxOf(machine));
  return { service: engine, engines: [engine] };
};

/** llama-swap in Ollama's place, on the same box, with one model at a time. */
const llamaSwap: Policy = (clock, machine) => {
  const { speed, loadMs, unloadMs } = boxOf(machine);
  const engine = createLlamaSwap(clock, { speed, loadMs, unloadMs, limit: 10 });
  return { service: engine, engines: [engine] };
};

/** A gateway in front of Ollama with another order of service than ours. */
export function ordered(order: SwapOrder): Policy {
  return (clock, machine) => {
    const box = boxOf(machine);
    const engine = ollamaOf(clock, box);
    const setting = { order, slots: box.speed.slots, fits: box.maxLoaded };
    return { service: createFront(clock, engine, setting), engines: [engine] };
  };
}

/** The gateway in front of Ollama, or of several servers. */
export const ours: Policy = (clock, machine, gateway = {}) => {
  const backends =
    machine.type === "box"
      ? [
          {
            id: "ollama",
            engine: ollamaOf(clock, machine.box),
            slots: machine.box.speed.slots,
            weight: 1,
          },
        ]
      : machine.servers.map(({ speed, weight }, at) => {
          return {
            id: `server-${at}`,
            engine: createBatch(clock, speed),
            slots: speed.slots,
            weight,
          };
        });
  const { models } = machine;
  const service = createGateway(clock, { ...DEFAULTS, backends, models, ...gateway });
  return { service, engines: backends.map(({ engine }) => engine) };
};

function routed(router: (engines: readonly Engine[]) => Service): Policy {
  return (clock, machine) => {
    if (machine.type !== "servers") throw new Error("one box, and a policy for several servers");
    const engines = machine.servers.map(({ speed }) => createBatch(clock, speed));
    return { service: router(engines), engines };
  };
}

/** What is compared, by the name it has in the table. */
export function policiesFor(machine: Machine): Record<string, Policy> {
  if (machine.type === "servers") {
    return { "round robin": routed(createRoundRobin), "least busy": routed(createLeastBusy), ours };
  }
  return {
    direct,
    "llama-swap": llamaSwap,
    "in order": ordered(inOrderOfArrival),
    grouped: ordered(grouped),
    ours,
  };
}
