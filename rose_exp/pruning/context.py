"""The environment of a pruning pass: device, processes, files, timings and callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..engine.study import LayerStudy
from ..runtime import signals as interruption
from ..runtime.ranks import Ranks
from .first_block import FirstBlock
from .report import LayerReport
from .state import RunState
from .weights import BlockWeights

SHOWN = 3  # names in a warning


@dataclass
class PassSeconds:
    """Time in seconds by kind of work.

    With several processes, waiting for the slowest one counts as solving.

    Attributes:
        calibrating: forward passes with dense weights, without the matrix products of the moments.
        moments: matrix products of the moments during these passes.
        studying: layer studies.
        solving: pruning and refinement of layers.
        advancing: forward passes of pruned blocks.
        surveying: survey of the dense model for sparsity allocation.
        reconstructing: training of pruned blocks, and forward passes of the dense model for its targets.
        shared: time an earlier run spent on the first block's moments that this run reuses; not part of this run's time.
    """

    calibrating: float = 0.0
    moments: float = 0.0
    studying: float = 0.0
    solving: float = 0.0
    advancing: float = 0.0
    surveying: float = 0.0
    reconstructing: float = 0.0
    shared: float = 0.0


@dataclass
class PruneContext:
    """Where and how a model is pruned; nothing in it changes the result.

    Args:
        device: each unit moves there while it is processed.
        ranks: the processes that share the work, each with its own copy of the model.
        scratch: folder for activations on disk; None for the system's temporary folder.
        seconds: timings to add to.
        weights: where the weights of a language model's blocks are stored; None for in memory.
        state: checkpoint to write each pruned unit to; units that it already holds are restored.
        first_block: cache for the moments of a language model's first block, reused by runs with the same ``first_key``. The
            key must distinguish everything the moments depend on. Denoisers ignore the cache.
        moments_bytes: largest size of the moments that are kept at a time; None for no limit. Blocks with more moments, such as
            mixtures of many experts, are calibrated in several passes, from the last layers to the first.
        on_warning: called with the kind and the detail of each warning about the whole model.
        on_layer: called with the index of each pruned layer, starting at 0, and its report, once its unit is pruned.
        on_study: called with the name of each studied layer and the result, on the rank that solves the layer.
    """

    device: torch.device | str = "cpu"
    ranks: Ranks = field(default_factory=Ranks)
    scratch: Path | None = None
    seconds: PassSeconds = field(default_factory=PassSeconds)
    weights: BlockWeights | None = None
    state: RunState | None = None
    first_block: FirstBlock | None = None
    first_key: str | None = None
    moments_bytes: int | None = None
    on_warning: Callable[[str, str], None] | None = None
    on_layer: Callable[[int, LayerReport], None] | None = None
    on_study: Callable[[str, LayerStudy], None] | None = None

    def now(self) -> float:
        """Return the current time in seconds after synchronizing the device."""
        return synchronized_now(self.device)

    def warn(self, kind: str, names: Sequence[str], reason: str) -> None:
        """Pass on a warning about some layers or tensors, if there are any."""
        if names and self.on_warning is not None:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            self.on_warning(kind, f"{', '.join(names[:SHOWN])}{more}: {reason}")

    def check_stop_between_units(self) -> None:
        """Stop all ranks at the same unit if any rank has received a stop request."""
        if any(self.ranks.gather(interruption.stop_requested())):
            raise interruption.Interrupted("stopped between two units")

    def check_stop_between_batches(self) -> None:
        """Stop if this is the only process; several processes stop together between two units."""
        if self.ranks.size == 1:
            interruption.check()


def synchronized_now(device: torch.device | str) -> float:
    """Return the current time in seconds after synchronizing a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
