"""Block-by-block pruning of a model: collect moments, prune, and compute the next block's inputs."""

from .activations import Place
from .blocks import prune_model
from .capture import Probe, check_decoder, probe
from .context import PassSeconds, PruneContext
from .first_block import FirstBlock
from .forward import answers_by_blocks, loading_blocks
from .plan import PruningPlan, chosen
from .report import LayerReport, events, saved_and_total
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
    "PruneContext",
    "PruningPlan",
    "Resume",
    "RunState",
    "answers_by_blocks",
    "check_decoder",
    "chosen",
    "events",
    "loading_blocks",
    "probe",
    "prune_model",
    "saved_and_total",
]
