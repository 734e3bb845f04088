/** The operator's side (contract §5, `/admin/api`): what it shows, what it does, who may. */
import assert from "node:assert/strict";
import { mkdtemp, rm, utimes, writeFile } from "node:fs/promises";
import { createServer, request } from "node:http";
import type { AddressInfo } from "node:net";
import { networkInterfaces, tmpdir } from "node:os";
import { join } from "node:path";
import { describe, it } from "node:test";
import type { Answer, Init } from "../support/client.ts";
import {
  chatBody,
  connect,
  open,
  openaiChat,
  readEvents,
  send,
  sleep,
  until,
} from "../support/client.ts";
import type { FakeEngine } from "../support/engine.ts";
import { startEngine } from "../support/engine.ts";
import type { Member } from "../support/fleet.ts";
import { expectError } from "../support/fleet.ts";
import type { Gateway, GatewayOptions } from "../support/gateway.ts";
import { startGateway } from "../support/gateway.ts";

const TIMEOUT = { timeout: 60_000 };
const model = ["test-model"];

interface Operated {
  gateway: Gateway;
  url: string;
  engines: Record<string, FakeEngine>;
  /** The entries of `backends` for the engines. */
  backends: Record<string, unknown>[];
  /** Below `/admin/api`; a POST where there is a body. */
  admin: (path: string, body?: unknown, init?: Init) => Promise<Answer>;
  /** Writes the file so that only who is told to reads it again. */
  rewrite: (config: object) => Promise<void>;
}

const FILE_BYTES = 8192;
const AGE = new Date("2026-01-01");

/** Of one size and age for ever: polling sees no change in it. */
async function writeUnseen(path: string, config: object): Promise<void> {
  await writeFile(path, JSON.stringify({ server: { port: 0 }, ...config }).padEnd(FILE_BYTES));
  await utimes(path, AGE, AGE);
}

/** Runs a test against engines and a gateway whose file can be written again. */
async function operating(
  members: Record<string, Member>,
  config: object,
  test: (operated: Operated) => Promise<void>,
  options: GatewayOptions = {},
): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "tidegate-admin-"));
  const path = join(folder, "gateway.config.json");
  const engines: Record<string, FakeEngine> = {};
  const backends: Record<string, unknown>[] = [];
  let gateway: Gateway | null = null;
  try {
    for (const [id, { backend, ...engine }] of Object.entries(members)) {
      const started = await startEngine(engine);
      engines[id] = started;
      backends.push({
        id,
        kind: started.kind,
        url: started.url,
        healthInterval: 600_000,
        ...backend,
      });
    }
    await writeUnseen(path, { backends, ...config });
    gateway = await startGateway({ ...options, args: ["--config", path, ...(options.args ?? [])] });
    const { url } = gateway;
    await test({
      gateway,
      url,
      engines,
      backends,
      admin: (below, body, init) => send(`${url}/admin/api/${below}`, body, init),
      rewrite: (next) => writeUnseen(path, next),
    });
  } finally {
    await gateway?.stop();
    await Promise.all(Object.values(engines).map((engine) => engine.close()));
    await rm(folder, { recursive: true, force: true });
  }
  assert.doesNotMatch(gateway.stderr() + gateway.stdout(), /unhandled|uncaught|internal_error/i);
}

type Fields = Record<string, unknown>;

/** A 200 with a JSON object. */
function shown(answer: Answer): Fields {
  assert.equal(answer.status, 200, answer.text);
  assert.match(answer.headers.get("content-type") ?? "", /^application\/json/);
  assert.match(answer.headers.get("x-request-id") ?? "", /^[a-z0-9-]{16,36}$/);
  return answer.json();
}

function keysOf(value: unknown): string[] {
  assert(typeof value === "object" && value !== null);
  return Object.keys(value).toSorted();
}

function words(text: string): string[] {
  return text.split(" ").toSorted();
}

/** What stands in the log under this message. */
function logged(gateway: Gateway, msg: RegExp): Fields[] {
  return gateway
    .stdout()
    .split("\n")
    .filter((line) => line.startsWith("{"))
    .map((line) => JSON.parse(line) as Fields)
    .filter((line) => msg.test(String(line["msg"])));
}

async function servedBy({ url }: Operated, times: number): Promise<Set<string | null>> {
  const answers = await Promise.all(Array.from({ length: times }, () => openaiChat(url)));
  for (const answer of answers) assert.equal(answer.status, 200, answer.text);
  return new Set(answers.map(({ headers }) => headers.get("x-tidegate-backend")));
}

const BACKEND = "id kind url health reason checkedAt drained weight concurrency gpu";

describe("GET snapshot", () => {
  it("is the fleet as the last probes saw it, and no secret", TIMEOUT, async () => {
    await operating(
      {
        a: { models: ["m", "n"], backend: { apiKey: "secret", weight: 2, concurrency: 3 } },
        o: { kind: "ollama", models: ["llama3:8b"] },
      },
      { models: { m: { aliases: ["x"], fallback: "n", concurrency: 5 } } },
      async ({ admin, gateway }) => {
        const answer = await admin("snapshot");
        const body = shown(answer);
        assert(!answer.text.includes("secret"));
        assert.deepEqual(
          keysOf(body),
          words("version publishedAt backends models withheld warnings"),
        );
        assert(Number.isInteger(body["version"]) && (body["version"] as number) >= 1);
        assert(Math.abs(Date.now() - (body["publishedAt"] as number)) < 60_000);
        const [a, o] = body["backends"] as Fields[];
        assert.deepEqual(keysOf(a), words(BACKEND));
        const { url, checkedAt, ...rest } = a ?? {};
        assert.match(String(url), /^http:\/\/127\.0\.0\.1:\d+$/);
        assert(Math.abs(Date.now() - (checkedAt as number)) < 60_000, "Unix milliseconds");
        assert.deepEqual(rest, {
          id: "a",
          kind: "openai",
          health: "healthy",
          reason: "",
          drained: false,
          weight: 2,
          concurrency: 3,
          gpu: null,
        });
        assert.deepEqual([o?.["kind"], o?.["concurrency"]], ["ollama", null]);
        const models = body["models"] as Fields[];
        assert.deepEqual(
          models.map(({ name }) => name),
          ["llama3:8b", "m", "n"],
        );
        const [llama, m] = models;
        assert.deepEqual(
          keysOf(m),
          words("name aliases fallback concurrency contextLength capabilities createdAt targets"),
        );
        assert.deepEqual([m?.["aliases"], m?.["fallback"]], [["x"], ["n"]]);
        const [target] = (llama?.["targets"] ?? []) as Fields[];
        assert.deepEqual(
          keysOf(target),
          words("backend model residency slots sizeBytes vramBytes digest contextLength"),
        );
        assert.deepEqual([target?.["backend"], target?.["model"]], ["o", "llama3:8b"]);
        assert.equal(target?.["residency"], "cold", "an Ollama loads on demand");
        assert.equal(target["slots"], 1);
        const [own] = (m?.["targets"] ?? []) as Fields[];
        assert.deepEqual(
          [own?.["slots"], own?.["residency"], own?.["digest"]],
          [3, "loaded", null],
        );
        const gauge = (state: string) =>
          gateway.metric("tidegate_model_residency", {
            model: "llama3:8b",
            backend_id: "o",
            state,
          });
        assert.deepEqual(await Promise.all(["cold", "loading", "loaded"].map(gauge)), [1, 0, 0]);
      },
    );
  });

  it("has a higher version after a change, and newer probes without one", TIMEOUT, async () => {
    await operating(
      { a: { models: model, backend: { healthInterval: 100 } } },
      {},
      async ({ admin, engines }) => {
        const read = async () => shown(await admin("snapshot"));
        const checkedAt = ({ backends }: Fields) => (backends as Fields[])[0]?.["checkedAt"];
        const before = await read();
        assert(await until(async () => checkedAt(await read()) !== checkedAt(before)));
        const same = await read();
        assert.deepEqual(
          [same["version"], same["publishedAt"]],
          [before["version"], before["publishedAt"]],
        );
        engines["a"]?.setModels(["test-model", "another"]);
        assert(await until(async () => (await read())["version"] !== before["version"]));
        const after = await read();
        assert((after["version"] as number) > (before["version"] as number));
        assert.equal((after["models"] as Fields[]).length, 2);
      },
    );
  });
});

describe("GET backends", () => {
  const figures = "inFlight queued slots breaker ttftMs tokensPerSecond lastError";

  it("is each backend and how it is doing", TIMEOUT, async () => {
    await operating(
      { a: { models: model, backend: { concurrency: 1 } } },
      {},
      async ({ admin, engines, url }) => {
        const read = async () => {
          const answer = await admin("backends");
          assert.equal(answer.status, 200);
          const [only, ...others] = answer.json() as unknown as Fields[];
          assert.deepEqual(others, []);
          assert.deepEqual(keysOf(only), words(`${BACKEND} ${figures}`));
          return only ?? {};
        };
        const closed = (failures: number) => ({ state: "closed", failures, untilAt: null });
        const { inFlight, queued, slots, breaker, ttftMs, tokensPerSecond, lastError } =
          await read();
        assert.deepEqual([inFlight, queued, slots], [0, 0, 1]);
        assert.deepEqual(breaker, closed(0));
        assert.deepEqual(ttftMs, { p50: null, p95: null, p99: null });
        assert.deepEqual([tokensPerSecond, lastError], [null, null]);

        engines["a"]?.behave({ tokens: 12, tokenDelayMs: 50 });
        const running = await open(`${url}/v1/chat/completions`, chatBody({ stream: true }));
        const waiting = openaiChat(url);
        assert(await until(async () => (await read())["queued"] === 1));
        assert.equal((await read())["inFlight"], 1);
        for await (const event of readEvents(running)) void event;
        assert.equal((await waiting).status, 200);
        assert(await until(async () => (await read())["inFlight"] === 0));
        const after = await read();
        const percentiles = after["ttftMs"] as Record<string, number>;
        assert.deepEqual(Object.keys(percentiles), ["p50", "p95", "p99"]);
        assert(
          Object.values(percentiles).every((each) => each >= 0),
          "the one stream",
        );
        assert((after["tokensPerSecond"] as number) > 0);

        engines["a"]?.behave({ fault: { kind: "drop", by: "reset" } });
        const before = Date.now();
        assert.equal((await openaiChat(url)).status, 502);
        const failed = await read();
        assert.deepEqual(failed["breaker"], closed(1));
        const { at, code } = failed["lastError"] as { at: number; code: string };
        assert.equal(code, "upstream_unreachable");
        assert(at >= before && at <= Date.now(), "Unix milliseconds");
        engines["a"]?.behave({ fault: null });
        assert.equal((await openaiChat(url)).status, 200);
        const recovered = await read();
        assert.deepEqual(recovered["breaker"], closed(0));
        assert.equal((recovered["lastError"] as Fields)["code"], "upstream_unreachable");
      },
    );
  });
});

describe("GET tenants", () => {
  it("is each tenant, `default` too, and what it uses", TIMEOUT, async () => {
    const tenants = {
      team: {
        weight: 3,
        priority: "batch",
        requestsPerMinute: 60,
        budgets: [
          { tokens: 5000, window: "1h" },
          { tokens: 90_000, window: "day" },
        ],
      },
    };
    const auth = { keys: [{ key: "team's", tenant: "team" }, { key: "anybody's" }] };
    await operating(
      { a: { models: model } },
      { tenants, auth },
      async ({ admin, engines, url }) => {
        const read = async () => {
          const answer = await admin("tenants");
          assert.equal(answer.status, 200);
          assert(!answer.text.includes("team's"), "no key");
          const list = answer.json() as unknown as Fields[];
          assert.deepEqual(
            list.map(({ id }) => id),
            ["default", "team"],
          );
          for (const each of list) {
            const keys = "id weight priority inFlight queued requests tokens budgets";
            assert.deepEqual(keysOf(each), words(keys));
            assert.deepEqual(keysOf(each["tokens"]), words("input output estimated"));
          }
          return list as [Fields, Fields];
        };
        const nothing = { input: 0, output: 0, estimated: 0 };
        const idle = { inFlight: 0, queued: 0, requests: 0, tokens: nothing };
        const [anybody, team] = await read();
        const plain = { id: "default", weight: 1, priority: "default", ...idle, budgets: [] };
        assert.deepEqual(anybody, plain);
        const { budgets, ...rest } = team;
        assert.deepEqual(rest, { id: "team", weight: 3, priority: "batch", ...idle });
        const [hour, day] = budgets as [Fields, Fields];
        assert.deepEqual(keysOf(hour), words("window limit used reserved resetAt"));
        assert.deepEqual(
          [hour["window"], hour["limit"], hour["used"], hour["reserved"]],
          ["1h", 5000, 0, 0],
        );
        assert(Math.abs((hour["resetAt"] as number) - Date.now()) < 60_000, "nothing to wait for");
        const midnight = Math.ceil(Date.now() / 86_400_000) * 86_400_000;
        assert(Math.abs((day["resetAt"] as number) - midnight) <= 2, "Unix milliseconds");

        engines["a"]?.behave({ promptTokens: 500, tokens: 500, headersDelayMs: Infinity });
        const by = (key: string) => ({ headers: { authorization: `Bearer ${key}` } });
        const answers = [openaiChat(url, {}, by("team's")), openaiChat(url, {}, by("anybody's"))];
        assert(await until(async () => (await read())[1]["inFlight"] === 1));
        const [running] = (await read())[1]["budgets"] as [Fields];
        assert((running["reserved"] as number) > 0);
        assert(await until(async () => (await read())[0]["inFlight"] === 1));
        engines["a"]?.release();
        for (const answer of await Promise.all(answers)) assert.equal(answer.status, 200);
        const [theirs, ours] = await read();
        const tokens = { input: 500, output: 500, estimated: 0 };
        for (const each of [theirs, ours]) {
          assert.deepEqual([each["requests"], each["tokens"]], [1, tokens]);
          assert.equal(each["inFlight"], 0);
        }
        const [settled] = ours["budgets"] as [Fields];
        assert.equal(settled["reserved"], 0);
        const used = settled["used"] as number;
        assert(used > 980 && used <= 1000, `${used}`);
        // A fifth of the hour's budget is a fifth of an hour.
        assert(Math.abs((settled["resetAt"] as number) - Date.now() - used * 720) < 2000);
      },
    );
  });
});

describe("drain and resume", () => {
  const two = {
    a: { models: model, backend: { concurrency: 1 } },
    b: { models: model, backend: { concurrency: 1 } },
  };

  it("answer with the backend, and are seen in /ready and in the log", TIMEOUT, async () => {
    await operating(two, {}, async (operated) => {
      const { admin, gateway, url } = operated;
      const drained = async () => {
        const { ready, backends } = (await send(`${url}/ready`)).json();
        assert.equal(ready, true, "readiness is not the backends' state");
        return (backends as Fields[]).map((each) => each["drained"]);
      };
      const out = shown(await admin("backends/a/drain", ""));
      assert.deepEqual(
        keysOf(out),
        words(`${BACKEND} inFlight queued slots breaker ttftMs tokensPerSecond lastError`),
      );
      assert.deepEqual([out["id"], out["drained"]], ["a", true]);
      assert.equal(shown(await admin("backends/a/drain", ""))["drained"], true, "twice is once");
      assert.deepEqual(await drained(), [true, false]);
      assert.deepEqual(await servedBy(operated, 8), new Set(["b"]));
      assert.equal(shown(await admin("backends/a/resume", ""))["drained"], false);
      assert.deepEqual(await drained(), [false, false]);
      assert.deepEqual(await servedBy(operated, 8), new Set(["a", "b"]));
      const lines = logged(gateway, /^backend (drained|resumed) by hand$/);
      assert.deepEqual(
        [lines[0], lines.at(-1)].map((line) => [line?.["msg"], line?.["backend_id"]]),
        [
          ["backend drained by hand", "a"],
          ["backend resumed by hand", "a"],
        ],
      );
    });
  });

  it("let what streams finish, and send what waits elsewhere", TIMEOUT, async () => {
    await operating(two, {}, async ({ admin, engines, url }) => {
      for (const engine of Object.values(engines)) engine.behave({ tokens: 30, tokenDelayMs: 100 });
      const streams = await Promise.all(
        [1, 2].map(() => open(`${url}/v1/chat/completions`, chatBody({ stream: true }))),
      );
      const on = streams.map(({ headers }) => headers.get("x-tidegate-backend"));
      assert.deepEqual(new Set(on), new Set(["a", "b"]));
      for (const engine of Object.values(engines)) engine.behave({ tokenDelayMs: 0 });
      const backends = async () => (await admin("backends")).json() as unknown as Fields[];
      const waiting = [openaiChat(url), openaiChat(url), openaiChat(url)];
      const queued = async () =>
        (await backends()).reduce((sum, each) => sum + (each["queued"] as number), 0);
      assert(await until(async () => (await queued()) === 3));
      const a = shown(await admin("backends/a/drain", ""));
      assert.deepEqual([a["inFlight"], a["queued"]], [1, 0]);
      const ends = streams.map(async (stream) => {
        const events: (string | null)[] = [];
        for await (const { data } of readEvents(stream)) events.push(data);
        return [events.length > 30, events.at(-1)];
      });
      assert.deepEqual(await Promise.all(ends), [
        [true, "[DONE]"],
        [true, "[DONE]"],
      ]);
      for (const answer of await Promise.all(waiting)) {
        assert.equal(answer.status, 200, answer.text);
        assert.equal(answer.headers.get("x-tidegate-backend"), "b");
      }
      assert.equal(engines["a"]?.inference().length, 1);
    });
  });

  it("hold over a reload", TIMEOUT, async () => {
    await operating(two, {}, async (operated) => {
      const { admin, backends, rewrite } = operated;
      await admin("backends/a/drain", "");
      await rewrite({ backends: backends.map((each) => ({ ...each, weight: 3 })) });
      const { version } = shown(await admin("reload", ""));
      const { backends: now, version: later } = shown(await admin("snapshot"));
      assert.equal(version, later);
      assert.deepEqual(
        (now as Fields[]).map(({ id, drained, weight }) => [id, drained, weight]),
        [
          ["a", true, 3],
          ["b", false, 3],
        ],
      );
      assert.deepEqual(await servedBy(operated, 4), new Set(["b"]));
    });
  });

  it("leave nobody to serve when all are out: 503 that says so", TIMEOUT, async () => {
    await operating(two, {}, async ({ admin, engines, url }) => {
      for (const id of ["a", "b"]) await admin(`backends/${id}/drain`, "");
      for (const stream of [false, true]) {
        const answer = await openaiChat(url, { stream });
        const { message } = expectError(answer, 503, "no_backend_available");
        assert.match(message, /drained/);
        assert(Number(answer.headers.get("retry-after")) >= 1);
      }
      assert.equal(engines["a"]?.inference().length, 0);
      await admin("backends/b/resume", "");
      assert.equal((await openaiChat(url)).headers.get("x-tidegate-backend"), "b");
    });
  });

  it("know an id in any writing, and say which there are", TIMEOUT, async () => {
    const odd = { "gpu/1@rack:2 ü": { models: model } };
    await operating(odd, {}, async ({ admin }) => {
      const [id] = Object.keys(odd);
      const path = `backends/${encodeURIComponent(id ?? "")}`;
      assert.equal(shown(await admin(`${path}/drain`, ""))["id"], id);
      assert.equal(shown(await admin(`${path}/resume`, ""))["drained"], false);
      for (const verb of ["drain", "resume"]) {
        const unknown = await admin(`backends/nobody/${verb}`, "");
        assert.match(expectError(unknown, 404, "unknown_url").message, /"nobody".*gpu\/1@rack:2 ü/);
      }
      const close = await admin("backends/gpu%2F1@rack:2/drain", "");
      assert.match(expectError(close, 404).message, /did you mean "gpu\/1@rack:2 ü"\?/);
    });
  });
});

describe("POST reload", () => {
  it("swaps in the file as it stands, and says what has changed", TIMEOUT, async () => {
    await operating(
      { a: { models: ["m"] }, b: { models: ["n"] }, c: { models: ["o"] }, d: { models: ["p"] } },
      { queue: { maxLength: 5 } },
      async ({ admin, gateway, url, backends, rewrite }) => {
        const [a, b, c, d] = backends;
        await rewrite({ backends: [a, b, c] });
        shown(await admin("reload", ""));
        await rewrite({
          backends: [a, { ...b, weight: 4 }, d],
          queue: { maxLength: 6 },
          server: { port: 1 },
        });
        const before = shown(await admin("snapshot"))["version"] as number;
        const body = shown(await admin("reload", ""));
        assert.deepEqual(keysOf(body), words("version changes restart backends"));
        assert((body["version"] as number) > before);
        assert.deepEqual(body["restart"], ["server.port"]);
        assert.deepEqual(body["backends"], [
          { id: "a", action: "kept" },
          { id: "b", action: "changed" },
          { id: "d", action: "added" },
          { id: "c", action: "removed" },
        ]);
        const changes = body["changes"] as { path: string; from: unknown; to: unknown }[];
        for (const change of changes) assert.deepEqual(keysOf(change), words("path from to"));
        const byPath = new Map(changes.map(({ path, from, to }) => [path, [from, to]]));
        assert.deepEqual(byPath.get("queue.maxLength"), [512, 6]);
        assert.deepEqual(byPath.get("backends[b].weight"), [1, 4]);
        assert.deepEqual(byPath.get("server.port"), [0, 1]);
        assert.deepEqual(byPath.get("backends[d].id"), [null, "d"]);
        assert.deepEqual(byPath.get("backends[c].id"), ["c", null]);
        const { data } = (await send(`${url}/v1/models`)).json() as { data: { id: string }[] };
        assert.deepEqual(
          data.map(({ id }) => id),
          ["m", "n", "p"],
          "a new backend's models are there at once",
        );
        assert.equal(
          await gateway.metric("tidegate_config_reloads_total", { result: "success" }),
          2,
        );
        assert.equal(await gateway.metric("tidegate_config_last_reload_success"), 1);
        const [, line] = logged(gateway, /^configuration reloaded$/);
        assert.deepEqual([line?.["trigger"], line?.["changes"]], ["api", changes]);
      },
    );
  });

  it(
    "refuses a file with mistakes: every one of them, and nothing has changed",
    TIMEOUT,
    async () => {
      await operating({ a: { models: model } }, {}, async (operated) => {
        const { admin, gateway, rewrite, backends } = operated;
        const before = shown(await admin("snapshot"));
        const apiKey = 7;
        await rewrite({
          backends: [
            { ...backends[0], weigth: 2, apiKey },
            { id: "a", kind: "vlm", url: "x" },
          ],
          queue: { maxLength: 0 },
        });
        const answer = await admin("reload", "");
        assert.equal(answer.status, 400, answer.text);
        const { error, ...beside } = answer.json() as { error: Fields & { errors: Fields[] } };
        assert.deepEqual(beside, {});
        assert.deepEqual(keysOf(error), words("message type param code errors"));
        assert.deepEqual(
          [error["code"], error["type"]],
          ["invalid_config", "invalid_request_error"],
        );
        for (const each of error.errors) {
          assert.deepEqual(keysOf(each), words("path value expected suggestion"));
        }
        const mistakes = new Map(error.errors.map((each) => [each["path"], each]));
        assert.equal(mistakes.get("backends[0].weigth")?.["suggestion"], "weight");
        assert.equal(mistakes.get("backends[1].kind")?.["value"], "vlm");
        assert(mistakes.has("queue.maxLength") && mistakes.has("backends[1].id"));
        assert.deepEqual(shown(await admin("snapshot"))["version"], before["version"]);
        assert.deepEqual(await servedBy(operated, 1), new Set(["a"]));
        assert.equal(
          await gateway.metric("tidegate_config_reloads_total", { result: "failure" }),
          1,
        );
        assert.equal(await gateway.metric("tidegate_config_last_reload_success"), 0);
        const { lastReload } = shown(await admin("config")) as { lastReload: Fields };
        assert.deepEqual(keysOf(lastReload), words("at ok changes errors"));
        assert.equal(lastReload["ok"], false);
        assert.deepEqual(lastReload["errors"], error.errors);
        await rewrite({ backends });
        shown(await admin("reload", ""));
        assert.equal(await gateway.metric("tidegate_config_last_reload_success"), 1);
      });
    },
  );

  it("with dry_run compares the body and changes nothing", TIMEOUT, async () => {
    await operating({ a: { models: model } }, {}, async (operated) => {
      const { admin, gateway, backends } = operated;
      const before = shown(await admin("snapshot"));
      const dry = (body: unknown) => admin("reload?dry_run=true", body);
      const body = shown(
        await dry({
          server: { port: 9 },
          backends: [
            { ...backends[0], weight: 2 },
            { id: "b", url: "http://127.0.0.1:9" },
          ],
          queue: { maxLength: 6 },
        }),
      );
      assert.deepEqual(keysOf(body), words("version changes restart backends"));
      assert.equal(body["version"], before["version"]);
      assert.deepEqual(body["restart"], ["server.port"]);
      assert.deepEqual(body["backends"], [
        { id: "a", action: "changed" },
        { id: "b", action: "added" },
      ]);
      const paths = (body["changes"] as Fields[]).map(({ path }) => path);
      assert(paths.includes("queue.maxLength") && paths.includes("backends[a].weight"));
      const wrong = await dry({ queue: { maxLength: 0 } });
      assert.equal((wrong.json()["error"] as Fields)["code"], "invalid_config", wrong.text);
      for (const none of ["", "no json", "{", "queue: {}"]) {
        expectError(await dry(none), 400, "invalid_json");
      }
      for (const other of ["null", "[]", '"text"', "7"]) {
        const answer = await dry(other);
        assert.equal(answer.status, 400, other);
        assert.equal((answer.json()["error"] as Fields)["code"], "invalid_config", other);
      }
      const { param } = expectError(
        await admin("reload?dry_run=maybe", ""),
        400,
        "invalid_parameter",
      );
      assert.equal(param, "dry_run");
      assert.deepEqual(shown(await admin("snapshot"))["version"], before["version"]);
      const { lastReload } = shown(await admin("config"));
      assert.equal(lastReload, null);
      assert.equal(await gateway.metric("tidegate_config_reloads_total"), 0);
      assert.equal(shown(await admin("reload?dry_run=false", ""))["version"], before["version"]);
      assert.equal(await gateway.metric("tidegate_config_reloads_total"), 1);
    });
  });

  it(
    "leaves traces as the newest configuration says, however quickly they follow",
    TIMEOUT,
    async () => {
      let exports = 0;
      const collector = createServer((call, response) => {
        exports++;
        call.resume();
        response.end();
      });
      await new Promise<void>((resolve) => collector.listen(0, "127.0.0.1", resolve));
      const otlpEndpoint = `http://127.0.0.1:${(collector.address() as AddressInfo).port}`;
      await operating(
        { a: { models: model } },
        {},
        async ({ admin, url, backends, rewrite, gateway }) => {
          const to = (telemetry: object) => rewrite({ backends, telemetry });
          await to({ otlpEndpoint });
          shown(await admin("reload", ""));
          await to({});
          shown(await admin("reload", ""));
          // What loads the exporter, for the first of the two, has come to its end by then.
          await sleep(2000);
          assert.equal((await openaiChat(url)).status, 200);
          await to({ otlpEndpoint });
          shown(await admin("reload", ""));
          await sleep(2000);
          assert.equal(exports, 0);
          assert.equal((await openaiChat(url)).status, 200);
          await gateway.stop();
          assert.equal(exports, 1, "what is left is exported at the end");
        },
      );
      collector.close();
      collector.closeAllConnections();
    },
  );

  it("by SIGHUP does the same", TIMEOUT, async () => {
    await operating({ a: { models: model } }, {}, async ({ admin, gateway, rewrite, backends }) => {
      await rewrite({ backends, queue: { maxLength: 6 } });
      gateway.kill("SIGHUP");
      const last = async () => shown(await admin("config"))["lastReload"] as Fields | null;
      assert(await until(async () => (await last()) !== null));
      const { at, ...rest } = (await last()) ?? {};
      assert(Math.abs(Date.now() - (at as number)) < 60_000);
      const changes = [{ path: "queue.maxLength", from: 512, to: 6 }];
      assert.deepEqual(rest, { ok: true, changes, errors: [] });
    });
  });
});

describe("GET config", () => {
  it("is every value with where it came from, and no secret", TIMEOUT, async () => {
    await operating(
      { a: { models: model, backend: { apiKey: "secret-of-a" } } },
      {
        auth: { keys: [{ key: "secret-of-tenant" }] },
        admin: { key: "secret-of-admin" },
        telemetry: { serviceName: "mine" },
      },
      async ({ admin }) => {
        const headers = { "x-api-key": "secret-of-admin" };
        const answer = await admin("config", undefined, { headers });
        const body = shown(answer);
        assert.deepEqual(keysOf(body), words("values lastReload"));
        assert.equal(body["lastReload"], null, "there has been none");
        assert(!/secret-of/.test(answer.text));
        const values = body["values"] as { path: string; value: unknown; origin: string }[];
        for (const value of values) assert.deepEqual(keysOf(value), words("path value origin"));
        const of = (path: string) => {
          const found = values.filter((value) => value.path === path);
          assert.equal(found.length, 1, path);
          return [found[0]?.value, found[0]?.origin];
        };
        assert.deepEqual(of("server.port"), [0, "file"]);
        assert.deepEqual(of("server.logLevel"), ["debug", "flag"]);
        assert.deepEqual(of("queue.heartbeatMs"), [777, "environment"]);
        assert.deepEqual(of("queue.maxLength"), [512, "default"]);
        assert.deepEqual(of("telemetry.serviceName"), ["mine", "file"]);
        assert.deepEqual(of("backends[a].apiKey"), ["***", "file"]);
        assert.deepEqual(of("backends[a].weight"), [1, "default"]);
        assert.deepEqual(of("admin.key"), ["***", "file"]);
        assert.deepEqual(of("auth.keys[0].tenant"), ["default", "default"]);
        const keys = values.filter(({ path }) => /^auth\.keys.*(?<!tenant)$/.test(path));
        assert(keys.length > 0 && keys.every(({ value }) => value === "***"));
      },
      { args: ["--log-level", "debug"], env: { TIDEGATE_QUEUE_HEARTBEAT_MS: "777" } },
    );
  });

  it("has what was discovered where no backends are named", TIMEOUT, async () => {
    await operating({}, { backends: [] }, async ({ admin }) => {
      const { values } = shown(await admin("config")) as { values: Fields[] };
      const backends = values.filter(({ path }) => String(path).startsWith("backends"));
      assert(backends.some(({ path }) => /^backends\[.+\]\.kind$/.test(String(path))));
      assert(backends.every(({ origin }) => origin === "discovered"));
    });
  });
});

describe("what is not there", () => {
  it("404 below /admin, 405 for another method", TIMEOUT, async () => {
    await operating({ a: { models: model } }, {}, async ({ admin, url }) => {
      for (const path of ["", "nothing", "backends/a", "backends/a/explode", "snapshot/x"]) {
        expectError(await admin(path), 404, "unknown_url");
      }
      expectError(await send(`${url}/admin/else`), 404, "unknown_url");
      for (const [path, allow] of [
        ["snapshot", "GET, HEAD"],
        ["backends", "GET, HEAD"],
        ["config", "GET, HEAD"],
        ["tenants", "GET, HEAD"],
        ["reload", "POST"],
        ["backends/a/drain", "POST"],
        ["backends/a/resume", "POST"],
      ] as const) {
        for (const method of ["DELETE", "PUT", allow === "POST" ? "GET" : "POST"]) {
          const answer = await admin(path, undefined, { method });
          expectError(answer, 405, "method_not_allowed");
          assert.equal(answer.headers.get("allow"), allow, path);
        }
      }
    });
  });

  it(
    "is all of it where admin.enabled is false, until a reload says otherwise",
    TIMEOUT,
    async () => {
      await operating(
        { a: { models: model } },
        { admin: { enabled: false, key: "operator" } },
        async ({ admin, gateway, rewrite, backends }) => {
          for (const headers of [
            {},
            { "x-api-key": "operator" },
            { "x-forwarded-for": "1.2.3.4" },
          ]) {
            for (const path of ["snapshot", "backends", "config", "tenants", "nothing"]) {
              expectError(await admin(path, undefined, { headers }), 404, "unknown_url");
            }
            for (const path of ["reload", "backends/a/drain"]) {
              expectError(await admin(path, "", { headers }), 404, "unknown_url");
            }
          }
          await rewrite({ backends });
          gateway.kill("SIGHUP");
          assert(await until(async () => (await admin("snapshot")).status === 200));
          assert.equal(shown(await admin("snapshot"))["version"], 1, "nobody was drained");
          await rewrite({ backends, admin: { enabled: false } });
          shown(await admin("reload", ""));
          expectError(await admin("snapshot"), 404, "unknown_url");
        },
      );
    },
  );
});

const PATHS = ["snapshot", "backends", "config", "tenants"];
const DEEDS = ["backends/a/drain", "backends/a/resume", "reload"];

describe("who may, with admin.key", () => {
  it("whoever has it, and no tenant", TIMEOUT, async () => {
    await operating(
      { a: { models: model } },
      { admin: { key: "operator" }, auth: { keys: [{ key: "tenant" }] } },
      async ({ admin, url, gateway }) => {
        const everywhere = async (headers: Record<string, string>) => {
          const all = PATHS.map((path) => admin(path, undefined, { headers }));
          return Promise.all([...all, ...DEEDS.map((path) => admin(path, "", { headers }))]);
        };
        for (const headers of [
          {},
          { authorization: "Bearer tenant" },
          { "x-api-key": "tenant" },
          { authorization: "Bearer operator2" },
          { authorization: "Basic operator" },
        ]) {
          for (const answer of await everywhere(headers)) {
            expectError(answer, 401, "invalid_api_key");
            assert(!answer.text.includes("operator2"));
          }
        }
        assert.equal(await gateway.metric("tidegate_config_reloads_total"), 0);
        for (const headers of [
          { authorization: "Bearer operator" },
          { "x-api-key": "operator" },
          { "x-api-key": "operator", "x-forwarded-for": "203.0.113.9" },
          { "x-api-key": "operator", origin: url },
        ]) {
          for (const answer of await everywhere(headers)) assert.equal(answer.status, 200);
        }
        const foreign = { "x-api-key": "operator", origin: "http://localhost:3000" };
        for (const answer of await everywhere(foreign)) {
          expectError(answer, 403, "origin_not_allowed");
        }
        // And the operator is no tenant.
        expectError(await openaiChat(url, {}, { headers: { "x-api-key": "operator" } }), 401);
        assert.equal(
          (await openaiChat(url, {}, { headers: { "x-api-key": "tenant" } })).status,
          200,
        );
      },
    );
  });

  it("goes by the key that is in effect", TIMEOUT, async () => {
    await operating({ a: { models: model } }, {}, async ({ admin, rewrite, backends }) => {
      assert.equal((await admin("snapshot")).status, 200);
      await rewrite({ backends, admin: { key: "new" } });
      const body = shown(await admin("reload", ""));
      assert.deepEqual(
        (body["changes"] as Fields[]).map(({ path, from, to }) => [path, from, to]),
        [["admin.key", null, "***"]],
      );
      expectError(await admin("snapshot"), 401, "invalid_api_key");
      const headers = { authorization: "Bearer new" };
      assert.equal((await admin("snapshot", undefined, { headers })).status, 200);
    });
  });
});

describe("who may, without one", () => {
  it(
    "only callers on this machine that nobody forwarded, and no page of another origin",
    TIMEOUT,
    async () => {
      await operating(
        { a: { models: model } },
        { server: { port: 0, allowedOrigins: ["*"], allowedHosts: ["llm.example"] } },
        async ({ admin, gateway, url }) => {
          const wanted: [headers: Record<string, string>, status: number][] = [
            [{}, 200],
            [{ "x-api-key": "whatever" }, 200],
            [{ origin: url }, 200],
            [{ "x-forwarded-for": "127.0.0.1" }, 403],
            [{ forwarded: "for=127.0.0.1" }, 403],
            [{ origin: "http://localhost:3000" }, 403],
            [{ origin: "http://evil.example" }, 403],
            [{ origin: "null" }, 403],
            [{ origin: "app://obsidian.md" }, 403],
          ];
          for (const [headers, status] of wanted) {
            for (const path of PATHS) {
              const answer = await admin(path, undefined, { headers });
              assert.equal(answer.status, status, JSON.stringify(headers));
              if (status === 403) {
                expectError(answer, 403);
                assert.equal(answer.headers.get("access-control-allow-origin"), null);
              }
            }
            for (const path of DEEDS) {
              assert.equal(
                (await admin(path, "", { headers })).status,
                status,
                JSON.stringify(headers),
              );
            }
          }
          const preflight = await admin("reload", undefined, {
            method: "OPTIONS",
            headers: { origin: "http://evil.example", "access-control-request-method": "POST" },
          });
          assert.equal(preflight.status, 403);
          assert.equal(preflight.headers.get("access-control-allow-origin"), null);
          for (const [host, status] of [
            ["localhost", 200],
            [`127.0.0.1:${gateway.port}`, 200],
            [`[::1]:${gateway.port}`, 200],
            ["llm.example", 403],
            ["localhost.evil.example", 403],
          ] as const) {
            const client = await connect(gateway.port);
            client.write(
              `GET /admin/api/snapshot HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n\r\n`,
            );
            assert(await until(() => client.status() !== null));
            assert.equal(client.status(), status, host);
            client.leave("close");
          }
        },
      );
    },
  );

  it("nobody from another address, though the gateway listens there", TIMEOUT, async () => {
    const address = Object.values(networkInterfaces())
      .flat()
      .find((each) => each?.family === "IPv4" && !each.internal)?.address;
    if (address === undefined) return console.log("skipped: no address but loopback");
    await operating(
      { a: { models: model } },
      { server: { port: 0, host: "0.0.0.0", insecure: true } },
      async ({ admin, gateway }) => {
        assert.equal((await admin("snapshot")).status, 200);
        const status = await new Promise((resolve, reject) => {
          const there = { host: address, port: gateway.port, path: "/admin/api/snapshot" };
          const call = request({ ...there, headers: { host: "localhost" } }, (response) => {
            response.resume();
            resolve(response.statusCode);
          });
          call.on("error", reject).end();
        });
        assert.equal(status, 403);
      },
    );
  });
});
