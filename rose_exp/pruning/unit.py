"""The unit of the pruning loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..models import LinearLayer
from .plan import PruningPlan
from .report import LayerReport


@dataclass
class Unit:
    """Layers that are calibrated together.

    Attributes:
        index: position among the units of the model.
        name: name for progress bars and messages.
        module: module that contains the layers.
        module_name: full name of the module in the model; empty for the model itself.
        layers: all linear layers of the unit by name.
        groups: the layers to prune in call order, grouped by shared input.
        part: reports and weights of layers that an earlier process has pruned, by full name.
        reports: reports of all pruned layers, once they are pruned.
    """

    index: int
    name: str
    module: nn.Module
    module_name: str
    plan: PruningPlan
    layers: Mapping[str, LinearLayer]
    groups: list[list[LinearLayer]]
    part: tuple[list[LayerReport], dict[str, Tensor]] = field(default_factory=lambda: ([], {}))
    reports: list[LayerReport] = field(default_factory=list, kw_only=True)
