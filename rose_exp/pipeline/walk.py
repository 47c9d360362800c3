"""The walk through a model: for each block a dense pass that collects moments, pruning, and a pass with the pruned weights
that makes the next block's inputs."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engine import (
    InputMoments,
    NotPositiveDefiniteError,
    PruneResult,
    prune_layers,
)
from ..engine.study import LayerStudy, study_layer
from ..errors import RoseExpError
from ..models import BlockList, LinearLayer, find_blocks, linear_layers
from ..ranks import Ranks
from .activations import Activations
from .capture import BlockCall, Enough, Probe, on_device, probe, trace
from .first_block import FirstBlock
from .plan import LayerReport, PassSeconds, PruningPlan, check_plan

log = logging.getLogger(__name__)


@torch.no_grad()
def prune_model(
    model: nn.Module,
    tokens: Tensor,
    plan: PruningPlan,
    device: torch.device | str = "cpu",
    on_layer: Callable[[int, LayerReport], None] | None = None,
    ranks: Ranks | None = None,
    scratch: Path | None = None,
    seconds: PassSeconds | None = None,
    on_study: Callable[[str, LayerStudy], None] | None = None,
    first_block: FirstBlock | None = None,
    first_key: str | None = None,
) -> list[LayerReport]:
    """Prune ``model`` in place, block by block.

    Args:
        model: a decoder on the CPU; each block visits ``device`` while it is worked on.
        tokens: calibration windows, (windows, length) int64; of all processes, if there are several.
        on_layer: called with the number of each pruned layer, from 0, and its report, as soon as its block is pruned.
        ranks: the processes that share the work, each with a whole model of its own; None: this one alone.
        scratch: folder for activations on disk; None: the system's.
        seconds: added to, by kind of work.
        on_study: called with the name of each layer that the plan studies, and what was found, on the rank that solves it.
        first_block: moments of the first block from an earlier run with the same ``first_key``, which must tell apart all that
            they hang on; or kept there for a later one.

    Returns:
        A report for every pruned layer, in the order of pruning.
    Raises:
        RoseExpError: the plan fits the model nowhere, or a layer cannot be pruned; the message names the layer.
    """
    ranks, seconds = ranks or Ranks(), seconds or PassSeconds()
    blocks = find_blocks(model, plan.blocks)
    check_plan(blocks, plan)
    if len(tokens) < ranks.size:
        raise RoseExpError(
            f"calibration.samples: expected at least one window for each of {ranks.size} ranks, got {len(tokens)}"
        )
    found = probe(model, blocks, tokens, device)
    _check_called(blocks, found, plan)
    reports = []
    with tempfile.TemporaryDirectory(prefix=".activations-", dir=scratch) as folder:
        hidden, calls = _enter(model, blocks, ranks.share(tokens), plan, found, device, Path(folder) / "hidden")
        last = max(i for i, groups in enumerate(found.layers) if any(plan.wants(name) for group in groups for name in group))
        for index, block in enumerate(tqdm(blocks.blocks[: last + 1], desc="pruning", unit="block", disable=None)):
            block.to(device)
            own = {size: of_size[index] for size, of_size in calls.items()}
            walk = _BlockWalk(block, blocks.block_name(index), found.layers[index], own, plan, device, ranks, seconds, on_study)
            if index == 0 and not plan.true_sequential:
                walk.first_block, walk.first_key = first_block, first_key
            for report in walk.prune(hidden):
                if on_layer is not None:
                    on_layer(len(reports), report)
                reports.append(report)
            if index < last:  # nothing needs the last one's outputs
                walk.advance(hidden)
            block.to("cpu")
            log.info("pruned %s (%d of %d)", blocks.block_name(index), index + 1, last + 1)
    return reports


def _enter(
    model: nn.Module,
    blocks: BlockList,
    tokens: Tensor,
    plan: PruningPlan,
    found: Probe,
    device: torch.device | str,
    file: Path,
) -> tuple[Activations, dict[int, list[BlockCall]]]:
    """The hidden states that enter the first block, and how every block is called with a batch of each size that occurs."""
    hidden: Activations | None = None
    calls: dict[int, list[BlockCall]] = {}
    for start in range(0, len(tokens), plan.batch):
        batch = tokens[start : start + plan.batch]
        states, called = trace(model, blocks, batch, found, whole=len(batch) not in calls)
        if len(batch) not in calls:
            calls[len(batch)] = on_device(called, device)
        if hidden is None:
            shape = (len(tokens), *states.shape[1:])
            hidden = Activations(shape, states.dtype, plan.activations, device, plan.batch, file)
        hidden[start : start + len(batch)] = states
    return hidden, calls


def _check_called(blocks: BlockList, found: Probe, plan: PruningPlan) -> None:
    for index, (block, groups) in enumerate(zip(blocks.blocks, found.layers, strict=True)):
        called = {name for group in groups for name in group}
        for layer in linear_layers(block, blocks.block_name(index)):
            if plan.wants(layer.name) and layer.name not in called:
                raise RoseExpError(f"{layer.name} is never called, so it cannot be calibrated; name it in pipeline.skip")


class _BlockWalk:
    """One block while it is pruned.

    Args:
        groups: names of the block's layers, those with the same input together, in the order of their calls.
        calls: how the block is called, by the number of windows.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        groups: Sequence[Sequence[str]],
        calls: Mapping[int, BlockCall],
        plan: PruningPlan,
        device: torch.device | str,
        ranks: Ranks,
        seconds: PassSeconds,
        on_study: Callable[[str, LayerStudy], None] | None,
    ):
        self.block, self.name, self.calls, self.plan, self.device = block, name, calls, plan, device
        self.ranks, self.seconds, self.on_study = ranks, seconds, on_study
        layers = {layer.name: layer for layer in linear_layers(block, name)}
        wanted = [[layers[name] for name in group if plan.wants(name)] for group in groups]
        self.groups = [group for group in wanted if group]  # of layers that share their input
        self.first_block: FirstBlock | None = None
        self.first_key: str | None = None

    def run(self, hidden: Tensor) -> Tensor:
        return self.calls[len(hidden)].run(self.block, hidden)

    def advance(self, hidden: Activations) -> None:
        """Put what the block answers in the place of what it is given."""
        start = self._now()
        for windows, batch in tqdm(hidden, f"advancing {self.name}", len(hidden.pieces), False, disable=None, unit="batch"):
            hidden[windows] = self.run(batch)
        self.seconds.advancing += self._now() - start

    def prune(self, hidden: Activations) -> list[LayerReport]:
        reports = []
        for groups in [[group] for group in self.groups] if self.plan.true_sequential else [self.groups]:
            start = self._now()
            clock = _Clock(self.device)
            moments = self._collect(groups, hidden, clock)
            middle = self._now()
            studied = self.seconds.studying
            reports += self._solve(groups, moments)
            self.seconds.moments += clock.seconds()
            self.seconds.calibrating += middle - start - clock.seconds()
            self.seconds.solving += self._now() - middle - (self.seconds.studying - studied)
        return reports

    def _collect(self, groups: Sequence[Sequence[LinearLayer]], hidden: Activations, clock: _Clock) -> list[InputMoments]:
        """Moments of the inputs of each group, from one pass that stops where the last group is reached."""
        kept = self.first_block.find(self.first_key, self.device) if self.first_block else None
        if kept is not None:
            moments, self.seconds.shared = kept
            return moments
        start = self._now()
        moments = [
            InputMoments(
                g[0].columns,
                device=self.device,
                dtype=torch.promote_types(g[0].weight.dtype, torch.float32),
                precision=self.plan.precision,
            )
            for g in groups
        ]
        if not groups:
            return moments
        with ExitStack() as stack:
            for group, of_group in zip(groups, moments, strict=True):
                hook = _update(of_group, clock, last=group is groups[-1])
                stack.callback(group[0].module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for _, batch in tqdm(hidden, f"calibrating {self.name}", len(hidden.pieces), False, disable=None, unit="batch"):
                with suppress(Enough):
                    self.run(batch)
        if self.first_block:
            self.first_block.keep(self.first_key, moments, self._now() - start)
        return moments

    def _solve(self, groups: Sequence[Sequence[LinearLayer]], moments: list[InputMoments]) -> list[LayerReport]:
        """Prune each group on the rank that it falls to, and take over what the other ranks have made of theirs."""
        ranks = self.ranks
        owners = ranks.owners([group[0].columns ** 3 + sum(x.weight.numel() * x.columns for x in group) for group in groups])
        done: dict[int, list[LayerReport]] = {}
        failure = None
        for place, owner in enumerate(owners):  # all before any is solved: each waits for all ranks
            ranks.reduce(moments[place], owner)
            if owner != ranks.rank:
                moments[place] = None
        for place, owner in enumerate(owners):
            if owner == ranks.rank and failure is None:
                try:
                    done[place] = self._prune_group(groups[place], moments[place])
                except RoseExpError as error:
                    failure = error
                moments[place] = None  # its memory is the next group's
        answers = ranks.gather((done, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise RoseExpError(f"rank {rank}: {error}")
        for group, owner in zip(groups, owners, strict=True):
            for layer in group:
                ranks.broadcast(layer.module.weight.data, owner)
        everything = {place: reports for reports_of_rank, _ in answers for place, reports in reports_of_rank.items()}
        return [report for place in range(len(groups)) for report in everything[place]]

    def _prune_group(self, group: Sequence[LinearLayer], moments: InputMoments) -> list[LayerReport]:
        plan = self.plan
        try:
            self._study_group(group, moments)
            start = self._now()
            results = prune_layers(
                [layer.weight for layer in group],
                moments,
                methods=[plan.method_for(layer.name) for layer in group],
                sparsity=plan.sparsity,
                ordering=plan.ordering,
                block_size=plan.block_size,
                damping=plan.damping,
                refine=plan.refine,
                backend=plan.backend,
            )
        except (ValueError, NotPositiveDefiniteError) as error:
            raise RoseExpError(f"{', '.join(layer.name for layer in group)}: {error}") from error
        zeros = torch.stack([(result.weight == 0).sum() for result in results]).tolist()
        saved = [r.weight.numel() - r.stored if r.rank else count for r, count in zip(results, zeros, strict=True)]
        for layer, result in zip(group, results, strict=True):
            layer.set_weight(result.weight)
            if result.damping > plan.damping:
                log.warning("%s: damping raised from %g to %g", layer.name, plan.damping, result.damping)
        seconds = (self._now() - start) / sum(len(result.weight) for result in results)  # a row
        return [
            self._report(layer, result, moments.tokens, count, seconds)
            for layer, result, count in zip(group, results, saved, strict=True)
        ]

    def _study_group(self, group: Sequence[LinearLayer], moments: InputMoments) -> None:
        """Study those layers of a group that the plan names, before they are pruned."""
        plan, start = self.plan, self._now()
        for layer in group:
            if self.on_study and any(fnmatchcase(layer.name, pattern) for pattern in plan.study):
                log.info("studying the order of %s", layer.name)
                self.on_study(layer.name, study_layer(layer.weight, moments, plan.sparsity, plan.block_size, plan.damping))
        self.seconds.studying += self._now() - start

    @staticmethod
    def _report(layer: LinearLayer, result: PruneResult, tokens: int, saved: int, seconds: float) -> LayerReport:
        rows, columns = result.weight.shape
        return LayerReport(
            name=layer.name,
            rows=rows,
            columns=columns,
            tokens=tokens,
            sparsity=saved / (rows * columns),
            error=result.error,
            relative_range=result.relative_range,
            reordered=result.reordered,
            damping=result.damping,
            rank=result.rank,
            seconds=seconds * rows,
        )

    def _now(self) -> float:
        """The time when all that has been asked of the device is done."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Clock:
    """Adds up the seconds that a device spends inside it, without waiting for it."""

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self.marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """So far; on a device that has been waited for."""
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(start.elapsed_time(end) / 1000 if self.cuda else end - start for start, end in pairs)


def _update(moments: InputMoments, clock: _Clock, last: bool):
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        with clock:
            moments.update(args[0] if args else kwargs["input"])
        if last:
            raise Enough

    return hook
