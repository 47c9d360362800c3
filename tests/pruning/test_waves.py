"""With limited memory for moments, a block is calibrated in several passes, with the same result."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from rose_exp.engine import InputMoments, Ordering, Refine, SparseGPT, Target, Unstructured
from rose_exp.pruning import PruneContext, PruningPlan, RunState, collect, prune_model
from rose_exp.pruning.waves import limited_waves
from rose_exp.runtime.signals import Interrupted

from ..models import survey
from .stopping import stop_after_solving

PLAN = PruningPlan(SparseGPT(), Unstructured(0.5), expert_tokens=1)
MIXTURES = ["GptOssConfig", "MixtralConfig", "LongcatFlashConfig", "JetMoeConfig"]
MODES = {
    "plain": {},
    "rose": {"ordering": Ordering(), "refine": Refine(steps=2)},
    "target": {"target": Target(strength=0.5)},
    "residual": {"target": Target(residual=1.0)},
    "true_sequential": {"true_sequential": True},
    "true_sequential_target": {"true_sequential": True, "target": Target(strength=0.5)},
}


def windows() -> torch.Tensor:
    return torch.randint(3, survey.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


def pruned(name: str, plan: PruningPlan, context: PruneContext | None = None) -> tuple[dict, list]:
    model = survey.build(name)
    reports = prune_model(model, windows(), plan, context)
    return model.state_dict(), [replace(report, seconds=0.0) for report in reports]


@pytest.fixture
def live(monkeypatch) -> dict[str, int]:
    """Sizes in bytes of the moments in memory: now, and the largest so far."""
    sizes = {"now": 0, "peak": 0}
    make = collect.empty_moments

    def make_and_count(*arguments) -> InputMoments:
        moments = make(*arguments)
        size = moments.gram.numel() * moments.gram.element_size()
        sizes["now"] += size
        sizes["peak"] = max(sizes["peak"], sizes["now"])
        weakref.finalize(moments, lambda: sizes.update(now=sizes["now"] - size))
        return moments

    monkeypatch.setattr(collect, "empty_moments", make_and_count)
    return sizes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["GptOssConfig", *[pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES[1:]]])
def test_results_do_not_depend_on_the_limit(name, mode):
    plan = replace(PLAN, **MODES[mode])
    expected, reports = pruned(name, plan)
    for limit in (1, 20_000):
        found, found_reports = pruned(name, plan, PruneContext(moments_bytes=limit))
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        assert found_reports == reports


@pytest.mark.parametrize("limit", [30_000, 60_000])
def test_moments_in_memory_stay_below_the_limit(limit, live):
    pruned("GptOssConfig", PLAN)
    unlimited, live["peak"] = live["peak"], 0
    pruned("GptOssConfig", PLAN, PruneContext(moments_bytes=limit))
    assert live["peak"] <= limit < unlimited
    assert live["now"] == 0


def test_waves_are_successive_and_hold_at_least_one_group():
    layers = [[torch.nn.Linear(8, 4)], [torch.nn.Linear(16, 4)], [torch.nn.Linear(8, 4)]]
    named = [[type("Layer", (), {"columns": layer.in_features, "weight": layer.weight})()] for (layer,) in layers]
    waves = [limited_waves(named, PLAN, PruneContext(moments_bytes=limit)) for limit in (1, 2560, 9999)]
    assert [[len(wave) for wave in parts] for parts in waves] == [[1, 1, 1], [2, 1], [3]]


@pytest.mark.parametrize("stop_after", [3, 9, 14])
def test_a_run_resumes_between_two_passes(stop_after, tmp_path, monkeypatch):
    expected, reports = pruned("GptOssConfig", PLAN)
    stop_after_solving(stop_after, monkeypatch)
    with pytest.raises(Interrupted):
        pruned("GptOssConfig", PLAN, PruneContext(moments_bytes=30_000, state=RunState(tmp_path / "state", {"code": "a"})))
    monkeypatch.undo()
    state = RunState(tmp_path / "state", {"code": "a"})
    found, found_reports = pruned("GptOssConfig", PLAN, PruneContext(moments_bytes=10_000, state=state))
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert found_reports == reports
