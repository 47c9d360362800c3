"""Loading a model's blocks from its files, one at a time or all at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file

from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors
from ..settings.schema import ModelSettings
from .blocks import BlockList, find_blocks
from .checkpoint import Checkpoint, open_checkpoint
from .loading import LoadedModel, build_empty, from_pretrained, located, protocol, revision, setting_of
from .matching import Match, fill, match, tie
from .unpacked import gguf_checkpoint

log = logging.getLogger(__name__)

PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja")


class StreamedModel:
    """A causal language model built from its configuration, with empty blocks.

    Attributes:
        model: the model, with embeddings, head, norms and buffers on the CPU and the blocks' weights on the meta device.
        blocks: the blocks of the model.
        untied: names of tensors that the configuration ties to others, but that the checkpoint stores with different values.

    Raises:
        RoseExpError: the weights outside the blocks cannot be read or are not finite.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, blocks: BlockList, matched: Match):
        self.model, self.checkpoint, self.blocks, self.matched = model, checkpoint, blocks, matched
        fill(model, checkpoint, matched.outside, matched)
        self.untied = tie(model, matched)
        self._check_filled({name: value for name, value in _tensors(model).items() if not self.inside(name)}, "the model")

    def load(self, index: int) -> nn.Module:
        """Load a block's weights from the checkpoint to the CPU and return the block.

        Raises:
            RoseExpError: the weights cannot be read or are not finite.
        """
        block, name = self.blocks.blocks[index], self.blocks.block_name(index)
        fill(self.model, self.checkpoint, self.matched.of_block.get(index, []), self.matched)
        self._fill_tied(index)
        self._check_filled({f"{name}.{inner}": value for inner, value in _tensors(block).items()}, name)
        return block

    def _fill_tied(self, index: int) -> None:
        """Load the weights of a block that are tied to those of another block, such as the shared attention of Zamba."""
        tied = self.matched.tied_blocks.items()
        sources = {target: source for target, source in tied if self.blocks.index_of(target) == index}
        missing = {t: s for t, s in sources.items() if _parameter(self.model, t).is_meta and _parameter(self.model, s).is_meta}
        if missing:
            names = {name for name, place in self.matched.places.items() if place in missing.values()}
            fill(self.model, self.checkpoint, sorted(names), self.matched)
        for target, source in sources.items():
            value = _parameter(self.model, source)
            _set_parameter(self.model, target, value)
            if source in missing.values():
                _set_parameter(self.model, source, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))

    def inside(self, name: str) -> bool:
        """Return whether the parameter ``name`` belongs to a block."""
        return self.blocks.index_of(name) is not None

    def _check_filled(self, tensors: Mapping[str, Tensor], part: str) -> None:
        missing = [name for name, value in tensors.items() if value.is_meta]
        if missing:
            raise RoseExpError(f"{self.checkpoint.where}: the checkpoint lacks tensors of {part}: {', '.join(missing[:3])}")


def let_go(block: nn.Module) -> None:
    """Release the memory of a block's parameters and move its buffers to the CPU."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("cpu")


def load_model(settings: ModelSettings) -> LoadedModel:
    """Load a model with all of its blocks in memory.

    Raises:
        RoseExpError: as for :func:`open_model`.
    """
    loaded, streamed = open_model(settings)
    for index in tqdm(range(len(streamed.blocks.blocks)), "loading", unit="block", disable=None, leave=False):
        streamed.load(index)
    return loaded


def open_model(settings: ModelSettings) -> tuple[LoadedModel, StreamedModel]:
    """Open a model without loading its blocks. Weights of a GGUF file are dequantized to float32.

    Raises:
        RoseExpError: the model cannot be found or built, is not a decoder, or its weights do not match its configuration.
    """
    log.info("loading %s", settings.name)
    source, gguf = located(settings)
    settings = settings.model_copy(update={"revision": revision(settings)})
    config = from_pretrained(AutoConfig, settings)
    find = _finder(source, settings, config)
    where = f"{setting_of(settings)}: {settings.path or settings.embedded}"
    with torch.device("meta"):
        empty = build_empty(config, settings)
    checkpoint = gguf_checkpoint(Path(source) / gguf, empty, where) if gguf else open_checkpoint(find, where)
    matched = match(empty, checkpoint, find_blocks(empty, settings.blocks))
    dtype = getattr(config, "dtype", None) or checkpoint.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with init_empty_weights(include_buffers=False):
        model = build_empty(config, settings, dtype=dtype)
    model.eval().requires_grad_(False)
    if not gguf and (path := find("generation_config.json")) is not None:
        with outside_errors(f"{setting_of(settings)}: cannot load {path}"):
            model.generation_config = GenerationConfig.from_pretrained(path.parent)
    streamed = StreamedModel(model, checkpoint, find_blocks(model, settings.blocks), matched)
    return LoadedModel(model, protocol(settings, model), _warnings(streamed)), streamed


def extra_files(settings: ModelSettings) -> list[Path]:
    """Return the files beside a checkpoint that a saved model needs besides its weights, configuration and tokenizer.

    These are the configurations of image and sound processors, and the Python files of models with their own code in a local
    folder.
    """
    source, gguf = located(settings)
    if gguf:
        return []
    find = _finder(source, settings, from_pretrained(AutoConfig, settings))
    files = [path for name in PROCESSORS if (path := find(name)) is not None]
    own_code = settings.trust_remote_code and Path(source).is_dir()
    return files + (sorted(Path(source).glob("*.py")) if own_code else [])


def _warnings(streamed: StreamedModel) -> list[tuple[str, str]]:
    warnings = []
    if streamed.matched.unused:
        names = streamed.matched.unused
        detail = f"{len(names)} tensors of the checkpoint are not used by the model: {', '.join(names[:5])}"
        warnings.append(("unused_weights", detail))
    if streamed.untied:
        names = ", ".join(streamed.untied)
        detail = f"the configuration ties {names} to other weights, but the checkpoint stores different values, which are used"
        warnings.append(("untied_weights", detail))
    return warnings


def _finder(source: str, settings: ModelSettings, config: Any) -> Callable[[str], Path | None]:
    """Return a function that finds files of the model by name, in its folder or on the hub."""
    revision = getattr(config, "_commit_hash", None) or settings.revision

    def find(name: str) -> Path | None:
        with outside_errors(f"{setting_of(settings)}: cannot fetch {name} of {source!r}"):
            path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(path) if path is not None else None

    return find


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, key = name.rpartition(".")
    return model.get_submodule(owner)._parameters[key]


def _set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = value


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | {name: value for name, value in module.named_buffers() if value.is_meta}
