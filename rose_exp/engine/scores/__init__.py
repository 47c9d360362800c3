"""What pruning a weight is expected to cost, which is what orders are made from.

Every file of this folder is one score, called by the file's name, with a function ``score`` from a
:class:`rose_exp.engine.methods.Layer` to a new tensor (columns, rows), nowhere negative.
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
