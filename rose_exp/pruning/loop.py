"""The pruning loop: calibrate each block with dense weights, prune it, and compute the next block's inputs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engine.groups import Structured
from ..engine.study import LayerStudy
from ..models import BlockList, find_blocks, linear_layers
from ..runtime import signals as interruption
from ..runtime.errors import RoseExpError
from ..runtime.ranks import Ranks
from .activations import Activations
from .blocks import BlockWalk
from .capture import BlockCall, Probe, probe
from .enter import Calls, enter, second_stream
from .first_block import FirstBlock
from .plan import LayerReport, PassSeconds, PruningPlan, check_plan
from .state import RunState
from .structured import check_structures, wanted_structures
from .weights import BlockWeights, InMemory, fill

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
    weights: BlockWeights | None = None,
    state: RunState | None = None,
) -> list[LayerReport]:
    """Prune a model block by block, in place or, if its blocks are not in memory, into ``state``.

    Args:
        model: a decoder on the CPU; each block moves to ``device`` while it is processed.
        tokens: calibration windows of all ranks, (windows, length) int64.
        on_layer: called with the index of each pruned layer, starting at 0, and its report, once its block is pruned.
        ranks: the processes that share the work, each with its own copy of the model; None for this process alone.
        scratch: folder for activations on disk; None for the system's temporary folder.
        seconds: timings to add to, by kind of work.
        on_study: called with the name of each studied layer and the result, on the rank that solves the layer.
        first_block: cache for the moments of the first block, reused by runs with the same ``first_key``. The key must
            distinguish everything the moments depend on.
        weights: where the blocks' weights are stored; None for in memory.
        state: checkpoint to write each pruned block to; blocks that it already holds are restored.

    Returns:
        A report for every pruned layer, in pruning order.
    Raises:
        RoseExpError: the plan does not fit the model, or a layer cannot be pruned; the message names the layer.
        Interrupted: a stop was requested; finished blocks are in ``state``.
    """
    ranks, seconds = ranks or Ranks(), seconds if seconds is not None else PassSeconds()
    blocks = weights.blocks if weights is not None else find_blocks(model, plan.blocks)
    weights = weights or InMemory(blocks)
    check_plan(blocks, plan)
    if isinstance(plan.sparsity, Structured):
        named = [(block, blocks.block_name(index)) for index, block in enumerate(blocks.blocks)]
        check_structures([of for block, name in named for of in wanted_structures(block, name, plan)], plan.sparsity)
    if len(tokens) < ranks.size:
        raise RoseExpError(
            f"calibration.samples: expected at least one window for each of {ranks.size} ranks, got {len(tokens)}"
        )
    reports: list[LayerReport] = []

    def done(of_block: list[LayerReport]) -> None:
        for report in of_block:
            if on_layer is not None:
                on_layer(len(reports), report)
            reports.append(report)

    adding = bool(plan.target and plan.target.residual)
    found = probe(model, blocks, tokens, device, weights, adding=adding, channels=plan.permutes)
    found.channels = ranks.gather(found.channels)[0]  # ranks may disagree through rounding
    _check_called(blocks, found, plan)
    if plan.permutes and not any(found.channels):
        log.warning("engine.permute: this model has no layer with input channels that can be reordered")
    last = max(i for i, groups in enumerate(found.layers) if any(plan.wants(name) for group in groups for name in group))
    with tempfile.TemporaryDirectory(prefix=".activations-", dir=scratch) as folder:
        share = ranks.share(tokens)
        hidden, calls = enter(model, blocks, share, plan.batch, plan.activations, found, device, Path(folder) / "hidden")
        dense_calls = second_stream(calls) if plan.target else calls
        _check_entering(hidden, blocks)
        shares: dict[str, float] = {}
        dense: Activations | None = None

        def walk_of(index: int, block: nn.Module) -> BlockWalk:
            return BlockWalk(
                block,
                blocks.block_name(index),
                found.layers[index],
                found.adding[index],
                found.channels[index],
                _of_block(calls, index),
                _of_block(dense_calls, index),
                replace(plan, shares=shares),
                device,
                ranks,
                seconds,
                on_study,
                dense,
            )

        if plan.allocation is not None:
            kept = state.progress.shares if state is not None else {}
            file = Path(folder) / "survey"
            shares |= kept or _survey(hidden.copy(file), weights, walk_of, last, plan, device, ranks)
            file.unlink(missing_ok=True)
            if state is not None and not kept:
                state.keep_shares(shares)
        dense = hidden.copy(Path(folder) / "dense") if plan.target else None
        first = 0
        if state is not None and state.progress.blocks:
            first = state.progress.blocks
            log.info("resuming after %s, which an earlier process has pruned", blocks.block_name(first - 1))
            _take_up(state, weights, hidden, dense, first, last, walk_of, device, found.carries)
            vars(seconds).update(state.progress.seconds)
            done(state.reports)
        bar = tqdm(range(first, last + 1), "pruning", last + 1, initial=first, unit="block", disable=None)
        for index in bar:
            _check_stop(ranks)
            with weights.at(index, device) as block:
                walk = walk_of(index, block)
                if state is not None:
                    walk.part, walk.keep_part = state.part(), state.commit_part
                if index == 0 and not plan.true_sequential and not walk.part[0] and dense is None:
                    walk.first_block, walk.first_key = first_block, first_key
                of_block = walk.prune(hidden)
                if index < last:  # the last block's outputs are not used
                    walk.advance(hidden)
                if state is not None:
                    streams = [stream for stream in (hidden, dense) if stream is not None] if index < last else []
                    state.commit(index, block, streams, of_block, vars(seconds))
            done(of_block)
            log.info("pruned %s (%d of %d)", blocks.block_name(index), index + 1, last + 1)
    return reports


def _survey(
    hidden: Activations,
    weights: BlockWeights,
    walk_of: Callable[[int, nn.Module], BlockWalk],
    last: int,
    plan: PruningPlan,
    device: torch.device | str,
    ranks: Ranks,
) -> dict[str, float]:
    """Return the sparsity allocation across layers, from a forward pass of the dense model up to the ``last`` block.

    Overwrites ``hidden``.
    """
    found = []
    for index in tqdm(range(last + 1), "surveying", unit="block", disable=None):
        _check_stop(ranks)
        with weights.at(index, device, original=True) as block:
            found.append(walk_of(index, block).survey(hidden))
    return ranks.gather(plan.allocation.shares(found, plan.sparsity.ratio))[0]  # ranks may disagree through rounding


def _take_up(
    state: RunState,
    weights: BlockWeights,
    hidden: Activations,
    dense: Activations | None,
    first: int,
    last: int,
    walk_of: Callable[[int, nn.Module], BlockWalk],
    device: torch.device | str,
    carries: bool,
) -> None:
    """Restore the pruned blocks, the inputs of the next one and the generators.

    Args:
        carries: whether blocks pass on more than hidden states. The state does not hold such values, so the blocks run again.
    """
    streams = [stream for stream in (hidden, dense) if stream is not None]
    again = first <= last and (carries or not state.restore(streams))
    if again and dense is not None:  # while the blocks in memory still hold their dense weights
        for index in tqdm(range(first), "running dense blocks again", unit="block", disable=None):
            with weights.at(index, device, original=True) as block:
                walk_of(index, block).advance(dense, "dense")
    if isinstance(weights, InMemory):
        for index in range(first):
            fill(weights.blocks.blocks[index], state.block(index))
    if again:
        for index in tqdm(range(first), "running pruned blocks again", unit="block", disable=None):
            with weights.at(index, device) as block:
                walk_of(index, block).advance(hidden)
    state.restore_generators()


def _of_block(calls: Calls, index: int) -> dict[int, BlockCall]:
    return {start: of_batch[index] for start, of_batch in calls.items()}


def _check_entering(hidden: Activations, blocks: BlockList) -> None:
    for _, batch in hidden:
        if not torch.isfinite(batch).all():
            raise RoseExpError(f"{blocks.block_name(0)}: expected finite inputs, got NaN or infinity: damaged embeddings")


def _check_stop(ranks: Ranks) -> None:
    """Stop all ranks at the same block if any rank has received a stop request."""
    if any(ranks.gather(interruption.requested())):
        raise interruption.Interrupted("stopped between two blocks")


def _check_called(blocks: BlockList, found: Probe, plan: PruningPlan) -> None:
    for index, (block, groups) in enumerate(zip(blocks.blocks, found.layers, strict=True)):
        called = {name for group in groups for name in group}
        for layer in linear_layers(block, blocks.block_name(index)):
            if plan.wants(layer.name) and layer.name not in called:
                raise RoseExpError(f"{layer.name} is never called, so it cannot be calibrated; add it to pipeline.skip")
