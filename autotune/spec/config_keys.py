"""Keys that published configs hold and that say nothing about what is computed, or repeat what others say.

In a config.json any key may stand; a table that a person wrote into a recipe may hold these and those that are read,
and nothing else. Names are those of transformers 4 and 5 (`PretrainedConfig` and the configs of each architecture) and
of the published files.
"""

from __future__ import annotations

# Any architecture: names and versions, tokens, heads of other tasks, how a library runs and initialises the model.
# fmt: off
COMMON = frozenset((
    "_name_or_path", "_attn_implementation_autoset", "add_cross_attention", "attn_implementation", "auto_map",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "model_type", "name", "output_attentions", "output_hidden_states", "pad_token_id", "prefix",
    "problem_type", "quantization_config", "return_dict", "sep_token_id", "task_specific_params",
    "tie_encoder_decoder", "tokenizer_class", "torchscript", "transformers_version", "unsloth_version",
    "use_bfloat16", "use_cache",
))
# fmt: on
TENSOR_PARALLEL = frozenset({"pretraining_tp"})  # of the run that made the weights
# Of losses that are not ours.
ROUTER = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
WINDOW = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "use_mrope"})
DEEPSEEK = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "qk_head_dim", "output_router_logits"})

# What else a rotary scaling may say, beyond the keys that it needs (the keys of transformers' rotary functions).
ROTARY_EXTRA: dict[str, frozenset[str]] = {
    "default": frozenset({"factor", "original_max_position_embeddings"}),
    "linear": frozenset({"original_max_position_embeddings"}),
    "llama3": frozenset(),
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
    | {"original_max_position_embeddings"},
}
