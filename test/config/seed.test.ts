/** The configuration file of the document this project started from: it starts as it is. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { fileURLToPath } from "node:url";
import { startGateway } from "../support/gateway.ts";
import { failure, loadFrom, paths } from "./support.ts";

const FILE = fileURLToPath(new URL("../fixtures/gateway.config.yaml", import.meta.url));
const INSECURE = { TIDEGATE_SERVER_INSECURE: "true" };

describe("the file of the starting document", () => {
  it("is refused for one thing: it would let everyone in", async () => {
    const error = await failure(loadFrom({ config: FILE }, {}, "/"));
    assert.deepEqual(paths(error), ["server.host"]);
    assert.match(error.message, /server\.insecure/);
  });

  it("says with server.insecure what it always said", async () => {
    const { config, notes } = await loadFrom({ config: FILE }, INSECURE, "/");
    assert.deepEqual(
      config.backends.map(({ id, kind, url, models, concurrency, weight }) => {
        return [id, kind, url, models, concurrency, weight];
      }),
      [
        ["ollama-dev", undefined, "http://127.0.0.1:11434", ["llama3:8b", "mistral:7b"], 8, 1],
        ["vllm-prod", undefined, "http://127.0.0.1:8000", ["qwen2.5:14b"], 12, 2],
      ],
    );
    assert.deepEqual(config.models["llama3:8b"], {
      aliases: ["default"],
      fallback: "mistral:7b",
      concurrency: 4,
      maxOutputTokens: 4096,
      warm: false,
    });
    assert.deepEqual([config.server.host, config.server.port], ["0.0.0.0", 4000]);
    assert.deepEqual(notes, []);
  });

  it("starts a gateway that has its models", { timeout: 60_000 }, async () => {
    const gateway = await startGateway({
      // Not to the whole network while tests run.
      args: ["--config", FILE, "--port", "0", "--host", "127.0.0.1"],
      env: INSECURE,
    });
    try {
      const response = await fetch(`${gateway.url}/v1/models`);
      const { data } = (await response.json()) as { data: { id: string }[] };
      assert.deepEqual(
        data.map(({ id }) => id),
        ["llama3:8b", "mistral:7b", "qwen2.5:14b"],
      );
    } finally {
      assert.equal(await gateway.stop(), 0);
    }
  });
});
