/** What a client promises and does not keep, and what it asks for and does not get. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import {
  chatBody,
  connect,
  openaiChat,
  parseSse,
  postBytes,
  send,
  until,
  type RawClient,
} from "../support/client.ts";
import { startFleet, type Fleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const MIB = 1024 * 1024;

describe("promises", () => {
  let fleet: Fleet<"a">;
  const clients: RawClient[] = [];
  before(async () => {
    fleet = await startFleet(
      { a: { models: ["test-model"] } },
      {
        timeouts: { clientMs: 700 },
        limits: { heldBytes: 64 * MIB },
        circuitBreaker: { failureThreshold: 1_000_000 },
      },
    );
  });
  afterEach(() => {
    for (const client of clients.splice(0)) client.leave("close");
    fleet.reset();
  });
  after(() => fleet.close());

  async function raw(bytes: string | Uint8Array): Promise<RawClient> {
    const client = await connect(fleet.gateway.port);
    clients.push(client);
    client.write(bytes);
    return client;
  }

  it("a Host that is no host is no mistake of ours", TIMEOUT, async () => {
    for (const Host of ["localhost[", "%", "localhost:99999", "a b", "local%host", "localhost\\"]) {
      const client = await raw(postBytes("/v1/chat/completions", chatBody(), { Host }));
      assert(await until(() => client.status() !== null || client.isClosed()), Host);
      // What a runtime still reads as a name of this machine is served.
      assert([200, 400, 403, null].includes(client.status()), `${Host}: ${client.received()}`);
    }
  });

  it(
    "a length that is only declared takes no room from others, and not for ever",
    TIMEOUT,
    async () => {
      const slow = [];
      for (let at = 0; at < 8; at++) {
        const head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n";
        slow.push(await raw(`${head}Content-Length: ${32 * MIB}\r\n\r\n{`));
      }
      const answer = await openaiChat(fleet.url);
      assert.equal(answer.status, 200, answer.text);
      for (const client of slow) assert(await until(() => client.status() === 400));
      assert.equal(await fleet.gateway.metric("tidegate_held_body_bytes"), 0);
      assert(
        await until(async () => (await fleet.gateway.metric("tidegate_requests_in_flight")) === 0),
      );
    },
  );

  it("a stream that ends before the second of two choices is not whole", TIMEOUT, async () => {
    const event = (choice: object): string => `data: ${JSON.stringify({ choices: [choice] })}\n\n`;
    const first = { index: 0, finish_reason: "stop" };
    for (const [path, body, choice] of [
      ["/v1/chat/completions", chatBody({ n: 2 }), { ...first, delta: { content: "x" } }],
      ["/v1/completions", { model: "test-model", prompt: ["a", "b"] }, { ...first, text: "x" }],
    ] as const) {
      fleet.engines.a.behave({ fault: { kind: "raw", body: event(choice) } });
      const { text } = await send(fleet.url + path, { ...body, stream: true });
      assert.match(parseSse(text).events.at(-1)?.data ?? "", /upstream_incomplete/, path);
    }
  });
});
