/**
 * A key that is accepted has an effect: each one is changed in the file of a gateway that runs, and the
 * gateway behaves otherwise from then on.
 */
import assert from "node:assert/strict";
import { after, afterEach, before, describe, it } from "node:test";
import { configShape, type Shape } from "../../src/settings/shape.ts";
import { backendKeys, modelKeys } from "./keys/backends.ts";
import { breakerKeys } from "./keys/breaker.ts";
import { cacheKeys, redisKeys } from "./keys/cache.ts";
import { drainKeys } from "./keys/drain.ts";
import { metricKeys, telemetryKeys } from "./keys/observe.ts";
import { limitKeys, queueKeys, timeoutKeys } from "./keys/queue.ts";
import { startRig, type KeyTests, type Rig } from "./keys/rig.ts";
import { serverKeys } from "./keys/server.ts";
import { capKeys, tenantKeys } from "./keys/tenants.ts";
import { tokenKeys } from "./keys/tokens.ts";
import { turnKeys } from "./keys/turns.ts";

const TIMEOUT = { timeout: 60_000 };

const groups: Record<string, KeyTests> = {
  "server, auth and admin": serverKeys,
  backends: backendKeys,
  models: modelKeys,
  "output caps": capKeys,
  tenants: tenantKeys,
  tokens: tokenKeys,
  "the cache": cacheKeys,
  redis: redisKeys,
  queue: queueKeys,
  timeouts: timeoutKeys,
  turns: turnKeys,
  limits: limitKeys,
  drain: drainKeys,
  "the circuit breaker": breakerKeys,
  metrics: metricKeys,
  telemetry: telemetryKeys,
};

describe("the keys of", () => {
  let rig: Rig;
  before(async () => {
    rig = await startRig();
  });
  afterEach(() => rig.reset());
  after(() => rig.close());

  for (const [group, tests] of Object.entries(groups)) {
    for (const [key, test] of Object.entries(tests)) {
      it(`${group}: ${key}`, TIMEOUT, () => test(rig));
    }
  }
});

/** Every key that holds a value, as a path: `backends[].models[].name`, `models.<name>.aliases`. */
function keysOf(shape: Shape, path = ""): string[] {
  const { properties = {}, items, anyOf = [], additionalProperties: other } = shape;
  const below = [
    ...Object.entries(properties).flatMap(([key, each]) =>
      keysOf(each, path === "" ? key : `${path}.${key}`),
    ),
    ...(items === undefined ? [] : keysOf(items, `${path}[]`)),
    ...(typeof other === "object" ? keysOf(other, `${path}.<name>`) : []),
    ...anyOf.flatMap((each) => keysOf(each, path)),
  ];
  // A list of texts is one value.
  return below.length > 0 ? below : [path.replace(/\[\]$/, "")];
}

describe("every key of the schema", () => {
  it("has a test of its own", () => {
    const tested = Object.values(groups).flatMap((tests) => Object.keys(tests));
    assert.deepEqual(tested.toSorted(), [...new Set(keysOf(configShape))].toSorted());
  });
});
