"""Measure the speed of models with 2:4 sparsity on GPUs with sparse tensor cores, using torch's semi-structured kernels.

Zeros alone save neither memory nor time. Without hardware support for the pattern, nothing is measured.
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

SPARSE_TENSOR_CORES = (8, 0)  # minimum compute capability: Ampere
MULTIPLES = (32, 64)  # of rows and columns, required by torch
WARM_UP = 3


@dataclass(frozen=True)
class Speed:
    """Time and memory of a forward pass of the pruned model with dense and with semi-structured weights.

    Attributes:
        dense_seconds, sparse_seconds: median time of a pass.
        dense_bytes, sparse_bytes: memory of the converted weights.
        difference: largest absolute difference of the logits, relative to their largest absolute value.
        layers: number of converted layers.
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
    """Return the reason why the speed of a model cannot be measured, or None if it can."""
    if sparsity != SemiStructured(2, 4):
        return f"expected 2:4 sparsity, the only pattern with fast kernels in torch, got {sparsity or 'a dense model'}"
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
            expected = f"linear layers with multiples of {MULTIPLES[0]} x {MULTIPLES[1]} weights"
            return f"expected {expected}, got {kind}{layer.name} of {rows} x {columns}"
    return None


@torch.no_grad()
def measure(model: nn.Module, layers: Sequence[LinearLayer], tokens: Tensor, repeats: int = 10) -> Speed:
    """Time a forward pass before and after converting the 2:4 layers, and restore them.

    Args:
        layers: layers with 2:4 sparsity, all ``nn.Linear``.
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
    """Return the median seconds of a call, and its last result in float32."""
    times = []
    output = None
    for repeat in range(WARM_UP + repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        output = run()
        torch.cuda.synchronize(device)
        if repeat >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times), output.float()


def _stored_bytes(weight: Any) -> int:
    """Return the memory of a semi-structured tensor: its nonzero values and their positions."""
    parts = (getattr(weight, name, None) for name in ("packed", "meta"))
    return sum(part.nbytes for part in parts if part is not None)
