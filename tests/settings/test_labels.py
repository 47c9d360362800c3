"""Labels are short names of configurations; reports add values where labels are equal."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rose_exp.cli.paths import config_folder
from rose_exp.runs.identity import register_resolver
from rose_exp.settings.schema import Settings


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ("method=dense", "Dense"),
        ("method=wanda", "Wanda"),
        ("method=sparsegpt", "SparseGPT"),
        ("method=rose", "ROSE"),
        ("method=rose reorder=none", "SparseGPT"),
        ("method=sparsegpt reorder=rose", "ROSE"),
        ("method=sparsegpt reorder=block_only", "SparseGPT reordered"),
        ("method=rose reorder.threshold=0.3", "SparseGPT reordered"),
        ("method=rose_plus", "ROSE+"),
        ("method=rose_plus sparsity=2:4", "ROSE+"),
        ("method=rose_plus allocation=uniform", "ROSE + target + ADMM"),
        ("method=rose_plus refine=cg", "ROSE + OWL + target + CG"),
        ("method=rose_plus refine=none", "ROSE + OWL + target"),
        ("method=rose refine=cg", "ROSE + CG"),
        ("method=wanda refine=admm", "Wanda + ADMM"),
        ("method=wanda allocation=losses", "Wanda + losses"),
        ("method=sparsegpt sparsity=2:4 pipeline.permute=true", "SparseGPT + permuted"),
        ("method=sparsegpt pipeline.permute=true", "SparseGPT"),  # no effect on unstructured sparsity
        ("method=sparsegpt target=asymmetric", "SparseGPT + target"),
        ("method=wanda reconstruction=separate", "Wanda + reconstruction"),
        ("method=rose_plus reconstruction=together", "ROSE+ + reconstruction"),
        ("model=small-sd3 method=sparsegpt", "OBS-Diff"),
        ("model=small-sd3 method=rose", "OBS-Diff in ROSE's order"),
        ("model=small-sd3 method=wanda", "Wanda"),
    ],
)
def test_a_label_names_the_method_and_the_options_in_effect(overrides, label):
    register_resolver()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=overrides.split()), resolve=True)
    assert Settings(**config).label == label
