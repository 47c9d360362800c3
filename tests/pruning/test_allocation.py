"""Sparsity allocation in the pruning loop: the survey against a whole dense model, and pruning by its result."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from rose_exp.engine import Allocation, Refine, SemiStructured, SparseGPT, Target, Unstructured
from rose_exp.engine.allocation import BlockSurvey, loss_histogram
from rose_exp.models import LinearLayer, all_linear_layers, find_blocks, open_model, unstacked_experts
from rose_exp.pruning import OnDisk, PruneContext, PruningPlan, RunState, prune_model
from rose_exp.pruning.activations import Activations
from rose_exp.pruning.allocation import AllocationSurvey, BlockWatch
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.files import LOCK
from rose_exp.runtime.ranks import Ranks
from rose_exp.settings.schema import ModelSettings

from ..models.families import build, tokens, with_biases
from .test_state import FINGERPRINT, Cut, assert_equal, cut_after, prune, untimed

ALLOCATIONS = [Allocation("losses", 0.15), Allocation("owl", 0.08, 2.0)]


def reference(family, allocation, ratio, wanted):
    """Allocate sparsity from one run of the whole dense model."""
    model, seen = with_biases(build(family)), {}
    blocks = find_blocks(model)
    layers = {layer.name: layer for layer in all_linear_layers(blocks) if wanted(layer.name)}

    def note(name):
        def hook(_module, args):
            seen[name] = args[0].flatten(0, -2)

        return hook

    for name, layer in layers.items():
        layer.module.register_forward_pre_hook(note(name))
    with torch.no_grad(), unstacked_experts(model):
        model(input_ids=tokens(), use_cache=False)
    found = []
    for index in range(len(blocks.blocks)):
        own = [name for name in layers if name.startswith(f"{blocks.block_name(index)}.") and name in seen]
        if not own:
            continue
        squares = {name: seen[name].square().mean(dim=0) for name in own}
        powers = {name: (seen[name] @ layers[name].weight.T).square().sum(dim=1).mean() for name in own}
        histograms = {name: loss_histogram(layers[name].weight, squares[name], powers[name]) for name in own}
        scores = torch.cat([(layers[name].weight.abs() * squares[name].sqrt()).flatten() for name in own])
        outliers = float((scores > allocation.outlier * scores.mean()).double().mean())
        found.append(BlockSurvey({name: layers[name].weight.numel() for name in own}, outliers, histograms))
    return allocation.shares(found, ratio)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: a.rule)
def test_layer_sparsities_match_a_survey_of_the_whole_model(family, allocation):
    model = with_biases(build(family))
    plan = PruningPlan(SparseGPT(), Unstructured(0.5), batch=2, block_size=1000, allocation=allocation, skip=["*.1.*"])
    reports = prune_model(model, tokens(), plan)
    expected = reference(family, allocation, 0.5, plan.wants)
    assert {report.name for report in reports} >= set(expected)
    zeros = total = 0
    for report in reports:
        if report.name in expected and not report.fallback:
            assert report.sparsity == pytest.approx(expected[report.name], abs=2e-3), report.name
        zeros += report.sparsity * report.rows * report.columns
        total += report.rows * report.columns
    if family != "mixtral":  # some of its experts are starved and stay dense
        assert abs(zeros - total // 2) <= 1 + 1e-6 * total  # rounding of the histogram
    assert max(expected.values()) - min(expected.values()) > 0.05


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda allocation: allocation.rule)
def test_layers_with_zero_output_are_excluded(allocation):
    layers = [LinearLayer(name, nn.Linear(8, 4)) for name in ("zero", "plain", "silent")]
    layers[0].module.weight.data.zero_()  # the bias does not count as output of the weight
    watch = BlockWatch([layers[:2], layers[2:]], "cpu")
    with ExitStack() as stack, torch.no_grad():
        watch.hooks(stack)
        x = torch.randn(5, 8)
        layers[0].module(x), layers[1].module(x), layers[2].module(0 * x)
    found = watch.survey(allocation, Ranks())
    assert set(found.sizes) == {"plain"}
    assert set(allocation.shares([found], 0.5)) == {"plain"}


def test_out_of_range_losses_raise_an_error_that_names_the_layer():
    of = LinearLayer("block.q_proj", nn.Linear(8, 4, bias=False))
    of.module.weight.data.mul_(1e18)
    watch = BlockWatch([[of]], "cpu")
    with ExitStack() as stack, torch.no_grad():
        watch.hooks(stack)
        of.module(1e3 * torch.randn(5, 8))
    with pytest.raises(RoseExpError, match=r"block.q_proj: weight, mean_square: expected losses that fit float32, got up to"):
        watch.survey(ALLOCATIONS[0], Ranks())


@pytest.mark.parametrize("resume", ["activations", "recompute"])
def test_sparsity_allocation_is_restored_on_resume(tmp_path, resume, monkeypatch):
    expected = prune(tmp_path / "whole", resume, allocation=ALLOCATIONS[0])
    folder = tmp_path / "cut"
    with pytest.raises(Cut):
        prune(folder, resume, allocation=ALLOCATIONS[0], on_layer=cut_after(0))
    kept = json.loads((folder / "state.json").read_text())["progress"]["shares"]
    assert set(kept) == {report["name"] for report in expected[1]}
    with monkeypatch.context() as patch:  # a restored allocation is not surveyed again
        patch.setattr(AllocationSurvey, "_survey", None)
        assert_equal(prune(folder, resume, allocation=ALLOCATIONS[0]), expected)


def test_disk_holds_at_most_two_streams_of_hidden_states(tmp_path, monkeypatch):
    """The hidden states of the survey are deleted before the dense ones are created."""
    files_at_copy = []
    real = Activations.copy

    def copy(self, file=None):
        files_at_copy.append(sorted(path.name for path in file.parent.iterdir() if path.name != LOCK))
        return real(self, file)

    monkeypatch.setattr(Activations, "copy", copy)
    options = {"allocation": ALLOCATIONS[0], "target": Target(0.5, 0.5), "activations": "disk", "batch": 2}
    on_disk, in_memory = build("llama"), build("llama")
    prune_model(on_disk, tokens(), PruningPlan(SparseGPT(), Unstructured(0.5), **options), PruneContext(scratch=tmp_path))
    assert files_at_copy == [["hidden"], ["hidden"]]
    prune_model(in_memory, tokens(), PruningPlan(SparseGPT(), Unstructured(0.5), **options | {"activations": "device"}))
    for name, value in in_memory.state_dict().items():
        assert torch.equal(on_disk.state_dict()[name], value), name


@pytest.mark.parametrize("how", [{"allocation": ALLOCATIONS[0]}, {"sparsity": SemiStructured(2, 4), "permute": True}])
def test_streaming_blocks_from_disk_gives_identical_results(tmp_path, how):
    plan = PruningPlan(**{"method": SparseGPT(), "sparsity": Unstructured(0.5), "batch": 2, "target": Target(0.5, 0.5)} | how)
    whole = build("qwen2")
    whole.save_pretrained(tmp_path / "model")
    expected = untimed(prune_model(whole, tokens(), plan))
    loaded, streamed = open_model(ModelSettings(path=str(tmp_path / "model")))
    state = RunState(tmp_path / "state", FINGERPRINT)
    weights = OnDisk(streamed, state.block)
    assert untimed(prune_model(loaded.model, tokens(), plan, PruneContext(weights=weights, state=state))) == expected
    for index, block in enumerate(find_blocks(whole).blocks):
        for name, value in block.state_dict().items():
            assert torch.equal(state.block(index)[name], value), name


def test_regression_targets_can_be_combined_with_an_allocation():
    model = build("llama")
    options = {"allocation": ALLOCATIONS[0], "target": Target(0.5, 0.5), "refine": Refine(2, mask_iterations=3)}
    reports = prune_model(model, tokens(), PruningPlan(SparseGPT(), Unstructured(0.5), batch=2, **options))
    total = sum(report.rows * report.columns for report in reports)
    assert round(sum(report.sparsity * report.rows * report.columns for report in reports)) == total // 2
    assert sum(report.mask_changes for report in reports) > 0
