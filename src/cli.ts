#!/usr/bin/env bun
import { randomBytes } from "node:crypto";
import process from "node:process";
import manifest from "../package.json" with { type: "json" };
import { readArguments, usageError } from "./arguments.ts";
import { sha256 } from "./caller.ts";
import { schema } from "./config.ts";
import { suggest } from "./core/suggest.ts";

const HELP = `tidegate ${manifest.version}: what there is to do around a gateway

Usage: tidegate VERB [options]     or: bun src/cli.ts VERB …, deno run -A src/cli.ts VERB …

  key create        a new key for a client, and the line for the configuration

  --tenant NAME     whose key it is (default: default)
  --json            the result as JSON
  --help            this text
  --version         the version

The gateway itself starts by: bun start, deno task start (with --help of its own).
`;

const OPTIONS = {
  tenant: { type: "string", default: "default" },
  json: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  version: { type: "boolean", default: false },
} as const;

interface Options {
  tenant: string;
  json: boolean;
}

const VERBS = new Map<string, (options: Options) => void>([["key create", createKey]]);

const tenantName = schema.shape.tenants.unwrap().keyType;

/** Makes a key that nobody can guess. It is printed and nowhere kept; what the gateway needs is its hash. */
function createKey({ tenant, json }: Options): void {
  const name = tenantName.safeParse(tenant);
  if (!name.success) {
    usageError(`--tenant: ${name.error.issues[0]?.message}, not ${JSON.stringify(tenant)}`);
  }
  const key = `tg_${randomBytes(32).toString("base64url")}`;
  const hash = `sha256:${Buffer.from(sha256(key)).toString("hex")}`;
  if (json) return void process.stdout.write(`${JSON.stringify({ key, hash, tenant })}\n`);
  // The key alone: `KEY=$(tidegate key create)`.
  process.stdout.write(`${key}\n`);
  const listed = tenant === "default" ? "" : ` (${tenant} has to be listed in tenants)`;
  process.stderr.write(`
The client's key is shown this once. The line for auth.keys of the configuration${listed}:

  { hash: "${hash}", tenant: "${tenant}" },

Once the gateway has read that, within a second, this lists the models the key may use:

  curl http://localhost:4000/v1/models -H "Authorization: Bearer KEY"
`);
}

function main(): void {
  const { values, positionals } = readArguments({ options: OPTIONS, allowPositionals: true });
  if (values.help) return void process.stdout.write(HELP);
  if (values.version) return void process.stdout.write(`${manifest.version}\n`);
  const verbs = [...VERBS.keys()];
  const asked = positionals.join(" ");
  if (asked === "") usageError(`it takes a verb: ${verbs.join(", ")}`);
  const verb = VERBS.get(asked);
  if (verb !== undefined) return verb(values);
  const meant = suggest(asked, verbs);
  const hint = meant === null ? `there is ${verbs.join(", ")}` : `did you mean ${meant}?`;
  usageError(`unknown verb ${JSON.stringify(asked)}; ${hint}`);
}

main();
