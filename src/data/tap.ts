import { createParser } from "eventsource-parser";
import { isRecord, type AnswerFacts, type Endpoint } from "../dialects/dialect.ts";

/** Reads the events of a stream as they pass and never alters them. */
export class Tap {
  readonly #endpoint: Endpoint;
  readonly #facts: AnswerFacts;
  readonly #hideUsage: boolean;
  readonly #onToken: () => void;
  readonly #decoder = new TextDecoder();
  readonly #parser = createParser({ onEvent: ({ data }) => this.#event(data) });
  #verdict: "pass" | "hide" = "pass";

  /**
   * @param hideUsage the client did not ask for the event that only reports usage
   * @param onToken called for each event that carries tokens
   */
  constructor(endpoint: Endpoint, facts: AnswerFacts, hideUsage: boolean, onToken: () => void) {
    this.#endpoint = endpoint;
    this.#facts = facts;
    this.#hideUsage = hideUsage;
    this.#onToken = onToken;
  }

  /** Reads one whole frame. `hide`: the client is not to see it. */
  frame(bytes: Uint8Array): "pass" | "hide" {
    const text = this.#decoder.decode(bytes);
    // After the first token most events tell nothing but that another one came.
    if (this.#facts.deltas > 0 && !this.#endpoint.telling.test(text) && !text.includes("[DONE]")) {
      if (text.includes(this.#endpoint.deltaMark)) {
        this.#facts.deltas++;
        this.#onToken();
      }
      return "pass";
    }
    this.#verdict = "pass";
    this.#parser.feed(text);
    return this.#verdict;
  }

  #event(data: string) {
    if (data === "[DONE]") {
      this.#facts.ended = true;
      return;
    }
    let parsed: unknown;
    try {
      parsed = JSON.parse(data);
    } catch {
      // The bytes go on as they are; a stream that never becomes readable ends as incomplete.
      return;
    }
    if (!isRecord(parsed)) return;
    const before = this.#facts.deltas;
    const what = this.#endpoint.readEvent(parsed, this.#facts);
    if (this.#facts.deltas > before) this.#onToken();
    if (what === "usage" && this.#hideUsage) this.#verdict = "hide";
  }
}
