/** The file: which one is read, in which form, and what is said of one that cannot be. */
import assert from "node:assert/strict";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, it } from "node:test";
import type { Environment } from "../../src/settings/environment.ts";
import type { Settings } from "../../src/settings/load.ts";
import { readConfigFile } from "../../src/settings/read-file.ts";
import { directory, failure, load, loadFrom, paths } from "./support.ts";

describe("the file", () => {
  it("is not needed", async () => {
    const { config, source, environmentKeys, notes } = await load(null);
    assert.equal(source, "defaults");
    assert.equal(config.server.port, 4000);
    assert.deepEqual([config.backends, environmentKeys, notes], [[], [], []]);
  });

  it("is gateway.config.ts, else .json, else .yaml, in the working directory", async () => {
    const ts = "const port: number = 4001;\nexport default { server: { port } };\n";
    const json = { server: { port: 4002 } };
    const yaml = "server:\n  port: 4003\n";
    const found = async (files: Record<string, string | object>) => {
      const { config, source } = await loadFrom({}, {}, await directory(files));
      return [config.server.port, source];
    };
    const [a, b, c] = ["gateway.config.ts", "gateway.config.json", "gateway.config.yaml"] as const;
    assert.deepEqual(await found({ [a]: ts, [b]: json, [c]: yaml }), [4001, a]);
    assert.deepEqual(await found({ [b]: json, [c]: yaml }), [4002, b]);
    assert.deepEqual(await found({ [c]: yaml }), [4003, c]);
  });

  it("is the one that --config names, else the one that TIDEGATE_CONFIG names", async () => {
    const folder = await directory({
      "a.json": { server: { port: 1 } },
      "b.json": { server: { port: 2 } },
      "gateway.config.json": { server: { port: 3 } },
    });
    const environment = { TIDEGATE_CONFIG: "b.json" };
    const byFlag = await loadFrom({ config: "a.json" }, environment, folder);
    assert.deepEqual([byFlag.config.server.port, byFlag.source], [1, "a.json"]);
    const byVariable = await loadFrom({}, environment, folder);
    assert.deepEqual([byVariable.config.server.port, byVariable.source], [2, "b.json"]);
    assert.deepEqual(byVariable.notes, [], "a variable that is known is no stranger");
    const absolute = await loadFrom({ config: join(folder, "a.json") }, {}, "/");
    assert.equal(absolute.config.server.port, 1);
  });

  for (const how of ["flag", "variable"] as const) {
    it(`named by ${how} and missing is an error that names the path`, async () => {
      const folder = await directory({ "gateway.config.json": {} });
      const flags = how === "flag" ? { config: "nowhere.ts" } : {};
      const environment = how === "flag" ? {} : { TIDEGATE_CONFIG: "nowhere.ts" };
      const error = await failure(loadFrom(flags, environment, folder));
      assert(error.message.includes(join(folder, "nowhere.ts")), error.message);
      assert.equal(error.mistakes.length, 1);
    });
  }

  it("of another kind is an error that says which kinds there are", async () => {
    const folder = await directory({ "gateway.toml": "" });
    const error = await failure(loadFrom({ config: "gateway.toml" }, {}, folder));
    assert.match(error.message, /\.ts, \.json or \.yaml/);
  });

  it("that is no object is an error", async () => {
    for (const text of ["[]", "null", "3", '"x"']) {
      assert.deepEqual(paths(await failure(load(text))), [""]);
    }
  });

  it("that nests for ever is a mistake, not the end of the stack", async () => {
    const error = await failure(load(`{"a":${"[".repeat(3000)}${"]".repeat(3000)}}`));
    assert.match(error.message, /nothing nested so deep/);
  });

  it("may lie where paths have to be escaped", async () => {
    const folder = join(await directory(), "a #1 100%25 b");
    await mkdir(folder);
    await writeFile(join(folder, "gateway.config.ts"), "export default { server: { port: 9 } };\n");
    assert.equal((await loadFrom({}, {}, folder)).config.server.port, 9);
  });

  it("is named in the message, with the number of mistakes and a line for each", async () => {
    const error = await failure(load({ server: { prot: 1 }, queue: { maxLength: 0 } }));
    const [head, ...lines] = error.message.split("\n");
    assert.equal(head, "gateway.config.json: 2 mistakes");
    assert.equal(lines.length, 2);
    assert.match(error.message, /server\.prot/);
    assert.match(error.message, /queue\.maxLength/);
    assert.equal(
      (await failure(load({ x: 1 }))).message.split("\n")[0],
      "gateway.config.json: 1 mistake",
    );
  });
});

describe("JSON", () => {
  it("may begin with a byte order mark, and say where its schema is", async () => {
    const text = JSON.stringify({ $schema: "./schema.json", server: { port: 7 } });
    const { config, values } = await load(`\uFEFF${text}`);
    assert.equal(config.server.port, 7);
    assert(!values.some(({ path }) => path.includes("schema")), "it is no value");
  });

  it("that is broken is an error that names the file", async () => {
    const error = await failure(load('{ "server": { "port": 4000 '));
    assert.match(error.message, /gateway\.config\.json: \S+/);
  });

  it("that is broken is not quoted: there may be a key in it", async () => {
    for (const text of [
      '{ "admin": { "key": sk-secret } }',
      '{ "key": "sk-secret" "x" }',
      "sk-secret",
    ]) {
      assert.doesNotMatch((await failure(load(text))).message, /sk-|secret/);
    }
  });
});

describe("TypeScript", () => {
  const name = "gateway.config.ts";
  const ts = (text: string): Promise<Settings> => load(text, { name });

  it("that is broken is an error that says on which line, and quotes none", async () => {
    for (const text of [
      "export default {\n  server: {\n",
      'export default {\n  admin: { key: "sk-secret" port: 1 },\n};\n',
    ]) {
      const { message } = await failure(ts(text));
      assert.match(message, /line 2|config\.ts:2/);
      assert.doesNotMatch(message, /sk-secret/);
    }
  });

  it("that throws is an error with its words", async () => {
    const text = 'throw new Error("the moon is wrong");\nexport default {};\n';
    assert.match((await failure(ts(text))).message, /the moon is wrong/);
    assert.match((await failure(ts('throw "no moon";\n'))).message, /no moon/);
  });

  it("that exports no default is an error: silence would drop every setting in it", async () => {
    const text = "export const config = { server: { port: 1 } };\n";
    assert.match((await failure(ts(text))).message, /default/);
  });

  it("that ends the process does not", async () => {
    const text = 'import process from "node:process";\nprocess.exit(3);\nexport default {};\n';
    assert.match((await failure(ts(text))).message, /ended the thread/);
  });

  for (const [what, text] of [
    ["computes for ever", "for (;;) {}\n"],
    ["waits for ever", "await new Promise(() => setInterval(() => {}, 1000));\n"],
  ] as const) {
    it(`that ${what} is given up`, async () => {
      const folder = await directory({ [name]: `${text}export default {};\n` });
      await assert.rejects(readConfigFile(join(folder, name), 500), /longer than 500 ms/);
    });
  }

  it("may hold plain data only", async () => {
    for (const text of [
      "export default { server: { port: () => 1 } };\n",
      "export default Promise.resolve({}).then;\n",
      "const config: Record<string, unknown> = {};\nconfig.server = config;\nexport default config;\n",
    ]) {
      assert.match((await failure(ts(text))).message, /plain data only/);
    }
  });

  it("is read again together with what it imports", async () => {
    const folder = await directory({
      [name]: 'import { port } from "./port.ts";\nexport default { server: { port } };\n',
      "port.ts": "export const port = 1;\n",
    });
    assert.equal((await loadFrom({}, {}, folder)).config.server.port, 1);
    await writeFile(join(folder, "port.ts"), "export const port = 2;\n");
    assert.equal((await loadFrom({}, {}, folder)).config.server.port, 2);
  });

  it("is read again by itself, while another reading is under way", async () => {
    const folder = await directory({ [name]: "export default { server: { port: 1 } };\n" });
    const first = loadFrom({}, {}, folder);
    assert.equal((await first).config.server.port, 1);
    await writeFile(join(folder, name), "export default { server: { port: 2 } };\n");
    const ports = await Promise.all([loadFrom({}, {}, folder), loadFrom({}, {}, folder)]);
    assert.deepEqual(
      ports.map(({ config }) => config.server.port),
      [2, 2],
    );
  });
});

describe("YAML", () => {
  const yaml = (text: string, environment: Environment = {}): Promise<Settings> =>
    load(text, { name: "gateway.config.yaml", environment });

  it("says what the other forms say", async () => {
    const { config } = await yaml(`
# a comment
server: { port: 7, allowedHosts: [box, "other.lan"] }
backends:
  - id: a
    url: http://127.0.0.1:1
    models:
      - llama3:8b
      - { name: coder, upstream: org/Coder }
models:
  llama3:8b:
    aliases: [default]
queue:
  maxWaitMs: 0
`);
    assert.deepEqual([config.server.port, config.queue.maxWaitMs], [7, 0]);
    assert.deepEqual(config.server.allowedHosts, ["box", "other.lan"]);
    assert.deepEqual(config.backends[0]?.models, [
      "llama3:8b",
      { name: "coder", upstream: "org/Coder" },
    ]);
    assert.deepEqual(config.models["llama3:8b"]?.aliases, ["default"]);
  });

  it("may be called .yml where it is named", async () => {
    const folder = await directory({ "a.yml": "server: { port: 7 }\n" });
    assert.equal((await loadFrom({ config: "a.yml" }, {}, folder)).config.server.port, 7);
  });

  it("takes variables, in quotes or without, also for a number and a boolean", async () => {
    const text = `
server:
  port: \${NOBODY_SET_THIS:-4001}
  insecure: "\${INSECURE}"
  logLevel: \${LEVEL:-warn}
telemetry: { sampling: "\${SHARE}" }
backends:
  - { id: a, url: "http://\${HOST:-127.0.0.1}:\${NUMBER}/v1", apiKey: "\${NUMBER}", weight: "\${SHARE}" }
`;
    const environment = { INSECURE: "true", SHARE: "0.25", NUMBER: "8000" };
    const { server, telemetry, backends } = (await yaml(text, environment)).config;
    assert.deepEqual([server.port, server.insecure, server.logLevel], [4001, true, "warn"]);
    assert.equal(telemetry.sampling, 0.25);
    const [backend] = backends;
    assert.deepEqual([backend?.url, backend?.weight], ["http://127.0.0.1:8000", 0.25]);
    assert.equal(backend?.apiKey, "8000", "what is to be a text stays one");
  });

  it("names what a variable holds that does not fit", async () => {
    const error = await failure(yaml('server: { port: "${P}" }\n', { P: "http" }));
    assert.deepEqual(
      error.mistakes.map(({ path, value }) => [path, value]),
      [["server.port", "http"]],
    );
  });

  it("that is empty, or has nothing but comments, sets nothing", async () => {
    for (const text of ["", "\n\n", "# nothing\n", "---\n", "\uFEFF"]) {
      const { config, source } = await yaml(text);
      assert.deepEqual([config.server.port, source], [4000, "gateway.config.yaml"]);
    }
  });

  it("with a section that has nothing in it is told so", async () => {
    assert.deepEqual(paths(await failure(yaml("server:\n"))), ["server"]);
    const variables = { TIDEGATE_SERVER_PORT: "1" };
    assert.deepEqual(paths(await failure(yaml("server:\n", variables))), ["server"]);
  });

  const broken: [what: string, text: string, words: RegExp][] = [
    ["a key twice", "server:\n  port: 1\n  port: 2\n", /unique at line 3/],
    ["a tab", "server:\n\tport: 1\n", /[Tt]abs .* at line 2/],
    ["two documents", "server: {}\n---\nserver: {}\n", /multiple documents/],
    ["an unknown anchor", "server: *none\n", /alias/],
    ["no end", "server: { port: 1\n", /line/],
    ["itself", "server: &a { port: 1, host: *a }\n", /plain data only/],
  ];
  for (const [what, text, words] of broken) {
    it(`with ${what} is an error in one line`, async () => {
      const { message } = await failure(yaml(text));
      assert.match(message, words);
      assert.equal(message.split("\n").length, 2, message);
    });
  }

  it("that is broken is not quoted: there may be a key in it", async () => {
    const text = "admin:\n  key: sk-secret\n  key: sk-secret\n";
    assert.doesNotMatch((await failure(yaml(text))).message, /sk-secret/);
  });

  it("cannot be made to fill the memory", async () => {
    const lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"];
    for (let at = 1; at < 12; at++) {
      lines.push(`a${at}: &a${at} [${Array.from({ length: 10 }, () => `*a${at - 1}`).join()}]`);
    }
    assert.match((await failure(yaml(lines.join("\n")))).message, /alias/);
  });
});
