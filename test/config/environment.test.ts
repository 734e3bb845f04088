/** Environment variables: one for every single value outside lists and maps (contract §1). */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { variableOf, type Environment } from "../../src/settings/environment.ts";
import { ConfigError, settle, type Flags, type Settings } from "../../src/settings/load.ts";
import { configShape, scalarPaths, shapesAt, type Shape } from "../../src/settings/shape.ts";

function settled(environment: Environment, file: object = {}, flags: Flags = {}): Settings {
  return settle(file, "test", { flags, environment, directory: "/" });
}

function mistaken(environment: Environment, file: object = {}, flags: Flags = {}): ConfigError {
  try {
    settled(environment, file, flags);
  } catch (error) {
    assert(error instanceof ConfigError, String(error));
    return error;
  }
  return assert.fail("was accepted");
}

function at(value: unknown, path: readonly string[]): unknown {
  return path.reduce((tree, key) => (tree as Record<string, unknown> | undefined)?.[key], value);
}

/** `{ a: { b: value } }` for `["a", "b"]`. */
function under([key = "", ...rest]: readonly string[], value: unknown): Record<string, unknown> {
  return { [key]: rest.length === 0 ? value : under(rest, value) };
}

interface Example {
  text: string;
  value: unknown;
  /** What the file says instead. */
  other: unknown;
  bad: string;
}

/** A value that is not the default, as text and as what it has to become; another; and one that is wrong. */
function exampleFor(path: readonly string[], shape: Shape): Example {
  if (shape.enum !== undefined) {
    const [value = "", other] = shape.enum.filter((each) => each !== shape.default);
    return { text: value, value, other, bad: "loud" };
  }
  if (shape.type === "boolean") {
    const value = shape.default === false;
    return { text: String(value), value, other: !value, bad: "yes" };
  }
  const isInteger = (shape.anyOf ?? [shape]).some(({ type }) => type === "integer");
  if (isInteger) return { text: "4321", value: 4321, other: 1234, bad: "12s" };
  if (shape.type === "number") return { text: "0.25", value: 0.25, other: 0.75, bad: "half" };
  const isUrl = (shape as { format?: string }).format === "uri";
  if (isUrl && path[0] === "redis") {
    return { text: "redis://a:1", value: "redis://a:1", other: "rediss://b:2", bad: "http://a" };
  }
  if (isUrl) return { text: "http://a:1", value: "http://a:1", other: "http://b:2", bad: "a" };
  const isPath = path.at(-1) === "endpoint";
  if (isPath) return { text: "/here", value: "/here", other: "/there", bad: "here" };
  return { text: "127.0.0.9", value: "127.0.0.9", other: "localhost", bad: "" };
}

const SCALARS = scalarPaths().map((path) => {
  const [shape = {}] = shapesAt(path);
  return { path, name: path.join("."), variable: variableOf(path), shape };
});

describe("variables", () => {
  it("are named after their keys", () => {
    const names = SCALARS.map(({ variable }) => variable);
    for (const known of [
      "TIDEGATE_SERVER_PORT",
      "TIDEGATE_SERVER_LOG_LEVEL",
      "TIDEGATE_QUEUE_MAX_WAIT_MS",
      "TIDEGATE_TIMEOUTS_FIRST_BYTE_MS",
      "TIDEGATE_CIRCUIT_BREAKER_HALF_OPEN_REQUESTS",
      "TIDEGATE_CACHE_STREAM_CACHE_DISABLED",
      "TIDEGATE_REDIS_TIMEOUT_MS",
      "TIDEGATE_TELEMETRY_OTLP_ENDPOINT",
      "TIDEGATE_ADMIN_KEY",
    ]) {
      assert(names.includes(known), known);
    }
    assert.equal(new Set(names).size, names.length, "no two keys share one");
  });

  it("are there for every single value of every section, and for nothing inside lists and maps", () => {
    const sections = Object.keys(configShape.properties ?? {});
    const lists = ["backends", "models", "auth", "tenants"];
    const wanted = sections.filter((section) => !lists.includes(section));
    assert.deepEqual([...new Set(SCALARS.map(({ path }) => path[0]))], wanted);
    for (const list of ["server.allowedHosts", "metrics.labels", "auth.keys"]) {
      assert(!SCALARS.some(({ name }) => name === list), list);
    }
  });

  for (const { path, name, variable, shape } of SCALARS) {
    const example = exampleFor(path, shape);

    it(`${variable} sets ${name}, over the file and over the default`, () => {
      const fromFile = settled({}, under(path, example.other));
      assert.deepEqual(at(fromFile.config, path), example.other);
      const file = under(path, example.other);
      const { config, values, notes } = settled({ [variable]: example.text }, file);
      assert.strictEqual(at(config, path), example.value);
      const value = values.find((each) => each.path === name);
      assert.equal(value?.origin, "environment");
      assert(!notes.some((note) => note.includes(variable)), "it is no stranger");
      assert.deepEqual(at(settled({ [variable]: "" }, file).config, path), example.other, "empty");
    });

    if (example.bad !== "") {
      it(`${variable}=${example.bad} is a mistake that names it`, () => {
        const [mistake, ...others] = mistaken({ [variable]: example.bad }).mistakes;
        assert.deepEqual([mistake?.path, others], [name, []]);
        assert(mistake?.expected.includes(variable) === true, JSON.stringify(mistake));
      });
    }
  }

  it("are read as what their key takes: a text that looks like a number stays one", () => {
    assert.equal(settled({ TIDEGATE_ADMIN_KEY: "1234" }).config.admin.key, "1234");
    assert.equal(
      settled({ TIDEGATE_TELEMETRY_SERVICE_NAME: "true" }).config.telemetry.serviceName,
      "true",
    );
    assert.equal(settled({ TIDEGATE_ADMIN_ENABLED: "FALSE" }).config.admin.enabled, false);
    for (const text of [" ", "1e", "Infinity", "NaN", "0x", "1,5"]) {
      mistaken({ TIDEGATE_SERVER_PORT: text });
    }
  });

  it("put a section there that the file leaves out", () => {
    const { config } = settled({ TIDEGATE_CACHE_TTL_MS: "1" });
    assert.deepEqual([config.cache.ttlMs, config.cache.maxItems], [1, 1000]);
  });

  it("leave the rest of a section as the file has it", () => {
    const { server } = settled(
      { TIDEGATE_SERVER_PORT: "1" },
      { server: { logLevel: "warn" } },
    ).config;
    assert.deepEqual([server.port, server.logLevel], [1, "warn"]);
  });

  it("that look like ours and are not are said, with a guess", () => {
    const { notes } = settled({
      TIDEGATE_QUEUE_MAXWAIT_MS: "1",
      TIDEGATE_BACKEND: "ollama=http://a",
      TIDEGATE_METRICS_LABELS: "model",
      TIDEGATE_ZZZZZZZZZZZZZZZZ: "1",
      SOMETHING_ELSE: "1",
    });
    assert.equal(notes.length, 4, notes.join("\n"));
    assert.match(
      notes[0] ?? "",
      /TIDEGATE_QUEUE_MAXWAIT_MS.*did you mean TIDEGATE_QUEUE_MAX_WAIT_MS\?/,
    );
    assert.match(notes[1] ?? "", /did you mean TIDEGATE_BACKENDS\?/);
    assert.match(notes[3] ?? "", /^TIDEGATE_ZZZZZZZZZZZZZZZZ: unknown variable, ignored$/);
  });
});

describe("variables that everybody knows", () => {
  const pairs = [
    ["PORT", "TIDEGATE_SERVER_PORT", ["server", "port"], "1", "2"],
    ["REDIS_URL", "TIDEGATE_REDIS_URL", ["redis", "url"], "redis://a", "redis://b"],
    [
      "OTEL_EXPORTER_OTLP_ENDPOINT",
      "TIDEGATE_TELEMETRY_OTLP_ENDPOINT",
      ["telemetry", "otlpEndpoint"],
      "http://a",
      "http://b",
    ],
    [
      "OTEL_SERVICE_NAME",
      "TIDEGATE_TELEMETRY_SERVICE_NAME",
      ["telemetry", "serviceName"],
      "a",
      "b",
    ],
  ] as const;
  for (const [known, own, path, weak, strong] of pairs) {
    it(`${known} counts, and ${own} counts more`, () => {
      const text = (environment: Environment) => String(at(settled(environment).config, path));
      assert.equal(text({ [known]: weak }), weak);
      assert.equal(text({ [known]: weak, [own]: strong }), strong);
      assert.equal(text({ [own]: strong, [known]: weak }), strong);
      assert.equal(text({ [own]: "", [known]: weak }), weak, "an empty one is none");
    });
  }

  it("are named in a mistake, the one that counted", () => {
    const named = (environment: Environment) => mistaken(environment).mistakes[0]?.expected ?? "";
    assert.match(named({ PORT: "http" }), /from PORT\)/);
    assert.match(named({ REDIS_URL: "localhost:6379" }), /redis:\/\/.* from REDIS_URL\)/);
    assert.match(named({ PORT: "1", TIDEGATE_SERVER_PORT: "http" }), /from TIDEGATE_SERVER_PORT\)/);
  });

  it("are not blamed for a flag", () => {
    const [mistake] = mistaken({ PORT: "1" }, {}, { port: 70_000 }).mistakes;
    assert.match(mistake?.expected ?? "", /from --port\)/);
    assert.equal(mistaken({}, { server: { port: -1 } }, { host: "localhost" }).mistakes.length, 1);
  });

  it("are named where the address they set has no guard", () => {
    const [mistake] = mistaken({ TIDEGATE_SERVER_HOST: "0.0.0.0" }).mistakes;
    assert.match(mistake?.expected ?? "", /auth\.keys.*from TIDEGATE_SERVER_HOST\)/);
  });
});

describe("TIDEGATE_BACKENDS", () => {
  const backends = (list: string, file: object = {}) =>
    settled({ TIDEGATE_BACKENDS: list }, file).config.backends.map(({ id, kind, url }) => [
      id,
      kind,
      url,
    ]);

  it("names kinds and URLs; the ids are the kind, then kind-2", () => {
    assert.deepEqual(
      backends(" ollama=http://a:1 , vllm=http://b:2/v1/,vllm=http://c:3,, vllm=https://d "),
      [
        ["ollama", "ollama", "http://a:1"],
        ["vllm", "vllm", "http://b:2"],
        ["vllm-2", "vllm", "http://c:3"],
        ["vllm-3", "vllm", "https://d"],
      ],
    );
  });

  it("finds the kind out where none is named", () => {
    assert.deepEqual(backends("http://a:1,http://b:2"), [
      ["backend", undefined, "http://a:1"],
      ["backend-2", undefined, "http://b:2"],
    ]);
  });

  it("needs no URL for the demo engine", () => {
    assert.deepEqual(backends("demo="), [["demo", "demo", undefined]]);
    assert.match(mistaken({ TIDEGATE_BACKENDS: "vllm=" }).message, /backends\[0\]\.url: missing/);
  });

  it("replaces the file's list, and nothing of that list is left", () => {
    const file = {
      backends: [
        { id: "of-the-file", url: "http://f:1", weight: 7, concurrency: 3 },
        { id: "another", url: "http://f:2" },
      ],
      queue: { maxLength: 9 },
    };
    assert.deepEqual(backends("openai=http://a:1", file), [["openai", "openai", "http://a:1"]]);
    const { config, values } = settled({ TIDEGATE_BACKENDS: "openai=http://a:1" }, file);
    assert.equal(config.queue.maxLength, 9);
    const origins = values
      .filter(({ path }) => path.startsWith("backends"))
      .map(({ path, origin }) => [path, origin]);
    assert.deepEqual(Object.fromEntries(origins), {
      "backends[openai].id": "environment",
      "backends[openai].kind": "environment",
      "backends[openai].url": "environment",
      "backends[openai].allowCloud": "default",
      "backends[openai].weight": "default",
      "backends[openai].healthInterval": "default",
      "backends[openai].timeout": "default",
    });
  });

  it("is named in its mistakes, without a password that stands in it", () => {
    const error = mistaken({ TIDEGATE_BACKENDS: "olama=http://u:sk-secret@a:1,vllm=nowhere" });
    assert.deepEqual(
      error.mistakes.map(({ path }) => path),
      ["backends[0].kind", "backends[0].url", "backends[1].url"],
    );
    for (const { expected } of error.mistakes) assert(expected.includes("TIDEGATE_BACKENDS"));
    assert.equal(error.mistakes[0]?.suggestion, "ollama");
    assert(!error.message.includes("sk-secret"), error.message);
  });
});

describe("precedence", () => {
  const file = { server: { host: "127.0.0.4", port: 3, logLevel: "warn" } };
  const environment = { TIDEGATE_SERVER_HOST: "127.0.0.3", TIDEGATE_SERVER_PORT: "2" };
  const originsOf = ({ values }: Settings) =>
    Object.fromEntries(
      values
        .filter(({ path }) => /^server\.(?:host|port|logLevel|insecure)$/.test(path))
        .map(({ path, value, origin }) => [path, [value, origin]]),
    );

  it("is flag, environment, file, default; each value tells where it comes from", () => {
    assert.deepEqual(originsOf(settled(environment, file, { host: "127.0.0.2" })), {
      "server.host": ["127.0.0.2", "flag"],
      "server.port": [2, "environment"],
      "server.logLevel": ["warn", "file"],
      "server.insecure": [false, "default"],
    });
  });

  it("holds for values that are zero or false, which are values", () => {
    const variables = { TIDEGATE_SERVER_PORT: "0", TIDEGATE_QUEUE_MAX_WAIT_MS: "0" };
    const { config } = settled(variables, { server: { port: 9 }, queue: { maxWaitMs: 9 } });
    assert.deepEqual([config.server.port, config.queue.maxWaitMs], [0, 0]);
    assert.equal(settled({ PORT: "5" }, {}, { port: 0 }).config.server.port, 0);
  });
});
