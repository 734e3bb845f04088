/** A POST is sent once: no runtime may repeat it behind our back. */
import assert from "node:assert/strict";
import test from "node:test";
import { until } from "../support/client.ts";
import { startGateway } from "../support/gateway.ts";
import { ANSWER, ask, chat, isDeno, runNaive, startUpstream, whole } from "./rig.ts";

// Bun's fetch repeats only idempotent methods: runtimes.md §d.
if (isDeno) {
  test(
    "Deno: fetch repeats a POST on a reused connection that dies, the gateway sends it once",
    { timeout: 60_000 },
    async () => {
      const upstream = await startUpstream(({ body, head, socket }) => {
        if (body.includes("die")) socket.destroy();
        else socket.write(whole(200, ANSWER));
        if (/^connection: *close/im.test(head)) socket.end();
      });
      const naive = await runNaive("keep-alive-fetch", upstream.url, { listens: false });
      const gateway = await startGateway({
        config: { backends: [{ id: "raw", kind: "openai", url: upstream.url, models: ["m"] }] },
      });
      const deaths = () => upstream.posts.filter(({ body }) => body.includes("die"));
      try {
        assert.ok(await until(() => naive.exit() !== undefined), naive.output());
        assert.equal(deaths().length, 2, "the naive program was expected to send it twice");
        assert.ok(deaths()[0]?.nth === 2, "on the connection of the request before it");

        const sentByNaive = upstream.posts.length;
        const warm = await ask(gateway.port, chat(false, "warm"));
        assert.ok(await until(() => warm.received().includes(" 200 ")), warm.received());
        const client = await ask(gateway.port, chat(false, "die"));
        assert.ok(await until(() => client.received().includes('"error"')), client.received());
        assert.match(client.received(), /^HTTP\/1.1 502 /);
        assert.match(client.received(), /"code":"upstream_unreachable"/);
        assert.match(client.received(), /^x-tidegate-attempts: 1\r$/im);
        assert.equal(upstream.posts.length - sentByNaive, 2);
        assert.equal(deaths().length, 3);
      } finally {
        await gateway.stop("SIGKILL");
        await naive.stop();
        await upstream.stop();
      }
    },
  );
}
