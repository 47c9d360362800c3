"""Replicates of a run: the same calibration data, perturbed by as much as rounding perturbs it.

Masks change where scores are nearly equal, and later blocks amplify the change. The spread of replicates is the part of a
result that depends on rounding alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import RoseExpError

SETTING = "calibration.replicate"


@contextmanager
def perturbed(model: nn.Module, replicate: int) -> Iterator[None]:
    """Multiply the output of a model's input embeddings by 1 + ε u, rounded to its dtype, while the body runs.

    ε is the machine epsilon of the dtype. The values u, one for each element, are uniform in [-1, 1]. They depend on
    ``replicate`` and the tokens of the window, but not on the batch, the process or the device.

    Args:
        replicate: number of the replicate; 0 leaves the embeddings unchanged.
    Raises:
        RoseExpError: transformers does not know the model's input embeddings, or the body does not call them.
    """
    if not replicate:
        yield
        return
    calls = 0

    def multiply(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        tokens = args[0] if args else kwargs["input"]
        factors = [_factors(replicate, window, output[place]) for place, window in enumerate(tokens)]
        return output * torch.stack(factors)

    hook = _embeddings(model, replicate).register_forward_hook(multiply, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
    if not calls:
        raise RoseExpError(
            f"{SETTING}: expected 0 for {type(model).__name__}, which does not call its input embeddings, got {replicate}"
        )


def _embeddings(model: nn.Module, replicate: int) -> nn.Module:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if embeddings is None:
        raise RoseExpError(
            f"{SETTING}: expected 0 for {type(model).__name__}, whose input embeddings are not known, got {replicate}"
        )
    return embeddings


def _factors(replicate: int, window: Tensor, like: Tensor) -> Tensor:
    """Return 1 + ε u for the embeddings of a window."""
    text = f"{replicate} {window.tolist()}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))
    noise = torch.rand(like.shape, generator=generator) * 2 - 1
    return (1 + torch.finfo(like.dtype).eps * noise.double()).to(like)
