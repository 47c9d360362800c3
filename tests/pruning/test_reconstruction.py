"""Block reconstruction trains the kept weights of each block towards the dense model, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from rose_exp.engine import Ordering, SemiStructured, SparseGPT, Target, Unstructured, Wanda
from rose_exp.engine.groups import Structured
from rose_exp.models import all_linear_layers, find_blocks, linear_layers
from rose_exp.pruning import PruneContext, PruningPlan, RunState, prune_model
from rose_exp.pruning.block_training import Training
from rose_exp.pruning.reconstruction import BlockReconstruction, Stage, layers_of_stages
from rose_exp.pruning.report import events
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.reconstruction import Reconstruction

from ..models.families import CONFIGS, build, tokens
from .test_modes import Cut, cut_after

OPTIONS = Reconstruction(6, rate=1e-3, batch=2)
PLAN = PruningPlan(Wanda(), Unstructured(0.5), reconstruction=OPTIONS)
WINDOWS = 8
FAMILIES = [name for name in ("llama", "qwen2", "gpt2", "opt", "gemma2", "phi", "mixtral", "qwen3_moe") if name in CONFIGS]


def pruned(model: torch.nn.Module, plan: PruningPlan, **context) -> tuple[torch.nn.Module, list]:
    model = copy.deepcopy(model)
    return model, prune_model(model, tokens(WINDOWS), plan, PruneContext(**context))


def distance(model: torch.nn.Module, dense: torch.nn.Module) -> float:
    """Return the squared distance of the logits from those of the dense model on the calibration windows."""
    with torch.no_grad():
        return float((model(tokens(WINDOWS)).logits - dense(tokens(WINDOWS)).logits).square().sum())


@pytest.mark.parametrize("parts", ["separate", "together"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_weights_move_towards_the_dense_model(family, parts):
    """Masks stay as they are, and everything outside the blocks stays bitwise equal."""
    dense = build(family)
    plan = replace(PLAN, reconstruction=replace(OPTIONS, parts=parts))
    alone, _ = pruned(dense, replace(plan, reconstruction=None))
    model, reports = pruned(dense, plan)
    assert distance(model, dense) < distance(alone, dense)
    assert all(0 < report.reconstruction < 1 for report in reports)
    blocks = find_blocks(model)
    first = (linear_layers(list_of.blocks[0], "") for list_of in (find_blocks(alone), blocks))
    for expected, layer in zip(*first, strict=True):
        assert torch.equal(expected.weight == 0, layer.weight == 0), layer.name  # later blocks have other inputs
    inside = {id(parameter) for block in blocks.blocks for parameter in block.parameters()}
    for (name, parameter), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert parameter.requires_grad == before.requires_grad
        assert id(parameter) in inside or torch.equal(parameter, before), name


def test_sparsity_is_exact_for_every_pattern():
    for sparsity in (Unstructured(0.7), SemiStructured(2, 4)):
        plan = replace(PLAN, sparsity=sparsity)
        alone, _ = pruned(build("llama"), replace(plan, reconstruction=None))
        model, _ = pruned(build("llama"), plan)
        expected, found = (
            [int((layer.weight == 0).sum()) for layer in all_linear_layers(find_blocks(m))] for m in (alone, model)
        )
        assert found == expected
        if isinstance(sparsity, SemiStructured):
            for layer in all_linear_layers(find_blocks(model)):
                assert ((layer.weight == 0).unflatten(1, (-1, 4)).sum(dim=-1) == 2).all()


def test_layers_that_are_not_pruned_stay_as_they_are():
    """Their biases, too; the norms of the part without pruned layers stay as they are if it is trained by itself."""
    dense = build("qwen2")
    model, reports = pruned(dense, replace(PLAN, layers=["*.mlp.*"], skip=["*.down_proj"]))
    assert {report.name.split(".")[-1] for report in reports} == {"gate_proj", "up_proj"}
    for before, block in zip(dense.model.layers, model.model.layers, strict=True):
        for name, parameter in before.self_attn.named_parameters():
            assert torch.equal(block.self_attn.get_parameter(name), parameter), name
        assert torch.equal(block.mlp.down_proj.weight, before.mlp.down_proj.weight)
        assert not torch.equal(block.mlp.up_proj.weight, before.mlp.up_proj.weight)
        assert not torch.equal(block.post_attention_layernorm.weight, before.post_attention_layernorm.weight)


def test_attention_is_trained_before_the_mlp(monkeypatch):
    stages = []
    original = BlockReconstruction.after_unit

    def after_unit(self, unit):
        stages.append([[layer.name.split(".")[-1] for layer in layers] for layers in layers_of_stages(unit, set(unit.layers))])
        original(self, unit)

    monkeypatch.setattr(BlockReconstruction, "after_unit", after_unit)
    pruned(build("llama"), PLAN)
    assert stages[0] == [["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]]


def test_target_of_attention_is_the_input_of_the_norm_after_it(monkeypatch):
    dense, found, expected = build("llama"), [], []
    original = BlockReconstruction.after_unit

    def after_unit(self, unit):
        found.append(torch.cat([batch for _, batch in self.inner[0]]))
        original(self, unit)

    monkeypatch.setattr(BlockReconstruction, "after_unit", after_unit)
    pruned(dense, PLAN)
    for layer in dense.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _module, args: expected.append(args[0]))
    with torch.no_grad():
        dense(tokens(WINDOWS))
    assert len(found) == len(expected) == 3
    for got, states in zip(found, expected, strict=True):
        torch.testing.assert_close(got, states)


def test_a_block_that_is_not_pruned_has_no_error_in_any_stage(monkeypatch):
    """The targets of attention and MLP are the dense model's own hidden states."""
    errors = []

    def after_unit(self, unit):
        targets = [*self.inner[: len(unit.stages)], self.outputs]
        for number, target in enumerate(targets):
            final = number == len(unit.stages)
            stage = Stage(unit, unit.stages[: number + 1], final, self.pruner.hidden, target)
            errors.extend(float(stage.error(windows)) for windows in target.pieces)
        original(self, unit)

    original = BlockReconstruction.after_unit
    monkeypatch.setattr(BlockReconstruction, "after_unit", after_unit)
    _, reports = pruned(build("llama"), replace(PLAN, sparsity=Unstructured(0.0)))
    assert errors == pytest.approx([0] * (3 * 2 * WINDOWS), abs=1e-10)  # three blocks in two stages
    assert {report.reconstruction for report in reports} == {None}
    errors.clear()
    pruned(build("llama"), PLAN)
    assert min(errors) > 1e-4


def test_blocks_that_cannot_be_divided_give_a_warning():
    warnings = []
    pruned(build("gemma2"), PLAN, on_warning=lambda kind, detail: warnings.append((kind, detail)))
    assert [kind for kind, _ in warnings] == ["reconstructed_together"]
    assert warnings[0][1].startswith("model.layers.0, model.layers.1")
    warnings.clear()
    together = replace(PLAN, reconstruction=replace(OPTIONS, parts="together"))
    pruned(build("gemma2"), together, on_warning=lambda *warning: warnings.append(warning))
    pruned(build("llama"), PLAN, on_warning=lambda *warning: warnings.append(warning))
    assert warnings == []


def test_starved_experts_stay_dense():
    dense = build("mixtral")
    model, reports = pruned(dense, replace(PLAN, expert_tokens=100))
    starved = {report.name for report in reports if report.fallback == "dense"}
    assert 0 < len(starved) < len([report for report in reports if "experts" in report.name])
    pairs = zip(all_linear_layers(find_blocks(dense)), all_linear_layers(find_blocks(model)), strict=True)
    for before, after in pairs:
        assert torch.equal(before.weight, after.weight) == (before.name in starved), before.name


@dataclass
class Counted:
    """A stage of which only the batches are known."""

    inputs: SimpleNamespace


@pytest.mark.parametrize("held_out", [0.01, 0.125, 0.5, 0.99])
@pytest.mark.parametrize(("windows", "size"), [(2, 1), (5, 2), (9, 4), (32, 1), (33, 4)])
@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_windows_are_either_trained_on_once_per_epoch_or_held_out(held_out, windows, size, batch):
    pieces = [slice(start, min(start + size, windows)) for start in range(0, windows, size)]
    options = Reconstruction(1, held_out=held_out, batch=batch)
    training = Training(Counted(SimpleNamespace(pieces=pieces)), options, PruneContext())
    for epoch in range(2):
        steps = training._steps(epoch)
        trained = [place for step in steps for place in step]
        key = [(rank, piece.start) for rank, piece in trained]
        kept = [(rank, piece.start) for rank, piece in training.held_out]
        assert sorted(key + kept) == [(0, piece.start) for piece in pieces]
        assert key
        assert kept
        sizes = [sum(piece.stop - piece.start for _, piece in step) for step in steps]
        assert all(batch <= found < batch + size for found in sizes[:-1])
        assert 0 < sizes[-1] < batch + size
    assert len(training.batches) < 9 or training._steps(0) != training._steps(1)  # another order


def test_the_epoch_with_the_lowest_held_out_error_counts(monkeypatch):
    """After two epochs without a lower error, the training stops."""
    errors = iter([9.0, 5.0, 3.0, 4.0, 3.5, 3.0])  # before, after each of four epochs, and of the result
    states = []

    def held_out_error(self):
        states.append([parameter.detach().clone() for parameter in self.parameters])
        return next(errors) if self.parameters else original(self)

    original = Training.held_out_error
    monkeypatch.setattr(Training, "held_out_error", held_out_error)
    options = replace(OPTIONS, parts="together", epochs=5)
    model, _ = pruned(build("llama"), replace(PLAN, layers=["*.0.*"], reconstruction=options))
    trained = [found for found in states if found]
    assert next(errors, None) is None
    got = list(model.model.layers[0].parameters())
    for place, equal in enumerate([False, False, True, False, False, True]):
        assert all(torch.equal(a, b) for a, b in zip(trained[place], got, strict=True)) == equal, place


def test_training_that_does_not_help_is_undone():
    """With an excessive rate, the result is bitwise that without reconstruction, and the record has a warning."""
    dense = build("llama")
    alone, _ = pruned(dense, replace(PLAN, reconstruction=None))
    model, reports = pruned(dense, replace(PLAN, reconstruction=replace(OPTIONS, rate=1e6)))
    for name, expected in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name
    assert {report.reconstruction for report in reports} == {1.0}
    assert "reconstruction_without_gain" in {event["kind"] for report in reports for event in events(report, 0.01)}


def test_it_combines_with_every_other_part_of_a_plan():
    dense = build("llama")
    plan = PruningPlan(SparseGPT(), SemiStructured(2, 4), ordering=Ordering.rose(), target=Target(0.5, 0.5), permute=True)
    alone, _ = pruned(dense, plan)
    model, _ = pruned(dense, replace(plan, reconstruction=OPTIONS))
    assert distance(model, dense) < distance(alone, dense)


@pytest.mark.parametrize("parts", ["separate", "together"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_heads_and_neurons_stay_removed(family, parts):
    """The layers that produce the kept heads and neurons are trained as well."""
    dense = build(family)
    plan = PruningPlan(SparseGPT(), Structured(0.5), reconstruction=replace(OPTIONS, parts=parts, rate=1e-4))
    alone, _ = pruned(dense, replace(plan, reconstruction=None))
    model, reports = pruned(dense, plan)
    assert distance(model, dense) < distance(alone, dense)
    assert all(0 < report.reconstruction < 1 for report in reports)
    first, trained = (linear_layers(find_blocks(m).blocks[0], "") for m in (alone, model))
    changed: dict[str, set[bool]] = {}
    for before, after in zip(first, trained, strict=True):
        assert torch.equal(before.weight == 0, after.weight == 0), before.name
        changed.setdefault(before.name.split(".")[-2], set()).add(not torch.equal(before.weight, after.weight))
    assert all(len(answers) == 1 for answers in changed.values())  # a stage that does not help is undone as a whole
    assert {True} in changed.values()


def test_dense_hidden_states_are_those_of_the_dense_model(monkeypatch):
    """With a regression target, which also computes them, and without."""
    dense, found = build("llama"), []
    original = BlockReconstruction.after_unit

    def after_unit(self, unit):
        original(self, unit)
        found.append(torch.cat([batch for _, batch in self.pruner.dense]))

    monkeypatch.setattr(BlockReconstruction, "after_unit", after_unit)
    for target in (None, Target(0.5, 0.5)):
        found.clear()
        pruned(dense, replace(PLAN, target=target, activations="host"))
        with torch.no_grad():
            states = dense(tokens(WINDOWS), output_hidden_states=True).hidden_states
        for got, expected in zip(found[:-1], states[1:-1], strict=True):  # the last ones are normalized
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("resume", ["activations", "recompute"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_resumed_run_has_the_result_of_an_uninterrupted_one(tmp_path, resume, blocks):
    expected, reports = pruned(build("llama"), PLAN)
    with pytest.raises(Cut):
        pruned(build("llama"), PLAN, state=RunState(tmp_path, {"a": 1}, resume), on_layer=cut_after(blocks + 1))
    model, resumed = pruned(build("llama"), PLAN, state=RunState(tmp_path, {"a": 1}, resume))
    assert [replace(report, seconds=0.0) for report in resumed] == [replace(report, seconds=0.0) for report in reports]
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_single_batch_of_windows_is_rejected():
    with pytest.raises(RoseExpError, match=r"calibration.samples: expected at least two batches .* got 1"):
        prune_model(build("llama"), tokens(1), PLAN)
