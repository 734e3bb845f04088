/** A large body is looked at in several turns of the event loop: what it is answered is what a small one is. */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { chatBody, connect, postBytes, send, sleep, until } from "../support/client.ts";
import type { Fleet } from "../support/fleet.ts";
import { startFleet } from "../support/fleet.ts";

const TIMEOUT = { timeout: 60_000 };
const LARGE_BYTES = 1.5 * 1024 * 1024;
const PAD = '{"pad":"';

/** The text behind a large first key: `{` is the beginning of both. */
function enlarged(text: string): string {
  return `${PAD}${"é".repeat(LARGE_BYTES / 2)}",${text.slice(1)}`;
}

describe("large bodies", () => {
  let fleet: Fleet<"a">;
  before(async () => {
    fleet = await startFleet({ a: {} });
  });
  afterEach(() => fleet.reset());
  after(() => fleet.close());

  const post = (body: string | Uint8Array) => send(`${fleet.url}/v1/chat/completions`, body);

  it("get the errors of small ones", TIMEOUT, async () => {
    const wrong = [
      '{"model":"test-model","model":"other"}',
      '{"model":"test-model"} x',
      '{"model":7}',
      '{"model":"nowhere","messages":[]}',
      '{"messages":[]}',
    ];
    for (const text of wrong) {
      const [small, large] = [await post(text), await post(enlarged(text))];
      assert.ok(small.status >= 400, text);
      assert.equal(large.status, small.status);
      // V8 says where the mistake stands.
      assert.equal(large.text.replaceAll(/\d+/g, ""), small.text.replaceAll(/\d+/g, ""));
    }
    const isNoText = Buffer.from(enlarged(JSON.stringify(chatBody())));
    isNoText[PAD.length] = 0xff;
    const { status, text } = await post(isNoText);
    assert.equal(status, 400);
    assert.match(text, /the body is not JSON/);
    assert.equal(fleet.engines.a.inference().length, 0);
  });

  it("go on as they came", TIMEOUT, async () => {
    const body = Buffer.from(`\ufeff${enlarged(JSON.stringify(chatBody({ n: 1.0 })))}`);
    // What the engine makes of a byte order mark is its own business.
    await post(body);
    assert.ok(fleet.engines.a.inference()[0]?.bodyBytes.equals(body));
  });

  it("are let go when their client leaves, whenever that is", TIMEOUT, async () => {
    const request = postBytes("/v1/chat/completions", enlarged(JSON.stringify(chatBody())));
    fleet.engines.a.behave({ headersDelayMs: 5000 });
    for (let ms = 0; ms < 40; ms += 2) {
      const client = await connect(fleet.gateway.port);
      client.write(request);
      await sleep(ms);
      client.leave("reset");
    }
    const { gateway, engines } = fleet;
    for (const gauge of ["tidegate_requests_in_flight", "tidegate_held_body_bytes"]) {
      assert.ok(await until(async () => (await gateway.metric(gauge)) === 0), gauge);
    }
    assert.ok(await until(() => engines.a.openConnections() === 0), "an upstream was left open");
    const left = gateway.records().filter(({ ending }) => ending === "cancelled");
    assert.ok(left.length > 0, "some of them left in time");
  });
});
