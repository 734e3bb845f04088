/**
 * Token budgets and request rates: reserve what a request may need, settle what it took. `now` is
 * Unix milliseconds, whole ones.
 *
 * A window that slides is a GCRA (ITU-T I.371) whose burst is the whole window: over any
 * time t no more than amount × (1 + t / window) is settled, plus what was reserved too low.
 */

export interface Limit {
  unit: "requests" | "tokens";
  /** Of the unit, per window. */
  amount: number;
  /** As configured: `"90s"`, `"5m"`, `"1h"` slide; `"day"`, `"month"` are those of the calendar, UTC. */
  window: string;
}

/**
 * What is charged against one limit; once `until` has passed, nothing is. Where the window slides
 * `until` is when all of it will have been forgotten (GCRA's theoretical arrival time), at the pace of
 * a limit of `amount`. Else it is the end of the period in which `used` was used.
 */
export interface Account {
  until: number;
  used: number;
  amount: number;
}

/** A tenant's accounts, by `keyOf` their limits. Changed in place by the functions here. */
export type Accounts = Map<string, Account>;

/** How a limit stands, reservations included; whole numbers of its unit. */
export interface LimitState {
  limit: Limit;
  used: number;
  remaining: number;
  /** Until nothing is used, if nothing more is. */
  resetMs: number;
}

export interface Refusal {
  granted: false;
  /** The one that takes longest. */
  limit: Limit;
  /** After exactly so long the same reservation is granted, if nothing else was charged. */
  retryAfterMs: number;
  states: LimitState[];
}

export type Verdict = { granted: true; states: LimitState[] } | Refusal;

const UNIT_MS: Readonly<Record<string, number>> = { s: 1000, m: 60_000, h: 3_600_000 };
const DAY_MS = 86_400_000;
/** Sums of doubles near 1e12 are off by up to 1e-4 each: half a tick of the clock is nobody's loss. */
export const SLACK_MS = 0.5;
/** Likewise of a token or request, where they are counted. */
const DUST = 0.05;

interface Policy {
  requestsPerMinute?: number | undefined;
  budgets: readonly { tokens: number; window: string }[];
}

/** A tenant's limits, one per unit and window: where two have the same window, the tighter. */
export function limitsOf({ requestsPerMinute, budgets }: Policy): Limit[] {
  const all = budgets.map(({ tokens, window }): Limit => ({
    unit: "tokens",
    amount: tokens,
    window,
  }));
  if (requestsPerMinute !== undefined) {
    all.unshift({ unit: "requests", amount: requestsPerMinute, window: "1m" });
  }
  const tightest = new Map<string, Limit>();
  for (const limit of all) {
    const other = tightest.get(keyOf(limit));
    if (other === undefined || limit.amount < other.amount) tightest.set(keyOf(limit), limit);
  }
  return [...tightest.values()];
}

/** The amount is not in it: an account outlives a change of its limit. */
export function keyOf({ unit, window }: Limit): string {
  return `${unit}:${window}`;
}

/** Milliseconds of a window that slides; null for one of the calendar. */
export function lengthOf(window: string): number | null {
  if (window === "day" || window === "month") return null;
  return Number.parseInt(window, 10) * (UNIT_MS[window.at(-1) ?? ""] ?? 0);
}

/** What one request costs before it is settled. */
export function costOf({ unit }: Limit, tokens: number): number {
  return unit === "tokens" ? tokens : 1;
}

/** Books the tokens, and one request, in every account, or in none. */
export function reserve(
  accounts: Accounts,
  limits: readonly Limit[],
  tokens: number,
  now: number,
): Verdict {
  const refusal = refusalOf(accounts, limits, tokens, now);
  if (refusal !== null) return refusal;
  book(accounts, limits, tokens, now);
  return { granted: true, states: statesOf(accounts, limits, now) };
}

/** Why so many tokens cannot be reserved now; null where they can. */
export function refusalOf(
  accounts: Accounts,
  limits: readonly Limit[],
  tokens: number,
  now: number,
): Refusal | null {
  let retryAfterMs = 0;
  let slowest: Limit | null = null;
  for (const limit of limits) {
    const waitMs = waitOf(limit, accountOf(accounts, limit, now), costOf(limit, tokens), now);
    if (waitMs <= retryAfterMs) continue;
    retryAfterMs = waitMs;
    slowest = limit;
  }
  if (slowest === null) return null;
  return {
    granted: false,
    limit: slowest,
    retryAfterMs,
    states: statesOf(accounts, limits, now),
  };
}

/** Books without asking. */
export function book(
  accounts: Accounts,
  limits: readonly Limit[],
  tokens: number,
  now: number,
): void {
  for (const limit of limits) charge(accounts, limit, costOf(limit, tokens), now);
}

/**
 * Corrects a reservation to the tokens that were really used; the order of settlements does not
 * matter. A refund gives back what was reserved and no more; what the calendar has closed stays.
 */
export function settle(
  accounts: Accounts,
  limits: readonly Limit[],
  reserved: { tokens: number; at: number },
  tokens: number,
  now: number,
): void {
  const difference = tokens - reserved.tokens;
  for (const limit of limits) {
    if (limit.unit !== "tokens") continue;
    const isClosed = lengthOf(limit.window) === null && periodEnd(limit.window, reserved.at) <= now;
    if (difference > 0 || !isClosed) charge(accounts, limit, difference, now);
  }
}

export function statesOf(accounts: Accounts, limits: readonly Limit[], now: number): LimitState[] {
  return limits.map((limit) => {
    const length = lengthOf(limit.window);
    const account = accountOf(accounts, limit, now);
    const leftMs = Math.max(0, (account?.until ?? 0) - now);
    const charged = length === null ? (account?.used ?? 0) : (leftMs * limit.amount) / length;
    const used = leftMs === 0 ? 0 : Math.max(0, Math.ceil(charged - DUST));
    return {
      limit,
      used,
      remaining: Math.max(0, limit.amount - used),
      resetMs: length === null ? periodEnd(limit.window, now) - now : Math.ceil(leftMs),
    };
  });
}

/** The account of a limit; where the limit is another one since, as much is used as was. */
function accountOf(accounts: Accounts, limit: Limit, now: number): Account | undefined {
  const account = accounts.get(keyOf(limit));
  if (account === undefined || account.amount === limit.amount || lengthOf(limit.window) === null) {
    return account;
  }
  const until = now + ((account.until - now) * account.amount) / limit.amount;
  return account.until <= now ? account : { until, used: 0, amount: limit.amount };
}

/** How long until the cost fits. One that never fits is admitted when nothing else is charged. */
function waitOf(limit: Limit, account: Account | undefined, cost: number, now: number): number {
  if (account === undefined || account.until <= now) return 0;
  const length = lengthOf(limit.window);
  if (length === null) {
    const fits = account.used === 0 || account.used + cost <= limit.amount;
    return fits ? 0 : account.until - now;
  }
  const admittedAt = account.until + Math.min((cost * length) / limit.amount, length) - length;
  return Math.max(0, Math.ceil(admittedAt - SLACK_MS - now));
}

function charge(accounts: Accounts, limit: Limit, cost: number, now: number) {
  const key = keyOf(limit);
  const { amount } = limit;
  const account = accountOf(accounts, limit, now);
  const isLive = account !== undefined && account.until > now;
  if (cost === 0 || (!isLive && cost < 0)) return;
  const length = lengthOf(limit.window);
  if (length === null) {
    const until = isLive ? account.until : periodEnd(limit.window, now);
    accounts.set(key, { until, used: Math.max(0, (isLive ? account.used : 0) + cost), amount });
  } else {
    const until = (isLive ? account.until : now) + (cost * length) / amount;
    accounts.set(key, { until, used: 0, amount });
  }
}

/** End of the calendar's `"day"` or `"month"` at that time, UTC. */
function periodEnd(window: string, at: number): number {
  const day = Math.floor(at / DAY_MS);
  return (window === "month" ? nextMonth(day) : day + 1) * DAY_MS;
}

/**
 * First day of the next month; days count from 1970-01-01. After Howard Hinnant, "chrono-Compatible
 * Low-Level Date Algorithms", civil_from_days: years begin in March, so that the leap day is a last
 * day, and eras of 400 years are alike.
 */
function nextMonth(day: number): number {
  const shifted = day + 719_468;
  const dayOfEra = shifted - Math.floor(shifted / 146_097) * 146_097;
  const leaps =
    Math.floor(dayOfEra / 1460) - Math.floor(dayOfEra / 36_524) + Math.floor(dayOfEra / 146_096);
  const year = Math.floor((dayOfEra - leaps) / 365);
  const dayOfYear = dayOfEra - firstOfMarch(year);
  const month = Math.floor((5 * dayOfYear + 2) / 153);
  const monthEnd =
    month < 11
      ? Math.floor((153 * (month + 1) + 2) / 5)
      : firstOfMarch(year + 1) - firstOfMarch(year);
  return day - dayOfYear + monthEnd;
}

function firstOfMarch(year: number): number {
  return year * 365 + Math.floor(year / 4) - Math.floor(year / 100) + Math.floor(year / 400);
}
