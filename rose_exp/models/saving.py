"""Writing a pruned model as a plain Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
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

from ..runtime.errors import RoseExpError
from .blocks import find_blocks
from .checkpoint import INDEX, open_checkpoint
from .matching import match
from .streaming import StreamedModel


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, sparsity: Mapping[str, Any] | None = None
) -> Path:
    """Write safetensors, configuration and tokenizer to ``folder``, whole or not at all.

    The zeros are stored as they are: the folder is no smaller than the dense model's, and loads like any other.

    Args:
        sparsity: what ``config.json`` says as ``quantization_config``; see :func:`sparsity_description`.

    Raises:
        RoseExpError: ``folder`` exists already, or the disk refuses.
    """
    with whole_or_not(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _check_complete(model, scratch)
        _describe(scratch, sparsity)
    return folder


def save_streamed(
    streamed: StreamedModel,
    block_at: Callable[[int, str], AbstractContextManager[nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sparsity: Mapping[str, Any] | None = None,
) -> Path:
    """What :func:`save_model` writes, a shard a block, of a model whose blocks come from ``block_at(index, device)``.

    Raises:
        RoseExpError: as :func:`save_model`.
    """
    model, blocks = streamed.model, streamed.blocks
    total = len(blocks.blocks) + 1
    with whole_or_not(folder) as scratch:
        weight_map: dict[str, str] = {}
        size = 0
        for number, tensors in enumerate(tqdm(_parts(streamed, block_at), "saving", total, unit="shard", disable=None), 1):
            shard = f"model-{number:05}-of-{total:05}.safetensors"
            held = {name: value.contiguous() for name, value in _as_in_files(model, tensors).items()}
            save_file(held, scratch / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(held, shard)
            size += sum(value.numel() * value.dtype.itemsize for value in held.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (scratch / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(scratch)
        if model.can_generate():
            model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _check_complete(model, scratch, blocks.name)
        _describe(scratch, sparsity)
    return folder


def sparsity_description(pattern: str, share: float, targets: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
    """How compressed-tensors called a model with N:M zeros that are stored as they are.

    Readers that still honour it (vLLM before 0.24, which removed its sparse kernels) take such a model for what it is; later
    ones, and transformers without that package, refuse it.

    Args:
        share: of zeros among the pruned layers.
        targets: classes of modules.
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
    """Tensors of each block by their full names, then those of the rest, each once though the model uses it twice."""
    blocks = streamed.blocks
    for index in range(len(blocks.blocks)):
        with block_at(index, "cpu") as block:
            yield {f"{blocks.block_name(index)}.{name}": value for name, value in block.state_dict().items()}
    named = dict(streamed.model.named_parameters())  # what is tied stands here once
    buffers = {name: value for name, value in streamed.model.state_dict().items() if name not in named and not value.is_meta}
    tied = {value.data_ptr() for value in named.values() if not value.is_meta}
    rest = named | {name: value for name, value in buffers.items() if value.data_ptr() not in tied}
    yield {name: value.detach().to("cpu") for name, value in rest.items() if not streamed.inside(name)}


def _as_in_files(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes that transformers gives a model's tensors in files; in memory it stacks experts, for one."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def _check_complete(model: PreTrainedModel, folder: Path, blocks: str | None = None) -> None:
    """Check that the files of a saved model fill the model that its saved configuration describes.

    Raises:
        RoseExpError: they do not; the message names the tensors.
    """
    config = type(model.config).from_pretrained(folder)
    with torch.device("meta"):
        empty = type(model)._from_config(config)
    checkpoint = open_checkpoint(lambda name: path if (path := folder / name).exists() else None, "save")
    match(empty, checkpoint, find_blocks(empty, blocks))


def _describe(folder: Path, sparsity: Mapping[str, Any] | None) -> None:
    if sparsity is None:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": dict(sparsity)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole_or_not(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place once all is written."""
    if folder.exists():
        raise RoseExpError(f"save: {folder} exists already, and is not written over")
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise RoseExpError(f"save: cannot write the model to {folder}: {error}") from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch)
