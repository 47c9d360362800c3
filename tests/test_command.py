"""Every configuration file composes, and mistakes are all told before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rose_exp.command import check_command, config_folder
from rose_exp.engine import Ordering, SemiStructured, Unstructured
from rose_exp.errors import SettingsError
from rose_exp.settings import Settings, read_settings

CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted(config_folder().glob("*/*.yaml"))
    if not path.stem.startswith("_")
]  # fmt: skip
METHOD_CHOICES = "alps, dense, dsnot, dsnot_sparsegpt, magnitude, oats, rose, rose_plus, sparsegpt, wanda"
TO_BE_SET = {
    ("model", "local"): ["model.path=."],
    ("calibration", "local"): ["calibration.path=README.md"],
    ("evaluation", "local"): ["evaluation.perplexity.local.path=README.md"],
    ("model", "diffusion-local"): ["model.path=."],
    ("calibration", "gcc3m"): ["model=small-sd3", "calibration.path=README.md"],
    ("calibration", "prompts"): ["model=small-sd3"],
    ("evaluation", "images"): ["model=small-sd3"],
    ("evaluation", "images_paper"): [
        "model=small-sd3",
        "evaluation.images.path=README.md",
        "evaluation.images.metrics=[clip_score]",
        "evaluation.images.reference=.",
    ],
    ("sparsity", "structured"): ["method=sparsegpt"],
}


def settings_of(*overrides: str) -> Settings:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    return read_settings(OmegaConf.to_container(config, resolve=True))


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        check_command(arguments)
    return caught.value.problems


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_configuration_file_composes(group, choice, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    overrides = [f"{group}={choice}", *TO_BE_SET.get((group, choice), [])]
    settings_of(*overrides)
    text = (config_folder() / group / f"{choice}.yaml").read_text()
    assert text.startswith("#"), "a configuration file opens with what it is"


def test_the_groups_are_those_of_the_settings():
    assert {group for group, _ in CHOICES} <= {*Settings.model_fields, "experiment", "debug"}


def test_rose_is_sparsegpt_with_its_order():
    rose = settings_of("method=rose")
    assert rose.method.name == "sparsegpt"
    assert rose.reorder.build() == Ordering.rose()
    assert rose.label == "ROSE"
    assert settings_of("method=sparsegpt").label == "SparseGPT"
    assert settings_of("method=rose", "reorder=none").label == "SparseGPT"  # the order decides, not the file's name
    assert "ascending" in settings_of("method=sparsegpt", "reorder=ascending").label
    assert settings_of().label == "ROSE"


def test_patterns_build():
    assert settings_of().sparsity.build() == Unstructured(0.5)
    assert settings_of("sparsity=2:4").sparsity.build() == SemiStructured(2, 4)
    assert settings_of("sparsity.pattern=3:8", "sparsity.ratio=null").sparsity.build() == SemiStructured(3, 8)


def test_dsnot_leaves_the_mlp_as_its_authors_do():
    method = settings_of("method=dsnot").method
    assert method.build().max_cycles == 50
    assert method.build(("*mlp*",)).max_cycles == 0


def test_all_mistakes_are_told_together():
    assert problems_of(
        "method=sparsgpt", "calibration.sample=3", "engine.damping=-1", "seed=x", "sparsity.pattern=5:4", "device"
    ) == [
        "'device' is no override: expected setting=value (missing EQUAL at '<EOF>')",
        f"method: expected one of {METHOD_CHOICES}, got 'sparsgpt'; did you mean 'sparsegpt'?",
        "calibration.sample: no such setting; did you mean 'calibration.samples'?",
        "engine.damping: expected at least 0, got -1",
        "seed: expected a valid integer, got 'x'",
        "sparsity.pattern: expected N:M with N at most M and M at least 1, got '5:4'",
    ]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model=llama2-7", "did you mean 'llama2-7b'?"),
        ("sparsity.pattern=unstructurd", "did you mean 'unstructured'?"),
        ("sparsity.ratio=1.5", "sparsity.ratio: expected at most 1, got 1.5"),
        ("sparsity.ratio=null", "sparsity.ratio: expected a number from 0 to 1, got null"),
        ("model.embedded=smollm", "model.embedded: expected one of smollm2-135m, got 'smollm'"),
        ("model.path=./nothing", "model.path: expected a folder or file that exists, got './nothing'"),
        ("calibration.path=READMEE.md", "did you mean 'README.md'?"),
        ("calibration.window=1", "calibration.window: expected at least 2, got 1"),
        ("reorder.columns=down", "reorder.columns: expected 'descending', 'ascending' or 'none', got 'down'"),
        ("+engine.dampling=1", "engine.dampling: no such setting, got 1; did you mean 'damping'?"),
        ("+method.options.cycles=3", "method.options.cycles: expected none, sparsegpt has no options"),
        ("method=dsnot method.options.max_cycles=-3", "method.options.max_cycles: expected at least 0, got -3"),
        ("method=wanda reorder=rose", "reorder: expected none, since method wanda prunes no column before another"),
        ("sparsity=2:4 sparsity.ratio=0.7", "sparsity.ratio: expected null or 0.5, as pattern 2:4 says, got 0.7"),
        ("calibration=local", "calibration: expected one of path, embedded or dataset, got none of them"),
        ("model=local", "model.path: expected a value, got none"),
        ("engine.damping=nan", "engine.damping: expected"),
        ("device=3", "device: expected text or a list of texts, got 3"),
        ("+evaluation.perplexity.embedded.windws=3", "no such setting, got 3; did you mean 'windows'?"),
        ("+evaluation.sped.window=3", "evaluation.sped: no such setting"),
        (
            "allocation=owl sparsity=2:4",
            "allocation.rule: expected uniform with pattern 2:4, which takes the same share of every",
        ),
        ("method=rose_plus sparsity=2:4 allocation=losses", "allocation.rule: expected uniform with pattern 2:4"),
        ("refine=masks refine.relaxation=2", "refine.relaxation: expected less than 2, got 2"),
        ("method=oats refine=least_squares", "refine: expected none with oats, which adds a matrix to the pruned one, got 8"),
        ("reorder.score=wnda", "reorder.score: expected one of magnitude, obs, wanda, got 'wnda'; did you mean 'wanda'?"),
        (
            "engine.backend=nmba",
            "engine.backend: expected 'auto', 'torch', 'numba' or 'triton', got 'nmba'; did you mean 'numba'?",
        ),
    ],
)
def test_each_mistake_is_named(argument, expected, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    found = problems_of(*argument.split())
    assert len(found) == 1
    assert expected in found[0]


def test_every_job_of_a_sweep_is_checked():
    assert problems_of("-m", "method=sparsegpt,wnda", "sparsity.ratio=0.5,1.7") == [
        f"method: expected one of {METHOD_CHOICES}, got 'wnda'; did you mean 'wanda'?",
        "sparsity.ratio: expected at most 1, got 1.7",
    ]
    assert problems_of("-m", "sparsity.ratio=0.5,1.7,2.5") == [
        "sparsity.ratio: expected at most 1, got 1.7",
        "sparsity.ratio: expected at most 1, got 2.5",
    ]
    assert problems_of("-m", "experiment=demo", "reorder=rose")[0].startswith("reorder: expected none, since method dense")


@pytest.mark.parametrize(
    "command",
    ["", "-m experiment=demo", "sparsity=4:8 method=wanda", "-m method=rose,sparsegpt seed=0,1,2", "evaluation=[wikitext2,c4]"],
)
def test_sound_commands_pass(command):
    check_command(command.split())


def test_of_a_setting_given_twice_the_last_counts_as_for_hydra():
    jobs = check_command(["-m", "seed=0,1", "method=wanda", "seed=2,3", "method=sparsegpt"]).jobs
    assert [(job.settings.seed, job.settings.method.name) for job in jobs] == [(2, "sparsegpt"), (3, "sparsegpt")]


def test_a_search_by_several_processes_is_refused(monkeypatch, capsys):
    from rose_exp import app

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["rose-exp", "-m", "hydra/sweeper=optuna"])
    with pytest.raises(SystemExit):
        app.main()
    assert "torchrun: expected a run or a sweep, got a search" in capsys.readouterr().err


@pytest.mark.parametrize("study", sorted(p.stem for p in config_folder().glob("experiment/rose_*.yaml")))
def test_every_study_of_the_paper_can_be_had_small(study):
    command = ["-m", f"experiment={study}", "model=smollm2-135m", "calibration=embedded", "debug=smoke"]
    jobs = check_command(command).jobs
    assert {job.settings.model.embedded for job in jobs} == {"smollm2-135m"}
    assert {job.settings.calibration.embedded for job in jobs} == {"c4"}
    assert all(job.settings.evaluation.at_most == 2 for job in jobs)


@pytest.mark.parametrize(
    ("pattern", "rule", "label"),
    [("unstructured", "owl", "ROSE + owl 0.08 + target"), ("2:4", "uniform", "ROSE + permuted + target")],
)
def test_rose_plus_suits_the_pattern(pattern, rule, label):
    """In a process of its own, in which nothing else has been imported."""
    code = (
        "from rose_exp.command import check_command;"
        f"settings = check_command(['method=rose_plus', 'sparsity={pattern}']).jobs[0].settings;"
        "print(settings.allocation.rule, settings.label)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{rule} {label} 0.5/0.5 + masks again 12 + refine 6")
