"""Tiny models of every family with random weights, built from their configuration classes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

VOCABULARY = 96
POSITIONS = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_LIKE = SIZES | {"intermediate_size": 52, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
WIDE_HEADS = LLAMA_LIKE | {"head_dim": 8}
LOCAL = WIDE_HEADS | {"sliding_window": 8}

CONFIGS = {
    "llama": ("LlamaConfig", WIDE_HEADS),
    "mistral": ("MistralConfig", LOCAL),
    "qwen2": ("Qwen2Config", LLAMA_LIKE | {"hidden_size": 40}),
    "qwen3": ("Qwen3Config", WIDE_HEADS),
    "gemma2": ("Gemma2Config", LOCAL),
    "gemma3": ("Gemma3TextConfig", LOCAL | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma4": (  # per-layer token embeddings; the last blocks reuse the keys and values of earlier ones
        "Gemma4TextConfig",
        LOCAL
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 8,
            "num_global_key_value_heads": 2,
        },
    ),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 52, "word_embed_proj_dim": 36, "max_position_embeddings": POSITIONS}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 36, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}),
    "gpt_neox": ("GPTNeoXConfig", LLAMA_LIKE | {"num_attention_heads": 3}),
    "phi": ("PhiConfig", LLAMA_LIKE | {"hidden_size": 32}),
}

EXPERTS = LLAMA_LIKE | {"hidden_size": 32, "intermediate_size": 24, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": ("MixtralConfig", EXPERTS | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
    "olmoe": ("OlmoeConfig", EXPERTS | {"num_experts": 4}),
}
CONFIGS |= MIXTURES
CONFIGS = {family: config for family, config in CONFIGS.items() if hasattr(transformers, config[0])}  # older versions lack some

SHARED_INPUTS = {  # layers of the first block in call order, grouped by shared input
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],  # attention and MLP run in parallel
}


def with_biases(model: nn.Module) -> nn.Module:
    """Randomize all biases: freshly initialized ones are zero and would hide code that ignores them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    return model


def build(family: str, seed: int = 0) -> nn.Module:
    if family == "phi" and transformers.__version__ == "5.0.0":
        pytest.skip("transformers 5.0.0 cannot build Phi from its configuration")
    torch.manual_seed(seed)
    name, arguments = CONFIGS[family]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not any(part in parameter_name for part in ("embed", "wte", ".gate.")):
            nn.init.normal_(parameter, std=0.25)  # large enough for every layer to affect the output
    return model


def tokens(windows: int = 5, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))
