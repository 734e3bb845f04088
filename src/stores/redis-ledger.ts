import {
  book,
  costOf,
  keyOf,
  lengthOf,
  refusalOf,
  settle,
  SLACK_MS,
  statesOf,
  type Account,
  type Accounts,
  type Limit,
} from "../core/budget.ts";
import {
  MemoryLedger,
  reportOf,
  type Booking,
  type BudgetReport,
  type Ledger,
  type Reservation,
} from "./ledger.ts";
import { runScript, script, type RedisLink, type Script } from "./redis.ts";

const DAY_MS = 86_400_000;
/** What was reserved is remembered for a request that takes so long. */
const RECORD_MS = DAY_MS;
/** That it was settled is remembered for the settlement that is sent again. */
const SETTLED_MS = 3_600_000;

/**
 * The maths of core/budget.ts, by the server's clock. KEYS: the reservation's record, then each
 * limit's account. ARGV: the tokens reserved or the time `at` of the reservation, then for each
 * limit its unit, window, amount and cost. Answers: granted or not, now, then each account's `until`
 * and `used`. Doubles travel as text: a Lua number in an answer is cut to an integer.
 */
const COMMON = `
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local floor = math.floor

local function firstOfMarch(year)
  return year * 365 + floor(year / 4) - floor(year / 100) + floor(year / 400)
end

local function nextMonth(day)
  local shifted = day + 719468
  local dayOfEra = shifted - floor(shifted / 146097) * 146097
  local leaps = floor(dayOfEra / 1460) - floor(dayOfEra / 36524) + floor(dayOfEra / 146096)
  local year = floor((dayOfEra - leaps) / 365)
  local dayOfYear = dayOfEra - firstOfMarch(year)
  local month = floor((5 * dayOfYear + 2) / 153)
  local monthEnd = firstOfMarch(year + 1) - firstOfMarch(year)
  if month < 11 then monthEnd = floor((153 * (month + 1) + 2) / 5) end
  return day - dayOfYear + monthEnd
end

local function periodEnd(window, at)
  local day = floor(at / ${DAY_MS})
  if window == 'month' then return nextMonth(day) * ${DAY_MS} end
  return (day + 1) * ${DAY_MS}
end

local limits = {}
for index = 2, #KEYS do
  local at = (index - 2) * 4 + 1
  local account = redis.call('GET', KEYS[index]) or ''
  local till, used, amount = string.match(account, '^(%S+) (%S+) (%S+)$')
  local limit = { key = KEYS[index], unit = ARGV[at + 1], window = ARGV[at + 2],
    length = tonumber(ARGV[at + 2]), amount = tonumber(ARGV[at + 3]), cost = tonumber(ARGV[at + 4]),
    till = tonumber(till) or 0, used = tonumber(used) or 0 }
  limit.isLive = limit.till > now
  if not limit.isLive then limit.till, limit.used = 0, 0 end
  local was = tonumber(amount) or limit.amount
  if limit.isLive and limit.length and was ~= limit.amount then
    limit.till = now + (limit.till - now) * was / limit.amount
  end
  limits[#limits + 1] = limit
end

local function charge(limit, cost)
  if cost == 0 or (not limit.isLive and cost < 0) then return end
  local ttl = ${DAY_MS}
  if limit.length then
    limit.till = (limit.isLive and limit.till or now) + cost * limit.length / limit.amount
    ttl = limit.length
  else
    if not limit.isLive then limit.till = periodEnd(limit.window, now) end
    limit.used = math.max(0, limit.used + cost)
  end
  if limit.till <= now then
    redis.call('DEL', limit.key)
  else
    redis.call('SET', limit.key, string.format('%.17g %.17g %.17g', limit.till, limit.used, limit.amount),
      'PX', math.ceil(limit.till - now + ttl))
  end
end

local function answer(granted)
  local reply = { granted, now }
  for _, limit in ipairs(limits) do
    reply[#reply + 1] = string.format('%.17g', limit.till)
    reply[#reply + 1] = string.format('%.17g', limit.used)
  end
  return reply
end
`;

/** All limits or none. What was settled already is not charged any more: this came too late. */
export const RESERVE: Script = script(`${COMMON}
if redis.call('EXISTS', KEYS[1]) == 1 then return answer(1) end
for _, limit in ipairs(limits) do
  if limit.isLive then
    local fits = limit.used == 0 or limit.used + limit.cost <= limit.amount
    if limit.length then
      local ms = math.min(limit.cost * limit.length / limit.amount, limit.length)
      fits = limit.till + ms - limit.length - ${SLACK_MS} - now <= 0
    end
    if not fits then return answer(0) end
  end
end
for _, limit in ipairs(limits) do charge(limit, limit.cost) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ${RECORD_MS})
return answer(1)
`);

/** Charges what the record of the reservation, if there is one, has not charged yet; once. */
export const SETTLE: Script = script(`${COMMON}
local record = redis.call('GET', KEYS[1])
if record == 'settled' then return answer(1) end
for _, limit in ipairs(limits) do
  local cost = limit.cost
  if record then cost = cost - (limit.unit == 'tokens' and tonumber(record) or 1) end
  local isClosed = not limit.length and periodEnd(limit.window, tonumber(ARGV[1])) <= now
  if cost > 0 or not isClosed then charge(limit, cost) end
end
redis.call('SET', KEYS[1], 'settled', 'PX', ${SETTLED_MS})
return answer(1)
`);

const REPORT: Script = script(`${COMMON}
return answer(1)
`);

type Link = Pick<RedisLink, "ask" | "isUp" | "onPing" | "peers" | "prefix">;

/** How a reservation stands with Redis. */
interface Entry {
  id: string;
  /** As the configuration has them; the reservation may have shares. */
  limits: readonly Limit[];
  /** Where it was charged while Redis was away; null: Redis was asked, and knows by the id. */
  debt: Debt | null;
}

/** What a tenant has taken while Redis was away. Windows that slide forget it at the share's pace. */
interface Debt {
  accounts: Accounts;
  /** By their key, as the configuration has it and this gateway's share. */
  limits: Map<string, { whole: Limit; share: Limit }>;
}

/** What Redis has still to be told; sent again until it is answered, executed once. */
interface Settlement {
  id: string;
  tenant: string;
  limits: readonly Limit[];
  /** For each limit, in its unit; what a record under this id has charged is part of it. */
  costs: readonly number[];
  /** When it was reserved. */
  at: number;
}

function shareOf(amount: number, peers: number): number {
  return Math.max(1, Math.floor(amount / peers));
}

interface Reply {
  granted: boolean;
  now: number;
  accounts: Accounts;
}

/** Settlements that wait for Redis. Beyond it the oldest is dropped: its estimate stands. */
const MOST_SETTLEMENTS = 10_000;
/** Sent at once, so that their answers come in time. */
const BATCH = 100;

/**
 * The ledger that gateways share: one call of Redis for all limits of a request. While Redis is
 * away, each gateway hands out its share of what was left when it was last seen, and owes that.
 *
 * A reservation whose answer did not come in time may have been executed or not: it is granted by
 * the share, and its settlement, under the same id, charges what was not charged.
 */
export class RedisLedger implements Ledger {
  readonly #link: Link;
  /** Unix milliseconds on the server's clock, as far as it is known. */
  readonly #now: () => number;
  #skewMs = 0;
  /** Decides while Redis is away. */
  readonly #share: MemoryLedger;
  readonly #entries = new Map<Reservation, Entry>();
  readonly #debts = new Map<string, Debt>();
  readonly #settlements = new Map<string, Settlement>();
  #isFlushing = false;

  /** @param now Unix milliseconds. */
  constructor(link: Link, now: () => number) {
    this.#link = link;
    this.#now = () => now() + this.#skewMs;
    this.#share = new MemoryLedger(this.#now);
    link.onPing(() => void this.#flush());
  }

  reserve(tenant: string, limits: readonly Limit[], tokens: number): Booking | Promise<Booking> {
    if (limits.length === 0) return this.#share.reserve(tenant, limits, tokens);
    return this.#link.isUp
      ? this.#reserveThere(tenant, limits, tokens)
      : this.#reserveHere(tenant, limits, tokens);
  }

  settle(reservation: Reservation, tokens: number): void {
    // Does nothing where it was Redis that granted it.
    this.#share.settle(reservation, tokens);
    const entry = this.#entries.get(reservation);
    if (entry === undefined) return;
    this.#entries.delete(reservation);
    const { tenant, at } = reservation;
    const { id, limits, debt } = entry;
    if (debt !== null && this.#debts.get(tenant) === debt) {
      settle(debt.accounts, reservation.limits, reservation, tokens, this.#now());
      return;
    }
    // A debt that was paid has charged the estimate, and the request.
    const isPaid = debt !== null;
    const costs = limits.map(({ unit }) =>
      unit === "tokens" ? tokens - (isPaid ? reservation.tokens : 0) : isPaid ? 0 : 1,
    );
    void this.#send({ id, tenant, limits, costs, at });
  }

  async report(tenant: string, limits: readonly Limit[]): Promise<BudgetReport[]> {
    const free = limits.map(() => 0);
    const reply = await this.#run(REPORT, { id: "", tenant, limits, costs: free }, 0);
    if (reply === null) return this.#share.report(tenant, this.#sharesOf(limits));
    const own = [...this.#entries.keys()].filter((reservation) => reservation.tenant === tenant);
    return reportOf(statesOf(reply.accounts, limits, reply.now), own, reply.now);
  }

  async #reserveThere(tenant: string, limits: readonly Limit[], tokens: number): Promise<Booking> {
    const id = crypto.randomUUID();
    const costs = limits.map((limit) => costOf(limit, tokens));
    const reply = await this.#run(RESERVE, { id, tenant, limits, costs }, tokens);
    if (reply?.granted === true) {
      const { accounts, now } = reply;
      const reservation = { tenant, limits, tokens, at: now };
      this.#entries.set(reservation, { id, limits, debt: null });
      return { granted: true, reservation, states: statesOf(accounts, limits, now) };
    }
    const refusal = reply && refusalOf(reply.accounts, limits, tokens, reply.now);
    if (refusal !== null) return refusal;
    const booking = this.#share.reserve(tenant, this.#sharesOf(limits), tokens);
    if (booking.granted) {
      this.#entries.set(booking.reservation, { id, limits, debt: null });
    } else {
      // It may have been executed: then this takes it back.
      void this.#send({ id, tenant, limits, costs: limits.map(() => 0), at: this.#now() });
    }
    return booking;
  }

  #reserveHere(tenant: string, limits: readonly Limit[], tokens: number): Booking {
    const shares = this.#sharesOf(limits);
    const booking = this.#share.reserve(tenant, shares, tokens);
    if (!booking.granted) return booking;
    const debt = this.#debts.get(tenant) ?? { accounts: new Map(), limits: new Map() };
    this.#debts.set(tenant, debt);
    book(debt.accounts, shares, tokens, this.#now());
    for (const [index, whole] of limits.entries()) {
      debt.limits.set(keyOf(whole), { whole, share: shares[index] ?? whole });
    }
    this.#entries.set(booking.reservation, { id: crypto.randomUUID(), limits, debt });
    return booking;
  }

  /** At least one of each: a small limit shuts nobody out. */
  #sharesOf(limits: readonly Limit[]): Limit[] {
    const { peers } = this.#link;
    return limits.map((limit) => ({
      ...limit,
      amount: shareOf(limit.amount, peers),
    }));
  }

  /** Pays debts and sends settlements again, as long as Redis answers. */
  async #flush() {
    if (this.#isFlushing) return;
    this.#isFlushing = true;
    for (const [tenant, debt] of this.#debts) this.#keep(this.#paymentOf(tenant, debt));
    this.#debts.clear();
    let isAnswered = true;
    while (isAnswered && this.#settlements.size > 0) {
      const batch = [...this.#settlements.values()].slice(0, BATCH);
      for (const { id } of batch) this.#settlements.delete(id);
      const answers = await Promise.all(batch.map((settlement) => this.#send(settlement)));
      isAnswered = answers.every(Boolean);
    }
    this.#isFlushing = false;
  }

  #paymentOf(tenant: string, { accounts, limits }: Debt): Settlement {
    const at = this.#now();
    const both = [...limits.values()];
    const shares = both.map(({ share }) => share);
    return {
      id: crypto.randomUUID(),
      tenant,
      limits: both.map(({ whole }) => whole),
      costs: statesOf(accounts, shares, at).map(({ used }) => used),
      at,
    };
  }

  /** Says whether it was answered; if not, it is kept. */
  async #send(settlement: Settlement): Promise<boolean> {
    const reply = await this.#run(SETTLE, settlement, settlement.at);
    if (reply === null) this.#keep(settlement);
    return reply !== null;
  }

  #keep(settlement: Settlement) {
    this.#settlements.set(settlement.id, settlement);
    const [oldest] = this.#settlements.keys();
    if (this.#settlements.size > MOST_SETTLEMENTS && oldest !== undefined) {
      this.#settlements.delete(oldest);
    }
  }

  async #run(
    which: Script,
    { id, tenant, limits, costs }: Omit<Settlement, "at">,
    first: number,
  ): Promise<Reply | null> {
    // The braces make a tenant's keys live on one node of a cluster.
    const base = `${this.#link.prefix}budget:{${tenant}}:`;
    const keys = [`${base}reservation:${id}`, ...limits.map((limit) => base + keyOf(limit))];
    const args = limits.flatMap(({ unit, window, amount }, index) => {
      return [unit, lengthOf(window) ?? window, amount, costs[index] ?? 0];
    });
    const reply = readReply(
      await this.#link.ask((redis) => runScript(redis, which, keys, [first, ...args])),
      limits,
    );
    if (reply !== null) this.#learn(tenant, limits, reply);
    return reply;
  }

  /** What is left for this gateway should Redis go away now. */
  #learn(tenant: string, limits: readonly Limit[], { accounts, now }: Reply) {
    this.#skewMs += now - this.#now();
    const { peers } = this.#link;
    // Where the window slides, `until` is the same for a share of the limit and of what was used.
    const shares = new Map<string, Account>();
    for (const [key, { until, used, amount }] of accounts) {
      shares.set(key, { until, used: Math.ceil(used / peers), amount: shareOf(amount, peers) });
    }
    this.#share.learn(tenant, limits, shares);
  }
}

function readReply(reply: unknown, limits: readonly Limit[]): Reply | null {
  if (!Array.isArray(reply)) return null;
  const [granted, now, ...numbers] = reply.map(Number);
  const accounts: Accounts = new Map();
  for (const [index, limit] of limits.entries()) {
    const until = numbers[index * 2] ?? 0;
    const used = numbers[index * 2 + 1] ?? 0;
    if (until > 0) accounts.set(keyOf(limit), { until, used, amount: limit.amount });
  }
  return { granted: granted === 1, now: now ?? 0, accounts };
}
