/** The text of `/metrics`: names, labels and units of contract §6. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import type { MetricLabel } from "../../src/config.ts";
import type { Health, Snapshot } from "../../src/core/snapshot.ts";
import { Metrics, type Extras, type Gauges } from "../../src/telemetry/metrics.ts";
import { newRecord, type RequestRecord } from "../../src/telemetry/record.ts";
import { aBackend, aModel, aSnapshot, aTarget } from "../support/snapshot.ts";

const LABELS: MetricLabel[] = ["model", "backend_id", "cache_hit", "status"];
const BUCKETS = "0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60 120 300 600 +Inf".split(" ");

function snapshot(...healths: Health[]): Snapshot {
  const backends = healths.map((health, at) => aBackend(`b${at}`, { health }));
  return aSnapshot(backends, []);
}

function metrics(gauges: Partial<Gauges> = {}, labels: readonly MetricLabel[] = LABELS): Metrics {
  const nothing: Gauges = {
    snapshot: () => snapshot(),
    usage: () => [],
    running: () => [],
    heldBytes: () => 0,
    cache: () => ({ entries: 0, bytes: 0 }),
    budgets: () => Promise.resolve([]),
    breakers: () => [],
    reloaded: () => true,
  };
  return new Metrics(
    labels,
    { ...nothing, ...gauges },
    {
      version: "1.2.3",
      runtime: "bun 9",
      process: {
        memoryUsage: { rss: () => 4096 },
        cpuUsage: () => ({ user: 1_500_000, system: 500_000 }),
      },
    },
  );
}

function record(more: Partial<RequestRecord> = {}): RequestRecord {
  return {
    ...newRecord("id", "/v1/chat/completions"),
    model: "m",
    backend_id: "a",
    status: 200,
    ending: "completed",
    ...more,
  };
}

function extras(more: Partial<Extras> = {}): Extras {
  return { interTokenMs: null, dispatched: true, ...more };
}

/** The samples of one metric: their labels in order of name, and the value. */
async function samples(of: Metrics, name: string): Promise<Record<string, number>> {
  const lines = (await of.text()).split("\n").filter((line) => {
    return line.startsWith(`${name}{`) || line.startsWith(`${name} `);
  });
  return Object.fromEntries(
    lines.map((line) => {
      const [, labels = "", value] = /^\w+(?:\{(.*)\})? (\S+)$/.exec(line) ?? [];
      return [
        labels
          .split(/,(?=\w+=")/)
          .toSorted()
          .join(","),
        Number(value),
      ];
    }),
  );
}

describe("what there is", () => {
  const expected: Record<string, string> = {
    tidegate_requests_total: "counter",
    tidegate_attempts_total: "counter",
    tidegate_retries_total: "counter",
    tidegate_endings_total: "counter",
    tidegate_aborts_total: "counter",
    tidegate_refusals_total: "counter",
    tidegate_tokens_total: "counter",
    tidegate_tenant_tokens_total: "counter",
    tidegate_cache_lookups_total: "counter",
    tidegate_model_loads_total: "counter",
    tidegate_degraded_total: "counter",
    tidegate_eta_error_seconds: "histogram",
    process_cpu_seconds_total: "counter",
    tidegate_ttft_seconds: "histogram",
    tidegate_inter_token_seconds: "histogram",
    tidegate_request_duration_seconds: "histogram",
    tidegate_queue_wait_seconds: "histogram",
    tidegate_model_load_seconds: "histogram",
    tidegate_requests_in_flight: "gauge",
    tidegate_queue_requests: "gauge",
    tidegate_slots: "gauge",
    tidegate_slots_in_use: "gauge",
    tidegate_backend_health: "gauge",
    tidegate_breaker_state: "gauge",
    tidegate_model_residency: "gauge",
    tidegate_config_reloads_total: "counter",
    tidegate_config_last_reload_success: "gauge",
    tidegate_held_body_bytes: "gauge",
    tidegate_cache_entries: "gauge",
    tidegate_cache_bytes: "gauge",
    tidegate_budget_used_ratio: "gauge",
    tidegate_event_loop_delay_seconds: "gauge",
    tidegate_build_info: "gauge",
    process_resident_memory_bytes: "gauge",
    process_start_time_seconds: "gauge",
  };

  it("is what the contract says, each with its type and a word of help", async () => {
    const text = await metrics().text();
    const types = [...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].map(([, name, type]) => [
      name,
      type,
    ]);
    assert.deepEqual(Object.fromEntries(types), expected);
    const helps = [...text.matchAll(/^# HELP (\S+) \S+/gm)].map(([, name]) => String(name));
    assert.deepEqual(helps.toSorted(), Object.keys(expected).toSorted());
  });

  it("comes with the content type of the text format", () => {
    assert.match(metrics().contentType, /^text\/plain; version=0\.0\.4/);
  });
});

describe("a request", () => {
  it("is counted once, with the labels that are configured", async () => {
    const made = metrics();
    made.request(record(), extras());
    made.request(record({ status: 502, ending: "failed", cause: "upstream_error" }), extras());
    made.request(record(), extras());
    assert.deepEqual(await samples(made, "tidegate_requests_total"), {
      'backend_id="a",cache_hit="false",model="m",status="200"': 2,
      'backend_id="a",cache_hit="false",model="m",status="502"': 1,
    });
  });

  it("has other labels where these are configured, or none", async () => {
    const all: MetricLabel[] = [...LABELS, "tenant", "endpoint"];
    const full = metrics({}, all);
    full.request(record({ tenant: "team", cache_hit: true }), extras());
    assert.deepEqual(await samples(full, "tidegate_requests_total"), {
      'backend_id="a",cache_hit="true",endpoint="/v1/chat/completions",model="m",status="200",tenant="team"': 1,
    });
    const bare = metrics({}, []);
    bare.request(record(), extras());
    bare.request(record({ model: "n" }), extras());
    assert.deepEqual(await samples(bare, "tidegate_requests_total"), { "": 2 });
  });

  it('has "none" where nothing was resolved, and never what the client wrote', async () => {
    const made = metrics({}, [...LABELS, "tenant"]);
    const lost = record({ model: null, backend_id: null, asked_model: "made up", status: 404 });
    made.request(
      { ...lost, ending: "failed", cause: "model_not_found" },
      extras({ dispatched: false }),
    );
    assert.deepEqual(await samples(made, "tidegate_requests_total"), {
      'backend_id="none",cache_hit="false",model="none",status="404",tenant="none"': 1,
    });
    assert(!(await made.text()).includes("made up"));
  });

  it("ends in one way", async () => {
    const made = metrics();
    made.request(record(), extras());
    made.request(record({ ending: "cancelled", cause: "streaming", status: 200 }), extras());
    made.request(
      record({ ending: "cancelled", cause: "queued", status: 499 }),
      extras({ dispatched: false }),
    );
    made.request(record({ ending: "failed", cause: "upstream_timeout", status: 504 }), extras());
    made.request(
      record({ ending: "failed", cause: "rate_limit_exceeded", status: 429 }),
      extras({ dispatched: false }),
    );
    assert.deepEqual(await samples(made, "tidegate_endings_total"), {
      'cause="none",ending="completed",model="m"': 1,
      'cause="streaming",ending="cancelled",model="m"': 1,
      'cause="queued",ending="cancelled",model="m"': 1,
      'cause="upstream_timeout",ending="failed",model="m"': 1,
      'cause="rate_limit_exceeded",ending="failed",model="m"': 1,
    });
    assert.deepEqual(await samples(made, "tidegate_aborts_total"), {
      'model="m",phase="streaming"': 1,
      'model="m",phase="queued"': 1,
    });
    assert.deepEqual(await samples(made, "tidegate_refusals_total"), {
      'cause="rate_limit_exceeded",model="m"': 1,
    });
  });

  it("is observed in seconds, where there is something to observe", async () => {
    const made = metrics();
    const where = 'backend_id="a",model="m"';
    made.request(
      record({ latency_ms: 1500, ttft: 250, queue_ms: 2000 }),
      extras({ interTokenMs: 20 }),
    );
    made.request(
      record({ latency_ms: 500, ttft: null, queue_ms: 0 }),
      extras({ dispatched: false }),
    );
    const read = async (name: string) => [
      (await samples(made, `tidegate_${name}_sum`))[where],
      (await samples(made, `tidegate_${name}_count`))[where],
    ];
    assert.deepEqual(await read("request_duration_seconds"), [2, 2]);
    assert.deepEqual(await read("ttft_seconds"), [0.25, 1]);
    assert.deepEqual(await read("inter_token_seconds"), [0.02, 1]);
    assert.deepEqual(await read("queue_wait_seconds"), [2, 1]);
  });

  it("falls into the buckets of the contract", async () => {
    const made = metrics();
    made.request(record({ latency_ms: 100 }), extras());
    const buckets = await samples(made, "tidegate_request_duration_seconds_bucket");
    const bounds = Object.keys(buckets).map((labels) => /le="([^"]+)"/.exec(labels)?.[1]);
    assert.deepEqual(bounds, BUCKETS);
    const at = (le: string) => buckets[`backend_id="a",le="${le}",model="m"`];
    assert.deepEqual([at("0.05"), at("0.1"), at("+Inf")], [0, 1, 1]);
  });

  it("keeps label values apart from the text around them", async () => {
    const made = metrics({}, ["model"]);
    made.request(record({ model: 'a"b\\c\nd' }), extras());
    const line = (await made.text())
      .split("\n")
      .find((each) => each.startsWith("tidegate_requests_total{"));
    assert.equal(line, String.raw`tidegate_requests_total{model="a\"b\\c\nd"} 1`);
  });
});

describe("tokens", () => {
  it("are counted by type where they were made, and for the tenant they were made for", async () => {
    const made = metrics();
    made.tokens("team", record({ tokens_input: 11, tokens_generated: 7 }), 8);
    made.tokens("team", record({ tokens_input: 1, tokens_generated: null }), 0);
    made.tokens("other", record({ tokens_input: 100, tokens_generated: 50, model: "n" }), 0);
    assert.deepEqual(await samples(made, "tidegate_tokens_total"), {
      'backend_id="a",model="m",type="input"': 12,
      'backend_id="a",model="m",type="output"': 7,
      'backend_id="a",model="m",type="cached"': 8,
      'backend_id="a",model="n",type="input"': 100,
      'backend_id="a",model="n",type="output"': 50,
    });
    assert.deepEqual(await samples(made, "tidegate_tenant_tokens_total"), {
      'tenant="team",type="input"': 12,
      'tenant="team",type="output"': 7,
      'tenant="other",type="input"': 100,
      'tenant="other",type="output"': 50,
    });
  });

  it("are no part of a request: several may have shared them", async () => {
    const made = metrics();
    made.request(record({ tokens_input: 11, tokens_generated: 7 }), extras());
    assert.deepEqual(await samples(made, "tidegate_tokens_total"), {});
    assert.deepEqual(await samples(made, "tidegate_tenant_tokens_total"), {});
  });
});

describe("lookups in the cache", () => {
  it("are counted by what came of them", async () => {
    const made = metrics();
    for (const result of ["hit", "miss", "hit", "joined", "bypass"]) made.lookup(result);
    assert.deepEqual(await samples(made, "tidegate_cache_lookups_total"), {
      'result="hit"': 2,
      'result="miss"': 1,
      'result="joined"': 1,
      'result="bypass"': 1,
    });
  });
});

describe("attempts and retries", () => {
  it("are counted apart", async () => {
    const made = metrics();
    for (const outcome of ["success", "failure", "failure", "saturated", "ignore"] as const) {
      made.attempt("a", outcome);
    }
    made.retry("a", "upstream_unreachable");
    assert.deepEqual(await samples(made, "tidegate_attempts_total"), {
      'backend_id="a",outcome="success"': 1,
      'backend_id="a",outcome="failure"': 2,
      'backend_id="a",outcome="saturated"': 1,
      'backend_id="a",outcome="ignore"': 1,
    });
    assert.deepEqual(await samples(made, "tidegate_retries_total"), {
      'backend_id="a",cause="upstream_unreachable"': 1,
    });
  });
});

describe("gauges", () => {
  it("show requests in the house, by model and backend, none before these are known", async () => {
    const running = [
      { model: "m", backend_id: "a" },
      { model: "m", backend_id: "a" },
      { model: "m", backend_id: null },
      { model: null, backend_id: null },
    ];
    assert.deepEqual(
      await samples(metrics({ running: () => running }), "tidegate_requests_in_flight"),
      {
        'backend_id="a",model="m"': 2,
        'backend_id="none",model="m"': 1,
        'backend_id="none",model="none"': 1,
      },
    );
  });

  it("show slots by backend, and what is used and waiting by model", async () => {
    const usage = () => [
      {
        backend: "a",
        slots: 4,
        models: [
          { model: "m", running: 3, waiting: 2 },
          { model: "n", running: 0, waiting: 0 },
        ],
      },
      { backend: "b", slots: 64, models: [{ model: "m", running: 1, waiting: 5 }] },
    ];
    const made = metrics({ usage });
    assert.deepEqual(await samples(made, "tidegate_slots"), {
      'backend_id="a"': 4,
      'backend_id="b"': 64,
    });
    assert.deepEqual(await samples(made, "tidegate_slots_in_use"), {
      'backend_id="a",model="m"': 3,
      'backend_id="a",model="n"': 0,
      'backend_id="b",model="m"': 1,
    });
    assert.deepEqual(await samples(made, "tidegate_queue_requests"), {
      'model="m"': 7,
      'model="n"': 0,
    });
  });

  it("show every state of health of every backend, as 0 or 1", async () => {
    const made = metrics({
      snapshot: () => snapshot("healthy", "unhealthy", "degraded", "unknown"),
    });
    const seen = await samples(made, "tidegate_backend_health");
    assert.equal(Object.keys(seen).length, 16);
    const ones = Object.entries(seen).filter(([, value]) => value === 1);
    assert.deepEqual(ones.map(([labels]) => labels).toSorted(), [
      'backend_id="b0",state="healthy"',
      'backend_id="b1",state="unhealthy"',
      'backend_id="b2",state="degraded"',
      'backend_id="b3",state="unknown"',
    ]);
    assert(Object.values(seen).every((value) => value === 0 || value === 1));
  });

  it("show every breaker, state by state, that of a whole backend with no model", async () => {
    const made = metrics({
      breakers: () => [
        { backend: "a", model: null, state: "open" },
        { backend: "a", model: "m", state: "closed" },
        { backend: "b", model: "m", state: "half_open" },
      ],
    });
    const seen = await samples(made, "tidegate_breaker_state");
    assert.equal(Object.keys(seen).length, 9);
    const ones = Object.entries(seen).filter(([, value]) => value === 1);
    assert.deepEqual(ones.map(([labels]) => labels).toSorted(), [
      'backend_id="a",model="m",state="closed"',
      'backend_id="a",model="none",state="open"',
      'backend_id="b",model="m",state="half_open"',
    ]);
    assert(Object.values(seen).every((value) => value === 0 || value === 1));
  });

  it("show where every model is, state by state", async () => {
    const targets = [
      aTarget("a", "m", { residency: "loaded" }),
      aTarget("b", "m", { residency: "loading" }),
    ];
    const models = [aModel("m", targets), aModel("n", [aTarget("a", "n", { residency: "cold" })])];
    const made = metrics({ snapshot: () => aSnapshot([], models) });
    const seen = await samples(made, "tidegate_model_residency");
    assert.equal(Object.keys(seen).length, 9);
    const ones = Object.entries(seen).filter(([, value]) => value === 1);
    assert.deepEqual(ones.map(([labels]) => labels).toSorted(), [
      'backend_id="a",model="m",state="loaded"',
      'backend_id="a",model="n",state="cold"',
      'backend_id="b",model="m",state="loading"',
    ]);
    assert(Object.values(seen).every((value) => value === 0 || value === 1));
  });

  it("show how full the cache is, and how much of every budget is used", async () => {
    let entries = 3;
    let ratio = 0.25;
    const made = metrics({
      cache: () => ({ entries, bytes: entries * 100 }),
      budgets: () =>
        Promise.resolve([
          { tenant: "team", window: "1h", ratio },
          { tenant: "team", window: "month", ratio: 1.5 },
        ]),
    });
    await made.text();
    entries = 2;
    ratio = 0;
    assert.deepEqual(await samples(made, "tidegate_cache_entries"), { "": 2 });
    assert.deepEqual(await samples(made, "tidegate_cache_bytes"), { "": 200 });
    assert.deepEqual(await samples(made, "tidegate_budget_used_ratio"), {
      'tenant="team",window="1h"': 0,
      'tenant="team",window="month"': 1.5,
    });
  });

  it("show how the last reload went", async () => {
    let isGood = true;
    const made = metrics({ reloaded: () => isGood });
    assert.deepEqual(await samples(made, "tidegate_config_last_reload_success"), { "": 1 });
    isGood = false;
    assert.deepEqual(await samples(made, "tidegate_config_last_reload_success"), { "": 0 });
  });

  it("show what is, not what was: nothing adds up over scrapes, and who has gone is gone", async () => {
    let healths: Health[] = ["healthy", "healthy"];
    let held = 7;
    const made = metrics({ snapshot: () => snapshot(...healths), heldBytes: () => held });
    await made.text();
    assert.deepEqual(await samples(made, "tidegate_held_body_bytes"), { "": 7 });
    healths = ["degraded"];
    held = 0;
    assert.deepEqual(await samples(made, "tidegate_held_body_bytes"), { "": 0 });
    assert.deepEqual(await samples(made, "tidegate_backend_health"), {
      'backend_id="b0",state="healthy"': 0,
      'backend_id="b0",state="degraded"': 1,
      'backend_id="b0",state="unhealthy"': 0,
      'backend_id="b0",state="unknown"': 0,
    });
  });

  it("show the process and the build", async () => {
    const made = metrics();
    await made.text();
    assert.deepEqual(await samples(made, "tidegate_build_info"), {
      'runtime="bun 9",version="1.2.3"': 1,
    });
    assert.deepEqual(await samples(made, "process_resident_memory_bytes"), { "": 4096 });
    assert.deepEqual(await samples(made, "process_cpu_seconds_total"), { "": 2 });
    const started = (await samples(made, "process_start_time_seconds"))[""] ?? 0;
    assert(Math.abs(Date.now() / 1000 - started) < 3600, "Unix seconds");
    const later = metrics();
    assert.deepEqual(await samples(later, "process_start_time_seconds"), { "": started });
    const delay = (await samples(made, "tidegate_event_loop_delay_seconds"))[""] ?? -1;
    assert(delay >= 0 && Number.isFinite(delay));
  });
});

describe("reloads", () => {
  it("are counted by result, from zero: a first failure is an increase too", async () => {
    const made = metrics();
    const reloads = () => samples(made, "tidegate_config_reloads_total");
    assert.deepEqual(await reloads(), { 'result="success"': 0, 'result="failure"': 0 });
    made.reload(true);
    made.reload(false);
    made.reload(false);
    assert.deepEqual(await reloads(), { 'result="success"': 1, 'result="failure"': 2 });
  });
});

describe("other labels", () => {
  it("begin the count of requests anew, and nothing else", async () => {
    const made = metrics({}, ["model"]);
    made.request(record(), extras());
    made.relabel(["model"]);
    assert.deepEqual(await samples(made, "tidegate_requests_total"), { 'model="m"': 1 });
    made.relabel(["status", "endpoint"]);
    assert.deepEqual(await samples(made, "tidegate_requests_total"), {});
    made.request(record(), extras());
    assert.deepEqual(await samples(made, "tidegate_requests_total"), {
      'endpoint="/v1/chat/completions",status="200"': 1,
    });
    const [ending] = Object.values(await samples(made, "tidegate_endings_total"));
    assert.equal(ending, 2);
  });
});

describe("two of them", () => {
  it("share nothing", async () => {
    const [one, other] = [metrics(), metrics()];
    one.request(record(), extras());
    assert.deepEqual(await samples(other, "tidegate_requests_total"), {});
  });
});
