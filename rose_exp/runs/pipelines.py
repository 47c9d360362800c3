"""Pruning of a diffusion pipeline in memory according to settings. Runs of the command and :func:`rose_exp.prune` share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..diffusion.denoiser import Unit, candidate_layers, check_recurrent, check_stacked, find_units, split_into_packages
from ..diffusion.narrowed import key_of, remove_masked
from ..diffusion.packages import PackagePruner
from ..diffusion.sampling import Sampler, noise_seeds
from ..models import LinearLayer, Structure
from ..pruning import PruneContext, chosen, saved_and_total
from ..pruning.plan import check_patterns
from ..pruning.structured import check_structures, wanted_structures
from ..runtime.errors import RoseExpError
from ..settings.schema import Settings
from .preparation import pruning_plan


@dataclass(frozen=True)
class Selection:
    """The layers of a denoiser that settings select.

    Attributes:
        layers: all layers that the denoiser calls, by name.
        chosen: names of the layers that match the pipeline's patterns.
        uncalled: names of layers that match the patterns, but that the denoiser does not call; they stay dense.
        structures: for structured sparsity, the heads and neurons to prune.
        packages: the layers to prune; those of a package are pruned together. Empty for a dense model.
    """

    layers: Mapping[str, LinearLayer]
    chosen: Sequence[str]
    uncalled: Sequence[str] = ()
    structures: Sequence[Structure] = ()
    packages: Sequence[Sequence[Unit]] = field(default_factory=list)

    def sparsity(self, reports: Mapping[str, Mapping[str, Any]]) -> float:
        """Return the fraction of the chosen layers' parameters that need not be stored.

        Args:
            reports: reports of pruned layers by name, as in the run record.
        """
        saved, total = saved_and_total([self.layers[name] for name in self.chosen], reports)
        return saved / total


def sampler_of(pipeline: Any, settings: Settings) -> Sampler:
    """Return the pipeline with the sampling options of the settings.

    Raises:
        RoseExpError: the pipeline does not support an option.
    """
    options = settings.diffusion
    sampler = Sampler(
        pipeline,
        steps=options.steps,
        guidance=options.guidance,
        size=options.size,
        text_length=options.text_length,
        batch=options.batch,
    )
    if sampler.ignored:
        raise RoseExpError(
            f"diffusion: expected null for {', '.join(sampler.ignored)}, which {type(pipeline).__name__} does not support, got "
            "a value"
        )
    return sampler


def select_layers(sampler: Sampler, settings: Settings) -> Selection:
    """Find the layers of a denoiser, and divide those to prune into packages.

    Raises:
        RoseExpError: a pattern matches no layer, no layer is left to prune, or weights to prune are in no layer or in a
            recurrent one.
    """
    denoiser, pipeline = sampler.denoiser, settings.pipeline
    candidates = candidate_layers(denoiser, settings.diffusion.convolutions)
    with torch.no_grad():
        layout = find_units(denoiser, sampler.first_call("a photograph"), candidates)
    called = {name for unit in layout.units for name in unit.names}
    layers = {layer.name: layer for layer in candidates if layer.name in called}

    def wanted(name: str) -> bool:
        return settings.pruned and chosen(name, pipeline.layers, pipeline.skip)

    check_recurrent(layout, wanted)
    others = [*layout.recurrent, *layout.uncalled, *check_stacked(denoiser, wanted)]
    check_patterns("pipeline.layers", pipeline.layers, [*layers, *others])
    check_patterns("pipeline.skip", pipeline.skip, [*layers, *others])
    names, uncalled = (
        [name for name in found if chosen(name, pipeline.layers, pipeline.skip)] for found in (layers, layout.uncalled)
    )
    if not settings.pruned:
        return Selection(layers, names)
    pruned, plan, structures = set(names), pruning_plan(settings), []
    if plan.structured:
        structures = wanted_structures(denoiser, "", plan)
        check_structures(structures, plan.sparsity)
        pruned = {part.layer.name for structure in structures for part in structure.consumers}
    if not pruned:
        raise RoseExpError("pipeline.layers, pipeline.skip: expected patterns that select a layer, got none")
    pruned_units = [
        Unit(tuple(kept for group in unit.groups if (kept := tuple(n for n in group if n in pruned)))) for unit in layout.units
    ]
    packages = split_into_packages([unit for unit in pruned_units if unit.groups], settings.diffusion.packages)
    return Selection(layers, names, uncalled, structures, packages)


def package_pruner(
    sampler: Sampler, selection: Selection, prompts: Sequence[str], settings: Settings, context: PruneContext
) -> PackagePruner:
    """Return the pruner of a denoiser. Its calibration images use the prompts and the noise of ``settings.seed``."""
    context.warn("left_dense", selection.uncalled, "each is not called by the denoiser")
    return PackagePruner(
        sampler,
        selection.layers,
        selection.packages,
        pruning_plan(settings),
        prompts if sampler.conditioned else [""] * len(prompts),
        noise_seeds(settings.seed, len(prompts)),
        lambda step, steps: settings.diffusion.weights(steps)[step],
        context,
    )


def remove_structures(pipeline: Any, selection: Selection, settings: Settings) -> None:
    """Remove the pruned heads and neurons from a pipeline, so that its layers shrink."""
    if settings.pruned and selection.structures:
        sparsity = settings.sparsity.parsed
        remove_masked(pipeline, {key_of(structure): sparsity.count(structure.groups) for structure in selection.structures})
