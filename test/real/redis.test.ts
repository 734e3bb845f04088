/** Budgets and answers in a real Redis that is frozen, killed and started again. */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { accessSync } from "node:fs";
import net from "node:net";
import { delimiter, join } from "node:path";
import process from "node:process";
import test from "node:test";
import fc from "fast-check";
import { Redis } from "ioredis";
import {
  book,
  costOf,
  keyOf,
  lengthOf,
  refusalOf,
  settle,
  type Account,
  type Accounts,
  type Limit,
} from "../../src/core/budget.ts";
import { RedisAnswers } from "../../src/stores/redis-answers.ts";
import { RedisLedger, RESERVE, SETTLE } from "../../src/stores/redis-ledger.ts";
import { RedisLink, runScript, type Script } from "../../src/stores/redis.ts";
import { seeded, sleep, until } from "../support/client.ts";

const SERVER = [...(process.env.PATH ?? "").split(delimiter), "/usr/bin"]
  .map((folder) => join(folder, "redis-server"))
  .find(isThere);
const skip = SERVER === undefined && "no redis-server on PATH: run test/real/install.sh";
if (skip) console.log(`skipped: redis-server: ${skip}`);

/** More than the default: on a busy machine Redis itself may not run for 20 ms. */
const TIMEOUT_MS = 100;
const DAY_MS = 86_400_000;

function isThere(path: string): boolean {
  try {
    accessSync(path);
    return true;
  } catch {
    return false;
  }
}

/** A test run that dies takes its servers along; a frozen one would stay for ever. */
const running = new Set<ChildProcess>();
process.on("exit", () => {
  for (const child of running) signal(child, "SIGKILL");
});

async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function startServer(port: number): Promise<ChildProcess> {
  const args = ["--bind", "127.0.0.1", "--port", String(port), "--save", "", "--appendonly", "no"];
  const child = spawn(SERVER ?? "", args, { stdio: "ignore" });
  running.add(child);
  child.once("close", () => running.delete(child));
  const isUp = (): Promise<boolean> =>
    new Promise((resolve) => {
      const socket = net.connect({ port, host: "127.0.0.1" });
      socket.once("connect", () => resolve(true)).once("error", () => resolve(false));
      socket.once("connect", () => socket.destroy());
    });
  assert(await until(isUp), "redis-server did not start");
  return child;
}

/** By its id: on Deno a child takes one signal from `child.kill`, and no other. */
function signal({ pid }: ChildProcess, name: "SIGSTOP" | "SIGCONT" | "SIGKILL"): void {
  if (pid !== undefined) process.kill(pid, name);
}

async function kill(child: ChildProcess): Promise<void> {
  if (!running.has(child)) return;
  const closed = new Promise((resolve) => child.once("close", resolve));
  signal(child, "SIGKILL");
  await closed;
}

/** Two gateways that share a Redis. */
async function startPair(port: number) {
  const url = `redis://127.0.0.1:${port}`;
  const settings = { url, timeoutMs: TIMEOUT_MS, prefix: "test:" };
  const pair = [0, 1].map(() => {
    const link = new RedisLink(settings);
    return { link, ledger: new RedisLedger(link, () => Date.now()) };
  });
  assert(await until(() => pair.every(({ link }) => link.isUp && link.peers === 2)));
  return {
    pair,
    areUp: () => pair.every(({ link }) => link.isUp),
    areAway: () => pair.every(({ link }) => !link.isUp),
    close: () => Promise.all(pair.map(({ link }) => link.close())),
  };
}

function perDay(amount: number): Limit[] {
  return [{ unit: "tokens", amount, window: "day" }];
}

test(
  "the script and core/budget.ts decide and count alike",
  { skip, timeout: 60_000 },
  async () => {
    const port = await freePort();
    const server = await startServer(port);
    const redis = new Redis(port, "127.0.0.1");
    let run = 0;
    const anyLimit: fc.Arbitrary<Limit> = fc.record({
      unit: fc.constantFrom("requests" as const, "tokens" as const),
      amount: fc.integer({ min: 1, max: 100_000 }),
      window: fc.constantFrom("10s", "90s", "7m", "2h", "day", "month"),
    });
    const anyLimits = fc.uniqueArray(anyLimit, { selector: keyOf, minLength: 1, maxLength: 4 });
    const cost = fc.oneof(fc.nat(2000), fc.nat(150_000));
    const event = fc.record({
      type: fc.constantFrom("reserve", "reserve", "settle", "again", "unheard", "shift", "change"),
      tokens: cost,
      which: fc.nat(20),
      ms: fc.oneof(fc.nat(30_000), fc.nat(3 * DAY_MS)),
    });
    const events = fc.array(event, { minLength: 10, maxLength: 40 });
    let [grants, refusals] = [0, 0];
    try {
      await fc.assert(
        fc.asyncProperty(anyLimits, events, async (limits, list) => {
          const base = `run-${run++}:`;
          const names = limits.map((limit) => base + keyOf(limit));
          const model: Accounts = new Map();
          const open: { id: string; tokens: number; at: number }[] = [];
          const done: typeof open = [];
          const call = async (which: Script, id: string, first: number, costs: number[]) => {
            const args = limits.flatMap(({ unit, window, amount }, index) => {
              return [unit, lengthOf(window) ?? window, amount, costs[index] ?? 0];
            });
            const reply = await runScript(redis, which, [base + id, ...names], [first, ...args]);
            const [granted, now, ...accounts] = (reply as unknown[]).map(Number);
            return { granted, now: now ?? 0, accounts };
          };
          const agree = ({ now, accounts }: { now: number; accounts: number[] }) => {
            for (const [index, limit] of limits.entries()) {
              const account = model.get(keyOf(limit));
              const isLive = account !== undefined && account.until > now;
              const isSame = account?.amount === limit.amount || lengthOf(limit.window) === null;
              // What nothing was charged to since its limit has changed is told as if it had been.
              const scaled = ({ until, amount }: Account): number =>
                isSame ? until : now + ((until - now) * amount) / limit.amount;
              const expected = isLive ? [scaled(account), account.used] : [0, 0];
              const actual = accounts.slice(index * 2, index * 2 + 2);
              assert.deepEqual((actual[0] ?? 0) > now ? actual : [0, 0], expected, limit.window);
            }
          };
          for (const { type, tokens, which, ms } of list) {
            const id = `r-${run}-${open.length + done.length}-${which}-${tokens}`;
            if (type === "reserve") {
              const costs = limits.map((limit) => costOf(limit, tokens));
              const reply = await call(RESERVE, id, tokens, costs);
              const refusal = refusalOf(model, limits, tokens, reply.now);
              assert.equal(reply.granted === 1, refusal === null);
              if (refusal === null) {
                grants++;
                book(model, limits, tokens, reply.now);
                open.push({ id, tokens, at: reply.now });
              } else refusals++;
              agree(reply);
            }
            const settlementOf = (): number[] =>
              limits.map(({ unit }) => (unit === "tokens" ? tokens : 1));
            if (type === "settle") {
              const [reserved] = open.splice(which % Math.max(1, open.length), 1);
              if (reserved === undefined) continue;
              const reply = await call(SETTLE, reserved.id, reserved.at, settlementOf());
              settle(model, limits, reserved, tokens, reply.now);
              done.push(reserved);
              agree(reply);
            }
            if (type === "again") {
              const settled = done[which % Math.max(1, done.length)];
              if (settled === undefined) continue;
              agree(await call(SETTLE, settled.id, settled.at, settlementOf()));
              agree(await call(RESERVE, settled.id, tokens, settlementOf()));
            }
            if (type === "unheard") {
              const reply = await call(SETTLE, `un-${id}`, Date.now(), settlementOf());
              book(model, limits, tokens, reply.now);
              agree(reply);
            }
            if (type === "change") {
              for (const limit of limits)
                limit.amount = 1 + Math.floor(limit.amount * (which / 10));
            }
            if (type === "shift") {
              // Time goes by: everything lies so much further back.
              for (const [key, account] of model) {
                const until = account.until - ms;
                model.set(key, { ...account, until });
                const text = `${until} ${account.used} ${account.amount}`;
                await redis.set(base + key, text, "KEEPTTL", "XX");
              }
            }
          }
        }),
        { numRuns: 60, endOnFailure: true },
      );
      assert(grants > 100 && refusals > 100, `${grants} granted, ${refusals} refused`);
      for (const key of await redis.keys("*")) assert((await redis.pttl(key)) > 0, key);
    } finally {
      redis.disconnect();
      await kill(server);
    }
  },
);

const FROZEN = "nothing fails and nothing is lost while Redis is frozen, killed and started again";

test(FROZEN, { skip, timeout: 60_000 }, async () => {
  const workers = 8;
  const random = seeded("real redis");
  const port = await freePort();
  let server = await startServer(port);
  const { pair, areUp, areAway, close } = await startPair(port);
  const gateways = pair.map(({ link, ledger }) => ({ ledger, answers: new RedisAnswers(link) }));
  const limits = perDay(1e9);
  const tally = { settled: 0, bookings: 0, refused: 0, failed: 0 };
  let isOver = false;

  const work = async ({ ledger, answers }: (typeof gateways)[number]): Promise<void> => {
    while (!isOver) {
      const booking = await ledger.reserve("t", limits, 100);
      tally.bookings++;
      await answers.get("key");
      await sleep(random.between(0, 4));
      if (!booking.granted) {
        tally.refused++;
        continue;
      }
      const tokens = random.between(50, 150);
      ledger.settle(booking.reservation, tokens);
      tally.settled += tokens;
    }
  };
  const startLoad = (): (() => Promise<void>) => {
    isOver = false;
    const load = Promise.all(
      gateways.flatMap((each) =>
        Array.from({ length: workers }, () => work(each).catch(() => tally.failed++)),
      ),
    );
    return async () => {
      isOver = true;
      await load;
    };
  };
  const usedIn = async (): Promise<number> => {
    const [report] = (await gateways[0]?.ledger.report("t", limits)) ?? [];
    return (report?.used ?? 0) + (report?.reserved ?? 0);
  };
  /** What both links count from now on. */
  const count = () => {
    const sum = () => {
      const total = { waits: 0, timeouts: 0, errors: 0, skipped: 0 };
      for (const { link } of pair) {
        for (const name of ["waits", "timeouts", "errors", "skipped"] as const) {
          total[name] += link.counts[name];
        }
      }
      return total;
    };
    const before = sum();
    return () => {
      const { waits, timeouts, errors, skipped } = sum();
      return {
        waits: waits - before.waits,
        failures: timeouts + errors - before.timeouts - before.errors,
        skipped: skipped - before.skipped,
      };
    };
  };
  /** Each worker has something on its way, and may begin one thing more before the third failure. */
  const most = pair.length * (workers * 3 + 3);

  try {
    const body = new Uint8Array([1, 2]);
    const answer = { storedAt: 1, contentType: "x", cacheControl: null, model: "m", body };
    gateways[0]?.answers.set("key", answer, 60_000);
    let stopLoad = startLoad();
    await sleep(300);
    const fromOther = async (): Promise<unknown> => await gateways[1]?.answers.get("key");
    assert(await until(async () => (await fromOther()) !== null), "an answer for both");

    const freezing = count();
    signal(server, "SIGSTOP");
    assert(await until(areAway), "noticed that it is frozen");
    await sleep(TIMEOUT_MS * 2);
    const { failures } = freezing();
    assert(failures > 0 && failures <= most, JSON.stringify(freezing()));
    const frozen = count();
    const { bookings } = tally;
    await sleep(1000);
    assert.deepEqual([frozen().waits, frozen().failures], [0, 0], "nobody waits any more");
    assert(frozen().skipped > 100 && tally.bookings > bookings + 50);
    assert.equal(await fromOther(), null);

    signal(server, "SIGCONT");
    assert(await until(areUp), "noticed that it goes on");
    await sleep(300);
    await stopLoad();
    // Settlements were sent again, and each was executed once.
    const isExact = async (): Promise<boolean> => (await usedIn()) === tally.settled;
    assert(await until(isExact), `${await usedIn()} of ${tally.settled}`);

    stopLoad = startLoad();
    await sleep(200);
    const killing = count();
    await kill(server);
    assert(await until(areAway), "noticed that it is gone");
    await sleep(500);
    assert(killing().failures <= most, JSON.stringify(killing()));
    server = await startServer(port);
    assert(await until(areUp), "came back by itself");
    await sleep(300);
    await stopLoad();
    assert(await until(async () => (await usedIn()) > 0), "what was owed is in the new one");

    assert.deepEqual([tally.refused, tally.failed], [0, 0]);
    const longest = Math.max(...pair.map(({ link }) => link.counts.longestMs));
    console.log(`real redis: ${tally.bookings} bookings, longest wait ${longest.toFixed(1)} ms`);
  } finally {
    isOver = true;
    await close();
    await kill(server);
  }
});

const SHARED = "two gateways hold one limit, and half of what is left each while Redis is away";

test(SHARED, { skip, timeout: 60_000 }, async () => {
  const amount = 20_000;
  const limits = perDay(amount);
  const port = await freePort();
  const server = await startServer(port);
  const { pair, areUp, areAway, close } = await startPair(port);
  const [one, other] = pair;
  assert(one !== undefined && other !== undefined);

  /** Ten clients of each gateway take until they are refused; what each gateway has settled. */
  const exhaust = (tenant: string): Promise<number[]> =>
    Promise.all(
      pair.map(async ({ ledger }) => {
        let settled = 0;
        const client = async (): Promise<void> => {
          for (;;) {
            const booking = await ledger.reserve(tenant, limits, 100);
            if (!booking.granted) return;
            await sleep(1);
            const tokens = 60 + (settled % 41);
            ledger.settle(booking.reservation, tokens);
            settled += tokens;
          }
        };
        await Promise.all(Array.from({ length: 10 }, client));
        // The last refund may have made room for another one.
        await client();
        return settled;
      }),
    );
  const sum = (numbers: number[]): number => numbers.reduce((total, each) => total + each, 0);

  try {
    const together = sum(await exhaust("t"));
    assert(together <= amount && together > amount - 200, `${together}`);

    for (const [{ ledger }, tokens] of [
      [one, 6000],
      [other, 2000],
    ] as const) {
      const booking = await ledger.reserve("u", limits, tokens);
      assert(booking.granted);
      ledger.settle(booking.reservation, tokens);
    }
    // So both know what is left: 12 000.
    for (const { ledger } of pair) {
      const isKnown = async () => (await ledger.report("u", limits))[0]?.used === 8000;
      assert(await until(isKnown));
    }
    signal(server, "SIGSTOP");
    const shares = await exhaust("u");
    assert(areAway());
    for (const share of shares) assert(share <= 6000 && share > 5900, `${share} of 6000`);
    signal(server, "SIGCONT");
    assert(await until(areUp));
    const isBooked = async (): Promise<boolean> => {
      const [report] = await one.ledger.report("u", limits);
      return report?.used === 8000 + sum(shares) && report.limit === amount;
    };
    assert(await until(isBooked), "what was owed is booked");

    await other.link.close();
    assert(await until(() => one.link.peers === 1), "knows that the other has left");
  } finally {
    await close();
    await kill(server);
  }
});
