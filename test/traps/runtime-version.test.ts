/** Bun before 1.4.0 has no backpressure in any form: the gateway must not start there. */
import assert from "node:assert/strict";
import test from "node:test";
import { runtimeProblem } from "../../src/runtime.ts";

test("Bun before 1.4.0 is refused, with the version that is needed", { timeout: 60_000 }, () => {
  for (const version of ["0.8.1", "1.0.0", "1.3.14", "1.3.99"]) {
    const problem = runtimeProblem(`bun ${version}`) ?? "";
    assert.ok(problem.includes(version), version);
    assert.ok(problem.includes("1.4.0"), version);
  }
});

test("newer Buns and Deno are not", { timeout: 60_000 }, () => {
  for (const runtime of ["bun 1.4.0", "bun 1.4.5", "bun 1.10.0", "bun 2.0.0", "deno 2.9.6"]) {
    assert.equal(runtimeProblem(runtime), null, runtime);
  }
});
