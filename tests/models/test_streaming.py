"""Block-by-block loading matches loading the whole model with transformers; damaged checkpoints raise errors."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rose_exp.models import largest_file, let_go, load_model, load_tokenizer, open_model, save_model, save_streamed
from rose_exp.pruning import InMemory, OnDisk, answers_by_blocks, loading_blocks
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

from .families import CONFIGS, build, tokens


def saved(family, folder):
    build(family).save_pretrained(folder, max_shard_size="40KB")
    return folder


def without_dtype(config) -> dict:
    """Drop the dtype: transformers 5.0 keeps that of the checkpoint, later versions that of the model."""
    return {name: value for name, value in config.to_dict().items() if name != "dtype"}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_streamed_weights_match_transformers_for_every_family(family, dtype, tmp_path):
    settings = ModelSettings(path=str(saved(family, tmp_path)), dtype=dtype)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    loaded, streamed = open_model(settings)
    model, blocks = loaded.model, streamed.blocks.blocks
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())
    for index in range(len(blocks)):
        streamed.load(index)
    in_memory = load_model(settings).model.state_dict()
    assert list(in_memory) == list(model.state_dict())
    assert all(torch.equal(value, in_memory[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(whole.state_dict())
    for name, value in whole.state_dict().items():
        assert model.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(model.state_dict()[name], value), name
    for (name, buffer), (_, own) in zip(whole.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, own), name
    assert model.dtype == whole.dtype
    assert without_dtype(model.config) == without_dtype(whole.config)
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, whole(tokens()).logits)
    let_go(blocks[0])
    assert all(parameter.is_meta for parameter in blocks[0].parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_blockwise_logits_match_the_whole_model(family, tmp_path):
    settings = ModelSettings(path=str(saved(family, tmp_path)))
    whole, (loaded, streamed) = load_model(settings).model, open_model(settings)
    weights = OnDisk(streamed, lambda _: None)
    with torch.no_grad():
        expected = whole(tokens()).logits
        for place in ("device", "disk"):
            found = list(answers_by_blocks(loaded.model, weights, tokens(), "cpu", 2, place, tmp_path, "test"))
            assert torch.equal(torch.cat([windows for windows, _ in found]), tokens())
            for (windows, logits), part in zip(found, tokens().split(1), strict=True):  # the CPU runs one window at a time
                assert torch.equal(logits, whole(part).logits), windows
        with loading_blocks(weights, "cpu"):
            assert torch.equal(loaded.model(tokens()).logits, expected)
    assert all(parameter.is_meta for block in streamed.blocks.blocks for parameter in block.parameters())


def test_blockwise_logits_match_for_a_model_in_memory(tmp_path):
    model = build("llama")
    from rose_exp.models import find_blocks

    found = answers_by_blocks(model, InMemory(find_blocks(model)), tokens(), "cpu", 5, "device", tmp_path, "test")
    with torch.no_grad():
        for (_, logits), window in zip(found, tokens().split(1), strict=True):
            assert torch.equal(logits, model(window).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "qwen2_moe"])
def test_blockwise_saving_matches_whole_model_saving(family, tmp_path, shared):
    settings = ModelSettings(path=str(saved(family, tmp_path / "dense")))
    tokenizer = load_tokenizer(ModelSettings(path=str(shared / "data/models/stories260k-llama")))
    save_model(load_model(settings).model, tokenizer, tmp_path / "whole")
    _, streamed = open_model(settings)
    save_streamed(streamed, OnDisk(streamed, lambda _: None).at, tokenizer, tmp_path / "blocks")
    own, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("blocks", "whole"))
    for name, value in whole.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "blocks" / name).read_text()) == json.loads((tmp_path / "whole" / name).read_text())
    index = json.loads((tmp_path / "blocks" / "model.safetensors.index.json").read_text())
    keys = set(index["weight_map"])
    stored = {name for path in (tmp_path / "whole").glob("*.safetensors") for name in _names(path)}
    assert keys == stored  # hub names: experts unstacked, tied weights stored once


def _names(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _settings(folder):
    return ModelSettings(path=str(folder), dtype="auto")


def test_damaged_checkpoints_raise_on_open(tmp_path):
    folder = saved("llama", tmp_path)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    shards = sorted(set(json.loads(text)["weight_map"].values()))

    index.write_text(text.replace(shards[0], f"../{shards[0]}"))
    with pytest.raises(RoseExpError, match=r"model.path: .*expected file names in the folder of the index, got '\.\./"):
        open_model(_settings(folder))
    index.write_text("{}")
    with pytest.raises(RoseExpError, match="is not an index of shards"):
        open_model(_settings(folder))
    index.write_text(text)

    whole = (folder / shards[1]).read_bytes()
    (folder / shards[1]).write_bytes(whole[:-10])
    with pytest.raises(RoseExpError, match=f"{shards[1]} is missing or damaged"):
        open_model(_settings(folder))
    (folder / shards[1]).unlink()
    with pytest.raises(RoseExpError, match=f"the shard {shards[1]} is missing"):
        open_model(_settings(folder))
    (folder / shards[1]).write_bytes((folder / shards[2]).read_bytes())
    with pytest.raises(RoseExpError, match=f"{shards[1]} does not contain .*, which the index lists there"):
        open_model(_settings(folder))


def test_missing_shard_and_missing_block_weights_raise_on_load(tmp_path):
    folder = saved("llama", tmp_path)
    _, streamed = open_model(_settings(folder))
    name = next(n for n in streamed.checkpoint.names if ".1.self_attn.q_proj" in n)
    path = streamed.checkpoint.files[name]
    path.unlink()
    with pytest.raises(RoseExpError, match=f"{path.name} is missing or damaged"):
        streamed.load(1)
    streamed.checkpoint.names.remove(name)
    streamed.__dict__.pop("_of_block", None)
    with pytest.raises(RoseExpError, match=r"model.layers.1 has no model.layers.1.self_attn.q_proj.weight|missing or damaged"):
        streamed.load(1)


def test_folder_without_weights_raises_an_error(tmp_path):
    build("llama").config.save_pretrained(tmp_path)
    with pytest.raises(RoseExpError, match=r"expected model.safetensors, model.safetensors.index.json, .*got none of them"):
        open_model(_settings(tmp_path))


def test_largest_file_is_that_of_the_weights(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "optimizer.pt").write_bytes(bytes(10**6))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 1
    assert largest_file(ModelSettings(path=str(tmp_path))) == max(sizes)
    assert largest_file(ModelSettings(path="owner/name")) == 0
