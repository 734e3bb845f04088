/** The `gateway.config.ts` in the repository's root: it discovers, and shows every setting's default. */
import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import root from "../../gateway.config.ts";
import { schema } from "../../src/config.ts";
import { check } from "../../src/settings/mistakes.ts";

type Tree = Record<string, unknown>;

/** Sections that show an example, not a default: they have none. */
const EXAMPLES = ["backends", "models", "auth", "tenants"];
/** Keys without a default: the file shows what could stand there. */
const WITHOUT_DEFAULT = ["telemetry.otlpEndpoint", "admin.key", "redis.url"];

function isTree(value: unknown): value is Tree {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The file with its slashes taken away, evaluated. */
async function uncommented(folder: string): Promise<Tree> {
  const source = await readFile(new URL("../../gateway.config.ts", import.meta.url), "utf8");
  const text = source
    .replace(/^import .*$/m, "")
    .replace("defineConfig(", "(")
    .replaceAll(/^( {2})\/\/ ?/gm, "$1");
  const path = join(folder, "gateway.config.ts");
  await writeFile(path, text);
  const module = (await import(path)) as { default: Tree };
  return module.default;
}

describe("gateway.config.ts in the root", () => {
  let folder = "";
  let shown: Tree = {};
  let defaults: Tree = {};
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "tidegate-root-"));
    shown = await uncommented(folder);
    defaults = schema.parse({});
  });
  after(() => rm(folder, { recursive: true }));

  it("is valid, names no backends, and sets nothing at all", () => {
    const result = check(root);
    assert("config" in result, JSON.stringify(result));
    assert.deepEqual(result.config, defaults);
    assert.deepEqual(result.config.backends, []);
  });

  it("shows every section", () => {
    assert.deepEqual(Object.keys(shown).toSorted(), Object.keys(schema.shape).toSorted());
  });

  it("shows every key of each section, with its default", () => {
    for (const [section, value] of Object.entries(shown)) {
      if (EXAMPLES.includes(section)) continue;
      const wanted = defaults[section];
      assert(isTree(value) && isTree(wanted), section);
      for (const [key, each] of Object.entries(value)) {
        const path = `${section}.${key}`;
        if (WITHOUT_DEFAULT.includes(path)) assert.equal(key in wanted, false, path);
        else assert.deepEqual(each, wanted[key], path);
      }
      const missing = Object.keys(wanted).filter((key) => !(key in value));
      assert.deepEqual(missing, [], `missing in ${section}`);
    }
  });

  it("shows every key a backend may have, and the defaults of those that have one", () => {
    const backends = shown["backends"] as Tree[];
    const keys = new Set(backends.flatMap((backend) => Object.keys(backend)));
    assert.deepEqual(
      [...keys].toSorted(),
      Object.keys(schema.shape.backends.unwrap().element.shape).toSorted(),
    );
    const [plain] = schema.parse({ backends: [{ id: "a", url: "http://x" }] }).backends;
    for (const backend of backends) {
      for (const key of ["allowCloud", "weight", "healthInterval", "timeout"] as const) {
        if (key in backend) assert.equal(backend[key], plain?.[key], key);
      }
      const { staleAfterMs, healthInterval, timeout } = backend;
      if (staleAfterMs !== undefined) {
        assert.equal(staleAfterMs, 3 * Number(healthInterval) + Number(timeout));
      }
    }
  });

  it("shows every key of models, tenants and issuers, and the defaults of those that have one", () => {
    const { models, tenants, auth } = shown as Record<string, Record<string, Tree>>;
    const issuer = schema.shape.auth.unwrap().shape.jwt.unwrap().element.shape;
    const issuers = Object.values(auth?.["jwt"] ?? {}) as Tree[];
    const plainIssuer = { issuer: "i", audience: "a", jwksUrl: "http://x" };
    const [terms] = schema.parse({ auth: { jwt: [plainIssuer] } }).auth.jwt;
    const tenant = schema.shape.tenants.unwrap().valueType.shape;
    const groups: [string, Tree[], object, Tree][] = [
      ["models", Object.values(models ?? {}), schema.shape.models.unwrap().valueType.shape, {}],
      [
        "tenants",
        Object.values(tenants ?? {}),
        tenant,
        schema.parse({ tenants: { t: {} } })["tenants"]["t"] ?? {},
      ],
      ["auth.jwt", issuers, issuer, { ...terms }],
    ];
    for (const [where, entries, shape, defaults] of groups) {
      const keys = new Set(entries.flatMap((entry) => Object.keys(entry)));
      const wanted = Object.keys(shape).filter((key) => key !== "jwksFile");
      assert.deepEqual([...keys].toSorted(), wanted.toSorted(), where);
      for (const key of [
        "weight",
        "priority",
        "models",
        "algorithms",
        "toleranceS",
        "tenantClaim",
      ]) {
        for (const entry of entries) {
          if (key in entry) assert.deepEqual(entry[key], defaults[key], `${where}.${key}`);
        }
      }
    }
  });

  it("shows examples that would be accepted", () => {
    const hash = `sha256:${"0".repeat(64)}`;
    const { keys, jwt } = shown["auth"] as { keys: Tree[]; jwt: Tree[] };
    const auth = { jwt, keys: keys.map((each) => ("hash" in each ? { ...each, hash } : each)) };
    const redis = { ...(shown["redis"] as Tree), url: "redis://127.0.0.1:6379" };
    const result = check({ ...shown, auth, redis });
    assert("config" in result, JSON.stringify(result));
    assert(result.config.backends.length > 0);
  });
});
