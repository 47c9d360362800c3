"""Walking a model block by block: collect moments, prune, and feed the next block."""

from .activations import Place
from .first_block import FirstBlock
from .plan import LayerReport, PassSeconds, PruningPlan, chosen
from .walk import prune_model

__all__ = ["FirstBlock", "LayerReport", "PassSeconds", "Place", "PruningPlan", "chosen", "prune_model"]
