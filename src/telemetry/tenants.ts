import type { RequestRecord } from "./record.ts";

/** What one tenant has used since the start. */
export interface Used {
  requests: number;
  tokens: { input: number; output: number; estimated: number };
}

/** What each tenant has used since the start: for the operator's ledger. */
export class TenantUsage {
  readonly #used = new Map<string, Used>();

  of(tenant: string): Used {
    let used = this.#used.get(tenant);
    if (used === undefined) {
      used = { requests: 0, tokens: { input: 0, output: 0, estimated: 0 } };
      this.#used.set(tenant, used);
    }
    return used;
  }

  request(tenant: string): void {
    this.of(tenant).requests++;
  }

  /** @param record of work that an engine did; what it did not report counts as estimated. */
  tokens(tenant: string, record: RequestRecord): void {
    const { tokens } = this.of(tenant);
    const output = record.tokens_generated ?? 0;
    tokens.input += record.tokens_input ?? 0;
    tokens.output += output;
    if (record.tokens_estimated) tokens.estimated += output + (record.tokens_input ?? 0);
  }
}
