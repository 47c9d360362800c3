"""Reimplementation of the loops of the released SparseGPT and ROSE code, as the baseline of the benchmarks.

This is not a reference for results: masks follow the released code, which prunes one more weight per block.
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rose_exp.engine import SemiStructured, Unstructured
from rose_exp.models import find_blocks, linear_layers
from rose_exp.pruning.capture import probe, trace

BLOCK = 128
DAMPING = 0.01
THRESHOLD = 0.5


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: Unstructured | SemiStructured) -> Tensor:
    """Prune with the released loop: a sort per block for the threshold, then ten small operations per column."""
    w, h = weight.clone(), hessian.clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    grouped = isinstance(sparsity, SemiStructured)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, u = w[:, start:stop].clone(), factor[start:stop, start:stop]
        kept, errors, losses = torch.zeros_like(block), torch.zeros_like(block), torch.zeros_like(block)
        if grouped:
            mask = torch.zeros_like(block, dtype=torch.bool)
        else:
            saliency = block**2 / u.diagonal().reshape(1, -1) ** 2
            threshold = torch.sort(saliency.flatten())[0][int(saliency.numel() * sparsity.ratio)]
            mask = saliency <= threshold
        for j in range(stop - start):
            column, scale = block[:, j], u[j, j]
            if grouped and j % sparsity.group == 0:
                end = j + sparsity.group
                saliency = block[:, j:end] ** 2 / u.diagonal()[j:end].reshape(1, -1) ** 2
                mask.scatter_(1, j + torch.topk(saliency, sparsity.pruned, dim=1, largest=False)[1], True)
            pruned = column.clone()
            pruned[mask[:, j]] = 0
            kept[:, j] = pruned
            losses[:, j] = (column - pruned) ** 2 / scale**2
            error = (column - pruned) / scale
            block[:, j:] -= error.unsqueeze(1).matmul(u[j, j:].unsqueeze(0))
            errors[:, j] = error
        w[:, start:stop] = kept
        w[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return w


def rose(weight: Tensor, hessian: Tensor, squares: Tensor, sparsity: Unstructured) -> Tensor:
    """Prune with SparseGPT in ROSE's order, which follows from the Wanda scores.

    The released code computes the block losses twice, this function once.

    Args:
        squares: mean squares of the inputs, (columns,).
    """
    score = weight.abs() * squares.sqrt()
    order, losses = [], []
    for start in range(0, weight.shape[1], BLOCK):
        part = score[:, start : start + BLOCK].clone()
        threshold = torch.sort(part.flatten())[0][int(part.numel() * sparsity.ratio)]
        lost = part * (part <= threshold)
        order.append(start + torch.argsort(lost.sum(0), descending=True))
        losses.append(lost.sum().item() / part.shape[1])  # per column; otherwise, a narrow last block looks columnar
    if (max(losses) - min(losses)) / max(losses) <= THRESHOLD:
        return sparsegpt(weight, hessian, sparsity)
    permutation = torch.cat([order[i] for i in sorted(range(len(losses)), key=lambda i: -losses[i])])
    swept = sparsegpt(weight[:, permutation], hessian[:, permutation][permutation], sparsity)
    return swept[:, torch.argsort(permutation)]


class _Statistics:
    """Statistics of a layer as in the released code, which does not share them between layers with the same input."""

    def __init__(self, layer: nn.Linear):
        columns = layer.weight.shape[1]
        self.hessian = torch.zeros(columns, columns, device=layer.weight.device)
        self.squares = torch.zeros(columns, device=layer.weight.device)
        self.samples = 0

    def add(self, inputs: Tensor) -> None:
        self.squares *= self.samples / (self.samples + 1)
        self.hessian *= self.samples / (self.samples + 1)
        self.samples += 1
        x = math.sqrt(2 / self.samples) * inputs.reshape(-1, inputs.shape[-1]).t().float()
        self.squares += torch.norm(x, p=2, dim=1) ** 2 / self.samples
        self.hessian += x.matmul(x.t())


@dataclass
class Seconds:
    """Seconds by kind of work: forward passes, Hessians and solving."""

    forward: float = 0.0
    moments: float = 0.0
    solving: float = 0.0


@torch.no_grad()
def prune_model(model: nn.Module, tokens: Tensor, sparsity: Unstructured, device: torch.device) -> Seconds:
    """Prune a whole model with ROSE as in the released code.

    The code runs one window at a time, accumulates a Hessian for every layer, and computes all outputs in both passes of every
    block.
    """
    seconds = Seconds()
    blocks = find_blocks(model)
    found = probe(model, blocks, tokens, device)
    inputs = torch.cat([trace(model, blocks, window[None], found, whole=False)[0] for window in tokens]).to(device)
    _, calls = trace(model, blocks, tokens[:1], found)
    for index, block in enumerate(tqdm(blocks.blocks, "published", unit="block", disable=None)):
        block.to(device)
        layers = {layer.name: layer.module for layer in linear_layers(block, blocks.block_name(index))}
        statistics = {name: _Statistics(layer) for name, layer in layers.items()}

        hooks = [layer.register_forward_hook(_add(statistics[name], seconds, device)) for name, layer in layers.items()]
        outputs = torch.empty_like(inputs)
        before, moments_before = _now(device), seconds.moments
        for i in range(len(inputs)):
            outputs[i] = calls[index].run(block, inputs[i : i + 1])[0]
        seconds.forward += _now(device) - before - (seconds.moments - moments_before)
        for hook in hooks:
            hook.remove()
        before = _now(device)
        for name, layer in layers.items():
            s = statistics[name]
            layer.weight.copy_(rose(layer.weight.float(), s.hessian, s.squares, sparsity))
        seconds.solving += _now(device) - before
        before = _now(device)
        for i in range(len(inputs)):
            outputs[i] = calls[index].run(block, inputs[i : i + 1])[0]
        seconds.forward += _now(device) - before
        inputs = outputs
        block.to("cpu")
    return seconds


def _add(statistics: _Statistics, seconds: Seconds, device: torch.device):
    def hook(_module: nn.Module, args: tuple, _output: Tensor) -> None:
        start = _now(device)
        statistics.add(args[0])
        seconds.moments += _now(device) - start

    return hook


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the hardware and torch version of a benchmark, with the processor's model name if Linux reports it."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
