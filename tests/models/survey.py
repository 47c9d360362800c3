"""Every causal language model class of the installed transformers, built small from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rose_exp.models.loading import build_empty
from rose_exp.settings.schema import ModelSettings

VOCABULARY = 96
LARGEST = 20_000_000  # parameters; a model above it has parts that the sizes do not reach
SIZES: dict[str, Any] = {  # by field, for all configurations that know it
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "max_position_embeddings": 64, "n_positions": 64},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads", "indexer_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "indexer_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "mlp_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dff", "dim_ff", "d_inner", "dense_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("dim_head", "swa_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("swa_num_attention_heads", "index_n_heads", "linear_num_heads"), 4),
    **{"swa_num_key_value_heads": 2, "index_head_dim": 16, "o_lora_rank": 16, "moe_shared_expert_intermediate_size": 24},
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "conv_kernel", "mamba_d_conv", "time_step_rank"), 4
    ),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "sliding_window", "attention_window_size", "indexer_head_dim"), 8),
    **{"hidden_size_per_layer_input": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "expand": 2, "mamba_expand": 2},
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True},
}
TOWER: dict[str, Any] = {  # in addition, for the encoders of images and sound, which are not pruned
    **dict.fromkeys(("depth", "num_hidden_layers", "num_blocks", "encoder_layers", "num_global_layers"), 1),
    **{"image_size": 28, "patch_size": 14, "num_position_embeddings": 16, "max_source_positions": 16},
    **dict.fromkeys(("position_embedding_size", "mm_posemb_size"), 16),
    **dict.fromkeys(("out_hidden_size", "output_proj_dims", "projection_dim", "adapter_out_dim", "mm_embed_dim"), 32),
    **dict.fromkeys(("base_channels", "output_channels", "num_channels_latents", "vision_output_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 32),
}
ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
OWN_SIZES: dict[str, dict[str, Any]] = {  # of configurations that reject the common sizes, or lack parts with them
    "BltConfig": {"encoder_hash_byte_group_vocab": VOCABULARY, "vocab_size": 260},
    "BltGlobalTransformerConfig": {"num_hidden_layers": 3},
    "BltLocalDecoderConfig": {"hidden_size_global": 32},
    "BltLocalEncoderConfig": {"hidden_size_global": 32},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "DbrxFFNConfig": {"hidden_size": 32, "moe_top_k": 2},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "num_key_value_heads": 4},
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense"], "adapter_in_dim": 32},
    "Emu3Config": {"vocabulary_map": {"<image>": 90}},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "Gemma3nTextConfig": ALTERNATING | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "Gemma4UnifiedTextConfig": ALTERNATING,
    "Gemma4UnifiedVisionConfig": {"pooling_kernel_size": 1},
    "HrmTextConfig": {"num_layers_per_stack": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 8},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    "Qwen3NextConfig": LINEAR,
    "Qwen3_5MoeTextConfig": LINEAR,
    "Qwen3_5TextConfig": LINEAR,
    "Qwen4ExpTextConfig": {
        **{"layer_types": ["linear_attention", "indexed_attention"], "indexer_budget": 8, "indexer_compress_ratio": 4},
        **{"num_experts_per_tok": 2, "indexer_kv_heads": 1},
    },
    "ReformerConfig": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "XLNetConfig": {"d_inner": 512},  # relative positions, which stay dense, are then a small part
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "ZambaConfig": {
        **{"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3, "n_mamba_heads": 2},
        **{"mamba_dt_rank": 1, "mamba_d_state": 1},
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def classes() -> Iterator[str]:
    """The names of all configuration classes with a causal language model."""
    yield from sorted({config.__name__ for config in MODEL_FOR_CAUSAL_LM_MAPPING})  # GPT-2 is listed twice


def config_of(name: str) -> PreTrainedConfig:
    """A small configuration, with the sizes that its class knows."""
    return _small(next(config for config in MODEL_FOR_CAUSAL_LM_MAPPING if config.__name__ == name), {})


def _small(kind: type[PreTrainedConfig], further: dict[str, Any]) -> PreTrainedConfig:
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", {}))
    known |= {field for base in kind.__mro__ for field in getattr(base, "__annotations__", {})}
    sizes = {field: value for field, value in (SIZES | further).items() if field in known}
    if "qk_rope_head_dim" in sizes:  # latent attention has one key for each query head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    own = OWN_SIZES.get(kind.__name__, {})
    parts: dict[str, PreTrainedConfig] = {}
    for part, part_kind in kind.sub_configs.items():
        if part_kind is AutoConfig:
            part_kind = type(getattr(kind(), part))
        if part_kind is not type(None):
            parts[part] = _small(part_kind, TOWER if part in ("vision_config", "audio_config", "vq_config") else {})
    return kind(**(sizes | parts | own))


def build(name: str) -> nn.Module:
    """Build a small model with random weights.

    Raises:
        RoseExpError: the model is not a decoder.
        ValueError: the sizes do not make the model small.
    """
    config, settings = config_of(name), ModelSettings(path=name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build_empty(config, settings).parameters())
    if size > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST} parameters, got {size}")
    torch.manual_seed(0)
    model = build_empty(config, settings).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # zeros would count as pruned
    return model
