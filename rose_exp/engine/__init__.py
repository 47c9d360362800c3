"""The pruning engine: tensors in, tensors out. It imports torch and nothing else of this project.

>>> moments = InputMoments(columns)
>>> moments.update(inputs)                       # (..., columns), as often as there are batches
>>> result = prune_layer(weight, moments, sparsity=Unstructured(0.7), ordering=Ordering.rose())
"""

from .allocation import Allocation
from .groups import Structured
from .hessian import NotPositiveDefiniteError
from .methods import ALPS, METHODS, DSnoT, Magnitude, Method, SparseGPT, Wanda
from .moments import InputMoments
from .options import EngineOptions, SolverOptions
from .ordering import Ordering
from .patterns import SemiStructured, Sparsity, Unstructured
from .products import Precision
from .prune import PruneResult, prune_layer, prune_layers, relative_error
from .refine import Refine
from .targets import CrossMoments, Target

__all__ = [
    "ALPS",
    "METHODS",
    "Allocation",
    "CrossMoments",
    "DSnoT",
    "EngineOptions",
    "InputMoments",
    "Magnitude",
    "Method",
    "NotPositiveDefiniteError",
    "Ordering",
    "Precision",
    "PruneResult",
    "Refine",
    "SemiStructured",
    "SolverOptions",
    "SparseGPT",
    "Sparsity",
    "Structured",
    "Target",
    "Unstructured",
    "Wanda",
    "prune_layer",
    "prune_layers",
    "relative_error",
]
