"""Pruning of a model that is already in memory, see :func:`rose_exp.prune`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import load_prompts
from ..models import BlockList, check_removable, find_blocks, needs_bos, remove_masked
from ..models.bos import checked_bos
from ..models.shapes import context_length, embedding_rows
from ..pruning import InMemory, LayerReport, PassSeconds, PruneContext
from ..runtime.errors import RoseExpError
from ..runtime.ranks import Ranks
from ..settings.schema import Settings
from .preparation import calibration_windows, check_window_lengths, find_device
from .pruning import layer_events, prune_language_model, sparsity_of_blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneReport:
    """What :func:`rose_exp.prune` has done.

    Attributes:
        label: name of the method and the options in effect.
        layers: report of every pruned layer, in pruning order.
        warnings: warnings, each with ``kind``, ``layer`` (None for the whole model) and ``detail``, as ``events`` in a run
            record; in addition, ``not_loadable`` if the configuration cannot describe the removed heads and neurons.
        sparsity: fraction of parameters that need not be stored, over all layers that match ``pipeline.layers``.
        seconds: time by kind of work.
    """

    label: str
    layers: list[LayerReport]
    warnings: list[dict[str, Any]]
    sparsity: float
    seconds: PassSeconds

    def __str__(self) -> str:
        return f"{self.label}: {len(self.layers)} layers pruned to a sparsity of {self.sparsity:.4f}"


def prune_in_memory(model: Any, calibration: Any, settings: Settings) -> PruneReport:
    """Prune a model in place, see :func:`rose_exp.prune`.

    Args:
        settings: settings for this kind of model, whose device is ``settings.device``.
    """
    job = _Job(settings)
    with job:
        if settings.model.kind == "diffusion":
            job.prune_pipeline(model, calibration)
        else:
            job.prune_language(model, calibration)
    events = [*job.warnings, *layer_events(job.reports, settings)]
    return PruneReport(settings.label, list(job.reports), events, job.sparsity, job.context.seconds)


def is_pipeline(model: Any) -> bool:
    """Return whether the model is a pipeline of diffusers."""
    return any(
        kind.__module__.startswith("diffusers.") and kind.__name__ == "DiffusionPipeline" for kind in type(model).__mro__
    )


def check_model(model: Any) -> None:
    """Check that a language model can be pruned in memory.

    Raises:
        RoseExpError: it is not a causal language model in plain weights on one device.
    """
    got = f"got {type(model).__name__}"
    if not isinstance(model, nn.Module):
        raise RoseExpError(f"model: expected a language model or a diffusers pipeline, {got}")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise RoseExpError(f"model: expected a decoder, {got}, an encoder-decoder, which is not supported")
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise RoseExpError(f"model: expected plain weights, {got} with quantized weights, which cannot be pruned")
    if getattr(model, "peft_config", None):
        raise RoseExpError(f"model: expected a model without adapters, {got} with adapters; merge them first")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise RoseExpError(f"model: expected a model with weights, {got} without any")
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise RoseExpError(f"model: expected all weights in memory, {got} without the values of {name}")
        if not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise RoseExpError(f"model: expected weights of a floating-point dtype, {got} with {kind} in {name}")
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        raise RoseExpError(f"model: expected all weights on one device, {got} on {', '.join(devices)}")


class _Job:
    """One call of :func:`prune_in_memory`. As a context, it restores the state of the random number generators."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.device = find_device(settings.device, Ranks())
        self.context = PruneContext(device=self.device, on_warning=self._warn)
        self.warnings: list[dict[str, Any]] = []
        self.reports: Sequence[LayerReport] = []
        self.sparsity = 0.0
        self.stack = ExitStack()

    def __enter__(self) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        self.stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(self.settings.seed)

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def _warn(self, kind: str, detail: str) -> None:
        self.warnings.append({"kind": kind, "layer": None, "detail": detail})
        log.warning("%s: %s", kind, detail)

    def prune_language(self, model: Any, calibration: Any) -> None:
        """Prune a language model on windows of tokens, or on windows that its tokenizer draws."""
        check_model(model)
        settings = self.settings
        blocks = find_blocks(model, settings.model.blocks)
        tokens = self._windows(model, calibration)
        _check_tokens(tokens, model)
        configurable = settings.removes and self._is_configurable(model, blocks)
        home = next(model.parameters()).device
        for module in model.modules():  # parts of a model can be in another mode than the model
            self.stack.callback(setattr, module, "training", module.training)
        self.stack.callback(model.to, home)
        model.eval().to("cpu")  # each block moves to the device while it is pruned
        self.reports = prune_language_model(model, tokens, settings, self.context)
        by_name = {report.name: report.as_dict() for report in self.reports}
        self.sparsity = sparsity_of_blocks(InMemory(blocks), by_name, settings.pipeline)
        if settings.removes:
            remove_masked(model, blocks, settings.sparsity.parsed, by_name, configurable)

    def _is_configurable(self, model: nn.Module, blocks: BlockList) -> bool:
        """Return whether the model's configuration can describe its layers after pruning; if not, warn."""
        try:
            check_removable(model, blocks, self.settings.sparsity.parsed)
        except RoseExpError as error:
            self._warn("not_loadable", f"a saved copy of the model cannot be loaded: {error}")
            return False
        return True

    def _windows(self, model: nn.Module, calibration: Any) -> Tensor:
        """Return the calibration windows, (windows, length) int64."""
        settings = self.settings
        if isinstance(calibration, Tensor):
            return calibration.cpu()
        check_window_lengths(settings, context_length(model.config))
        wanted = settings.model.bos
        if wanted == "auto":
            wanted = "windows" if needs_bos(model.config) else "tokenizer"
        return calibration_windows(settings, calibration, checked_bos(wanted, settings.model, calibration)).tokens

    def prune_pipeline(self, pipeline: Any, calibration: Any) -> None:
        """Prune the denoiser of a diffusers pipeline on prompts."""
        from .pipelines import package_pruner, remove_structures, sampler_of, select_layers  # requires diffusers

        settings = self.settings
        prompts = calibration
        if prompts is None:
            prompts = load_prompts(settings.calibration.prompts, "calibration").texts
        sampler = sampler_of(pipeline, settings)
        sampler.rehearse(decode=False)
        selection = select_layers(sampler, settings)
        self.reports = package_pruner(sampler, selection, list(prompts), settings, self.context).run()
        self.sparsity = selection.sparsity({report.name: report.as_dict() for report in self.reports})
        remove_structures(pipeline, selection, settings)


def _check_tokens(tokens: Tensor, model: nn.Module) -> None:
    """Check the shape and the values of calibration windows.

    Raises:
        RoseExpError: they do not fit the model.
    """
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2 or tokens.dtype != torch.int64:
        kind = str(tokens.dtype).removeprefix("torch.")
        raise RoseExpError(
            f"calibration: expected int64 tokens of shape (windows, length) with a length of at least 2, got {kind} of shape "
            f"{tuple(tokens.shape)}"
        )
    config = getattr(model, "config", None)
    longest = context_length(config) if config is not None else None
    if longest is not None and tokens.shape[1] > longest:
        raise RoseExpError(
            f"calibration: expected windows of at most {longest} tokens, the model's maximum sequence length, got "
            f"{tokens.shape[1]}"
        )
    rows = embedding_rows(model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (rows is not None and high >= rows):
        expected = f"from 0 to {rows - 1}" if rows is not None else "of at least 0"
        raise RoseExpError(f"calibration: expected token IDs {expected}, got {low if low < 0 else high}")
