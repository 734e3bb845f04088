/** A steady load of streams and answers in one piece, and what each client got of it. */
import { chatBody, open, until } from "../support/client.ts";

/** What one client got. */
export interface Got {
  /** Its name: sent as `user`, so that the engines' records tell whose attempt one was. */
  user: string;
  stream: boolean;
  status: number;
  backend: string | null;
  attempts: number;
  retryAfter: string | null;
  text: string;
  /** The error, in the status or in the stream; null for a whole answer. */
  error: string | null;
  /** A byte of an engine's answer was out before the error. */
  committed: boolean;
}

const TOKEN = /"content":"[^"]/;
const ERROR = /"error":/;

export async function ask(
  url: string,
  user: string,
  stream: boolean,
  body: Record<string, unknown> = {},
): Promise<Got> {
  const response = await open(`${url}/v1/chat/completions`, chatBody({ ...body, user, stream }));
  // A connection that breaks off is an error as well.
  const text = await response.text().catch((error: unknown) => `"error": ${String(error)}`);
  const at = text.search(ERROR);
  const isWhole = response.status === 200 && at < 0 && (!stream || text.includes("[DONE]"));
  return {
    user,
    stream,
    status: response.status,
    backend: response.headers.get("x-tidegate-backend"),
    attempts: Number(response.headers.get("x-tidegate-attempts")),
    retryAfter: response.headers.get("retry-after"),
    text,
    error: isWhole ? null : (/"code":"(\w+)"/.exec(text)?.[1] ?? text.slice(0, 300)),
    committed: response.status === 200 && TOKEN.test(at < 0 ? text : text.slice(0, at)),
  };
}

export interface Load {
  got: Got[];
  /** Waits until so many more have been answered. */
  further(count: number): Promise<void>;
  stop(): Promise<void>;
}

/** So many clients, each with one request at a time, every other one a stream. */
export function startLoad(url: string, lanes: number, body: Record<string, unknown> = {}): Load {
  const got: Got[] = [];
  let isOver = false;
  let asked = 0;
  const lane = async (): Promise<void> => {
    while (!isOver) {
      asked += 1;
      got.push(await ask(url, `load-${asked}`, asked % 2 === 0, body));
    }
  };
  const all = Promise.all(Array.from({ length: lanes }, lane));
  return {
    got,
    async further(count) {
      const wanted = got.length + count;
      if (!(await until(() => got.length >= wanted, 20_000))) {
        throw new Error(`${got.length} of ${wanted} were answered`);
      }
    },
    async stop() {
      isOver = true;
      await all;
    },
  };
}
