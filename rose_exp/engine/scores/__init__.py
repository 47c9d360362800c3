"""Scores: expected losses of weights, from which orderings are computed.

Each file in this folder defines the score of that name, as a function ``score`` from a
:class:`rose_exp.engine.methods.Layer` to a new non-negative tensor (columns, rows).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

SCORES: dict[str, Callable[[Any], Tensor]] = {
    file.name: importlib.import_module(f"{__name__}.{file.name}").score for file in pkgutil.iter_modules(__path__)
}
