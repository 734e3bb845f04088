import { isRecord, numberOf } from "../dialects/dialect.ts";
import { modelNamed, openai, type Engine, type EngineRequest } from "./engine.ts";

/** Human reading pace. */
const TOKEN_MS = 35;
const FIRST_TOKEN_MS = 250;
const DIMENSIONS = 64;

const ANSWER =
  "Hello from Tidegate's demo engine. No inference engine answered on this machine, so these " +
  "words come from the gateway itself, at a human pace, to show that streaming works from end " +
  "to end. Start Ollama, llama.cpp, vLLM, LM Studio or SGLang, and a few seconds later the same " +
  "request will reach a real model.";

interface Words {
  words: string[];
  finish: "stop" | "length";
  promptTokens: number;
}

function countWords(value: unknown): number {
  if (typeof value === "string") return value.split(/\s+/).filter(Boolean).length;
  if (Array.isArray(value)) return value.reduce<number>((sum, each) => sum + countWords(each), 0);
  if (!isRecord(value)) return 0;
  return countWords(value["content"]) + countWords(value["text"]);
}

function answer(body: Record<string, unknown>): Words {
  const all = ANSWER.split(/(?<= )/);
  const limit = numberOf(body["max_completion_tokens"]) ?? numberOf(body["max_tokens"]);
  const words = limit === null || limit < 0 ? all : all.slice(0, limit);
  const finish = words.length < all.length ? "length" : "stop";
  return { words, finish, promptTokens: countWords(body["messages"] ?? body["prompt"]) };
}

/** Resolves after `ms`, or at once when the signal is aborted. */
function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
  });
}

function usageOf({ words, promptTokens }: Words) {
  return {
    prompt_tokens: promptTokens,
    completion_tokens: words.length,
    total_tokens: promptTokens + words.length,
  };
}

/** The same text always gives the same vector, alike texts share words and so directions. */
function embed(text: string): Float32Array {
  const vector = new Float32Array(DIMENSIONS);
  for (const word of text.toLowerCase().split(/\W+/)) {
    let hash = 2_166_136_261;
    for (const letter of word) hash = Math.imul(hash ^ (letter.codePointAt(0) ?? 0), 16_777_619);
    const at = Math.abs(hash) % DIMENSIONS;
    vector[at] = (vector[at] ?? 0) + 1;
  }
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

function embeddings(body: Record<string, unknown>): Response {
  const inputs = Array.isArray(body["input"]) ? body["input"] : [body["input"]];
  const base64 = body["encoding_format"] === "base64";
  const data = inputs.map((input, index) => {
    const vector = embed(typeof input === "string" ? input : JSON.stringify(input ?? ""));
    const bytes = new Uint8Array(vector.buffer);
    const embedding = base64 ? btoa(String.fromCharCode(...bytes)) : [...vector];
    return { object: "embedding", index, embedding };
  });
  const tokens = countWords(inputs);
  const usage = { prompt_tokens: tokens, total_tokens: tokens };
  return Response.json({ object: "list", model: "demo", data, usage });
}

async function generate(request: EngineRequest, body: Record<string, unknown>): Promise<Response> {
  const chat = !request.path.startsWith("/v1/completions");
  const said = answer(body);
  const base = {
    id: `demo-${crypto.randomUUID()}`,
    created: Math.floor(Date.now() / 1000),
    model: "demo",
  };
  if (body["stream"] === true) return stream(request, body, said, base, chat);
  await pause(FIRST_TOKEN_MS + said.words.length * TOKEN_MS, request.signal);
  const text = said.words.join("");
  const choice = chat ? { message: { role: "assistant", content: text } } : { text };
  return Response.json({
    ...base,
    object: chat ? "chat.completion" : "text_completion",
    choices: [{ index: 0, ...choice, finish_reason: said.finish }],
    usage: usageOf(said),
  });
}

function stream(
  { signal }: EngineRequest,
  body: Record<string, unknown>,
  said: Words,
  base: object,
  chat: boolean,
): Response {
  const encoder = new TextEncoder();
  const object = chat ? "chat.completion.chunk" : "text_completion";
  const options = body["stream_options"];
  const event = (fields: object) =>
    encoder.encode(`data: ${JSON.stringify({ ...base, object, ...fields })}\n\n`);
  const choice = (content: object, finish: string | null) =>
    event({ choices: [{ index: 0, ...content, finish_reason: finish }] });
  async function* events() {
    await pause(FIRST_TOKEN_MS, signal);
    if (chat) yield choice({ delta: { role: "assistant", content: "" } }, null);
    for (const word of said.words) {
      await pause(TOKEN_MS, signal);
      if (signal.aborted) return;
      yield choice(chat ? { delta: { content: word } } : { text: word }, null);
    }
    yield choice(chat ? { delta: {} } : { text: "" }, said.finish);
    if (isRecord(options) && options["include_usage"] === true) {
      yield event({ choices: [], usage: usageOf(said) });
    }
    yield encoder.encode("data: [DONE]\n\n");
  }
  const source = events();
  const readable = new ReadableStream<Uint8Array>({
    async pull(controller) {
      const { value, done } = await source.next();
      if (value === undefined || done === true) controller.close();
      else controller.enqueue(value);
    },
    async cancel() {
      await source.return();
    },
  });
  return new Response(readable, { headers: { "content-type": "text/event-stream" } });
}

const PATHS = new Set(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]);

/** Answers out of the gateway itself, so that a machine without an engine has something to try. */
export const demo: Engine = {
  ...openai,
  kind: "demo",
  slots: 8,
  speaks: (path) => PATHS.has(path),
  async send(_connection, request) {
    const body: unknown = JSON.parse(new TextDecoder().decode(request.body));
    const fields = isRecord(body) ? body : {};
    return request.path.startsWith("/v1/embeddings")
      ? embeddings(fields)
      : await generate(request, fields);
  },
  look() {
    const model = modelNamed("demo", { capabilities: ["completion"] });
    return Promise.resolve({ loading: false, models: [model] });
  },
};
