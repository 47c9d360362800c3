"""Block-by-block pruning of a model: collect moments, prune, and compute the next block's inputs."""

from .activations import Place
from .capture import Probe, check_decoder, probe
from .first_block import FirstBlock
from .forward import answers_by_blocks, loading_blocks
from .loop import prune_model
from .plan import LayerReport, PassSeconds, PruningPlan, StarvedExperts, chosen, events, saved_and_total
from .state import Resume, RunState
from .weights import BlockWeights, InMemory, OnDisk

__all__ = [
    "BlockWeights",
    "FirstBlock",
    "InMemory",
    "LayerReport",
    "OnDisk",
    "PassSeconds",
    "Place",
    "Probe",
    "PruningPlan",
    "Resume",
    "RunState",
    "StarvedExperts",
    "answers_by_blocks",
    "check_decoder",
    "chosen",
    "events",
    "loading_blocks",
    "probe",
    "prune_model",
    "saved_and_total",
]
