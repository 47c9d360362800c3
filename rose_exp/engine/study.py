"""Effect of the column order on one layer: the curves of figures 1 and 4 of the ROSE paper, for any layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .curvature import Curvature
from .hessian import NotPositiveDefiniteError, dampings
from .methods import Layer, SparseGPT
from .moments import InputMoments
from .ordering import ColumnOrder, Direction, Ordering
from .patterns import Sparsity, Unstructured
from .products import quadratic_form
from .prune import prune_layer
from .ranges import extents, read_extents, scaled

KINDS = {"none": ("none", "none"), "column": (True, "none"), "block": ("none", True), "column+block": (True, True)}
RATIOS = (0.6, 0.7, 0.8, 0.9)  # of figure 4
CELLS = 192  # maximum size of a heat map in each direction


@dataclass(frozen=True)
class LayerStudy:
    """Errors of one layer under different column orders, relative to its output power tr(W H Wᵀ).

    Attributes:
        sparsity: sparsity pattern of ``cumulative`` and ``moved``, as text.
        cumulative: by order, the error after each block, with the damped Hessian as in the sweep.
        worst: index of the block with the largest error in natural order.
        moved: total error with that block first, second, … and all others in natural order.
        reorderings: total error by direction, kind and sparsity; columns are reordered regardless of the relative range.
        heat: mean |W| over cells of the layer, rows by columns, in natural order and in ROSE's order.
        rows, columns: shape of the layer.
        damping: the damping that was used.
    """

    sparsity: str
    cumulative: dict[str, list[float]]
    worst: int
    moved: list[float]
    reorderings: dict[str, dict[str, dict[str, float]]]
    heat: dict[str, list[list[float]]]
    rows: int
    columns: int
    damping: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def study_layer(
    weight: Tensor, moments: InputMoments, sparsity: Sparsity, block_size: int = 128, damping: float = 0.01
) -> LayerStudy:
    """Prune one layer, (rows, columns), in many column orders, without modifying the weight or the moments.

    This takes about fifty times as long as pruning the layer once (for 32 blocks).

    Raises:
        ValueError: if the weight, the moments or an error is not finite or exceeds the range of the precision.
        NotPositiveDefiniteError: if the Hessian cannot be factorized.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, moments.dtype), torch.float32)
    w = weight.to(dtype)
    (extent,) = read_extents(torch.stack(extents([w], Curvature(moments, damping, dtype))).tolist(), dtype)
    w = scaled(w, extent.shift)  # all results are relative
    curvature = _curvature(moments, damping, dtype)
    power = quadratic_form(w, curvature.hessian)
    if not torch.isfinite(power):
        raise ValueError(f"weight: expected outputs of finite power, got {float(power):g}")
    power.clamp_min_(torch.finfo(dtype).tiny)

    def prune(ordering: Ordering | None, given: ColumnOrder | None = None) -> tuple[Tensor, Tensor]:
        """Return the relative errors of the blocks, in pruning order, and of the layer."""
        reordered = given is not None or ordering is not None
        layer = Layer(w, curvature, sparsity, ordering, block_size, reordered=reordered, given=given)
        solution = SparseGPT().prune(layer)
        if solution.factor.failed:
            raise NotPositiveDefiniteError(f"the Hessian of {w.shape[1]} columns cannot be factorized in every order")
        costs, lost = solution.costs / power, solution.lost / power
        if not (torch.isfinite(costs).all() and torch.isfinite(lost)):
            raise ValueError(f"weight: expected finite errors, got {float(lost):g} of the output power")
        return costs, lost

    rose = Ordering("descending", "descending", threshold=None)
    natural, _ = prune(None)
    orders = {
        "left to right": natural,
        "ROSE": prune(rose)[0],
        "ascending": prune(Ordering("ascending", "ascending", threshold=None))[0],
    }
    worst = int(natural.argmax())
    unit = min(sparsity.block_width(block_size), w.shape[1])  # the unit that an ordering moves: a block, or a group for N:M
    width = max(1, block_size // unit) * unit
    moved = [float(prune(None, _with_block_at(worst, place, w, width, unit))[1]) for place in range(len(natural))]
    rose_order = Layer(w, curvature, sparsity, rose, block_size).order
    return LayerStudy(
        sparsity=str(sparsity),
        cumulative={name: costs.cumsum(0).tolist() for name, costs in orders.items()},
        worst=worst,
        moved=moved,
        reorderings=_reorderings(weight, moments, block_size, curvature.damping),
        heat={"natural": _heat(weight.to(dtype)), "pruned": _heat(weight.to(dtype).index_select(1, rose_order.order))},
        rows=w.shape[0],
        columns=w.shape[1],
        damping=curvature.damping,
    )


def _curvature(moments: InputMoments, damping: float, dtype: torch.dtype) -> Curvature:
    """Return the curvature with the first damping at which the Hessian can be factorized."""
    for candidate in dampings(damping):
        curvature = Curvature(moments, candidate, dtype)
        if not curvature.factor.failed:
            return curvature
    raise NotPositiveDefiniteError(f"the Hessian of {moments.columns} columns is not positive definite at any damping tried")


def _with_block_at(block: int, place: int, w: Tensor, width: int, unit: int) -> ColumnOrder:
    """Return the natural order with one block of ``width`` columns, a multiple of ``unit``, moved to ``place``."""
    blocks = list(range(-(-w.shape[1] // width)))
    blocks.insert(place, blocks.pop(block))
    columns = torch.arange(w.shape[1], device=w.device)
    order = torch.cat([columns[b * width : (b + 1) * width] for b in blocks])
    units = torch.arange(-(-w.shape[1] // unit), device=w.device)
    per_block = width // unit
    unit_order = torch.cat([units[b * per_block : (b + 1) * per_block] for b in blocks])
    nothing = torch.zeros((), device=w.device)
    return ColumnOrder(order, unit_order, unit, nothing, nothing.bool())


def _reorderings(weight: Tensor, moments: InputMoments, block_size: int, damping: float) -> dict:
    options = {"block_size": block_size, "damping": damping}
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for direction in ("descending", "ascending"):
        errors[direction] = {}
        for kind, choice in KINDS.items():
            columns, blocks = (_direction(chosen, direction) for chosen in choice)
            ordering = Ordering(columns, blocks, threshold=None)
            errors[direction][kind] = {
                f"{ratio:g}": prune_layer(weight, moments, sparsity=Unstructured(ratio), ordering=ordering, **options).error
                for ratio in RATIOS
            }
    return errors


def _direction(chosen: bool | str, direction: Direction) -> Direction:
    return direction if chosen is True else "none"


def _heat(w: Tensor) -> list[list[float]]:
    size = [min(n, CELLS) for n in w.shape]
    cells = functional.adaptive_avg_pool2d(w.abs()[None], size)[0]
    return [[float(f"{value:.4g}") for value in row] for row in cells.tolist()]
