"""The pruning loop: every layer of every model family gets the correct inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rose_exp.engine import METHODS, InputMoments, Ordering, SparseGPT, Unstructured, Wanda, prune_layer
from rose_exp.models import all_linear_layers, find_blocks, unstacked_experts
from rose_exp.pruning import PruneContext, PruningPlan, prune_model
from rose_exp.pruning.capture import probe, trace
from rose_exp.runtime.errors import RoseExpError

from ..models.families import CONFIGS, SHARED_INPUTS, build, tokens

FAMILIES = sorted(CONFIGS)


def plan(**options):
    defaults = {"method": SparseGPT(), "sparsity": Unstructured(0.5), "ordering": Ordering.rose(), "block_size": 16}
    return PruningPlan(**(defaults | {"batch": 2} | options))


def prune_slowly(model: nn.Module, windows: torch.Tensor, sequential: bool) -> None:
    """Prune without the loop: for each block (or each layer group of it), run the *whole* model again and collect the moments
    with hooks on the layers."""
    blocks = find_blocks(model)
    for groups in probe(model, blocks, windows).layers:
        names = [[name for group in groups for name in group]] if not sequential else groups
        layers = {layer.name: layer for layer in all_linear_layers(blocks)}
        for stage in names:
            moments = {name: InputMoments(layers[name].columns, dtype=torch.float64) for name in stage}
            hooks = [
                layers[name].module.register_forward_pre_hook(lambda _m, args, to=moments[name]: to.update(args[0]))
                for name in stage
            ]
            with torch.no_grad(), unstacked_experts(model):
                model(input_ids=windows, use_cache=False)
            for hook in hooks:
                hook.remove()
            for name in stage:
                if not moments[name].tokens:
                    continue  # an expert without tokens stays dense
                result = prune_layer(
                    layers[name].weight,
                    moments[name],
                    sparsity=Unstructured(0.5),
                    ordering=Ordering.rose(),
                    block_size=16,
                )
                layers[name].set_weight(result.weight)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loop_equals_running_the_whole_model_for_each_block(family, sequential):
    pruned, slow = build(family).double(), build(family).double()  # float64: masks do not depend on rounding
    windows = tokens()
    reports = prune_model(pruned, windows, plan(true_sequential=sequential))
    prune_slowly(slow, windows, sequential)
    layers = zip(all_linear_layers(find_blocks(pruned)), all_linear_layers(find_blocks(slow)), strict=True)
    for layer, expected in layers:
        torch.testing.assert_close(layer.weight, expected.weight, rtol=1e-6, atol=1e-8, msg=layer.name)
        assert torch.equal(layer.weight == 0, expected.weight == 0), layer.name
    assert sorted(report.name for report in reports) == sorted(layer.name for layer in all_linear_layers(find_blocks(pruned)))
    assert {report.tokens for report in reports if ".experts." not in report.name} == {windows.numel()}
    assert all(0.49 <= report.sparsity <= 0.5 for report in reports if not report.fallback)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_calls_reproduce_the_model(family):
    """Running the blocks with their captured arguments gives the hidden states of the model's forward pass."""
    model, windows = build(family), tokens(2)
    blocks = find_blocks(model)
    hidden, calls = trace(model, blocks, windows, probe(model, blocks, windows))
    seen = []
    hook = blocks.blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
        hook.remove()
        for block, call in zip(blocks.blocks, calls, strict=True):
            hidden = call.run(block, hidden)
    assert torch.equal(hidden, seen[0])


@pytest.mark.parametrize("family", sorted(SHARED_INPUTS))
def test_layers_with_the_same_input_share_their_moments(family):
    model = build(family)
    found = probe(model, find_blocks(model), tokens(1))
    assert [[name.rsplit(".", 1)[1] for name in group] for group in found.layers[0]] == SHARED_INPUTS[family]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_prunes_the_linear_layers_only(method):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    reports = {report.name: report for report in prune_model(model, tokens(), plan(method=METHODS[method](), ordering=None))}
    for name, value in model.state_dict().items():
        if "_proj" in name:
            report = reports[name.removesuffix(".weight")]
            zeros = float((value == 0).float().mean())
            assert 0.45 <= report.sparsity <= (0.56 if report.rank else 0.5), name  # ranks are integers
            assert zeros == (0 if report.rank else pytest.approx(report.sparsity)), name
        else:
            assert torch.equal(value, before[name]), name


def test_batch_size_does_not_change_the_masks():
    masks = []
    for batch in (1, 2, 5):
        model = build("llama")
        prune_model(model, tokens(), plan(batch=batch))
        masks.append([layer.weight == 0 for layer in all_linear_layers(find_blocks(model))])
    for other in masks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[0], other, strict=True))


def test_layers_and_their_methods_are_selected_by_pattern():
    model = build("llama")
    reports = prune_model(model, tokens(), plan(layers=["*.self_attn.*"], skip=["*.1.*"]))
    assert {report.name for report in reports} == {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 2) for name in "qkvo"}
    zeros = {layer.name: float((layer.weight == 0).float().mean()) for layer in all_linear_layers(find_blocks(model))}
    assert all((share > 0.4) == any(r.name == name for r in reports) for name, share in zeros.items())

    own = plan(method=SparseGPT(), methods={"*.mlp.*": Wanda()})
    assert own.method_for("model.layers.0.mlp.up_proj") == Wanda()
    assert own.method_for("model.layers.0.self_attn.q_proj") == SparseGPT()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": ["*.selfattn.*"]},
            r"pipeline.layers: expected a pattern .* got '\*.selfattn.\*', which matches none",
        ),
        ({"skip": ["*.mpl.*"]}, r"pipeline.skip: expected a pattern"),
        ({"skip": ["*.0.*"], "study": ["*.0.*.o_proj"]}, r"figures.study: expected a pattern"),
        ({"skip": ["*"]}, "expected at least one layer to prune, got none"),
        (
            {"blocks": "model.layer"},
            "model.blocks: expected one of model.layers, got 'model.layer'; did you mean 'model.layers'",
        ),
    ],
)
def test_plans_that_do_not_match_the_model_raise_before_pruning(options, message):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RoseExpError, match=message):
        prune_model(model, tokens(), plan(**options))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_large_tensors_in_an_unknown_layout_are_not_silently_left_dense():
    model = build("llama")
    model.model.layers[0].mlp.experts = nn.Parameter(torch.zeros(2, 40, 40))
    with pytest.raises(RoseExpError, match=r"model.layers.0.mlp.experts holds \d+% of its block's weights and is neither a"):
        prune_model(model, tokens(), plan())
    assert prune_model(model, tokens(), plan(skip=["*.experts"]))


def test_small_tensors_in_an_unknown_layout_stay_dense_with_a_warning():
    model, warnings = build("llama"), []
    model.model.layers[0].mlp.experts = nn.Parameter(torch.ones(2, 4, 4))
    prune_model(model, tokens(), plan(), PruneContext(on_warning=lambda *warning: warnings.append(warning)))
    ((kind, detail),) = warnings
    assert kind == "left_dense"
    assert detail.startswith("model.layers.0.mlp.experts: ")
    assert bool((model.model.layers[0].mlp.experts == 1).all())


def test_nan_weights_raise_an_error_that_names_the_block():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(RoseExpError, match="model.layers.1: expected finite dense outputs, got NaN or infinity"):
        prune_model(model, tokens(), plan())
