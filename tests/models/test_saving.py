"""Saving: pruned models load in transformers with their zeros intact."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rose_exp.engine import SemiStructured, SparseGPT
from rose_exp.models import all_linear_layers, find_blocks, load_model, load_tokenizer, save_model
from rose_exp.pruning import PruningPlan, prune_model
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

from .families import build, tokens


@pytest.fixture
def stories(shared):
    return ModelSettings(path=str(shared / "data/models/stories260k-llama"))


def test_saved_model_equals_the_pruned_model(stories, tmp_path):
    model, tokenizer = load_model(stories).model, load_tokenizer(stories)
    windows = torch.randint(0, 512, (2, 32))
    prune_model(model, windows, PruningPlan(method=SparseGPT(), sparsity=SemiStructured(2, 4)))
    folder = save_model(model, tokenizer, tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(again(windows).logits, model(windows).logits)
    assert all((layer.weight == 0).any() for layer in all_linear_layers(find_blocks(again)))
    assert AutoTokenizer.from_pretrained(folder)("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3"])
def test_other_families_can_be_saved(family, tmp_path, stories):
    model = build(family)
    prune_model(model, tokens(), PruningPlan(method=SparseGPT(), sparsity=SemiStructured(2, 4)))
    again = AutoModelForCausalLM.from_pretrained(save_model(model, load_tokenizer(stories), tmp_path / "pruned"))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_saving_never_overwrites_and_leaves_no_partial_output(stories, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(stories)
    (tmp_path / "existing").mkdir()
    with pytest.raises(RoseExpError, match="expected a folder that does not exist, got .*existing"):
        save_model(build("llama"), tokenizer, tmp_path / "existing")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(RoseExpError, match=r"cannot write the model to .*No space left on device"):
        save_model(build("llama"), tokenizer, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["existing"]


def test_fingerprint_depends_on_weights_and_not_on_dtype(stories, tmp_path):
    loaded = load_model(stories.model_copy(update={"dtype": "bfloat16"}))
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.protocol["dtype"] == "bfloat16"
    plain = load_model(stories)
    assert plain.protocol["sha256"] == loaded.protocol["sha256"]
    with torch.no_grad():
        next(plain.model.parameters()).add_(1)
    save_model(plain.model, load_tokenizer(stories), tmp_path / "other")
    assert load_model(ModelSettings(path=str(tmp_path / "other"))).protocol["sha256"] != loaded.protocol["sha256"]


def test_protocol_fingerprint_covers_all_model_files(stories, tmp_path):
    """The configuration affects results just as the weights do."""
    shutil.copytree(stories.path, tmp_path / "copy")
    copied = ModelSettings(path=str(tmp_path / "copy"))
    loaded, same = load_model(stories).protocol, load_model(copied).protocol
    assert {name: value for name, value in same.items() if value != loaded[name]} == {"name": "copy", "source": copied.path}
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5000.0}))
    other = load_model(copied).protocol
    assert other["sha256"] == loaded["sha256"]
    assert other["files_sha256"] != loaded["files_sha256"]


def test_missing_model_and_unreachable_hub_raise_an_error(tmp_path):
    with pytest.raises(RoseExpError, match=r"model.path: cannot load"):
        load_model(ModelSettings(path=str(tmp_path)))
    with pytest.raises(RoseExpError, match=r"model.path: cannot load 'nobody/nothing' \(no such local folder"):
        load_tokenizer(ModelSettings(path="nobody/nothing"))


def test_damaged_checkpoint_raises_an_error(stories, tmp_path):
    folder = save_model(load_model(stories).model, load_tokenizer(stories), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RoseExpError, match=r"model.path: .*model.safetensors is missing or damaged"):
        load_model(ModelSettings(path=str(folder)))


def test_quantized_checkpoint_is_rejected(stories, tmp_path):
    folder = save_model(load_model(stories).model, load_tokenizer(stories), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RoseExpError, match="model"):
        load_model(ModelSettings(path=str(folder)))
