"""A tiny random model of any causal-LM architecture that transformers knows, from its default configuration alone."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# A model with more was not shrunk properly.
_MAX_PARAMETERS = 6_000_000

# The names that families give their sizes; a name that a configuration does not have is left out.
_SIZES: dict[int, tuple[str, ...]] = {
    1: ("n_group", "topk_group", "num_expert_group", "num_nextn_predict_layers", "first_k_dense_replace"),
    2: (
        *(
            "num_key_value_heads",
            "num_kv_heads",
            "kv_n_heads",
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
        ),
        *("decoder_layers", "encoder_layers", "depth", "num_experts_per_tok", "moe_topk"),
        *("num_experts_per_token", "top_k_experts", "swa_num_key_value_heads", "index_topk_blocks"),
        *("conf_num_hidden_layers", "moe_top_k", "num_query_groups", "num_global_layers", "num_blocks"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "mamba_n_heads"),
        *("mamba_num_heads", "swa_num_attention_heads", "zero_expert_num", "o_groups", "d_rel", "laurel_rank"),
        *("patch_size", "block_size", "index_block_size", "split_ngram_parts"),
        # windows, shorter than the rows that are tried
        *("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size"),
        *("local_attention",),
    ),
    8: (
        *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "kv_channels", "d_head"),
        *("dim_head", "attention_head_size", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"),
        *("index_head_dim", "swa_head_dim", "hidden_size_per_layer_input", "mamba_d_state", "ssm_state_size"),
        *("state_size", "adapter_rank", "gated_norm_rank", "hc_lowrank", "prompt_types", "segment_types"),
        *("query_pre_attn_scalar", "mamba_dt_rank", "time_step_rank", "global_head_dim", "swa_v_head_dim"),
        *("index_topk", "mamba_chunk_size", "chunk_size", "num_centroids", "router_hidden_size", "num_mel_bins"),
    ),
    16: (
        *("index_n_heads",),  # few heads tie: their scores are often all cut to zero
        *("kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_head_dim", "rel_extent", "attention_head_dim"),
        *("mamba_d_head", "mamba_head_dim", "mamba_headdim", "image_size", "ple_embed_dim"),
        *("codebook_size", "base_channels", "position_bias_num_buckets", "prompt_length", "mm_tokens_per_image"),
        *("num_position_embeddings", "max_source_positions", "output_channels", "nemo_conv_channels"),
    ),
    32: (
        *("hidden_size", "n_embd", "d_model", "emb_dim", "word_embed_proj_dim", "embedding_dim", "embedding_size"),
        *("lru_width", "attention_hidden_size", "out_hidden_size", "input_embedding_size", "output_embedding_size"),
        *("vision_output_dim", "projector_input_dim", "projector_output_dim", "backbone_hidden_size"),
        *("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "hidden_size_global", "dim_model_base"),
    ),
    64: (
        *("intermediate_size", "moe_intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "dff"),
        *("encoder_ffn_dim", "dim_ff", "d_inner", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("shared_experts_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "mamba_d_ssm"),
        *("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "feed_forward_size", "mlp_dim"),
    ),
    128: (
        *("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size", "n_positions"),
        *("n_ctx", "max_position_embeddings", "max_seq_len", "model_max_length", "context_length"),
        *("encoder_hash_byte_group_vocab", "ngram_vocab_size_base", "max_target_positions", "audio_vocab_size"),
    ),
}

_VALUES: dict[str, Any] = {
    **{name: size for size, names in _SIZES.items() for name in names},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    # random weights so large that every effect is far above rounding; nothing drawn at random in a forward
    **{"initializer_range": 0.15, "init_std": 0.15, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    **{
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "embed_dropout": 0.0,
    },
    **{"resid_dropout": 0.0, "residual_dropout": 0.0, "num_kv_shared_layers": 0},
}

# Lists with an entry for each layer.
_LAYER_LISTS = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types"),
    *("activation_sparsity_pattern", "layer_rope_theta", "num_attention_heads_per_layer"),
)


def overrides(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that must change to make a tiny model of it."""
    found = {name: _VALUES[name] for name, old in fields.items() if name in _VALUES and old is not None}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            found[name] = {**_kept(value), **overrides(value)}
    if found.get("kv_lora_rank") and "num_key_value_heads" in found:  # latent attention has no fewer heads for keys
        found["num_key_value_heads"] = found["num_attention_heads"]
    kinds = fields.get("layer_types") or fields.get("layers_block_type") or []
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    chosen += [len(kinds) - 1] * (2 - len(chosen)) if kinds else [0, 1]
    if kinds:
        found["num_hidden_layers"] = len(chosen)
        for name in _LAYER_LISTS:
            old = fields.get(name)
            if isinstance(old, list) and len(old) == len(kinds):
                found[name] = [old[n] for n in chosen]
    if differing := fields.get("per_layer_config"):
        by_layer = {int(n): {k: _VALUES.get(k, v) for k, v in own.items()} for n, own in differing.items()}
        found["per_layer_config"] = {new: by_layer[old] for new, old in enumerate(chosen) if old in by_layer}
    return found


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k not in ("id2label", "label2id")}


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(fields[k], v) for k, v in changes.items() if isinstance(fields.get(k), dict)}
    return {**fields, **changes, **nested}


def make_tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random causal LM in float32 and evaluation mode, the same at every call.

    Args:
        family: transformers' model_type.
        **changes: fields of the configuration to set.

    Raises:
        ValueError: the family's configuration cannot be shrunk.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    default = AutoConfig.for_model(family).to_dict()
    config = AutoConfig.for_model(family, **_merged(_merged(overrides(default), _SPECIAL.get(family, {})), changes))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"{family}: {size} parameters after shrinking")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def make_character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each printable character, small enough for the vocabulary of a tiny model."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: n for n, token in enumerate([*special, *string.printable[:95]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


# Fields that the general rules get wrong.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3 = {"num_key_value_heads": 4, "head_dim": 16, "per_layer_config": {1: {"num_key_value_heads": 4}}}
_SHARING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_INDEXER = {
    "indexer_kv_heads": 1,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "indexer_head_dim": 8,
    "indexer_n_heads": 4,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "attn_pdrop": 0.0, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "bamba": {"attn_layer_indices": [1]},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma4": {"text_config": {**_SHARING, "num_kv_shared_layers": 2, "per_layer_config": {}}},
    "gemma4_text": {**_SHARING, "num_kv_shared_layers": 2},
    "gemma3n_text": {**_SHARING, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {"n_groups": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
    },
    "zamba2": {"n_mamba_heads": 4, "mamba_headdim": 16, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
