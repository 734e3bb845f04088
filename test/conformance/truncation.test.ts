/** A stream is never passed off as complete when it was not (design §1.2, §3 Relay; wire §1.7). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer } from "../support/client.ts";
import { chatBody, openaiChat, parseSse, seeded, send, until } from "../support/client.ts";
import { effort } from "../support/effort.ts";
import type { Behaviour, Fault } from "../support/engine-behaviour.ts";
import { faults } from "../support/engine-behaviour.ts";
import type { Fleet } from "../support/fleet.ts";
import { checkEnvelope, startFleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
/** Every byte, or one in so many of them, by the seed. */
const STRIDE = 3 / effort(3);
const random = seeded("truncation");
const USAGE = { stream_options: { include_usage: true } };

/** The paths that stream, with a body each and what ends their streams. */
const endpoints: Record<string, { body: Record<string, unknown>; end: RegExp }> = {
  "/v1/chat/completions": { body: chatBody({ stream: true, ...USAGE }), end: /data: \[DONE\]/ },
  "/v1/completions": {
    body: { model: "test-model", prompt: "x", stream: true, ...USAGE },
    end: /data: \[DONE\]/,
  },
  "/v1/messages": { body: chatBody({ stream: true, max_tokens: 99 }), end: /event: message_stop/ },
  "/v1/responses": {
    body: { model: "test-model", input: "x", stream: true },
    end: /event: response\.completed/,
  },
};

describe("truncated streams", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet({
      a: { models: ["test-model"], backend: { healthInterval: 60_000 } },
    });
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const ask = (path: string, more: Record<string, unknown> = {}): Promise<Answer> =>
    send(fleet.url + path, { ...endpoints[path]?.body, ...more });
  const sent = (): string => fleet.engines.a.inference().at(-1)?.sent().toString() ?? "";

  /** What came is what was sent up to a boundary, then one error event, then nothing. */
  function checkBroken(path: string, answer: Answer, code: RegExp): void {
    assert.equal(answer.status, 200);
    const { events, rest } = parseSse(answer.text);
    assert.equal(rest, "", "the error event stands at a boundary");
    const last = events.at(-1);
    const body = JSON.parse(last?.data ?? "null") as Record<string, unknown>;
    if (path === "/v1/messages") {
      assert.equal(last?.event, "error");
      assert.equal(body.type, "error");
      assert.equal(body.request_id, answer.headers.get("x-request-id"));
      assert.equal((body.error as { type: string }).type, "api_error");
    } else {
      assert.equal(last?.event, path === "/v1/responses" ? "error" : null);
      assert.match(String(checkEnvelope(body.error).code), code);
    }
    assert.doesNotMatch(answer.text, endpoints[path]?.end ?? /$./);
    const before = events
      .slice(0, -1)
      .map(({ raw }) => raw)
      .join("");
    assert.ok(sent().startsWith(before), "nothing but what the engine sent");
  }

  async function checkRecord(answer: Answer, ending: string, cause: unknown): Promise<void> {
    const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
    assert.equal(record.ending, ending);
    if (cause instanceof RegExp) assert.match(String(record.cause), cause);
    else assert.equal(record.cause, cause);
  }

  for (const [path, { end }] of Object.entries(endpoints)) {
    for (const by of ["eof", "fin", "reset"] as const) {
      it(`${path} cut by ${by} ends with an error event`, TIMEOUT, async () => {
        fleet.engines.a.behave({ tokenDelayMs: 5, fault: { kind: "cut", afterTokens: 3, by } });
        const answer = await ask(path);
        checkBroken(path, answer, /^upstream_incomplete$/);
        // A reset takes along what has not been read yet, on a busy machine all of it.
        if (by !== "reset") assert.match(answer.text, /word1/, "what came before is not lost");
        await checkRecord(answer, "failed", "upstream_incomplete");
      });
    }

    it(
      `${path}: an engine's own error event is passed on, not followed by another`,
      TIMEOUT,
      async () => {
        for (const ends of ["done", "eof", "reset"] as const) {
          fleet.engines.a.behave({
            tokenDelayMs: 5,
            fault: { kind: "error", afterTokens: 2, ends },
          });
          const answer = await ask(path);
          const { events, rest } = parseSse(answer.text);
          assert.equal(rest, "");
          const last = events.at(-1)?.data ?? "";
          // A reset takes along what has not been read yet: then the end is ours.
          const isLost = ends === "reset" && /broke off/.test(last);
          if (!isLost) assert.match(last, /EngineCore encountered an issue/);
          assert.equal(
            events.filter(({ data }) => /"error": ?\{|"type": ?"error"/.test(data ?? "")).length,
            1,
          );
          assert.doesNotMatch(answer.text, end, "whatever comes after the error is dropped");
          await checkRecord(answer, "failed", isLost ? "upstream_incomplete" : "upstream_error");
        }
      },
    );
  }

  it("Ollama's swallowed error is told (real §5.1)", TIMEOUT, async () => {
    const ollama = await startFleet({ o: { kind: "ollama", models: ["llama3:8b"] } });
    try {
      ollama.engines.o.behave({ fault: faults.ollamaSwallowed(2), tokenDelayMs: 5 });
      for (const more of [{}, USAGE]) {
        const answer = await openaiChat(ollama.url, { model: "llama3", stream: true, ...more });
        const last = parseSse(answer.text).events.at(-1);
        const { error } = JSON.parse(last?.data ?? "null") as { error: unknown };
        assert.match(String(checkEnvelope(error).code), /^upstream_(incomplete|error)$/);
        assert.doesNotMatch(answer.text, /\[DONE\]/);
      }
    } finally {
      await ollama.close();
    }
  });

  it(
    "a stream without [DONE] is whole after its finish_reason, and not before",
    TIMEOUT,
    async () => {
      fleet.engines.a.behave({ fault: { kind: "endless", finish: true } });
      for (const path of ["/v1/chat/completions", "/v1/completions", "/v1/messages"]) {
        const whole = await ask(path);
        assert.equal(whole.text, sent(), path);
        await checkRecord(whole, "completed", null);
      }
      fleet.engines.a.behave({ fault: { kind: "endless", finish: false } });
      for (const path of Object.keys(endpoints)) {
        const broken = await ask(path);
        checkBroken(path, broken, /^upstream_incomplete$/);
        await checkRecord(broken, "failed", "upstream_incomplete");
      }
    },
  );

  it("with two choices, one finish_reason is not enough", TIMEOUT, async () => {
    const chunk = (index: number, reason: string | null): string =>
      `data: ${JSON.stringify({ choices: [{ index, delta: { content: "x" }, finish_reason: reason }] })}\n\n`;
    const path = "/v1/chat/completions";
    const body = chunk(0, null) + chunk(1, null) + chunk(0, "stop");
    fleet.engines.a.behave({ fault: { kind: "raw", body } });
    checkBroken(path, await ask(path, { n: 2 }), /^upstream_incomplete$/);
    fleet.engines.a.behave({ fault: { kind: "raw", body: body + chunk(1, "length") } });
    assert.equal((await ask(path, { n: 2 })).text, body + chunk(1, "length"));
  });

  it("an empty stream is an error, not an empty answer", TIMEOUT, async () => {
    for (const body of ["", ": ping\n\n", "\n\n", "data: [DO"]) {
      fleet.engines.a.behave({ fault: { kind: "raw", body } });
      const answer = await ask("/v1/chat/completions");
      if (answer.status === 200)
        checkBroken("/v1/chat/completions", answer, /^upstream_incomplete$/);
      else assert.equal(answer.status, 502);
      await checkRecord(answer, "failed", /^upstream_(incomplete|invalid_response)$/);
    }
  });

  it("half a ping behind a finished answer is nothing, not an event", TIMEOUT, async () => {
    const chunk = (delta: object, finish_reason: string | null) =>
      `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason }] })}\n\n`;
    const whole = chunk({ content: "a" }, null) + chunk({}, "stop");
    for (const rest of ["event: ping\n", "id: 7\n", ": ping\n"]) {
      fleet.engines.a.behave({ fault: { kind: "raw", body: whole + rest } });
      assert.equal((await ask("/v1/chat/completions")).text, whole);
    }
    fleet.engines.a.behave({ fault: { kind: "raw", body: `${whole}data: [DONE]\n` } });
    assert.equal((await ask("/v1/chat/completions")).text, `${whole}data: [DONE]\n`);
  });

  it(
    "an answer in one piece too large to hold is passed on, and breaks off where it broke",
    TIMEOUT,
    async () => {
      const small = await startFleet({ a: {} }, { limits: { bufferBytes: 100_000 } });
      try {
        small.engines.a.behave({ tokens: ["x".repeat(1_000_000)] });
        const whole = await openaiChat(small.url);
        assert.deepEqual(whole.body, small.engines.a.inference()[0]?.sent());
        for (const by of ["fin", "reset"] as const) {
          small.engines.a.behave({ fault: { kind: "cut", afterBytes: 500_000, by } });
          await assert.rejects(openaiChat(small.url), by);
        }
        assert.ok(await until(() => small.gateway.records().length === 3));
        for (const { ending, cause } of small.gateway.records().slice(1)) {
          assert.deepEqual([ending, cause], ["failed", "upstream_incomplete"]);
        }
      } finally {
        await small.close();
      }
    },
  );

  it(
    "silence in the middle of an event ends with an error event at a boundary",
    TIMEOUT,
    async () => {
      const limits = { queue: { heartbeatMs: 40 }, timeouts: { idleMs: 300 } };
      const impatient = await startFleet({ a: {} }, limits);
      try {
        for (const afterBytes of [300, 500, 900]) {
          impatient.engines.a.behave({ fault: { kind: "cut", afterBytes, by: "silence" } });
          const { text } = await openaiChat(impatient.url, { stream: true });
          const { events, rest } = parseSse(text);
          assert.equal(rest, "");
          const { error } = JSON.parse(events.at(-1)?.data ?? "null") as { error: unknown };
          assert.equal(checkEnvelope(error).code, "upstream_timeout");
          const engineSent = impatient.engines.a.inference().at(-1)?.sent().toString() ?? "";
          for (const { raw, comment } of events.slice(0, -1)) {
            assert.ok(comment !== null || engineSent.includes(raw), raw);
          }
          assert.ok(await until(() => impatient.engines.a.activeGenerations() === 0));
        }
      } finally {
        await impatient.close();
      }
    },
  );

  it(
    "an event too long to hold that breaks off is closed before the error event",
    TIMEOUT,
    async () => {
      for (const by of ["eof", "fin"] as const) {
        const fault: Fault = { kind: "cut", afterBytes: 150_000, by };
        fleet.engines.a.behave({ tokens: ["a", "x".repeat(300_000)], fault });
        const { status, text } = await ask("/v1/chat/completions");
        // A runtime may report the break before it hands out what came: then nothing was out yet.
        if (status !== 200) {
          assert.equal(status, 502, text);
          continue;
        }
        const { events, rest } = parseSse(text);
        assert.equal(rest, "");
        const { error } = JSON.parse(events.at(-1)?.data ?? "null") as { error: unknown };
        assert.equal(checkEnvelope(error).code, "upstream_incomplete");
        assert.doesNotMatch(text, /\[DONE\]/);
      }
    },
  );

  const cuts: [string, Partial<Behaviour>][] = [
    ["by event, clean end", { chunking: "event" }],
    ["7 bytes at a time, clean end", { chunking: 7 }],
    ["CRLF, all at once, clean end", { chunking: "once", lineEnd: "\r\n" }],
  ];
  for (const [name, behaviour] of cuts) {
    it(`cut at every byte: ${name}`, TIMEOUT, async () => {
      fleet.engines.a.behave({ ...behaviour, tokens: ["a", "b"] });
      await ask("/v1/chat/completions");
      const whole = sent();
      // From here on the last choice is finished: a clean end is whole (the incomplete rest is dropped).
      const finished = whole.indexOf("\n", whole.indexOf('"finish_reason":"stop"'));
      await everyByte(
        whole.length,
        (afterBytes) => ({ kind: "cut", afterBytes, by: "eof" }),
        (answer, at) => {
          if (answer.status !== 200)
            return assert.equal(answer.status, 502, `${at}: ${answer.text}`);
          if (/"code":"upstream_/.test(answer.text)) {
            assert.ok(at <= finished + 4, `error event at ${at} of ${finished}`);
            return checkBroken(
              "/v1/chat/completions",
              answer,
              /^upstream_(incomplete|invalid_response)$/,
            );
          }
          assert.ok(at > finished, `no error at ${at}, finished only at ${finished}`);
          assert.ok(sent().startsWith(answer.text.trimEnd()), `${at}`);
        },
      );
    });
  }

  it("broken at every byte by FIN and by RST", TIMEOUT, async () => {
    fleet.engines.a.behave({ tokens: ["a", "b"] });
    await ask("/v1/chat/completions");
    const whole = sent();
    for (const by of ["fin", "reset"] as const) {
      const faultAt = (afterBytes: number): Fault => ({ kind: "cut", afterBytes, by });
      await everyByte(
        whole.length - 1,
        faultAt,
        (answer, at) => {
          if (answer.status !== 200)
            return assert.equal(answer.status, 502, `${at}: ${answer.text}`);
          const isBroken = /"code":"upstream_/.test(answer.text);
          if (isBroken) checkBroken("/v1/chat/completions", answer, /^upstream_/);
          // Without an error event it must have been whole, for all that a client can see.
          else assert.match(answer.text, /"finish_reason":"stop"[^\n]*\n\n/, `${at}`);
        },
        by === "reset" ? 3 : 1,
      );
    }
  });

  /** One request per offset. */
  async function everyByte(
    length: number,
    faultAt: (offset: number) => Fault,
    check: (answer: Answer, offset: number) => void,
    step = 1,
  ): Promise<void> {
    for (let at = random.between(1, STRIDE); at <= length; at += step * STRIDE) {
      fleet.engines.a.behave({ fault: faultAt(at) });
      const answer = await ask("/v1/chat/completions");
      check(answer, at);
    }
  }
});

describe("an engine that keeps its connection open behind the end of its answer", () => {
  it("has said all of it, however short the idle limit", { timeout: 60_000 }, async () => {
    const fleet = await startFleet(
      { a: { models: ["test-model"] } },
      // Shorter than the second that an engine has to close.
      { timeouts: { idleMs: 700 }, queue: { heartbeatMs: 40 } },
    );
    try {
      const { a } = fleet.engines;
      const ask = () => openaiChat(fleet.url, { stream: true });
      // Either may have waited for long enough to be told so.
      const said = ({ text }: Answer): string =>
        parseSse(text)
          .events.filter(({ comment }) => comment === null)
          .map(({ raw }) => raw)
          .join("");
      const whole = said(await ask());
      a.behave({
        fault: { kind: "cut", afterBytes: a.inference().at(-1)?.sent().length ?? 0, by: "silence" },
      });
      const answer = await ask();
      assert.equal(said(answer).length, whole.length, answer.text);
      assert.match(answer.text, /\[DONE\]\n\n$/, "nothing behind it");
      const { ending } = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.equal(ending, "completed");
    } finally {
      await fleet.close();
    }
  });
});
