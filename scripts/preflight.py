"""Estimate peak memory and disk usage for pruning the five models of the ROSE paper, from their configurations alone.

    python scripts/preflight.py            # prints the table in scripts/preflight.md

The published configurations are included, so nothing is downloaded. The protocol is the paper's: 128 windows of 2048 tokens,
ROSE at 70 % sparsity, perplexity on WikiText-2. The pruned model is not saved.
"""

from __future__ import annotations

from functools import cache

import torch
from transformers import LlamaConfig, MistralConfig

from rose_exp.cli.command import check_command
from rose_exp.models import ModelShape, shape_of
from rose_exp.runs.fitting import check_fits
from rose_exp.runs.memory import Footprint, Placement, footprint, gib

GIB = 2**30
MODELS = {
    "LLaMA2-7B": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
    "LLaMA2-13B": LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "LLaMA2-70B": LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "LLaMA3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
    ),
    "Mistral-7B": MistralConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
}
PROTOCOL = [
    "model=llama2-70b",
    "method=rose",
    "sparsity.ratio=0.7",
    "calibration=c4",
    "calibration.samples=128",
    "calibration.window=2048",
    "evaluation=wikitext2",
]
MACHINES = {  # GPU memory, host memory; disk space is assumed to suffice
    "80 GB GPU, 64 GB host": (80e9, 64e9),
    "24 GB GPU, 64 GB host": (24e9, 64e9),
    "CPU, 24 GB": (None, 24 * GIB),
}


@cache
def shape(name: str) -> ModelShape:
    """Return the sizes of one of the five models, in half precision."""
    return shape_of(MODELS[name], torch.float16, check_command(PROTOCOL).jobs[0].settings.model)


def fitting(name: str, machine: str, *overrides: str) -> tuple[Placement, Footprint]:
    """Return the placement of weights on a machine and the estimated memory; raise RoseExpError if the run does not fit."""
    device, host = MACHINES[machine]
    settings = check_command([*PROTOCOL, *overrides]).jobs[0].settings
    there = Footprint(int(host), int(device) if device else None, 10**15)
    return check_fits(settings, shape(name), device is not None, there)


SMALLER = ([], ["pipeline.batch=1"], ["pipeline.batch=1", "pipeline.activations=host"])
SMALLER += (["pipeline.batch=1", "pipeline.activations=disk"],)


def table() -> str:
    """Return a Markdown table with the first settings that fit and their peaks, for each model and machine."""
    from rose_exp.runtime.errors import RoseExpError

    lines = ["| model | whole, on a GPU | machine | fits with | device | host | disk |", "|---|---|---|---|---:|---:|---:|"]
    for name in MODELS:
        settings = check_command(PROTOCOL).jobs[0].settings
        whole = footprint(settings, shape(name), True, Placement("memory", False))
        for machine in MACHINES:
            for overrides in SMALLER:
                try:
                    placed, found = fitting(name, machine, *overrides)
                except RoseExpError:
                    continue
                how = f"weights in {placed.weights}" if placed.weights == "memory" else "weights from disk"
                how += ", measured by blocks" if placed.by_blocks else ""
                how += ", moments in several passes" if placed.moments_bytes is not None else ""
                told = " ".join(f"`{override}`" for override in overrides)
                device = gib(found.device) if found.device is not None else ""
                first = f"{gib(whole.device)} + {gib(whole.host)} host"
                lines.append(
                    f"| {name} | {first} | {machine} | {how}{' ' + told if told else ''} | {device} | {gib(found.host)} | "
                    f"{gib(found.disk)} |"
                )
                break
            else:
                lines.append(f"| {name} | | {machine} | **does not fit** | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
