/** A request's trace as a real Jaeger got it, with a real engine behind a socket that listens in. */
import assert from "node:assert/strict";
import net from "node:net";
import test from "node:test";
import { open, openaiChat, sleep, until } from "../support/client.ts";
import { startGateway } from "../support/gateway.ts";
import { missing, startJaeger, startLlamaServer, STORY } from "./support.ts";

const skip = missing("jaeger", "llama-server");

type Value = string | number | boolean;

interface Span {
  id: string;
  parent: string;
  name: string;
  kind: string;
  attributes: Map<string, Value>;
  events: string[];
  startMs: number;
  endMs: number;
}

interface WireValue {
  stringValue?: string;
  intValue?: string;
  doubleValue?: number;
  boolValue?: boolean;
}

interface WireSpan {
  spanId: string;
  parentSpanId?: string;
  name: string;
  kind: string;
  startTimeUnixNano: string;
  endTimeUnixNano: string;
  attributes?: { key: string; value: WireValue }[];
  events?: { name?: string; attributes?: { key: string; value: WireValue }[] }[];
}

interface WireTrace {
  result?: {
    resourceSpans: {
      resource: { attributes: { key: string; value: WireValue }[] };
      scopeSpans?: { spans: WireSpan[] }[];
      instrumentationLibrarySpans?: { spans: WireSpan[] }[];
    }[];
  };
}

function plain(value: WireValue): Value {
  if (value.intValue !== undefined) return Number(value.intValue);
  return value.stringValue ?? value.doubleValue ?? value.boolValue ?? "";
}

/** Jaeger 1 writes ids in base64, OTLP's own JSON in hex. */
function hexId(id: string): string {
  return /^[0-9a-f]{16}$/.test(id) ? id : Buffer.from(id, "base64").toString("hex");
}

async function readTrace(url: string, traceId: string): Promise<Span[]> {
  const response = await fetch(`${url}/api/v3/traces/${traceId}`);
  const trace = (await response.json()) as WireTrace;
  return (trace.result?.resourceSpans ?? [])
    .flatMap(({ scopeSpans, instrumentationLibrarySpans }) => [
      ...(scopeSpans ?? []),
      ...(instrumentationLibrarySpans ?? []),
    ])
    .flatMap(({ spans }) => spans)
    .map((span) => ({
      id: hexId(span.spanId),
      parent: hexId(span.parentSpanId ?? ""),
      name: span.name,
      kind: span.kind.replace("SPAN_KIND_", ""),
      attributes: new Map(span.attributes?.map(({ key, value }) => [key, plain(value)])),
      events: (span.events ?? []).map(
        ({ name, attributes }) =>
          name ?? String(plain(attributes?.find(({ key }) => key === "event")?.value ?? {})),
      ),
      startMs: Number(BigInt(span.startTimeUnixNano) / 1000n) / 1000,
      endMs: Number(BigInt(span.endTimeUnixNano) / 1000n) / 1000,
    }));
}

/** Passes bytes through to the engine and keeps the heads of the POSTs. */
async function listenIn(enginePort: number) {
  const heads: string[] = [];
  const server = net.createServer((socket) => {
    const engine = net.connect({ port: enginePort, host: "127.0.0.1" });
    let head = "";
    socket.on("data", (bytes: Buffer) => {
      if (head === "") {
        head = bytes.toString("latin1").split("\r\n\r\n", 1)[0] ?? "";
        if (head.startsWith("POST")) heads.push(head);
      }
    });
    for (const [one, other] of [
      [socket, engine],
      [engine, socket],
    ] as const) {
      one.pipe(other);
      one.on("error", () => other.destroy());
      one.on("close", () => other.destroy());
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as net.AddressInfo;
  return { url: `http://127.0.0.1:${port}`, heads, stop: () => server.close() };
}

test(
  "real Jaeger has the whole trace of a streamed request",
  { skip, timeout: 90_000 },
  async () => {
    const jaeger = await startJaeger();
    const engine = await startLlamaServer("smol-a");
    const wire = await listenIn(engine.port);
    const gateway = await startGateway({
      config: {
        backends: [{ id: "smol", kind: "openai", url: wire.url, models: ["smol-a"] }],
        telemetry: { otlpEndpoint: jaeger.otlpUrl },
      },
      env: { OTEL_BSP_SCHEDULE_DELAY: "200" },
    });
    try {
      // The SDK is loaded after the socket listens; what comes before it has no spans.
      const services = async (): Promise<string[]> => {
        const response = await fetch(`${jaeger.url}/api/v3/services`);
        const { services: names = [] } = (await response.json()) as { services?: string[] };
        return names.filter((name) => !name.startsWith("jaeger"));
      };
      const isTraced = async (): Promise<boolean> => {
        await openaiChat(gateway.url, { model: "smol-a", messages: STORY, max_tokens: 1 });
        await sleep(300);
        return (await services()).length > 0;
      };
      assert.ok(await until(isTraced, 20_000), "no span arrived");
      wire.heads.length = 0;

      const traceId = Buffer.from(crypto.getRandomValues(new Uint8Array(16))).toString("hex");
      const parentId = "00f067aa0ba902b7";
      const answer = await open(
        `${gateway.url}/v1/chat/completions`,
        {
          model: "smol-a",
          stream: true,
          max_tokens: 8,
          temperature: 0.5,
          seed: 7,
          messages: STORY,
        },
        {
          headers: {
            traceparent: `00-${traceId}-${parentId}-01`,
            "x-session-id": "secret-session",
          },
        },
      );
      const text = await answer.text();
      assert.match(text, /\[DONE\]/);

      let spans: Span[] = [];
      await until(async () => {
        spans = await readTrace(jaeger.url, traceId);
        return spans.length >= 2;
      }, 20_000);
      const server = spans.find(({ kind }) => kind === "SERVER");
      const attempt = spans.find(({ kind }) => kind === "CLIENT");
      assert.ok(server && attempt, JSON.stringify(spans.map(({ name, kind }) => [name, kind])));

      assert.equal(server.name, "POST /v1/chat/completions");
      assert.equal(server.parent, parentId);
      assert.equal(attempt.name, "chat smol-a");
      assert.equal(attempt.parent, server.id);
      assert.ok(server.startMs <= attempt.startMs && attempt.endMs <= server.endMs + 1);

      // What the engine was told is what Jaeger was told.
      assert.equal(wire.heads.length, 1);
      assert.match(
        wire.heads[0] ?? "",
        new RegExp(`^traceparent: 00-${traceId}-${attempt.id}-01$`, "im"),
      );

      const record = gateway.records().at(-1);
      assert.equal(record?.trace_id, traceId);
      const expectedOfServer: Record<string, Value> = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        model: "smol-a",
        backend_id: "smol",
        cache_hit: false,
        tokens_generated: 8,
        ttft: Number(record?.ttft),
        latency_ms: Number(record?.latency_ms),
        status: 200,
        "tidegate.request_id": answer.headers.get("x-request-id") ?? "",
        "tidegate.tenant": "default",
        "tidegate.reason": answer.headers.get("x-tidegate-reason") ?? "",
        "tidegate.cache": answer.headers.get("x-tidegate-cache") ?? "",
        "tidegate.ending": "completed",
      };
      for (const [key, value] of Object.entries(expectedOfServer)) {
        assert.equal(server.attributes.get(key), value, key);
      }
      assert.ok(server.events.includes("first_token"), server.events.join());

      const expectedOfAttempt: Record<string, Value> = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "smol-a",
        "gen_ai.request.stream": true,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.response.model": "smol-a",
        "gen_ai.response.finish_reasons": '["length"]',
        "gen_ai.usage.output_tokens": 8,
        "server.address": "127.0.0.1",
        "server.port": Number(new URL(wire.url).port),
        "tidegate.backend_id": "smol",
        "tidegate.attempt": 1,
      };
      for (const [key, value] of Object.entries(expectedOfAttempt)) {
        assert.equal(attempt.attributes.get(key), value, key);
      }
      assert.match(String(attempt.attributes.get("gen_ai.response.id")), /^chatcmpl-/);
      assert.ok(Number(attempt.attributes.get("gen_ai.usage.input_tokens")) > 5);
      const firstChunk = Number(attempt.attributes.get("gen_ai.response.time_to_first_chunk"));
      assert.ok(firstChunk > 0 && firstChunk * 1000 <= attempt.endMs - attempt.startMs + 1);

      // Nothing of the conversation or the session is on any span.
      assert.doesNotMatch(
        JSON.stringify(spans.map(({ attributes }) => [...attributes])),
        /story about the sea|secret-session/,
      );
      assert.deepEqual(await services(), ["tidegate"]);
    } finally {
      await gateway.stop();
      wire.stop();
      await engine.stop();
      await jaeger.stop();
    }
  },
);
