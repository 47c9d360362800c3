"""Models whose blocks do not form a chain are pruned block by block with forward passes of the whole model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rose_exp.engine import SemiStructured, SparseGPT, Target, Unstructured
from rose_exp.engine.allocation import Allocation
from rose_exp.models import find_blocks
from rose_exp.pruning import InMemory, PruneContext, PruningPlan, RunState, answers_by_blocks, prune_model
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.signals import Interrupted
from rose_exp.settings.reconstruction import Reconstruction

from ..models import survey
from ..models.whole import prune_whole, whole_logits
from .stopping import stop_after_solving

PLAN = PruningPlan(SparseGPT(), Unstructured(0.5))


class Skipping(nn.Module):
    """A causal model whose second block receives more than the output of the first, and whose first block runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, input_ids, **_):
        embedded = self.embed(input_ids)
        hidden = self.layers[0](embedded)
        hidden = self.layers[1](hidden + embedded)
        return SimpleNamespace(logits=self.layers[2](self.layers[0](hidden)))


MODELS = {
    "skipping": Skipping,
    "HrmText": lambda: survey.build("HrmTextConfig"),  # two stacks that run several times
    "Blt": lambda: survey.build("BltConfig"),  # the number of patches depends on the text
}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 10, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"true_sequential": True}], ids=["plain", "true_sequential"])
def test_weights_equal_those_of_the_reference(name, options, tokens, tmp_path):
    model, reference, warnings = MODELS[name](), MODELS[name](), []
    context = PruneContext(on_warning=lambda *warning: warnings.append(warning))
    reports = prune_model(model, tokens, replace(PLAN, **options), context)
    assert [kind for kind, _ in warnings] == ["whole_passes"]
    assert {round(report.sparsity, 2) for report in reports} == {0.5}
    if not options:
        prune_whole(reference, tokens, PLAN, {report.name for report in reports})
        for key, value in reference.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key
    blocks = InMemory(find_blocks(model))
    answers = answers_by_blocks(model, blocks, tokens, "cpu", 1, "device", tmp_path, "logits")
    assert torch.equal(torch.cat([logits for _, logits in answers]), whole_logits(model, tokens))


@pytest.mark.parametrize(
    ("plan", "setting"),
    [
        (replace(PLAN, target=Target(strength=0.5)), "target"),
        (replace(PLAN, allocation=Allocation(rule="losses")), "allocation"),
        (replace(PLAN, reconstruction=Reconstruction(1)), "reconstruction"),
        (replace(PLAN, sparsity=SemiStructured(2, 4), permute=True), "pipeline.permute"),
    ],
    ids=["target", "allocation", "reconstruction", "permute"],
)
def test_options_that_need_a_chain_raise_an_error_before_pruning(plan, setting, tokens):
    model = Skipping()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RoseExpError, match=f"{setting}: expected a model whose blocks form a chain, got Skipping"):
        prune_model(model, tokens, plan)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_stopped_run_resumes_with_the_same_result(stop_after, tokens, tmp_path, monkeypatch):
    expected = Skipping()
    reports = prune_model(expected, tokens, PLAN)
    stop_after_solving(stop_after, monkeypatch)
    with pytest.raises(Interrupted):
        prune_model(Skipping(), tokens, PLAN, PruneContext(state=RunState(tmp_path / "state", {"code": "a"})))
    monkeypatch.undo()
    model = Skipping()
    resumed = prune_model(model, tokens, PLAN, PruneContext(state=RunState(tmp_path / "state", {"code": "a"})))
    assert [replace(report, seconds=0.0) for report in resumed] == [replace(report, seconds=0.0) for report in reports]
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
