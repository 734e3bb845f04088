/** No answer runs away: the cap in the body, and the end of a stream whose engine does not obey it. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import type { Answer } from "../support/client.ts";
import { chatBody, parseSse, send, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { checkEnvelope, startFleet } from "../support/fleet.ts";
import { by, withKeys } from "../support/tenants.ts";

const TIMEOUT = { timeout: 60_000 };
const CAP = 20;
/** 1.1 × the cap. */
const MOST = 22;

/** What streams, with a body, the field that limits it, its events with tokens, and its end. */
const endpoints: Record<
  string,
  { body: Record<string, unknown>; field: string; delta: RegExp; end: RegExp }
> = {
  "/v1/chat/completions": {
    body: chatBody(),
    field: "max_tokens",
    delta: /"content":" ?word/,
    end: /\[DONE\]|"finish_reason":"/,
  },
  "/v1/completions": {
    body: { model: "test-model", prompt: "x" },
    field: "max_tokens",
    delta: /"text":" ?word/,
    end: /\[DONE\]|"finish_reason":"/,
  },
  "/v1/messages": {
    body: chatBody({ max_tokens: 5000 }),
    field: "max_tokens",
    delta: /"text_delta"/,
    end: /message_stop|message_delta/,
  },
  "/v1/responses": {
    body: { model: "test-model", input: "x" },
    field: "max_output_tokens",
    delta: /output_text\.delta"/,
    end: /response\.(?:completed|incomplete|output_text\.done)/,
  },
};
const paths = Object.keys(endpoints);

describe("a stream whose engine takes no notice of the cap", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["test-model"], backend: { healthInterval: 60_000 } } },
      {
        models: { "test-model": { maxOutputTokens: CAP } },
        circuitBreaker: { failureThreshold: 1, resetTimeoutMs: 600_000 },
      },
    );
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const ask = (path: string, more: Record<string, unknown> = {}): Promise<Answer> =>
    send(fleet.url + path, { ...endpoints[path]?.body, stream: true, ...more });
  const last = () => fleet.engines.a.inference().at(-1);

  function check(path: string, answer: Answer, most: number): void {
    const { delta, end } = endpoints[path] as (typeof endpoints)[string];
    assert.equal(answer.status, 200);
    const { events, rest } = parseSse(answer.text);
    assert.equal(rest, "", "the error event stands at a boundary");
    const error = events.at(-1);
    const body = JSON.parse(error?.data ?? "null") as Record<string, unknown>;
    if (path === "/v1/messages") {
      assert.deepEqual([error?.event, body.type], ["error", "error"]);
      const { type, message } = body.error as { type: string; message: string };
      assert.equal(type, "api_error");
      assert.match(message, /beyond 20 tokens .*maxOutputTokens/);
    } else {
      assert.equal(error?.event, path === "/v1/responses" ? "error" : null);
      const { code, type } = checkEnvelope(body.error);
      assert.deepEqual([code, type], ["output_limit_exceeded", "server_error"]);
    }
    const tokens = events.filter(({ data }) => delta.test(data ?? ""));
    assert.equal(tokens.length, most, "all that may be, and nothing beyond");
    assert.doesNotMatch(answer.text, end);
    const before = events.slice(0, -1).map(({ raw }) => raw);
    assert.ok(last()?.sent().toString().startsWith(before.join("")), "the engine's own bytes");
  }

  async function checkEnded(answer: Answer): Promise<void> {
    const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
    assert.deepEqual(
      [record.status, record.ending, record.cause],
      [200, "failed", "output_limit_exceeded"],
    );
    const isStopped = () =>
      last()?.closedByClient === true && fleet.engines.a.activeGenerations() === 0;
    assert.ok(await until(isStopped), "the engine is stopped");
    assert.equal(await fleet.gateway.metric("tidegate_slots_in_use"), 0);
    const labels = { state: "open" };
    assert.equal(await fleet.gateway.metric("tidegate_breaker_state", labels), 0, "it works");
  }

  for (const path of paths) {
    for (const chunking of ["event", 64, 4096] as const) {
      it(`${path} ends at the cap, in pieces of ${chunking}`, TIMEOUT, async () => {
        fleet.engines.a.behave({ ignoresLimit: true, tokens: 20_000, chunking });
        const answer = await ask(path);
        check(path, answer, MOST);
        assert.equal(last()?.json[endpoints[path]?.field ?? ""], CAP);
        await checkEnded(answer);
      });
    }

    it(`${path} ends at the cap where all of it comes at once`, TIMEOUT, async () => {
      fleet.engines.a.behave({ ignoresLimit: true, tokens: 200, chunking: "once" });
      const answer = await ask(path);
      check(path, answer, MOST);
      const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
      assert.equal(record.cause, "output_limit_exceeded");
    });

    it(`${path} that ends within the cap is whole`, TIMEOUT, async () => {
      for (const tokens of [CAP, MOST]) {
        fleet.engines.a.behave({ ignoresLimit: true, tokens, chunking: "event" });
        const answer = await ask(path, { stream_options: { include_usage: true } });
        assert.equal(answer.text, last()?.sent().toString());
        const record = await fleet.gateway.record(answer.headers.get("x-request-id") ?? "");
        assert.deepEqual([record.ending, record.cause], ["completed", null]);
      }
    });
  }

  it("a model that thinks without end is stopped as well", TIMEOUT, async () => {
    const reasoning = Array.from({ length: 5000 }, (_, at) => `thought${at}`);
    for (const path of ["/v1/chat/completions", "/v1/messages", "/v1/responses"]) {
      fleet.engines.a.behave({ reasoning });
      const answer = await ask(path);
      assert.doesNotMatch(answer.text, /word/);
      assert.match(answer.text, /thought21/);
      assert.doesNotMatch(answer.text, /thought22/);
      await checkEnded(answer);
    }
  });

  it("counts for each choice, and each prompt", TIMEOUT, async () => {
    fleet.engines.a.behave({ ignoresLimit: true, tokens: 20_000 });
    const path = "/v1/completions";
    check(path, await ask(path, { n: 2 }), 2 * MOST);
    check(path, await ask(path, { prompt: ["a", "b", "c"] }), 3 * MOST);
  });

  it("an obedient engine is not disturbed: it ends at the cap by itself", TIMEOUT, async () => {
    for (const path of paths) {
      fleet.engines.a.behave({ tokens: 20_000 });
      const streamed = await ask(path);
      const { events } = parseSse(streamed.text);
      const { delta } = endpoints[path] as (typeof endpoints)[string];
      assert.equal(events.filter(({ data }) => delta.test(data ?? "")).length, CAP);
      const whole = await ask(path, { stream: false });
      assert.equal(whole.status, 200);
      assert.match(whole.text, /word19/);
      assert.doesNotMatch(whole.text, /word20/);
    }
  });
});

describe("the cap in the body", () => {
  const KINDS = ["ollama", "llamacpp", "vllm", "lmstudio", "sglang", "openai"] as const;
  type Kind = (typeof KINDS)[number];
  let fleet: Fleet<Kind>;
  /** With a tag: Ollama would put one there. */
  const modelOf = (kind: Kind) => `${kind}:1b`;
  before(async () => {
    const members = KINDS.map((kind) => {
      return [
        kind,
        { kind, models: [modelOf(kind)], backend: { healthInterval: 60_000 } },
      ] as const;
    });
    const capped = KINDS.map((kind) => [modelOf(kind), { maxOutputTokens: 100 }] as const);
    fleet = await startFleet(Object.fromEntries(members) as never, {
      models: Object.fromEntries(capped),
      ...withKeys({ free: {}, tight: { maxOutputTokens: 30 }, wide: { maxOutputTokens: 900 } }),
    });
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  /** What the engine got of it. */
  async function sent(
    kind: Kind,
    path: string,
    body: object | string,
    tenant = "free",
  ): Promise<string> {
    const answer = await send(fleet.url + path, body, by(tenant));
    assert.equal(answer.status, 200, answer.text);
    return fleet.engines[kind].inference().at(-1)?.body ?? "";
  }

  it("is the lower one of the model's and the tenant's", TIMEOUT, async () => {
    for (const [tenant, cap] of [
      ["free", 100],
      ["tight", 30],
      ["wide", 100],
    ] as const) {
      for (const path of paths) {
        const { body, field } = endpoints[path] as (typeof endpoints)[string];
        const got = await sent("vllm", path, { ...body, model: modelOf("vllm") }, tenant);
        assert.equal(JSON.parse(got)[field], cap, `${tenant} ${path}`);
      }
    }
  });

  it("leaves every byte of a client that asks for less", TIMEOUT, async () => {
    for (const kind of KINDS) {
      for (const field of ["max_tokens", "max_completion_tokens"]) {
        if (kind === "ollama" && field === "max_completion_tokens") continue;
        const chat = `{ "messages":[{"role":"user","content":"\\u0041"}],"${field}": 3.0e1 ,"seed":12345678901234567890, "model" : "${modelOf(kind)}"}`;
        assert.equal(await sent(kind, "/v1/chat/completions", chat), chat, kind);
      }
      const responses = `{"input":"x","max_output_tokens": 100,"model":"${modelOf(kind)}"}`;
      assert.equal(await sent(kind, "/v1/responses", responses), responses, kind);
    }
  });

  it(
    "is in the field that each kind obeys, also where the client used another",
    TIMEOUT,
    async () => {
      for (const kind of KINDS) {
        for (const more of [
          {},
          { max_completion_tokens: 5000 },
          { max_tokens: -1 },
          { n_predict: 9e9 },
        ]) {
          fleet.engines[kind].behave({ tokens: 500 });
          const body = { ...chatBody({ model: modelOf(kind), ...more }), stream: false };
          const answer = await send(`${fleet.url}/v1/chat/completions`, body, by("free"));
          assert.match(answer.text, /word99\b/, `${kind} ${JSON.stringify(more)}`);
          assert.doesNotMatch(answer.text, /word100\b/, `${kind} ${JSON.stringify(more)}`);
        }
      }
    },
  );

  it("may not be asked for twice", TIMEOUT, async () => {
    for (const field of ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"]) {
      const body = `{"model":"${modelOf("llamacpp")}","messages":[],"${field}":1,"${field}":9000}`;
      const answer = await send(`${fleet.url}/v1/chat/completions`, body, by("free"));
      const { error } = answer.json() as { error: { code: string; param: string } };
      assert.deepEqual(
        [answer.status, error.code, error.param],
        [400, "duplicate_parameter", field],
      );
    }
  });
});
