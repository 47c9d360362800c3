"""Prune diffusion models with OBS-Diff (2025). Requires ``pip install 'rose_exp[diffusion]'``.

Importing this package lets diffusers load saved pipelines with removed attention heads and neurons:

>>> import rose_exp.diffusion
>>> pipeline = diffusers.DiffusionPipeline.from_pretrained("outputs/RUN/model")
"""

from . import narrowed
from .denoiser import Unit, candidate_layers, find_units, split_into_packages
from .loading import load_pipeline, save_pipeline
from .packages import PackagePruner
from .sampling import Sampler, noise_seeds

__all__ = [
    "PackagePruner",
    "Sampler",
    "Unit",
    "candidate_layers",
    "find_units",
    "load_pipeline",
    "narrowed",
    "noise_seeds",
    "save_pipeline",
    "split_into_packages",
]
