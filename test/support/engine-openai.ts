/** A plain OpenAI-compatible server of no kind that anybody knows. */
import type { ModelInfo } from "./engine-call.ts";
import type { About, Profile, Refused } from "./engine-profile.ts";
import { refuse } from "./engine-profile.ts";
import {
  chat,
  completions,
  countTokens,
  embedAs,
  messages,
  reads,
  rerank,
  responses,
} from "./engine-routes.ts";
import { sendBody } from "./engine-stream.ts";
import { engineDied, plainStyle } from "./engine-style.ts";

const CREATED = 1_754_049_600;

function card(info: ModelInfo): unknown {
  return { id: info.name, object: "model", created: CREATED, owned_by: "organization-owner" };
}

function error(status: number, message: string, type: string, param: string | null): Refused {
  return { status, body: { error: { message, type, param, code: status } } };
}

function invalid(message: string): () => Refused {
  return () => error(400, message, "invalid_request_error", null);
}

function unknownModel({ model }: About): Refused {
  return error(404, `The model \`${model}\` does not exist.`, "NotFoundError", "model");
}

export const openai: Profile = {
  kind: "openai",
  models: ["test-model"],
  behaviour: {},
  manner: {
    headers: {},
    json: "application/json",
    stream: "text/event-stream",
    closes: "never",
    chunksAll: false,
  },
  fullName: (name) => name,
  slotsPer: "server",
  queueCountsRunning: false,
  abortsLoads: true,
  style: plainStyle,
  reads: {
    "/v1/models": reads(({ host }) => ({ object: "list", data: host.models.map(card) })),
    "/v1/models/": async (call) => {
      const name = decodeURIComponent(call.path.slice("/v1/models/".length));
      const info = call.host.find(name);
      if (info !== undefined) return sendBody(call.reply, 200, card(info));
      await refuse(call, "unknownModel", { model: name });
    },
  },
  posts: {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": embedAs(),
    "/v1/messages": messages,
    "/v1/messages/count_tokens": countTokens,
    "/v1/responses": responses,
    "/v1/rerank": rerank,
  },
  control: [],
  gate: () => null,
  refusals: {
    noRoute: () => ({ status: 404, body: "404 page not found" }),
    wrongMethod: () => ({ status: 405, body: "405 method not allowed" }),
    encoded: invalid("unexpected EOF"),
    badJson: invalid("unexpected EOF"),
    noMessages: invalid("[] is too short - 'messages'"),
    noModel: unknownModel,
    unknownModel,
    loadFailed: () => error(500, "out of memory", "api_error", null),
    crashed: () => ({ status: 500, body: { error: engineDied } }),
  },
};
