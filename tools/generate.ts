/**
 * Writes what follows from `src/config.ts`: `schema.json` for editors, and `docs/configuration.md`, which
 * is `tools/configuration.md` with the tables of keys in it.
 *
 *     bun tools/generate.ts [--check]
 *
 * With `--check` it writes nothing and exits with 1 where a file is not current.
 */
import { readFile, writeFile } from "node:fs/promises";
import process from "node:process";
import { SCALARS } from "../src/settings/environment.ts";
import { configShape, type Shape } from "../src/settings/shape.ts";

const MARK = "<!-- tables -->";
const HEAD = "| key | type, default | meaning | variable |\n| --- | --- | --- | --- |";
const MIB = 1024 * 1024;

/** Variables of lists, which no path of a single value leads to. */
const LIST_VARIABLES: Record<string, string> = {
  backends: "TIDEGATE_BACKENDS",
  "auth.keys": "TIDEGATE_API_KEYS",
};

/** What a key may hold, in few words. */
function typeText(shape: Shape): string {
  const { type = "any", properties, required = [], items, anyOf } = shape;
  if (shape.const !== undefined) return `\`${JSON.stringify(shape.const)}\``;
  if (shape.enum !== undefined) return shape.enum.map((each) => `\`${each}\``).join(" ");
  if (anyOf !== undefined) return anyOf.map(typeText).join(" or ");
  if (items !== undefined) {
    const each = typeText(items);
    return each.includes(" ") ? `(${each})[]` : `${each}[]`;
  }
  if (properties !== undefined) {
    const keys = Object.keys(properties).map((key) => (required.includes(key) ? key : `${key}?`));
    // More than that have rows of their own.
    return keys.length > 2 ? "object" : `\`{ ${keys.join(", ")} }\``;
  }
  if (type !== "integer" && type !== "number") return type;
  const { minimum, exclusiveMinimum, maximum = Infinity } = shape;
  if (maximum < Number.MAX_SAFE_INTEGER) return `${minimum} to ${maximum}`;
  return `${type} ${exclusiveMinimum === undefined ? `≥ ${minimum}` : `> ${exclusiveMinimum}`}`;
}

function defaultText(path: string, value: unknown): string {
  if (path.endsWith("Bytes") && typeof value === "number") return `${value / MIB} MiB`;
  return `\`${JSON.stringify(value)}\``;
}

function row(shape: Shape, path: string, isRequired: boolean): string {
  const otherwise = shape.default === undefined ? [] : [defaultText(path, shape.default)];
  const type = [typeText(shape), ...(isRequired ? ["required"] : otherwise)].join(", ");
  const scalars = [...SCALARS].filter(([, each]) => each.join(".") === path).map(([name]) => name);
  const variables = [...scalars.toReversed(), ...(LIST_VARIABLES[path]?.split(" ") ?? [])];
  const cells = [`\`${path}\``, type, shape.description, variables.map((each) => `\`${each}\``)];
  return `| ${cells.map((cell) => [cell].flat().join(", ")).join(" | ")} |`;
}

/** The rows of a key and of what is below it. */
function rowsOf(shape: Shape, path: string, isRequired = false): string[] {
  const { properties, required = [], items, anyOf = [], additionalProperties: other } = shape;
  const below = [
    ...Object.entries(properties ?? {}).flatMap(([key, each]) =>
      rowsOf(each, `${path}.${key}`, required.includes(key)),
    ),
    ...(items === undefined ? [] : rowsOf(items, `${path}[]`)),
    ...(typeof other === "object" ? rowsOf(other, `${path}.<name>`) : []),
    // What one of several may look like is required of that one only.
    ...anyOf.flatMap((each) => rowsOf({ ...each, required: [] }, path)),
  ];
  // Sections and maps are headings; items and alternatives have nothing to say of themselves.
  const isHeading = properties !== undefined || typeof other === "object";
  if (isHeading || shape.description === undefined) return below;
  return [row(shape, path, isRequired), ...below];
}

function tables(): string {
  const sections = Object.entries(configShape.properties ?? {});
  return sections
    .map(([name, section]) => {
      const rows = rowsOf(section, name).join("\n");
      return `### ${name}\n\n${section.description}\n\n${HEAD}\n${rows}`;
    })
    .join("\n\n");
}

/** A leaf whose text is no value before it is read: `${VAR}` may stand there. */
function orVariable(key: string, value: unknown): unknown {
  if (key === "maximum" && value === Number.MAX_SAFE_INTEGER) return undefined;
  if (typeof value !== "object" || value === null || !("type" in value)) return value;
  const { description, default: otherwise, ...rest } = value as Record<string, unknown>;
  const isConstrained = ["enum", "const", "format", "pattern"].some((each) => each in rest);
  const isText = rest["type"] === "string" && !isConstrained;
  if (isText || rest["type"] === "object" || rest["type"] === "array") return value;
  return { description, default: otherwise, anyOf: [rest, { $ref: "#/$defs/variable" }] };
}

function schemaJson(): string {
  const { $schema, ...shape } = JSON.parse(JSON.stringify(configShape), orVariable) as {
    $schema: string;
    properties: object;
  };
  const schema = {
    $schema,
    title: "Tidegate configuration",
    ...shape,
    properties: { $schema: { type: "string" }, ...shape.properties },
    $defs: { variable: { type: "string", pattern: String.raw`\$\{\w+(:-[^}]*)?\}` } },
  };
  return `${JSON.stringify(schema, null, 2)}\n`;
}

/** Every generated file: its path in the repository, and its content. */
export async function generated(): Promise<Map<string, string>> {
  const frame = await readFile(new URL("configuration.md", import.meta.url), "utf8");
  return new Map([
    ["schema.json", schemaJson()],
    ["docs/configuration.md", frame.replace(MARK, () => tables())],
  ]);
}

async function main() {
  const isCheck = process.argv.includes("--check");
  for (const [path, content] of await generated()) {
    const url = new URL(`../${path}`, import.meta.url);
    if (!isCheck) {
      await writeFile(url, content);
    } else if ((await readFile(url, "utf8").catch(() => null)) !== content) {
      process.stderr.write(`${path} is not current: run "bun run generate"\n`);
      process.exitCode = 1;
    }
  }
}

if (import.meta.main) await main();
