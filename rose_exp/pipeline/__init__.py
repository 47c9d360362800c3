"""Walking a model block by block: collect moments, prune, and feed the next block."""

from .walk import LayerReport, PruningPlan, chosen, prune_model

__all__ = ["LayerReport", "PruningPlan", "chosen", "prune_model"]
