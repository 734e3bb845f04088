/** Engines and a gateway in front of them, as most of the tests want them. */
import assert from "node:assert/strict";
import type { Answer } from "./client.ts";
import { send } from "./client.ts";
import type { EngineOptions, FakeEngine } from "./engine.ts";
import { startEngine } from "./engine.ts";
import type { Gateway, GatewayOptions } from "./gateway.ts";
import { startGateway } from "./gateway.ts";

export interface Member extends EngineOptions {
  /** Further keys of its entry in `backends`. */
  backend?: Record<string, unknown>;
}

export interface Fleet<Id extends string> {
  engines: Record<Id, FakeEngine>;
  gateway: Gateway;
  url: string;
  /** Every engine as at the start. */
  reset(): void;
  /** Another configuration for the same engines, in effect when this resolves. */
  reconfigure(config: Record<string, unknown>): Promise<void>;
  /** Stops all; a rejection that nobody handled is a failure of the test. */
  close(): Promise<void>;
}

export async function startFleet<Id extends string>(
  members: Record<Id, Member>,
  config: Record<string, unknown> = {},
  options: GatewayOptions = {},
): Promise<Fleet<Id>> {
  const engines = {} as Record<Id, FakeEngine>;
  const backends: unknown[] = [];
  for (const [id, { backend, ...engine }] of Object.entries<Member>(members)) {
    const started = await startEngine(engine);
    engines[id as Id] = started;
    backends.push({ id, kind: started.kind, url: started.url, ...backend });
  }
  const all = Object.values<FakeEngine>(engines);
  const closeEngines = (): Promise<unknown> => Promise.all(all.map((engine) => engine.close()));
  try {
    const gateway = await startGateway({ ...options, config: { ...config, backends } });
    return {
      engines,
      gateway,
      url: gateway.url,
      reset: () => {
        for (const engine of all) engine.reset();
      },
      async reconfigure(next) {
        await gateway.writeConfig({ ...next, backends });
        const reloaded = await send(`${gateway.url}/admin/api/reload`, "");
        assert.equal(reloaded.status, 200, reloaded.text);
      },
      async close() {
        await gateway.stop();
        await closeEngines();
        assert.doesNotMatch(
          gateway.stderr() + gateway.stdout(),
          /unhandled|uncaught|internal_error/i,
        );
      },
    };
  } catch (error) {
    await closeEngines();
    throw error;
  }
}

export interface OpenaiError {
  message: string;
  type: string;
  param: string | null;
  code: string | null;
}

/** The envelope of contract §4: all four keys, `code` a string or null, no stack. */
export function checkEnvelope(error: unknown): OpenaiError {
  assert.ok(typeof error === "object" && error !== null, "an error is an object");
  assert.deepEqual(Object.keys(error).toSorted(), ["code", "message", "param", "type"]);
  const { message, type, param, code } = error as OpenaiError;
  assert.ok(typeof message === "string" && message.length > 0, "a message");
  assert.ok(typeof type === "string" && type.length > 0, "a type");
  assert.ok(param === null || typeof param === "string", "param is a string or null");
  assert.ok(code === null || typeof code === "string", `code is a string or null, not ${code}`);
  assert.doesNotMatch(message, /\n\s+at |node_modules|\.ts:\d+/, "no stack");
  return error as OpenaiError;
}

/** An answer that is an error of ours, in OpenAI's envelope. */
export function expectError(answer: Answer, status: number, code?: string | null): OpenaiError {
  assert.equal(answer.status, status, answer.text);
  assert.match(answer.headers.get("content-type") ?? "", /^application\/json/);
  assert.match(answer.headers.get("x-request-id") ?? "", /^[a-z0-9-]{16,36}$/);
  const { error, ...others } = answer.json();
  assert.deepEqual(others, {}, "nothing beside the error");
  const checked = checkEnvelope(error);
  if (code !== undefined) assert.equal(checked.code, code, answer.text);
  return checked;
}

/** The same in Anthropic's. */
export function expectAnthropicError(answer: Answer, status: number, type: string): string {
  assert.equal(answer.status, status, answer.text);
  const body = answer.json();
  assert.deepEqual(Object.keys(body).toSorted(), ["error", "request_id", "type"]);
  assert.equal(body.type, "error");
  assert.equal(body.request_id, answer.headers.get("x-request-id"));
  assert.equal(answer.headers.get("request-id"), answer.headers.get("x-request-id"));
  const error = body.error as { type: string; message: string };
  assert.deepEqual(Object.keys(error).toSorted(), ["message", "type"]);
  assert.equal(error.type, type, answer.text);
  assert.ok(error.message.length > 0);
  return error.message;
}
