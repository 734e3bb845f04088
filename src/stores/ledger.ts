import {
  keyOf,
  reserve,
  settle,
  statesOf,
  type Accounts,
  type Limit,
  type LimitState,
  type Refusal,
} from "../core/budget.ts";

/** Tokens taken from a tenant's budgets in advance; to be settled once. */
export interface Reservation {
  readonly tenant: string;
  readonly limits: readonly Limit[];
  readonly tokens: number;
  /** Unix milliseconds. */
  readonly at: number;
}

export type Booking = { granted: true; reservation: Reservation; states: LimitState[] } | Refusal;

/** How a token budget stands. What counts against it is `used` and `reserved` together. */
export interface BudgetReport {
  window: string;
  limit: number;
  used: number;
  /** By requests that run, in this gateway. */
  reserved: number;
  /** Unix milliseconds. */
  resetAt: number;
}

/** Where tenants' tokens and requests are counted. Nothing here throws or rejects. */
export interface Ledger {
  reserve(tenant: string, limits: readonly Limit[], tokens: number): Booking | Promise<Booking>;
  /** Corrects a reservation to the tokens that were really used. A second time changes nothing. */
  settle(reservation: Reservation, tokens: number): void;
  report(tenant: string, limits: readonly Limit[]): BudgetReport[] | Promise<BudgetReport[]>;
}

interface Book {
  accounts: Accounts;
  open: Set<Reservation>;
}

/** How often what no longer counts is thrown away. */
const SWEEP_MS = 60_000;

/** The ledger of a gateway that shares its limits with no other. */
export class MemoryLedger implements Ledger {
  readonly #now: () => number;
  readonly #books = new Map<string, Book>();
  #sweptAt = 0;

  /** @param now Unix milliseconds. */
  constructor(now: () => number) {
    this.#now = now;
  }

  reserve(tenant: string, limits: readonly Limit[], tokens: number): Booking {
    const now = this.#now();
    const { accounts, open } = this.#bookOf(tenant, now);
    const verdict = reserve(accounts, limits, tokens, now);
    if (!verdict.granted) return verdict;
    const reservation = { tenant, limits, tokens, at: now };
    open.add(reservation);
    return { ...verdict, reservation };
  }

  settle(reservation: Reservation, tokens: number): void {
    const of = this.#books.get(reservation.tenant);
    if (of === undefined || !of.open.delete(reservation)) return;
    settle(of.accounts, reservation.limits, reservation, tokens, this.#now());
  }

  report(tenant: string, limits: readonly Limit[]): BudgetReport[] {
    const now = this.#now();
    const { accounts, open } = this.#bookOf(tenant, now);
    return reportOf(statesOf(accounts, limits, now), open, now);
  }

  /** Takes over what somebody else has counted for these limits. */
  learn(tenant: string, limits: readonly Limit[], counted: Accounts): void {
    const { accounts } = this.#bookOf(tenant, this.#now());
    for (const key of limits.map(keyOf)) {
      const account = counted.get(key);
      if (account === undefined) accounts.delete(key);
      else accounts.set(key, account);
    }
  }

  #bookOf(tenant: string, now: number): Book {
    if (now - this.#sweptAt >= SWEEP_MS) this.#sweep(now);
    let of = this.#books.get(tenant);
    if (of === undefined) {
      of = { accounts: new Map(), open: new Set() };
      this.#books.set(tenant, of);
    }
    return of;
  }

  #sweep(now: number) {
    this.#sweptAt = now;
    for (const [tenant, { accounts, open }] of this.#books) {
      for (const [key, { until }] of accounts) if (until <= now) accounts.delete(key);
      if (accounts.size + open.size === 0) this.#books.delete(tenant);
    }
  }
}

/** @param open the tenant's reservations that are not settled yet. */
export function reportOf(
  states: readonly LimitState[],
  open: Iterable<Reservation>,
  now: number,
): BudgetReport[] {
  const reservations = [...open];
  return states
    .filter(({ limit }) => limit.unit === "tokens")
    .map(({ limit, used, resetMs }) => {
      const key = keyOf(limit);
      const sum = reservations
        .filter(({ limits }) => limits.some((each) => keyOf(each) === key))
        .reduce((total, { tokens }) => total + tokens, 0);
      // A window shorter than the request has forgotten a part of it.
      const reserved = Math.min(sum, used);
      return {
        window: limit.window,
        limit: limit.amount,
        used: used - reserved,
        reserved,
        resetAt: now + resetMs,
      };
    });
}
