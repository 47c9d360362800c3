"""Mapping the tensors of a checkpoint to those of a model.

transformers provides the mapping itself (renamed, stacked and split tensors). :func:`match` applies it to empty tensors before
any weight is read, and rejects a checkpoint that does not match its configuration. :func:`fill` applies it to the weights.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..engine.pieces import aligned
from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors
from .blocks import BlockList
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Match:
    """How a checkpoint fills a model.

    Attributes:
        outside: checkpoint names of the tensors outside the blocks.
        of_block: checkpoint names of the tensors of each block, by block index.
        places: model name of the target of each tensor of the checkpoint.
        missing: model names of tensors that the checkpoint omits because they are tied to others.
        tied_blocks: model names of such tensors inside the blocks, and of the tensors they are tied to, in another block.
        unused: checkpoint names of tensors outside the blocks that the model does not have.
        conversions: transformers' conversions that the checkpoint needs; saving reverts them.
    """

    outside: list[str] = field(default_factory=list)
    of_block: dict[int, list[str]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    tied_blocks: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    conversions: Any = None


def match(model: PreTrainedModel, checkpoint: Checkpoint, blocks: BlockList) -> Match:
    """Map a checkpoint to a model.

    Args:
        model: a model on the meta device, built from its configuration. It cannot be used afterwards.
        blocks: the blocks of the model.

    Raises:
        RoseExpError: a tensor is missing and not tied to another, has an unexpected shape, is unexpected inside a block, is
            quantized, or occurs twice. The message names the tensors.
    """
    expected = {name: value.shape for name, value in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places, renamed = _places(model, checkpoint.names, expected, checkpoint.where)
    problems = [*_quantized(checkpoint, places, parameters), *_duplicates({name: places[name] for name in renamed})]
    problems += _gaps(checkpoint.names)
    empty = {
        name: torch.empty(shape if shape is not None else expected.get(places[name], ()), dtype=dtype, device="meta")
        for name, (dtype, shape) in checkpoint.tensors.items()
    }
    info = convert(model, empty, "meta", checkpoint.where)
    problems += [f"{name}: {reason}" for name, reason in dict(info.conversion_errors).items()] + list(info.error_msgs)
    problems += [
        f"expected {name} of shape {tuple(configured)} according to the configuration, got {tuple(actual)}"
        for name, actual, configured in sorted(info.mismatched_keys)
    ]
    missing = _not_tied(model, set(info.missing_keys))
    if missing:
        problems.append(f"the checkpoint has no {_few(missing)}")
    unexpected, in_blocks = _unexpected(model, checkpoint, info.unexpected_keys, blocks)
    if in_blocks:
        problems.append(
            f"the checkpoint contains {_few(in_blocks)}, which the model described by its configuration does not have"
        )
    if problems:
        raise RoseExpError(f"{checkpoint.where}: the weights do not fit the configuration: {'; '.join(problems)}")
    outside, by_block = _by_block(places, blocks)
    absent, conversions = set(info.missing_keys), getattr(model, "_weight_conversions", None)
    tied_blocks = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target in absent and blocks.index_of(target) is not None and blocks.index_of(source) is not None
    }
    return Match(outside, by_block, places, absent, tied_blocks, unexpected, conversions)


def fill(model: PreTrainedModel, checkpoint: Checkpoint, names: Sequence[str], matched: Match) -> None:
    """Read tensors of a checkpoint into a model that :func:`match` has accepted.

    Every tensor gets its own memory that starts on a cache line, so that results depend neither on later changes of the file
    nor on its layout.

    Raises:
        RoseExpError: a tensor holds NaN or infinity, or a file cannot be read.
    """
    if not names:
        return
    with checkpoint.read(names) as tensors:
        info = convert(model, tensors, "cpu", checkpoint.where)
        if info.mismatched_keys or info.error_msgs or info.conversion_errors:
            problems = [*info.mismatched_keys, *info.error_msgs, *dict(info.conversion_errors).items()]
            raise RoseExpError(f"{checkpoint.where}: the weights do not fit the configuration: {problems[:3]}")
        model._weight_conversions = matched.conversions  # those of the whole checkpoint, not of this part
        for name in set(model.state_dict()) - set(info.missing_keys):
            _own_tensor(model, name, checkpoint.where)


def tie(model: PreTrainedModel, matched: Match) -> list[str]:
    """Tie the weights that the configuration ties, as transformers does when it loads a checkpoint.

    If the checkpoint contains only one tensor of a pair, the other is tied to it. If it contains both and they are equal, they
    are tied. If they differ, both keep their stored values, and the configuration is corrected so that the saved model loads
    correctly.

    Returns:
        Names of tensors that the configuration ties to others, but that the checkpoint stores with different values.
    """
    before = dict(model.all_tied_weights_keys)
    model.tie_weights(missing_keys=set(matched.missing), recompute_mapping=False)
    untied = [name for name in before if name not in model.all_tied_weights_keys]
    if untied:
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    return untied


def tie_again(model: PreTrainedModel) -> None:
    """Tie the weights again that :func:`tie` tied, after they were moved individually."""
    model.tie_weights(recompute_mapping=False)


def convert(model: PreTrainedModel, tensors: dict[str, Any], device: str, where: str) -> Any:
    """Rename, stack and cast checkpoint tensors into a model with transformers' own function.

    The function is not public, and its parameters vary within version 5. Only parameters that the installed version knows are
    passed.

    Args:
        where: name and value of the setting that selects the checkpoint, for error messages.

    Returns:
        transformers' report of missing, unexpected and mismatched tensors.

    Raises:
        RoseExpError: transformers cannot read or convert a tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    plan = model._get_dtype_plan(model.dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan
    settings = {"dtype": model.dtype, "dtype_plan": plan, "weight_mapping": get_model_conversion_mapping(model)}
    settings["device_map"] = {"": torch.device(device)}
    config = LoadStateDictConfig(**_supported(LoadStateDictConfig, settings))
    arguments = {"model": model, "state_dict": tensors, "load_config": config, "tp_plan": None, "dtype_plan": plan}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # otherwise one is shown for each block
    try:
        with outside_errors(f"{where}: cannot read the weights"):
            result = convert_and_load_state_dict_in_model(**_supported(convert_and_load_state_dict_in_model, arguments))
    finally:
        if shown:
            logging.enable_progress_bar()
    return result[0]


def _supported(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def _places(
    model: PreTrainedModel, names: Iterable[str], expected: dict[str, torch.Size], where: str
) -> tuple[dict[str, str], list[str]]:
    """Return the model name of each checkpoint tensor's target, and the checkpoint tensors that are only renamed.

    If a tensor has several targets, the first one counts. Tensors that are stacked or split are not among the renamed ones.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    arguments = {
        "weight_renamings": [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        "weight_converters": [entry for entry in mapping if isinstance(entry, WeightConverter)],
        "base_model_prefix": model.base_model_prefix,
        "prefix": model.base_model_prefix,
        "meta_state_dict": model.state_dict(),
    }
    arguments = _supported(rename_source_key, arguments)
    with outside_errors(f"{where}: transformers cannot map the names of the tensors"):
        renamed_keys = {name: rename_source_key(name, **arguments) for name in names}
    places = {name: name if place not in expected and name in expected else place for name, (place, _) in renamed_keys.items()}
    return places, [name for name, (_, converter) in renamed_keys.items() if converter is None and places[name] in expected]


def _quantized(checkpoint: Checkpoint, places: dict[str, str], parameters: set[str]) -> list[str]:
    floating = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    quantized = [
        (n, dtype) for n, (dtype, _) in checkpoint.tensors.items() if places[n] in parameters and dtype not in floating
    ]
    if not quantized:
        return []
    name, dtype = quantized[0]
    kind = str(dtype).removeprefix("torch.")
    return [
        f"expected weights of 16, 32 or 64 bits, got {name} of {kind} (and {len(quantized) - 1} more): a quantized checkpoint"
    ]


def _duplicates(places: dict[str, str]) -> list[str]:
    """Describe checkpoint tensors with the same target, of which one would silently overwrite the other."""
    seen: dict[str, str] = {}
    problems = []
    for name, place in places.items():
        if place in seen:
            problems.append(f"the checkpoint has both {seen[place]} and {name} for {place}")
        seen.setdefault(place, name)
    return problems


def _gaps(names: Iterable[str]) -> list[str]:
    """Describe gaps in the numbering of experts, which stacking would silently close."""
    experts: dict[str, dict[int, str]] = {}
    for name in names:
        expert = re.search(r"\bexperts\.(\d+)\.", name)
        if expert:
            experts.setdefault(name[: expert.start(1)] + name[expert.end(1) :], {})[int(expert[1])] = name
    problems = []
    for numbered in experts.values():
        last = max(numbered)
        absent = next((number for number in range(last) if number not in numbered), None)
        if absent is not None:
            other = numbered[last].replace(f"experts.{last}.", f"experts.{absent}.")
            problems.append(f"the checkpoint has {numbered[last]} but not {other}")
    return problems[:3]


def _not_tied(model: PreTrainedModel, missing: set[str]) -> list[str]:
    """Return missing tensors that are neither tied to a present one nor allowed to be missing by the model's class."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    filled = {name for group in groups.values() if not group <= missing for name in group}
    unfilled = sorted(missing - filled)
    buffers = {name for name, _ in model.named_buffers()}
    patterns = model._keys_to_ignore_on_load_missing or []
    return [n for n in unfilled if not (n in buffers and any(re.search(pattern, n) for pattern in patterns))]


def _unexpected(
    model: PreTrainedModel, checkpoint: Checkpoint, unexpected: Iterable[str], blocks: BlockList
) -> tuple[list[str], list[str]]:
    """Return unexpected tensors outside and inside the blocks, without those that the model's class ignores."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or [])
    patterns += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$"]  # buffers stored by older versions
    names = [name for name in unexpected if not any(re.search(pattern, name) for pattern in patterns)]
    lists = blocks.name.split(",")
    ends = "|".join({re.escape(name.rpartition(".")[2]) for name in lists})
    listed = re.compile(rf"(^|\.)({ends})\.\d+\.|^blk\.\d+\.")
    parents = tuple(f"{name.rpartition('.')[0]}." for name in lists)
    inside = {n for n in names if listed.search(n) and (n.startswith(parents) or not _is_other_modality(n))}
    inside |= {name for name in checkpoint.unmapped if listed.search(name)}
    return sorted({*names, *checkpoint.unmapped} - inside), sorted(inside)


def _is_other_modality(name: str) -> bool:
    """Return whether a tensor belongs to another modality of the model, such as a vision tower that is not built."""
    return bool(re.search(r"(^|\.)(vision|visual|audio|speech|image)[a-z_]*\.", name))


def _by_block(places: dict[str, str], blocks: BlockList) -> tuple[list[str], dict[int, list[str]]]:
    """Split the names of checkpoint tensors into those outside the blocks and those of each block."""
    outside: list[str] = []
    by_block: dict[int, list[str]] = {}
    for name, place in places.items():
        index = blocks.index_of(place)
        if index is None:
            outside.append(name)
        else:
            by_block.setdefault(index, []).append(name)
    return outside, by_block


def _own_tensor(model: nn.Module, name: str, where: str) -> None:
    """Give a loaded tensor its own memory, and check that it is finite.

    Single numbers can be infinite, such as the bounds of clipped activations in Gemma 4.
    """
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    tensors = module._parameters if key in module._parameters else module._buffers
    tensor = tensors.get(key)
    if tensor is None or tensor.is_meta:
        return
    value = tensor.detach()
    bounds = torch.stack(torch.aminmax(value)) if value.is_floating_point() and value.numel() else torch.zeros(())
    if bounds.isnan().any() or (value.ndim and bounds.isinf().any()):
        raise RoseExpError(f"{where}: expected finite weights, got NaN or infinity in {name}")
    owned = own_memory(value)
    if isinstance(tensor, nn.Parameter):
        tensors[key] = nn.Parameter(owned, requires_grad=False)
    else:
        tensors[key] = owned


def own_weights(model: nn.Module, where: str) -> None:
    """Give every tensor of a model its own memory, and check that it is finite.

    Raises:
        RoseExpError: a tensor contains NaN or infinity; the message names it.
    """
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        _own_tensor(model, name, where)


def own_memory(value: Tensor) -> Tensor:
    """Return ``value``, copied if it is part of a larger storage, such as a file, or not aligned to a cache line."""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return aligned(value) if whole else value.clone(memory_format=torch.contiguous_format)


def _few(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
