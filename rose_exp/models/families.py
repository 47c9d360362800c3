"""What is particular about single model families. Everything else about a model is found from its structure.

Other packages add families through the entry point group ``rose_exp.families``::

    [project.entry-points."rose_exp.families"]
    mine = "my_package.families:MINE"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig

from ..runtime.errors import RoseExpError
from ..runtime.plugins import Plugin, plugins

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


@cache
def installed_families() -> tuple[Plugin, ...]:
    """Return the families that other installed packages provide, in alphabetical order of their entry points.

    Raises:
        RoseExpError: an entry point cannot be loaded, or is not a :class:`Family`.
    """
    for plugin in plugins(GROUP):
        if not isinstance(plugin.value, Family):
            raise RoseExpError(f"{plugin.where}: expected a Family, got {type(plugin.value).__name__}")
    return plugins(GROUP)


def families() -> tuple[Family, ...]:
    """Return all families, those of other packages first."""
    return (*(installed.value for installed in installed_families()), *BUILT_IN)
