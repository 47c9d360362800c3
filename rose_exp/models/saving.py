"""Saving a pruned model as a standard Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..runtime.errors import RoseExpError
from ..runtime.files import scratch_folder, written
from ..runtime.outside import outside_errors
from .blocks import find_blocks
from .checkpoint import INDEX, open_checkpoint
from .matching import match
from .streaming import StreamedModel


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sparsity: Mapping[str, Any] | None = None,
    extra: Sequence[Path] = (),
    card: str | None = None,
) -> Path:
    """Write safetensors, configuration and tokenizer to ``folder`` atomically.

    Zeros are stored explicitly: the folder is as large as the dense model's, and loads like any other.

    Args:
        sparsity: ``quantization_config`` for ``config.json``, see :func:`sparsity_description`.
        extra: files to copy, unless saving writes files of their names.
        card: contents of ``README.md``.

    Raises:
        RoseExpError: ``folder`` already exists, or writing fails.
    """
    with whole_or_not(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _copy(extra, scratch)
        write_card(scratch, card)
        _check_complete(model, scratch)
        _describe(scratch, sparsity)
    return folder


def save_streamed(
    streamed: StreamedModel,
    block_at: Callable[[int, str], AbstractContextManager[nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sparsity: Mapping[str, Any] | None = None,
    extra: Sequence[Path] = (),
    card: str | None = None,
) -> Path:
    """Save a model whose blocks come from ``block_at(index, device)``, like :func:`save_model`, with one shard per block.

    Raises:
        RoseExpError: as for :func:`save_model`.
    """
    model, blocks = streamed.model, streamed.blocks
    total = len(blocks.blocks) + 1
    with whole_or_not(folder) as scratch:
        weight_map: dict[str, str] = {}
        size = 0
        for number, tensors in enumerate(tqdm(_parts(streamed, block_at), "saving", total, unit="shard", disable=None), 1):
            shard = f"model-{number:05}-of-{total:05}.safetensors"
            shard_tensors = {name: value.contiguous() for name, value in _revert_conversions(model, tensors).items()}
            save_file(shard_tensors, scratch / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(shard_tensors, shard)
            size += sum(value.numel() * value.dtype.itemsize for value in shard_tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (scratch / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        if model._auto_class is not None:  # a class with its own code, which transformers copies and names in the configuration
            custom_object_save(model, scratch, config=model.config)
        model.config.save_pretrained(scratch)
        if model.can_generate():
            model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _copy(extra, scratch)
        write_card(scratch, card)
        _check_complete(model, scratch, blocks.name)
        _describe(scratch, sparsity)
    return folder


def write_card(folder: Path, card: str | None) -> None:
    """Write the model card, if there is one."""
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that transformers can save everything but the weights, such as a generation configuration that it has loaded.

    Raises:
        RoseExpError: saving fails.
    """
    with scratch_folder() as scratch:
        with outside_errors("save: transformers cannot save the configuration of the model"):
            model.config.save_pretrained(scratch)
            if model.can_generate():
                model.generation_config.save_pretrained(scratch)
        with outside_errors("save: transformers cannot save the tokenizer of the model"):
            tokenizer.save_pretrained(scratch)


def sparsity_description(pattern: str, share: float, targets: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
    """Return the compressed-tensors description of a model with N:M sparsity and explicitly stored zeros.

    vLLM before 0.24, which removed its sparse kernels, recognizes such a model. Later versions reject it, and so does
    transformers without the compressed-tensors package.

    Args:
        share: fraction of zeros in the pruned layers.
        targets: module classes.
        left_out: names of modules of these classes that are not pruned.
    """
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "ignore": [],
        "sparsity_config": {
            "format": "dense",
            "global_sparsity": share,
            "sparsity_structure": pattern,
            "registry_requires_subclass": False,
            "targets": list(targets),
            "ignore": list(left_out),
        },
    }


def _parts(
    streamed: StreamedModel, block_at: Callable[[int, str], AbstractContextManager[nn.Module]]
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each block by full name, then all others; tied tensors occur once."""
    blocks = streamed.blocks
    for index in range(len(blocks.blocks)):
        with block_at(index, "cpu") as block:
            yield {f"{blocks.block_name(index)}.{name}": value for name, value in block.state_dict().items()}
    named = dict(streamed.model.named_parameters())  # contains tied tensors once
    buffers = {name: value for name, value in streamed.model.state_dict().items() if name not in named and not value.is_meta}
    tied = {value.data_ptr() for value in named.values() if not value.is_meta}
    rest = named | {name: value for name, value in buffers.items() if value.data_ptr() not in tied}
    yield {name: value.detach().to("cpu") for name, value in rest.items() if not streamed.inside(name)}


def _revert_conversions(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Revert transformers' conversions, such as stacked experts, to the names and shapes used in files."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def _check_complete(model: PreTrainedModel, folder: Path, blocks: str | None = None) -> None:
    """Check that the weights of a saved model match its saved configuration.

    Raises:
        RoseExpError: they do not match; the message names the tensors.
    """
    config = type(model.config).from_pretrained(folder)
    with torch.device("meta"):
        empty = type(model)._from_config(config)
    checkpoint = open_checkpoint(lambda name: path if (path := folder / name).exists() else None, "save")
    match(empty, checkpoint, find_blocks(empty, blocks))


def _copy(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)  # without the permissions of caches


def _describe(folder: Path, sparsity: Mapping[str, Any] | None) -> None:
    if sparsity is None:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": dict(sparsity)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole_or_not(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``folder`` once everything is written."""
    if folder.exists():
        raise RoseExpError(f"save: expected a folder that does not exist, got {folder}")
    try:
        with written(folder) as place:
            place.mkdir()
            yield place
    except (OSError, SafetensorError) as error:
        raise RoseExpError(f"save: cannot write the model to {folder}: {error}") from error
