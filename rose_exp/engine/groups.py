"""Structured pruning: removes groups of input columns, such as those of an attention head or an FFN neuron.

The remaining columns compensate for the removed ones (OBS-Diff, 2025, equations 6 to 8; saliency of heads after SlimGPT, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from .bounds import Positive, check_options
from .errors import relative_error
from .hessian import NotPositiveDefiniteError, dampings
from .moments import InputMoments
from .ranges import check_range

Saliency = Literal["diagonal", "exact"]

FUSION = 60  # k of reciprocal rank fusion, OBS-Diff's
METHODS_OF_GROUPS = ("sparsegpt", "wanda", "magnitude")  # only the first uses the Hessian beyond its diagonal


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Which groups structured pruning removes, and how it selects them.

    Args:
        heads: whether to remove attention heads.
        neurons: whether to remove FFN neurons.
        saliency: OBS estimate of the loss of a group: ``diagonal`` sums the losses of its columns taken separately, as in
            OBS-Diff (Eq. 6, 7); ``exact`` considers the group as a whole.
        at_once: number of neurons removed between updates of the inverse Hessian; heads are removed one at a time.
    """

    heads: bool = True
    neurons: bool = True
    saliency: Saliency = "diagonal"
    at_once: Positive = 64

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups to remove: ``heads``, ``neurons`` or both."""
        return tuple(kind for kind in ("heads", "neurons") if getattr(self, kind))


@dataclass(frozen=True)
class Structured(GroupOptions):
    """Structured sparsity: removes whole attention heads and FFN neurons, so that layers shrink.

    Removes ``round(n · ratio)`` of the n heads of each attention (groups of heads that share a key and value), and of the n
    neurons of each FFN.

    Args:
        ratio: fraction of the heads and neurons to remove, at least 0 and below 1.
    """

    ratio: Annotated[float, Ge(0), Lt(1)]

    def __post_init__(self):
        check_options(self)
        if not self.kinds:
            raise ValueError("heads: expected true where neurons is false, got false: nothing would be removed")

    def count(self, groups: int) -> int:
        """Return how many of ``groups`` groups to remove; at least one remains."""
        return min(round(groups * self.ratio), groups - 1)

    def __str__(self) -> str:
        what = "" if self.heads and self.neurons else " heads" if self.heads else " neurons"
        return f"{self.ratio * 100:g}% structured{what}"


@dataclass(frozen=True)
class GroupedLayer:
    """A layer, y = W x, with the groups of input columns that can be removed.

    Attributes:
        weight: W, (rows, columns).
        moments: moments of its inputs.
        columns: (groups, width) int64, the columns of each group. Columns in no group are never removed.
        gone: columns removed earlier, int64; their weights are ignored.
        coupled: for magnitude: L1 norms of the rows of other layers that are removed with each group, (groups,).
    """

    weight: Tensor
    moments: InputMoments
    columns: Tensor
    gone: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    coupled: Tensor | None = None


@dataclass(frozen=True)
class PrunedGroups:
    """Layers from which the same groups were removed.

    Attributes:
        removed: (groups,) bool.
        order: the removed groups, in order of removal.
        weights: weight of each layer, (rows, columns), in its original dtype, zero in all removed columns.
        errors: tr((W−V) H (W−V)ᵀ) / tr(W H Wᵀ) of each layer.
        damping: the damping that was used, as a fraction of the mean of H's diagonal; 0 without compensation.
    """

    removed: Tensor
    order: list[int]
    weights: list[Tensor]
    errors: list[float]
    damping: float


@torch.no_grad()
def prune_groups(
    layers: Sequence[GroupedLayer],
    count: int,
    *,
    method: str = "sparsegpt",
    saliency: Saliency = "diagonal",
    damping: float = 0.01,
    at_once: int = 1,
) -> PrunedGroups:
    """Remove the same ``count`` groups of input columns from one or more layers.

    Rankings of several layers, such as the two output projections of joint attention, are combined by reciprocal rank fusion:
    groups with the largest Σ 1/(60 + rank) are removed.

    ``sparsegpt`` removes the least salient groups first and updates the weights and the inverse Hessian after every ``at_once``
    groups. The remaining columns then get the values that best fit the layer's output, W_K = W H_:K H_KK⁻¹ with the damped H.
    ``wanda`` ranks groups by Σ |W|·sqrt(E[x²]), ``magnitude`` by the L1 norm of all weights removed with a group; neither
    updates the remaining weights.

    Raises:
        ValueError: if an argument has the wrong kind, shape or range, a weight or moments are not finite, or inputs, a result
            or an error exceed the range of the precision.
        NotPositiveDefiniteError: if H cannot be factorized at any damping tried.
    """
    _check(layers, count, method, damping)
    try:
        return _remove(layers, count, method, saliency, damping, at_once)
    except torch.linalg.LinAlgError as error:
        columns = layers[0].moments.columns
        raise NotPositiveDefiniteError(f"the Hessian of {columns} columns cannot be solved: {error}") from error


def _remove(
    layers: Sequence[GroupedLayer], count: int, method: str, saliency: Saliency, damping: float, at_once: int
) -> PrunedGroups:
    works = [_Work(layer) for layer in layers]
    used_damping = 0.0
    if method == "sparsegpt":
        used_damping = _invert(works, damping)
        order = _greedy(works, count, saliency, at_once)
    else:
        order = _ranked([work.plain_scores(method) for work in works])[:count].tolist()
    removed = torch.zeros(len(layers[0].columns), dtype=torch.bool, device=layers[0].weight.device)
    removed[order] = True
    weights = [work.finished(removed, compensated=method == "sparsegpt") for work in works]
    errors = [work.error(weight) for work, weight in zip(works, weights, strict=True)]
    return PrunedGroups(removed, order, weights, errors, used_damping)


class _Work:
    """State of one layer during removal, in float64, since the inverse is updated repeatedly."""

    def __init__(self, layer: GroupedLayer):
        self.layer = layer
        self.dense = layer.weight.double()
        self.dense = self.dense.index_fill(1, layer.gone.to(layer.weight.device), 0)
        self.hessian = layer.moments.hessian().double()
        self.weight = self.dense.clone()
        self.damped = self.inverse = self.hessian

    def damp(self, damping: float) -> bool:
        """Invert the damped Hessian and return whether it is positive definite; dead columns are decoupled as in SparseGPT."""
        diagonal = self.hessian.diagonal()
        mean = diagonal.mean()
        scale = torch.where(mean > 0, mean, torch.ones_like(mean))
        self.damped = self.hessian.clone()
        self.damped.diagonal().copy_(torch.where(diagonal == 0, scale, diagonal) + damping * scale)
        factor, failed = torch.linalg.cholesky_ex(self.damped)
        if failed:
            return False
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = self.dense.clone()
        if len(self.layer.gone):
            self.eliminate(self.layer.gone.to(self.weight.device))
        return True

    def scores(self, saliency: Saliency) -> Tensor:
        """Return the loss of each group, (groups,): ½ Σ ‖W_:k‖² / [H⁻¹]_kk over its columns, or ½ tr(W_g [H⁻¹]_gg⁻¹ W_gᵀ)."""
        columns = self.layer.columns
        if saliency == "diagonal" or columns.shape[1] == 1:
            column_losses = self.weight.square().sum(dim=0) / self.inverse.diagonal()
            return column_losses[columns].sum(dim=1) / 2
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]  # (groups, width, width)
        weights = self.weight[:, columns].permute(1, 2, 0)  # (groups, width, rows)
        return (weights * torch.linalg.solve(blocks, weights)).sum(dim=(1, 2)) / 2

    def eliminate(self, columns: Tensor) -> None:
        """Remove columns: W ← W − W_:g [H⁻¹]_gg⁻¹ [H⁻¹]_g:, and likewise for H⁻¹."""
        rows = self.inverse[columns]  # (removed columns, all columns)
        solved = torch.linalg.solve(rows[:, columns], rows)
        self.weight -= self.weight[:, columns] @ solved
        self.inverse = self.inverse - rows.T @ solved
        self.weight[:, columns] = 0
        self.inverse[columns, :], self.inverse[:, columns] = 0, 0
        self.inverse.diagonal()[columns] = 1  # avoids division by zero

    def plain_scores(self, method: str) -> Tensor:
        """Return the scores of methods without weight updates, (groups,)."""
        magnitudes = self.dense.abs()
        if method == "wanda":
            magnitudes = magnitudes * self.layer.moments.mean_square().sqrt().double()
        group_scores = magnitudes.sum(dim=0)[self.layer.columns].sum(dim=1)
        if method == "magnitude" and self.layer.coupled is not None:
            group_scores = group_scores + self.layer.coupled.double()
        return group_scores

    def finished(self, removed: Tensor, compensated: bool) -> Tensor:
        pruned = torch.zeros(self.dense.shape[1], dtype=torch.bool, device=self.dense.device)
        pruned[self.layer.gone.to(pruned.device)] = True
        pruned[self.layer.columns[removed].flatten()] = True
        result = self.dense.masked_fill(pruned, 0)
        if compensated and removed.any():
            kept = ~pruned
            lower = torch.linalg.cholesky(self.damped[kept][:, kept])
            lost = self.dense[:, pruned] @ self.damped[pruned][:, kept]
            result[:, kept] += torch.cholesky_solve(lost.T, lower).T
        returned = result.to(self.layer.weight.dtype)
        if not torch.isfinite(returned).all():
            raise ValueError(
                f"weight: the pruned layer does not fit {str(returned.dtype).removeprefix('torch.')}: "
                f"largest value {result.abs().max():g}"
            )
        return returned

    def error(self, weight: Tensor) -> float:
        return relative_error(self.dense, weight.double(), self.hessian)


def _invert(works: Sequence[_Work], damping: float) -> float:
    for candidate in dampings(damping):
        if all(work.damp(candidate) for work in works):
            return candidate
    raise NotPositiveDefiniteError(
        f"the Hessian of {works[0].layer.moments.columns} columns is not positive definite at damping "
        f"{', '.join(f'{d:g}' for d in dampings(damping))}: the calibration inputs have values too large or too small"
    )


def _greedy(works: Sequence[_Work], count: int, saliency: Saliency, at_once: int) -> list[int]:
    order: list[int] = []
    while len(order) < count:
        losses = [
            work.scores(saliency).index_fill(0, torch.tensor(order, device=work.weight.device, dtype=torch.int64), torch.inf)
            for work in works
        ]
        chosen = _ranked(losses)[: min(at_once, count - len(order))]
        order += chosen.tolist()
        for work in works:
            work.eliminate(work.layer.columns[chosen].flatten())
    return order


def _ranked(losses: Sequence[Tensor]) -> Tensor:
    """Return the groups in order of removal, (groups,) int64.

    Groups are sorted by loss, or for several layers by the sum of 1/(60 + rank), where the smallest loss has rank 1 (Eq. 8);
    ties by position. Groups of infinite loss are already removed and come last.
    """
    if len(losses) == 1:
        return losses[0].argsort(stable=True)
    fused = torch.zeros_like(losses[0])
    for layer_losses in losses:
        ranks = torch.empty_like(fused)
        ranks[layer_losses.argsort(stable=True)] = torch.arange(1, len(fused) + 1, device=fused.device, dtype=fused.dtype)
        fused += 1 / (FUSION + ranks)
    return fused.masked_fill(losses[0] == torch.inf, -torch.inf).argsort(descending=True, stable=True)


def _check(layers: Sequence[GroupedLayer], count: int, method: str, damping: float) -> None:
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    if method not in METHODS_OF_GROUPS:
        raise ValueError(f"method: expected one of {', '.join(METHODS_OF_GROUPS)} for groups, got {method!r}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping: expected a finite number of at least 0, got {damping}")
    groups = len(layers[0].columns)
    if not 0 <= count < max(groups, 1):
        raise ValueError(f"count: expected 0 to {groups - 1}, since one of {groups} groups stays, got {count}")
    for layer in layers:
        weight, columns = layer.weight, layer.columns
        if weight.ndim != 2 or weight.shape[1] != layer.moments.columns:
            raise ValueError(f"weight: expected shape (rows, {layer.moments.columns}), got {tuple(weight.shape)}")
        if columns.ndim != 2 or len(columns) != groups or columns.unique().numel() != columns.numel():
            raise ValueError(f"columns: expected {groups} groups that share no column, got shape {tuple(columns.shape)}")
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < weight.shape[1]:
            raise ValueError(f"columns: expected numbers from 0 to {weight.shape[1] - 1}, got up to {int(columns.max())}")
        if not (torch.isfinite(weight).all() and torch.isfinite(layer.moments.gram).all()):
            raise ValueError("weight, moments: expected finite numbers, got NaN or infinity")
        check_range(layer.moments, layer.moments.dtype)
