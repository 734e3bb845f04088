/** A name server on loopback that says what a test wants, by UDP. */
import { createSocket, type RemoteInfo } from "node:dgram";

/** An address, and for how many seconds it may be taken for true. */
export interface ARecord {
  address: string;
  ttl: number;
}

/** What is said of a name: its addresses, that there is none, that it is broken, or nothing at all. */
export type DnsAnswer = readonly ARecord[] | "NXDOMAIN" | "SERVFAIL" | "silence";

export interface FakeDns {
  port: number;
  /** For `new Resolver().setServers`. */
  address: string;
  /** Names asked for, oldest first. */
  asked: string[];
  /** From now on; a name nobody spoke of is NXDOMAIN. */
  answer(name: string, records: DnsAnswer): void;
  close(): Promise<void>;
}

const TYPE_A = 1;
const HEADER_BYTES = 12;

/** The name of the only question, and where it ends. */
function questionOf(query: Buffer): { name: string; type: number; end: number } {
  const labels: string[] = [];
  let at = HEADER_BYTES;
  for (let length = query[at] ?? 0; length !== 0; length = query[at] ?? 0) {
    labels.push(query.toString("latin1", at + 1, at + 1 + length));
    at += length + 1;
  }
  return { name: labels.join(".").toLowerCase(), type: query.readUInt16BE(at + 1), end: at + 5 };
}

function recordBytes({ address, ttl }: ARecord): Buffer {
  const bytes = Buffer.alloc(16);
  // The name: as in the question.
  bytes.writeUInt16BE(0xc00c, 0);
  bytes.writeUInt16BE(TYPE_A, 2);
  bytes.writeUInt16BE(1, 4);
  bytes.writeUInt32BE(ttl, 6);
  bytes.writeUInt16BE(4, 10);
  for (const [at, part] of address.split(".").entries()) bytes[12 + at] = Number(part);
  return bytes;
}

function reply(query: Buffer, end: number, code: number, records: readonly ARecord[]): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  query.copy(header, 0, 0, 2);
  // An answer, recursion desired and available.
  header.writeUInt16BE(0x8180 | code, 2);
  header.writeUInt16BE(1, 4);
  header.writeUInt16BE(records.length, 6);
  return Buffer.concat([header, query.subarray(HEADER_BYTES, end), ...records.map(recordBytes)]);
}

const CODES = { NXDOMAIN: 3, SERVFAIL: 2 } as const;

export async function startDns(): Promise<FakeDns> {
  const answers = new Map<string, DnsAnswer>();
  const asked: string[] = [];
  const socket = createSocket("udp4");
  socket.on("message", (query: Buffer, from: RemoteInfo) => {
    const { name, type, end } = questionOf(query);
    asked.push(name);
    const answer = answers.get(name) ?? "NXDOMAIN";
    if (answer === "silence") return;
    const code = typeof answer === "string" ? CODES[answer] : 0;
    const records = typeof answer === "string" || type !== TYPE_A ? [] : answer;
    socket.send(reply(query, end, code, records), from.port, from.address);
  });
  await new Promise<void>((resolve) => socket.bind(0, "127.0.0.1", resolve));
  const { port } = socket.address();
  return {
    port,
    address: `127.0.0.1:${port}`,
    asked,
    answer: (name, records) => void answers.set(name.toLowerCase(), records),
    close: () => new Promise((resolve) => void socket.close(() => resolve())),
  };
}
