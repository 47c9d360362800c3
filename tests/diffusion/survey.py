"""Every denoiser class of the installed diffusers, built small from its configuration, and a call of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models import transformers, unets
from torch import nn

HEADS, HEAD, TEXT, TOKENS = 4, 16, 32, 5  # numbers of heads and of their channels, and width of text states
WIDTH = HEADS * HEAD
LARGEST = 6_000_000  # parameters; a model above it has parts that the sizes do not reach
SIZES: dict[str, Any] = {  # by field, for all classes that know it
    **dict.fromkeys(("num_layers", "num_hidden_layers", "n_layers", "dit_depth", "depth", "nlayers", "mmdit_layers"), 2),
    **dict.fromkeys(("num_single_layers", "num_single_dit_layers", "num_mmdit_layers", "num_visual_blocks"), 2),
    **dict.fromkeys(("num_refiner_layers", "n_refiner_layers", "num_text_blocks", "approximator_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "dit_heads", "nheads", "block_num_heads"), HEADS),
    **dict.fromkeys(("num_cross_attention_heads", "audio_num_attention_heads", "text_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_kv_heads", "num_key_value_heads", "num_key_value_attention_heads"), 2),
    **dict.fromkeys(("text_num_key_value_heads", "n_kv_heads"), HEADS),
    **dict.fromkeys(("attention_head_dim", "head_dim", "cross_attention_head_dim", "audio_attention_head_dim", "d_kv"), HEAD),
    **dict.fromkeys(("linear_head_dim",), HEAD),
    **dict.fromkeys(("hidden_size", "dim", "dit_dim", "model_dim", "d_model", "embed_dim", "caption_projection_dim"), WIDTH),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size", "ffn_hidden_size", "ff_inner_dim", "d_ff"), 96),
    **dict.fromkeys(("text_intermediate_size", "moe_intermediate_dim"), 48),
    **dict.fromkeys(
        ("cross_attention_dim", "cross_attention_dim_t5", "joint_attention_dim", "text_dim", "text_embed_dim"), TEXT
    ),
    **dict.fromkeys(("cap_feat_dim", "context_in_dim", "caption_channels", "text_in_dim", "in_text_dim", "in_text_dim2"), TEXT),
    **dict.fromkeys(("text_emb_dim", "text_hidden_dim", "dit_text_dim", "llm_features_dim", "encoder_hidden_size"), TEXT),
    **dict.fromkeys(("text_encoder_dim", "cross_attention_input_dim", "cond_token_dim", "condition_dim"), TEXT),
    **dict.fromkeys(("pooled_projection_dim", "global_cond_dim", "global_states_input_dim", "cond_embed_dim"), TEXT),
    **dict.fromkeys(("time_embed_dim", "time_dim", "freq_dim", "timestep_embed_dim", "timestep_guidance_channels"), 32),
    **dict.fromkeys(("timestep_channels", "timestep_features_dim", "time_step_dim", "time_proj_dim", "adaln_dim"), 32),
    **dict.fromkeys(("adaln_lora_dim", "time_embed_hidden_dim", "fourier_embedding_dim", "time_embedding_dim"), 32),
    **dict.fromkeys(("in_channels", "latent_channel", "io_channels", "latent_dim", "latent_channels", "in_visual_dim"), 8),
    **dict.fromkeys(("out_channels", "out_visual_dim", "audio_in_channels", "audio_out_channels", "cond_in_channels"), 8),
    **dict.fromkeys(("axes_dims_rope", "rope_axes_dim", "axes_dims", "rope_dim", "rope_dim_list", "mrope_section"), (4, 4, 8)),
    **{"sample_size": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "norm_num_groups": 4, "mlp_ratio": 2.0},
    **{"layers_per_block": 1, "video_length": 2, "num_experts": 4, "rotary_dim": 8, "ff_mult": 2, "mlp_width_ratio": 2.0},
}
UNET = {"block_out_channels": (16, 32), "attention_head_dim": 8, "num_attention_heads": None, "norm_num_groups": 8}
OWN_SIZES: dict[str, dict[str, Any]] = {  # of classes that reject the common sizes, or lack parts with them
    "AceStepTransformer1DModel": {
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "sliding_window": 4,
        "encoder_hidden_size": TEXT,
    },
    "AllegroTransformer3DModel": {"cross_attention_dim": WIDTH},
    "BriaFibo2Transformer2DModel": {"injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4},
    "ChromaTransformer2DModel": {"approximator_num_channels": 16, "approximator_hidden_dim": 32},
    "CogVideoXTransformer3DModel": {"max_text_seq_length": TOKENS},
    "ConsisIDTransformer3DModel": {"max_text_seq_length": TOKENS},
    "CosmosTransformer3DModel": {"concat_padding_mask": False},
    "DiTTransformer2DModel": {"num_embeds_ada_norm": 1000},
    "DreamLiteTransformer2DModel": {"norm_num_groups": 4, "in_channels": WIDTH, "out_channels": WIDTH, "num_kv_heads": None},
    "DreamLiteUNetModel": UNET | {"block_out_channels": (16, 16, 32), "cross_attention_dim": TEXT},
    "EasyAnimateTransformer3DModel": {"patch_size": 2},
    "Flux2Transformer2DModel": {"axes_dims_rope": (4, 4, 4, 4)},
    "Flux3Transformer2DModel": {"axes_dims_rope": (4, 4, 4, 4)},
    "HiDreamImageTransformer2DModel": {
        **{"patch_size": 2, "caption_channels": (TEXT, TEXT), "axes_dims_rope": (8, 4, 4), "llama_layers": (0, 1, 0, 1)},
        **{"max_resolution": (8, 8), "force_inference_output": True},
    },
    "HunyuanDiT2DModel": {"patch_size": 2, "text_len": 5, "text_len_t5": 5},
    "HunyuanImageTransformer2DModel": {"rope_axes_dim": (8, 8)},
    "HunyuanVideo15Transformer3DModel": {"text_embed_2_dim": TEXT, "image_embed_dim": TEXT, "num_layers": 1},
    "HunyuanVideoFramepackTransformer3DModel": {
        **{"has_clean_x_embedder": True, "has_image_proj": True, "image_proj_dim": TEXT},
    },
    "I2VGenXLUNet": UNET
    | {
        **{"cross_attention_dim": TEXT, "in_channels": 4, "out_channels": 4},
        **{"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")},
        **{"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
    },
    "Ideogram4Transformer2DModel": {"mrope_section": (4, 2, 2)},
    "Kandinsky3UNet": {
        **{"time_embedding_dim": 64, "cross_attention_dim": TEXT, "layers_per_block": 2},
        **{"block_out_channels": (32, 64, 96, 128), "attention_head_dim": 8, "groups": 8, "encoder_hid_dim": TEXT},
    },
    "LatteTransformer3DModel": {"patch_size": 2, "cross_attention_dim": WIDTH},
    "Lumina2Transformer2DModel": {"axes_lens": (32, 32, 32), "axes_dim_rope": (4, 4, 8)},
    "OmniGenTransformer2DModel": {
        "num_key_value_heads": HEADS,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        "vocab_size": 96,
        "pad_token_id": 0,
    },
    "LTXVideoTransformer3DModel": {"cross_attention_dim": WIDTH},
    "LTX2VideoTransformer3DModel": {"cross_attention_dim": WIDTH, "audio_cross_attention_dim": WIDTH},
    "LuminaNextDiT2DModel": {"num_kv_heads": HEADS},
    "MiniMaxH3Transformer3DModel": {"rope_freq_dim": 2},
    "NucleusMoEImageTransformer2DModel": {"mlp_ratio": 8.0, "dense_moe_strategy": "all_moe"},
    "PRXTransformer2DModel": {"axes_dim": (8, 8)},
    "PriorTransformer": {"num_embeddings": TOKENS, "embedding_dim": TEXT, "time_embed_dim": None},
    "PixArtTransformer2DModel": {"cross_attention_dim": WIDTH},
    "QwenImage21Transformer2DModel": {"mlp_ratio": 2},
    "SD3Transformer2DModel": {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "SanaTransformer2DModel": {"cross_attention_dim": WIDTH},
    "SanaVideoTransformer3DModel": {"cross_attention_dim": WIDTH},
    "StableCascadeUNet": {
        **{"block_out_channels": (32, 32), "num_attention_heads": (4, 4), "down_num_layers_per_block": (1, 1)},
        **{"up_num_layers_per_block": (1, 1), "conditioning_dim": TEXT, "clip_text_pooled_in_channels": TEXT},
        **{"timestep_ratio_embedding_dim": 32},
    },
    "T5FilmDecoder": {"input_dims": 8},
    "TransformerTemporalModel": {"cross_attention_dim": None, "in_channels": 8},
    "UNet1DModel": {"extra_in_channels": 32},
    "UNet2DConditionModel": UNET
    | {
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": TEXT},
    },
    "UNet2DModel": {
        **{"block_out_channels": (16, 32), "attention_head_dim": 8},
        **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    },
    "UNet3DConditionModel": UNET
    | {
        **{"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")},
        **{"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
    },
    "UNetMotionModel": {
        **{"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": TEXT},
        **{"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "num_attention_heads": 2},
        **{"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "motion_num_attention_heads": 2},
    },
    "UNetSpatioTemporalConditionModel": {
        **{"block_out_channels": (32, 64), "num_attention_heads": (2, 4), "num_frames": 2},
        **{"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")},
        **{"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "addition_time_embed_dim": 8},
        **{"projection_class_embeddings_input_dim": 24},
    },
    "UVit2DModel": {
        **{"block_out_channels": 32, "vocab_size": 64, "codebook_size": 60, "num_res_blocks": 1, "in_channels": 32},
        **{"micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40},
    },
    "WanAnimateTransformer3DModel": {
        **{"in_channels": 20, "image_dim": TEXT, "motion_encoder_size": 16, "motion_style_dim": 16, "motion_dim": 4},
        **{"motion_encoder_dim": 16, "face_encoder_hidden_dim": 32, "inject_face_latents_blocks": 2},
        **{"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}},
    },
    "WanAnimate2Transformer3DModel": {"in_dim": 20, "out_dim": 8},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1], "vace_in_channels": 8},
}


def classes() -> Iterator[str]:
    """The names of all models in diffusers' packages of transformers and U-Nets."""
    yield from sorted(_classes())


def _classes() -> dict[str, type[nn.Module]]:
    found: dict[str, type[nn.Module]] = {}
    for package in (transformers, unets):
        for info in iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{info.name}")
            for name, kind in vars(module).items():
                if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__:
                    found[name] = kind
    return found


def build(name: str) -> nn.Module:
    """Build a small denoiser with random weights.

    Raises:
        ValueError: the sizes do not make the model small.
    """
    kind = _classes()[name]
    known = inspect.signature(kind.__init__).parameters
    sizes = {field: value for field, value in SIZES.items() if field in known} | OWN_SIZES.get(name, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(**sizes).eval()
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > LARGEST:
            raise ValueError(f"{name}: expected at most {LARGEST} parameters, got {size}")
        for parameter in model.parameters():
            if parameter.ndim and not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # zeros would count as pruned, and hide what a layer depends on
    return model.requires_grad_(False)
