/** Every kind of engine behind the gateway: what goes wrong in its own way is told in the caller's (contract §4). */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer } from "../support/client.ts";
import { openaiChat, parseSse } from "../support/client.ts";
import { faults } from "../support/engine-behaviour.ts";
import { checkEnvelope, expectAnthropicError, expectError } from "../support/fleet.ts";
import type { House } from "./dialects.ts";
import { chatPath, dialects, embedModel, kinds, single, startHouse, ways } from "./dialects.ts";

const TIMEOUT = { timeout: 60_000 };

/** Events that tell an error, in any of the ways there are. */
function errorsIn(text: string): unknown[] {
  return parseSse(text)
    .events.filter(({ data }) => data !== null && data !== "[DONE]")
    .map(({ data }) => JSON.parse(data ?? "") as { error?: unknown; type?: unknown })
    .filter(({ error, type }) => (error !== undefined && error !== null) || type === "error");
}

/** The words of a refusal, wherever the engine put them. */
function wordsOf(body: string): string {
  const { error, message } = JSON.parse(body) as { error?: unknown; message?: unknown };
  if (typeof error === "string") return error;
  return String((error as { message?: unknown } | undefined)?.message ?? message);
}

describe("errors in the dialects of engines", () => {
  let house: House;
  before(async () => {
    house = await startHouse({ queue: { maxWaitMs: 600 } });
  });
  afterEach(() => house.fleet.reset());
  after(() => house.close());

  for (const way of ways) {
    it(`an unknown model is our 404, ${way}`, TIMEOUT, async () => {
      const answer = await openaiChat(house.gateways[way].url, { model: "nope" });
      expectError(answer, 404, "model_not_found");
      for (const kind of kinds) assert.equal(house.engine(kind).inference().length, 0, kind);
    });

    for (const kind of kinds) {
      const { busy, overflow, tellsItsDeath } = dialects[kind];

      describe(`${kind}, ${way}`, () => {
        const ask = (path: string, more: object = {}): Promise<Answer> =>
          house.ask(way, kind, path, more);

        it("an error inside a 200: 502", TIMEOUT, async () => {
          house.engine(kind).behave({ fault: faults.errorIn200 });
          for (const stream of [false, true]) {
            expectError(await ask(chatPath, { stream }), 502, "upstream_error");
            expectAnthropicError(await ask("/v1/messages", { stream }), 502, "api_error");
          }
        });

        for (const path of [chatPath, "/v1/completions", "/v1/messages", "/v1/responses"]) {
          it(
            `${path} that fails in mid-stream: one error event, no end marker`,
            TIMEOUT,
            async () => {
              const fault = { kind: "dies", afterTokens: 2 } as const;
              house.engine(kind).behave({ fault, tokenDelayMs: 5 });
              const answer = await ask(path, { stream: true });
              assert.equal(answer.status, 200);
              const { events, rest } = parseSse(answer.text);
              assert.equal(rest, "");
              assert.equal(errorsIn(answer.text).length, 1, answer.text);
              assert.equal(errorsIn(events.at(-1)?.raw ?? "").length, 1, "the error is the end");
              assert.doesNotMatch(answer.text, /\[DONE\]|message_stop|response\.completed/);
              assert.match(answer.text, /word1/);
              const engineSaid = house.sent(kind);
              for (const { raw } of events.slice(0, -1)) assert.ok(engineSaid.includes(raw));
              const id = answer.headers.get("x-request-id") ?? "";
              const record = await house.gateways[way].record(id);
              const cause = tellsItsDeath ? "upstream_error" : "upstream_incomplete";
              assert.deepEqual([record.ending, record.cause], ["failed", cause]);
            },
          );
        }

        it("a stream that ends early: upstream_incomplete", TIMEOUT, async () => {
          for (const by of ["eof", "fin"] as const) {
            const fault = { kind: "cut", afterTokens: 2, by } as const;
            house.engine(kind).behave({ fault, tokenDelayMs: 5 });
            const answer = await ask(chatPath, { stream: true });
            // Where all of it was there before the gateway looked, nothing has been opened yet.
            const errors = answer.status === 502 ? [answer.json()] : errorsIn(answer.text);
            assert.equal(errors.length, 1);
            const { code } = checkEnvelope((errors[0] as { error: unknown }).error);
            assert.equal(code, "upstream_incomplete");
            assert.doesNotMatch(answer.text, /\[DONE\]/);
          }
        });

        it("that fails without a stream: 502", TIMEOUT, async () => {
          house.engine(kind).behave({ fault: { kind: "dies", afterTokens: 0 } });
          expectError(await ask(chatPath), 502, "upstream_error");
        });

        for (const stream of [false, true]) {
          const how = stream ? ", streamed" : "";

          const tooLong = overflow === null ? "a prompt that is cut" : "a prompt too long";
          it(`${tooLong}${how}`, TIMEOUT, async () => {
            house.engine(kind).behave(overflow ?? { contextLength: 2 });
            const answer = await ask(chatPath, { stream });
            const anthropic = await ask("/v1/messages", { stream });
            if (overflow === null) {
              assert.deepEqual([answer.status, anthropic.status], [200, 200]);
              return;
            }
            expectError(answer, 400, "context_length_exceeded");
            expectAnthropicError(anthropic, 400, "invalid_request_error");
          });
        }

        it("its 400 keeps its words, with a code that is a string or null", TIMEOUT, async () => {
          for (const stream of [false, true]) {
            const answer = await ask(chatPath, { messages: undefined, stream });
            const error = expectError(answer, 400);
            assert.equal(error.message, wordsOf(house.sent(kind)));
          }
        });

        if (single.includes(kind)) {
          it("an input too long to embed is the client's fault", TIMEOUT, async () => {
            house.engine(kind, "embed").behave({ contextLength: 2 });
            const body = { model: embedModel(kind), input: "a b c d e" };
            expectError(await ask("/v1/embeddings", body), 400, "context_length_exceeded");
          });
        }

        if (dialects[kind].hasKey) {
          it("the engine's key is not the client's business", TIMEOUT, async () => {
            house.engine(kind).behave({ apiKey: "other" });
            expectError(await ask(chatPath), 502, "upstream_error");
          });
        }

        if (dialects[kind].loads) {
          it("a model that cannot be loaded: 502", TIMEOUT, async () => {
            house.engine(kind).behave({ loadFails: true });
            expectError(await ask(chatPath), 502, "upstream_error");
          });
        }

        // The last one: what was busy is left alone for a second.
        it("busy to the end: 429 with Retry-After, whole and streamed", TIMEOUT, async () => {
          house.engine(kind).behave(busy);
          const asks = [false, true].flatMap((stream) => [
            ask(chatPath, { stream }),
            ask("/v1/messages", { stream }),
          ]);
          for (const [at, answer] of (await Promise.all(asks)).entries()) {
            assert.match(answer.headers.get("retry-after") ?? "", /^[1-9]\d*$/);
            if (at % 2 === 0) expectError(answer, 429, "rate_limit_exceeded");
            else expectAnthropicError(answer, 429, "rate_limit_error");
          }
        });
      });
    }
  }
});
