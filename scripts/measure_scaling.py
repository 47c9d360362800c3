"""Measure how time and memory grow with the sizes of layers and models and with the calibration set, on a CPU.

    python scripts/measure_scaling.py                      # all parts: about 30 minutes on two cores
    python scripts/measure_scaling.py layers windows

layers   SparseGPT on one square layer, from 256 to 4096 columns
windows  SparseGPT on a small model with 8 to 128 calibration windows
models   SparseGPT on models of 0.1 to 1.3 billion parameters with random weights, in memory: time, peak memory and its estimate
disk     a model of 0.5 billion parameters with one block in memory at a time: peak memory, which should stay below 2 GB

The exponent of a row is the slope between it and the previous row, on logarithms.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.measure_memory import SMALL, Case, measure

GB = 10**9
LAYERS = (256, 512, 1024, 2048, 4096)
WINDOWS = (8, 16, 32, 64, 128)
MODELS = {  # hidden size, MLP width, blocks
    "0.1 B": (576, 1536, 30),
    "0.3 B": (896, 2432, 24),
    "0.6 B": (1024, 4096, 32),
    "1.3 B": (2048, 5632, 24),
}
FROM_DISK = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
FROM_DISK |= {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
SPARSEGPT = ("method=sparsegpt", "sparsity.ratio=0.7")


def exponents(sizes: Sequence[float], values: Sequence[float]) -> list[float | None]:
    """Return the slope between each point and the previous one, on logarithms; None for the first."""
    pairs = itertools.pairwise(zip(sizes, values, strict=True))
    return [None, *(math.log(after[1] / before[1]) / math.log(after[0] / before[0]) for before, after in pairs)]


def layers() -> list[str]:
    import torch

    from rose_exp.engine import InputMoments, Unstructured, prune_layer

    seconds = []
    for columns in LAYERS:
        moments = InputMoments(columns)
        moments.update(torch.randn(2 * columns, columns))
        weight = torch.randn(columns, columns)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            prune_layer(weight, moments, sparsity=Unstructured(0.7), method="sparsegpt")
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        print(f"{columns}: {seconds[-1]:.3f} s", file=sys.stderr)
    rows = ["| columns | seconds | exponent (theory: 3) |", "|---:|---:|---:|"]
    slopes = exponents(LAYERS, seconds)
    return rows + [f"| {c} | {s:.3f} | {_slope(e)} |" for c, s, e in zip(LAYERS, seconds, slopes, strict=True)]


def windows() -> list[str]:
    cases = {count: Case(SMALL, [*SPARSEGPT, f"calibration.samples={count}"]) for count in WINDOWS}
    found = {count: _measured(str(count), case) for count, case in cases.items()}
    seconds = [result["seconds"]["pruning"] for result in found.values()]
    rows = ["| windows | seconds of pruning | exponent (theory: 1) | peak GB | estimate / peak |", "|---:|---:|---:|---:|---:|"]
    slopes = exponents(WINDOWS, seconds)
    for (count, result), slope in zip(found.items(), slopes, strict=True):
        rows.append(f"| {count} | {result['seconds']['pruning']:.1f} | {_slope(slope)} | {_memory(result)} |")
    return rows


def models() -> list[str]:
    rows = [
        "| parameters | width | seconds of pruning | exponent | peak GB | estimate / peak |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    found = {}
    for name, (hidden, inner, blocks) in MODELS.items():
        sizes = SMALL | {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks}
        found[name] = _measured(name, Case(sizes | {"num_attention_heads": hidden // 64}, SPARSEGPT))
    sizes = [blocks * (4 * hidden**2 + 3 * hidden * inner) for hidden, inner, blocks in MODELS.values()]
    slopes = exponents(sizes, [result["seconds"]["pruning"] for result in found.values()])
    for (name, result), slope in zip(found.items(), slopes, strict=True):
        cells = [name, MODELS[name][0], f"{result['seconds']['pruning']:.1f}", _slope(slope), _memory(result)]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def disk() -> list[str]:
    options = ["pipeline.weights=disk", "pipeline.activations=disk", "evaluation.perplexity.local.window=256"]
    result = _measured("0.5 B", Case(FROM_DISK, [*SPARSEGPT, *options]))
    rows = ["| parameters | seconds of pruning | peak GB | estimate / peak |", "|---:|---:|---:|---:|"]
    return [*rows, f"| 0.5 B | {result['seconds']['pruning']:.1f} | {_memory(result)} |"]


def _measured(name: str, case: Case) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        result = measure(case, Path(folder))
    print(f"{name}: {result['seconds']['pruning']:.1f} s, {result['peak'] / GB:.2f} GB", file=sys.stderr)
    return result


def _slope(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _memory(result: dict) -> str:
    return f"{result['peak'] / GB:.2f} | {result['estimate'] / result['peak']:.2f}"


PARTS: dict[str, Callable[[], list[str]]] = {"layers": layers, "windows": windows, "models": models, "disk": disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args().parts or list(PARTS)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"parts: expected some of {', '.join(PARTS)}, got {unknown[0]!r}")
    for part in chosen:
        print(f"\n{part}\n", *PARTS[part](), sep="\n", flush=True)


if __name__ == "__main__":
    main()
