"""Benchmark pruning one layer with the engine, compared with the published loop and the limit of the hardware.

    python scripts/benchmark_engine.py                                    # shapes of SmolLM2-135M, on the CPU
    python scripts/benchmark_engine.py --shapes 4096x4096 4096x11008 --device cuda --json results.json

For each shape (rows x columns of W) and pattern, prints the median milliseconds of repeated, interleaved runs:

published   the loop of the released SparseGPT code, reimplemented in published.py: one step per column of ten small operations
engine      prune_layer with SparseGPT, with the torch and the fastest backend; includes measuring the layer's error
rose        prune_layer with ROSE's order and the automatic backend
limit       Cholesky factorization, inverse, another factorization and one rows x columns^2 product in torch
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import published
import torch
from torch import Tensor
from tqdm import tqdm

from rose_exp.engine import InputMoments, Ordering, SemiStructured, Unstructured, prune_layer
from rose_exp.engine.kernels.backends import resolve
from rose_exp.runtime.files import write_text

SMOLLM2 = ["576x576", "192x576", "1536x576", "576x1536"]


def limit(weight: Tensor, hessian: Tensor) -> Tensor:
    """Run the minimum of operations that the published SparseGPT needs, with torch's own routines."""
    damped = hessian.clone()
    damped.diagonal().add_(published.DAMPING * damped.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return weight @ factor


def medians(tasks: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each task after a warm-up; tasks alternate, so that drift affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            _wait(device)
            start = time.perf_counter()
            task()
            _wait(device)
            if repeat:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(rows: int, columns: int, sparsity: Unstructured | SemiStructured, device: torch.device, repeats: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(2 * columns, columns, generator=generator).to(device) @ mixing.to(device)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    moments = InputMoments(columns, device=device)
    moments.update(inputs)
    hessian = moments.hessian()
    fastest = resolve("auto", device, torch.float32)

    def engine(backend: str = "auto", ordering: Ordering | None = None) -> Callable[[], object]:
        return lambda: prune_layer(weight, moments, sparsity=sparsity, ordering=ordering, backend=backend)

    tasks = {
        "published": lambda: published.sparsegpt(weight, hessian, sparsity),
        "limit": lambda: limit(weight, hessian),
        "engine.torch": engine("torch"),
        f"engine.{fastest}": engine(fastest),
        "rose": engine("auto", Ordering.rose()),
    }
    found = medians(tasks, device, repeats)
    best = found[f"engine.{fastest}"]
    return {
        "rows": rows,
        "columns": columns,
        "pattern": str(sparsity),
        "milliseconds": {name: round(value, 3) for name, value in found.items()},
        "published/engine": round(found["published"] / best, 2),
        "engine/limit": round(best / found["limit"], 2),
        "rose/sparsegpt": round(found["rose"] / best, 3),
    }


def table(results: list[dict]) -> str:
    names = list(results[0]["milliseconds"])
    header = ["rows x columns", "pattern", *names, "published/engine", "engine/limit", "rose/sparsegpt"]
    lines = [header]
    for r in results:
        ratios = [f"{r[key]:g}" for key in header[-3:]]
        times = [f"{r['milliseconds'][name]:.1f}" for name in names]
        lines.append([f"{r['rows']} x {r['columns']}", r["pattern"], *times, *ratios])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SMOLLM2, help="rows x columns of W (default: those of SmolLM2-135M)")
    parser.add_argument("--ratio", type=float, default=0.7, help="sparsity of the unstructured runs (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="number of timed runs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="output file for the results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cases = [
        (*map(int, shape.split("x")), sparsity)
        for shape in arguments.shapes
        for sparsity in (Unstructured(arguments.ratio), SemiStructured(2, 4))
    ]
    results = [measure(*case, device, arguments.repeats) for case in tqdm(cases, unit="case", disable=None)]
    print(table(results))
    if arguments.json:
        hardware = published.hardware(device)
        write_text(arguments.json, json.dumps({"hardware": hardware, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
