"""Prune diffusion models with OBS-Diff (2025). Requires ``pip install 'rose_exp[diffusion]'``."""

from .denoiser import Layout, Unit, candidate_layers, find_units, split_into_packages
from .loading import load_pipeline, save_pipeline
from .packages import PackagePruner
from .sampling import Sampler, noise_seeds

__all__ = [
    "Layout",
    "PackagePruner",
    "Sampler",
    "Unit",
    "candidate_layers",
    "find_units",
    "load_pipeline",
    "noise_seeds",
    "save_pipeline",
    "split_into_packages",
]
