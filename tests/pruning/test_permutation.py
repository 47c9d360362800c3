"""Channel permutation: it is applied where possible, preserves the outputs of the model and reduces the error."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import (
    CrossMoments,
    InputMoments,
    Magnitude,
    Refine,
    SemiStructured,
    SparseGPT,
    Target,
    Unstructured,
    prune_layer,
)
from rose_exp.models import all_linear_layers, find_blocks
from rose_exp.pruning import PruneContext, PruningPlan, RunState, prune_model
from rose_exp.pruning import permutation as channels
from rose_exp.pruning.capture import probe
from rose_exp.runtime import signals as interruption
from rose_exp.runtime.signals import Interrupted

from ..models.families import build, tokens, with_biases
from .test_state import FINGERPRINT, assert_equal, stopping_after, untimed

FREE = {  # layers whose input channels can be permuted, with the layers that produce them
    "llama": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "qwen2": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "qwen3": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "gemma2": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "opt": {"self_attn.out_proj": ["v_proj"], "fc2": ["fc1"]},
    "gpt2": {"mlp.c_proj": ["c_fc"]},  # queries, keys and values are one layer
    "phi": {"self_attn.dense": ["v_proj"], "mlp.fc2": ["fc1"]},
    "gpt_neox": {"mlp.dense_4h_to_h": ["dense_h_to_4h"]},
    "mixtral": {"self_attn.o_proj": ["v_proj"]},  # experts are not permuted
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FREE))
def test_layers_with_permutable_channels_are_found(family, dtype):
    model = build(family).to(dtype)
    blocks = find_blocks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, blocks, tokens(), channels=True).channels
    for index, of_block in enumerate(found):
        name = blocks.block_name(index)
        makers = {c.layer.removeprefix(f"{name}."): [maker.split(".")[-1] for maker in c.makers] for c in of_block}
        assert makers == FREE[family]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Odd(torch.nn.Module):
    """A block whose channels may not be permutable: a second layer reads the output of ``up``, or a norm lies in between."""

    def __init__(self, second_consumer: bool, norm: bool):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.other = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8), torch.nn.Linear(12, 8)
        self.norm = torch.nn.RMSNorm(12) if norm else torch.nn.Identity()
        if norm:
            self.norm.weight.data += 0.01 * torch.randn(12)  # almost, but not exactly, equal for all channels
        self.second_consumer = second_consumer

    def forward(self, hidden):
        made = torch.relu(self.up(hidden))
        answer = hidden + self.down(self.norm(made))
        return answer + self.other(made.cumsum(dim=-1)) if self.second_consumer else answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("odd", "expected"), [((False, False), ["b.down"]), ((True, False), []), ((False, True), [])], ids=["plain", "two", "norm"]
)
def test_other_consumers_of_the_channels_prevent_permutation(odd, expected, dtype):
    block = Odd(*odd).to(dtype)
    found = channels.find_channels(block, block, "b", torch.randn(2, 5, 8, dtype=dtype))
    assert [of_layer.layer for of_layer in found if of_layer.makers == ("b.up",)] == expected


def shuffled(scores, _sparsity):
    return torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(len(scores)))


@pytest.mark.parametrize("family", sorted(FREE))
def test_permutation_preserves_the_outputs_of_the_model(family, monkeypatch):
    """Nothing is pruned, and all permutable channels are shuffled."""
    monkeypatch.setattr(channels, "channel_order", shuffled)
    dtype = torch.float32 if family == "mixtral" else torch.float64  # its experts only run in float32
    model, dense = (with_biases(build(family).to(dtype)) for _ in range(2))
    reports = prune_model(model, tokens(), PruningPlan(Magnitude(), SemiStructured(0, 1), batch=2, permute=True))
    names = [find_blocks(model).block_name(index) for index in range(3)]
    expected = {f"{name}.{layer}" for name in names for layer in FREE[family]}
    assert {report.name for report in reports if report.permuted} == expected
    with torch.no_grad():
        near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(model(input_ids=tokens()).logits, dense(input_ids=tokens()).logits, **near)
    others = dict(dense.named_parameters())
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, others[name])}
    touched = {*FREE[family], *(maker for makers in FREE[family].values() for maker in makers)}
    assert {name.rsplit(".", 1)[0].split(".")[-1] for name in moved} == {name.split(".")[-1] for name in touched}


@pytest.mark.parametrize("target", [None, Target(0.6, 0.0)])
def test_permuted_layer_is_pruned_with_permuted_inputs(target):
    """Checks the last layer of the second block, whose inputs have drifted, against inputs from whole models."""
    model, dense, fed = (build("llama").double() for _ in range(3))
    pattern, skip = SemiStructured(2, 4), ["*.gate_proj", "*.up_proj"]  # dense layers reveal the order
    plan = PruningPlan(SparseGPT(), pattern, batch=2, permute=True, skip=skip, target=target)
    reports = {report.name: report for report in prune_model(model, tokens(), plan)}
    fed.model.layers[0] = model.model.layers[0]  # calibration runs the dense second block after the pruned first block
    inputs = []
    for each in (fed, dense):
        each.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            each(input_ids=tokens(), use_cache=False)
    (x, full), mlp, before = inputs, model.model.layers[1].mlp, dense.model.layers[1].mlp
    weight = before.down_proj.weight.detach()
    order = channels.channel_order(weight.square() * x.square().mean(dim=0), pattern)
    assert not torch.equal(order, torch.arange(len(order)))
    assert torch.equal(mlp.gate_proj.weight, before.gate_proj.weight[order])
    moments, cross_moments = InputMoments(len(order), dtype=torch.float64), CrossMoments(len(order), dtype=torch.float64)
    moments.update(x[:, order])
    cross_moments.update(x[:, order], full[:, order])
    expected = prune_layer(
        weight[:, order], moments, sparsity=pattern, target=target, cross_moments=cross_moments if target else None
    )
    torch.testing.assert_close(mlp.down_proj.weight, expected.weight, rtol=1e-6, atol=1e-9)
    report = reports["model.layers.1.mlp.down_proj"]
    lost = (x @ weight.T - x[:, order] @ mlp.down_proj.weight.T).square().sum() / (x @ weight.T).square().sum()
    assert report.permuted
    assert report.error == pytest.approx(lost.item(), rel=1e-6)


def test_kv_heads_are_permuted_by_the_scores_of_all_their_query_heads():
    model, dense = build("llama"), build("llama")
    reports = prune_model(
        model, tokens(), PruningPlan(Magnitude(), SemiStructured(2, 4), batch=2, permute=True, skip=["*.v_proj"])
    )
    seen = []
    first, before = model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    before.o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(input_ids=tokens(), use_cache=False)
    worth = before.o_proj.weight.square() * seen[0].square().mean(dim=0)
    rows = []
    for head in range(2):  # of keys and values, with eight channels each, shared by two query heads
        scores = torch.cat([worth[:, start : start + 8] for start in (16 * head, 16 * head + 8)])
        rows.append(8 * head + channels.channel_order(scores.detach(), SemiStructured(2, 4)))
    assert torch.equal(first.v_proj.weight, before.v_proj.weight[torch.cat(rows)])
    assert next(report for report in reports if report.name.endswith("0.self_attn.o_proj")).permuted


@pytest.mark.parametrize("sequential", [False, True])
def test_permutation_reduces_the_error_and_keeps_the_pattern(sequential):
    options = {"batch": 2, "true_sequential": sequential}
    lost = {}
    for permute in (False, True):
        model = build("llama")
        plan = PruningPlan(Magnitude(), SemiStructured(2, 4), permute=permute, **options)
        reports = prune_model(model, tokens(), plan)
        lost[permute] = {report.name: report.error for report in reports}
        assert any(report.permuted for report in reports) == permute
        for layer in all_linear_layers(find_blocks(model)):
            assert ((layer.weight.unflatten(1, (-1, 4)) == 0).sum(dim=2) == 2).all()
    first = [name for name in lost[True] if ".0." in name and ("down_proj" in name or "o_proj" in name)]
    assert sum(lost[True][name] for name in first) < 0.95 * sum(lost[False][name] for name in first)


def test_heads_that_share_a_group_are_not_permuted():
    """Heads have eight channels and groups twelve; the 52 channels of the MLP form four groups and a remainder."""
    reports = prune_model(build("llama"), tokens(), PruningPlan(Magnitude(), SemiStructured(6, 12), batch=2, permute=True))
    assert {report.name.split(".")[-1] for report in reports if report.permuted} == {"down_proj"}


def test_unstructured_sparsity_permutes_no_channels():
    reports = prune_model(build("llama"), tokens(), PruningPlan(Magnitude(), Unstructured(0.5), batch=2, permute=True))
    assert not any(report.permuted for report in reports)


@pytest.mark.parametrize("skip", [(), ("*.v_proj", "*.up_proj")])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_resuming_with_permutation_gives_identical_weights(tmp_path, family, sequential, skip, monkeypatch):
    """Interrupts after each group of layers; permuted biases and dense layers are restored as well."""

    def prune(folder):
        model = with_biases(build(family))
        options = {
            "refine": Refine(2, mask_iterations=2),
            "target": Target(0.5, 0.5),
            "skip": skip if family == "qwen2" else (),
        }
        plan = PruningPlan(SparseGPT(), SemiStructured(2, 4), batch=2, permute=True, true_sequential=sequential, **options)
        reports = prune_model(model, tokens(), plan, PruneContext(state=RunState(folder, FINGERPRINT, "recompute")))
        return {name: value.clone() for name, value in model.state_dict().items()}, untimed(reports)

    expected = prune(tmp_path / "whole")
    assert any(report["permuted"] for report in expected[1])
    for stop_at in range(1, 6):
        stopping_after(stop_at, monkeypatch)
        with pytest.raises(Interrupted):
            prune(tmp_path / f"{stop_at}")
        interruption._stop.signal = None
        assert_equal(prune(tmp_path / f"{stop_at}"), expected)
