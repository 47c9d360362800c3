"""Benchmark pruning a whole model with ROSE, by kind of work, compared with the released code.

    python scripts/benchmark_model.py                                       # SmolLM2-135M, 32 x 1024 tokens, on the CPU
    python scripts/benchmark_model.py --model llama2-7b --samples 128 --window 2048 --device cuda --json results.json

``llama2-7b`` and other shapes have random weights, which take as long to prune as trained ones, so nothing is downloaded.
Tokens are random as well. All variants start from the same weights and alternate within one process.

rose        prune_model with ROSE's order
sparsegpt   prune_model without an order
published   the loop of the released ROSE code, reimplemented in published.py
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
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rose_exp.engine import InputMoments, Ordering, SparseGPT, Unstructured, prune_layer
from rose_exp.models import find_blocks, load_model
from rose_exp.pruning import PassSeconds, PruneContext, PruningPlan, prune_model
from rose_exp.runtime.files import write_text
from rose_exp.settings.schema import ModelSettings
from rose_exp.tracking.record import peak_memory

SHAPES = {  # hidden size, MLP width, layers, heads, key-value heads, vocabulary
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 96, 3, 4, 4, 128),  # to try a benchmark
}


def build(name: str, blocks: int | None, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """Return the embedded model or a known shape with random weights, on the CPU.

    Args:
        blocks: number of blocks to keep; None keeps all.
        device: where random weights are drawn; a GPU is far faster, but must hold the whole model.
    """
    if name not in SHAPES:
        model = load_model(ModelSettings(embedded=name)).model
        if blocks is not None:
            del find_blocks(model).blocks[blocks:]
            model.model.layers = model.model.layers[:blocks]
            model.config.num_hidden_layers = blocks
        return model
    hidden, mlp, layers, heads, shared, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks or layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config).eval().to("cpu")
    finally:
        torch.set_default_dtype(before)


def run_ours(model: nn.Module, tokens: torch.Tensor, ordering: Ordering | None, arguments: argparse.Namespace) -> dict:
    plan = PruningPlan(
        method=SparseGPT(),
        sparsity=Unstructured(arguments.ratio),
        ordering=ordering,
        batch=arguments.batch,
        activations=arguments.activations,
    )
    passes = PassSeconds()
    start = time.perf_counter()
    reports = prune_model(model, tokens, plan, PruneContext(device=arguments.device, seconds=passes))
    total = time.perf_counter() - start
    forward = passes.calibrating + passes.advancing
    reordered = sum(report.reordered for report in reports)
    return _result(total, forward, passes.moments, passes.solving) | {"layers": len(reports), "reordered": reordered}


def run_published(model: nn.Module, tokens: torch.Tensor, arguments: argparse.Namespace) -> dict:
    start = time.perf_counter()
    found = published.prune_model(model, tokens, Unstructured(arguments.ratio), torch.device(arguments.device))
    return _result(time.perf_counter() - start, found.forward, found.moments, found.solving)


def _result(total: float, forward: float, moments: float, solving: float) -> dict:
    other = total - forward - moments - solving
    return {"seconds": total, "forward": forward, "moments": moments, "solving": solving, "other": other}


def measure(ways: dict[str, Callable[[nn.Module], dict]], model: nn.Module, device: str, repeats: int) -> dict[str, dict]:
    """Return the medians of every variant; the variants alternate and start from the same weights."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    warm_up(torch.device(device))
    for _ in range(repeats):
        for name, way in ways.items():
            model.load_state_dict(weights)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            runs[name].append(way(model) | {"device_peak_bytes": _device_peak()})
    return {name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()}


def warm_up(device: torch.device) -> None:
    """Compile the engine's kernels, or load them from their cache, before timing."""
    for size in (200, 400):
        moments = InputMoments(size, device=device)
        moments.update(torch.randn(2 * size, size, device=device))
        prune_layer(torch.randn(256, size, device=device), moments, sparsity=Unstructured(0.5), ordering=Ordering.rose())


def _device_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def table(results: dict[str, dict]) -> str:
    shares = ("forward", "moments", "solving", "other")
    lines = [["", "seconds", *(f"{name} %" for name in shares), "device peak GB"]]
    for name, found in results.items():
        parts = [f"{100 * found[share] / found['seconds']:.1f}" for share in shares]
        lines.append([name, f"{found['seconds']:.1f}", *parts, f"{found['device_peak_bytes'] / 1e9:.1f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=["smollm2-135m", *SHAPES], help="default: %(default)s")
    parser.add_argument("--blocks", type=int, help="number of blocks to keep (default: all)")
    parser.add_argument("--samples", type=int, default=32, help="number of calibration windows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="window length in tokens (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.7, help="sparsity (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="batch size in windows (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", help="dtype of the models with random weights (default: %(default)s)")
    parser.add_argument("--activations", default="device", choices=["device", "host", "disk"], help="where to keep activations")
    parser.add_argument("--repeats", type=int, default=1, help="number of runs of each variant (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", default=["published", "rose", "sparsegpt"], help="variants to run (default: all)")
    parser.add_argument("--json", type=Path, help="output file for the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = build(arguments.model, arguments.blocks, getattr(torch, arguments.dtype), arguments.device)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.samples, arguments.window))
    known = {
        "published": lambda m: run_published(m, tokens, arguments),
        "rose": lambda m: run_ours(m, tokens, Ordering.rose(), arguments),
        "sparsegpt": lambda m: run_ours(m, tokens, None, arguments),
    }
    results = measure({name: known[name] for name in arguments.ways}, model, arguments.device, arguments.repeats)
    print(table(results))
    ratios = {
        f"{a}/{b}": round(results[a]["seconds"] / results[b]["seconds"], 3)
        for a, b in (("published", "rose"), ("rose", "sparsegpt"))
        if a in results and b in results
    }
    peak = peak_memory()["host"]
    print(*(f"{name} {value:.3f}" for name, value in ratios.items()), f"host peak {peak / 1e9:.1f} GB", sep="   ")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        found = {"hardware": published.hardware(torch.device(arguments.device)), "settings": settings}
        found |= {"results": results, "ratios": ratios, "host_peak_bytes": peak}
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
