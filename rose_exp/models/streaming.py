"""A model of which only what stands outside its blocks is in memory; its blocks come and go one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import cached_file

from ..errors import RoseExpError
from ..settings import ModelSettings
from .checkpoint import Checkpoint, GgufCheckpoint, SafetensorsCheckpoint
from .loading import LoadedModel, forget_quantization, from_pretrained, located, protocol
from .structure import BlockList, find_blocks


class StreamedModel:
    """A causal language model built from its configuration, with empty blocks.

    Attributes:
        model: embeddings, head, norms and buffers are there, on the CPU; the blocks' weights are on the meta device.
        blocks: of it.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, blocks: BlockList):
        self.model, self.checkpoint, self.blocks = model, checkpoint, blocks
        rest = [name for name in checkpoint.names if not self._of_any_block(name)]
        checkpoint.fill(model, rest)
        model.tie_weights()
        self._check_filled({name: value for name, value in _tensors(model).items() if not self.inside(name)}, "the model")

    def load(self, index: int) -> nn.Module:
        """The block with the weights of the checkpoint, on the CPU.

        Raises:
            RoseExpError: they cannot be read, or are not all there.
        """
        block, name = self.blocks.blocks[index], self.blocks.block_name(index)
        self.checkpoint.fill(self.model, self._of_block.get(index, []))
        self._check_filled({f"{name}.{inner}": value for inner, value in _tensors(block).items()}, name)
        return block

    def inside(self, name: str) -> bool:
        """Whether a parameter of this name belongs to a block."""
        return name.startswith(f"{self.blocks.name}.")

    @cached_property
    def _of_block(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name in self.checkpoint.names:
            index = self._of_any_block(name)
            if index:
                found.setdefault(int(index[1]), []).append(name)
        return found

    def _of_any_block(self, name: str) -> re.Match | None:
        """Checkpoints may call what is before or after the list by other names than the model, but not the list's places."""
        return re.search(rf"(?:^|\.){re.escape(self.blocks.name.rpartition('.')[2])}\.(\d+)\.", name)

    def _check_filled(self, tensors: Mapping[str, Tensor], what: str) -> None:
        missing = [name for name, value in tensors.items() if value.is_meta]
        if missing:
            raise RoseExpError(f"{self.checkpoint.where}: {what} has no {', '.join(missing[:3])} in the checkpoint")


def let_go(block: nn.Module) -> None:
    """Take a block's parameters out of memory, its buffers to the CPU."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("cpu")


def open_model(settings: ModelSettings) -> tuple[LoadedModel, StreamedModel]:
    """The model, its blocks still in their files.

    Raises:
        RoseExpError: it cannot be had, or not a part at a time.
    """
    source, gguf = located(settings)
    config = from_pretrained(AutoConfig, settings)
    where = "model.path" if settings.path is not None else "model.embedded"
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    find = _finder(source, settings, config)
    if gguf:
        checkpoint: Checkpoint = GgufCheckpoint(Path(source) / gguf, model, where)
    else:
        checkpoint = SafetensorsCheckpoint(find, f"{where}: {source}")
    dtype = getattr(config, "dtype", None) or checkpoint.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with init_empty_weights(include_buffers=False):  # again, now that the dtype is known
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    model.eval().requires_grad_(False)
    if not gguf and find("generation_config.json") is not None:
        model.generation_config = GenerationConfig.from_pretrained(find("generation_config.json").parent)
    forget_quantization(model)
    streamed = StreamedModel(model, checkpoint, find_blocks(model, settings.blocks))
    return LoadedModel(model, protocol(settings, model)), streamed


def _finder(source: str, settings: ModelSettings, config: Any) -> Callable[[str], Path | None]:
    """Files of the model by name, from its folder or the hub."""
    revision = getattr(config, "_commit_hash", None) or settings.revision

    def find(name: str) -> Path | None:
        try:
            path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise RoseExpError(f"model.path: cannot fetch {name} of {source!r}: {error}") from error
        return Path(path) if path is not None else None

    return find


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | {name: value for name, value in module.named_buffers() if value.is_meta}
