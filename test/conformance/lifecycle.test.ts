/** Start and stop: the command line, the configuration, signals (contract §1). */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, it } from "node:test";
import {
  chatBody,
  connect,
  dataOf,
  open,
  openaiChat,
  PATIENCE_MS,
  postBytes,
  readEvents,
  send,
  sleep,
  until,
} from "../support/client.ts";
import { checkEnvelope, expectError, startFleet } from "../support/fleet.ts";
import type { Gateway } from "../support/gateway.ts";
import { freePort, startGateway } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };
const DEMO = { backends: [{ id: "demo", kind: "demo" }] };
const STACK = /\n\s+at |node_modules|Error:.*\.ts:\d/;

async function run(
  args: string[],
  config?: object,
  env: Record<string, string> = {},
): Promise<Gateway> {
  return startGateway({ args, env, expectExit: true, ...(config === undefined ? {} : { config }) });
}

/** It has heard of the signal: it listens no more, or says that it is not ready. */
async function isLeaving(url: string): Promise<boolean> {
  const ready = await send(`${url}/ready`).catch(() => null);
  return ready?.status !== 200;
}

describe("shutdown", () => {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    it(`${signal}: what runs is completed, then exit 0`, TIMEOUT, async () => {
      const fleet = await startFleet({ a: { behaviour: { tokens: 20, tokenDelayMs: 60 } } });
      const response = await open(`${fleet.url}/v1/chat/completions`, chatBody({ stream: true }));
      const whole = openaiChat(fleet.url);
      assert.ok(await until(() => fleet.engines.a.activeGenerations() === 2));
      fleet.gateway.kill(signal);
      let text = "";
      for await (const { raw } of readEvents(response)) text += raw;
      assert.ok(text.endsWith("data: [DONE]\n\n"), text);
      assert.equal((await whole).status, 200);
      assert.equal(await fleet.gateway.exited, 0);
      assert.equal(
        fleet.gateway.records().filter(({ ending }) => ending === "completed").length,
        2,
      );
      await fleet.close();
    });
  }

  it("idle, it is gone at once", TIMEOUT, async () => {
    const fleet = await startFleet({ a: {} });
    await openaiChat(fleet.url);
    assert.equal(await fleet.gateway.stop(), 0);
    await assert.rejects(send(fleet.url));
    await fleet.close();
  });

  it("no new requests while it drains", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { behaviour: { tokens: 10, tokenDelayMs: 100 } } });
    const response = await open(`${fleet.url}/v1/chat/completions`, chatBody({ stream: true }));
    const kept = await connect(fleet.gateway.port);
    fleet.gateway.kill("SIGTERM");
    assert.ok(await until(() => isLeaving(fleet.url)));
    // Refused, or on a connection that was there before: 503.
    const late = await openaiChat(fleet.url).catch(() => null);
    if (late !== null) {
      expectError(late, 503, "shutting_down");
      assert.ok(Number(late.headers.get("retry-after")) >= 1);
    }
    kept.write(postBytes("/v1/chat/completions", chatBody()));
    await until(() => kept.isClosed() || kept.status() !== null, 500);
    assert.notEqual(kept.status(), 200);
    for await (const event of readEvents(response)) void event;
    assert.equal(await fleet.gateway.exited, 0);
    assert.equal(fleet.engines.a.inference().length, 1);
    await fleet.close();
  });

  it("drain.delayMs: not ready, but still admitting", TIMEOUT, async () => {
    const fleet = await startFleet({ a: {} }, { drain: { delayMs: 3000 } });
    fleet.gateway.kill("SIGTERM");
    assert.ok(await until(async () => (await send(`${fleet.url}/ready`)).status === 503));
    const ready = (await send(`${fleet.url}/ready`)).json();
    assert.equal(ready.ready, false);
    assert.match(String(ready.reason), /\w/);
    assert.equal((await send(`${fleet.url}/health`)).status, 200);
    assert.equal((await openaiChat(fleet.url)).status, 200);
    assert.equal(await fleet.gateway.exited, 0);
    await fleet.close();
  });

  it("drain.graceMs over: told in the stream, exit 1", TIMEOUT, async () => {
    const fleet = await startFleet(
      { a: { backend: { concurrency: 2 }, behaviour: { stallAfterTokens: 2 } } },
      { drain: { graceMs: 300 } },
    );
    const response = await open(`${fleet.url}/v1/chat/completions`, chatBody({ stream: true }));
    const whole = openaiChat(fleet.url);
    assert.ok(await until(() => fleet.engines.a.activeGenerations() === 2));
    const queued = openaiChat(fleet.url);
    assert.ok(
      await until(async () => (await fleet.gateway.metric("tidegate_queue_requests")) === 1),
    );
    fleet.gateway.kill("SIGTERM");
    let text = "";
    for await (const { raw } of readEvents(response)) text += raw;
    const { error } = dataOf(text).at(-1) as { error: unknown };
    assert.equal(checkEnvelope(error).code, "shutting_down");
    assert.doesNotMatch(text, /\[DONE\]/);
    expectError(await whole, 503, "shutting_down");
    const refused = await queued;
    expectError(refused, 503, "shutting_down");
    assert.ok(Number(refused.headers.get("retry-after")) >= 1);
    assert.equal(await fleet.gateway.exited, 1);
    assert.ok(
      await until(() => fleet.engines.a.activeGenerations() === 0),
      "the engine was stopped",
    );
    assert.equal(fleet.gateway.records().length, 3);
    await fleet.close();
  });

  it("a second signal ends it at once", TIMEOUT, async () => {
    const fleet = await startFleet({ a: { behaviour: { stallAfterTokens: 1 } } });
    const response = await open(`${fleet.url}/v1/chat/completions`, chatBody({ stream: true }));
    fleet.gateway.kill("SIGTERM");
    // Two signals at once are one.
    assert.ok(await until(() => isLeaving(fleet.url)));
    fleet.gateway.kill("SIGTERM");
    const late = sleep(PATIENCE_MS).then(() => "still there");
    const code = await Promise.race([fleet.gateway.exited, late]);
    assert.equal(code, 1);
    await response.body?.cancel().catch(() => {});
    await fleet.close();
  });
});

describe("without an engine", () => {
  it("the demo engine answers as model demo", TIMEOUT, async () => {
    const gateway = await startGateway({ config: DEMO });
    try {
      const { data } = (await send(`${gateway.url}/v1/models`)).json() as {
        data: { id: string }[];
      };
      assert.deepEqual(
        data.map(({ id }) => id),
        ["demo"],
      );
      const whole = await openaiChat(gateway.url, { model: "demo", max_tokens: 3 });
      const [choice] = whole.json().choices as { message: { content: string } }[];
      assert.ok((choice?.message.content ?? "").length > 0);
      const streamed = await openaiChat(gateway.url, {
        model: "demo",
        stream: true,
        max_tokens: 3,
      });
      assert.ok(dataOf(streamed.text).length >= 3);
      assert.ok(streamed.text.endsWith("data: [DONE]\n\n"));
      assert.doesNotMatch(streamed.text, /"choices":\[\]/);
      assert.equal(streamed.headers.get("x-tidegate-backend"), "demo");
      const vector = await send(`${gateway.url}/v1/embeddings`, { model: "demo", input: "x" });
      assert.equal(vector.status, 200);
      const messages = await send(
        `${gateway.url}/v1/messages`,
        chatBody({ model: "demo", max_tokens: 3 }),
      );
      assert.equal(messages.status, 501);
      const leaver = await connect(gateway.port);
      leaver.write(postBytes("/v1/chat/completions", chatBody({ model: "demo", stream: true })));
      await until(() => leaver.status() === 200);
      leaver.leave("reset");
      assert.ok(
        await until(async () => (await gateway.metric("tidegate_requests_in_flight")) === 0),
      );
    } finally {
      assert.equal(await gateway.stop(), 0);
    }
  });

  it(
    "with no backends named it looks for some, else it is the demo, and says so",
    TIMEOUT,
    async () => {
      const gateway = await startGateway({ config: {} });
      try {
        const { data } = (await send(`${gateway.url}/v1/models`)).json() as {
          data: { id: string }[];
        };
        assert.match(gateway.stderr(), /11434/, "every place it looked at is reported");
        if (!/demo/.test(gateway.stderr())) return;
        assert.deepEqual(
          data.map(({ id }) => id),
          ["demo"],
        );
      } finally {
        await gateway.stop();
      }
    },
  );
});

describe("command line", () => {
  it("--help and --version", TIMEOUT, async () => {
    const help = await run(["--help"]);
    assert.equal(await help.exited, 0);
    for (const flag of [
      "--config",
      "--port",
      "--host",
      "--log-level",
      "--check",
      "--help",
      "--version",
    ]) {
      assert.ok(help.stdout().includes(flag), flag);
    }
    const version = await run(["--version"]);
    assert.equal(await version.exited, 0);
    assert.match(version.stdout(), /\d+\.\d+\.\d+/);
  });

  it("exit 2 for a wrong flag, with the one that was perhaps meant", TIMEOUT, async () => {
    for (const [args, said] of [
      [["--prot", "1"], /--port/],
      [["--port", "abc"], /abc/],
      [["--port"], /--port/],
      [["--config"], /--config/],
      [["stray"], /stray/],
    ] as const) {
      const wrong = await run([...args]);
      assert.equal(await wrong.exited, 2, args.join(" ") + wrong.stderr());
      assert.match(wrong.stderr(), said);
      assert.doesNotMatch(wrong.stderr(), STACK);
    }
  });

  it("--check reads the configuration and does not listen", TIMEOUT, async () => {
    const fine = await run(["--check"], DEMO);
    assert.equal(await fine.exited, 0, fine.stderr());
    const wrong = await run(["--check"], { backends: [{ id: "a", kind: "nope" }] });
    assert.equal(await wrong.exited, 1);
  });

  it(
    "flags are stronger than the environment, which is stronger than the file",
    TIMEOUT,
    async () => {
      const [fromEnvironment, fromFlag] = [await freePort(), await freePort()];
      const env = { PORT: String(fromEnvironment) };
      const one = await startGateway({ config: DEMO, env });
      assert.equal(one.port, fromEnvironment);
      await one.stop();
      const two = await startGateway({ config: DEMO, env, args: ["--port", String(fromFlag)] });
      assert.equal(two.port, fromFlag);
      await two.stop();
    },
  );

  it("a busy port: exit 1, one sentence that names it", TIMEOUT, async () => {
    const gateway = await startGateway({ config: DEMO });
    const second = await run(["--port", String(gateway.port)], DEMO);
    assert.equal(await second.exited, 1);
    assert.match(second.stderr(), new RegExp(String(gateway.port)));
    assert.doesNotMatch(second.stderr(), STACK);
    await gateway.stop();
  });

  it("--log-level: an error level writes no line per request", TIMEOUT, async () => {
    const gateway = await startGateway({ config: DEMO, args: ["--log-level", "error"] });
    await openaiChat(gateway.url, { model: "demo", max_tokens: 1 });
    await gateway.stop();
    assert.deepEqual(gateway.records(), []);
  });
});

describe("configuration", () => {
  it(
    "all mistakes at once, each with path, value, and what was perhaps meant",
    TIMEOUT,
    async () => {
      const wrong = await run([], {
        server: { port: 99_999, logLevle: "info" },
        backends: [
          { id: "a", kind: "olama", url: "http://127.0.0.1:1" },
          { id: "b", kind: "openai", url: "ftp://127.0.0.1:1", weight: 0 },
          { id: "b", kind: "openai", url: "http://127.0.0.1:1" },
          { id: "c", kind: "openai" },
        ],
        queue: { maxLength: 0 },
        timeouts: { idleMs: -1 },
        models: { m: { backends: ["bb"], aliases: ["x"] }, n: { aliases: ["x"] } },
        modles: {},
      });
      assert.equal(await wrong.exited, 1);
      const said = wrong.stderr();
      for (const part of [
        /server\.port.*99999/,
        /server\.logLevle.*logLevel/,
        /backends\[0\]\.kind.*olama.*ollama/,
        /backends\[1\]\.url.*ftp/,
        /backends\[1\]\.weight/,
        /backends\[2\]\.id.*b/,
        /backends\[3\]\.url/,
        /queue\.maxLength/,
        /timeouts\.idleMs.*-1/,
        /models\.m\.backends.*bb/,
        /aliases.*x/,
        /modles.*models/,
      ]) {
        assert.match(said, part);
      }
      assert.doesNotMatch(said, STACK);
      assert.equal(wrong.stdout(), "");
    },
  );

  it("shows no secret in a mistake", TIMEOUT, async () => {
    const wrong = await run([], {
      ...DEMO,
      auth: { keys: [{ key: "very-secret", hash: "sha256:very-secret" }, { hash: "very-secret" }] },
    });
    assert.equal(await wrong.exited, 1);
    assert.doesNotMatch(wrong.stderr(), /very-secret/);
  });

  it("a file that is not there, or no JSON: exit 1, the path named", TIMEOUT, async () => {
    const missing = await run(["--config", "/nowhere/gateway.config.json"]);
    assert.equal(await missing.exited, 1);
    assert.match(missing.stderr(), /\/nowhere\/gateway\.config\.json/);
    const byVariable = await run([], undefined, { TIDEGATE_CONFIG: "/nowhere/else.json" });
    assert.equal(await byVariable.exited, 1);
    assert.match(byVariable.stderr(), /\/nowhere\/else\.json/);
    const folder = await mkdtemp(join(tmpdir(), "tidegate-test-"));
    const broken = join(folder, "broken.json");
    await writeFile(broken, "{ nonsense");
    const unreadable = await run(["--config", broken]);
    assert.equal(await unreadable.exited, 1);
    assert.ok(unreadable.stderr().includes(broken));
    assert.doesNotMatch(unreadable.stderr() + missing.stderr(), STACK);
    await rm(folder, { recursive: true });
  });

  it("a TypeScript file is read as well", TIMEOUT, async () => {
    const folder = await mkdtemp(join(tmpdir(), "tidegate-test-"));
    const file = join(folder, "gateway.config.ts");
    await writeFile(
      file,
      `interface Named { id: string }
       const backend: Named & { kind: "demo" } = { id: "from-ts", kind: "demo" };
       export default { server: { port: 0 }, backends: [backend] };`,
    );
    const gateway = await startGateway({ args: ["--config", file] });
    const { backends } = (await send(`${gateway.url}/ready`)).json() as {
      backends: { id: string }[];
    };
    assert.deepEqual(
      backends.map(({ id }) => id),
      ["from-ts"],
    );
    await gateway.stop();
    await rm(folder, { recursive: true });
  });

  it("says which variable it does not know", TIMEOUT, async () => {
    const env = { TIDEGATE_QUEUE_MAX_WAT: "1" };
    const gateway = await startGateway({ config: DEMO, env });
    assert.match(gateway.stderr(), /TIDEGATE_QUEUE_MAX_WAT/);
    await gateway.stop();
  });

  it("goes on when whoever read its output has left", TIMEOUT, async () => {
    const gateway = await startGateway({ config: DEMO });
    gateway.closeOutput();
    for (let at = 0; at < 3; at++) await openaiChat(gateway.url, { model: "nope" });
    await sleep(200);
    const { status } = await send(`${gateway.url}/health`);
    assert.equal(status, 200);
    assert.equal(await gateway.stop(), 0);
  });

  it("writes banner to stderr and nothing but JSON lines to stdout", TIMEOUT, async () => {
    const gateway = await startGateway({ config: DEMO });
    await openaiChat(gateway.url, { model: "demo", max_tokens: 1 });
    await openaiChat(gateway.url, { model: "nope" });
    await gateway.stop();
    const lines = gateway.stdout().trim().split("\n");
    assert.ok(lines.length >= 2);
    for (const line of lines) {
      const { time, level, msg } = JSON.parse(line) as Record<string, unknown>;
      assert.ok(time !== undefined && typeof level === "string" && typeof msg === "string", line);
    }
    assert.match(gateway.stderr(), /http:\/\/127\.0\.0\.1:\d+/);
  });
});
