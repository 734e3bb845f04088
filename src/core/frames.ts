const LF = 0x0a;
const CR = 0x0d;

/**
 * Finds where the events of a server-sent-event stream end, however its bytes are split over
 * chunks. An event ends at a blank line; lines end with LF or CRLF. (A bare CR is allowed by the
 * standard as well, but no engine writes it, and to look for it would hold back every chunk that
 * ends in CR.)
 *
 * Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
 */
export class FrameCutter {
  /** Bytes in the line that is still open, a CR at its end not counted. */
  #lineLength = 0;
  #endsInCarriageReturn = false;

  /**
   * @returns the offsets in `chunk` just behind each event's blank line, ascending. An offset may
   *   be smaller than the event is long: its beginning came with earlier chunks.
   */
  cut(chunk: Uint8Array): number[] {
    const ends: number[] = [];
    let lineStart = 0;
    for (let at = chunk.indexOf(LF); at !== -1; at = chunk.indexOf(LF, lineStart)) {
      const carriageReturn = at === 0 ? this.#endsInCarriageReturn : chunk[at - 1] === CR;
      // Whether the CR came with this chunk or an earlier one, it is not part of the line.
      const length =
        this.#lineLength + (at - lineStart) - (carriageReturn && at > lineStart ? 1 : 0);
      if (length === 0) ends.push(at + 1);
      this.#lineLength = 0;
      this.#endsInCarriageReturn = false;
      lineStart = at + 1;
    }
    if (lineStart < chunk.length) {
      const carriageReturn = chunk[chunk.length - 1] === CR;
      // A CR that closed the previous chunk and was not followed by LF belongs to the line.
      const before = this.#endsInCarriageReturn ? 1 : 0;
      this.#lineLength += before + (chunk.length - lineStart) - (carriageReturn ? 1 : 0);
      this.#endsInCarriageReturn = carriageReturn;
    }
    return ends;
  }
}
