import type { CacheRule } from "../core/cachekey.ts";

/*
 * Which fields of a request decide its answer, as the engines' own sources list them: vLLM
 * `vllm/entrypoints/openai` and `pooling`, SGLang `srt/entrypoints/openai/protocol.py`, llama.cpp
 * `tools/server/README.md`, Ollama `openai/openai.go`. A field that is in no list forbids caching.
 *
 * Left out on purpose:
 * - what makes answers differ at temperature 0, or can: xtc_probability, dynatemp_range,
 *   t_max_predict_ms, logits_processors, custom_logit_processor, vllm_xargs, web_search_options
 * - what continues something that an engine has kept: previous_response_id, conversation,
 *   background, container, session_id, session_params, kv_transfer_params
 * - what comes back in the answer: request_id, rid
 * - another word for n: n_cmpl
 */

const words = (...lines: string[]) => lines.join(" ").split(" ");

const OPENAI = words(
  "temperature top_p seed stop frequency_penalty presence_penalty logit_bias logprobs",
  "top_logprobs max_tokens max_completion_tokens n best_of response_format",
);

const VLLM = words(
  "top_k min_p repetition_penalty length_penalty use_beam_search watermarking stop_token_ids",
  "include_stop_str_in_output ignore_eos min_tokens skip_special_tokens",
  "spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs",
  "logprob_token_ids allowed_token_ids bad_words add_special_tokens echo",
  "structured_outputs guided_json guided_regex guided_choice guided_grammar",
  "guided_decoding_backend guided_whitespace_pattern structural_tag thinking_token_budget",
  "repetition_detection max_repetition_pattern_size min_repetition_pattern_size",
  "repetition_min_count return_tokens_as_token_ids return_token_ids return_prompt_text",
  // A wish not to share with who has another salt.
  "cache_salt",
);

const SGLANG = words(
  "regex ebnf stop_regex no_stop_trim lora_path return_hidden_states return_prompt_token_ids",
  "extra_key",
);

const LLAMACPP = words(
  "typical_p repeat_penalty repeat_last_n dry_multiplier dry_base dry_allowed_length",
  "dry_penalty_last_n dry_sequence_breakers top_n_sigma mirostat mirostat_tau mirostat_eta",
  "samplers min_keep grammar json_schema n_predict n_keep n_indent n_probs post_sampling_probs",
  "return_tokens timings_per_token n_cache_reuse lora",
);

/** A conversation, how it becomes a prompt, and how the answer is taken apart. */
const CHAT = words(
  "messages tools tool_choice parallel_tool_calls functions function_call modalities audio",
  "prediction verbosity reasoning reasoning_effort think include_reasoning reasoning_format",
  "separate_reasoning stream_reasoning thinking_forced_open thinking_budget_tokens",
  "enable_thinking parse_tool_calls task add_generation_prompt continue_final_message documents",
  "chat_template chat_template_kwargs mm_processor_kwargs media_io_kwargs max_dynamic_patch",
  "min_dynamic_patch use_audio_in_video images_config input_ids",
);

/** `model` is in the key as what it resolves to; the others are about speed, bills and statistics. */
const IGNORED = words(
  "model user metadata store service_tier safety_identifier prompt_cache_key",
  "prompt_cache_options prompt_cache_retention priority cache_prompt id_slot keep_alive ttl",
);

const rule = (answer: string[], ignored: string[], samples = true): CacheRule => ({
  answer: new Set(answer),
  ignored: new Set(ignored),
  samples,
});

/** By the endpoint's path. */
export const ANSWER_FIELDS: ReadonlyMap<string, CacheRule> = new Map([
  ["/v1/chat/completions", rule([...OPENAI, ...VLLM, ...SGLANG, ...LLAMACPP, ...CHAT], IGNORED)],
  [
    "/v1/completions",
    rule(
      [...OPENAI, ...VLLM, ...SGLANG, ...LLAMACPP, "prompt", "suffix", "prompt_embeds"],
      IGNORED,
    ),
  ],
  [
    "/v1/messages",
    rule(
      words(
        "messages system max_tokens stop_sequences temperature top_p top_k tools tool_choice",
        "thinking output_config output_format context_management chat_template_kwargs",
      ),
      words("model metadata service_tier cache_control priority"),
    ),
  ],
  [
    "/v1/responses",
    rule(
      words(
        "input instructions max_output_tokens max_tool_calls include parallel_tool_calls",
        "reasoning temperature text tool_choice tools top_logprobs top_p truncation logit_bias",
        "top_k min_p seed stop frequency_penalty presence_penalty repetition_penalty ignore_eos",
        "skip_special_tokens include_stop_str_in_output structured_outputs chat_template_kwargs",
        "mm_processor_kwargs cache_salt extra_key",
        // The answer repeats these, and whether its id can be continued depends on `store`.
        "metadata user store service_tier safety_identifier prompt_cache_key",
        "prompt_cache_retention",
      ),
      words("model priority"),
    ),
  ],
]);

/**
 * For `/v1/embeddings`, where each input has a key of its own and vectors are kept decoded.
 * `embed_dtype` and `endianness` are left out: they change what base64 means.
 */
export const EMBEDDING_FIELDS = rule(
  words(
    "dimensions truncate_prompt_tokens truncation_side padding add_special_tokens use_activation",
    "mm_processor_kwargs cache_salt lora_path embd_normalize normalize truncate",
    "truncation_direction prompt_name input_type task",
  ),
  words("model input encoding_format user priority keep_alive ttl"),
  false,
);
