/** Engines on the usual ports of this machine, for a configuration that names no backends. */
import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, it, mock } from "node:test";
import { Search } from "../../src/control/search.ts";

const AGAIN_MS = 5000;

/** What answers at one port, by path; null: nobody does, ever. */
type Answer = (path: string) => Response | null;

const owned =
  (owner: string): Answer =>
  (path) =>
    path === "/v1/models"
      ? Response.json({ data: [{ id: "m", owned_by: owner }] })
      : Response.json({ detail: "Not Found" }, { status: 404 });
const ollama: Answer = (path) =>
  path === "/" ? new Response("Ollama is running") : Response.json({}, { status: 404 });
const tidegate: Answer = () => Response.json({ name: "tidegate", version: "1" });
const webPage: Answer = () => new Response("<html>hello</html>");
const silent: Answer = () => null;

/** Lets every promise that can go on go on, without a timer. */
async function settle(): Promise<void> {
  for (let turns = 0; turns < 200; turns++) await Promise.resolve();
}

describe("the search", () => {
  const original = globalThis.fetch;
  /** What listens where, and how often it was asked. */
  const there = new Map<number, Answer>();
  const asked = new Map<number, number>();
  let search: Search | null = null;
  let found = 0;

  beforeEach(() => {
    found = 0;
    there.clear();
    asked.clear();
    mock.timers.enable({ apis: ["setTimeout"] });
    globalThis.fetch = ((text: string, init: RequestInit) => {
      const url = new URL(text);
      const port = Number(url.port);
      asked.set(port, (asked.get(port) ?? 0) + 1);
      const answer = there.get(port);
      if (answer === undefined) return Promise.reject(new TypeError("connection refused"));
      const response = answer(url.pathname);
      if (response !== null) return Promise.resolve(response);
      return new Promise((_, reject) => {
        init.signal?.addEventListener("abort", () => reject(init.signal?.reason as Error));
      });
    }) as typeof fetch;
  });
  afterEach(() => {
    search?.stop();
    globalThis.fetch = original;
    mock.timers.reset();
  });

  /** As if these were the usual ports. */
  function searching(): Search {
    search = new Search(
      () => void found++,
      [
        ["ollama", 1],
        ["vllm", 2],
        ["llama.cpp", 3],
      ],
    );
    return search;
  }

  /** Lets the next search begin and end. */
  async function again(): Promise<void> {
    mock.timers.tick(AGAIN_MS);
    await settle();
  }

  it("makes a backend of each engine it finds, by what it is and not by where it is", async () => {
    there.set(1, owned("vllm"));
    there.set(3, ollama);
    const made = searching();
    await made.start(4000);
    const defaults = { weight: 1, healthInterval: 5000, timeout: 3000, allowCloud: false };
    assert.deepEqual(made.backends(), [
      { ...defaults, id: "vllm", kind: "vllm", url: "http://127.0.0.1:1" },
      { ...defaults, id: "ollama", kind: "ollama", url: "http://127.0.0.1:3" },
    ]);
    assert.equal(found, 0, "whoever starts it asks for what there is");
  });

  it("reports every place, with the reason why nothing there is served", async () => {
    there.set(1, webPage);
    there.set(2, tidegate);
    const made = searching();
    await made.start(4000);
    assert.deepEqual(
      made.places.map(({ name, kind, reason, answered }) => [name, kind, reason, answered]),
      [
        ["ollama", null, "answers, but is no inference engine", true],
        ["vllm", null, "is a Tidegate gateway itself", true],
        ["llama.cpp", null, "connection refused", false],
      ],
    );
  });

  it("falls back on the demo engine, and only where there is nothing else", async () => {
    const made = searching();
    await made.start(4000);
    assert.deepEqual(
      made.backends().map(({ id, kind }) => [id, kind]),
      [["demo", "demo"]],
    );
  });

  it("is done in half a second, whoever is silent", async () => {
    there.set(1, silent);
    there.set(2, ollama);
    const made = searching();
    const start = made.start(4000);
    await settle();
    mock.timers.tick(500);
    await start;
    assert.deepEqual(
      made.places.map(({ reason }) => reason),
      ["no answer within 500 ms", "", "connection refused"],
    );
    assert.equal(made.backends().length, 1);
  });

  it("leaves the gateway's own port out", async () => {
    there.set(2, ollama);
    const made = searching();
    await made.start(2);
    assert.equal(made.places.length, 2);
    assert.deepEqual([asked.get(2), made.backends()[0]?.id], [undefined, "demo"]);
  });

  it("numbers engines of one kind, and keeps each id to its place", async () => {
    there.set(2, ollama);
    const made = searching();
    await made.start(4000);
    const ids = () => made.backends().map(({ id, url }) => [id, Number(new URL(url ?? "").port)]);
    assert.deepEqual(ids(), [["ollama", 2]]);
    there.set(1, ollama);
    there.set(3, owned("vllm"));
    await again();
    const expected = [
      ["ollama-2", 1],
      ["ollama", 2],
      ["vllm", 3],
    ];
    assert.deepEqual(ids(), expected);
    await made.start(4000);
    assert.deepEqual(ids(), expected, "also after another configuration");
  });

  it("goes on looking where nothing answered, and says when an engine has come up", async () => {
    there.set(1, webPage);
    const made = searching();
    await made.start(4000);
    const askedPage = asked.get(1);
    await again();
    assert.equal(found, 0);
    there.set(3, ollama);
    await again();
    assert.deepEqual([found, made.backends()[0]?.id], [1, "ollama"]);
    const askedEngine = asked.get(3);
    await again();
    const known = [1, askedPage, askedEngine];
    assert.deepEqual([found, asked.get(1), asked.get(3)], known, "nobody asks them again");
  });

  it("keeps an engine that has gone away: whoever probes it will say so", async () => {
    there.set(1, ollama);
    const made = searching();
    await made.start(4000);
    there.delete(1);
    await again();
    await made.start(4000);
    assert.deepEqual([made.backends()[0]?.id, found], ["ollama", 0]);
  });

  it("looks again at what is no engine when it is started again", async () => {
    there.set(1, webPage);
    const made = searching();
    await made.start(4000);
    there.delete(1);
    there.set(1, ollama);
    await made.start(4000);
    assert.equal(made.backends()[0]?.id, "ollama");
  });

  it("stops: knows no places, asks nobody, finds nothing, though a look is under way", async () => {
    const made = searching();
    await made.start(4000);
    there.set(1, ollama);
    mock.timers.tick(AGAIN_MS);
    made.stop();
    await settle();
    assert.deepEqual([made.places, found], [[], 0]);
    const before = asked.get(1);
    await again();
    await again();
    assert.equal(asked.get(1), before);
  });

  it("goes on at one pace, though it was started again while a look was under way", async () => {
    const made = searching();
    await made.start(4000);
    mock.timers.tick(AGAIN_MS);
    await made.start(4000);
    await settle();
    there.set(1, tidegate);
    asked.clear();
    await again();
    assert.equal(asked.get(1), 1);
  });
});
