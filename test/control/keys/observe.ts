/** `metrics`, `telemetry`: what is told, and to whom. */
import assert from "node:assert/strict";
import { send } from "../../support/client.ts";
import { withSink, type Sink } from "../../support/sink.ts";
import { eventually, type KeyTests, type Rig } from "./rig.ts";

export const metricKeys: KeyTests = {
  async "metrics.enabled"(rig) {
    assert.equal((await send(`${rig.url}/metrics`)).status, 200);
    await rig.change({ metrics: { enabled: false } });
    assert.equal((await send(`${rig.url}/metrics`)).status, 404);
    assert.equal((await rig.chat()).status, 200);
  },

  async "metrics.endpoint"(rig) {
    await rig.change({ metrics: { endpoint: "/internal/numbers" } });
    assert.equal((await send(`${rig.url}/metrics`)).status, 404);
    const { status, text } = await send(`${rig.url}/internal/numbers`);
    assert.deepEqual([status, text.includes("tidegate_build_info")], [200, true]);
  },

  async "metrics.labels"(rig) {
    const lines = async () => {
      await rig.chat();
      const text = await rig.gateway.metrics();
      return text.split("\n").filter((line) => line.startsWith("tidegate_requests_total{"));
    };
    await rig.change({ metrics: { labels: ["model", "tenant"] } });
    await eventually("it is counted so", async () => {
      return (await lines()).some((line) => /^\S+\{model="m",tenant="default"\} \d+$/.test(line));
    });
    await rig.change({ metrics: { labels: ["endpoint"] } });
    await eventually("and otherwise", async () => {
      const [first = "", ...others] = await lines();
      return others.length === 0 && first.includes('{endpoint="/v1/chat/completions"}');
    });
  },
};

/** Sends requests until one is exported there: the exporter is loaded after the reload has been answered. */
async function eventuallyTraced(rig: Rig, sink: Sink): Promise<void> {
  await eventually("a request is traced", async () => {
    const { headers } = await rig.chat();
    const id = headers.get("x-request-id") ?? "";
    await eventually("its record", () =>
      rig.gateway.records().some((each) => each["request_id"] === id),
    );
    await new Promise((resolve) => setTimeout(resolve, 60));
    return sink.has(id);
  });
}

export const telemetryKeys: KeyTests = {
  "telemetry.otlpEndpoint": (rig) =>
    withSink((one) =>
      withSink(async (other) => {
        await rig.change({ telemetry: { otlpEndpoint: one.url } });
        await eventuallyTraced(rig, one);
        await rig.change({ telemetry: { otlpEndpoint: other.url } });
        await eventuallyTraced(rig, other);
        const { headers } = await rig.chat();
        const id = headers.get("x-request-id") ?? "";
        await eventually("it goes to the other", () => other.has(id));
        assert(!one.has(id), "and no longer to the one");
        await rig.change({});
        const quiet = (await rig.chat()).headers.get("x-request-id") ?? "";
        assert.equal((await rig.gateway.record(quiet))["trace_id"], null, "no trace is made");
      }),
    ),

  "telemetry.serviceName": (rig) =>
    withSink(async (sink) => {
      for (const serviceName of ["first-name", "second-name"]) {
        await rig.change({ telemetry: { otlpEndpoint: sink.url, serviceName } });
        await eventually("it is called so", async () => {
          await rig.chat();
          return sink.has(serviceName);
        });
      }
    }),

  "telemetry.sampling": (rig) =>
    withSink(async (sink) => {
      await rig.change({ telemetry: { otlpEndpoint: sink.url, sampling: 0 } });
      let unsampled = "";
      await eventually("the exporter is there", async () => {
        unsampled = (await rig.chat()).headers.get("x-request-id") ?? "";
        return (await rig.gateway.record(unsampled))["trace_id"] !== null;
      });
      await rig.change({ telemetry: { otlpEndpoint: sink.url, sampling: 1 } });
      await eventuallyTraced(rig, sink);
      assert(!sink.has(unsampled), "none was sampled before");
    }),
};
