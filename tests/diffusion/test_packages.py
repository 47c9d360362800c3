"""Pruning of a denoiser package by package."""

from __future__ import annotations

import pytest
import torch

from rose_exp.diffusion import noise_seeds
from rose_exp.engine import DSnoT, InputMoments, Magnitude, Ordering, SemiStructured, Unstructured, Wanda, prune_layer
from rose_exp.engine.weighting import StepWeighting
from rose_exp.pruning import RunState
from rose_exp.pruning.collect import Clock
from rose_exp.runtime import signals as interruption
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.signals import Interrupted

from .pipelines import NAMES, PROMPTS, STEPS, images, pruner_of, sampler, units_of


def moments_of(of, groups) -> list[InputMoments]:
    return of.collect_moments([[of.layers[name] for name in group] for group in groups], "collecting", Clock("cpu"))


def weights_of(of) -> dict[str, torch.Tensor]:
    return {name: layer.weight.clone() for name, layer in of.layers.items()}


def test_moments_are_weighted_by_step_and_cover_both_guidance_branches():
    of = pruner_of("sd3")
    name = "transformer_blocks.1.attn.to_add_out"
    seen = []
    hook = of.layers[name].module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        (found,) = moments_of(of, [(name,)])
    hook.remove()
    assert len(seen) == len(PROMPTS) * STEPS  # the CPU runs one image at a time
    expected = InputMoments(found.columns)
    for call, inputs in enumerate(seen):
        expected.update(inputs, weight=StepWeighting().weights(STEPS)[call % STEPS])
    torch.testing.assert_close(found.gram, expected.gram)
    assert found.weight == pytest.approx(expected.weight)
    text = seen[0].shape[1]
    assert found.tokens == 2 * len(PROMPTS) * STEPS * text  # with and without the prompt


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_weights_and_images_are_bitwise_equal_for_every_batch_size(name):
    found = []
    for batch in (1, 2, 3):
        of = pruner_of(name, count=2)
        of.sampler.batch = batch
        of.run()
        found.append(({name: layer.weight.clone() for name, layer in of.layers.items()}, images(of.sampler, 3)))
    for weights, pictures in found[1:]:
        assert torch.equal(pictures, found[0][1])
        assert all(torch.equal(weight, found[0][0][name]) for name, weight in weights.items())


def test_first_package_uses_moments_of_the_dense_model():
    of = pruner_of("sd3", count=3)
    group = of.packages[0][0].groups[0]
    dense = of.layers[group[1]].weight.clone()
    with torch.no_grad():
        (moments,) = moments_of(of, [group])
        with of.unit(0) as unit:
            of.prune_unit(unit)
    expected = prune_layer(dense, moments, sparsity=Unstructured(0.5), block_size=16)
    torch.testing.assert_close(of.layers[group[1]].weight, expected.weight)


def test_later_packages_use_moments_of_the_partially_pruned_model():
    of, blind = pruner_of("sd3", count=2), pruner_of("sd3", count=1)
    of.run()
    blind.run()
    first, second = of.packages[0][0].names[0], of.packages[1][-1].names[0]
    torch.testing.assert_close(of.layers[first].weight, blind.layers[first].weight)
    assert not torch.equal(of.layers[second].weight, blind.layers[second].weight)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_pruned_and_reported(name):
    of = pruner_of(name)
    reports = of.run()
    assert {report.name for report in reports} == set(of.layers)
    for report in reports:
        zeros = int((of.layers[report.name].weight == 0).sum())
        assert zeros == pytest.approx(0.5 * report.rows * report.columns, abs=report.columns)
        assert 0 < report.error < 1
    assert len(of.facts) == 2
    for fact, package in zip(of.facts, of.packages, strict=True):
        columns = [of.layers[group[0]].columns for unit in package for group in unit.groups]
        assert fact.moments_bytes == sum(8 * n * n for n in columns)  # one float64 Gram matrix per shared input
        assert fact.calibrating > 0


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), DSnoT()])
def test_baselines_only_mask_weights(method):
    of = pruner_of("sd3", method=method)
    before = weights_of(of)
    of.run()
    for name, layer in of.layers.items():
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], before[name][kept])  # these methods do not update weights
        assert kept.float().mean() == pytest.approx(0.5, abs=0.02)


def test_semi_structured_sparsity_and_reordering():
    of = pruner_of("sd3", sparsity=SemiStructured(2, 4), ordering=Ordering.rose())
    of.run()
    for layer in of.layers.values():
        assert ((layer.weight.unflatten(1, (-1, 4)) == 0).sum(dim=2) == 2).all()
    always = pruner_of("sd3", ordering=Ordering("descending", "descending", threshold=None))
    assert any(report.reordered for report in always.run())


def test_moments_and_images_are_close_for_every_batch_size():
    one, three = pruner_of("sd3", of=sampler("sd3", batch=1)), pruner_of("sd3", of=sampler("sd3", batch=3))
    group = units_of("sd3")[5].groups
    with torch.no_grad():
        first, second = moments_of(one, group), moments_of(three, group)
    for moments, others in zip(first, second, strict=True):
        torch.testing.assert_close(moments.gram, others.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images(one.sampler), images(three.sampler), rtol=1e-4, atol=1e-4)


def test_noise_seeds_are_unique_and_reproducible():
    seeds = noise_seeds(3, 200)
    assert len(set(seeds)) == 200
    assert noise_seeds(3, 50) == seeds[:50]
    assert noise_seeds(4, 50) != seeds[:50]


def test_resuming_an_interrupted_run_gives_identical_weights(tmp_path, monkeypatch):
    whole = pruner_of("sd3", count=3)
    whole.run()
    state = RunState(tmp_path / "state", {"code": "a"}, "recompute")
    stopped = pruner_of("sd3", count=3, state=state)
    first = set(stopped.packages[0][0].names)
    checks = iter(range(10**9))
    real = interruption.check

    def check() -> None:
        if state.progress.blocks == 1 and next(checks) > 2:
            raise Interrupted("stop")
        real()

    monkeypatch.setattr(interruption, "check", check)
    with pytest.raises(Interrupted):
        stopped.run()
    monkeypatch.setattr(interruption, "check", real)
    reported = []
    again = pruner_of(
        "sd3",
        count=3,
        state=RunState(tmp_path / "state", {"code": "a"}, "recompute"),
        on_layer=lambda _number, report: reported.append(report.name),
    )
    reports = again.run()
    assert first <= {report.name for report in reports}
    assert reported == [report.name for report in whole.reports]
    for name, layer in again.layers.items():
        torch.testing.assert_close(layer.weight, whole.layers[name].weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd3", "sd", "ddpm"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_layer_with_non_finite_weights_is_named(name, value):
    of = pruner_of(name)
    layer = units_of(name)[0].names[0]
    of.layers[layer].module.weight.data[0, 0] = float(value)
    with pytest.raises(RoseExpError, match=rf"{layer}.*: expected finite weights, got NaN or infinity"):
        of.run()


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
def test_part_with_non_finite_weights_is_named(part):
    of = sampler("sd3")
    name, parameter = list(getattr(of.pipeline, part).named_parameters())[-1]
    parameter.data.fill_(float("nan"))
    with pytest.raises(RoseExpError, match=rf"{part}\.{name}: expected finite weights, got NaN or infinity"):
        images(of)
