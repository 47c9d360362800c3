"""What is particular about single model families. Everything else about a model is found from its structure.

Other packages add families through the entry point group ``rose_exp.families``::

    [project.entry-points."rose_exp.families"]
    mine = "my_package.families:MINE"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig

from ..runtime.errors import RoseExpError

if TYPE_CHECKING:
    from .experts import Layout
    from .heads_and_neurons import Structure

GROUP = "rose_exp.families"


@dataclass(frozen=True)
class Family:
    """What the structure of a family's models does not show.

    Attributes:
        name: name of the family, for messages and the run record.
        model_types: parts of ``config.model_type`` by which :attr:`bos` applies to a model.
        bos: whether every window needs a BOS token at its start.
        layouts: layouts of stacked experts, tried before the built-in ones.
        structures: function that returns the removable heads and neurons of a module, given the module and its full name; an
            empty list for modules of other families. It is called before the built-in layouts are tried.
    """

    name: str
    model_types: Sequence[str] = ()
    bos: bool = False
    layouts: Sequence[Layout] = ()
    structures: Callable[[nn.Module, str], Sequence[Structure]] | None = None

    def matches(self, config: PreTrainedConfig) -> bool:
        """Return whether a model, or the text model inside it, belongs to the family."""
        kinds = (config.model_type, config.get_text_config().model_type)
        return any(part in kind for kind in kinds for part in self.model_types)


BUILT_IN = (
    # EleutherAI/lm-evaluation-harness pull requests 1465 (Gemma 7B on lambada_openai: accuracy 0.004 without BOS, 0.671
    # with it) and 2049 (Gemma 2), and issue 3430 (Gemma 3); ggml-org/llama.cpp pull request 21500 (Gemma 4)
    Family("Gemma", model_types=("gemma",), bos=True),
)


@dataclass(frozen=True)
class Installed:
    """A family that another package provides.

    Attributes:
        source: name and version of the package.
    """

    family: Family
    source: str = field(default="")


@cache
def installed_families() -> tuple[Installed, ...]:
    """Return the families that other installed packages provide, in alphabetical order of their entry points.

    Raises:
        RoseExpError: an entry point cannot be loaded, or is not a :class:`Family`.
    """
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        source = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
        try:
            family = point.load()
        except (ImportError, AttributeError) as error:
            raise RoseExpError(f"entry point {point.name} of {GROUP} ({source}): cannot load {point.value}: {error}") from error
        if not isinstance(family, Family):
            raise RoseExpError(
                f"entry point {point.name} of {GROUP} ({source}): expected a Family, got {type(family).__name__} {point.value}"
            )
        found.append(Installed(family, source))
    return tuple(found)


def families() -> tuple[Family, ...]:
    """Return all families, those of other packages first."""
    return (*(installed.family for installed in installed_families()), *BUILT_IN)
