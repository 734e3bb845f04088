import process from "node:process";
import { serve as serveNode } from "@hono/node-server";
import manifest from "../package.json" with { type: "json" };
import { readArguments, usageError } from "./arguments.ts";
import { banner } from "./banner.ts";
import { isLoopback } from "./caller.ts";
import { resolveA } from "./control/names.ts";
import { startGateway, type Gateway } from "./gateway.ts";
import { ConfigError, loadSettings, type Settings, type Sources } from "./settings/load.ts";
import { shown } from "./settings/mistakes.ts";
import { runtimeProblem } from "./runtime.ts";
import { Log, type Level } from "./telemetry/log.ts";
import { tracingWanted } from "./telemetry/tracing.ts";

const HELP = `tidegate ${manifest.version}: one endpoint in front of the language models on your own machines

Usage: bun start [options]     or: deno task start [options]

  --config PATH     configuration file, .ts, .json or .yaml (default: gateway.config.ts, .json, .yaml)
  --port N          port to listen on (default 4000; 0: any free one)
  --host ADDR       address to bind (default 127.0.0.1)
  --log-level L     debug, info, warn or error (default info)
  --check           check the configuration and do not listen
  --print           with --check: every value and where it comes from, secrets as ***
  --json            with --check: the result as JSON
  --help            this text
  --version         the version

Environment: TIDEGATE_CONFIG, TIDEGATE_API_KEYS="key,tenant=key", TIDEGATE_BACKENDS="kind=url,kind=url",
one TIDEGATE_* per single value (docs/configuration.md), REDIS_URL, PORT, NO_COLOR, FORCE_COLOR,
OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME and the other OTEL_* of the OpenTelemetry SDK.

Signals: SIGHUP reloads the configuration; SIGTERM and SIGINT end the process once answers are done.
`;

const RUNTIME = typeof Bun === "undefined" ? `deno ${Deno.version.deno}` : `bun ${Bun.version}`;

/** Requests to engines at once where Bun's own limit (256, silently queued) was not raised. */
const UNRAISED_LIMIT = 200;

const OPTIONS = {
  config: { type: "string" },
  port: { type: "string" },
  host: { type: "string" },
  "log-level": { type: "string" },
  check: { type: "boolean", default: false },
  print: { type: "boolean", default: false },
  json: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  version: { type: "boolean", default: false },
} as const;

function readFlags() {
  const { values } = readArguments({ options: OPTIONS });
  if (values.port !== undefined && !/^\d+$/.test(values.port)) {
    usageError(`--port needs a number, not "${values.port}"`);
  }
  for (const flag of ["json", "print"] as const) {
    if (values[flag] && !values.check) usageError(`--${flag} goes with --check`);
  }
  return values;
}

function sourcesFrom(flags: ReturnType<typeof readFlags>): Sources {
  const { config, host, port } = flags;
  return {
    flags: {
      config,
      host,
      logLevel: flags["log-level"],
      port: port === undefined ? undefined : Number(port),
    },
    environment: process.env,
    directory: process.cwd(),
  };
}

async function load(flags: ReturnType<typeof readFlags>, sources: Sources): Promise<Settings> {
  try {
    return await loadSettings(sources);
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    if (flags.json)
      process.stdout.write(`${JSON.stringify({ ok: false, errors: error.mistakes })}\n`);
    else process.stderr.write(`${error.message}\n`);
    process.exit(1);
  }
}

/** What `--check` prints of a configuration that is valid. */
function checked({ source, notes, values }: Settings, flags: ReturnType<typeof readFlags>): string {
  if (flags.json) {
    return JSON.stringify({ ok: true, source, notes, ...(flags.print ? { values } : {}) });
  }
  const printed = flags.print ? values : [];
  const width = Math.max(0, ...printed.map(({ path }) => path.length));
  return [
    `${source}: valid`,
    ...printed.map(
      ({ path, value, origin }) => `  ${path.padEnd(width)}  ${JSON.stringify(value)}  (${origin})`,
    ),
    ...notes.map((note) => `  ! ${note}`),
  ].join("\n");
}

interface Listening {
  port: number;
  /** Accepts nothing further; running answers go on. Resolves when the last byte is out. */
  stop(): Promise<void>;
}

/** How long what was written last may take to leave. */
const FLUSH_MS = 1000;

async function listen(gateway: Gateway, hostname: string, port: number): Promise<Listening> {
  if (typeof Bun !== "undefined") {
    const server = Bun.serve({
      hostname,
      port,
      // Otherwise a silent prefill of ten seconds loses its client.
      idleTimeout: 0,
      // Ours answers with an explanation.
      maxRequestBodySize: Number.MAX_SAFE_INTEGER,
      fetch: (request, self) =>
        gateway.fetch(request, { peer: () => self.requestIP(request)?.address ?? null }),
    });
    return { port: server.port ?? port, stop: () => server.stop() };
  }
  // Deno.serve does not report a client that leaves before the response begins.
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  const server = serveNode(
    {
      fetch: (request, { incoming }) =>
        gateway.fetch(request, { peer: () => incoming.socket.remoteAddress ?? null }),
      hostname,
      port,
    },
    (info) => resolve(info.port),
  );
  server.on("error", reject);
  const closed = () => new Promise<void>((done) => server.close(() => done()));
  return { port: await promise, stop: closed };
}

/** Resolves at the first signal; a second one ends the process at once. */
function signalled(): Promise<string> {
  return new Promise((resolve) => {
    let seen = false;
    for (const signal of ["SIGTERM", "SIGINT"] as const) {
      process.on(signal, () => {
        if (seen) process.exit(1);
        seen = true;
        resolve(signal);
      });
    }
  });
}

async function main(): Promise<void> {
  const began = performance.now();
  const flags = readFlags();
  if (flags.help) return void process.stdout.write(HELP);
  if (flags.version) return void process.stdout.write(`${manifest.version}\n`);
  const problem = runtimeProblem(RUNTIME);
  if (problem !== null) {
    process.stderr.write(`tidegate: ${problem}\n`);
    process.exit(1);
  }
  const sources = sourcesFrom(flags);
  const settings = await load(flags, sources);
  const { config, source } = settings;
  const { host, port } = config.server;
  if (flags.check) return void process.stdout.write(`${checked(settings, flags)}\n`);
  const colours = process.env["NO_COLOR"] === undefined || process.env["NO_COLOR"] === "";
  const forced = process.env["FORCE_COLOR"] !== undefined && process.env["FORCE_COLOR"] !== "0";
  const log = new Log({
    level: config.server.logLevel satisfies Level,
    json: process.stdout.isTTY !== true,
    colour: colours,
    write: (line) => void process.stdout.write(line),
  });
  // Whoever read the output has left: to log that would say so again and again.
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});
  for (const event of ["unhandledRejection", "uncaughtException"] as const) {
    process.on(event, (error: unknown) => {
      log.error(event, { detail: error instanceof Error ? error.stack : String(error) });
    });
  }
  const raised =
    typeof Bun === "undefined" || process.env["BUN_CONFIG_MAX_HTTP_REQUESTS"] !== undefined;
  if (!raised) {
    settings.notes.push(
      `at most ${UNRAISED_LIMIT} requests to engines at once: start with "bun start", ` +
        "or set BUN_CONFIG_MAX_HTTP_REQUESTS=16384 in the environment",
    );
  }
  const stopping = signalled();
  let reload = () => {};
  // From the first moment: its default is to end the process.
  process.on("SIGHUP", () => reload());
  const gateway = await startGateway(settings, sources, {
    version: manifest.version,
    runtime: RUNTIME,
    log,
    environment: process.env,
    upstreamLimit: raised ? Infinity : UNRAISED_LIMIT,
    process: process,
    resolve: (name) => resolveA(name),
  });
  reload = () => void gateway.reload("SIGHUP");
  gateway.watch();
  const server = await listen(gateway, host, port).catch((error: unknown) => {
    const code = (error as { code?: string }).code;
    const reason =
      code === "EADDRINUSE"
        ? `port ${port} on ${host} is in use: stop what listens there, or choose another with --port`
        : `cannot listen on ${host} port ${port}: ${error instanceof Error ? error.message : code}`;
    process.stderr.write(`tidegate: ${reason}\n`);
    process.exit(1);
  });
  const name = isLoopback(host) || host === "0.0.0.0" || host === "::" ? "127.0.0.1" : host;
  process.stderr.write(
    banner({
      version: manifest.version,
      runtime: RUNTIME,
      url: `http://${name.includes(":") ? `[${name}]` : name}:${server.port}`,
      source:
        config.backends.length > 0 ? source : `${source} (names no backends: looked for them)`,
      startedInMs: performance.now() - began,
      places: gateway.places(),
      snapshot: gateway.snapshot(),
      metricsPath: config.metrics.enabled ? config.metrics.endpoint : null,
      tracesTo: tracingWanted(config.telemetry, process.env)
        ? String(shown(["otlpEndpoint"], config.telemetry.otlpEndpoint ?? "as OTEL_* says"))
        : null,
      needsKey:
        config.auth.keys.length + config.auth.jwt.length + settings.environmentKeys.length > 0,
      notes: settings.notes,
      colour: forced || (colours && process.stderr.isTTY === true),
    }),
  );
  await gateway.startTracing();

  const signal = await stopping;
  const { delayMs, graceMs } = gateway.config().drain;
  log.info("shutting down", { signal, delay_ms: delayMs, grace_ms: graceMs });
  gateway.startDraining();
  await new Promise((resolve) => setTimeout(resolve, delayMs));
  const stopped = server.stop();
  const clean = await gateway.drain(graceMs);
  const flushed = new Promise((resolve) => setTimeout(resolve, FLUSH_MS));
  await Promise.all([Promise.race([stopped, flushed]), gateway.close()]);
  process.exit(clean ? 0 : 1);
}

await main();
