/** The log: one JSON object per line, or text for a terminal. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { Log, type Level } from "../../src/telemetry/log.ts";
import { newRecord, rounded, type RequestRecord } from "../../src/telemetry/record.ts";

/** Contract §6, in its order, behind `time`, `level`, `msg`. */
const FIELDS = `request_id client_request_id trace_id tenant endpoint model asked_model backend_id
  stream cache_hit cache ttft tokens_generated tokens_input tokens_estimated latency_ms status
  ending cause attempts reason queue_ms load_ms`.split(/\s+/);

interface Choice {
  level?: Level;
  json?: boolean;
  colour?: boolean;
}

function log({ level = "debug", json = true, colour = false }: Choice = {}) {
  const lines: string[] = [];
  const made = new Log({ level, json, colour, write: (line) => void lines.push(line) });
  return { made, lines };
}

function only(lines: readonly string[]): string {
  assert.equal(lines.length, 1);
  return lines[0] ?? "";
}

function record(more: Partial<RequestRecord> = {}): RequestRecord {
  return {
    ...newRecord("id-1", "/v1/chat/completions"),
    model: "m",
    asked_model: "alias",
    backend_id: "a",
    status: 200,
    ending: "completed",
    latency_ms: 1234.5,
    attempts: 1,
    ...more,
  };
}

describe("the log as JSON", () => {
  it("is one object per line that begins with time, level, msg", () => {
    const { made, lines } = log();
    made.info("backend health", { backend_id: "a", to: "healthy" });
    const line = only(lines);
    assert(line.endsWith("}\n") && !line.slice(0, -1).includes("\n"));
    const parsed = JSON.parse(line) as Record<string, unknown>;
    assert.deepEqual(Object.keys(parsed), ["time", "level", "msg", "backend_id", "to"]);
    assert.deepEqual([parsed["level"], parsed["msg"]], ["info", "backend health"]);
    const time = String(parsed["time"]);
    assert.equal(new Date(time).toISOString(), time);
  });

  it("has every field of the contract in the line of a request, in its order", () => {
    const { made, lines } = log();
    made.request(record(), null);
    const parsed = JSON.parse(only(lines)) as Record<string, unknown>;
    assert.deepEqual(Object.keys(parsed), ["time", "level", "msg", ...FIELDS]);
    assert.equal(parsed["msg"], "request");
    assert.equal(parsed["latency_ms"], 1234.5);
    assert.equal(parsed["ttft"], null);
    assert.equal(parsed["cache_hit"], false);
  });

  it("adds what the engine said, where there is something", () => {
    const { made, lines } = log();
    made.request(record({ ending: "failed", status: 502 }), 'HTTP 500: "out\nof memory"');
    const line = only(lines);
    assert.equal((JSON.parse(line) as { detail: string }).detail, 'HTTP 500: "out\nof memory"');
    assert.equal(line.indexOf("\n"), line.length - 1, "a line stays a line");
  });
});

describe("levels", () => {
  it("leave out what is below", () => {
    for (const [level, count] of [
      ["debug", 4],
      ["info", 3],
      ["warn", 2],
      ["error", 1],
    ] as const) {
      const { made, lines } = log({ level });
      for (const each of ["debug", "info", "warn", "error"] as const) made[each]("x");
      assert.equal(lines.length, count, level);
    }
  });

  it("of a request: info, warn where it failed, error only where it was our mistake", () => {
    const levelOf = (more: Partial<RequestRecord>) => {
      const { made, lines } = log();
      made.request(record(more), null);
      return (JSON.parse(only(lines)) as { level: string }).level;
    };
    assert.equal(levelOf({}), "info");
    assert.equal(levelOf({ ending: "cancelled", status: 499, cause: "queued" }), "info");
    assert.equal(levelOf({ ending: "failed", status: 502, cause: "upstream_error" }), "warn");
    assert.equal(levelOf({ ending: "failed", status: 500, cause: "internal_error" }), "error");
  });

  it("hold for requests too", () => {
    const { made, lines } = log({ level: "warn" });
    made.request(record(), null);
    assert.deepEqual(lines, []);
    made.request(record({ ending: "failed", status: 504 }), null);
    assert.equal(lines.length, 1);
  });
});

describe("the log as text", () => {
  it("says on one line what a person looks for", () => {
    const { made, lines } = log({ json: false });
    made.request(
      record({
        ttft: 87.6,
        tokens_generated: 12,
        attempts: 2,
        ending: "failed",
        cause: "upstream_timeout",
        status: 504,
      }),
      "HTTP 500",
    );
    const line = only(lines);
    for (const part of ["504", "/v1/chat/completions", "m", "a", "1.23s", "88ms", "12 tokens"]) {
      assert(line.includes(part), `${part} in ${line}`);
    }
    for (const part of ["failed: upstream_timeout", "2 attempts", "HTTP 500", "warn"]) {
      assert(line.includes(part), `${part} in ${line}`);
    }
    assert(!line.includes("{"), "no JSON");
  });

  it("names what was asked for where no model was found, and leaves out what is not there", () => {
    const { made, lines } = log({ json: false });
    made.request(record({ model: null, backend_id: null, status: 404 }), null);
    const line = only(lines);
    assert.match(line, /404 \/v1\/chat\/completions alias → - /);
    assert(!/ttft|tokens|attempts|null/.test(line), line);
  });

  it("leaves out what is undefined, as JSON does", () => {
    const { made, lines } = log({ json: false });
    made.info("backend removed", { backend_id: "a", kind: undefined, health: null });
    assert.match(only(lines), /backend removed backend_id="a" health=null\n$/);
  });

  it("has the level of now, whatever it was at first", () => {
    const { made, lines } = log({ level: "warn" });
    made.info("unseen");
    made.level = "info";
    made.info("seen");
    assert.match(only(lines), /"seen"/);
  });

  it("has colours only where they are wanted", () => {
    for (const colour of [true, false]) {
      const { made, lines } = log({ json: false, colour });
      made.warn("careful", { a: 1 });
      assert.equal(only(lines).includes("\u001B["), colour);
      assert(only(lines).includes("careful a=1"));
    }
  });

  it("cannot be broken up or coloured by what a client sends", () => {
    const { made, lines } = log({ json: false });
    made.request(record({ model: null, asked_model: "a\n2026 error \u001B[31mb" }), "x\r\ny");
    const line = only(lines);
    assert.equal(line.indexOf("\n"), line.length - 1, JSON.stringify(line));
    assert(!line.includes("\u001B"), JSON.stringify(line));
  });
});

describe("rounded", () => {
  it("keeps three decimals", () => {
    assert.deepEqual([rounded(1.23456), rounded(2), rounded(0.0004)], [1.235, 2, 0]);
  });
});
