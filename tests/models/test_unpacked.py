"""GGUF files in the cache: the model, its configuration and its tokenizer are equal to those read from the file."""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_package
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

import rose_exp
from rose_exp.models import load_model, load_tokenizer, model_shape, unpacked
from rose_exp.models.loading import from_pretrained
from rose_exp.runtime.cache import DERIVED
from rose_exp.settings.schema import ModelSettings

from ..runs.odd_inputs import write_gguf
from .test_matching import write_gguf as write_weights

TEXT = "Once upon a time, <s> there was  a little girl.\n\tHer name was Lily. 世界 <unk> </s>"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / DERIVED


@pytest.fixture
def settings(shared, tmp_path) -> ModelSettings:
    model = load_model(ModelSettings(path=str(shared / "data/models/stories260k-llama"))).model
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model/stories.gguf", model)
    return ModelSettings(path=str(tmp_path / "model/stories.gguf"))


def read(settings: ModelSettings) -> tuple:
    """Return all that a run reads from a model."""
    loaded, tokenizer, config = load_model(settings), load_tokenizer(settings), from_pretrained(AutoConfig, settings)
    assert isinstance(tokenizer, type(load_tokenizer(settings)))
    return (
        {name: value.clone() for name, value in loaded.model.state_dict().items()},
        (config.to_dict(), loaded.model.config.to_dict(), loaded.protocol, loaded.warnings, model_shape(settings)),
        (type(tokenizer), tokenizer(TEXT).input_ids, tokenizer.special_tokens_map, tokenizer.name_or_path),
    )


def assert_equal(found: tuple, expected: tuple) -> None:
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(value, expected[0][name]) for name, value in found[0].items())
    assert found[1:] == expected[1:]


def test_cached_model_equals_the_file(settings, own_cache, monkeypatch):
    with monkeypatch.context() as disabled:
        disabled.setenv("ROSE_EXP_CACHE_GB", "0")
        expected = read(settings)
    assert not own_cache.exists()
    assert_equal(read(settings), expected)  # fills the cache
    assert sorted(path.name.partition("-")[0] for path in own_cache.iterdir() if path.name[0] != ".") == [
        "config",
        "tokenizer",
        "weights",
    ]
    with monkeypatch.context() as unreadable:
        unreadable.setattr(gguf_package, "GGUFReader", None)  # neither this package nor transformers can read the file
        assert_equal(read(settings), expected)


def test_shards_of_the_cache_hold_all_tensors(settings, own_cache, monkeypatch):
    monkeypatch.setattr(unpacked, "SHARD", 100_000)
    state = load_model(settings).model.state_dict()
    assert len(list(own_cache.glob("weights-*/model-*.safetensors"))) > 3
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0")
    assert all(torch.equal(value, state[name]) for name, value in load_model(settings).model.state_dict().items())


def test_changed_file_is_unpacked_again(settings):
    model = load_model(settings).model
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    write_gguf(Path(settings.path), model)
    assert torch.equal(load_model(settings).model.model.norm.weight, model.model.norm.weight)


def test_tokenizer_next_to_a_gguf_file_counts(settings, shared):
    before = load_tokenizer(settings)
    other = AutoTokenizer.from_pretrained(shared / "data/models/stories260k-llama")
    other.add_tokens(["Lily"])
    other.save_pretrained(Path(settings.path).parent)
    after = load_tokenizer(settings)
    assert len(after(TEXT).input_ids) < len(before(TEXT).input_ids)
    assert after(TEXT).input_ids == load_tokenizer(settings)(TEXT).input_ids


def test_unmapped_tensors_are_named_from_the_cache(tmp_path):
    settings = write_weights(tmp_path / "other.gguf", extra=["unknown.weight"])
    first, second = load_model(settings), load_model(settings)
    assert first.warnings == second.warnings
    assert "unknown.weight" in second.warnings[0][1]


def test_tokenizer_that_saving_changes_is_read_from_the_file(settings, own_cache, monkeypatch):
    with monkeypatch.context() as different:
        different.setattr(unpacked, "_contents", lambda _: object())
        expected = load_tokenizer(settings)(TEXT).input_ids
    assert [path.name for path in own_cache.glob("tokenizer-*/saved/*")]
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", spy := Spy(AutoTokenizer.from_pretrained))
    assert load_tokenizer(settings)(TEXT).input_ids == expected
    assert [options.get("gguf_file") for options in spy.options] == ["stories.gguf"]


@pytest.mark.parametrize("kind", [AutoConfig, AutoTokenizer])
def test_parts_that_cannot_be_saved_are_read_from_the_file(kind, settings, monkeypatch):
    expected = unpacked._contents(from_pretrained(kind, settings))

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("cannot be saved")

    monkeypatch.setenv("ROSE_EXP_CACHE", f"{settings.path}-cache")
    monkeypatch.setattr(type(from_pretrained(kind, settings)), "save_pretrained", refuse)
    for _ in range(2):
        assert unpacked._contents(from_pretrained(kind, settings)) == expected


def test_full_disk_leaves_no_weights_in_the_cache(settings, own_cache, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(unpacked, "save_file", full)
    assert len(load_model(settings).model.state_dict()) > 10
    assert "cannot use the cache" in caplog.text
    assert not list(own_cache.glob("weights-*"))


class Spy:
    def __init__(self, function):
        self.function, self.options = function, []

    def __call__(self, *arguments, **options):
        self.options.append(options)
        return self.function(*arguments, **options)


def test_run_of_a_cached_model_has_an_equal_record(settings, small, tmp_path, monkeypatch):
    overrides = [f"model.path={settings.path}" if item.startswith("model.path=") else item for item in small]
    records = [rose_exp.run(overrides, tmp_path / name) for name in ("first", "second")]
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0")
    records.append(rose_exp.run(overrides, tmp_path / "third"))
    for record in records:
        assert record["metrics"] == records[0]["metrics"]
        assert record["protocol"] == records[0]["protocol"]
        assert [layer["error"] for layer in record["layers"]] == [layer["error"] for layer in records[0]["layers"]]
