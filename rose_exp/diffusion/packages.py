"""Prune a denoiser with OBS-Diff's module packages: one package at a time, each calibrated by denoising all prompts once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..engine import InputMoments
from ..engine.groups import Structured
from ..models import LinearLayer, Structure
from ..pruning import LayerReport, PruningPlan
from ..pruning.plan import report_of, saved_numbers
from ..pruning.state import RunState
from ..pruning.structured import prune_structure
from .denoiser import Unit, tokens_of
from .sampling import Sampler

log = logging.getLogger(__name__)


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


@dataclass
class DenoiserWalk:
    """Prunes a denoiser package by package.

    Args:
        layers: prunable layers by name.
        packages: units that are pruned together; they contain only the layers of ``plan``.
        weights: function that returns the weight α_t of a step, given the step and the number of steps.
        structures: attention heads and neurons, for structured pruning.
    """

    sampler: Sampler
    layers: Mapping[str, LinearLayer]
    packages: Sequence[Sequence[Unit]]
    plan: PruningPlan
    prompts: Sequence[str]
    seeds: Sequence[int]
    weights: Callable[[int, int], float]
    structures: Sequence[Structure] = ()
    state: RunState | None = None
    on_layer: Callable[[int, LayerReport], None] = lambda _number, _report: None
    reports: list[LayerReport] = field(default_factory=list)
    facts: list[Package] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"calibrating": 0.0, "solving": 0.0})

    @torch.no_grad()
    def prune(self) -> list[LayerReport]:
        """Prune the denoiser in place, and resume from the saved state of an earlier process.

        Raises:
            RoseExpError: a layer cannot be pruned; the message names it.
            Interrupted: a signal requested a stop. The state contains all finished packages.
        """
        done = self.state.progress.blocks if self.state is not None else 0
        for index in range(done):
            self._holder(index).load_state_dict(self.state.block(index))
        if done:
            log.info("resuming after package %d of %d, which an earlier process has finished", done, len(self.packages))
            self._tell(self.state.reports)
            self.seconds.update(self.state.progress.seconds)
        for index in range(done, len(self.packages)):
            reports = self._package(index)
            if self.state is not None:
                self.state.commit(index, self._holder(index), [], reports, self.seconds)
            self._tell(reports)
        return self.reports

    def _tell(self, reports: Sequence[LayerReport]) -> None:
        for report in reports:
            self.on_layer(len(self.reports), report)
            self.reports.append(report)

    def _holder(self, index: int) -> nn.Module:
        """Return a module with all layers that pruning a package changes, to save and restore them."""
        names = [name for unit in self.packages[index] for name in unit.names]
        makers = [maker.layer.name for of in self._structures(index) for maker in of.makers]
        return nn.ModuleDict({name.replace(".", "/"): self.layers[name].module for name in dict.fromkeys([*names, *makers])})

    def _structures(self, index: int) -> list[Structure]:
        names = {name for unit in self.packages[index] for name in unit.names}
        return [structure for structure in self.structures if structure.consumers[0].layer.name in names]

    def _package(self, index: int) -> list[LayerReport]:
        start = time.perf_counter()
        cuda = next(self.sampler.denoiser.parameters()).is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        groups = [group for unit in self.packages[index] for group in unit.groups]
        moments = self._moments(groups, f"package {index + 1} of {len(self.packages)}")
        held = sum(of.gram.numel() * of.gram.element_size() for of in {id(of): of for of in moments.values()}.values())
        middle = time.perf_counter()
        reports: list[LayerReport] = []
        if isinstance(self.plan.sparsity, Structured):
            for own in moments.values():
                own.finish()
            for structure in self._structures(index):
                reports += prune_structure(structure, moments, self.plan)
        else:
            for group in groups:
                (own, *_) = [moments.pop(name) for name in group]
                own.finish()
                reports += self._solve([self.layers[name] for name in group], own)
                del own  # frees memory for the next group
        peak = torch.cuda.max_memory_allocated() if cuda else None
        end = time.perf_counter()
        self.seconds["calibrating"] += middle - start
        self.seconds["solving"] += end - middle
        self.facts.append(Package(index, [report.name for report in reports], middle - start, end - middle, held, peak))
        return reports

    def _moments(self, groups: Sequence[Sequence[str]], what: str) -> dict[str, InputMoments]:
        """Return the input moments by layer name, weighted by step; the layers of a group share one object."""
        found: dict[str, InputMoments] = {}
        alpha = 1.0

        def on_step(step: int, steps: int) -> None:
            nonlocal alpha
            alpha = self.weights(step, steps)

        def hook_of(layer: LinearLayer, moments: InputMoments):
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                moments.update(tokens_of(layer, args[0]), weight=alpha)

            return hook

        with ExitStack() as stack:
            stack.enter_context(self.sampler.steps(on_step))
            for group in groups:
                layer = self.layers[group[0]]
                moments = InputMoments(layer.columns, device=layer.weight.device, precision=self.plan.precision)
                found |= dict.fromkeys(group, moments)
                stack.callback(layer.module.register_forward_pre_hook(hook_of(layer, moments)).remove)
            for _ in self.sampler.run(self.prompts, self.seeds, what, decode=False):
                pass
        return found

    def _solve(self, group: Sequence[LinearLayer], moments: InputMoments) -> list[LayerReport]:
        start = time.perf_counter()
        results = self.plan.solve(group, moments)
        seconds = (time.perf_counter() - start) / sum(len(result.weight) for result in results)
        return [
            report_of(layer.name, result, moments.tokens, seconds * len(result.weight), saved)
            for layer, result, saved in zip(group, results, saved_numbers(results), strict=True)
        ]
