"""Regression targets in the pruning loop, against two whole models that are run for every block."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import CrossMoments, InputMoments, Ordering, Refine, SparseGPT, Target, Unstructured, prune_layer
from rose_exp.models import all_linear_layers, find_blocks, unstacked_experts
from rose_exp.pruning import PruningPlan, collect, events, prune_model
from rose_exp.pruning.capture import probe

from ..models.families import build, tokens
from .test_state import Cut, assert_equal, cut_after, prune

OPTIONS = {"block_size": 16, "refine": Refine(3, mask_iterations=4, damping=0.01)}
TARGET = Target(0.6, 0.4)
ADDING = {  # layers whose output is added directly to the hidden states
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "phi": ["self_attn.dense", "mlp.fc2"],  # in parallel
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "gemma2": [],  # normalizes both outputs first
    "mixtral": ["self_attn.o_proj"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(ADDING))
def test_layers_that_add_to_the_hidden_states_are_found(family, dtype):
    model = build(family).to(dtype)
    blocks = find_blocks(model)
    found = probe(model, blocks, tokens(), adding=True).adding
    assert [sorted(names) for names in found] == [
        sorted(f"{blocks.block_name(index)}.{name}" for name in ADDING[family]) for index in range(3)
    ]


def watched(model, windows):
    """Run the whole model and record the inputs and outputs of its layers and blocks."""
    blocks, seen, handles = find_blocks(model), {}, []

    def note(key):
        def hook(_module, args, output):
            seen[key] = args[0]
            seen[key, "out"] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer in all_linear_layers(blocks):
        handles.append(layer.module.register_forward_hook(note(layer.name)))
    for index, block in enumerate(blocks.blocks):
        handles.append(block.register_forward_hook(note(index)))
    with torch.no_grad(), unstacked_experts(model):
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2", "mixtral"])
@pytest.mark.parametrize("with_weight", [False, True])
def test_loop_with_two_models_equals_running_both_for_each_block(family, sequential, with_weight, monkeypatch):
    """For a mixture of experts, only attention is pruned because other layers add to the hidden states after it.

    ``with_weight``: the sums of single layers include their weights, as for layers with far fewer rows than columns.
    """
    if with_weight:
        monkeypatch.setattr(collect, "narrow", lambda *_: True)
    pruned, slow, dense = (build(family).double() for _ in range(3))
    windows = tokens()
    options = {"target": TARGET, "true_sequential": sequential, "skip": ["*.experts.*"] if family == "mixtral" else []}
    plan = PruningPlan(SparseGPT(), Unstructured(0.5), ordering=Ordering.rose(), batch=2, **options, **OPTIONS)
    reports = prune_model(pruned, windows, plan)
    dense_values = watched(dense, windows)
    layers = {layer.name: layer for layer in all_linear_layers(find_blocks(slow))}
    found = probe(slow, find_blocks(slow), windows, adding=True)
    for index, (groups, adding) in enumerate(zip(found.layers, found.adding, strict=True)):
        last = groups[-1]  # of the block
        groups = [group for group in groups if plan.wants(group[0])]
        for stage in groups if sequential else [[name for group in groups for name in group]]:
            values = watched(slow, windows)
            solved = {}
            for name in stage:
                x, weight = values[name], layers[name].weight
                moments = InputMoments(x.shape[-1], dtype=torch.float64)
                moments.update(x)
                missing = None
                if name in last and name in adding:  # residual after the block without the layer's own contribution
                    missing = dense_values[index, "out"] - values[index, "out"] - (dense_values[name] - x) @ weight.T
                elif name in adding:
                    missing = dense_values[index] - values[index]
                cross_moments = CrossMoments(x.shape[-1], None if missing is None else missing.shape[-1], dtype=torch.float64)
                cross_moments.update(x, dense_values[name], missing)
                options = {
                    "sparsity": Unstructured(0.5),
                    "ordering": Ordering.rose(),
                    "cross_moments": cross_moments,
                    "target": TARGET,
                }
                solved[name] = prune_layer(weight, moments, **options, **OPTIONS).weight
            for name, weight in solved.items():
                layers[name].set_weight(weight)
    for layer in all_linear_layers(find_blocks(pruned)):
        torch.testing.assert_close(layer.weight, layers[layer.name].weight, rtol=1e-5, atol=1e-7, msg=layer.name)
    assert any(report.error != report.target_error for report in reports)
    assert all(report.error == report.target_error for report in reports if ".0." in report.name and not sequential)


def test_experts_use_the_dense_regression_target():
    reports = prune_model(build("mixtral"), tokens(), PruningPlan(SparseGPT(), Unstructured(0.5), batch=2, target=TARGET))
    moved = {report.name for report in reports if report.error != report.target_error}
    assert moved
    assert not any("experts" in name for name in moved)
    assert {r.target for r in reports if "experts" in r.name} == {"dense"}
    assert {r.target for r in reports if r.name.endswith("o_proj")} == {"residual"}
    assert {r.target for r in reports if r.name.endswith("q_proj")} == {"asymmetric"}


def test_harmful_refinement_is_rejected_and_reported():
    plan = PruningPlan(SparseGPT(), Unstructured(0.5), batch=2, refine=Refine(0, mask_iterations=1, penalty=1e-6))
    reports = prune_model(build("llama"), tokens(), plan)
    left = [report for report in reports if report.refinement_rejected]
    assert left
    assert all(report.target_error == report.unrefined_error and report.mask_changes == 0 for report in left)
    assert [event["kind"] for event in events(left[0], plan.damping)].count("refinement_rejected") == 1
    assert all(report.target_error <= report.unrefined_error for report in reports)


@pytest.mark.parametrize("skipped", ["*.1.*", "*mlp*", "*.down_proj"])
def test_dense_hidden_states_advance_through_skipped_layers(skipped):
    plan = PruningPlan(SparseGPT(), Unstructured(0.5), batch=2, target=TARGET, skip=[skipped])
    pruned = build("llama").double()
    reports = prune_model(pruned, tokens(), plan)
    moved = {report.name for report in reports if report.error != report.target_error}
    assert any(name.startswith("model.layers.2.") for name in moved)
    assert all(0 <= report.target_error < 1 for report in reports)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("resume", ["activations", "recompute"])
def test_resuming_with_regression_targets_gives_identical_weights(tmp_path, resume, sequential):
    options = {"target": TARGET, "refine": OPTIONS["refine"], "true_sequential": sequential}
    expected = prune(tmp_path / "whole", resume, **options)
    for after in (1, 2):
        folder = tmp_path / f"{after}"
        with pytest.raises(Cut):
            prune(folder, resume, on_layer=cut_after(after - 1), **options)
        assert (folder / f"dense-{after:05}.0.bin").exists() == (resume == "activations")
        assert_equal(prune(folder, resume, **options), expected)
