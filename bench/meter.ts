// What a process and its children have used, from /proc.
import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";

export interface CpuTime {
  userMs: number;
  systemMs: number;
}

const TICK_MS = 1000 / Number(execFileSync("getconf", ["CLK_TCK"], { encoding: "utf8" }));

/** User and system time so far, nginx's worker and the like included. */
export function cpuTime(pid: number): CpuTime {
  const total = { userMs: 0, systemMs: 0 };
  for (const member of processTree(pid)) {
    const stat = readFileSync(`/proc/${member}/stat`, "latin1");
    // The name, in brackets, may hold spaces: fields are counted from behind it.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    total.userMs += Number(fields[11]) * TICK_MS;
    total.systemMs += Number(fields[12]) * TICK_MS;
  }
  return total;
}

/** On-CPU time by name of thread, nanoseconds fine; threads that have ended are not in it. */
export function threadTimes(pid: number): Map<string, number> {
  const times = new Map<string, number>();
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    const name = readFileSync(`/proc/${pid}/task/${thread}/comm`, "latin1").trim();
    const [nanoseconds] = readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "latin1").split(
      " ",
    );
    times.set(name, (times.get(name) ?? 0) + Number(nanoseconds) / 1e6);
  }
  return times;
}

export function residentMiB(pid: number): number {
  let kibibytes = 0;
  for (const member of processTree(pid)) {
    const status = readFileSync(`/proc/${member}/status`, "latin1");
    kibibytes += Number(/^VmRSS:\s+(\d+)/m.exec(status)?.[1] ?? 0);
  }
  return kibibytes / 1024;
}

function processTree(pid: number): number[] {
  const members = [pid];
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    const children = readFileSync(`/proc/${pid}/task/${thread}/children`, "latin1");
    for (const child of children.split(" ")) {
      if (child !== "") members.push(...processTree(Number(child)));
    }
  }
  return members;
}
