import test from "node:test";

// 6 GB to install: real-engines.md §4 has the recipe.
const reason = "opt-in, TIDEGATE_TEST_VLLM=1";
console.log(`skipped: vllm: ${reason}`);
test("real vLLM", { skip: reason }, () => {});
