"""Entries of a `config.json` that change no logit but by rounding: passed over in silence when it is read."""

# fmt: off
_RECORDS = (
    "_name_or_path", "architectures", "auto_map", "dtype", "finetuning_task", "is_llama_config", "model_type",
    "pad_vocab_size_multiple", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version",
)
_TOKENS = (
    "bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id", "pad_token_id",
    "sep_token_id",
)
_TRAINING = (
    "A_initializer_range", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop",
    "classifier_dropout", "conv_initializer_range", "emb_initializer_range", "embd_pdrop",
    "gradient_checkpointing", "hidden_dropout_prob", "initializer_factor", "initializer_range",
    "rescale_prenorm_residual", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise", "time_step_floor",
    "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale",
)
_EXECUTION = (
    "_attn_implementation_autoset", "attn_implementation", "cache_implementation", "chunk_size",
    "chunk_size_feed_forward", "fused_add_norm", "output_attentions", "output_hidden_states",
    "output_router_logits", "pretraining_tp", "residual_in_fp32", "return_dict", "tf_legacy_loss",
    "use_associative_scan", "use_bfloat16", "use_cache", "use_mambapy", "use_mem_eff_path",
)
_OTHER_HEADS = (
    "id2label", "label2id", "problem_type", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
)
_GENERATION = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p",
    "typical_p",
)
# fmt: on

NEUTRAL = frozenset((*_RECORDS, *_TOKENS, *_TRAINING, *_EXECUTION, *_OTHER_HEADS, *_GENERATION))
