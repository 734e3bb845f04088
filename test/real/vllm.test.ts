/**
 * A real vLLM on the CPU behind the gateway, as `install.sh` installed it: started once, killed and
 * started again elsewhere, each time for 25 to 80 s. 6 GB to install, so only where it is asked for.
 */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { accessSync, readdirSync, readFileSync } from "node:fs";
import { mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import test from "node:test";
import type { Backend, Snapshot } from "../../src/core/snapshot.ts";
import { dataOf, open, send, until } from "../support/client.ts";
import { freePort, runtime, startGateway, sumOf } from "../support/gateway.ts";
import { sdk, STORY } from "./support.ts";

const CACHE = process.env.TIDEGATE_REAL_CACHE ?? join(homedir(), ".cache", "tidegate-workshop");
const PYTHON = join(CACHE, "venv-vllm/bin/python");
const MODEL = join(CACHE, "models/tiny");
/** Whatever becomes of the test run: told to end while it starts, vLLM may stay for ever. */
const LIFETIME = "--kill-after=5 270";
const ARGUMENTS =
  "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --served-model-name tiny " +
  "--max-num-seqs 4 --dtype bfloat16 --enforce-eager";
const MAX_MODEL_LEN = 2000;
const START_MS = 120_000;
const HEALTH_MS = 500;

type Fields = Record<string, unknown>;

const skip = missing();
if (skip !== false) console.log(`skipped: vllm: ${skip}`);

function missing(): string | false {
  if (process.env.TIDEGATE_TEST_VLLM !== "1") return "opt-in, TIDEGATE_TEST_VLLM=1";
  for (const path of [PYTHON, MODEL]) {
    try {
      accessSync(path);
    } catch {
      return `no ${path}: run TIDEGATE_TEST_VLLM=1 test/real/install.sh`;
    }
  }
  return false;
}

function say(words: string): void {
  console.log(`vllm on ${runtime}: ${words}`);
}

interface Vllm {
  url: string;
  /** Resolves when it answers, with the seconds that took; rejects where it ends instead. */
  up: () => Promise<number>;
  /** The end of all its processes at once: each would outlive the others. */
  kill: () => void;
  stop: () => Promise<void>;
}

/** Starts it and comes back at once: nobody listens there for a while. */
function launch(port: number): Vllm {
  const url = `http://127.0.0.1:${port}`;
  const startedAt = performance.now();
  const child = spawn(
    "timeout",
    `${LIFETIME} ${PYTHON} ${ARGUMENTS} --model ${MODEL} --max-model-len ${MAX_MODEL_LEN} --port ${port}`.split(
      " ",
    ),
    {
      env: {
        PATH: process.env.PATH ?? "",
        HOME: homedir(),
        HF_HUB_OFFLINE: "1",
        VLLM_NO_USAGE_STATS: "1",
        DO_NOT_TRACK: "1",
        VLLM_CACHE_ROOT: join(CACHE, "vllm"),
        VLLM_CPU_KVCACHE_SPACE: "1",
        // Else every vLLM on the machine works on its first core.
        VLLM_CPU_OMP_THREADS_BIND: "nobind",
        VLLM_HOST_IP: "127.0.0.1",
        OMP_NUM_THREADS: "1",
      },
      stdio: ["ignore", "pipe", "pipe"],
    },
  );
  let output = "";
  for (const stream of [child.stdout, child.stderr]) {
    stream.on("data", (bytes: Buffer) => (output = (output + bytes.toString()).slice(-8000)));
  }
  let isOver = false;
  const exited = new Promise<void>((resolve) => {
    child.once("close", () => {
      isOver = true;
      process.off("exit", kill);
      resolve();
    });
  });
  function kill(): void {
    if (isOver || child.pid === undefined) return;
    for (const pid of familyOf(child.pid)) {
      try {
        process.kill(pid, "SIGKILL");
      } catch {
        // It is gone already.
      }
    }
  }
  // A test run that dies takes it along.
  process.on("exit", kill);
  return {
    url,
    async up() {
      const answers = async (): Promise<boolean> =>
        (await send(`${url}/health`).catch(() => null))?.status === 200;
      const isUp = (await until(async () => isOver || (await answers()), START_MS)) && !isOver;
      assert.ok(isUp, `vLLM did not start:\n${output}`);
      return Math.round((performance.now() - startedAt) / 1000);
    },
    kill,
    async stop() {
      if (!isOver) child.kill("SIGTERM");
      const timer = setTimeout(kill, 5000);
      await exited;
      clearTimeout(timer);
    },
  };
}

/** A process with all its descendants but Python's tracker, which ends last and sweeps /dev/shm. */
function familyOf(pid: number): number[] {
  const about = join("/proc", String(pid));
  try {
    if (readFileSync(join(about, "cmdline"), "utf8").includes("resource_tracker")) return [];
    const children = readdirSync(join(about, "task")).flatMap((thread) =>
      readFileSync(join(about, "task", thread, "children"), "utf8")
        .split(" ")
        .filter(Boolean),
    );
    return [pid, ...children.flatMap((child) => familyOf(Number(child)))];
  } catch {
    // It is gone already.
    return [];
  }
}

test("real vLLM", { skip, timeout: 270_000 }, async (suite) => {
  const folder = await mkdtemp(join(tmpdir(), "tidegate-vllm-"));
  const file = join(folder, "gateway.config.json");
  /** Without a kind: it has to be recognised. */
  const write = async (url: string): Promise<void> => {
    const backends = [{ id: "rack", url: `${url}/v1`, healthInterval: HEALTH_MS }];
    await writeFile(`${file}.new`, JSON.stringify({ server: { port: 0 }, backends }));
    await rename(`${file}.new`, file);
  };
  let vllm = launch(await freePort());
  let stopGateway = async (): Promise<unknown> => undefined;
  try {
    say(`up after ${await vllm.up()} s`);
    await write(vllm.url);
    const gateway = await startGateway({ args: ["--config", file] });
    stopGateway = () => gateway.stop();
    const client = sdk(gateway.url);

    const snapshot = async (): Promise<Snapshot> =>
      JSON.parse((await send(`${gateway.url}/admin/api/snapshot`)).text) as Snapshot;
    const rack = async (): Promise<Backend | undefined> => (await snapshot()).backends[0];
    /** Random weights: without `ignore_eos` the end may come at once. */
    const chat = {
      model: "tiny",
      messages: STORY,
      max_tokens: 8,
      temperature: 0,
      ignore_eos: true,
    };
    const counted = async (name: string, labels = {}): Promise<number> =>
      sumOf((await send(`${vllm.url}/metrics`)).text, `vllm:${name}`, labels);
    /** How many milliseconds until it holds. */
    const took = async (what: string, holds: () => Promise<boolean>, ms: number): Promise<void> => {
      const from = performance.now();
      const held = await until(holds, ms);
      assert.ok(held, `${what}: never; ${JSON.stringify(await rack())}`);
      say(`${what} after ${Math.round(performance.now() - from)} ms`);
    };

    const isKnown = async (): Promise<void> => {
      const { backends, models } = await snapshot();
      assert.equal(backends.length, 1);
      const { kind, url, health, reason } = backends[0] as Backend;
      assert.deepEqual([kind, url, health, reason], ["vllm", vllm.url, "healthy", ""]);
      const { data } = (await send(`${vllm.url}/v1/models`)).json();
      const [card] = data as [{ max_model_len: number }];
      assert.equal(card.max_model_len, MAX_MODEL_LEN);
      assert.deepEqual(
        models.map(({ name, contextLength, targets }) => ({ name, contextLength, targets })),
        [
          {
            name: "tiny",
            contextLength: card.max_model_len,
            targets: [
              {
                backend: "rack",
                model: "tiny",
                residency: "loaded",
                slots: 64,
                sizeBytes: null,
                vramBytes: null,
                digest: null,
              },
            ],
          },
        ],
      );
    };

    await suite.test("is recognised, and known as what it says of itself", isKnown);

    await suite.test("answers a chat with all that vLLM says", async () => {
      const { data, response } = await client.chat.completions.create(chat).withResponse();
      assert.equal(response.headers.get("x-tidegate-backend"), "rack");
      assert.equal(data.choices[0]?.finish_reason, "length");
      assert.equal(data.usage?.completion_tokens, 8);
      const direct = (await send(`${vllm.url}/v1/chat/completions`, chat)).json();
      const { id, created } = data;
      assert.deepEqual({ ...data }, { ...direct, id, created });
    });

    await suite.test("streams a chat; usage only for who asks for it", async () => {
      for (const include of [undefined, true]) {
        const { data: stream, response } = await client.chat.completions
          .create({
            ...chat,
            stream: true,
            ...(include === true ? { stream_options: { include_usage: true } } : {}),
          })
          .withResponse();
        let deltas = 0;
        const ends: string[] = [];
        const usages: number[] = [];
        for await (const { choices, usage } of stream) {
          for (const { delta, finish_reason } of choices) {
            if (delta.role === undefined) deltas += 1;
            if (finish_reason !== null) ends.push(finish_reason);
          }
          if (usage) usages.push(usage.completion_tokens);
        }
        assert.equal(deltas, 8);
        assert.deepEqual(ends, ["length"]);
        assert.deepEqual(usages, include === true ? [8] : []);
        const record = await gateway.record(response.headers.get("x-request-id") ?? "");
        const { tokens_generated, tokens_estimated, ending, backend_id } = record;
        assert.deepEqual(
          { tokens_generated, tokens_estimated, ending, backend_id },
          { tokens_generated: 8, tokens_estimated: false, ending: "completed", backend_id: "rack" },
        );
      }
    });

    await suite.test("says clearly what a request cannot have", async () => {
      const content = (words: number) => [{ role: "user", content: "word ".repeat(words) }];
      const TOO_LONG = [400, "context_length_exceeded"] as const;
      const refused: [path: string, body: Fields, status: number, code: string][] = [
        ["embeddings", { input: "x" }, 501, "unsupported_endpoint"],
        ["rerank", { query: "x", documents: ["y"] }, 501, "unsupported_endpoint"],
        ["chat/completions", { model: "nope", messages: STORY }, 404, "model_not_found"],
        // vLLM counts the characters first, and the tokens of what may still fit.
        ["chat/completions", { messages: content(3000) }, ...TOO_LONG],
        ["chat/completions", { messages: content(1000) }, ...TOO_LONG],
        ["chat/completions", { messages: content(1000), stream: true }, ...TOO_LONG],
        ["completions", { prompt: "word ".repeat(1000) }, ...TOO_LONG],
        ["responses", { input: "word ".repeat(1000) }, ...TOO_LONG],
      ];
      for (const [path, body, status, code] of refused) {
        const wanted = { model: "tiny", max_tokens: 4, ...body };
        const answer = await send(`${gateway.url}/v1/${path}`, wanted);
        const { error } = answer.json() as { error: { code: string } };
        assert.deepEqual([answer.status, error.code], [status, code], `${path} ${answer.text}`);
        const isOurs = status === 404;
        assert.equal(answer.headers.get("x-tidegate-backend"), isOurs ? null : "rack");
      }
    });

    await suite.test("a client that leaves ends the work, streaming or not", async () => {
      for (const stream of [true, false]) {
        const before = await counted("generation_tokens_total");
        const leaving = new AbortController();
        const wanted = { ...chat, temperature: 1, max_tokens: 1900, n: 2, stream };
        const answer = open(`${gateway.url}/v1/chat/completions`, wanted, {
          signal: leaving.signal,
        }).then((response) => response.text());
        answer.catch(() => undefined);
        const isAtWork = async (): Promise<boolean> =>
          (await counted("num_requests_running")) === 2;
        assert.ok(await until(isAtWork, 5000));
        leaving.abort();
        const how = stream ? "left a stream" : "left before the answer";
        await took(how, async () => (await counted("num_requests_running")) === 0, 1500);
        const made = (await counted("generation_tokens_total")) - before;
        assert.ok(made < 2 * 1900, `all ${made} tokens were made`);
      }
    });

    await suite.test("killed in mid-stream, started elsewhere, back by the file", async () => {
      const wanted = { ...chat, max_tokens: 1900, stream: true };
      const stream = send(`${gateway.url}/v1/chat/completions`, wanted);
      assert.ok(await until(async () => (await counted("num_requests_running")) === 1, 5000));
      vllm.kill();
      await took("killed: out of use", async () => (await rack())?.health !== "healthy", 10_000);
      const last = dataOf((await stream).text).at(-1) as { error?: { code: string } };
      assert.equal(last.error?.code, "upstream_incomplete", JSON.stringify(last));
      const isDown = async (): Promise<boolean> => (await rack())?.health === "unhealthy";
      await took("and unhealthy", isDown, 10_000);
      const refusal = await send(`${gateway.url}/v1/chat/completions`, chat);
      // Sent there to see whether it is back, or not sent at all.
      assert.ok([502, 503].includes(refusal.status), refusal.text);
      await vllm.stop();

      vllm = launch(await freePort());
      await write(vllm.url);
      const isWaiting = async (): Promise<boolean> => {
        const backend = await rack();
        return backend?.url === vllm.url && backend.reason === "connection refused";
      };
      await took("the new place is watched", isWaiting, 10_000);
      say(`up again after ${await vllm.up()} s`);
      const isBack = async (): Promise<boolean> =>
        (await send(`${gateway.url}/v1/chat/completions`, chat)).status === 200;
      await took("back in use", isBack, 5000);
      // That may have been the request that tries an unhealthy backend.
      await took("healthy", async () => (await rack())?.health === "healthy", 5000);
      await isKnown();
    });
  } finally {
    await stopGateway();
    await vllm.stop();
    await rm(folder, { recursive: true, force: true });
  }
});
