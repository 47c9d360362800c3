"""Errors of overrides that involve several jobs."""

from __future__ import annotations

import pytest

from rose_exp.cli.command import check_command

from .test_command import problems_of


def test_missing_multirun_flag_is_reported_with_the_other_errors():
    problems = problems_of("seed=1,2", "method=wnda", "calibration.sample=3", "engine.damping=-1,0.1")
    assert [problem.partition(":")[0] for problem in problems] == [
        "seed",
        "engine.damping",
        "method",
        "calibration.sample",
        "engine.damping",
    ]
    assert "add -m to run one job per value" in problems[0]


def test_jobs_with_the_same_folder_are_rejected():
    (problem,) = problems_of("-m", "seed=1,2", "hydra.sweep.subdir=a/b")
    assert problem == "hydra.sweep.subdir: expected a folder for each job, such as ${run_id:}, got 'a/b' for 2 jobs"
    assert len(check_command(["-m", "method=dense", "seed=1,2", "hydra.sweep.subdir=a/b"]).jobs) == 2  # the same run


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "sparsity.ratio=interval(0.1,0.9)",
            "sparsity.ratio: expected values such as sparsity.ratio=1,2 for a sweep, got an inter",
        ),
        ("method=glob(x*)", "method: expected at least one value, got 'method=glob(x*)', which has none"),
        ("seed=glob(*)", "seed: expected at least one value, got 'seed=glob(*)', which has none"),
    ],
)
def test_sweeps_without_values_are_rejected(argument, expected):
    (problem,) = problems_of("-m", argument)
    assert problem.startswith(expected)


def test_globs_select_choices():
    assert [job.settings.method.name for job in check_command(["-m", "method=glob(spars*)"]).jobs] == ["sparsegpt"]


@pytest.mark.parametrize("where", ["experiment", "command"])
@pytest.mark.parametrize(
    ("group", "choice", "swept", "values"),
    [
        ("method", "dsnot", "method.options.max_cycles", "1,2"),
        ("tracking", "wandb", "tracking.wandb.mode", "offline,disabled"),
        ("evaluation", "c4", "evaluation.perplexity.c4.windows", "1,2"),
    ],
)
def test_experiments_sweep_over_settings_of_their_choices(group, choice, swept, values, where, tmp_path):
    """A setting that only a choice defines is known in ``hydra.sweeper.params``."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    defaults = f"defaults:\n  - override /{group}: {choice}\n" if where == "experiment" else ""
    text = f"# @package _global_\n{defaults}hydra:\n  sweeper:\n    params:\n      {swept}: {values}\n"
    (folder / "own.yaml").write_text(text)
    chosen = [f"{group}={choice}"] if where == "command" else []
    command = check_command(["-m", "experiment=own", *chosen, "--config-dir", str(tmp_path)])
    assert [job.name for job in command.jobs] == [f"{swept}={value}" for value in values.split(",")]
