"""How fast the pruned model really is: 2:4 weights on a GPU with sparse tensor cores, through what torch provides.

Zeros alone make nothing smaller or faster. Where no hardware makes use of the pattern, nothing is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import SemiStructured, Sparsity
from ..models import LinearLayer

SPARSE_TENSOR_CORES = (8, 0)  # compute capability from which on there are any: Ampere
MULTIPLES = (32, 64)  # of rows and columns, that torch converts
WARM_UP = 3


@dataclass(frozen=True)
class Speed:
    """One forward pass of the pruned model, with its zeros stored and multiplied (``dense``) and without (``sparse``).

    Attributes:
        dense_seconds, sparse_seconds: medians of a pass.
        dense_bytes, sparse_bytes: of the weights that were converted.
        difference: largest absolute difference of the logits, as a share of their largest absolute value.
        layers: how many were converted.
    """

    dense_seconds: float
    sparse_seconds: float
    dense_bytes: int
    sparse_bytes: int
    difference: float
    layers: int

    def metrics(self) -> dict[str, float]:
        return {f"speed.{name}": value for name, value in asdict(self).items() if name != "layers"}


def obstacle(
    sparsity: Sparsity | None, device: torch.device, dtype: torch.dtype, layers: Sequence[LinearLayer] = ()
) -> str | None:
    """Why the speed of a model cannot be measured here; None: it can."""
    if sparsity != SemiStructured(2, 4):
        return f"expected 2:4 sparsity, the only pattern that torch has fast products for, got {sparsity or 'a dense model'}"
    if device.type != "cuda":
        return f"expected a CUDA device with sparse tensor cores, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < SPARSE_TENSOR_CORES:
        return f"expected a GPU of compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"expected model.dtype float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    for layer in layers:
        rows, columns = layer.weight.shape
        if layer.transposed or rows % MULTIPLES[0] or columns % MULTIPLES[1]:
            kind = "transposed " if layer.transposed else ""
            expected = f"linear layers of multiples of {MULTIPLES[0]} x {MULTIPLES[1]}"
            return f"expected {expected}, got {kind}{layer.name} of {rows} x {columns}"
    return None


@torch.no_grad()
def measure(model: nn.Module, layers: Sequence[LinearLayer], tokens: Tensor, repeats: int = 10) -> Speed:
    """Time a forward pass of the model before and after its 2:4 layers are converted; they are put back afterwards.

    Args:
        layers: of 2:4 sparsity, all ``nn.Linear``.
        tokens: (windows, length) int64, on the model's device.
    """
    from torch.sparse import to_sparse_semi_structured

    dense = {layer.name: layer.module.weight for layer in layers}
    before, logits = _timed(lambda: model(input_ids=tokens, use_cache=False).logits, tokens.device, repeats)
    try:
        for layer in layers:
            layer.module.weight = nn.Parameter(to_sparse_semi_structured(dense[layer.name].detach()), requires_grad=False)
        after, sparse_logits = _timed(lambda: model(input_ids=tokens, use_cache=False).logits, tokens.device, repeats)
        sparse_bytes = sum(_stored_bytes(layer.module.weight) for layer in layers)
    finally:
        for layer in layers:
            layer.module.weight = dense[layer.name]
    return Speed(
        dense_seconds=before,
        sparse_seconds=after,
        dense_bytes=sum(weight.nbytes for weight in dense.values()),
        sparse_bytes=sparse_bytes,
        difference=float((sparse_logits - logits).abs().max() / logits.abs().max()),
        layers=len(layers),
    )


def _timed(run: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, Tensor]:
    """Median seconds of a run, and what it answers."""
    times = []
    answer = None
    for repeat in range(WARM_UP + repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        answer = run()
        torch.cuda.synchronize(device)
        if repeat >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times), answer.float()


def _stored_bytes(weight: Any) -> int:
    """Of a semi-structured tensor: the values that are kept, and where they stand."""
    parts = (getattr(weight, name, None) for name in ("packed", "meta"))
    return sum(part.nbytes for part in parts if part is not None)
