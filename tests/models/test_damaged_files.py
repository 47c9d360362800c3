"""Damaged and malicious model files: nothing in them is executed, and each raises one error."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from rose_exp.models import check_savable, load_model, load_tokenizer, model_shape, open_model
from rose_exp.models.checkpoint import SINGLE, TORCH_SINGLE, SafetensorsCheckpoint, TorchCheckpoint
from rose_exp.models.gguf_header import check_gguf
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

from ..data.small_tokenizers import build_tokenizer
from .families import build
from .test_matching import write_gguf


class Program:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def error_of(read, path: Path) -> str:
    """Return the error of reading a model, or an empty string."""
    try:
        read(ModelSettings(path=str(path)))
    except RoseExpError as error:
        return str(error)
    return ""


def contents(path: Path):
    return TorchCheckpoint(lambda name: path if name == TORCH_SINGLE else None, "model.path: X")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["archive", "older format", "pickle"])
def test_programs_in_weight_files_are_not_executed(kind, protocol, tmp_path):
    path, made = tmp_path / TORCH_SINGLE, tmp_path / "made"
    content = {"model.norm.weight": Program(f"touch {made}")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(RoseExpError, match="model.path: X: .*contains more than tensors: ") as caught:
        contents(path)
    assert not made.exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch recommends to execute the file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), "it refers to torch.nn.modules.linear.Linear, which is not executed"),
        ([torch.ones(2)], "expected a mapping of names to tensors in .*, got list"),
        ({"a": 1}, "expected a mapping of names to tensors"),
        ({1: torch.ones(2)}, "expected names of tensors in .*, got 1"),
        ({"a": torch.ones(2).to_sparse()}, "expected dense tensors, got the sparse_coo tensor a"),
        ({"a": torch.ones(2, device="meta")}, "expected dense tensors, got the meta tensor a"),
    ],
)
def test_other_objects_in_weight_files_are_named(content, message, tmp_path):
    torch.save(content, tmp_path / TORCH_SINGLE)
    with pytest.raises(RoseExpError, match=message):
        contents(tmp_path / TORCH_SINGLE)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", [SINGLE, TORCH_SINGLE])
def test_damaged_weight_files_load_or_raise_one_error(kind, seed, tmp_path):
    """Also a flipped bit anywhere in the header."""
    generator = random.Random(seed)
    folder = tmp_path / "model"
    model = build("llama")
    model.save_pretrained(folder)
    if kind == TORCH_SINGLE:
        torch.save(model.state_dict(), folder / TORCH_SINGLE)
        (folder / SINGLE).unlink()
    whole = (folder / kind).read_bytes()
    for _ in range(10):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 3, 30))):
            content[generator.randrange(generator.choice((8, 900, len(content))))] ^= 1 << generator.randrange(8)
        (folder / kind).write_bytes(
            content[: generator.choice((len(content), len(content), generator.randrange(len(content))))]
        )
        assert re.fullmatch(r"model\.path: .+|", error_of(load_model, folder))


def test_dtypes_and_indices_are_checked(tmp_path):
    path = tmp_path / SINGLE
    header = b'{"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(RoseExpError, match="model.path: X"):
        SafetensorsCheckpoint(lambda name: path if name == SINGLE else None, "model.path: X")
    index = tmp_path / f"{SINGLE}.index.json"
    for weight_map in (None, [], {}, {"a": 1}, {"a": ["b"]}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(RoseExpError, match="is not an index of shards"):
            SafetensorsCheckpoint(lambda name: index if name == index.name else None, "model.path: X")


@pytest.mark.parametrize("seed", range(6))
def test_damaged_gguf_headers_end(seed, tmp_path):
    path = Path(write_gguf(tmp_path / "model.gguf").path)
    check_gguf(path, "x")
    whole, generator = path.read_bytes(), random.Random(seed)
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 4))):
            content[generator.randrange(generator.choice((24, 400)))] = generator.choice((0, 1, 127, 255))
        path.write_bytes(content)
        assert re.fullmatch(r"model\.path: .+|", error_of(open_model, path))


def test_array_lengths_beyond_a_gguf_file_are_rejected(tmp_path):
    """The library would read an array of 2⁶⁰ numbers from a file of a few bytes."""
    path = tmp_path / "model.gguf"
    name = b"tokenizer.ggml.scores"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name
    path.write_bytes(head + struct.pack("<IIQ", 9, 6, 2**60) + bytes(64))
    with pytest.raises(RoseExpError, match="model.path: .*model.gguf is not a GGUF file, or is damaged: its metadata exceeds"):
        load_tokenizer(ModelSettings(path=str(path)))


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts"])
def test_huge_numbers_of_layers_are_rejected(name, tmp_path):
    build("qwen3_moe").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = path.read_text()
    assert f'"{name}": ' in config
    head, _, rest = config.partition(f'"{name}": ')
    path.write_text(f'{head}"{name}": 1000000000{rest[rest.index(",") :]}')
    with pytest.raises(RoseExpError, match=r"expected \w+ of at most 10000 in the configuration, got 1000000000"):
        model_shape(ModelSettings(path=str(tmp_path)))


def test_generation_configurations_that_cannot_be_saved_are_found_when_loading():
    model = build("llama")
    check_savable(model, build_tokenizer())
    model.generation_config.temperature = -1.0  # transformers loads it and refuses to save it
    with pytest.raises(RoseExpError, match="save: transformers cannot save the configuration of the model: .*temperature"):
        check_savable(model, build_tokenizer())


def test_shapes_know_the_bounds_of_tokens_and_windows(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    shape = model_shape(ModelSettings(path=str(tmp_path)))
    assert (shape.tokens, shape.context) == (96, 64)
    shape.check_tokens("x", 95)
    with pytest.raises(RoseExpError, match="^x: expected token IDs below 96, .*, got 96"):
        shape.check_tokens("x", 96)


def test_file_that_exceeds_a_memory_limit_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 1976045104 bytes from file <model.safetensors>: Cannot allocate memory (12)")

    build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("rose_exp.models.checkpoint.safe_open", refuse)
    with pytest.raises(RoseExpError, match="memory limit of the process .* is too low for the size of the file") as error:
        open_model(ModelSettings(path=str(tmp_path)))
    assert "damaged" not in str(error.value)
