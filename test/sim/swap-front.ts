import type { Clock } from "./clock.ts";
import type { Engine, Listener, Request, Service } from "./service.ts";

/** What an order of service looks at. Times are milliseconds. */
export interface SwapView {
  now: number;
  /** Models in memory, and since when the last one is. */
  resident: ReadonlySet<string>;
  /** Of these the ones with a free slot. */
  free: ReadonlySet<string>;
  since: number;
  /** Of each model for which somebody waits, since when the oldest does. In the order of these times. */
  waiting: ReadonlyMap<string, number>;
}

/** The model whose oldest request is next; null: nobody's. */
export type SwapOrder = (view: SwapView) => string | null;

function firstOf(waiting: ReadonlyMap<string, number>, among?: ReadonlySet<string>): string | null {
  for (const model of waiting.keys()) if (among?.has(model) ?? true) return model;
  return null;
}

/** Strictly as they came, whatever is loaded. */
export const inOrderOfArrival: SwapOrder = ({ waiting }) => firstOf(waiting);

/** What is loaded as long as anybody wants it, else the oldest: no bound on anybody's wait. */
export const grouped: SwapOrder = ({ waiting, resident, free }) => {
  const isLoadedWanted = [...waiting.keys()].some((model) => resident.has(model));
  return isLoadedWanted ? firstOf(waiting, free) : firstOf(waiting);
};

interface Waiting {
  request: Request;
  listener: Listener;
  at: number;
  /** Of several who came at the same time the first has the lowest. */
  order: number;
  leave: (() => void) | null;
}

export interface FrontSetting {
  order: SwapOrder;
  /** Per model. */
  slots: number;
  /** Models that fit into memory. */
  fits: number;
}

/**
 * A gateway with another scheduler than ours, in front of an engine that it tells what to load: slots per
 * model, one queue, and an order. Where a model is next that does not fit, everything drains, then it is
 * loaded.
 *
 * @throws Error when the engine cannot be told to load.
 */
export function createFront(clock: Clock, engine: Engine, setting: FrontSetting): Service {
  if (engine.load === null) throw new Error("this engine cannot be told to load");
  const load = engine.load;
  const queues = new Map<string, Waiting[]>();
  const running = new Map<string, number>();
  let since = 0;
  let asked = 0;
  let isLoading = false;

  const runningOf = (model: string) => running.get(model) ?? 0;

  function serve() {
    while (!isLoading) {
      const resident = new Set(engine.loaded());
      const heads = [...queues.values()].flatMap(([oldest]) => oldest ?? []);
      heads.sort((one, other) => one.order - other.order);
      const waiting = new Map(heads.map(({ request, at }) => [request.model, at]));
      const free = new Set([...resident].filter((each) => runningOf(each) < setting.slots));
      const model = setting.order({ now: clock.now(), resident, free, since, waiting });
      if (model === null) return;
      if (resident.has(model)) {
        if (!free.has(model)) return;
        start(queues.get(model)?.shift() as Waiting);
      } else {
        const isBusy = [...resident].some((each) => runningOf(each) > 0);
        if (resident.size >= setting.fits && isBusy) return;
        change(model);
      }
    }
  }

  function change(model: string) {
    isLoading = true;
    load(model, () => {
      isLoading = false;
      since = clock.now();
      serve();
    });
  }

  function start(each: Waiting) {
    const { request, listener } = each;
    running.set(request.model, runningOf(request.model) + 1);
    each.leave = engine.ask(request, {
      ...listener,
      released(tokens) {
        running.set(request.model, runningOf(request.model) - 1);
        listener.released?.(tokens);
        serve();
      },
    });
  }

  function leave(each: Waiting) {
    if (each.leave !== null) return each.leave();
    const queue = queues.get(each.request.model) ?? [];
    const place = queue.indexOf(each);
    if (place !== -1) queue.splice(place, 1);
    serve();
  }

  return {
    ask(request, listener) {
      const each: Waiting = { request, listener, at: clock.now(), order: asked++, leave: null };
      const queue = queues.get(request.model) ?? [];
      queue.push(each);
      queues.set(request.model, queue);
      serve();
      return () => leave(each);
    },
  };
}
