// The engine of a replayed day: it counts what it has to compute, by class of traffic, and does what
// llama.cpp and Ollama do when a connection closes: it stops. `bun bench/day-engine.ts` prints its
// port. How long an answer gets by itself stands in the request (`metadata.length`), since no model
// is there to decide; `max_tokens` ends it earlier. A quarter of the characters is the tokens.
import { createServer, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

/** What was computed, whether somebody was there to get it or not. */
export interface Computed {
  /** Prompts of answers, inputs of embeddings. */
  prompts: number;
  promptTokens: number;
  answerTokens: number;
}

export interface ChatRequest {
  model: string;
  messages: { role: string; content: string }[];
  metadata: { class: string; length: string };
  stream?: boolean;
  temperature?: number;
  seed?: number;
  max_tokens?: number;
  stream_options?: { include_usage?: boolean };
}

export interface EmbeddingRequest {
  model: string;
  input: string[];
}

/** Where every answer ends at last, that of a model that repeats itself too. */
export const CONTEXT_TOKENS = 8192;
const TICK_MS = 4;
/** Two thousand a second: faster than any real one, so that a day takes less than a minute. */
const TOKENS_PER_TICK = 8;

export function tokensOf(text: string): number {
  return Math.ceil(text.length / 4);
}

/** The words of an answer follow from the prompt: whoever gets another one's can tell. */
export function wordOf(prompt: string, index: number): string {
  let hash = 0x811c9dc5 ^ index;
  for (const char of prompt.slice(-64)) hash = Math.imul(hash ^ char.charCodeAt(0), 0x01000193);
  return ` ${(hash >>> 0).toString(36)}`;
}

export function vectorOf(text: string): number[] {
  return [1, 2, 3, 4].map((at) =>
    Math.fround(Number.parseInt(wordOf(text, at).trim(), 36) / 2 ** 32),
  );
}

export function promptOf({ messages }: ChatRequest): string {
  return messages.map(({ content }) => content).join("\n");
}

/** How many tokens the answer has when nobody leaves. */
export function lengthOf({ metadata, max_tokens: most }: ChatRequest): number {
  return Math.min(Number(metadata.length), most ?? CONTEXT_TOKENS, CONTEXT_TOKENS);
}

interface Generation {
  request: ChatRequest;
  prompt: string;
  response: ServerResponse;
  made: number;
}

function serve(): void {
  const computed: Record<string, Computed> = {};
  const running = new Set<Generation>();

  function count(name: string): Computed {
    computed[name] ??= { prompts: 0, promptTokens: 0, answerTokens: 0 };
    return computed[name];
  }

  function chat(request: ChatRequest, response: ServerResponse): void {
    const prompt = promptOf(request);
    const own = count(request.metadata.class);
    own.prompts += 1;
    own.promptTokens += tokensOf(prompt);
    const generation = { request, prompt, response, made: 0 };
    running.add(generation);
    response.on("close", () => running.delete(generation));
    if (request.stream === true) response.writeHead(200, { "content-type": "text/event-stream" });
  }

  function advance(generation: Generation): void {
    const { request, prompt, response } = generation;
    const own = count(request.metadata.class);
    const length = lengthOf(request);
    let text = "";
    for (let left = TOKENS_PER_TICK; left > 0 && generation.made < length; left--) {
      own.answerTokens += 1;
      if (request.stream === true) text += event(request, wordOf(prompt, generation.made));
      generation.made += 1;
    }
    if (text !== "") response.write(text);
    if (generation.made < length) return;
    running.delete(generation);
    const reason = length < Number(request.metadata.length) ? "length" : "stop";
    const usage = {
      prompt_tokens: tokensOf(prompt),
      completion_tokens: length,
      total_tokens: tokensOf(prompt) + length,
    };
    if (request.stream === true) {
      const asked = request.stream_options?.include_usage === true;
      const last = asked ? `data: ${JSON.stringify({ ...CHUNK, choices: [], usage })}\n\n` : "";
      response.end(`${event(request, null, reason)}${last}data: [DONE]\n\n`);
      return;
    }
    const words = Array.from({ length }, (_, index) => wordOf(prompt, index));
    const message = { role: "assistant", content: words.join("") };
    const choices = [{ index: 0, message, finish_reason: reason }];
    const object = "chat.completion";
    json(response, {
      id: "chatcmpl-day",
      object,
      created: 0,
      model: request.model,
      choices,
      usage,
    });
  }

  function embed({ model, input }: EmbeddingRequest, response: ServerResponse): void {
    const own = count("index");
    const tokens = input.reduce((sum, text) => sum + tokensOf(text), 0);
    own.prompts += input.length;
    own.promptTokens += tokens;
    const data = input.map((text, index) => {
      return { object: "embedding", index, embedding: vectorOf(text) };
    });
    const usage = { prompt_tokens: tokens, total_tokens: tokens };
    json(response, { object: "list", model, data, usage });
  }

  const server = createServer((incoming, response) => {
    if (incoming.url === "/computed") return json(response, computed);
    if (incoming.url === "/v1/models") {
      const data = ["chat", "embed"].map((id) => ({ id, object: "model", created: 0 }));
      return json(response, { object: "list", data });
    }
    let text = "";
    incoming.setEncoding("utf8").on("data", (part: string) => (text += part));
    incoming.on("end", () => {
      if (incoming.url === "/v1/embeddings") embed(JSON.parse(text) as EmbeddingRequest, response);
      else chat(JSON.parse(text) as ChatRequest, response);
    });
  });
  setInterval(() => {
    for (const generation of running) advance(generation);
  }, TICK_MS);
  server.listen(0, "127.0.0.1", () => console.log((server.address() as AddressInfo).port));
}

const CHUNK = { id: "chatcmpl-day", object: "chat.completion.chunk", created: 0, model: "chat" };

function event(request: ChatRequest, content: string | null, reason: string | null = null): string {
  const delta = content === null ? {} : { content };
  const choices = [{ index: 0, delta, finish_reason: reason }];
  return `data: ${JSON.stringify({ ...CHUNK, model: request.model, choices })}\n\n`;
}

function json(response: ServerResponse, body: object): void {
  response.writeHead(200, { "content-type": "application/json" }).end(JSON.stringify(body));
}

if (import.meta.main) serve();
