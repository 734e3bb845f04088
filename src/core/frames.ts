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
    // A CR that closed the previous chunk and is not followed by LF belongs to its line.
    if (this.#endsInCarriageReturn && chunk.length > 0 && chunk[0] !== LF) this.#lineLength++;
    for (let at = chunk.indexOf(LF); at !== -1; at = chunk.indexOf(LF, lineStart)) {
      // The CR of a CRLF is no part of the line; one that came with an earlier chunk was not counted.
      const carriageReturn = at > lineStart && chunk[at - 1] === CR ? 1 : 0;
      const length = this.#lineLength + (at - lineStart) - carriageReturn;
      if (length === 0) ends.push(at + 1);
      this.#lineLength = 0;
      lineStart = at + 1;
    }
    if (chunk.length === 0) return ends;
    this.#endsInCarriageReturn = lineStart < chunk.length && chunk[chunk.length - 1] === CR;
    this.#lineLength += chunk.length - lineStart - (this.#endsInCarriageReturn ? 1 : 0);
    return ends;
  }
}
