import type { Clock } from "./clock.ts";
import type { Answer, Request, Service } from "./service.ts";

/** A request, and when it is asked, milliseconds since the beginning. */
export interface Wish {
  at: number;
  request: Request;
}

/** Somebody who asks once, or again and again. */
export interface Client {
  first: Wish;
  /** What it asks next, once that has ended at `trace.endedAt`; null: nothing. */
  next?(trace: Trace): Wish | null;
}

/** What became of one request. Times are milliseconds since the beginning, null: it did not happen. */
export interface Trace {
  request: Request;
  askedAt: number;
  /** It had a slot of an engine. */
  startedAt: number | null;
  firstTokenAt: number | null;
  endedAt: number | null;
  /** `unserved`: it still waited or ran when the run was over. */
  ending: "served" | "refused" | "left" | "unserved";
  /** With a refusal. */
  retryAfterMs: number | null;
  /** Of its answer. */
  tokens: number;
}

/** Lets clients ask a service until all have what they want, or until then. */
export function runWorld(
  clock: Clock,
  service: Service,
  clients: readonly Client[],
  untilMs: number,
): Trace[] {
  const traces: Trace[] = [];
  let left = 0;

  function ask(client: Client, wish: Wish) {
    left++;
    clock.at(wish.at, () => send(client, wish.request));
  }

  function send(client: Client, request: Request) {
    const trace: Trace = {
      request,
      askedAt: clock.now(),
      startedAt: null,
      firstTokenAt: null,
      endedAt: null,
      ending: "unserved",
      retryAfterMs: null,
      tokens: 0,
    };
    traces.push(trace);
    let forgetPatience = () => {};
    const end = (ending: Trace["ending"], answer?: Answer) => {
      if (trace.endedAt !== null) return;
      forgetPatience();
      trace.endedAt = clock.now();
      trace.ending = ending;
      if (answer?.type === "served") trace.tokens = answer.tokens;
      if (answer?.type === "refused") trace.retryAfterMs = answer.retryAfterMs;
      left--;
      const wish = client.next?.(trace) ?? null;
      if (wish !== null) ask(client, wish);
    };
    const leave = service.ask(request, {
      started: () => (trace.startedAt ??= clock.now()),
      firstToken: () => (trace.firstTokenAt ??= clock.now()),
      ended: (answer) => end(answer.type, answer),
    });
    if (trace.endedAt !== null || request.patienceMs === Infinity) return;
    forgetPatience = clock.at(trace.askedAt + request.patienceMs, () => {
      end("left");
      leave();
    });
  }

  for (const client of clients) ask(client, client.first);
  clock.run(untilMs, () => left === 0);
  return traces;
}
