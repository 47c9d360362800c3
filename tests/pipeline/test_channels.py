"""Input channels in another order: which layers have them, that the model stays the model, and that less is lost."""

from __future__ import annotations

import pytest
import torch

from rose_exp import interruption
from rose_exp.engine import Magnitude, Refine, SemiStructured, SparseGPT, Target, Unstructured
from rose_exp.interruption import Interrupted
from rose_exp.models import all_linear_layers, find_blocks
from rose_exp.pipeline import PruningPlan, RunState, channels, prune_model
from rose_exp.pipeline.capture import probe

from ..models.families import build, tokens
from .test_state import FINGERPRINT, assert_equal, stopping_after, untimed

FREE = {  # layers whose input channels are free, of each family the layers that make them
    "llama": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "qwen2": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "qwen3": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "gemma2": {"self_attn.o_proj": ["v_proj"], "mlp.down_proj": ["gate_proj", "up_proj"]},
    "opt": {"self_attn.out_proj": ["v_proj"], "fc2": ["fc1"]},
    "gpt2": {"mlp.c_proj": ["c_fc"]},  # queries, keys and values are one layer
    "phi": {"self_attn.dense": ["v_proj"], "mlp.fc2": ["fc1"]},
    "gpt_neox": {"mlp.dense_4h_to_h": ["dense_h_to_4h"]},
    "mixtral": {"self_attn.o_proj": ["v_proj"]},  # experts are left alone
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FREE))
def test_layers_with_free_channels_are_found(family, dtype):
    model = build(family).to(dtype)
    blocks = find_blocks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, blocks, tokens(), channels=True).channels
    for index, of_block in enumerate(found):
        name = blocks.block_name(index)
        told = {c.layer.removeprefix(f"{name}."): [maker.split(".")[-1] for maker in c.makers] for c in of_block}
        assert told == FREE[family]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Odd(torch.nn.Module):
    """A block of which only a part can be put in another order: two layers see what ``up`` makes, or a norm stands between."""

    def __init__(self, second_consumer: bool, norm: bool):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.other = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8), torch.nn.Linear(12, 8)
        self.norm = torch.nn.RMSNorm(12) if norm else torch.nn.Identity()
        if norm:
            self.norm.weight.data += 0.01 * torch.randn(12)  # nearly, but not, the same for all channels
        self.second_consumer = second_consumer

    def forward(self, hidden):
        made = torch.relu(self.up(hidden))
        answer = hidden + self.down(self.norm(made))
        return answer + self.other(made.cumsum(dim=-1)) if self.second_consumer else answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("odd", "expected"), [((False, False), ["b.down"]), ((True, False), []), ((False, True), [])], ids=["plain", "two", "norm"]
)
def test_what_else_sees_the_channels_holds_them(odd, expected, dtype):
    block = Odd(*odd).to(dtype)
    found = channels.find_channels(block, block, "b", torch.randn(2, 5, 8, dtype=dtype))
    assert [of_layer.layer for of_layer in found if of_layer.makers == ("b.up",)] == expected


def shuffled(scores, _sparsity):
    return torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(len(scores)))


@pytest.mark.parametrize("family", sorted(FREE))
def test_the_model_answers_as_before(family, monkeypatch):
    """With nothing pruned, and every free channel in some other place."""
    monkeypatch.setattr(channels, "channel_order", shuffled)
    dtype = torch.float32 if family == "mixtral" else torch.float64  # whose experts are multiplied in single precision only
    model, dense = build(family).to(dtype), build(family).to(dtype)
    with torch.no_grad():
        for each in (model, dense):
            torch.manual_seed(0)
            for name, value in each.named_parameters():
                if name.endswith("bias"):
                    value.normal_()
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


@pytest.mark.parametrize("target", [None, Target(0.6, 0.4)])
def test_what_is_told_of_a_layer_is_true_of_its_outputs(target):
    """Of the last layer of the second block, whose inputs drift: its error, reckoned from outputs of the whole models."""
    model, dense = build("llama").double(), build("llama").double()
    skip = ["*.gate_proj", "*.up_proj"]  # so that the order can be read off them
    plan = PruningPlan(SparseGPT(), SemiStructured(2, 4), batch=2, permute=True, skip=skip, target=target)
    reports = {report.name: report for report in prune_model(model, tokens(), plan)}
    name = "model.layers.1.mlp.down_proj"
    assert reports[name].permuted
    mlp, before = (each.model.layers[1].mlp for each in (model, dense))
    distances = torch.cdist(mlp.gate_proj.weight, before.gate_proj.weight)
    order = distances.argmin(dim=1)
    assert distances.amin(dim=1).max() < 1e-6
    # the inputs that calibration has seen: of the second block as it was, after the first as it is
    seen = []
    probed = build("llama").double()
    probed.model.layers[0] = model.model.layers[0]
    probed.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        probed(input_ids=tokens(), use_cache=False)
        x, weight = seen[0].flatten(0, 1), before.down_proj.weight
        lost = (x @ weight.T - x[:, order] @ mlp.down_proj.weight.T).square().sum() / (x @ weight.T).square().sum()
    assert reports[name].error == pytest.approx(float(lost), rel=1e-6)
    expected = "hidden_states" if target else "dense"
    assert reports[name].target == expected


@pytest.mark.parametrize("sequential", [False, True])
def test_less_is_lost_and_the_pattern_holds(sequential):
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


def test_heads_that_share_a_group_keep_their_order():
    """Heads of eight channels, groups of twelve; the MLP's 52 channels are four whole groups and a rest."""
    reports = prune_model(build("llama"), tokens(), PruningPlan(Magnitude(), SemiStructured(6, 12), batch=2, permute=True))
    assert {report.name.split(".")[-1] for report in reports if report.permuted} == {"down_proj"}


def test_an_unstructured_pattern_has_no_use_for_it():
    reports = prune_model(build("llama"), tokens(), PruningPlan(Magnitude(), Unstructured(0.5), batch=2, permute=True))
    assert not any(report.permuted for report in reports)


@pytest.mark.parametrize("skip", [(), ("*.v_proj", "*.up_proj")])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_run_that_is_told_to_stop_goes_on(tmp_path, family, sequential, skip, monkeypatch):
    """After any group of layers: those that make a layer's inputs are where it is, biases and dense ones, too."""

    def prune(folder):
        model = build(family)
        with torch.no_grad():
            torch.manual_seed(0)
            for name, value in model.named_parameters():
                if name.endswith("bias"):
                    value.normal_()
        options = {"refine": Refine(2, mask_iterations=2), "target": Target(), "skip": skip if family == "qwen2" else ()}
        plan = PruningPlan(SparseGPT(), SemiStructured(2, 4), batch=2, permute=True, true_sequential=sequential, **options)
        reports = prune_model(model, tokens(), plan, state=RunState(folder, FINGERPRINT, "recompute"))
        return {name: value.clone() for name, value in model.state_dict().items()}, untimed(reports)

    expected = prune(tmp_path / "whole")
    assert any(report["permuted"] for report in expected[1])
    for stop_at in range(1, 6):
        stopping_after(stop_at, monkeypatch)
        with pytest.raises(Interrupted):
            prune(tmp_path / f"{stop_at}")
        interruption._stop.signal = None
        assert_equal(prune(tmp_path / f"{stop_at}"), expected)
