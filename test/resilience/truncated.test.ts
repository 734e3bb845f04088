/**
 * No cut goes unnoticed: every stream of the corpus, ended at every byte (design §1.2, §3 Relay; wire §1.7).
 * The whole gateway, in this process; only `fetch` is ours, since thousands of sockets tell nothing more.
 */
import assert from "node:assert/strict";
import process from "node:process";
import { after, before, describe, it } from "node:test";
import type { Gateway } from "../../src/gateway.ts";
import { startGateway } from "../../src/gateway.ts";
import { settle } from "../../src/settings/load.ts";
import { Log } from "../../src/telemetry/log.ts";
import { seeded } from "../support/client.ts";
import { effort } from "../support/effort.ts";
import type { WholeStream } from "./corpus.ts";
import { corpus, kinds, paths, plainStream } from "./corpus.ts";

const TIMEOUT = { timeout: 60_000 };
const random = seeded("truncated");
const encoder = new TextEncoder();

/** Every byte, or one in so many of them, by the seed. */
const STRIDE = 8 / effort(8, 1 / 8);

/** How the engine's connection ends. */
type End = "clean" | "broken";

describe("every cut is noticed", () => {
  const realFetch = globalThis.fetch;
  let gateway: Gateway;
  let upstream: () => Response = () => new Response(null, { status: 404 });
  let lastLine = "";

  before(async () => {
    globalThis.fetch = ((_url: string, init?: RequestInit) =>
      Promise.resolve(
        init?.method === "POST" ? upstream() : new Response("{}", { status: 404 }),
      )) as typeof fetch;
    const sources = { flags: {}, environment: {}, directory: "/" };
    const backends = kinds.map((kind) => ({
      id: kind,
      kind,
      url: `http://${kind}.invalid`,
      models: [{ name: `${kind}-m`, upstream: "m" }],
      healthInterval: 3_600_000,
    }));
    // Nothing but failures: no breaker may get between them and the client.
    const circuitBreaker = { failureThreshold: 1_000_000_000 };
    gateway = await startGateway(settle({ backends, circuitBreaker }, "test", sources), sources, {
      version: "0",
      runtime: "test",
      log: new Log({
        level: "info",
        json: true,
        colour: false,
        write: (line) => (lastLine = line),
      }),
      environment: {},
      upstreamLimit: Infinity,
      process,
      resolve: () => Promise.resolve([]),
    });
  });
  after(async () => {
    await gateway.close();
    globalThis.fetch = realFetch;
  });

  async function ask(stream: WholeStream, chunks: Uint8Array[], end: End = "clean") {
    let at = 0;
    const body = new ReadableStream<Uint8Array>(
      {
        pull(controller) {
          const chunk = chunks[at++];
          if (chunk !== undefined) controller.enqueue(chunk);
          else if (end === "clean") controller.close();
          else controller.error(new TypeError("connection reset"));
        },
      },
      { highWaterMark: 0 },
    );
    upstream = () => new Response(body, { headers: { "content-type": "text/event-stream" } });
    const request = new Request(`http://127.0.0.1${stream.path}`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...stream.request, model: `${stream.kind}-m` }),
    });
    const response = await gateway.fetch(request);
    const text = await response.text();
    const { ending, cause } = JSON.parse(lastLine) as { ending: string; cause: string | null };
    return { status: response.status, text, ending, cause };
  }

  /** What the client sees of so many frames. */
  function shown({ frames, hidesUsage }: WholeStream, count: number): string {
    const seen = frames.slice(0, count);
    return seen.filter((frame) => !hidesUsage || !frame.includes('"choices":[]')).join("");
  }

  function checkCut(stream: WholeStream, answer: Awaited<ReturnType<typeof ask>>, count: number) {
    assert.deepEqual([answer.ending, answer.cause], ["failed", "upstream_incomplete"]);
    const isAnthropic = stream.path === "/v1/messages";
    if (answer.status !== 200) {
      assert.equal(answer.status, 502);
      const first = stream.frames.findIndex((frame) => frame.includes("data:"));
      assert.ok(count <= first, "502 only where no event has come");
      const body = JSON.parse(answer.text) as { type?: string; error: { code?: string } };
      if (isAnthropic) assert.equal(body.type, "error");
      else assert.equal(body.error.code, "upstream_incomplete");
      return;
    }
    const before = shown(stream, count);
    assert.ok(answer.text.startsWith(before), "all that was whole has gone through");
    const event = answer.text.slice(before.length);
    const named = isAnthropic || stream.path === "/v1/responses" ? "event: error\n" : "";
    assert.ok(event.startsWith(`${named}data: {`) && event.endsWith("}\n\n"), event);
    const body = JSON.parse(event.slice(named.length + 6)) as Record<string, unknown>;
    const error = body["error"] as Record<string, unknown>;
    if (isAnthropic) assert.deepEqual([body["type"], error["type"]], ["error", "api_error"]);
    else assert.deepEqual([error["code"], error["type"]], ["upstream_incomplete", "server_error"]);
  }

  function chunksOf(stream: WholeStream, bytes: Uint8Array, how: number): Uint8Array[] {
    const chunks: Uint8Array[] = [];
    if (how === 0) return [bytes];
    let rest = bytes;
    for (const frame of how === 1 ? stream.frames : [1, 2]) {
      const size =
        typeof frame === "string"
          ? encoder.encode(frame).length
          : random.between(1, Math.max(1, rest.length));
      if (rest.length <= size) break;
      chunks.push(rest.subarray(0, size));
      rest = rest.subarray(size);
    }
    return [...chunks, rest];
  }

  async function everyByte(stream: WholeStream, end: End): Promise<number> {
    const bytes = encoder.encode(stream.frames.join(""));
    const ends: number[] = [];
    for (const frame of stream.frames) ends.push((ends.at(-1) ?? 0) + encoder.encode(frame).length);
    // A clean end is whole after the last choice's end, by design; a break only behind the end marker.
    const wholeFrames = end === "clean" ? stream.finished : stream.ended;
    let looked = 0;
    for (let at = random.between(1, STRIDE); at < bytes.length; at += STRIDE) {
      looked++;
      const count = ends.filter((each) => each <= at).length;
      const cut = bytes.slice(0, at);
      const answer = await ask(stream, chunksOf(stream, cut, at % 3), end);
      try {
        if (count < wholeFrames) checkCut(stream, answer, count);
        else {
          const before = shown(stream, count);
          assert.deepEqual([answer.status, answer.ending], [200, "completed"]);
          assert.ok(answer.text.startsWith(before));
          const partial = new TextDecoder().decode(cut.subarray(ends[count - 1]));
          assert.ok(["", partial].includes(answer.text.slice(before.length)), "nothing of ours");
        }
      } catch (error) {
        throw new Error(`cut at ${at} of ${bytes.length}: ${JSON.stringify(answer)}`, {
          cause: error,
        });
      }
    }
    return looked;
  }

  let cuts = 0;
  for (const stream of corpus()) {
    it(stream.name, TIMEOUT, async () => {
      assert.ok(stream.finished > 0 && stream.ended >= stream.finished);
      const bytes = encoder.encode(stream.frames.join(""));
      const single = Array.from(bytes, (_, at) => bytes.subarray(at, at + 1));
      for (const chunks of [[bytes], chunksOf(stream, bytes, 1), single]) {
        const whole = await ask(stream, chunks);
        assert.equal(whole.text, shown(stream, stream.frames.length));
        assert.deepEqual([whole.status, whole.ending, whole.cause], [200, "completed", null]);
      }
      cuts += await everyByte(stream, "clean");
    });
  }

  for (const path of paths) {
    it(`${path}: broken instead of ended`, TIMEOUT, async () => {
      cuts += await everyByte(plainStream(path), "broken");
    });
  }

  it("was asked often enough", () => {
    console.log(`truncated: ${cuts} cuts`);
    assert.ok(cuts > 10_000);
  });
});
