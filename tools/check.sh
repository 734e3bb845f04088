#!/usr/bin/env bash
# Everything that has to be green at every commit: format, lint, types, dead code, tests on both runtimes.
set -euo pipefail
cd "$(dirname "$0")/.."
bun run setup
bun run setup:tools
export PATH="$PWD/tools/node_modules/.bin:$PWD/node_modules/.bin:$PATH"

step() {
  printf '\n== %s\n' "$*"
  "$@"
}

step oxfmt --check src test bench tools/*.ts gateway.config.ts
step oxlint --type-aware src test bench tools/*.ts gateway.config.ts
step tsc -p .
step knip
step bun tools/generate.ts --check
step bun test --parallel=4 --timeout=60000 --timings=test/timings.json test/
TIDEGATE_EFFORT=full step deno task test
export TIDEGATE_ALONE=1
step bun test test/resilience/pacing.test.ts
step deno test -A --no-check test/resilience/pacing.test.ts
