"""Benchmark the speedup of a denoiser after removing heads and neurons, with an MMDiT of random weights.

    python scripts/benchmark_structured.py [--device cuda] [--blocks 8] [--repeats 15]

Calls of the dense and the narrowed models alternate in one process. Results go to scripts/benchmark_structured.DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from rose_exp.diffusion.narrowed import widths
from rose_exp.engine import Structured
from rose_exp.models import find_structures
from rose_exp.tracking.record import device_name

RATIOS = (0.15, 0.2, 0.25, 0.3)  # as in Tables 4 and 5 of the paper
HEADS, WIDTH = 16, 64  # number and size of the attention heads
LATENTS, TEXT = 64, 77  # side length of the latents (512 pixels), text tokens


def denoiser(blocks: int) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=LATENTS,
        in_channels=16,
        out_channels=16,
        num_layers=blocks,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        caption_projection_dim=HEADS * WIDTH,
        joint_attention_dim=512,
        pooled_projection_dim=512,
    ).eval()


def narrowed(blocks: int, ratio: float) -> SD3Transformer2DModel:
    """Return the denoiser with a share ``ratio`` of heads and neurons removed from all blocks but the first and the last."""
    model, sparsity = denoiser(blocks), Structured(ratio)
    for structure in find_structures(model):
        if structure.name.split(".")[1] not in ("0", str(blocks - 1)):
            structure.keep(torch.arange(structure.groups) >= sparsity.count(structure.groups))
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=8, help="number of blocks of the MMDiT (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="number of timed calls of each model (default: %(default)s)")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    inputs = {
        "hidden_states": torch.randn(2, 16, LATENTS, LATENTS),
        "encoder_hidden_states": torch.randn(2, TEXT, 512),
        "pooled_projections": torch.randn(2, 512),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    inputs = {name: value.to(device, dtype) for name, value in inputs.items()}
    models = {0.0: denoiser(options.blocks)} | {ratio: narrowed(options.blocks, ratio) for ratio in RATIOS}
    models = {ratio: model.to(device, dtype) for ratio, model in models.items()}
    times: dict[float, list[float]] = {ratio: [] for ratio in models}
    for turn in range(options.repeats + 1):
        for ratio, model in models.items():
            start = _now(device)
            model(**inputs)
            if turn:  # the first turn is a warm-up
                times[ratio].append(_now(device) - start)
    dense = statistics.median(times[0.0])
    found = {
        f"{ratio:g}": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "heads": min(widths(model).values()),
            "seconds": round(statistics.median(times[ratio]), 5),
            "times_as_fast": round(dense / statistics.median(times[ratio]), 3),
        }
        for ratio, model in models.items()
    }
    facts = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": str(dtype)}
    text = json.dumps(facts | {"blocks": options.blocks, "repeats": options.repeats, "by_ratio": found}, indent=2) + "\n"
    Path(__file__).with_suffix(f".{device.type}.json").write_text(text, encoding="utf-8")
    print(text)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
