"""Stacked experts: each expert is pruned as a separate layer with the moments of its own tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rose_exp.engine import Magnitude, SemiStructured, SparseGPT, Unstructured
from rose_exp.models import find_blocks, linear_layers, projections, unstacked_experts
from rose_exp.pruning import PruningPlan, events, prune_model
from rose_exp.runtime.errors import RoseExpError

from .families import MIXTURES, build, tokens


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if projections(module)}


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_experts_are_found_and_routers_are_skipped(family):
    model = build(family)
    blocks = find_blocks(model)
    names = [layer.name for layer in linear_layers(blocks.blocks[0], blocks.block_name(0))]
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 4 * 3
    assert experts[:3] == [f"model.layers.0.mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")]
    assert not any(name.endswith((".gate", "shared_expert_gate")) for name in names)
    if family == "qwen2_moe":
        assert "model.layers.0.mlp.shared_expert.up_proj" in names
    for layer in linear_layers(blocks.blocks[0], blocks.block_name(0)):
        if layer.of_expert:
            before = layer.weight.clone()
            layer.set_weight(before * 2)
            assert torch.equal(layer.weight, before * 2)


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_unstacked_experts_give_the_same_logits(family):
    model = build(family).double()
    model.config._experts_implementation = "eager"  # grouped matmul does not support float64
    with torch.no_grad():
        expected = model(tokens()).logits
        with unstacked_experts(model):
            torch.testing.assert_close(model(tokens()).logits, expected)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize("sparsity", [Unstructured(0.5), SemiStructured(2, 4)])
def test_every_expert_reaches_the_target_sparsity_and_routers_are_unchanged(family, sparsity):
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports = prune_model(model, tokens(24), PruningPlan(method=Magnitude(), sparsity=sparsity, starved_experts="magnitude"))
    for module in stacks(model).values():
        for parts in projections(module):
            for name, layer in parts.items():
                zeros, total = int((layer.weight == 0).sum()), layer.weight.numel()
                assert zeros == total // 2, name
    for name, value in model.state_dict().items():
        if "experts" not in name and "_proj" not in name:
            assert torch.equal(value, before[name]), name
    of_experts = [report for report in reports if ".experts." in report.name]
    assert len(of_experts) == 3 * 4 * 3
    top = model.config.num_experts_per_tok
    assert sum(r.tokens for r in of_experts if r.name.endswith("layers.0.mlp.experts.0.up_proj")) < tokens(24).numel()
    for block in range(3):
        seen = [r.tokens for r in of_experts if f".{block}.mlp" in r.name and r.name.endswith("down_proj")]
        assert sum(seen) == tokens(24).numel() * top  # every token is routed to top-k experts


def starved(model: nn.Module) -> None:
    """Starve expert 3 of the second block: the router never selects it."""
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():
        router.weight[3] = 0
        bias = -1e4
    router.register_forward_hook(lambda module, _, output: _without(module, output, bias))


def _without(module: nn.Module, output: tuple, bias: float) -> tuple:
    logits = output[0].clone()
    logits[:, 3] += bias
    shares = torch.softmax(logits.float(), -1)
    weights, chosen = torch.topk(shares, module.top_k, dim=-1)
    return (logits, weights.to(output[1].dtype), chosen)


@pytest.mark.parametrize(("policy", "zeros"), [("dense", 0.0), ("magnitude", 0.5)])
def test_starved_experts_follow_the_configured_policy(policy, zeros):
    model = build("mixtral")
    starved(model)
    plan = PruningPlan(method=SparseGPT(), sparsity=Unstructured(0.5), block_size=16, starved_experts=policy)
    reports = {report.name: report for report in prune_model(model, tokens(24), plan)}
    for part in ("gate_proj", "up_proj", "down_proj"):
        report = reports[f"model.layers.1.mlp.experts.3.{part}"]
        assert (report.tokens, report.fallback) == (0, policy)
        assert report.sparsity == pytest.approx(zeros, abs=0.01)
        assert events(report, 0.01)[0]["kind"] == "starved_expert"
    assert [r.name for r in reports.values() if r.fallback] == [n for n in reports if "layers.1.mlp.experts.3." in n]


def test_starved_experts_raise_an_error_with_the_stop_policy():
    model = build("mixtral")
    starved(model)
    plan = PruningPlan(method=SparseGPT(), sparsity=Unstructured(0.5), block_size=16, starved_experts="stop")
    with pytest.raises(RoseExpError, match=r"layers.1.mlp.experts.3.gate_proj.*expected at least 1 .* for the expert .*got 0"):
        prune_model(model, tokens(24), plan)


class _Listed(nn.Module):
    """Experts in a module list, each called only on the tokens routed to it."""

    def __init__(self, width: int = 16, experts: int = 8):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 24), "gate_": nn.Linear(width, 24), "down": nn.Linear(24, width)})
            for _ in range(experts)
        )

    def forward(self, hidden, **_):
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen, output = self.gate(flat).argmax(-1), flat.clone()
        for index, expert in enumerate(self.experts):
            rows = torch.where(chosen == index)[0]
            if len(rows):
                inputs = flat[rows]
                output[rows] += expert["down"](torch.relu(expert["up"](inputs)) * expert["gate_"](inputs))
        return output.view_as(hidden)


class _ListedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(_Listed() for _ in range(2))

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_listed_experts_that_the_probe_does_not_reach_are_pruned():
    model = _ListedModel()
    windows = torch.randint(0, 64, (16, 32))
    windows[0, :8] = 5  # the probe sees a single token and therefore a single expert
    gates = [layer.gate.weight.clone() for layer in model.layers]
    reports = prune_model(model, windows, PruningPlan(method=SparseGPT(), sparsity=Unstructured(0.5), block_size=8))
    assert len(reports) == 2 * 8 * 3
    assert {r.sparsity for r in reports if not r.fallback} == {0.5}
    assert all(torch.equal(layer.gate.weight, gate) for layer, gate in zip(model.layers, gates, strict=True))
    for block in range(2):
        seen = {r.name: r.tokens for r in reports if f"layers.{block}." in r.name}
        assert sum(count for name, count in seen.items() if name.endswith("down")) == windows.numel()
        assert all(seen[name] == seen[name.replace(".up", ".gate_")] for name in seen if name.endswith(".up"))
