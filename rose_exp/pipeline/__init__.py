"""Walking a model block by block: collect moments, prune, and feed the next block."""

from .activations import Place
from .walk import LayerReport, PassSeconds, PruningPlan, chosen, prune_model

__all__ = ["LayerReport", "PassSeconds", "Place", "PruningPlan", "chosen", "prune_model"]
