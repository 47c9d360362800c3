"""Options of the solver, passed unchanged from the settings to :func:`rose_exp.engine.prune_layers`."""

from __future__ import annotations

from dataclasses import dataclass

from .bounds import NonNegative, Positive, check_options
from .kernels.backends import Backend
from .ordering import Ordering
from .products import Precision
from .refine import Refine
from .targets import Target


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options that every method shares.

    Args:
        block_size: number of columns whose masks are chosen together (unstructured), and that an ordering moves together.
        damping: added to H's diagonal, as a fraction of its mean; raised tenfold while H cannot be factorized.
        backend: for the sweep's inner loop: ``torch``, ``numba`` (CPU, float32), ``triton`` (CUDA, float32), or ``auto``, the
            fastest available one. All choose the same masks, except where rounding decides between near-equal scores.
        precision: of the matrix products that accumulate moments, see :class:`rose_exp.engine.InputMoments`.
    """

    block_size: Positive = 128
    damping: NonNegative = 0.01
    backend: Backend = "auto"
    precision: Precision = "float32"

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class SolverOptions(EngineOptions):
    """All options for solving a layer.

    Args:
        ordering: order of the columns; None prunes left to right. Methods that prune all at once give the same result in any
            order.
        refine: post-pruning refinement; None keeps the method's solution.
        target: the layer's regression target; None for the dense layer.
    """

    ordering: Ordering | None = None
    refine: Refine | None = None
    target: Target | None = None
