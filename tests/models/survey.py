"""Every causal language model class of the installed transformers, built small from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 96
LARGEST = 20_000_000  # parameters; a model above it has parts that the sizes do not reach
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "max_position_embeddings": 64, "n_positions": 64},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "conv_kernel", "mamba_d_conv", "time_step_rank"), 4
    ),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "sliding_window", "attention_window_size"), 8),
    **{"hidden_size_per_layer_input": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "expand": 2, "mamba_expand": 2},
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


OWN_SIZES: dict[str, dict[str, Any]] = {  # of configurations that reject the common sizes
    "FalconH1Config": {"mamba_d_ssm": 64},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "Mamba2Config": {"num_heads": 8},
    "XmodConfig": {"default_language": "en_XX"},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def classes() -> Iterator[str]:
    """The names of all configuration classes with a causal language model."""
    yield from sorted(config.__name__ for config in MODEL_FOR_CAUSAL_LM_MAPPING)


def config_of(name: str) -> Any:
    """A small configuration, with the sizes that its class knows."""
    config = next(config for config in MODEL_FOR_CAUSAL_LM_MAPPING if config.__name__ == name)
    known = set(inspect.signature(config.__init__).parameters) | set(getattr(config, "attribute_map", {}))
    known |= {field for base in config.__mro__ for field in getattr(base, "__annotations__", {})}
    sizes = {field: value for field, value in SIZES.items() if field in known}
    if "qk_rope_head_dim" in sizes:  # latent attention has one key for each query head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return config(**(sizes | OWN_SIZES.get(name, {})))


def build(name: str) -> nn.Module:
    """Build a small model with random weights.

    Raises:
        ValueError: the sizes do not make the model small.
    """
    config = config_of(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST} parameters, got {size}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # zeros would count as pruned
    return model
