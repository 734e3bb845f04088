/** Each is served before the next. */
export const CLASSES = ["interactive", "default", "batch"] as const;
export type Priority = (typeof CLASSES)[number];

/** What a request asks of the others who wait for the same. */
export interface Claim {
  /** Whose it is, a tenant: fairness is between flows. */
  readonly flow: string;
  readonly priority: Priority;
  /** The flow's share, above 0: with twice the weight it gets twice the tokens. */
  readonly weight: number;
  /** Prompt and answer, as far as they can be foreseen; corrected when it has ended. */
  readonly tokens: number;
  readonly arrivedAt: number;
}

/** The requests of one flow in one class. */
interface Flow<T> {
  /** Tokens that it has been given, divided by its weight: its virtual time. */
  counter: number;
  /** By arrival. */
  waiting: T[];
  running: number;
}

interface Class<T> {
  /** The highest counter at which somebody has been started. */
  floor: number;
  flows: Map<string, Flow<T>>;
}

/** Who waits for one model, and what has been given to whom. Changed in place by the functions here. */
export interface Line<T> {
  /** As in `CLASSES`. */
  classes: readonly Class<T>[];
  waiting: number;
  running: number;
}

/** Whose turn it is in one class of a line. */
interface Turn<T> {
  rank: number;
  claim: T;
  /** When the oldest who waits in that class arrived; not always the one whose turn it is. */
  since: number;
}

/** A class in which somebody has waited for so long is not passed over for ever. */
export const AGING_MS = 60_000;
/** Flows of one class that have a lead, and neither wait nor run. */
const MOST_IDLE = 256;
/** So many starts in a row may pass over it; then it has one. */
export const MOST_PASSED = 3;

export function createLine<T>(): Line<T> {
  const classes = CLASSES.map(() => ({ floor: 0, flows: new Map<string, Flow<T>>() }));
  return { classes, waiting: 0, running: 0 };
}

/** Its class, 0 is served first. */
export function rankOf({ priority }: Claim): number {
  return CLASSES.indexOf(priority);
}

function classOf<T extends Claim>(line: Line<T>, claim: T): Class<T> {
  return line.classes[rankOf(claim)] as Class<T>;
}

/**
 * The claim's flow as it stands when the claim comes in. Whoever had nobody waiting is lifted to the
 * floor: time in which it asked for nothing earns it nothing.
 */
function enter<T extends Claim>({ flows, floor }: Class<T>, claim: T): Flow<T> {
  let flow = flows.get(claim.flow);
  if (flow === undefined) {
    flow = { counter: 0, waiting: [], running: 0 };
    flows.set(claim.flow, flow);
  }
  if (flow.waiting.length === 0) flow.counter = Math.max(flow.counter, floor);
  return flow;
}

/**
 * Forgets flows that have gone, so that they take no memory: those that have no lead, all where nobody
 * waits, and all beyond a bound.
 */
function tidy<T>(line: Line<T>, { flows, floor }: Class<T>) {
  const isMuch = flows.size > MOST_IDLE + line.waiting + line.running;
  for (const [name, { waiting, running, counter }] of flows) {
    const isIdle = waiting.length === 0 && running === 0;
    if (isIdle && (counter <= floor || line.waiting === 0 || isMuch)) flows.delete(name);
  }
  // Where nobody is left nobody has a lead over anybody.
  if (line.waiting + line.running > 0) return;
  for (const each of line.classes) {
    each.flows.clear();
    each.floor = 0;
  }
}

/** Waits from now on, at the place in its flow that its age gives it. */
export function join<T extends Claim>(line: Line<T>, claim: T): void {
  const { waiting } = enter(classOf(line, claim), claim);
  const behind = waiting.findIndex((other) => other.arrivedAt > claim.arrivedAt);
  waiting.splice(behind === -1 ? waiting.length : behind, 0, claim);
  line.waiting++;
}

/** Waits no more; false when it did not. */
export function leave<T extends Claim>(line: Line<T>, claim: T): boolean {
  const own = classOf(line, claim);
  const flow = own.flows.get(claim.flow);
  const at = flow?.waiting.indexOf(claim) ?? -1;
  if (flow === undefined || at === -1) return false;
  flow.waiting.splice(at, 1);
  line.waiting--;
  tidy(line, own);
  return true;
}

/** Starts one who has just come, or who still waits: its flow is charged what is expected. */
export function start<T extends Claim>(line: Line<T>, claim: T): void {
  const own = classOf(line, claim);
  const flow = enter(own, claim);
  own.floor = Math.max(own.floor, flow.counter);
  flow.counter += claim.tokens / claim.weight;
  flow.running++;
  line.running++;
  tidy(line, own);
}

/** One that was started has ended. @param tokens what it was beyond what it was charged. */
export function end<T extends Claim>(line: Line<T>, claim: T, tokens: number): void {
  const own = classOf(line, claim);
  const flow = own.flows.get(claim.flow);
  if (flow === undefined) return;
  flow.running--;
  line.running--;
  flow.counter += tokens / claim.weight;
  tidy(line, own);
}

/** Whose turn it is in each class in which somebody waits, the best class first. */
function turnsIn<T extends Claim>(line: Line<T>): Turn<T>[] {
  if (line.waiting === 0) return [];
  return line.classes.flatMap(({ flows }, rank) => {
    let claim: T | undefined;
    let least = Infinity;
    let since = Infinity;
    for (const { waiting, counter } of flows.values()) {
      const [first] = waiting;
      if (first === undefined) continue;
      since = Math.min(since, first.arrivedAt);
      const isTied = counter === least && first.arrivedAt < (claim?.arrivedAt ?? Infinity);
      if (counter >= least && !isTied) continue;
      claim = first;
      least = counter;
    }
    return claim === undefined ? [] : [{ rank, claim, since }];
  });
}

function goesBefore<T extends Claim>(one: Turn<T>, other: Turn<T>): boolean {
  if (one.rank !== other.rank) return one.rank < other.rank;
  return one.claim.arrivedAt < other.claim.arrivedAt;
}

/** The best class of which anybody waits or runs; one below the lowest where nobody does. */
export function bestRankIn<T>({ classes }: Line<T>): number {
  const best = classes.findIndex(({ flows }) => {
    return [...flows.values()].some(({ waiting, running }) => waiting.length + running > 0);
  });
  return best === -1 ? classes.length : best;
}

/** Who is the next in a line by class and counter. */
export function headOf<T extends Claim>(line: Line<T>): T | undefined {
  return turnsIn(line)[0]?.claim;
}

/**
 * Who starts next, of several lines in front of one backend: the best class first; in it the line
 * whose turn is the oldest request's; in the line the flow that has been given least for its weight;
 * in the flow the oldest.
 *
 * Between flows this is start-time fair queueing (Goyal et al., SIGCOMM '96) with tokens for length,
 * as VTC has it (Sheng et al., OSDI '24). While two flows of a class have somebody waiting in a line,
 * the tokens they are given, each divided by its weight, differ by at most the largest request of the
 * one divided by its weight plus that of the other, and by what the estimates were wrong.
 *
 * Nobody starves: while somebody of a lower class has waited for `AGING_MS`, every fourth start goes
 * to the class and line where the oldest such request is. However much of the better classes comes,
 * what is left of the order before a request is worked off at a quarter of the pace at least.
 *
 * @param passed starts since the last one that went to a class for its age.
 */
export function choose<T extends Claim>(
  lines: readonly Line<T>[],
  passed: number,
  now: number,
): { claim: T; aged: boolean } | null {
  const turns = lines.flatMap(turnsIn);
  let best: Turn<T> | null = null;
  for (const turn of turns) if (best === null || goesBefore(turn, best)) best = turn;
  if (best === null) return null;
  let oldest: Turn<T> | null = null;
  for (const turn of passed < MOST_PASSED ? [] : turns) {
    const isAged = turn.rank > best.rank && now - turn.since >= AGING_MS;
    if (isAged && turn.since < (oldest?.since ?? Infinity)) oldest = turn;
  }
  return { claim: (oldest ?? best).claim, aged: oldest !== null };
}

/** Everybody who waits, in no order. */
export function* claimsIn<T>({ classes }: Line<T>): Generator<T> {
  for (const { flows } of classes) for (const { waiting } of flows.values()) yield* waiting;
}

/**
 * How many of those who wait start before it if nobody comes, leaves or ages; of one that does not wait
 * itself, how many would if it came now.
 */
export function aheadOf<T extends Claim>(line: Line<T>, claim: T): number {
  const own = classOf(line, claim);
  const queue = own.flows.get(claim.flow)?.waiting ?? [];
  let mine = own.flows.get(claim.flow)?.counter ?? 0;
  if (queue.length === 0) mine = Math.max(mine, own.floor);
  let ahead = 0;
  for (const before of queue) {
    if (before === claim || before.arrivedAt > claim.arrivedAt) break;
    mine += before.tokens / before.weight;
    ahead++;
  }
  for (const better of line.classes.slice(0, rankOf(claim))) {
    for (const { waiting } of better.flows.values()) ahead += waiting.length;
  }
  let isBehind = false;
  for (const [name, flow] of own.flows) {
    if (name === claim.flow) {
      isBehind = true;
      continue;
    }
    let theirs = flow.counter;
    for (const other of flow.waiting) {
      const age = other.arrivedAt - claim.arrivedAt;
      if (theirs > mine || (theirs === mine && (age > 0 || (age === 0 && isBehind)))) break;
      ahead++;
      theirs += other.tokens / other.weight;
    }
  }
  return ahead;
}

export function waitsIn<T extends Claim>(line: Line<T>, claim: T): boolean {
  return classOf(line, claim).flows.get(claim.flow)?.waiting.includes(claim) === true;
}

/** The same of one that waits; -1 when it does not. */
export function positionIn<T extends Claim>(line: Line<T>, claim: T): number {
  return waitsIn(line, claim) ? aheadOf(line, claim) : -1;
}

/** Tokens have flowed beyond what was expected: its flow is charged them at once. */
export function charge<T extends Claim>(line: Line<T>, claim: T, tokens: number): void {
  const flow = classOf(line, claim).flows.get(claim.flow);
  if (flow !== undefined) flow.counter += tokens / claim.weight;
}

/**
 * Who gives up its place to a newcomer where no place is left, so that nobody can fill a queue against
 * the others: the youngest of a lower class, else of a flow with more than it would have itself. Null:
 * nobody, the newcomer is one too many.
 *
 * @param lines that share the places.
 */
export function loserTo<T extends Claim>(lines: readonly Line<T>[], newcomer: T): T | null {
  const rank = rankOf(newcomer);
  for (let lower = CLASSES.length - 1; lower >= rank; lower--) {
    const byFlow = Map.groupBy(
      lines.flatMap(({ classes }) => {
        return [...(classes[lower] as Class<T>).flows.values()].flatMap(({ waiting }) => waiting);
      }),
      ({ flow }) => flow,
    );
    let longest: T[] = [];
    for (const waiting of byFlow.values()) if (waiting.length > longest.length) longest = waiting;
    const own = lower === rank ? (byFlow.get(newcomer.flow)?.length ?? 0) + 1 : 0;
    if (longest.length > own) {
      return longest.reduce((one, other) => (other.arrivedAt >= one.arrivedAt ? other : one));
    }
  }
  return null;
}
