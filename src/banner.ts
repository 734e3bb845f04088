import type { Place } from "./control/search.ts";
import type { Snapshot } from "./core/snapshot.ts";

export interface BannerFacts {
  version: string;
  runtime: string;
  url: string;
  source: string;
  startedInMs: number;
  places: readonly Place[];
  snapshot: Snapshot;
  metricsPath: string | null;
  tracesTo: string | null;
  needsKey: boolean;
  notes: readonly string[];
  colour: boolean;
}

/** What a person reads at start: where it listens, what it found and why not, and what to try. */
export function banner(facts: BannerFacts): string {
  const paint = (code: string, text: string) =>
    facts.colour ? `\u001B[${code}m${text}\u001B[0m` : text;
  const rows: [string, string][] = [
    ["API", `${facts.url}/v1`],
    ["Metrics", facts.metricsPath === null ? "off" : facts.url + facts.metricsPath],
    ["Traces", facts.tracesTo ?? "off (set OTEL_EXPORTER_OTLP_ENDPOINT)"],
    ["Config", facts.source],
  ];
  const lines = [
    "",
    `  ${paint("1", `tidegate ${facts.version}`)}  ready in ${Math.round(facts.startedInMs)} ms  (${facts.runtime})`,
    "",
    ...rows.map(([name, value]) => `  ${name.padEnd(9)} ${value}`),
    ...backendLines(facts, paint),
    ...facts.notes.map((note) => `  ${paint("33", "!")} ${note}`),
    "",
    `  Try       ${example(facts)}`,
    "",
  ];
  return `${lines.join("\n")}\n`;
}

type Paint = (code: string, text: string) => string;

function backendLines(facts: BannerFacts, paint: Paint): string[] {
  const ok = paint("32", "✔");
  const bad = paint("31", "✖");
  const served = facts.snapshot.backends.map(({ id, kind, url, health, reason }) => {
    const models = facts.snapshot.models.filter((model) =>
      model.targets.some((target) => target.backend === id),
    ).length;
    const what =
      health === "healthy"
        ? `${models} ${models === 1 ? "model" : "models"}`
        : `${health}: ${reason}`;
    const where = kind === "demo" ? "built in" : url;
    return `${health === "healthy" ? ok : bad} ${id.padEnd(12)} ${where.padEnd(26)} ${what}`;
  });
  const missing = facts.places
    .filter(({ reason }) => reason !== "")
    .map(({ name, url, reason }) => `${bad} ${name.padEnd(12)} ${url.padEnd(26)} ${reason}`);
  const all = [...served, ...missing];
  const lines = all.map((line, at) => `  ${at === 0 ? "Backends" : "        "}  ${line}`);
  if (facts.places.length > 0 && facts.snapshot.backends.every(({ kind }) => kind === "demo")) {
    const words = "No inference engine answered: the built-in demo engine does, as model demo.";
    lines.push(`  ${paint("33", "!")} ${words} Start an engine and it is served within seconds.`);
  }
  return lines;
}

function example({ url, snapshot, needsKey }: BannerFacts): string {
  const chat = snapshot.models.find((model) => !/embed|minilm/i.test(model.name));
  const model = chat?.name ?? snapshot.models[0]?.name ?? "MODEL";
  const body = JSON.stringify({
    model,
    messages: [{ role: "user", content: "Hello" }],
    stream: true,
  });
  // A model's name may hold a quote; inside single quotes that ends the shell's string.
  const quoted = `'${body.replaceAll("'", String.raw`'\''`)}'`;
  const key = needsKey ? ' -H "Authorization: Bearer $KEY"' : "";
  return `curl -N ${url}/v1/chat/completions -H "Content-Type: application/json"${key} -d ${quoted}`;
}
