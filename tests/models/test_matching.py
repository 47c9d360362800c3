"""Matching of checkpoint tensors to model parameters: a partial match raises an error that names the tensors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rose_exp.models import load_model, load_tokenizer, open_model, save_model, save_streamed
from rose_exp.pruning import OnDisk
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

from . import gguf
from .families import CONFIGS, build, tokens

FILE = "model.safetensors"
FAMILIES = ["llama", "gemma3", "gpt2", "opt", "qwen3_moe"]


@pytest.fixture
def saved(tmp_path):
    """Save a small model with modified tensors and configuration; return its settings."""

    def save(family, tensors=lambda found: found, **config):
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        build(family).save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in tensors(load_file(folder / FILE)).items()}, folder / FILE, {"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return ModelSettings(path=str(folder))

    return save


def refused(settings, message):
    """Check that eager and streamed loading raise the same error before any block is read."""
    for read in (load_model, open_model):
        with pytest.raises(RoseExpError, match=message) as error:
            read(settings)
        assert str(error.value).startswith("model.path: ")
        assert "\n" not in str(error.value)


def without(name):
    return lambda found: {other: value for other, value in found.items() if other != name}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_missing_tensor_is_named(family, saved, tmp_path):
    build(family).save_pretrained(tmp_path / "whole")
    names = list(load_file(tmp_path / "whole" / FILE))
    for name in names[:: 1 + len(names) // 12]:
        with pytest.raises(RoseExpError) as error:
            open_model(saved(family, without(name)))
        message = str(error.value)
        stacked = ".experts." in name  # stacked with others into one model tensor
        assert (name in message and "has no " in message) or (stacked and "experts" in message), message


@pytest.mark.parametrize("prefix", ["module.", "base_model.", "base_model.model.", "_orig_mod."])
def test_unknown_key_prefixes_are_rejected(prefix, saved):
    refused(saved("llama", lambda found: {prefix + name: value for name, value in found.items()}), "has no ")


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"num_hidden_layers": 2}, r"contains model\.layers\.2\."),
        ("llama", {"num_hidden_layers": 4}, r"has no model\.layers\.3\."),
        ("llama", {"intermediate_size": 48}, r"expected model\.layers\.0\.mlp\..*of shape"),
        ("llama", {"vocab_size": 95}, r"of shape \(95, 36\) according to the configuration, got \(96, 36\)"),
        ("llama", {"attention_bias": True}, r"has no model\.layers\.0\.self_attn\.\w_proj\.bias"),
        ("gpt2", {"n_layer": 2}, r"contains .*h\.2\."),
        ("qwen3_moe", {"num_experts": 5, "num_local_experts": 5}, "experts"),
        ("qwen3_moe", {"num_experts": 3, "num_local_experts": 3}, "experts"),
    ],
)
def test_mismatched_configuration_is_rejected(family, config, message, saved):
    refused(saved(family, **config), message)


def test_gaps_in_expert_indices_are_rejected(saved):
    """Experts 0, 2 and 3 of a checkpoint do not match a configuration with three experts."""
    gap = saved(
        "qwen3_moe",
        lambda found: {
            name: value[[0, 2, 3]] if name.endswith("mlp.gate.weight") else value
            for name, value in found.items()
            if ".experts.1." not in name
        },
        num_experts=3,
        num_local_experts=3,
    )
    refused(gap, r"experts\.3\..* but not .*experts\.1\.")


def test_unused_tensors_raise_inside_blocks_and_warn_elsewhere(saved):
    bias = "model.layers.1.self_attn.q_proj.bias"
    refused(saved("llama", lambda f: f | {bias: torch.ones(32)}), re.escape(bias))
    refused(saved("llama", lambda f: f | {"layers.1.mlp.up_proj.weight": torch.ones(52, 36)}), "has both")
    loaded, _ = open_model(saved("llama", lambda f: f | {"value_head.weight": torch.ones(1, 36)}))
    assert [kind for kind, _ in loaded.warnings] == ["unused_weights"]
    assert "value_head.weight" in loaded.warnings[0][1]
    old = saved("llama", lambda f: f | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert not open_model(old)[0].warnings  # a buffer stored by older versions of transformers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_non_finite_weights_are_named(name, value, saved):
    def damage(found):
        found[name].view(-1)[-1] = value
        return found

    settings = saved("llama", damage)
    with pytest.raises(RoseExpError, match=rf"expected finite weights, got NaN or infinity in {re.escape(name)}"):
        load_model(settings)
    with pytest.raises(RoseExpError, match=re.escape(name)):  # noqa: PT012
        _, streamed = open_model(settings)
        streamed.load(2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantized_tensors_are_rejected(dtype, saved):
    name = "model.layers.1.mlp.up_proj.weight"
    refused(saved("llama", lambda f: f | {name: f[name].to(dtype)}), "expected weights of 16, 32 or 64 bits")


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4"])
def test_quantized_configurations_are_rejected(method, saved):
    refused(saved("llama", quantization_config={"quant_method": method}), f"checkpoint quantized with {method}")


def test_adapter_config_is_rejected(saved):
    settings = saved("llama")
    (Path(settings.path) / "adapter_config.json").write_text("{}")
    refused(settings, "adapter")


TIES = {
    "only the embedding": lambda f: without("lm_head.weight")(f),
    "only the head": lambda f: without("model.embed_tokens.weight")(f),
    "both, equal": lambda f: f | {"lm_head.weight": f["model.embed_tokens.weight"].clone()},
    "both, different": lambda f: f,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", TIES)
def test_weight_tying_matches_transformers_after_loading_and_saving(stored, tied, saved, tmp_path, shared):
    settings = saved("llama", TIES[stored], tie_word_embeddings=tied)
    if not tied and stored.startswith("only"):
        return refused(settings, "has no (lm_head|model.embed_tokens).weight")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(settings.path)(tokens()).logits
        loaded = load_model(settings)
        assert torch.equal(loaded.model(tokens()).logits, expected)
        opened, streamed = open_model(settings)
        tokenizer = load_tokenizer(ModelSettings(path=str(shared / "data/models/stories260k-llama")))
        save_model(loaded.model, tokenizer, tmp_path / "from-memory")
        save_streamed(streamed, OnDisk(streamed, lambda _: None).at, tokenizer, tmp_path / "from-disk")
        for folder in ("from-memory", "from-disk"):
            again = ModelSettings(path=str(tmp_path / folder))
            assert torch.equal(load_model(again).model(tokens()).logits, expected)
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / folder)(tokens()).logits, expected)
    differs = tied and stored == "both, different"
    assert [kind for kind, _ in loaded.warnings] == (["untied_weights"] if differs else [])
    assert loaded.warnings == opened.warnings
    return None


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_checkpoints_load_like_safetensors(sharded, saved):
    settings = saved("llama")
    expected = load_model(settings).model.state_dict()
    folder = Path(settings.path)
    found = load_file(folder / FILE)
    names = sorted(found)
    if sharded:
        parts = {"pytorch_model-1.bin": names[:7], "pytorch_model-2.bin": names[7:]}
        for file, own in parts.items():
            torch.save({name: found[name] for name in own}, folder / file)
        index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(found, folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    for name, value in load_model(settings).model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_single_file_takes_precedence_over_shards(saved, tmp_path):
    settings = saved("llama")
    shards = tmp_path / "shards"
    build("llama", seed=5).save_pretrained(shards, max_shard_size="40KB")
    for file in shards.glob("model*"):
        shutil.copy(file, settings.path)
    expected = AutoModelForCausalLM.from_pretrained(settings.path).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_model(settings).model.state_dict().items())


def test_loaded_model_does_not_depend_on_its_files(saved):
    settings = saved("llama")
    loaded = load_model(settings)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    path = Path(settings.path) / FILE
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place, as a download might
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert all(value.data_ptr() % 64 == 0 for value in loaded.model.parameters())


def write_gguf(path, missing=(), layers=3, extra=()):
    arguments = CONFIGS["llama"][1] | {"hidden_size": 32, "head_dim": 8}  # GGUF files of this family do not store head_dim
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments))
    writer = gguf.start(path, model.config, layers)
    for name, value in model.state_dict().items():
        if gguf.name_of(name) not in missing:
            writer.add_tensor(gguf.name_of(name), value.numpy())
    for own in extra:
        writer.add_tensor(own, np.ones(4, dtype=np.float32))
    gguf.finish(writer)
    return ModelSettings(path=str(path))


def test_gguf_loading_matches_transformers(tmp_path):
    settings = write_gguf(tmp_path / "whole.gguf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="whole.gguf").state_dict()
    found = load_model(settings).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("name", ["blk.2.ffn_down.weight", "blk.0.attn_norm.weight", "output_norm.weight", "token_embd.weight"])
def test_gguf_with_a_missing_tensor_is_rejected(name, tmp_path):
    refused(write_gguf(tmp_path / "model.gguf", missing=[name]), "has no ")


def test_gguf_with_extra_block_tensors_is_rejected(tmp_path):
    refused(write_gguf(tmp_path / "model.gguf", layers=2), r"blk\.2\.")
    refused(write_gguf(tmp_path / "extra.gguf", extra=["blk.1.unknown.weight"]), r"blk\.1\.unknown")
    loaded, _ = open_model(write_gguf(tmp_path / "other.gguf", extra=["unknown.weight"]))
    assert [kind for kind, _ in loaded.warnings] == ["unused_weights"]


def test_encoder_decoder_models_are_rejected(tmp_path):
    config = transformers.T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    refused(ModelSettings(path=str(tmp_path)), "expected a decoder, got t5")


def test_families_have_a_configuration():
    assert set(FAMILIES) <= set(CONFIGS)
