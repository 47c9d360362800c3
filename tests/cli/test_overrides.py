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
