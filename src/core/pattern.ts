/** Does one of the patterns fit the whole name? `*` stands for any text. */
export function matches(patterns: readonly string[], name: string): boolean {
  return patterns.some((pattern) => {
    const parts = pattern.split("*").map((part) => RegExp.escape(part));
    return new RegExp(`^${parts.join(".*")}$`, "s").test(name);
  });
}
