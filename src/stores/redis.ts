import { createHash } from "node:crypto";
import type { Redis } from "ioredis";

interface Settings {
  url: string;
  /** No caller waits longer, milliseconds. */
  timeoutMs: number;
  /** Before the name of every key. */
  prefix: string;
}

/** Of callers, not of the background. `waits` ended as answers, `timeouts` and `errors`. */
export interface LinkCounts {
  waits: number;
  timeouts: number;
  errors: number;
  /** Did not wait, because Redis is away. */
  skipped: number;
  /** The longest wait, milliseconds. */
  longestMs: number;
}

/** Failures in a row after which nobody waits any more. */
const MOST_FAILURES = 3;
const PING_MS = 500;
/** A gateway that has not pinged for so long is no peer. */
const PEER_MS = 5000;
/** A connection that owes an answer for so long is given up: nothing else tells of a lost one. */
const SILENCE_MS = 3000;
/** A frozen server does not answer to the end of a connection either. */
const GOODBYE_MS = 50;

/** Registers this gateway; answers how many there are. */
const PING = script(`
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ${PEER_MS})
redis.call('PEXPIRE', KEYS[1], ${PEER_MS})
return redis.call('ZCARD', KEYS[1])
`);

class Timeout extends Error {}

/**
 * The connection to Redis, or Valkey, that all of this gateway shares. It starts by itself, comes
 * back by itself, and never throws: what cannot be had in time is null.
 *
 * The waiting rule: nobody waits longer than `timeoutMs`; after three failures in a row nobody waits
 * at all, until a ping in the background is answered in time.
 */
export class RedisLink {
  readonly prefix: string;
  readonly counts: LinkCounts = { waits: 0, timeouts: 0, errors: 0, skipped: 0, longestMs: 0 };

  readonly #settings: Settings;
  readonly #onChange: (isUp: boolean, reason: string) => void;
  readonly #id = crypto.randomUUID();
  readonly #listeners = new Set<() => void>();
  #redis: Redis | null = null;
  #isUp = false;
  #isClosed = false;
  #failures = 0;
  #lastError = "";
  #timer: ReturnType<typeof setInterval> | undefined;
  #isPinging = false;
  #peers = 1;
  #upSince = 0;

  /** @param onChange told when Redis comes and goes, for the log. */
  constructor(settings: Settings, onChange: (isUp: boolean, reason: string) => void = () => {}) {
    this.#settings = settings;
    this.prefix = settings.prefix;
    this.#onChange = onChange;
    this.#start().catch((error: unknown) => this.#onChange(false, messageOf(error)));
  }

  /** Is it worth asking? */
  get isUp(): boolean {
    return this.#isUp;
  }

  /** Gateways with the same prefix, this one included; while Redis is away, those there were. */
  get peers(): number {
    return this.#peers;
  }

  /** Called after each ping that was answered: what is owed can be sent. */
  onPing(listener: () => void): void {
    this.#listeners.add(listener);
  }

  /** The command's answer; null without one in time. The command may be executed all the same. */
  async ask<Reply>(command: (redis: Redis) => Promise<Reply>): Promise<Reply | null> {
    const { counts } = this;
    if (!this.#isUp || this.#redis === null) {
      counts.skipped++;
      return null;
    }
    counts.waits++;
    const startedAt = performance.now();
    try {
      const reply = await this.#race(this.#redis, command);
      this.#failures = 0;
      return reply;
    } catch (error) {
      if (error instanceof Timeout) counts.timeouts++;
      else counts.errors++;
      this.#fail(error);
      return null;
    } finally {
      counts.longestMs = Math.max(counts.longestMs, performance.now() - startedAt);
    }
  }

  /** Leaves no timer and no socket behind. */
  async close(): Promise<void> {
    this.#isClosed = true;
    clearInterval(this.#timer);
    const redis = this.#redis;
    if (redis === null) return;
    if (this.#isUp) {
      this.#isUp = false;
      await this.#race(redis, (open) => open.zrem(this.#peersKey, this.#id)).catch(() => {});
    }
    await new Promise<void>((resolve) => {
      // Between two attempts to connect there is nothing that could end.
      const timer = setTimeout(resolve, GOODBYE_MS * 2);
      redis.once("end", () => {
        clearTimeout(timer);
        resolve();
      });
      redis.disconnect();
    });
  }

  get #peersKey(): string {
    return `${this.prefix}peers`;
  }

  async #start() {
    const { Redis } = await import("ioredis");
    if (this.#isClosed) return;
    const redis = new Redis(this.#settings.url, {
      protocol: 2,
      connectTimeout: 1000,
      socketTimeout: SILENCE_MS,
      disconnectTimeout: GOODBYE_MS,
      maxRetriesPerRequest: 0,
      autoResendUnfulfilledCommands: false,
      enableOfflineQueue: false,
      enableReadyCheck: false,
      disableClientInfo: true,
      retryStrategy: (attempts) => Math.min(50 * 2 ** attempts, 1000),
    });
    this.#redis = redis;
    redis.on("error", (error) => (this.#lastError = messageOf(error)));
    redis.on("ready", () => void this.#ping());
    redis.on("close", () => this.#setUp(false, this.#lastError || "connection closed"));
    this.#timer = setInterval(() => void this.#ping(), PING_MS);
  }

  /** One at a time: while the server is frozen they would pile up. */
  async #ping() {
    const redis = this.#redis;
    if (this.#isPinging || this.#isClosed || redis?.status !== "ready") return;
    this.#isPinging = true;
    let sent: Promise<number> | undefined;
    try {
      const peers = await this.#race(redis, (open) => {
        sent = runScript(open, PING, [this.#peersKey], [this.#id]) as Promise<number>;
        return sent;
      });
      this.#failures = 0;
      this.#setUp(true, "");
      // After an outage the others are only just coming back.
      const isSettled = performance.now() - this.#upSince > PEER_MS;
      this.#peers = isSettled ? Math.max(1, peers) : Math.max(this.#peers, peers);
      for (const listener of this.#listeners) listener();
    } catch (error) {
      this.#fail(error);
      await sent?.catch(() => {});
    } finally {
      this.#isPinging = false;
    }
  }

  #race<Reply>(redis: Redis, command: (redis: Redis) => Promise<Reply>): Promise<Reply> {
    return new Promise((resolve, reject) => {
      const reply = command(redis);
      const { timeoutMs } = this.#settings;
      // After a pause of the event loop Deno runs timers first, though the reply is there already.
      const timer = setTimeout(() => {
        setImmediate(() => reject(new Timeout(`no answer within ${timeoutMs} ms`)));
      }, timeoutMs);
      reply.then(resolve, reject).finally(() => clearTimeout(timer));
    });
  }

  #fail(error: unknown) {
    this.#failures++;
    if (this.#failures >= MOST_FAILURES) this.#setUp(false, messageOf(error));
  }

  #setUp(isUp: boolean, reason: string) {
    if (this.#isUp === isUp || this.#isClosed) return;
    this.#isUp = isUp;
    if (isUp) this.#upSince = performance.now();
    this.#onChange(isUp, reason);
  }
}

export interface Script {
  lua: string;
  sha: string;
}

export function script(lua: string): Script {
  return { lua, sha: createHash("sha1").update(lua).digest("hex") };
}

/** Sends the script's text only where the server does not have it. */
export async function runScript(
  redis: Redis,
  { lua, sha }: Script,
  keys: string[],
  args: (string | number)[],
): Promise<unknown> {
  try {
    return await redis.evalsha(sha, keys.length, ...keys, ...args);
  } catch (error) {
    if (!messageOf(error).startsWith("NOSCRIPT")) throw error;
    return await redis.eval(lua, keys.length, ...keys, ...args);
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
