import { z } from "zod";
import { schema } from "../config.ts";

/** The part of JSON Schema that our own schema uses. */
export interface Shape {
  type?: string;
  description?: string;
  default?: unknown;
  enum?: string[];
  const?: unknown;
  properties?: Record<string, Shape>;
  required?: string[];
  additionalProperties?: Shape | boolean;
  items?: Shape;
  anyOf?: Shape[];
  minimum?: number;
  exclusiveMinimum?: number;
  maximum?: number;
}

export type Path = readonly PropertyKey[];

/** The configuration as JSON Schema: for editors, for the documentation, and to look keys up in. */
export const configShape = z.toJSONSchema(schema, { io: "input" }) as Shape;

function alternatives(shape: Shape): Shape[] {
  return [shape, ...(shape.anyOf ?? [])];
}

/** What may stand at this path: more than one where there is a choice, none where nothing may. */
export function shapesAt(path: Path): Shape[] {
  let shapes: Shape[] = [configShape];
  for (const part of path) {
    shapes = shapes
      .flatMap(alternatives)
      .map((each) => {
        if (typeof part === "number") return each.items;
        const other = each.additionalProperties;
        return each.properties?.[String(part)] ?? (typeof other === "object" ? other : undefined);
      })
      .filter((each) => each !== undefined);
  }
  return shapes.flatMap(alternatives);
}

/** The keys that may stand in the object at this path. */
export function knownKeys(path: Path): string[] {
  return shapesAt(path).flatMap((each) => Object.keys(each.properties ?? {}));
}

/** The paths of all single values outside lists and maps: those that a variable can set. */
export function scalarPaths(shape: Shape = configShape, path: string[] = []): string[][] {
  if (shape.properties !== undefined) {
    return Object.entries(shape.properties).flatMap(([key, each]) =>
      scalarPaths(each, [...path, key]),
    );
  }
  return shape.type === "array" || shape.type === "object" ? [] : [path];
}

/**
 * A text from a variable as the value that is wanted at this path. One that does not fit is left as
 * it stands: the check names it.
 */
export function coerce(path: Path, text: string): string | number | boolean {
  const types = new Set(shapesAt(path).map(({ type }) => type));
  const isNumber = types.has("number") || types.has("integer");
  if (isNumber && text.trim() !== "" && Number.isFinite(Number(text))) return Number(text);
  if (types.has("string")) return text;
  if (types.has("boolean") && /^(?:true|false)$/i.test(text)) return text.toLowerCase() === "true";
  return text;
}

/** A path as people write it: `backends[0].url`, `models."llama3:8b".aliases`. */
export function pathText(path: Path): string {
  return path.reduce<string>((text, part) => {
    if (typeof part === "number") return `${text}[${part}]`;
    const name = String(part);
    const plain = /^[\w-]+$/.test(name) ? name : JSON.stringify(name);
    return text === "" ? plain : `${text}.${plain}`;
  }, "");
}
