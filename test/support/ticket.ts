/** What is the same in all tickets of a test: one flow, one class, requests alike. */
export const ALIKE = {
  flow: "default",
  priority: "default",
  weight: 1,
  tokens: 10,
  barred: new Set<string>(),
} as const;
