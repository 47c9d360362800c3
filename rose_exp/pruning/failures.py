"""Errors that the code of a model raises, as opposed to errors of this package."""

from __future__ import annotations

from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import RoseExpError
from ..runtime.outside import reason

PACKAGE = __name__.partition(".")[0]


def run_model(model: nn.Module, tokens: Tensor) -> Any:
    """Run a model on tokens alone, and return its output.

    Raises:
        RoseExpError: the model's own code fails, for instance because it requires the hidden states of another model.
    """
    try:
        return model(input_ids=tokens, use_cache=False)
    except Exception as error:
        if not fails_itself(model, error):
            raise
        raise RoseExpError(
            f"model: expected a decoder that runs on token IDs alone, got {type(model).__name__}, which fails: {reason(error)}"
        ) from error


def fails_itself(model: nn.Module, error: Exception) -> bool:
    """Return whether the code of a model raised an error.

    Otherwise, the error comes from this package, which the model calls through hooks, or memory is exhausted.
    """
    if isinstance(error, (RoseExpError, torch.OutOfMemoryError, MemoryError)):
        return False
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    last = max(place for place, package in enumerate(packages) if package == PACKAGE)
    own = {type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch"}
    return bool(own & set(packages[last + 1 :]))
