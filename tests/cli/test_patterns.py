"""N:M patterns in overrides, configuration files and sweeps over patterns and ratios."""

from __future__ import annotations

import random

import pytest
from omegaconf import OmegaConf

from rose_exp.cli.command import check_command
from rose_exp.engine import SemiStructured, Unstructured
from rose_exp.settings.messages import unquoted_pattern
from rose_exp.sweeps.plan import format_plan

from .test_command import problems_of

PAIRS = [(pruned, group) for group in range(1, 130) for pruned in range(group + 1)]
SOME = random.Random(0).sample(PAIRS, 4)


def test_every_unquoted_pattern_is_text_or_can_be_recovered():
    for pruned, group in PAIRS:
        value = OmegaConf.create(f"pattern: {pruned}:{group}").pattern
        assert value == f"{pruned}:{group}" or unquoted_pattern(value) == f"{pruned}:{group}"
    assert unquoted_pattern(True) is None
    assert all(unquoted_pattern(value) is None for value in (0, 5, 59, -124, 1.0, "2:4", None, 14896))


@pytest.mark.parametrize(("pruned", "group"), [*SOME, (1, 4), (0, 4)])
def test_overrides_accept_any_pattern_with_the_default_ratio(pruned, group):
    (job,) = check_command([f"sparsity.pattern={pruned}:{group}"]).jobs
    assert job.settings.sparsity.parsed == SemiStructured(pruned, group)
    assert job.settings.sparsity.ratio is None


@pytest.mark.parametrize("group", ["unstructured", "structured"])
def test_default_ratio_depends_on_the_pattern(group):
    method = "method=sparsegpt"
    assert check_command([f"sparsity={group}", method]).jobs[0].settings.sparsity.ratio in (0.5, 0.2)
    assert check_command([f"sparsity={group}", "sparsity.pattern=3:4", method]).jobs[0].settings.sparsity.ratio is None


FILES = {  # files of a user's folder, with the arguments that select them
    "sparsity/own.yaml": ("pattern: {}\nratio: null\n", ["sparsity=own"]),
    "experiment/value.yaml": ("# @package _global_\nsparsity: {{pattern: {}, ratio: null}}\n", ["experiment=value"]),
    "experiment/swept.yaml": (
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      sparsity.pattern: {}\n",
        ["-m", "experiment=swept"],
    ),
    "experiment/choice.yaml": ("# @package _global_\ndefaults:\n  - override /sparsity: {}\n", ["experiment=choice"]),
    "experiment/choices.yaml": (
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      sparsity: {}\n",
        ["-m", "experiment=choices"],
    ),
}


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("4:8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", FILES)
def test_files_with_unquoted_patterns_are_rejected_with_a_hint(file, pattern, tmp_path):
    text, arguments = FILES[file]
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(text.format(pattern))
    problems = problems_of("--config-dir", str(tmp_path), *arguments)
    assert len(problems) == 1
    assert "quotes" in problems[0]
    assert pattern in problems[0] or '"2:4"' in problems[0]
    path.write_text(text.format(f'"{pattern}"'))
    (job,) = check_command(["--config-dir", str(tmp_path), *arguments]).jobs
    assert str(job.settings.sparsity.parsed) == pattern


@pytest.mark.parametrize(
    "arguments",
    [
        ["sparsity=2:4", "sparsity.ratio=0.7"],
        ["sparsity.pattern=1:4", "sparsity.ratio=0.5"],
        ["-m", "seed=0,1", "sparsity=2:4", "sparsity.ratio=0.7"],
        ["-m", "sparsity=2:4", "sparsity.ratio=0.6,0.7"],
        ["-m", "sparsity=2:4,4:8", "sparsity.ratio=0.7"],
    ],
)
def test_ratio_that_contradicts_the_pattern_of_every_job_is_rejected(arguments):
    assert all(problem.startswith("sparsity.ratio: expected null or 0.") for problem in problems_of(*arguments))


def test_ratio_of_a_file_that_contradicts_the_pattern_is_rejected(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/own.yaml").write_text('# @package _global_\nsparsity: {pattern: "1:4", ratio: 0.5}\n')
    expected = "sparsity.ratio: expected null or 0.25, the ratio of pattern 1:4, got 0.5"
    assert problems_of("--config-dir", str(tmp_path), "experiment=own") == [expected]


@pytest.mark.parametrize("swept", [["sparsity=2:4,unstructured"], ["sparsity.pattern=2:4,unstructured"]])
def test_patterns_of_a_sweep_ignore_ratios_that_other_jobs_use(swept, tmp_path):
    jobs = check_command(["-m", *swept, "sparsity.ratio=0.5,0.6", "model=local", f"model.path={tmp_path}"]).jobs
    expected = [SemiStructured(2, 4)] * 2 + [Unstructured(0.5), Unstructured(0.6)]
    assert [job.settings.sparsity.parsed for job in jobs] == expected
    assert [job.config["sparsity"]["ratio"] for job in jobs] == [0.5, None, 0.5, 0.6]  # 0.5 is the ratio of 2:4
    assert len({job.run_id for job in jobs}) == 3
    plan = format_plan(jobs, tmp_path)
    assert "as an earlier job" in plan
    assert "sparsity.ratio=0.6: ignores sparsity.ratio, which its N:M pattern implies" in plan
