"""Pruning one layer: the engine's front door."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Backend, resolve
from .methods import METHODS, Layer, Method
from .moments import InputMoments
from .ordering import Ordering
from .patterns import Sparsity
from .refine import refine as refine_kept

ERROR_PANELS = 4  # of the error: four leave out three eighths of the product


@dataclass(frozen=True)
class PruneResult:
    """A pruned layer and what is worth knowing about it.

    Attributes:
        weight: (rows, columns), in the dtype of the input, exactly zero where pruned.
        mask: (rows, columns) bool, True where pruned.
        order: (columns,) int64, the order in which columns were pruned; left to right for methods that prune all at once.
        relative_range: (max − min) / max of the block losses, by the ordering's score (Wanda's without one), 0 to 1.
        reordered: whether the columns were pruned in another order than left to right.
        error: tr((W−V) H (W−V)ᵀ) / tr(W H Wᵀ) of the weight as returned; 0 where the layer's output is zero.
        damping: really used, as a share of the mean of H's diagonal; 0 for methods that invert no Hessian.
    """

    weight: Tensor
    mask: Tensor
    order: Tensor
    relative_range: float
    reordered: bool
    error: float
    damping: float


@torch.no_grad()
def prune_layer(
    weight: Tensor,
    moments: InputMoments,
    *,
    method: str | Method = "sparsegpt",
    sparsity: Sparsity,
    ordering: Ordering | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    refine: int = 0,
    backend: Backend = "auto",
) -> PruneResult:
    """Prune one linear layer, y = W x, from the moments of its inputs.

    Args:
        weight: W, (rows, columns) = (outputs, inputs), any float dtype; not modified. The layer is solved in float32, or
            in float64 where ``weight`` or the moments are.
        moments: of the layer's inputs.
        method: a name of :data:`METHODS`, or a method with options of its own.
        sparsity: :class:`Unstructured` or :class:`SemiStructured`.
        ordering: None: left to right. Methods that prune all at once give the same result in any order.
        block_size: columns whose masks are chosen together (unstructured), and that an ordering moves together.
        damping: added to H's diagonal, as a share of its mean; raised by tens where H cannot be factorised.
        refine: steps of least squares on the final mask.
        backend: of the sweep's inner loop: ``torch``, ``numba`` (CPU, float32), ``triton`` (CUDA, float32), or ``auto``, the
            fastest that there is. All choose the same masks but where rounding decides between near-equals.

    Raises:
        ValueError: an argument of the wrong kind, shape or range, or a weight or moments that are not finite.
        NotPositiveDefiniteError: H cannot be factorised at any damping tried.
    """
    _check(weight, moments, block_size, damping, refine)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        method = METHODS[method]()
    dtype = torch.promote_types(torch.promote_types(weight.dtype, moments.gram.dtype), torch.float32)
    layer = Layer(weight.to(dtype), moments, sparsity, ordering, block_size, damping, resolve(backend, weight.device, dtype))
    solution = method.prune(layer)
    solved = solution.weight
    if refine:
        solved = refine_kept(solved, layer.weight, solution.mask, layer.hessian, refine)
    pruned = solved.to(weight.dtype)
    if not torch.isfinite(pruned).all():
        raise ValueError(
            f"weight: the pruned layer does not fit {str(weight.dtype).removeprefix('torch.')}: "
            f"largest value {solved.abs().max():g}"
        )
    found = solution.order or layer.column_order()
    order = solution.order.order if solution.order else torch.arange(weight.shape[1], device=weight.device)
    return PruneResult(
        weight=pruned,
        mask=solution.mask,
        order=order,
        relative_range=float(found.relative_range),
        reordered=bool(found.reordered) if solution.order else False,
        error=relative_error(layer.weight, pruned.to(dtype), layer.hessian),
        damping=solution.damping,
    )


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """tr((W−V) H (W−V)ᵀ) / tr(W H Wᵀ) of W and V (rows, columns); 0 where the layer's output is zero.

    H is symmetric: by panels of columns from its diagonal downwards, what is below the diagonal counts twice.
    """
    columns = len(hessian)
    lost = weight - pruned
    step = max(128, -(-columns // ERROR_PANELS))
    powers = torch.zeros(2, dtype=weight.dtype, device=weight.device)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        panel = hessian[start:, start:stop].clone()
        panel[stop - start :] *= 2
        for i, w in enumerate((lost, weight)):
            powers[i] += ((w[:, start:] @ panel).mul_(w[:, start:stop])).sum()
    error, total = powers.tolist()
    return max(0.0, error) / total if total > 0 else 0.0


def _check(weight: Tensor, moments: InputMoments, block_size: int, damping: float, refine: int) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape (rows, columns), neither 0, got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating type, got {weight.dtype}")
    if weight.shape[1] != moments.columns:
        raise ValueError(f"moments: expected {weight.shape[1]} columns, as the weight has, got {moments.columns}")
    if weight.device != moments.device:
        raise ValueError(f"moments: expected on {weight.device}, where the weight is, got {moments.device}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping: expected a finite number of at least 0, got {damping}")
    if refine < 0:
        raise ValueError(f"refine: expected at least 0 steps, got {refine}")
    for name, tensor in (("weight", weight), ("moments", moments.gram)):
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
