// What a team asks of its engine in a day, seeded: the same requests in the same order for everybody.
// The shares and their reasons are in bench/README.md.
import type { ChatRequest, EmbeddingRequest } from "./day-engine.ts";
import { CONTEXT_TOKENS } from "./day-engine.ts";
import { createRandom } from "../test/support/random.ts";

export type Wish =
  | { kind: "chat"; body: ChatRequest; leavesAfter: number | null }
  | { kind: "embed"; body: EmbeddingRequest };

/** Requests one after the other, so many of them at once. */
export interface Job {
  name: string;
  atOnce: number;
  wishes: Wish[];
}

/** Jobs that run at the same time; the next hour begins when they are done. */
export type Hour = Job[];

const HOURS = 12;
const SUITE = { prompts: 40, tokens: 600, changed: 0.1, jobs: 2 };
const INDEX = { chunks: 600, tokens: 400, changed: 0.3, batch: 20, everyHours: 3 };
const CHATS = { perHour: 20, leaving: 0.2 };
const ONCE_PER_HOUR = 10;
/** One in eighty of the chats. */
const ENDLESS_EVERY_HOURS = 4;

export function aDay(seed: number): Hour[] {
  const random = createRandom(seed);
  const between = (least: number, most: number): number =>
    least + Math.floor(random() * (most - least + 1));
  let serial = 0;
  /** A text of so many tokens that no other is like. */
  const text = (about: string, tokens: number): string => {
    serial += 1;
    return `${about} `.repeat(tokens).slice(0, tokens * 4 - 8) + String(serial).padStart(8, "0");
  };
  const chat = (name: string, content: string, length: number, more: object): ChatRequest => ({
    model: "chat",
    messages: [{ role: "user", content }],
    metadata: { class: name, length: String(length) },
    ...more,
  });
  const suite = Array.from({ length: SUITE.prompts }, () => ({
    content: text("check this change", SUITE.tokens),
    length: between(60, 220),
  }));
  const chunks = Array.from({ length: INDEX.chunks }, () => text("a document", INDEX.tokens));

  function shuffled<Item>(items: readonly Item[]): Item[] {
    return items
      .map((item) => ({ item, place: random() }))
      .toSorted((one, other) => one.place - other.place)
      .map(({ item }) => item);
  }

  /** Each in an order of its own: jobs in step would share more than they do. */
  function tests(): Job[] {
    const wishes = suite.map(({ content, length }): Wish => {
      const body = chat("tests", content, length, { temperature: 0, seed: 1 });
      return { kind: "chat", body, leavesAfter: null };
    });
    return Array.from({ length: SUITE.jobs }, () => {
      return { name: "tests", atOnce: 4, wishes: shuffled(wishes) };
    });
  }

  function index(): Job {
    const wishes: Wish[] = [];
    for (let at = 0; at < chunks.length; at += INDEX.batch) {
      const input = chunks.slice(at, at + INDEX.batch);
      wishes.push({ kind: "embed", body: { model: "embed", input } });
    }
    return { name: "index", atOnce: 2, wishes };
  }

  function chats(): Job {
    const wishes = Array.from({ length: CHATS.perHour }, (): Wish => {
      const length = between(80, 500);
      const leaves = random() < CHATS.leaving;
      const content = text("and then", between(200, 2000));
      const body = chat(leaves ? "chat, left" : "chat", content, length, {
        temperature: 0.7,
        stream: true,
      });
      return { kind: "chat", body, leavesAfter: leaves ? between(10, length / 2) : null };
    });
    return { name: "chat", atOnce: 6, wishes };
  }

  function once(): Job {
    const wishes = Array.from({ length: ONCE_PER_HOUR }, (): Wish => {
      const content = text("only today", between(200, 1200));
      const body = chat("once", content, between(60, 300), { temperature: 0 });
      return { kind: "chat", body, leavesAfter: null };
    });
    return { name: "once", atOnce: 2, wishes };
  }

  function endless(): Job {
    const body = chat("endless", text("go on", 500), CONTEXT_TOKENS, {
      temperature: 0.7,
      stream: true,
    });
    return { name: "endless", atOnce: 1, wishes: [{ kind: "chat", body, leavesAfter: null }] };
  }

  return Array.from({ length: HOURS }, (_, hour): Hour => {
    if (hour > 0) {
      for (const prompt of suite) {
        if (random() >= SUITE.changed) continue;
        prompt.content = text("check this change", SUITE.tokens);
        prompt.length = between(60, 220);
      }
    }
    const jobs = [...tests(), chats(), once()];
    if (hour % INDEX.everyHours === 0) {
      for (const at of chunks.keys()) {
        if (hour > 0 && random() < INDEX.changed) chunks[at] = text("a document", INDEX.tokens);
      }
      jobs.push(index());
    }
    if (hour % ENDLESS_EVERY_HOURS === 0) jobs.push(endless());
    return jobs;
  });
}
