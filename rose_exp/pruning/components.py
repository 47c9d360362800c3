"""The optional capabilities of pruning, in the order in which the loop calls them."""

from __future__ import annotations

from .allocation import AllocationSurvey
from .component import Component
from .context import PruneContext
from .experts import StarvedExperts
from .first_block import FirstBlockReuse
from .permutation import ChannelPermutation
from .plan import PruningPlan
from .reconstruction import BlockReconstruction
from .structured import StructuredRemoval
from .study import LayerStudies
from .targets import RegressionTargets

COMPONENTS: tuple[type[Component], ...] = (
    StructuredRemoval,
    AllocationSurvey,  # before the regression targets, whose dense activations would take memory during the survey
    RegressionTargets,
    BlockReconstruction,  # after the regression targets, whose dense hidden states it shares
    FirstBlockReuse,
    StarvedExperts,
    LayerStudies,  # before the permutation: a study shows the original channels
    ChannelPermutation,
)


def components_for(plan: PruningPlan, context: PruneContext) -> list[Component]:
    """Return the components that a plan uses."""
    return [component for kind in COMPONENTS if (component := kind.create(plan, context)) is not None]
