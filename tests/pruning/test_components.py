"""The pruning loop calls its components at fixed points, for blocks and for packages."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import Allocation, Magnitude, SemiStructured, SparseGPT, Structured, Target, Unstructured
from rose_exp.pruning import FirstBlock, PruneContext, PruningPlan, components, prune_model
from rose_exp.pruning.component import Component
from rose_exp.pruning.components import components_for
from rose_exp.settings.reconstruction import Reconstruction

from ..diffusion import pipelines
from ..models.families import build, tokens

PLAN = PruningPlan(Magnitude(), Unstructured(0.5), batch=2)
POINTS = (
    *("before_unit", "collect", "after_collect", "arrange", "solve"),
    *("before_solve", "outgoing", "after_groups", "after_unit", "unit_facts"),
)


class Recorder(Component):
    """Records the points at which the loop calls it, and the unit's index."""

    calls: list[tuple[str, int | None]]

    @classmethod
    def create(cls, plan, context) -> Recorder:
        cls.calls = []
        return cls()

    def check(self, pruner) -> None:
        self.calls.append(("check", None))

    def before_model(self, pruner) -> None:
        self.calls.append(("before_model", None))


def _recording(point: str):
    def method(self, unit, *arguments):
        self.calls.append((point, unit.index))
        return getattr(Component, point)(self, unit, *arguments)

    return method


for _point in POINTS:
    setattr(Recorder, _point, _recording(_point))


@pytest.fixture
def recorder(monkeypatch) -> type[Recorder]:
    monkeypatch.setattr(components, "COMPONENTS", (*components.COMPONENTS, Recorder))
    return Recorder


def points_of(recorder: type[Recorder], index: int) -> list[str]:
    """The distinct points of a unit in the order of their first call."""
    return list(dict.fromkeys(point for point, unit in recorder.calls if unit == index))


def test_a_component_is_called_at_every_point_of_a_block(recorder):
    model = build("llama")
    prune_model(model, tokens(), PLAN)
    assert recorder.calls[:2] == [("check", None), ("before_model", None)]
    for index in range(len(model.model.layers)):
        assert points_of(recorder, index) == list(POINTS)
    groups = sum(1 for point, unit in recorder.calls if point == "solve" and unit == 0)
    assert groups == 4  # q, k and v; o; gate and up; down


def test_a_component_is_called_at_every_point_of_a_package(recorder):
    pruner = pipelines.pruner_of("sd3", count=2)
    pruner.run()
    assert recorder.calls[:2] == [("check", None), ("before_model", None)]
    for index in range(2):
        assert points_of(recorder, index) == list(POINTS)


def test_a_component_can_solve_a_group_itself(monkeypatch):
    """Only the layers that it leaves to the plan's method are pruned."""

    class KeepsAttention(Recorder):
        def solve(self, unit, group, inputs):
            assert inputs[group[0].name].moments.tokens > 0
            return [] if "self_attn" in group[0].name else None

    monkeypatch.setattr(components, "COMPONENTS", (KeepsAttention,))
    model = build("llama")
    reports = prune_model(model, tokens(), PLAN)
    assert {report.name.split(".")[3] for report in reports} == {"mlp"}
    for layer in model.model.layers:
        assert torch.count_nonzero(layer.self_attn.q_proj.weight) == layer.self_attn.q_proj.weight.numel()
        assert (layer.mlp.up_proj.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "context", "names"),
    [
        ({}, {}, set()),
        ({"allocation": Allocation("owl")}, {}, {"AllocationSurvey"}),
        ({"allocation": Allocation()}, {}, set()),
        ({"target": Target(0.5)}, {}, {"RegressionTargets"}),
        ({"target": Target()}, {}, set()),
        ({"reconstruction": Reconstruction(1)}, {}, {"BlockReconstruction"}),
        ({"reconstruction": Reconstruction()}, {}, set()),
        ({"permute": True}, {}, set()),
        ({"permute": True, "sparsity": SemiStructured(2, 4)}, {}, {"ChannelPermutation"}),
        ({"sparsity": Structured(0.5)}, {}, {"StructuredRemoval"}),
        ({"study": ["*"]}, {}, set()),  # nobody receives the studies
        ({"study": ["*"]}, {"on_study": print}, {"LayerStudies"}),
        ({}, {"first_block": FirstBlock()}, {"FirstBlockReuse"}),
        ({"target": Target(0.5)}, {"first_block": FirstBlock()}, {"RegressionTargets"}),
        ({"true_sequential": True}, {"first_block": FirstBlock()}, set()),
    ],
)
def test_a_plan_creates_the_components_that_it_uses(options, context, names):
    plan = PruningPlan(**{"method": SparseGPT(), "sparsity": Unstructured(0.5)} | options)
    created = {type(component).__name__ for component in components_for(plan, PruneContext(**context))}
    assert created == names | {"StarvedExperts"}
