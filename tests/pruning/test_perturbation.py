"""Replicates perturb the embeddings of the calibration data by one rounding error, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rose_exp.engine import Ordering, SparseGPT, Unstructured
from rose_exp.pruning import PruneContext, PruningPlan, prune_model
from rose_exp.pruning.perturbation import perturbed
from rose_exp.runtime.errors import RoseExpError

from ..models import survey
from ..models.families import CONFIGS, build, tokens
from .test_whole import Skipping

PLAN = {"method": SparseGPT(), "sparsity": Unstructured(0.7), "ordering": Ordering.rose(), "block_size": 16}


def errors(model: nn.Module, windows: torch.Tensor, **options) -> list[float]:
    context = PruneContext(on_warning=lambda *_: None)
    return [report.error for report in prune_model(model, windows, PruningPlan(**(PLAN | options)), context)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_perturbation_is_one_rounding_error(dtype):
    embeddings = nn.Embedding(100, 64, dtype=dtype)
    model = Bare(embeddings)
    windows = tokens(3, 24) % 100
    plain = embeddings(windows)
    with perturbed(model, 1):
        changed = embeddings(windows)
    relative = (changed.double() / plain.double() - 1).abs()
    assert float(relative.max()) <= 1.51 * torch.finfo(dtype).eps  # the factor and the product are rounded
    assert 0.2 < float((changed != plain).double().mean()) < 1
    assert torch.equal(embeddings(windows), plain)


class Bare(nn.Module):
    """Embeddings of which the perturbation asks, as it does of a model of transformers."""

    def __init__(self, embeddings: nn.Module | None):
        super().__init__()
        self.embeddings = embeddings

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embeddings


def test_perturbation_depends_on_the_window_alone():
    embeddings = nn.Embedding(100, 16)
    model, windows = Bare(embeddings), tokens(5, 24) % 100

    def outputs(replicate: int, batch: int, of: torch.Tensor = windows) -> torch.Tensor:
        with perturbed(model, replicate):
            return torch.cat([embeddings(part) for part in of.split(batch)])

    first = outputs(1, 1)
    assert torch.equal(first, outputs(1, 5))
    assert torch.equal(first.flip(0), outputs(1, 2, windows.flip(0)))
    assert not torch.equal(first, outputs(2, 1))


@pytest.mark.parametrize("family", CONFIGS)
def test_replicates_of_every_family(family):
    windows = tokens(4)
    plain = errors(build(family), windows)
    replicate = errors(build(family), windows, replicate=1)
    assert replicate == errors(build(family), windows, replicate=1, batch=1)
    assert replicate != plain
    assert replicate != errors(build(family), windows, replicate=2)
    assert replicate[0] == pytest.approx(plain[0], rel=1e-3)  # later layers differ by what other masks in earlier ones cause


@pytest.mark.parametrize("name", ["HrmTextConfig", "BltConfig"])
def test_replicates_of_models_that_are_no_chain(name):
    windows = torch.randint(0, 10, (4, 12), generator=torch.Generator().manual_seed(0))
    plain = errors(survey.build(name), windows)
    replicate = errors(survey.build(name), windows, replicate=1)
    assert replicate == errors(survey.build(name), windows, replicate=1)
    assert replicate != plain


@pytest.mark.parametrize("model", [Skipping(), Bare(None)], ids=["no accessor", "no embeddings"])
def test_unknown_embeddings_are_an_error(model):
    with (
        pytest.raises(RoseExpError, match=r"calibration\.replicate: expected 0 for \w+, whose input embeddings are not known"),
        perturbed(model, 2),
    ):
        pass


def test_embeddings_that_are_not_called_are_an_error():
    """Otherwise, the replicates would be equal runs."""
    with (
        pytest.raises(RoseExpError, match="expected 0 for Bare, which does not call its input embeddings, got 2"),
        perturbed(Bare(nn.Embedding(4, 4)), 2),
    ):
        pass


def test_replicate_0_changes_nothing():
    model, windows = build("llama"), tokens(2)
    with perturbed(model, 0):
        assert not model.get_input_embeddings()._forward_hooks
    assert errors(build("llama"), windows) == errors(build("llama"), windows, replicate=0)
