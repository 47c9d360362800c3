"""GGUF files unpacked into the cache: reading one takes transformers many times longer than reading its contents.

Configuration, tokenizer and weights are separate entries, created when they are first needed. The weights are dequantized to
float32, as they are without the cache.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..runtime.cache import cached
from ..runtime.fingerprint import content_sha256, model_sha256
from .checkpoint import INDEX, Checkpoint, GgufCheckpoint, SafetensorsCheckpoint

log = logging.getLogger(__name__)

FACTS = "facts.json"
SHARD = 64 * 2**20  # bytes of the tensors that are in memory at a time, unless one is larger
LIBRARIES = ("transformers", "tokenizers", "gguf", "safetensors")


class UnpackedCheckpoint(SafetensorsCheckpoint):
    """The tensors of a GGUF file in the cache."""

    def __init__(self, folder: Path, where: str):
        super().__init__(lambda name: path if (path := folder / name).exists() else None, where)
        self.unmapped = json.loads((folder / FACTS).read_text(encoding="utf-8"))["unmapped"]


def through_cache(kind: str, path: Path, load: Callable[[], Any], reload: Callable[[Path], Any]) -> Any:
    """Return the configuration or the tokenizer of a GGUF file, from the cache if it is there.

    Args:
        kind: ``config`` or ``tokenizer``.
        load: reads it from the file.
        reload: reads it from a folder. If the result differs, it is read from the file each time.
    """
    loaded: list[Any] = []

    def fill(folder: Path) -> None:
        loaded.append(original := load())
        try:
            original.save_pretrained(folder / "saved")
            same = _contents(reload(folder / "saved")) == _contents(original)
        except Exception as error:  # the run does not depend on it
            log.info("the %s of %s is not cached, because it cannot be saved: %s", kind, path, error)
            same = False
        (folder / FACTS).write_text(json.dumps({"same": same}), encoding="utf-8")

    entry = cached(kind, _key(path), fill)
    if loaded:
        return loaded[0]
    if entry is None or not json.loads((entry / FACTS).read_text(encoding="utf-8"))["same"]:
        return load()
    result = reload(entry / "saved")
    result.name_or_path = str(path.parent)
    return result


def gguf_checkpoint(path: Path, model: nn.Module, where: str) -> Checkpoint:
    """Open the weights of a GGUF file, from the cache if they fit into it.

    Args:
        model: the model that the configuration describes; its tensors need no values.
        where: name and value of the setting that selects the file, for errors.
    Raises:
        RoseExpError: the file is damaged, or transformers cannot read its tensors.
    """

    def fill(folder: Path) -> None:
        checkpoint = GgufCheckpoint(path, model, where)
        index, shard = {}, {}
        names = tqdm(checkpoint.names, "unpacking the GGUF file, once", unit="tensor", disable=None, leave=False)
        for name in names:
            with checkpoint.read([name]) as tensors:
                shard[name] = tensors[name].contiguous()
            if sum(tensor.nbytes for tensor in shard.values()) >= SHARD or name == checkpoint.names[-1]:
                file = f"model-{len(set(index.values())):05}.safetensors"
                try:
                    save_file(shard, folder / file, {"format": "pt"})
                except SafetensorError as error:  # such as a full disk
                    raise OSError(str(error)) from error
                index |= dict.fromkeys(shard, file)
                shard = {}
        (folder / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
        (folder / FACTS).write_text(json.dumps({"unmapped": checkpoint.unmapped}), encoding="utf-8")

    size = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    entry = cached("weights", _key(path) | {"model": type(model).__name__}, fill, size)
    return UnpackedCheckpoint(entry, where) if entry is not None else GgufCheckpoint(path, model, where)


def _key(path: Path) -> dict[str, str]:
    code = [content_sha256(Path(__file__).with_name(name)) for name in ("checkpoint.py", "unpacked.py")]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return versions | {"file": model_sha256(path), "code": " ".join(code)}


def _contents(loaded: PreTrainedConfig | PreTrainedTokenizerBase) -> Any:
    """Return all that distinguishes one configuration or tokenizer from another."""
    if isinstance(loaded, PreTrainedConfig):
        return type(loaded), {name: value for name, value in loaded.to_dict().items() if name != "_name_or_path"}
    return (
        type(loaded),
        loaded.backend_tokenizer.to_str() if loaded.is_fast else loaded.get_vocab(),
        loaded.special_tokens_map,
        loaded.chat_template,
        loaded.model_max_length,
        (loaded.padding_side, loaded.truncation_side),
        loaded.model_input_names,
    )
