import type { Engine, Service } from "./service.ts";

/** One engine after the other. */
export function createRoundRobin(engines: readonly Engine[]): Service {
  let turn = 0;
  return {
    ask: (request, listener) => (engines[turn++ % engines.length] as Engine).ask(request, listener),
  };
}

/** The engine with the fewest requests; of equals the first. */
export function createLeastBusy(engines: readonly Engine[]): Service {
  const running = engines.map(() => 0);
  return {
    ask(request, listener) {
      const chosen = running.indexOf(Math.min(...running));
      running[chosen] = (running[chosen] ?? 0) + 1;
      return (engines[chosen] as Engine).ask(request, {
        ...listener,
        released(tokens) {
          running[chosen] = (running[chosen] ?? 1) - 1;
          listener.released?.(tokens);
        },
      });
    },
  };
}
