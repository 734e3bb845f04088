/** The oldest Bun with back-pressure: before it a client that does not read fills the memory. */
const OLDEST_BUN = [1, 4, 0] as const;

/**
 * Why the gateway cannot run here, or null.
 *
 * @param runtime name and version, such as `bun 1.4.5`
 */
export function runtimeProblem(runtime: string): string | null {
  const [name, version = ""] = runtime.split(" ");
  if (name !== "bun") return null;
  const parts = version.split(".").map((part) => Number.parseInt(part, 10));
  for (const [at, least] of OLDEST_BUN.entries()) {
    const part = parts[at] ?? 0;
    if (part > least) return null;
    if (part < least) {
      return (
        `Bun ${version} holds whole answers in memory when a client reads slowly; ` +
        `Bun ${OLDEST_BUN.join(".")} or later is needed`
      );
    }
  }
  return null;
}
