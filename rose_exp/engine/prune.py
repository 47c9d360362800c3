"""Pruning one layer: the engine's front door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .curvature import Curvature
from .hessian import NotPositiveDefiniteError, dampings
from .kernels import Backend, resolve
from .methods import METHODS, Layer, Method, Solution, settle
from .moments import InputMoments
from .ordering import Ordering
from .patterns import Sparsity
from .products import quadratic_form
from .refine import Refine, Refined
from .refine import refine as refine_layers
from .targets import Drift, Target


@dataclass(frozen=True)
class PruneResult:
    """A pruned layer and what is worth knowing about it.

    Attributes:
        weight: (rows, columns), in the dtype of the input, exactly zero where pruned.
        mask: (rows, columns) bool, True where pruned.
        rank: of the matrix that OATS adds to the pruned one: where it is not 0, ``weight`` is their sum, zero nowhere, and a
            layer of rows × columns is stored as the unmasked weights and rank · (rows + columns) more numbers.
        order: (columns,) int64, the order in which columns were pruned; left to right for methods that prune all at once.
        relative_range: (max − min) / max of the block losses, by the ordering's score (Wanda's without one), 0 to 1.
        reordered: whether the columns were pruned in another order than left to right.
        error: tr((W−V) H (W−V)ᵀ) / tr(W H Wᵀ) of the weight as returned; 0 where the layer's output is zero.
        target_error: the same of what the layer was asked to be in place of W, which is W unless a target was given.
        unrefined_error: ``target_error`` before refining.
        rechosen: pruned weights that were not pruned before refining.
        unrefined: whether refining was asked for and would have raised the error, so that the layer is left as it was pruned.
        damping: really used, as a share of the mean of H's diagonal; 0 for methods that invert no Hessian.
        dead_columns: inputs that never fired.
    """

    weight: Tensor
    mask: Tensor
    order: Tensor
    relative_range: float
    reordered: bool
    error: float
    damping: float
    rank: int = 0
    dead_columns: int = 0
    target_error: float = 0.0
    unrefined_error: float = 0.0
    rechosen: int = 0
    unrefined: bool = False

    @property
    def stored(self) -> int:
        """Numbers that the layer is made of: weights that are not masked, and those of the added matrix."""
        rows, columns = self.mask.shape
        return int((~self.mask).sum()) + self.rank * (rows + columns)


def prune_layer(
    weight: Tensor,
    moments: InputMoments,
    *,
    method: str | Method = "sparsegpt",
    sparsity: Sparsity,
    ordering: Ordering | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    refine: int | Refine = 0,
    backend: Backend = "auto",
    drift: Drift | None = None,
    target: Target | None = None,
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
        refine: steps of least squares on the final mask, or all of how to refine.
        backend: of the sweep's inner loop: ``torch``, ``numba`` (CPU, float32), ``triton`` (CUDA, float32), or ``auto``, the
            fastest that there is. All choose the same masks but where rounding decides between near-equals.
        drift: of the layer's inputs from those of the dense model, which a target needs.
        target: what the layer is asked to be in place of W, see :class:`Target`; None: W.

    Raises:
        ValueError: an argument of the wrong kind, shape or range, or a weight or moments that are not finite.
        NotPositiveDefiniteError: H cannot be factorised at any damping tried.
    """
    return prune_layers(
        [weight],
        moments,
        methods=[method],
        sparsity=sparsity,
        ordering=ordering,
        block_size=block_size,
        damping=damping,
        refine=refine,
        backend=backend,
        drift=drift,
        target=target,
    )[0]


@torch.no_grad()
def prune_layers(
    weights: Sequence[Tensor],
    moments: InputMoments,
    *,
    methods: Sequence[str | Method],
    sparsity: Sparsity | Sequence[Sparsity],
    ordering: Ordering | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    refine: int | Refine = 0,
    backend: Backend = "auto",
    drift: Drift | None = None,
    target: Target | None = None,
) -> list[PruneResult]:
    """Prune layers that share their inputs, such as the q, k and v projections of attention: what :func:`prune_layer` makes
    of each, but the Hessian and its factor (of those pruned left to right) are worked out once for all.

    A device is waited for twice: for which layers are reordered (not without an ordering), and for the results.

    Args:
        weights: of one dtype, on one device.
        methods: one for each weight.
        sparsity: of all, or one for each weight.

    Raises:
        ValueError, NotPositiveDefiniteError: as :func:`prune_layer`.
    """
    if not weights or len(methods) != len(weights):
        raise ValueError(f"methods: expected one for each of at least one weight, got {len(methods)} for {len(weights)}")
    patterns = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * len(weights)
    if len(patterns) != len(weights):
        raise ValueError(f"sparsity: expected one, or one for each of {len(weights)} weights, got {len(patterns)}")
    if isinstance(refine, int) and refine < 0:
        raise ValueError(f"refine: expected at least 0 steps, got {refine}")
    how = Refine(refine, tolerance=0) if isinstance(refine, int) else refine
    for weight in weights:
        _check(weight, moments, block_size, damping)
    chosen = [_method(method) for method in methods]
    if how and not all(method.sparse for method in chosen):
        raise ValueError(f"refine: expected 0 where a low-rank part is added to the pruned weight, got {how}")
    if target is not None and (drift is None or drift.columns != moments.columns):
        got = "none" if drift is None else f"{drift.columns}"
        raise ValueError(f"drift: expected that of {moments.columns} columns, which a target needs, got {got}")
    checked = [*weights, moments.gram] + (drift.sums if drift is not None else [])
    finite = [_finite(tensor) for tensor in checked]
    names = ["weight"] * len(weights) + ["moments", "drift", "drift"]
    if moments.device.type == "cpu":  # a device is not waited for
        _check_finite(names, finite)
    dtype = torch.promote_types(torch.promote_types(weights[0].dtype, moments.dtype), torch.float32)
    backend = resolve(backend, moments.device, dtype)

    dense = [weight.to(dtype) for weight in weights]
    results: list[PruneResult | None] = [None] * len(weights)
    for tried in dampings(damping):
        curvature = Curvature(moments, tried, dtype)
        asked = dense if target is None else target.of(dense, curvature, drift)
        waiting = [i for i, result in enumerate(results) if result is None]
        layers = [Layer(asked[i], curvature, patterns[i], ordering, block_size, backend) for i in waiting]
        settle(layers)
        solutions = [chosen[i].prune(layer) for i, layer in zip(waiting, layers, strict=True)]
        refined: Sequence[Refined | None] = [None] * len(waiting)
        if how:
            swept, masks = [s.weight for s in solutions], [s.mask for s in solutions]
            kinds = [layer.sparsity for layer in layers]
            refined = refine_layers(swept, [layer.weight for layer in layers], masks, curvature, kinds, how)
        found = [
            _Found(layer, chosen[i], solution, better, dense[i], weights[i].dtype)
            for i, layer, solution, better in zip(waiting, layers, solutions, refined, strict=True)
        ]
        facts = torch.stack([*finite, *(fact for f in found for fact in f.facts)]).tolist()
        _check_finite(names, facts[: len(finite)])
        for position, (i, f) in enumerate(zip(waiting, found, strict=True)):
            start = len(finite) + position * len(f.facts)
            results[i] = f.result(facts[start : start + len(f.facts)])
        if None not in results:
            return results
    raise NotPositiveDefiniteError(
        f"the Hessian of {moments.columns} columns is not positive definite at damping "
        f"{', '.join(f'{d:g}' for d in dampings(damping))}: the calibration inputs hold values too large or too small for "
        f"{str(dtype).removeprefix('torch.')}"
    )


class _Found:
    """One pruned layer before the device has been waited for.

    Attributes:
        facts: what the result tells in numbers, float64 tensors of no dimensions.
    """

    def __init__(
        self, layer: Layer, method: Method, solution: Solution, refined: Refined | None, dense: Tensor, dtype: torch.dtype
    ):
        self.layer, self.method, self.solution, self.refined = layer, method, solution, refined
        self.solved = (refined or solution).weight
        self.mask = (refined or solution).mask
        self.weight = self.solved.to(dtype)
        hessian, moved = layer.curvature.hessian, layer.weight is not dense
        before = solution.lost  # towards what was asked for
        if before is None:
            before = quadratic_form(layer.weight - solution.weight, hessian)
        missed = before
        if refined is not None or dtype != layer.weight.dtype:  # of the weight as returned
            missed = quadratic_form(layer.weight - self.weight.to(layer.weight), hessian)
        asked = quadratic_form(layer.weight, hessian)
        lost = quadratic_form(dense - self.weight.to(dense), hessian) if moved else missed
        total = quadratic_form(dense, hessian) if moved else asked
        none = torch.zeros_like(lost)
        failed = solution.factor.failed if solution.factor else none
        rechosen, left = (none, none) if refined is None else (refined.rechosen, ~refined.taken)
        facts = (failed, lost, total, missed, asked, before, rechosen, left, layer.order.relative_range, layer.dead.sum())
        self.facts = [fact.double() for fact in (*facts, _finite(self.weight))]

    def result(self, facts: Sequence[float]) -> PruneResult | None:
        """The result, None where the Hessian could not be factorised."""
        failed, lost, total, missed, asked, before, rechosen, left, relative_range, dead, finite = facts
        if failed:
            return None
        if not finite:
            raise ValueError(
                f"weight: the pruned layer does not fit {str(self.weight.dtype).removeprefix('torch.')}: "
                f"largest value {self.solved.abs().max():g}"
            )
        layer, moved = self.layer, self.method.sequential and bool(self.layer.moved)
        columns = layer.weight.shape[1]
        return PruneResult(
            weight=self.weight,
            mask=self.mask,
            order=layer.order.order if moved else torch.arange(columns, device=self.weight.device),
            relative_range=relative_range,
            reordered=moved,
            error=_share(lost, total),
            damping=layer.curvature.damping if self.solution.factor or self.solution.damped else 0.0,
            rank=self.solution.rank,
            dead_columns=int(dead),
            target_error=_share(missed, asked),
            unrefined_error=_share(missed if self.refined is None or left else before, asked),
            rechosen=int(rechosen),
            unrefined=bool(left),
        )


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """tr((W−V) H (W−V)ᵀ) / tr(W H Wᵀ) of W and V (rows, columns); 0 where the layer's output is zero."""
    powers = torch.stack([quadratic_form(weight - pruned, hessian), quadratic_form(weight, hessian)])
    return _share(*powers.tolist())


def _share(lost: float, total: float) -> float:
    return max(0.0, lost) / total if total > 0 else 0.0


def _method(method: str | Method) -> Method:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]()


def _finite(tensor: Tensor) -> Tensor:
    """Whether all is finite, a float64 tensor of no dimensions."""
    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all().double()  # both are NaN if anything is


def _check_finite(names: Sequence[str], flags: Sequence[Tensor | float]) -> None:
    for name, flag in zip(names, flags, strict=False):
        if not flag:
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _check(weight: Tensor, moments: InputMoments, block_size: int, damping: float) -> None:
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
