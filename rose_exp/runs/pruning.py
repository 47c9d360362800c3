"""Pruning of a model in memory according to settings. Runs of the command and :func:`rose_exp.prune` share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..models import linear_layers
from ..pruning import BlockWeights, LayerReport, PruneContext, chosen, events, prune_model, saved_and_total
from ..settings.pruning import PipelineSettings
from ..settings.schema import Settings
from .preparation import pruning_plan


def prune_language_model(model: nn.Module, tokens: Tensor, settings: Settings, context: PruneContext) -> list[LayerReport]:
    """Prune a language model in place, see :func:`rose_exp.pruning.prune_model`."""
    return prune_model(model, tokens, pruning_plan(settings), context)


def layer_events(reports: Sequence[LayerReport], settings: Settings) -> list[dict[str, Any]]:
    """Return the warnings for pruned layers, see :func:`rose_exp.pruning.events`."""
    engine, studied = settings.engine, settings.figures.study
    return [event for report in reports for event in events(report, engine.damping, engine.block_size, studied)]


def sparsity_of_blocks(weights: BlockWeights, reports: Mapping[str, Mapping[str, Any]], pipeline: PipelineSettings) -> float:
    """Return the fraction of parameters that need not be stored, over all layers that match the pipeline's patterns.

    Args:
        reports: reports of pruned layers by name, as in the run record.
    """
    blocks, saved, total = weights.blocks, 0, 0
    for index, block in enumerate(blocks.blocks):
        layers = linear_layers(block, blocks.block_name(index))
        layers = [layer for layer in layers if chosen(layer.name, pipeline.layers, pipeline.skip)]
        block_saved, block_total = saved_and_total(layers, reports, weights.at(index, "cpu"))
        saved, total = saved + block_saved, total + block_total
    return saved / total
