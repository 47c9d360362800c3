"""Solving layers by a plan: every part of it reaches the engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rose_exp.engine import InputMoments, Ordering, Refine, SparseGPT, Unstructured, Wanda, prune_layers
from rose_exp.errors import RoseExpError
from rose_exp.models import LinearLayer
from rose_exp.pipeline import PruningPlan

from ..engine.cases import layer, moments_of

OPTIONS = {
    "refine": Refine(4),
    "damping": 0.3,
    "ordering": Ordering("descending", "descending", threshold=None),
    "block_size": 5,
    "backend": "torch",
}


def made() -> tuple[list[LinearLayer], InputMoments]:
    torch.manual_seed(5)
    weight, inputs = layer(6, 16, columnar=True)
    layers = [LinearLayer(f"block.{name}", nn.Linear(16, 6, bias=False)) for name in ("q_proj", "k_proj")]
    for number, of in enumerate(layers):
        of.set_weight(weight * (1 + number) + number * torch.randn_like(weight))
    return layers, moments_of(inputs)


def solved(**options) -> list[torch.Tensor]:
    layers, moments = made()
    by_magnitude = options.pop("by_magnitude", False)
    results = PruningPlan(SparseGPT(), Unstructured(0.5), **options).solve(layers, moments, by_magnitude=by_magnitude)
    for of, result in zip(layers, results, strict=True):
        assert torch.equal(of.weight, result.weight)
    return [of.weight.clone() for of in layers]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_the_engines(name):
    layers, moments = made()
    option = {name: OPTIONS[name]}
    expected = prune_layers(
        [of.weight for of in layers], moments, methods=[SparseGPT()] * 2, sparsity=Unstructured(0.5), **({"refine": 0} | option)
    )
    found = solved(**option)
    for weight, result in zip(found, expected, strict=True):
        assert torch.equal(weight, result.weight)
    if name != "backend":  # which decides nothing but near-equals
        assert not torch.equal(found[0], solved()[0])


def test_layers_have_their_own_method_and_share():
    layers, moments = made()
    plan = PruningPlan(SparseGPT(), Unstructured(0.5), methods={"*.k_proj": Wanda()}, shares={"block.q_proj": 0.25})
    plan.solve(layers, moments)
    assert [int((of.weight == 0).sum()) for of in layers] == [24, 48]
    untouched = made()[0][1].weight
    kept = layers[1].weight != 0
    assert torch.equal(layers[1].weight[kept], untouched[kept])  # Wanda updates nothing
    by_magnitude, dense = solved(by_magnitude=True)[0], made()[0][0].weight
    assert dense[by_magnitude == 0].abs().max() <= dense[by_magnitude != 0].abs().min()


def test_what_cannot_be_solved_is_named():
    layers, moments = made()
    layers[1].module.weight.data[0, 0] = float("nan")
    with pytest.raises(RoseExpError, match=r"block\.q_proj, block\.k_proj: weight: expected finite numbers"):
        PruningPlan(SparseGPT(), Unstructured(0.5)).solve(layers, moments)
