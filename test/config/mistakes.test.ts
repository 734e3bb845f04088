/** What is wrong with a configuration: everything at once, each with its path, value, and way out. */
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { schema } from "../../src/config.ts";
import { check, describe as inWords, type Mistake } from "../../src/settings/mistakes.ts";

function mistakesOf(raw: unknown): Mistake[] {
  const result = check(raw);
  assert("mistakes" in result, "was accepted");
  return result.mistakes;
}

/** The one mistake in it. */
function mistakeOf(raw: unknown): Mistake {
  const mistakes = mistakesOf(raw);
  const [first] = mistakes;
  assert(first !== undefined && mistakes.length === 1, JSON.stringify(mistakes));
  return first;
}

const two = [
  { id: "ollama-dev", url: "http://127.0.0.1:1", models: ["llama3:8b", "mistral:7b"] },
  { id: "vllm-prod", url: "http://127.0.0.1:2", models: [{ name: "qwen2.5:14b", upstream: "Q" }] },
];

const issuer = { issuer: "https://id.example", audience: "a", jwksUrl: "http://127.0.0.1:1" };

describe("unknown keys", () => {
  const places: [path: string, build: (key: string) => object, near: string, key: string][] = [
    ["", (key) => ({ [key]: {} }), "serve", "server"],
    ["server.", (key) => ({ server: { [key]: 1 } }), "prot", "port"],
    ["queue.", (key) => ({ queue: { [key]: 1 } }), "maxWaitMS", "maxWaitMs"],
    ["timeouts.", (key) => ({ timeouts: { [key]: 1 } }), "idleMS", "idleMs"],
    ["limits.", (key) => ({ limits: { [key]: 1 } }), "bodyByte", "bodyBytes"],
    ["drain.", (key) => ({ drain: { [key]: 1 } }), "grace", "graceMs"],
    ["auth.", (key) => ({ auth: { [key]: [] } }), "key", "keys"],
    ["cache.", (key) => ({ cache: { [key]: 1 } }), "maxItem", "maxItems"],
    [
      "circuitBreaker.",
      (key) => ({ circuitBreaker: { [key]: 1 } }),
      "resetTimeout",
      "resetTimeoutMs",
    ],
    ["redis.", (key) => ({ redis: { [key]: 1 } }), "timeoutMS", "timeoutMs"],
    ["tenants.t.", (key) => ({ tenants: { t: { [key]: 1 } } }), "model", "models"],
    [
      "tenants.t.budgets[0].",
      (key) => ({ tenants: { t: { budgets: [{ tokens: 1, window: "day", [key]: 1 }] } } }),
      "windows",
      "window",
    ],
    [
      "auth.jwt[0].",
      (key) => ({ auth: { jwt: [{ ...issuer, [key]: 1 }] } }),
      "tenantClaims",
      "tenantClaim",
    ],
    ["auth.keys[0].", (key) => ({ auth: { keys: [{ key: "k", [key]: 1 }] } }), "tenat", "tenant"],
    ["metrics.", (key) => ({ metrics: { [key]: 1 } }), "label", "labels"],
    ["telemetry.", (key) => ({ telemetry: { [key]: 1 } }), "servicename", "serviceName"],
    ["admin.", (key) => ({ admin: { [key]: 1 } }), "enable", "enabled"],
    ["backends[0].", (key) => ({ backends: [{ ...two[0], [key]: 1 }] }), "wieght", "weight"],
    [
      "backends[0].",
      (key) => ({ backends: [{ ...two[0], [key]: 1 }] }),
      "allowcloud",
      "allowCloud",
    ],
    ["models.m.", (key) => ({ models: { m: { [key]: 1 } } }), "alias", "aliases"],
  ];
  for (const [path, build, near, key] of places) {
    it(`${path}${near}: did you mean ${key}?`, () => {
      const mistake = mistakeOf(build(near));
      assert.equal(mistake.path, path + near);
      assert.equal(mistake.suggestion, key);
      assert(mistake.expected.split(/[ ,]+/).includes(key), "lists what is allowed");
    });
  }

  it("guesses nothing where nothing is near", () => {
    assert.equal(mistakeOf({ server: { zzzzzzzz: 1 } }).suggestion, null);
  });

  it("sees every one of them", () => {
    const raw = { a: 1, b: 2, server: { c: 3, d: 4 } };
    const paths = mistakesOf(raw).map(({ path }) => path);
    assert.deepEqual(paths.toSorted(), ["a", "b", "server.c", "server.d"]);
  });

  it("does not write a path that cannot be read", () => {
    const mistake = mistakeOf({ models: { "llama3:8b": { alias: 1 } } });
    assert.equal(mistake.path, 'models."llama3:8b".alias');
  });

  it("are named inside a named model too", () => {
    const raw = { backends: [{ ...two[0], models: [{ name: "a", upstrem: "b" }] }] };
    const mistake = mistakeOf(raw);
    assert.equal(mistake.path, "backends[0].models[0].upstrem");
    assert.equal(mistake.suggestion, "upstream");
  });
});

describe("keys of a later version", () => {
  const later: [string, object][] = [["telemetry.slowMs", { telemetry: { slowMs: 1 } }]];
  for (const [path, raw] of later) {
    it(`${path} is said to come later, and not guessed at`, () => {
      const mistake = mistakeOf(raw);
      assert.equal(mistake.path, path);
      assert.match(mistake.expected, /later version/);
      assert.equal(mistake.suggestion, null);
    });
  }
});

describe("wrong values", () => {
  it("are shown with what is allowed and what was likely meant", () => {
    const mistake = mistakeOf({ backends: [{ ...two[0], kind: "olama" }] });
    assert.deepEqual(
      [mistake.path, mistake.value, mistake.suggestion],
      ["backends[0].kind", "olama", "ollama"],
    );
    assert.match(mistake.expected, /ollama, openai, demo, llamacpp, vllm, lmstudio, sglang/);
  });

  it("are all reported at once, those of single keys and those between keys", () => {
    const raw = {
      server: { port: 70_000, logLevel: "loud" },
      backends: [
        { id: "a", url: "nowhere", weight: 0 },
        { id: "a", url: "http://127.0.0.1:1" },
      ],
      models: { m: { backends: ["c"], aliases: ["x"] }, n: { aliases: ["x"] } },
      queue: { maxLenght: 1 },
    };
    const paths = mistakesOf(raw).map(({ path }) => path);
    assert.deepEqual(
      paths.toSorted(),
      [
        "server.port",
        "server.logLevel",
        "backends[0].url",
        "backends[0].weight",
        "backends[1].id",
        "models.m.backends[0]",
        "models.n.aliases[0]",
        "queue.maxLenght",
      ].toSorted(),
    );
  });

  it("that are no configuration at all are one mistake, at the root", () => {
    for (const raw of [[], null, "x", 1, undefined]) {
      assert.equal(mistakeOf(raw).path, "");
      assert.match(inWords(mistakeOf(raw)), /^configuration: /);
    }
  });

  it("of any shape are mistakes and never an exception", () => {
    const odd: unknown[] = [null, 1, "x", [], {}, [null], [[]], [{}], { m: null }, { m: [] }];
    for (const key of Object.keys(schema.shape)) {
      for (const value of odd) check({ [key]: value });
    }
    for (const value of odd) {
      check({ backends: [{ id: value, url: value, models: value, kind: value }] });
      check({ models: { m: { backends: value, aliases: value, fallback: value } } });
      check({ backends: two, models: { m: { backends: value, aliases: value, fallback: value } } });
      check({ auth: { keys: value, jwt: value }, tenants: value });
      check({ auth: { keys: [{ key: value, tenant: value }] }, tenants: { t: value } });
      check({ auth: { jwt: [value, { issuer: value, jwksUrl: value, jwksFile: value }] } });
      check({ tenants: { t: { models: value, budgets: value } } });
    }
  });
});

describe("between keys", () => {
  it("two backends have two ids", () => {
    const mistake = mistakeOf({ backends: [two[0], { ...two[1], id: "ollama-dev" }] });
    assert.deepEqual([mistake.path, mistake.value], ["backends[1].id", "ollama-dev"]);
  });

  it("a model's backends exist", () => {
    const mistake = mistakeOf({ backends: two, models: { m: { backends: ["vllm-prd"] } } });
    assert.deepEqual(
      [mistake.path, mistake.value, mistake.suggestion],
      ["models.m.backends[0]", "vllm-prd", "vllm-prod"],
    );
    assert.match(mistake.expected, /ollama-dev, vllm-prod/);
  });

  it("a model's backends are not checked where they are discovered", () => {
    assert("config" in check({ models: { m: { backends: ["anything"] } } }));
  });

  it("a fallback exists, where every backend names its models", () => {
    const fallback = "mistral:8b";
    const mistake = mistakeOf({ backends: two, models: { "llama3:8b": { fallback } } });
    assert.deepEqual([mistake.value, mistake.suggestion], [fallback, "mistral:7b"]);
    assert.match(mistake.path, /^models\."llama3:8b"\.fallback/);
    const list = mistakesOf({
      backends: two,
      models: { m: { fallback: ["qwen2.5:14b", "a", "b"] } },
    });
    assert.deepEqual(
      list.map(({ value }) => value),
      ["a", "b"],
    );
  });

  it("a fallback is not checked where a backend discovers its models", () => {
    const { models: _, ...discovering } = two[1] ?? {};
    const raw = { backends: [two[0], discovering], models: { m: { fallback: "x" } } };
    assert("config" in check(raw));
    assert("config" in check({ models: { m: { fallback: "x" } } }));
  });

  it("an alias belongs to one model and is no model's name", () => {
    const shared = mistakeOf({ models: { a: { aliases: ["x"] }, b: { aliases: ["y", "x"] } } });
    assert.deepEqual([shared.path, shared.value], ["models.b.aliases[1]", "x"]);
    assert.match(shared.expected, /belongs to a/);
    const named = { backends: two, models: { "llama3:8b": { aliases: ["mistral:7b"] } } };
    assert.match(mistakeOf(named).expected, /a model of that name exists/);
    const upstream = { backends: two, models: { "qwen2.5:14b": { aliases: ["Q"] } } };
    assert("config" in check(upstream), "what the engine calls it is no public name");
  });

  it("a key's tenant is listed, unless it is the default one", () => {
    const tenants = { research: {}, "night-shift": {} };
    const keys = (tenant: string) => ({ tenants, auth: { keys: [{ key: "k", tenant }] } });
    for (const tenant of ["research", "night-shift", "default"]) {
      assert("config" in check(keys(tenant)), tenant);
    }
    const mistake = mistakeOf(keys("reserch"));
    assert.deepEqual(
      [mistake.path, mistake.value, mistake.suggestion],
      ["auth.keys[0].tenant", "reserch", "research"],
    );
    assert.match(mistake.expected, /default, research, night-shift/);
    assert.equal(mistakeOf(keys("constructor")).suggestion, null);
  });

  it("an issuer's keys come from a URL or from a file", () => {
    const { jwksUrl, ...without } = issuer;
    const both = { ...issuer, jwksFile: "keys.json" };
    for (const [entry, words] of [
      [without, /^auth\.jwt\[0\]: missing, expected either jwksUrl or jwksFile/],
      [both, /^auth\.jwt\[0\]: found "both", expected either jwksUrl or jwksFile/],
    ] as const) {
      assert.match(inWords(mistakeOf({ auth: { jwt: [entry] } })), words);
    }
    assert("config" in check({ auth: { jwt: [{ ...without, jwksFile: "keys.json" }] } }), jwksUrl);
  });

  it("a tenant's name is one that stands in labels and headers as it is", () => {
    const mistake = mistakeOf({ tenants: { "night shift": { models: ["a"] } } });
    assert.deepEqual([mistake.path, mistake.value], ['tenants."night shift"', "night shift"]);
    assert.match(mistake.expected, /letters, digits, \. _ and -/);
  });

  it("a budget's window says what it may be", () => {
    const mistake = mistakeOf({ tenants: { t: { budgets: [{ tokens: 1, window: "1d" }] } } });
    assert.deepEqual([mistake.path, mistake.value], ["tenants.t.budgets[0].window", "1d"]);
    assert.match(mistake.expected, /"5m".*"day" or "month"/);
  });

  it("a model may not repeat its own alias", () => {
    assert.equal(mistakeOf({ models: { a: { aliases: ["x", "x"] } } }).path, "models.a.aliases[1]");
  });
});

describe("secrets", () => {
  const SECRET = "correct-horse-battery";
  const places: Record<string, object> = {
    "a key that is no text": { auth: { keys: [{ key: [SECRET] }] } },
    "a hash in another form": { auth: { keys: [{ hash: SECRET }] } },
    "a backend's apiKey that is no text": { backends: [{ ...two[0], apiKey: { value: SECRET } }] },
    "a key beside a hash": { auth: { keys: [{ key: SECRET, hash: SECRET }] } },
    "a key without its object": { auth: { keys: [SECRET] } },
    "one key in place of the list": { auth: { keys: SECRET } },
    "a list in place of auth": { auth: [{ key: SECRET }] },
    "a misspelt key": { auth: { keys: [{ kye: SECRET }] } },
    "a misspelt apiKey": { backends: [{ ...two[0], apikey: SECRET }] },
    "a backend in place of the list": { backends: { ...two[0], apiKey: SECRET } },
    "an admin key that is no text": { admin: { key: [SECRET] } },
    "a misspelt admin key": { admin: { kye: SECRET } },
    "a key in place of admin": { admin: SECRET },
    "a key by another name": { backends: [{ ...two[0], bearer: SECRET, token: SECRET }] },
    "the password in a url that is no text": { redis: { url: [`redis://:${SECRET}@box`] } },
    "the password in the url of something else": { redis: { url: `http://:${SECRET}@box` } },
    "the password in a url without slashes": { redis: { uri: `redis:${SECRET}@box` } },
    "a url in the place of its section": { redis: `redis://:${SECRET}@box:6379/1` },
    "a password that stands alone": { redis: { pass: SECRET, password: SECRET } },
    "the password in the url of a key server": {
      auth: { jwt: [{ ...issuer, jwksUrl: `https://u:${SECRET}@box/keys?token=${SECRET}` }] },
    },
    "a secret where an issuer needs none": { auth: { jwt: [{ ...issuer, clientSecret: SECRET }] } },
    "a symmetric key of an issuer": { auth: { jwt: [{ ...issuer, k: SECRET }] } },
    "the password in a backend's url": { backends: [{ id: "a", url: `ftp://u:${SECRET}@box` }] },
    "a password with an @ in it": { backends: [{ id: "a", url: `http://u:x@y${SECRET}@box` }] },
    "a password with a / in it": { backends: [{ id: "a", url: `http://u:x/${SECRET}@box` }] },
    "a password without slashes before it": {
      backends: [{ id: "a", url: `http:u:${SECRET}@box` }],
    },
    "a key in a url's query": { backends: [{ id: "a", url: `http://box/v1?key=${SECRET}` }] },
    "a key in a url's fragment": { backends: [{ id: "a", url: `http://box/v1#${SECRET}` }] },
  };
  for (const [what, raw] of Object.entries(places)) {
    it(`are never shown: ${what}`, () => {
      const mistakes = mistakesOf(raw);
      for (const mistake of mistakes) {
        assert(!inWords(mistake).includes(SECRET), inWords(mistake));
        assert(!JSON.stringify(mistake).includes(SECRET), JSON.stringify(mistake));
      }
    });
  }

  it("are shown as ***, so that one sees that something is there", () => {
    const mistake = mistakeOf({ auth: { keys: [{ hash: SECRET }] } });
    assert.equal(mistake.path, "auth.keys[0].hash");
    assert.match(inWords(mistake), /"\*\*\*"/);
  });

  it("are not to be confused with what is missing", () => {
    const mistake = mistakeOf({ auth: { keys: [{}] } });
    assert.match(inWords(mistake), /missing/);
  });
});

describe("in words", () => {
  it("says path, value, expectation and guess on one line", () => {
    const mistake = { path: "server.prot", value: 1, expected: "one of port", suggestion: "port" };
    assert.equal(
      inWords(mistake),
      "server.prot: found 1, expected one of port (did you mean port?)",
    );
    const missing = { path: "a.b", value: undefined, expected: "a name", suggestion: null };
    assert.equal(inWords(missing), "a.b: missing, expected a name");
  });

  it('reads as a sentence: one "expected" and no guess at what was written', () => {
    const raws = [
      { metrics: { endpoint: "metrics" } },
      { telemetry: { otlpEndpoint: "x" } },
      { auth: { keys: [{ hash: "x" }] } },
      { auth: { keys: [{ key: "x", hash: "y" }] } },
    ];
    for (const raw of raws) {
      for (const mistake of mistakesOf(raw)) {
        const words = inWords(mistake);
        assert.equal(words.split("expected").length, 2, words);
        assert(!words.includes(`did you mean ${mistake.path.split(".").at(-1)}?`), words);
      }
    }
  });
});

describe("what may be one thing or another", () => {
  it("says what", () => {
    const said = (raw: unknown) => inWords(mistakeOf(raw));
    assert.equal(
      said({ queue: { turnMs: "soon" } }),
      'queue.turnMs: found "soon", expected auto, or number',
    );
    assert.equal(
      said({ models: { a: { fallback: 5 } } }),
      "models.a.fallback: found 5, expected string, or array",
    );
    assert.equal(
      said({ backends: [{ id: "a", url: "http://127.0.0.1:1", models: [5] }] }),
      "backends[0].models[0]: found 5, expected string, or object",
    );
  });
});
