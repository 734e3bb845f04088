/** What is known of a prompt before an engine has counted its tokens. */
export interface PromptSize {
  /** Of its text, UTF-8. Images are not text. */
  bytes: number;
  messages: number;
  images: number;
}

/** Tokens per byte of text: where nothing was seen yet, and what no tokenizer leaves. */
const FIRST_RATIO = 0.28;
const LEAST_RATIO = 0.1;
const MOST_RATIO = 1;
/** The average is that of about so much text; the first ratio counts like so much. */
const MEMORY_BYTES = 65_536;
const FIRST_BYTES = 2048;
/** Role and separators. */
const MESSAGE_TOKENS = 4;
const IMAGE_TOKENS = 1000;

/** Expected of an answer until there were enough to look at. */
const FIRST_OUTPUT = 1000;
const FEWEST_OUTPUTS = 10;
const MOST_OUTPUTS = 64;
const SHARE = 0.9;

/** So many models, and so many pairs of tenant and model, are remembered. */
const MOST_KEYS = 1000;

/** Sums of what was seen, the older the less. */
interface Ratio {
  bytes: number;
  tokens: number;
}

/**
 * How many tokens a request may need, learned from what engines report. Reserving the 90th
 * percentile of a tenant's answers uses 99 % of a budget and overdraws it by 2 %; the mean overdraws
 * it by 8 %, and what the client asks for leaves half of it unused (simulated: algorithms.md §6).
 */
export class Estimates {
  /** By model. */
  readonly #ratios = new Map<string, Ratio>();
  /** The last outputs, by tenant and model. */
  readonly #outputs = new Map<string, number[]>();

  prompt(model: string, { bytes, messages, images }: PromptSize): number {
    const ratio = this.#ratios.get(model);
    const perByte = ratio === undefined ? FIRST_RATIO : ratio.tokens / ratio.bytes;
    return Math.ceil(bytes * perByte + messages * MESSAGE_TOKENS + images * IMAGE_TOKENS);
  }

  /**
   * @param asked what the client asks for at most; null: it does not say.
   * @param cap what it may get at most; null: no cap.
   */
  output(tenant: string, model: string, asked: number | null, cap: number | null): number {
    const seen = this.#outputs.get(outputKey(tenant, model)) ?? [];
    const expected = seen.length < FEWEST_OUTPUTS ? FIRST_OUTPUT : percentile(seen);
    return Math.max(1, Math.min(expected, asked ?? Infinity, cap ?? Infinity));
  }

  /** The engine has counted a prompt. What images cost is not learned: engines differ too much. */
  learnPrompt(model: string, { bytes, messages, images }: PromptSize, tokens: number): void {
    if (bytes === 0 || images > 0) return;
    const ratio = recall(this.#ratios, model, () => ({
      bytes: FIRST_BYTES,
      tokens: FIRST_BYTES * FIRST_RATIO,
    }));
    const text = tokens - messages * MESSAGE_TOKENS;
    const bounded = Math.min(Math.max(text, bytes * LEAST_RATIO), bytes * MOST_RATIO);
    const kept = MEMORY_BYTES / (MEMORY_BYTES + bytes);
    ratio.bytes = ratio.bytes * kept + bytes;
    ratio.tokens = ratio.tokens * kept + bounded;
  }

  /** An answer has ended with so many tokens. */
  learnOutput(tenant: string, model: string, tokens: number): void {
    const outputs = recall(this.#outputs, outputKey(tenant, model), (): number[] => []);
    outputs.push(tokens);
    if (outputs.length > MOST_OUTPUTS) outputs.shift();
  }
}

/** Names of tenants have no spaces. */
function outputKey(tenant: string, model: string): string {
  return `${tenant} ${model}`;
}

function percentile(values: readonly number[]): number {
  const sorted = values.toSorted((one, other) => one - other);
  return sorted[Math.ceil(sorted.length * SHARE) - 1] ?? FIRST_OUTPUT;
}

/** The value of a key, made where there is none; the key not asked for longest makes room. */
function recall<Value>(map: Map<string, Value>, key: string, create: () => Value): Value {
  const value = map.get(key) ?? create();
  map.delete(key);
  map.set(key, value);
  const [oldest] = map.keys();
  if (map.size > MOST_KEYS && oldest !== undefined) map.delete(oldest);
  return value;
}
