/**
 * A scriptable fake engine on a real socket. It speaks as one of the kinds of `engine-kinds.ts`, with
 * their true faults: a fake kinder than the real thing proves nothing.
 */
import type { Behaviour } from "./engine-behaviour.ts";
import { calm } from "./engine-behaviour.ts";
import type {
  BackendKind,
  Call,
  EngineKind,
  EngineRequest,
  Handler,
  Host,
  ModelInfo,
} from "./engine-call.ts";
import { isFilled, isJsonObject } from "./engine-call.ts";
import { profiles } from "./engine-kinds.ts";
import type { Profile } from "./engine-profile.ts";
import { refuse } from "./engine-profile.ts";
import type { LoadRecord, LoadRequest } from "./engine-residency.ts";
import { Residency } from "./engine-residency.ts";
import { Slots } from "./engine-slots.ts";
import type { Reply, WireRequest } from "./engine-socket.ts";
import { ClientLeft, pause, WireServer } from "./engine-socket.ts";
import { answerFault } from "./engine-stream.ts";

/** What is kept of an answer: enough to compare, not a flood. */
const KEPT_BYTES = 4 * 1024 * 1024;

export interface FakeEngine {
  url: string;
  port: number;
  /** As a configuration names it. */
  kind: BackendKind;
  /** Every request, probes too, oldest first. */
  requests: EngineRequest[];
  /** Inference requests: POSTs, without those that only load a model. */
  inference(): EngineRequest[];
  /** Loads of models, oldest first, where models come and go. */
  loads: LoadRecord[];
  /** Names of the models that are loaded. */
  resident(): string[];
  behave(changes: Partial<Behaviour>): void;
  /** As {@link behave}, for requests that name this model; stronger than it. */
  behaveFor(model: string, changes: Partial<Behaviour>): void;
  setModels(models: (string | ModelInfo)[]): void;
  /** Behaviour and records as at the start; nothing is loaded. */
  reset(): void;
  openConnections(): number;
  /** Requests that hold a slot. */
  activeGenerations(): number;
  /** Requests that wait for one. */
  waiting(): number;
  /** New connections are refused, idle ones closed; what runs goes on. */
  stopListening(): void;
  listenAgain(): Promise<void>;
  /** Nothing is delayed before its headers any more (`headersDelayMs`), what waits there neither. */
  release(): void;
  /** As after kill -STOP: connections are accepted, nothing is read, said or noticed. */
  freeze(): void;
  /** As after kill -CONT. */
  thaw(): void;
  close(): Promise<void>;
}

export interface EngineOptions {
  kind?: EngineKind;
  models?: (string | ModelInfo)[];
  /** One that is free: an engine that was closed comes back on its port. */
  port?: number;
  /** A loopback address; 127.0.0.1 unless told otherwise. */
  host?: string;
  behaviour?: Partial<Behaviour>;
}

export async function startEngine(options: EngineOptions = {}): Promise<FakeEngine> {
  const engine = new Engine(options);
  await engine.server.listen(options.port ?? 0, options.host);
  return engine.face();
}

class Engine implements Host {
  readonly profile: Profile;
  readonly requests: EngineRequest[] = [];
  readonly residency = new Residency();
  readonly server: WireServer;
  readonly initial: Behaviour;
  models: ModelInfo[] = [];
  behaviour: Behaviour;
  perModel = new Map<string, Partial<Behaviour>>();
  active = 0;
  answers = 0;
  #slots = new Slots();
  /** Prompts that were read, as words. */
  #read: (readonly string[])[] = [];
  /** Of the requests that are not over. */
  #underWay = new Set<Behaviour>();
  /** What ends the delays before headers. */
  #delayed = new Set<() => void>();

  constructor({ kind = "openai", models, behaviour }: EngineOptions) {
    this.profile = profiles[kind];
    this.initial = { ...calm, ...this.profile.behaviour, ...behaviour };
    this.behaviour = { ...this.initial };
    this.setModels(models ?? this.profile.models);
    this.server = new WireServer(
      this.profile.manner,
      (request, reply) => void this.#serve(request, reply),
    );
  }

  setModels(models: (string | ModelInfo)[]): void {
    this.models = models
      .map((model) => (typeof model === "string" ? { name: model } : { ...model }))
      .map((info) => ({ ...info, name: this.profile.fullName(info.name) }));
  }

  face(): FakeEngine {
    const { server, profile, requests, residency } = this;
    const port = server.port;
    return {
      url: `http://127.0.0.1:${port}`,
      port,
      kind: profile.kind,
      requests,
      inference: () =>
        requests.filter(({ method, path, json }) => {
          const isLoad = path.startsWith("/api/") && !json.prompt && !isFilled(json.messages);
          return method === "POST" && !profile.control.includes(path) && !isLoad;
        }),
      loads: residency.loads,
      resident: () => residency.names(),
      behave: (changes) => void Object.assign(this.behaviour, changes),
      behaveFor: (model, changes) =>
        void this.perModel.set(model, { ...this.perModel.get(model), ...changes }),
      setModels: (models) => this.setModels(models),
      reset: () => {
        server.thaw();
        this.behaviour = { ...this.initial };
        this.perModel.clear();
        requests.length = 0;
        this.#read = [];
        residency.clear();
      },
      openConnections: () => server.openConnections(),
      activeGenerations: () => this.active,
      waiting: () => this.waiting(),
      stopListening: () => server.stopListening(),
      listenAgain: () => server.listen(port),
      release: () => this.release(),
      freeze: () => server.freeze(),
      thaw: () => server.thaw(),
      close: () => {
        server.stopListening();
        server.destroyConnections();
        return Promise.resolve();
      },
    };
  }

  find(name: string): ModelInfo | undefined {
    const wanted = this.profile.fullName(name);
    return this.models.find((info) => info.name === wanted);
  }

  release(): void {
    const all = [this.behaviour, ...this.perModel.values(), ...this.#underWay];
    for (const behaviour of all) behaviour.headersDelayMs = 0;
    for (const goOn of this.#delayed) goOn();
  }

  delay(ms: number, left: AbortSignal): Promise<void> {
    if (ms === 0) return Promise.resolve();
    return new Promise((resolve) => {
      const goOn = (): void => {
        this.#delayed.delete(goOn);
        resolve();
      };
      this.#delayed.add(goOn);
      void pause(ms, left).then(goOn);
    });
  }

  running(): number {
    return this.active;
  }

  waiting(): number {
    return this.#slots.waiting();
  }

  read(words: readonly string[]): number {
    let most = 0;
    for (const before of this.#read) {
      const end = words.findIndex((word, at) => before[at] !== word);
      most = Math.max(most, end === -1 ? words.length : end);
    }
    this.#read.push(words);
    return most;
  }

  nextAnswer(): number {
    this.answers += 1;
    return this.answers;
  }

  async hold(call: Call, info: ModelInfo, work: () => Promise<void>): Promise<void> {
    const { behaviour, reply } = call;
    const { queueCountsRunning } = this.profile;
    const queued = this.waiting() + (queueCountsRunning ? this.active : 0);
    const mustQueue = queueCountsRunning || this.active >= behaviour.slots;
    const isFull = mustQueue && queued >= behaviour.maxQueued;
    if (isFull && (await refuse(call, "busy"))) return;
    if (!(await this.#enter(call, info, false))) return;
    const name = this.profile.slotsPer === "model" ? info.name : "";
    try {
      await this.#slots.use(name, behaviour.slots, reply.left, () => this.count(work));
    } finally {
      this.residency.leave(info.name);
    }
  }

  async count(work: () => Promise<void>): Promise<void> {
    this.active += 1;
    try {
      await work();
    } finally {
      this.active -= 1;
    }
  }

  async ensure(call: Call, info: ModelInfo, isPinned = false): Promise<boolean> {
    if (!(await this.#enter(call, info, isPinned))) return false;
    this.residency.leave(info.name);
    return true;
  }

  preload(call: Call, info: ModelInfo): void {
    const request = this.#loadRequest(call, false);
    void this.residency
      .enter(info.name, { ...request, left: new AbortController().signal })
      .then((result) => {
        if (result === "loaded") this.residency.leave(info.name);
      });
  }

  /** The model is in memory and stays there until `leave`; `false`: refused, or the client has left. */
  async #enter(call: Call, info: ModelInfo, isPinned: boolean): Promise<boolean> {
    const request = this.#loadRequest(call, isPinned);
    if (request.isAsleep) {
      const home = this.perModel.get(call.model);
      if (home?.sleeping !== undefined) home.sleeping = false;
      this.behaviour.sleeping = false;
    }
    const entered = await this.residency.enter(info.name, request);
    if (entered === "full") await refuse(call, "loadsFull");
    if (entered === "failed") await refuse(call, "loadFailed");
    if (entered !== "loaded") return false;
    return true;
  }

  #loadRequest({ request, behaviour, reply }: Call, isPinned: boolean): LoadRequest {
    const { abortsLoads, refusals } = this.profile;
    return {
      by: `${request.method} ${request.path}`,
      behaviour,
      left: reply.left,
      isTied: abortsLoads,
      isPinned,
      isAsleep: behaviour.sleeping,
      maxWaiting: refusals.loadsFull === undefined ? Number.POSITIVE_INFINITY : behaviour.maxQueue,
    };
  }

  /** The behaviour for one request, with a fault that strikes only so many times. */
  #behaviourFor(request: EngineRequest): Behaviour {
    const [path = ""] = request.path.split("?");
    const isInference = request.method === "POST" && !this.profile.control.includes(path);
    const own = this.perModel.get(modelIn(request));
    const merged: Behaviour = { ...this.behaviour, ...own };
    if (merged.fault === null || !isInference) return { ...merged, fault: null };
    if (merged.faultTimes <= 0) return { ...merged, fault: null };
    const home = own?.faultTimes === undefined ? this.behaviour : own;
    home.faultTimes = merged.faultTimes - 1;
    return merged;
  }

  async #serve(request: WireRequest, reply: Reply): Promise<void> {
    const record = recordOf(request, reply);
    this.requests.push(record.request);
    reply.left.addEventListener("abort", () => {
      record.request.closedByClient = true;
      record.request.closedAt = Date.now();
    });
    const behaviour = this.#behaviourFor(record.request);
    this.#underWay.add(behaviour);
    try {
      await this.#route(record.request, behaviour, reply, record.keep);
      record.request.completed = !reply.left.aborted;
    } catch (error) {
      if (!(error instanceof ClientLeft)) throw error;
    } finally {
      this.#underWay.delete(behaviour);
    }
  }

  async #route(
    request: EngineRequest,
    behaviour: Behaviour,
    reply: Reply,
    keep: (bytes: Uint8Array) => void,
  ): Promise<void> {
    const { profile } = this;
    const [path = "/", search = ""] = request.path.split("?");
    const isRead = request.method === "GET" || request.method === "HEAD";
    const call: Call = {
      host: this,
      request,
      reply,
      keep,
      path,
      query: new URLSearchParams(search),
      model: modelIn(request),
      behaviour,
    };
    const problem = profile.gate(call);
    if (problem !== null && (await refuse(call, problem))) return;
    const fault = isRead ? behaviour.probeFault : behaviour.fault;
    const comesEarly = fault?.kind === "hang" || fault?.kind === "drop" || fault?.kind === "answer";
    if (comesEarly) {
      if (!isRead) await this.delay(behaviour.headersDelayMs, reply.left);
      if (!reply.left.aborted) await answerFault(reply, fault, keep);
      return;
    }
    const own = isRead ? profile.reads : profile.posts;
    const other = isRead ? profile.posts : profile.reads;
    const handler = request.method === "POST" || isRead ? find(own, path) : undefined;
    if (handler !== undefined && !behaviour.without.includes(path)) return handler(call);
    const isElsewhere = find(other, path) !== undefined || find(own, path) !== undefined;
    const isWrong = handler === undefined && isElsewhere;
    await refuse(call, isWrong ? "wrongMethod" : "noRoute");
  }
}

function modelIn({ json }: EngineRequest): string {
  return typeof json.model === "string" ? json.model : "";
}

/** By the whole path, else by the longest beginning that ends in "/" and is not the root. */
function find(table: Record<string, Handler>, path: string): Handler | undefined {
  const folder = Object.keys(table).find(
    (key) => key.length > 1 && key.endsWith("/") && path.startsWith(key),
  );
  return table[path] ?? (folder === undefined ? undefined : table[folder]);
}

function recordOf(
  { method, target, headers, rawHeaders, body }: WireRequest,
  reply: Reply,
): { request: EngineRequest; keep: (bytes: Uint8Array) => void } {
  const parts: Uint8Array[] = [];
  let kept = 0;
  const text = body.toString();
  const request: EngineRequest = {
    method,
    path: target,
    headers,
    rawHeaders,
    body: text,
    bodyBytes: body,
    json: isJsonObject(text) ? (JSON.parse(text) as Record<string, unknown>) : {},
    arrivedAt: Date.now(),
    get status() {
      return reply.status;
    },
    get bytesSent() {
      return reply.bytesSent;
    },
    sent: () => Buffer.concat(parts),
    closedByClient: false,
    closedAt: null,
    completed: false,
  };
  const keep = (bytes: Uint8Array): void => {
    if (kept >= KEPT_BYTES) return;
    parts.push(bytes);
    kept += bytes.length;
  };
  return { request, keep };
}
