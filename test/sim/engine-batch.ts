import type { Clock } from "./clock.ts";
import { createPrefixCache } from "./prefix-cache.ts";
import {
  createWork,
  sizeOf,
  type Engine,
  type Listener,
  type Request,
  type Work,
} from "./service.ts";

/** How fast one model is on one engine. Times are milliseconds. */
export interface Speed {
  /** Requests at once; more wait inside the engine, first come, first served. */
  slots: number;
  /** Per token of a prompt that is not in the prefix cache. Prompts are read one after the other. */
  promptMs: number;
  /** Per token of an answer while it is the only one. */
  tokenMs: number;
  /** By how much each further answer at once makes all of them slower; 0: not at all. */
  slowdown: number;
  /** Size of the prefix cache, tokens. */
  cacheTokens: number;
  /** Until it notices that a client has gone (measured: 0.02 to 0.08 s, llama.cpp and Ollama). */
  noticeMs: number;
}

interface Stream {
  request: Request;
  listener: Listener;
  /** Answer tokens still to be made. */
  left: number;
  /** What was left when its client went; null while it is there. */
  leftWhenGone: number | null;
  /** Of its prompt's tokens those that need not be read. */
  cached: number;
  over: boolean;
}

/** Fractions of a token that rounding leaves over. */
const NOTHING = 1e-6;

/**
 * An engine that works on several requests at once: vLLM, a llama.cpp server, or the runner that
 * Ollama or llama-swap starts for a model.
 */
export function createBatch(clock: Clock, speed: Speed, work: Work = createWork()): Engine {
  const cache = createPrefixCache(speed.cacheTokens);
  const queue: Stream[] = [];
  const unread: Stream[] = [];
  const decoding = new Set<Stream>();
  let running = 0;
  let isReading = false;
  let settledAt = 0;
  let forgetNext = () => {};

  const msPerToken = () => speed.tokenMs * (1 + speed.slowdown * (decoding.size - 1));

  /** What has been made since the number of answers at once last changed. */
  function settle() {
    const made = (clock.now() - settledAt) / msPerToken();
    for (const stream of decoding) stream.left -= made;
    settledAt = clock.now();
  }

  function plan() {
    forgetNext();
    if (decoding.size === 0) return;
    const least = Math.min(...[...decoding].map(({ left }) => left));
    forgetNext = clock.at(clock.now() + Math.max(0, least) * msPerToken(), () => {
      settle();
      const done = [...decoding].filter(({ left }) => left <= NOTHING);
      for (const stream of done) finish(stream);
      plan();
    });
  }

  function start() {
    while (running < speed.slots && queue.length > 0) {
      const stream = queue.shift() as Stream;
      running++;
      stream.listener.started?.();
      unread.push(stream);
    }
    read();
  }

  function read() {
    const stream = isReading ? undefined : unread.shift();
    if (stream === undefined) return;
    const { prompt, sameAs } = stream.request;
    const tokens = sizeOf(prompt);
    const cached = cache.match(prompt);
    work.promptTokens += tokens;
    work.cachedTokens += cached;
    stream.cached = cached;
    if (sameAs !== null) work.computed.set(sameAs, (work.computed.get(sameAs) ?? 0) + 1);
    isReading = true;
    clock.at(clock.now() + (tokens - cached) * speed.promptMs, () => {
      isReading = false;
      cache.store(prompt);
      decode(stream);
      read();
    });
  }

  function decode(stream: Stream) {
    if (stream.over) return;
    // Reading a prompt to its end gives the first token.
    if (stream.leftWhenGone === null) stream.listener.firstToken?.(stream.cached);
    settle();
    decoding.add(stream);
    if (stream.left <= NOTHING) finish(stream);
    plan();
  }

  /** Its slot comes free: it has its answer, or its client has gone. */
  function finish(stream: Stream) {
    const { request, listener, leftWhenGone } = stream;
    const { prompt, answerId, answerTokens } = request;
    const left = Math.max(0, stream.left);
    const made = answerTokens - left;
    stream.over = true;
    decoding.delete(stream);
    running--;
    work.answerTokens += made;
    if (answerId !== null) cache.store([...prompt, { id: answerId, tokens: made }]);
    if (leftWhenGone === null) listener.ended({ type: "served", tokens: made });
    else work.wastedTokens += leftWhenGone - left;
    listener.released?.(made);
    start();
  }

  function leave(stream: Stream) {
    if (stream.over || stream.leftWhenGone !== null) return;
    const place = queue.indexOf(stream);
    if (place !== -1) {
      queue.splice(place, 1);
      stream.over = true;
      stream.listener.released?.(0);
      return;
    }
    settle();
    stream.leftWhenGone = Math.max(0, stream.left);
    clock.at(clock.now() + speed.noticeMs, () => {
      if (stream.over) return;
      settle();
      const waits = unread.indexOf(stream);
      if (waits !== -1) unread.splice(waits, 1);
      finish(stream);
      plan();
    });
  }

  return {
    work,
    loaded: () => [],
    load: null,
    unload: null,
    ask(request, listener) {
      const left = request.answerTokens;
      const stream: Stream = {
        request,
        listener,
        left,
        leftWhenGone: null,
        cached: 0,
        over: false,
      };
      queue.push(stream);
      start();
      return () => leave(stream);
    },
  };
}
