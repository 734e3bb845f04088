/** What is generated from the configuration's schema: current, complete, and fit for an editor. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { describe, it } from "node:test";
import { parse } from "yaml";
import { z } from "zod";
import { SCALARS } from "../../src/settings/environment.ts";
import { generated } from "../../tools/generate.ts";

const here = (path: string): Promise<string> =>
  readFile(new URL(`../../${path}`, import.meta.url), "utf8");

async function editor(): Promise<(value: unknown) => boolean> {
  const schema = z.fromJSONSchema(
    JSON.parse(await here("schema.json")) as z.core.JSONSchema.JSONSchema,
  );
  return (value) => schema.safeParse(value).success;
}

describe("generated files", () => {
  it('are current, or "bun run generate" makes them so', async () => {
    for (const [path, content] of await generated()) {
      assert.equal(await here(path), content, `${path}: run "bun run generate"`);
    }
  });

  it("document every variable", async () => {
    const text = await here("docs/configuration.md");
    for (const name of [
      ...SCALARS.keys(),
      "TIDEGATE_CONFIG",
      "TIDEGATE_BACKENDS",
      "TIDEGATE_API_KEYS",
    ]) {
      assert(text.includes(`\`${name}`), name);
    }
  });
});

describe("schema.json", () => {
  it("accepts what the gateway accepts", async () => {
    const accepts = await editor();
    assert(accepts({}));
    assert(accepts({ $schema: "./schema.json", server: { port: 0 } }));
    assert(accepts(parse(await here("test/fixtures/gateway.config.yaml"))));
    assert(
      accepts({
        backends: [
          { id: "a", url: "http://127.0.0.1:1", models: ["x", { name: "y", upstream: "z" }] },
          {
            id: "b",
            kind: "vllm",
            url: "http://b.lan",
            discover: "dns",
            include: ["*"],
            weight: 0.5,
          },
        ],
        models: { "x:1": { aliases: ["y"], fallback: ["a", "b"], concurrency: 1 } },
        auth: { keys: [{ key: "k" }, { hash: `sha256:${"0".repeat(64)}` }] },
        metrics: { labels: ["tenant"], endpoint: "/m" },
        admin: { enabled: false, key: "k" },
      }),
    );
  });

  it("lets a variable stand for any single value", async () => {
    const accepts = await editor();
    assert(
      accepts({ server: { port: "${PORT:-4000}", insecure: "${OPEN}", logLevel: "${LEVEL}" } }),
    );
    assert(accepts({ backends: [{ id: "${ID}", kind: "${KIND}", url: "http://${HOST}:1" }] }));
    assert(accepts({ auth: { keys: [{ hash: "${HASH}" }] }, telemetry: { sampling: "${SHARE}" } }));
  });

  it("does not accept what the gateway refuses", async () => {
    const accepts = await editor();
    for (const value of [
      { serve: {} },
      { server: { prot: 1 } },
      { server: { port: 70_000 } },
      { server: { port: "4000" } },
      { server: { logLevel: "loud" } },
      { backends: [{ url: "http://a" }] },
      { backends: [{ id: "a", wieght: 1 }] },
      { models: { m: { aliases: "x" } } },
      { auth: { keys: [{}] } },
      { metrics: { endpoint: "metrics" } },
      { queue: { maxLength: 0 } },
    ]) {
      assert(!accepts(value), JSON.stringify(value));
    }
  });

  it("says of every key what it is for", async () => {
    const undescribed: string[] = [];
    const look = (shape: Record<string, unknown>, path: string) => {
      for (const [key, each] of Object.entries((shape["properties"] ?? {}) as object)) {
        const below = each as Record<string, unknown>;
        if (below["description"] === undefined && key !== "$schema")
          undescribed.push(`${path}.${key}`);
        look(below, `${path}.${key}`);
      }
      for (const key of ["items", "additionalProperties"]) {
        const below = shape[key];
        if (typeof below === "object" && below !== null) {
          look(below as Record<string, unknown>, path);
        }
      }
    };
    look(JSON.parse(await here("schema.json")) as Record<string, unknown>, "");
    assert.deepEqual(undescribed, []);
  });
});
