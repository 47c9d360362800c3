"""Distributed runs with two real processes and the gloo backend."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from rose_exp.engine import Allocation, InputMoments, Ordering, SemiStructured, SparseGPT, Structured, Target, Unstructured
from rose_exp.pruning import PruningPlan, prune_model
from rose_exp.runtime.ranks import Ranks
from rose_exp.settings.reconstruction import Reconstruction

from ..cli.test_app import rose_exp
from ..conftest import REPOSITORY
from ..models import survey
from ..models.families import build, tokens

PLAN = {"method": SparseGPT(), "sparsity": Unstructured(0.5), "ordering": Ordering.rose(), "block_size": 16, "batch": 2}


def two_ranks(*arguments: str, folder=REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


OPTIONS = {
    "plain": {},
    "true sequential": {"true_sequential": True},
    "target and allocation": {"target": Target(0.6, 0.4), "allocation": Allocation("losses", 0.1)},
    "permutation": {"sparsity": SemiStructured(2, 4), "permute": True},
    "structured": {"sparsity": Structured(0.5), "ordering": None},
    "reconstruction": {"reconstruction": Reconstruction(3, batch=2, rate=1e-3)},
}
FAST = ("target and allocation",)  # involves every collective operation
CASES = [pytest.param("llama", OPTIONS[name], id=name, marks=[pytest.mark.slow] * (name not in FAST)) for name in OPTIONS]
CASES += [
    pytest.param("GptOssConfig", {}, id="experts", marks=pytest.mark.slow),  # transposed stacks, in several passes
    pytest.param("GptOssConfig", {"target": Target(0.6, 0.4)}, id="experts, target", marks=pytest.mark.slow),
    pytest.param("HrmTextConfig", {}, id="whole passes", marks=pytest.mark.slow),
]
MOMENTS_BYTES = 30_000


def model_of(name: str) -> torch.nn.Module:
    return (survey.build(name) if name.endswith("Config") else build(name)).double()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_ranks_match_a_single_process(name, options, tmp_path):
    """Five windows give the ranks unequal shares; in float64, masks do not depend on the summation order."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(REPOSITORY)!r})
        from tests.runtime.test_ranks import *
        from rose_exp.pruning import PruneContext
        from rose_exp.runtime.ranks import process_group
        with process_group():
            ranks, model = Ranks(), model_of({name!r})
            plan = PruningPlan(**PLAN | {options!r})
            limit = None if plan.permute or plan.structured else MOMENTS_BYTES
            reports = prune_model(model, tokens(), plan, PruneContext(ranks=ranks, moments_bytes=limit))
            torch.save((model.state_dict(), [(r.name, r.tokens, r.error) for r in reports]), sys.argv[1] + str(ranks.rank))
        """)
    )
    done = two_ranks(str(script), str(tmp_path / "rank"))
    assert done.returncode == 0, done.stderr
    alone = model_of(name)
    reports = prune_model(alone, tokens(), PruningPlan(**PLAN | options))
    assert any(report.permuted for report in reports) == ("permute" in options)
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert first[1] == second[1]
    assert [(name, count) for name, count, _ in first[1]] == [(r.name, r.tokens) for r in reports]
    for (_, _, error), report in zip(first[1], reports, strict=True):
        assert error == pytest.approx(report.error, rel=1e-9)
    for key, expected in alone.state_dict().items():
        assert torch.equal(first[0][key], second[0][key]), key
        assert torch.equal(first[0][key] == 0, expected == 0), key
        torch.testing.assert_close(first[0][key], expected, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.slow
def test_command_runs_under_torchrun(small, tmp_path):
    done = two_ranks("-m", "rose_exp", *small, "hydra.run.dir=two", "save=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("full record") == 1
    assert rose_exp(*small, "hydra.run.dir=one", folder=tmp_path).returncode == 0
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert (one["protocol"]["ranks"], two["protocol"]["ranks"]) == (1, 2)
    assert two["metrics"]["perplexity.local"] == pytest.approx(one["metrics"]["perplexity.local"], rel=1e-2)
    assert [layer["name"] for layer in two["layers"]] == [layer["name"] for layer in one["layers"]]
    assert {layer["tokens"] for layer in two["layers"]} == {4 * 128}
    assert (tmp_path / "two/model/config.json").exists()


def test_invalid_settings_stop_all_ranks(small, tmp_path):
    done = two_ranks("-m", "rose_exp", *small, "hydra.run.dir=out", "calibration.samples=1", folder=tmp_path)
    assert done.returncode != 0
    assert "calibration.samples: expected at least one window for each of 2 ranks, got 1" in done.stdout + done.stderr
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_failure_of_one_rank_stops_the_sweep_without_a_deadlock(small, tmp_path):
    """Only the first rank fails, before the next collective operation; the other rank must not hang."""
    local = [override for override in small if not override.startswith("evaluation")]
    tasks = ["evaluation=zero_shot", "evaluation.zero_shot.tasks=[nothing]"]
    done = two_ranks("-m", "rose_exp", "-m", *local, *tasks, "seed=0,1", "hydra.sweep.dir=out", folder=tmp_path)
    assert done.returncode != 0
    assert "evaluation.zero_shot.tasks: expected names of lm-eval's tasks, got 'nothing'" in done.stdout + done.stderr
    assert json.loads(next((tmp_path / "out").glob("*/run.json")).read_text())["status"] == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_most_expensive_tasks_are_assigned_first():
    ranks = Ranks()
    ranks.size = 2
    assert ranks.owners([1, 5, 3, 3]) == [0, 0, 1, 1]


def test_collectives_are_no_ops_in_a_single_process():
    ranks = Ranks()
    moments = InputMoments(3)
    moments.update(torch.ones(2, 3))
    ranks.reduce(moments, 0)
    assert moments.tokens == 2
    assert torch.equal(ranks.share(torch.arange(5)), torch.arange(5))
    assert ranks.gather("x") == ["x"]
    assert ranks.owners([3, 1]) == [0, 0]
