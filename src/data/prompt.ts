import { chainOf, type Chain } from "../core/prefix.ts";
import type { Model } from "../core/snapshot.ts";
import { conversationOf, sessionOf } from "../dialects/conversation.ts";
import type { Exchange } from "./exchange.ts";
import type { Plane } from "./plane.ts";

/** The address at the other end of the connection; null where nobody knows. */
export type PeerAddress = () => string | null;

/** Of a prompt of which nobody asks where it has been. */
export const NO_CHAIN: Chain = { blocks: [], length: 0 };

/** Reads of the prompt what routing and fairness go by, while the parsed body is there. */
export function readPrompt(
  exchange: Exchange,
  model: Model,
  plane: Plane,
  peer: PeerAddress | undefined,
): void {
  const { endpoint, headers, promptSize, config, tenant } = exchange;
  const fields = exchange.fields ?? {};
  const session = sessionOf(headers, fields);
  // To count tokens takes none.
  const tokens =
    endpoint.operation === "count_tokens" ? 0 : plane.estimates.prompt(model.name, promptSize);
  // Where there is one place to go, nobody asks where the prompt has been before.
  const chain =
    model.targets.length > 1
      ? chainOf(model.name, conversationOf(endpoint.path, fields))
      : NO_CHAIN;
  exchange.prompt = { tokens, chain, session, shows: exchange.record.stream };
  if (promptSize.images > 0) exchange.needs.push("vision");
  if (Array.isArray(fields["tools"]) && fields["tools"].length > 0) exchange.needs.push("tools");
  const isShared = Object.keys(config.tenants).length > 0;
  exchange.flow = isShared ? tenant : (session ?? peer?.() ?? tenant);
}
