"""Pruning of a denoiser with OBS-Diff's module packages: each is calibrated by denoising all prompts once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..engine import InputMoments
from ..models import LinearLayer
from ..pruning import LayerReport, PruneContext, PruningPlan
from ..pruning.collect import Calibration, Clock, GroupInputs
from ..pruning.components import components_for
from ..pruning.loop import Pruner
from ..pruning.unit import Unit
from ..runtime.errors import RoseExpError
from . import denoiser
from .denoiser import input_of, tokens_of
from .reconstruction import DenoiserReconstruction
from .sampling import Sampler

StepWeights = Callable[[int, int], float]
"""Returns the weight α_t of a step, given the step and the number of steps."""


@dataclass(frozen=True)
class Package:
    """Time and memory that pruning a package took, for the run record.

    Packages that an earlier process has finished are not included.

    Attributes:
        index: position among all packages.
        layers: names of the pruned layers.
        calibrating, solving: seconds.
        moments_bytes: size of all Hessians held at once.
        peak_bytes: peak memory of the device during calibration and pruning; None on a CPU.
    """

    index: int
    layers: list[str]
    calibrating: float
    solving: float
    moments_bytes: int
    peak_bytes: int | None


class PackagePruner(Pruner):
    """Prunes a denoiser in place, package by package.

    Args:
        layers: prunable layers by name.
        packages: units that are pruned together; they contain only layers to prune.
        prompts, seeds: prompts and noise seeds of the calibration images.
        weights: weights of the denoising steps in the Hessian.

    Attributes:
        facts: time and memory of each package.
        reconstruction: training of the pruned blocks, or None.
    """

    kind = "package"

    def __init__(
        self,
        sampler: Sampler,
        layers: Mapping[str, LinearLayer],
        packages: Sequence[Sequence[denoiser.Unit]],
        plan: PruningPlan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        weights: StepWeights,
        context: PruneContext | None = None,
    ):
        if plan.true_sequential:
            raise RoseExpError("pipeline.true_sequential: expected false for a diffusion model, got true")
        context = replace(context or PruneContext(), first_block=None)  # its key does not cover the options of sampling
        components = components_for(replace(plan, reconstruction=None), context)
        self.reconstruction = DenoiserReconstruction(plan.reconstruction, context) if plan.reconstruction else None
        super().__init__(plan, context, [*components, self.reconstruction] if self.reconstruction else components)
        self.sampler, self.layers, self.packages = sampler, layers, packages
        self.prompts, self.seeds, self.weights = prompts, seeds, weights
        self.facts: list[Package] = []
        self.moments_bytes = 0
        self.check(layers[name] for package in packages for unit in package for name in unit.names)

    def modules(self) -> Iterator[tuple[nn.Module, str]]:
        yield self.sampler.denoiser, ""

    @property
    def units(self) -> int:
        return len(self.packages)

    @contextmanager
    def unit(self, index: int) -> Iterator[Unit]:
        groups = [[self.layers[name] for name in group] for part in self.packages[index] for group in part.groups]
        name = f"package {index + 1} of {len(self.packages)}"
        yield Unit(index, name, self.sampler.denoiser, "", self.plan, self.layers, groups)

    def prune_unit(self, unit: Unit) -> list[LayerReport]:
        seconds, cuda = self.context.seconds, next(self.sampler.denoiser.parameters()).is_cuda
        calibrating, solving = seconds.calibrating + seconds.moments, seconds.solving
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        reports = super().prune_unit(unit)
        self.facts.append(
            Package(
                unit.index,
                [report.name for report in reports],
                seconds.calibrating + seconds.moments - calibrating,
                seconds.solving - solving,
                self.moments_bytes,
                torch.cuda.max_memory_allocated() if cuda else None,
            )
        )
        if self.reconstruction is None:
            return reports
        return [replace(report, reconstruction=self.reconstruction.ratio_of(report.name)) for report in reports]

    def calibrate(self, unit: Unit, calibration: Calibration) -> list[GroupInputs]:
        collected = self.collect_moments(calibration.groups, unit.name, calibration.clock)
        self.moments_bytes = sum(moments.gram.numel() * moments.gram.element_size() for moments in collected)
        return [GroupInputs(moments) for moments in collected]

    def collect_moments(self, groups: Sequence[Sequence[LinearLayer]], what: str, clock: Clock) -> list[InputMoments]:
        """Return the input moments of each group, weighted by step, from one denoising of all prompts.

        Args:
            what: name of the progress bar.
        """
        collected: list[InputMoments] = []
        alpha = 1.0

        def on_step(step: int, steps: int) -> None:
            nonlocal alpha
            alpha = self.weights(step, steps)

        def hook_of(layer: LinearLayer, moments: InputMoments) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                with clock:
                    moments.update(tokens_of(layer, input_of(args, kwargs)), weight=alpha)

            return hook

        with ExitStack() as stack:
            stack.enter_context(self.sampler.steps(on_step))
            for layer, *_ in groups:
                moments = InputMoments(layer.columns, device=layer.weight.device, precision=self.plan.precision)
                collected.append(moments)
                stack.callback(layer.module.register_forward_pre_hook(hook_of(layer, moments), with_kwargs=True).remove)
            for _ in self.sampler.run(self.prompts, self.seeds, what, decode=False):
                pass
        return collected

    def commit(self, unit: Unit, reports: Sequence[LayerReport]) -> None:
        self.context.state.commit(unit.index, self._changed_modules(unit), [], reports, vars(self.context.seconds))

    def restore(self, count: int) -> None:
        for index in range(count):
            with self.unit(index) as unit:
                for component in self.components:
                    component.before_unit(unit)
                self._changed_modules(unit).load_state_dict(self.context.state.block(index))

    def _changed_modules(self, unit: Unit) -> nn.Module:
        """Return a module with all layers that pruning a package changes."""
        names = {layer.name for group in unit.groups for layer in group}
        changed = names | self.changed_with(unit, names)
        if self.reconstruction is not None:
            blocks = self.reconstruction.completed(unit.index)
            changed = {name for name in changed if not name.startswith(tuple(f"{block}." for block in blocks))} | set(blocks)
        return nn.ModuleDict({name.replace(".", "/"): unit.module.get_submodule(name) for name in sorted(changed)})
