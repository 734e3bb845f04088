import type { Dialect } from "./dialect.ts";

/** Ollama's own API, below `/api`: an error is a string, in a stream a line. */
export const ollama: Dialect = {
  errorBody: (error) => ({ error: error.message }),
  errorEvent: (error) => `${JSON.stringify({ error: error.message })}\n`,
};
