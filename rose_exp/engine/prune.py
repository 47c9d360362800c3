"""Entry points of the engine: prune one layer, or layers that share their inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .curvature import Curvature
from .errors import NOISE, exact_form, relative_error, share
from .hessian import NotPositiveDefiniteError, dampings
from .kernels.backends import resolve
from .methods import METHODS, Layer, Method, Solution, resolve_orders
from .moments import InputMoments
from .options import SolverOptions
from .patterns import Sparsity, as_sparsity
from .products import quadratic_form
from .ranges import Extent, extents, finite, read_extents, scaled
from .refine import Refine, Refined
from .refine import refine as refine_layers
from .targets import CrossMoments

__all__ = ["PruneResult", "prune_layer", "prune_layers", "relative_error"]


@dataclass(frozen=True)
class PruneResult:
    """A pruned layer and its statistics.

    Attributes:
        weight: (rows, columns), in the dtype of the input, exactly zero where pruned.
        mask: (rows, columns) bool, True where pruned.
        rank: rank of the matrix that OATS adds to the pruned one. If it is not 0, ``weight`` is their dense sum, and the
            layer is stored as its unmasked weights and rank · (rows + columns) more numbers.
        order: (columns,) int64, the order in which columns were pruned; left to right for methods that prune all at once.
        relative_range: (max − min) / max of the block losses, by the ordering's score (Wanda's without one), 0 to 1.
        reordered: whether the columns were pruned in an order other than left to right.
        error: tr((W−V) H (W−V)ᵀ) / tr(W H Wᵀ) of the weight as returned; 0 if the layer's output is zero.
        target_error: the same relative to the layer's regression target, which is W unless a target is given.
        unrefined_error: ``target_error`` before refinement.
        mask_changes: number of pruned weights that were not pruned before refinement.
        refinement_rejected: whether refinement was rejected because it would have increased the error.
        damping: the damping that was used, as a fraction of the mean of H's diagonal; 0 for methods that invert no
            Hessian.
        dead_columns: number of dead input channels (always zero on the calibration data).
        requested: fraction of the weights to prune according to the sparsity pattern.
        hessian_used: whether the result depends on the Hessian beyond its diagonal: through the method, refinement or a
            regression target. Errors, which are measured with the Hessian, do not count.
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
    mask_changes: int = 0
    refinement_rejected: bool = False
    requested: float = 0.0
    hessian_used: bool = True

    @property
    def stored(self) -> int:
        """How many numbers the layer stores: its unmasked weights and the factors of the added matrix."""
        rows, columns = self.mask.shape
        return int((~self.mask).sum()) + self.rank * (rows + columns)


def prune_layer(
    weight: Tensor,
    moments: InputMoments,
    *,
    method: str | Method = "sparsegpt",
    sparsity: Sparsity | float | str,
    refine: int | Refine | None = None,
    cross_moments: CrossMoments | None = None,
    **options: Any,
) -> PruneResult:
    """Prune one linear layer, y = W x, from the moments of its inputs.

    Args:
        weight: W, (rows, columns) = (outputs, inputs), any float dtype; not modified. The layer is solved in float32, or
            in float64 if ``weight`` or the moments are float64.
        moments: moments of the layer's inputs.
        method: a name of :data:`METHODS`, or a method with its own options.
        sparsity: a pattern, the ratio of unstructured sparsity such as 0.7, or an N:M pattern as text such as ``"2:4"``.
        refine: number of least-squares steps on the final mask, or the options of post-pruning refinement.
        cross_moments: cross moments of the dense and the pruned model's inputs; required with a target.
        options: fields of :class:`SolverOptions`, such as ``ordering``, ``block_size``, ``damping``, ``backend`` or ``target``.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if an argument has the wrong kind, shape or range, a weight, moments, cross moments or a target are not
            finite, or inputs, a result or an error exceed the range of the precision.
        NotPositiveDefiniteError: if the layer cannot be solved at any damping tried.
    """
    if isinstance(refine, int):
        refine = Refine(refine, tolerance=0)
    solver_options = SolverOptions(refine=refine, **options)
    return prune_layers(
        [weight], moments, methods=[method], sparsity=sparsity, options=solver_options, cross_moments=cross_moments
    )[0]


@torch.no_grad()
def prune_layers(
    weights: Sequence[Tensor],
    moments: InputMoments,
    *,
    methods: Sequence[str | Method],
    sparsity: Sparsity | float | str | Sequence[Sparsity | float | str],
    options: SolverOptions | None = None,
    cross_moments: CrossMoments | None = None,
) -> list[PruneResult]:
    """Prune layers that share their inputs, such as the q, k and v projections of attention.

    Each result equals that of :func:`prune_layer`. The Hessian, and its factor for layers pruned left to right, are computed
    once for all. A GPU synchronizes up to three times: to check the range of the numbers, to read which layers are reordered
    (only with an ordering), and to read the results.

    Args:
        weights: weights of one dtype, on one device.
        methods: one method for each weight.
        sparsity: one sparsity for all weights, or one for each, as in :func:`prune_layer`.
        options: options of the solver; None for the defaults.
        cross_moments: cross moments of the dense and the pruned model's inputs; required with a target.

    Raises:
        ValueError, NotPositiveDefiniteError: as :func:`prune_layer`.
    """
    options = options or SolverOptions()
    if not weights or len(methods) != len(weights):
        raise ValueError(f"methods: expected one for each of at least one weight, got {len(methods)} for {len(weights)}")
    one = isinstance(sparsity, str) or not isinstance(sparsity, Sequence)
    patterns = [as_sparsity(value) for value in ([sparsity] * len(weights) if one else sparsity)]
    if len(patterns) != len(weights):
        raise ValueError(f"sparsity: expected one, or one for each of {len(weights)} weights, got {len(patterns)}")
    for weight in weights:
        _check(weight, moments)
    chosen = [_method(method) for method in methods]
    if options.refine and not all(method.sparse for method in chosen):
        raise ValueError(f"refine: expected 0 where a low-rank part is added to the pruned weight, got {options.refine}")
    if options.target and (cross_moments is None or cross_moments.columns != moments.columns):
        got = "none" if cross_moments is None else f"{cross_moments.columns}"
        raise ValueError(f"cross_moments: expected those of {moments.columns} columns for the target, got {got}")
    dtype = torch.promote_types(torch.promote_types(weights[0].dtype, moments.dtype), torch.float32)
    options = replace(options, backend=resolve(options.backend, moments.device, dtype))

    curvature = Curvature(moments, options.damping, dtype)
    problems = _problems(weights, chosen, patterns, curvature, cross_moments, options)
    results: list[PruneResult | None] = [None] * len(weights)
    for damping in dampings(options.damping):
        if damping != curvature.damping:
            curvature = Curvature(moments, damping, dtype)
        pending = [i for i, result in enumerate(results) if result is None]
        layers = [problems[i].layer(curvature, options) for i in pending]
        resolve_orders(layers)
        attempts = list(_solve([problems[i] for i in pending], layers, curvature, options))
        facts = [fact for attempt in attempts if isinstance(attempt, _Attempt) for fact in attempt.facts]
        values = iter(torch.stack(facts).tolist() if facts else [])
        for i, attempt in zip(pending, attempts, strict=True):
            if isinstance(attempt, _Attempt):
                results[i] = attempt.result([next(values) for _ in attempt.facts])
        if None not in results:
            return results
    reason = next((f"; {attempt}" for attempt in attempts if isinstance(attempt, torch.linalg.LinAlgError)), "")
    raise NotPositiveDefiniteError(
        f"the Hessian of {moments.columns} columns is not positive definite at damping "
        f"{', '.join(f'{d:g}' for d in dampings(options.damping))}: the calibration inputs have values too large or too small "
        f"for {str(dtype).removeprefix('torch.')}{reason}"
    )


@dataclass(frozen=True)
class _Problem:
    """One layer to solve.

    Attributes:
        weight: the original weight, (rows, columns).
        dense: W in the precision in which the layer is solved.
        goal: the regression target, which is pruned; ``dense`` itself without one.
        extent: size of the outputs, and the power of two by which ``dense`` and ``goal`` are scaled.
    """

    weight: Tensor
    dense: Tensor
    goal: Tensor
    method: Method
    sparsity: Sparsity
    extent: Extent

    def layer(self, curvature: Curvature, options: SolverOptions) -> Layer:
        goal, shift = scaled(self.goal, self.extent.shift), self.extent.shift
        ordering, block_size, backend = options.ordering, options.block_size, options.backend
        return Layer(goal, curvature, self.sparsity, ordering, block_size, backend, shift=shift)


def _problems(
    weights: Sequence[Tensor],
    methods: Sequence[Method],
    patterns: Sequence[Sparsity],
    curvature: Curvature,
    cross_moments: CrossMoments | None,
    options: SolverOptions,
) -> list[_Problem]:
    """Return the layers to solve, after one synchronized check that all numbers are finite and in range.

    Raises:
        ValueError: if a number is not finite or exceeds the range of the precision.
    """
    dense = [weight.to(curvature.dtype) for weight in weights]
    goals = options.target.of(dense, curvature, cross_moments) if options.target else dense
    named = [("weight", weight) for weight in weights] + [("moments", curvature.moments.gram)]
    named += [("cross_moments", sums) for sums in (cross_moments.sums if cross_moments is not None else [])]
    parts = [[finite(tensor) for _, tensor in named], extents(dense, curvature)]
    parts += [[finite(goal) for goal in goals], extents(goals, curvature)] if options.target else []
    values = iter(torch.stack([fact for part in parts for fact in part]).tolist())
    flags, dense_values, *goal_values = [[next(values) for _ in part] for part in parts]
    _check_finite([name for name, _ in named], flags)
    layer_extents = read_extents(dense_values, curvature.dtype)
    if goal_values:
        _check_finite(["target"] * len(goals), goal_values[0])
        pairs = zip(layer_extents, read_extents(goal_values[1], curvature.dtype), strict=True)
        layer_extents = [max(pair, key=lambda extent: extent.output) for pair in pairs]
    return [_Problem(*fields) for fields in zip(weights, dense, goals, methods, patterns, layer_extents, strict=True)]


def _check_finite(names: Sequence[str], flags: Sequence[float]) -> None:
    for name, flag in zip(names, flags, strict=True):
        if not flag:
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _solve(
    problems: Sequence[_Problem], layers: Sequence[Layer], curvature: Curvature, options: SolverOptions
) -> Iterator[_Attempt | torch.linalg.LinAlgError]:
    """Yield an attempt for each layer, or the error if its method fails in linear algebra."""
    solutions, uses = [], []
    for problem, layer in zip(problems, layers, strict=True):
        curvature.hessian_used = False  # the check of ranges has read it
        solutions.append(_solution(problem.method, layer))
        uses.append(curvature.hessian_used)
    solved = [i for i, solution in enumerate(solutions) if isinstance(solution, Solution)]
    refined: dict[int, Refined] = {}
    if options.refine and solved:
        weights, masks = [solutions[i].weight for i in solved], [solutions[i].mask for i in solved]
        targets, kinds = [layers[i].weight for i in solved], [layers[i].sparsity for i in solved]
        refined = dict(zip(solved, refine_layers(weights, targets, masks, curvature, kinds, options.refine), strict=True))
    for i, (problem, layer, solution) in enumerate(zip(problems, layers, solutions, strict=True)):
        yield _Attempt(problem, layer, solution, refined.get(i), uses[i]) if i in solved else solution


def _solution(method: Method, layer: Layer) -> Solution | torch.linalg.LinAlgError:
    """Return the solution of a method, or its error, such as an eigenvalue problem that does not converge."""
    try:
        return method.prune(layer)
    except torch.linalg.LinAlgError as error:
        return error


class _Attempt:
    """One pruned layer before its statistics are read from the device.

    Attributes:
        facts: statistics of the result, scalar float64 tensors.
    """

    def __init__(self, problem: _Problem, layer: Layer, solution: Solution, refined: Refined | None, hessian_used: bool = True):
        self.problem, self.layer, self.solution, self.refined = problem, layer, solution, refined
        self.hessian_used = hessian_used or refined is not None or problem.goal is not problem.dense
        self.mask = (refined or solution).mask
        self.solved = self._unscaled((refined or solution).weight)
        self.weight = self.solved.to(problem.weight.dtype)
        exact = self.returned = (refined or solution).weight
        if self.weight is not exact:  # ``returned`` is the rounded weight at the scale of the solution
            self.returned = scaled(self.weight.to(self.solved), problem.extent.shift)
            if problem.extent.shift and torch.equal(self.returned, exact):
                self.returned = exact
        self.dense = layer.weight if problem.goal is problem.dense else scaled(problem.dense, problem.extent.shift)
        hessian, moved = layer.curvature.hessian, self.dense is not layer.weight
        unrefined = solution.lost  # of the regression target
        if unrefined is None:
            unrefined = quadratic_form(layer.weight - solution.weight, hessian)
        goal_loss = unrefined
        if self.returned is not solution.weight:
            goal_loss = quadratic_form(layer.weight - self.returned, hessian)
        goal_power = quadratic_form(layer.weight, hessian)
        loss = quadratic_form(self.dense - self.returned, hessian) if moved else goal_loss
        power = quadratic_form(self.dense, hessian) if moved else goal_power
        none = torch.zeros_like(loss)
        failed = solution.factor.failed if solution.factor else none
        mask_changes, rejected = (none, none) if refined is None else (refined.mask_changes, ~refined.taken)
        facts = (failed, loss, power, goal_loss, goal_power, unrefined, mask_changes, rejected)
        facts = (*facts, layer.order.relative_range, layer.dead.sum())
        self.facts = [fact.double() for fact in (*facts, finite(self.solved), finite(self.weight))]

    def result(self, facts: Sequence[float]) -> PruneResult | None:
        """Return the result, or None if the layer cannot be solved at this damping.

        Raises:
            ValueError: if the result or its error exceeds the range of the dtype.
        """
        failed, loss, power, goal_loss, goal_power, unrefined, mask_changes, rejected = facts[:8]
        relative_range, dead, is_solved, fits = facts[8:]
        inverted = bool(self.solution.factor or self.solution.damped)
        if failed or (not is_solved and inverted):
            return None
        if not fits:
            raise ValueError(
                f"weight: the pruned layer does not fit {str(self.weight.dtype).removeprefix('torch.')}: "
                f"largest value {self.solved.abs().max():g}"
            )
        layer, goal, moved = self.layer, self.layer.weight, self.problem.method.sequential and bool(self.layer.reordered)
        goal_error = self._share(goal_loss, goal_power, goal, self.returned)
        unrefined_error = goal_error
        if self.refined is not None and not rejected:
            unrefined_error = self._share(unrefined, goal_power, goal, self.solution.weight)
        columns = layer.weight.shape[1]
        return PruneResult(
            weight=self.weight,
            mask=self.mask,
            order=layer.order.order if moved else torch.arange(columns, device=self.weight.device),
            relative_range=relative_range,
            reordered=moved,
            error=goal_error if self.dense is goal else self._share(loss, power, self.dense, self.returned),
            damping=layer.curvature.damping if inverted else 0.0,
            rank=self.solution.rank,
            dead_columns=int(dead),
            target_error=goal_error,
            unrefined_error=unrefined_error,
            mask_changes=int(mask_changes),
            refinement_rejected=bool(rejected),
            requested=self.problem.sparsity.ratio,
            hessian_used=self.hessian_used,
        )

    def _unscaled(self, weight: Tensor) -> Tensor:
        """Undo the scaling of a weight; entries that the method does not change stay bitwise equal."""
        shift = self.problem.extent.shift
        if not shift:
            return weight
        return torch.where((weight == self.layer.weight) & ~self.mask, self.problem.goal, scaled(weight, -shift))

    def _share(self, lost: float, total: float, goal: Tensor, pruned: Tensor) -> float:
        """Return ``lost`` / ``total``, recomputed in float64 if float32 values are not finite or within rounding error."""
        floor = NOISE * math.ldexp(self.problem.extent.output, self.problem.extent.shift) ** 2
        if goal.dtype != torch.float64 and not (NOISE * total < lost < math.inf and floor < total < math.inf):
            hessian = self.layer.curvature.hessian
            lost, total = exact_form(goal.double() - pruned.double(), hessian), exact_form(goal, hessian)
        return share(lost, total)


def _method(method: str | Method) -> Method:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]()


def _check(weight: Tensor, moments: InputMoments) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape (rows, columns), neither 0, got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating type, got {weight.dtype}")
    if weight.shape[1] != moments.columns:
        raise ValueError(f"moments: expected {weight.shape[1]} columns, as the weight has, got {moments.columns}")
    if weight.device != moments.device:
        raise ValueError(f"moments: expected on {weight.device}, where the weight is, got {moments.device}")
