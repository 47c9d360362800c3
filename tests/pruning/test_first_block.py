"""Runs with the same inputs share the moments of the first block; results stay bitwise equal."""

from __future__ import annotations

import torch

from rose_exp.engine import InputMoments, Unstructured
from rose_exp.engine.weighting import StepWeighting
from rose_exp.pruning import FirstBlock, PassSeconds, PruneContext, prune_model

from ..diffusion import pipelines
from ..models.families import build, tokens
from .test_loop import plan


def test_find_returns_copies_for_the_same_key_only():
    moments = InputMoments(4)
    moments.update(torch.randn(10, 4))
    kept = FirstBlock()
    kept.keep("a", [moments], 1.5)
    (found,), seconds = kept.find("a", "cpu")
    assert seconds == 1.5
    assert torch.equal(found.gram, moments.gram)
    found.gram.zero_()
    assert torch.equal(kept.find("a", "cpu")[0][0].gram, moments.gram)  # a run may modify its copy
    assert kept.find("b", "cpu") is None
    assert kept.find(None, "cpu") is None
    kept.keep(None, [found], 0.0)
    assert kept.find("a", "cpu") is not None


def weights_after(
    first_block: FirstBlock | None, windows, ratio=0.5, key="k", **options
) -> tuple[list[torch.Tensor], PassSeconds]:
    model, seconds = build("llama"), PassSeconds()
    chosen = plan(sparsity=Unstructured(ratio), **options)
    prune_model(model, windows, chosen, PruneContext(seconds=seconds, first_block=first_block, first_key=key))
    return [parameter.detach() for parameter in model.parameters()], seconds


def test_shared_moments_give_bitwise_equal_weights():
    shared, windows = FirstBlock(), tokens()
    for ratio in (0.5, 0.7, 0.5):
        with_them, seconds = weights_after(shared, windows, ratio)
        without, _ = weights_after(None, windows, ratio)
        assert all(torch.equal(a, b) for a, b in zip(with_them, without, strict=True))
    assert seconds.shared > 0  # reported, so that times can be compared


def test_shared_moments_skip_the_pass_through_the_first_block(monkeypatch):
    shared, updates = FirstBlock(), []
    real = InputMoments.update
    monkeypatch.setattr(InputMoments, "update", lambda self, *a: updates.append(1) or real(self, *a))
    weights_after(shared, tokens())
    first = len(updates)
    weights_after(shared, tokens())
    assert len(updates) == first + first * 2 // 3  # two of three blocks
    weights_after(shared, tokens(), key="another")
    assert len(updates) == 2 * first + first * 2 // 3


def test_true_sequential_runs_do_not_share_moments():
    shared = FirstBlock()
    weights_after(shared, tokens(), true_sequential=True)
    assert shared.find("k", "cpu") is None


def test_denoisers_do_not_share_the_moments_of_their_first_package():
    """The key does not cover the options of sampling, such as the weights of the steps."""
    shared = FirstBlock()
    context = PruneContext(first_block=shared, first_key="k")
    weights = []
    for weighting in ("log_decrease", "linear_increase"):
        pruner = pipelines.pruner_of("sd3", weights=lambda step, steps, kind=weighting: step_weight(kind, step, steps))
        pruner = type(pruner)(
            pruner.sampler, pruner.layers, pruner.packages, pruner.plan, pruner.prompts, pruner.seeds, pruner.weights, context
        )
        pruner.run()
        weights.append({name: layer.weight.clone() for name, layer in pruner.layers.items()})
    first = pruner.packages[0][0].names
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in first)
    assert shared.find("k", "cpu") is None


def step_weight(weighting: str, step: int, steps: int) -> float:
    return StepWeighting(weighting=weighting).weights(steps)[step]
