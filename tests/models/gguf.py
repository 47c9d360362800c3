"""GGUF files of Llama models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

GGUF = {  # names of tensors in GGUF files by names of parameters
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_of(parameter: str) -> str:
    """Return the name of a tensor in a GGUF file."""
    block, inner = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.weight", parameter).groups()
    return f"{GGUF[inner]}.weight" if block is None else f"blk.{block}.{GGUF[inner]}.weight"


def start(path: Path, config: PreTrainedConfig, layers: int) -> Any:
    """Return a writer that knows the sizes of a Llama model. Add its tensors, then call :func:`finish`."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    return writer


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
