import { folded, spansOf, topLevelKeys, type Keys, type Span } from "../core/splice.ts";

/** What of a request body an engine does not get: its names, and where it stands, in order. */
export interface Withheld {
  names: readonly string[];
  spans: readonly Span[];
}

export const NOTHING_WITHHELD: Withheld = { names: [], spans: [] };

/**
 * Ollama's options of the runner, its `api.Runner`: a request whose own differ from those of the loaded
 * model has it loaded anew (`needsReload` in `server/sched.go`, v0.32.15), under everybody who uses it.
 * The second line is of older versions; newer ones take no notice of them.
 */
const RUNNER_OPTIONS = new Set([
  ..."num_ctx num_batch num_gpu main_gpu use_mmap num_thread draft_num_predict".split(" "),
  ..."low_vram f16_kv logits_all vocab_only use_mlock numa".split(" "),
]);

/**
 * `shift` is compared by `needsReload` too. `keep_alive` says when the model leaves, 0 being at once, and
 * which one Ollama puts out first: that is for the gateway alone, whose loads say it.
 */
const FIELDS = new Set(["keep_alive", "shift"]);

const OPEN_BRACE = 0x7b;

/**
 * What would have a model loaded anew or put out. Ollama compares the names of fields regardless of case,
 * and joins `options` that stand more than once, so all of them are looked at. Inside them only exact
 * names count, by this version; others are taken out all the same.
 */
export function withholdFromOllama(body: Uint8Array, keys: Keys): Withheld {
  const names = new Set<string>();
  const spans: Span[] = [];
  const noting = (known: ReadonlySet<string>) => (name: string) => {
    const meant = folded(name);
    if (known.has(meant)) names.add(meant);
    return known.has(meant);
  };
  for (const { name, value } of keys) {
    if (folded(name) !== "options" || body[value.start] !== OPEN_BRACE) continue;
    const options = topLevelKeys(body.subarray(value.start, value.end));
    for (const { start, end } of spansOf(options, noting(RUNNER_OPTIONS))) {
      spans.push({ start: value.start + start, end: value.start + end });
    }
  }
  spans.push(...spansOf(keys, noting(FIELDS)));
  if (spans.length === 0) return NOTHING_WITHHELD;
  return { names: [...names], spans: spans.toSorted((a, b) => a.start - b.start) };
}
