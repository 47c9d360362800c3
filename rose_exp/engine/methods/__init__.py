"""The pruning methods, by the name that :func:`rose_exp.engine.prune_layer` knows them by."""

from .base import Layer, Method, Solution, settle
from .dsnot import DSnoT
from .magnitude import Magnitude
from .sparsegpt import SparseGPT
from .wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "dsnot": DSnoT,
    "sparsegpt": SparseGPT,
}

__all__ = ["METHODS", "DSnoT", "Layer", "Magnitude", "Method", "Solution", "SparseGPT", "Wanda", "settle"]
