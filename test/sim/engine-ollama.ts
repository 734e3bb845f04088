import type { Clock } from "./clock.ts";
import { createBatch, type Speed } from "./engine-batch.ts";
import { createWork, type Engine, type Listener, type Request } from "./service.ts";

/** An Ollama and the machine it has. Times are milliseconds. */
export interface OllamaSetting {
  /** A runner's; its slots are `OLLAMA_NUM_PARALLEL`. */
  speed: Speed;
  /** `OLLAMA_MAX_LOADED_MODELS`. */
  maxLoaded: number;
  /** Memory in any unit, and what each model takes of it; absent: there is enough for `maxLoaded`. */
  memory?: { total: number; sizes: Readonly<Record<string, number>> };
  loadMs: number;
  /** Until a runner has ended and its memory can be used. */
  unloadMs: number;
  /** `OLLAMA_MAX_QUEUE`. */
  maxQueue: number;
}

/** A model stays so long after its last use: `OLLAMA_KEEP_ALIVE`. */
const KEEP_ALIVE_MS = 300_000;
/** What the gateway asks for with its own loads. */
const LOADED_KEEP_ALIVE_MS = 1_800_000;
/** From taking a request out of the queue until its load shows to others. */
const DECISION_MS = 5;

interface Call {
  request: Request;
  listener: Listener;
  /** It only has a model loaded; null for a client's. */
  keepAliveMs: number | null;
  left: boolean;
  /** Leaves the runner. */
  leave: (() => void) | null;
}

interface Runner {
  model: string;
  batch: Engine;
  isReady: boolean;
  /** Requests that use it, those that wait for its load included. */
  refs: number;
  keepAliveMs: number;
  usedAt: number;
  /** Came while it was loading. */
  joined: Call[];
  forgetLoad: () => void;
}

/**
 * Ollama's own scheduler (`server/sched.go`): whoever asks for a loaded model passes the queue. All
 * others are in one queue whose head alone is looked at; nobody behind it is, until its model is being
 * loaded. What goes for it is the model with the shortest keep_alive, then the first by name, once
 * nobody uses it any more; until then requests for it go on passing the queue. Who caused a load ends
 * it by leaving.
 */
export function createOllama(clock: Clock, setting: OllamaSetting): Engine {
  const work = createWork();
  const runners = new Map<string, Runner>();
  const pending: Call[] = [];
  /** The head of the queue, which is being worked on. */
  let head: Call | null = null;
  /** What it waits for: this runner to be ready, or to be used by nobody. */
  let waitsFor: Runner | null = null;
  /** A runner is on its way out. */
  let isUnloading = false;

  function send(call: Call) {
    const runner = runners.get(call.request.model);
    if (runner !== undefined) use(runner, call);
    else if (pending.length >= setting.maxQueue) refuse(call);
    else {
      pending.push(call);
      clock.at(clock.now() + DECISION_MS, takeHead);
    }
  }

  function refuse({ listener }: Call) {
    listener.ended({ type: "refused", retryAfterMs: null });
    listener.released?.(0);
  }

  function use(runner: Runner, call: Call) {
    runner.refs++;
    if (call.keepAliveMs !== null) runner.keepAliveMs = call.keepAliveMs;
    if (!runner.isReady) runner.joined.push(call);
    else enter(runner, call);
  }

  function enter(runner: Runner, call: Call) {
    call.leave = runner.batch.ask(call.request, {
      ...call.listener,
      released(tokens) {
        call.listener.released?.(tokens);
        release(runner);
      },
    });
  }

  function release(runner: Runner) {
    runner.refs--;
    runner.usedAt = clock.now();
    if (runner.refs > 0) return;
    if (waitsFor === runner) return unload(runner, workOnHead);
    clock.at(runner.usedAt + runner.keepAliveMs, () => {
      const isIdle = runner.refs === 0 && runner.usedAt + runner.keepAliveMs <= clock.now();
      if (runners.get(runner.model) === runner && isIdle) unload(runner, () => {});
    });
  }

  function unload(runner: Runner, done: () => void) {
    runners.delete(runner.model);
    waitsFor = null;
    isUnloading = true;
    clock.at(clock.now() + setting.unloadMs, () => {
      isUnloading = false;
      done();
      workOnHead();
    });
  }

  function takeHead() {
    if (head !== null) return;
    head = pending.shift() ?? null;
    if (head !== null) workOnHead();
  }

  function nextHead() {
    head = null;
    clock.at(clock.now() + DECISION_MS, takeHead);
  }

  function workOnHead() {
    if (head === null || waitsFor !== null || isUnloading) return;
    const { left, request } = head;
    if (left) return nextHead();
    const runner = runners.get(request.model);
    if (runner !== undefined) {
      use(runner, head);
      return nextHead();
    }
    if (fits(request.model)) {
      load(head);
      return nextHead();
    }
    const victim = findVictim();
    if (victim.isReady && victim.refs === 0) return unload(victim, workOnHead);
    waitsFor = victim;
  }

  function fits(model: string): boolean {
    if (runners.size >= setting.maxLoaded) return false;
    const { memory } = setting;
    if (memory === undefined || runners.size === 0) return true;
    const names = [...runners.keys(), model];
    return names.reduce((sum, each) => sum + (memory.sizes[each] ?? 0), 0) <= memory.total;
  }

  function findVictim(): Runner {
    const inOrder = [...runners.values()].toSorted(
      (a, b) => a.keepAliveMs - b.keepAliveMs || (a.model < b.model ? -1 : 1),
    );
    // It asks one after the other, and waits with each until its load is over.
    const found = inOrder.find(({ isReady, refs }) => !isReady || refs === 0);
    return found ?? (inOrder[0] as Runner);
  }

  function load(call: Call) {
    const { model } = call.request;
    const runner: Runner = {
      model,
      batch: createBatch(clock, setting.speed, work),
      isReady: false,
      refs: 0,
      keepAliveMs: KEEP_ALIVE_MS,
      usedAt: clock.now(),
      joined: [],
      forgetLoad: () => {},
    };
    work.loads.push(model);
    runners.set(model, runner);
    use(runner, call);
    runner.forgetLoad = clock.at(clock.now() + setting.loadMs, () => {
      runner.isReady = true;
      const joined = runner.joined.splice(0);
      for (const each of joined) {
        if (each.left) release(runner);
        else enter(runner, each);
      }
      // Whoever waited for this load to end looks again.
      if (waitsFor !== runner) return;
      waitsFor = null;
      workOnHead();
    });
    call.leave = () => {
      call.listener.released?.(0);
      abort(runner);
    };
  }

  /** The others who wait for the same model start again. */
  function abort(runner: Runner) {
    runner.forgetLoad();
    unload(runner, () => {});
    for (const each of runner.joined) if (!each.left) send(each);
  }

  function leave(call: Call) {
    if (call.left) return;
    call.left = true;
    const place = pending.indexOf(call);
    if (place !== -1) pending.splice(place, 1);
    if (call.leave !== null) call.leave();
    else call.listener.released?.(0);
  }

  function ask(request: Request, listener: Listener, keepAliveMs: number | null) {
    const call: Call = { request, listener, keepAliveMs, left: false, leave: null };
    send(call);
    return () => leave(call);
  }

  return {
    work,
    loaded: () => [...runners.values()].flatMap(({ isReady, model }) => (isReady ? [model] : [])),
    ask: (request, listener) => ask(request, listener, null),
    load(model, done) {
      const request: Request = {
        model,
        flow: "",
        priority: "default",
        prompt: [],
        answerTokens: 0,
        answerId: null,
        patienceMs: Infinity,
        sameAs: null,
      };
      ask(request, { ended: done }, LOADED_KEEP_ALIVE_MS);
    },
    unload(model, done) {
      const runner = runners.get(model);
      if (runner === undefined) return done();
      if (runner.refs === 0) return unload(runner, done);
      // In use: it is said to be done, and goes when nobody uses it any more.
      runner.keepAliveMs = 0;
      done();
    },
  };
}
