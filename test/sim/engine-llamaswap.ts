import type { Clock } from "./clock.ts";
import { createBatch, type Speed } from "./engine-batch.ts";
import { createWork, type Engine, type Listener, type Request } from "./service.ts";

/** A llama-swap with one model at a time. Times are milliseconds. */
export interface LlamaSwapSetting {
  speed: Speed;
  /** Until a server has started and read its model. */
  loadMs: number;
  /** Until the one before it has ended. */
  unloadMs: number;
  /** `concurrencyLimit`: requests per model at once, those that wait included. */
  limit: number;
}

/** What it says to those beyond the limit, always. */
const RETRY_AFTER_MS = 1000;

interface Call {
  request: Request;
  listener: Listener;
  left: boolean;
  leave: (() => void) | null;
}

/**
 * llama-swap's scheduler (`internal/router/scheduler/fifo.go`): whoever asks for the running model is
 * served. A swap waits until nothing runs there any more, however long newcomers keep it busy; those who
 * want the same model join it, and swaps begin in the order in which they were first asked for.
 */
export function createLlamaSwap(clock: Clock, setting: LlamaSwapSetting): Engine {
  const work = createWork();
  const atOnce = new Map<string, number>();
  /** By model, the one that was asked for first being the first. */
  const swaps = new Map<string, Call[]>();
  let current: { model: string; batch: Engine; running: number } | null = null;
  let isSwapping = false;

  function enter(call: Call) {
    const server = current as NonNullable<typeof current>;
    server.running++;
    call.leave = server.batch.ask(call.request, {
      ...call.listener,
      released(tokens) {
        server.running--;
        depart(call, tokens);
        swap();
      },
    });
  }

  function depart({ request, listener }: Call, tokens: number) {
    atOnce.set(request.model, (atOnce.get(request.model) ?? 1) - 1);
    listener.released?.(tokens);
  }

  function swap() {
    const [next] = swaps.keys();
    if (next === undefined || isSwapping || (current !== null && current.running > 0)) return;
    isSwapping = true;
    const unloadMs = current === null ? 0 : setting.unloadMs;
    current = null;
    work.loads.push(next);
    clock.at(clock.now() + unloadMs + setting.loadMs, () => {
      isSwapping = false;
      current = { model: next, batch: createBatch(clock, setting.speed, work), running: 0 };
      const joined = swaps.get(next) ?? [];
      swaps.delete(next);
      for (const call of joined) if (!call.left) enter(call);
      swap();
    });
  }

  function leave(call: Call) {
    if (call.left) return;
    call.left = true;
    if (call.leave !== null) return call.leave();
    depart(call, 0);
    // A swap nobody waits for any more is not begun; one under way goes on.
    const { model } = call.request;
    const isWanted = swaps.get(model)?.some(({ left }) => !left) ?? false;
    if (!isWanted && !isSwapping) swaps.delete(model);
  }

  return {
    work,
    loaded: () => (current === null ? [] : [current.model]),
    load: null,
    unload: null,
    ask(request, listener) {
      const { model } = request;
      const others = atOnce.get(model) ?? 0;
      if (others >= setting.limit) {
        listener.ended({ type: "refused", retryAfterMs: RETRY_AFTER_MS });
        listener.released?.(0);
        return () => {};
      }
      atOnce.set(model, others + 1);
      const call: Call = { request, listener, left: false, leave: null };
      if (current?.model === model) enter(call);
      else {
        swaps.set(model, [...(swaps.get(model) ?? []), call]);
        swap();
      }
      return () => leave(call);
    },
  };
}
