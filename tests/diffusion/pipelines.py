"""Small diffusion pipelines and helpers to run them."""

from __future__ import annotations

from functools import cache

import torch

from rose_exp.diffusion import Sampler, candidate_layers, find_units, noise_seeds, split_into_packages
from rose_exp.diffusion.packages import PackagePruner
from rose_exp.diffusion.small import PIPELINES, small_pipeline
from rose_exp.engine import SparseGPT, Unstructured
from rose_exp.engine.weighting import StepWeighting
from rose_exp.pruning import PruneContext, PruningPlan

NAMES = tuple(PIPELINES)
PROMPTS = ["a red fox", "two boats", "a cat on a wall"]
STEPS = 3


def sampler(name: str, **options) -> Sampler:
    size = None if name == "ddpm" else (32, 32)
    guidance = None if name == "ddpm" else 4.0
    length = 16 if name in ("sd3", "flux") else None
    own = {"steps": STEPS, "guidance": guidance, "size": size, "text_length": length, "batch": 2}
    return Sampler(small_pipeline(name), **(own | options))


def images(of: Sampler, count: int = 2) -> torch.Tensor:
    seeds = noise_seeds(7, count)
    with torch.no_grad():
        return torch.cat([found for _, found in of.run(PROMPTS[:count], seeds, "images", decode=True)])


@cache
def units_of(name: str):
    of = sampler(name)
    layers = candidate_layers(of.denoiser, convolutions=name == "ddpm")
    with torch.no_grad():
        return find_units(of.denoiser, of.first_call("a photograph"), layers).units


def pruner_of(name: str, count: int = 2, sparsity=None, method=None, of: Sampler | None = None, **options) -> PackagePruner:
    of = of or sampler(name)
    layers = {layer.name: layer for layer in candidate_layers(of.denoiser, convolutions=name == "ddpm")}
    known = {name for unit in units_of(name) for name in unit.names}
    own = {key: options.pop(key) for key in ("state", "on_layer") if key in options}
    weights = options.pop("weights", lambda step, steps: StepWeighting().weights(steps)[step])
    plan = PruningPlan(method or SparseGPT(), sparsity or Unstructured(0.5), **({"block_size": 16} | options))
    return PackagePruner(
        of,
        {name: layer for name, layer in layers.items() if name in known},
        split_into_packages(units_of(name), count),
        plan,
        PROMPTS,
        noise_seeds(0, len(PROMPTS)),
        weights,
        PruneContext(**own),
    )
