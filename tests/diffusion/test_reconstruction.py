"""Block reconstruction trains the kept weights of a denoiser's blocks towards the dense denoiser, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_flatten

from rose_exp.diffusion import noise_seeds
from rose_exp.diffusion.reconstruction import CALLS, DenoiserReconstruction, blocks_of, kept_steps
from rose_exp.engine import Ordering, SemiStructured, SparseGPT, Unstructured, Wanda
from rose_exp.engine.groups import Structured
from rose_exp.pruning import RunState
from rose_exp.runtime import signals as interruption
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.signals import Interrupted
from rose_exp.settings.reconstruction import Reconstruction

from .pipelines import NAMES, PROMPTS, STEPS, pruner_of, sampler, units_of

OPTIONS = Reconstruction(4, "together", rate=1e-3, batch=1)
SLOW = ("sd", "sdxl")


def latents(pruner) -> torch.Tensor:
    with torch.no_grad():
        found = pruner.sampler.run(PROMPTS, noise_seeds(7, len(PROMPTS)), "latents", decode=False)
        return torch.cat([batch for _, batch in found])


def distance(pruner, dense: torch.Tensor) -> float:
    return float((latents(pruner) - dense).square().mean())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NAMES])
def test_kept_weights_move_towards_the_dense_denoiser(name):
    """Masks of the first package stay as they are, and everything outside the blocks stays bitwise equal."""
    dense = {key: p.clone() for key, p in sampler(name).denoiser.named_parameters()}
    options = {"method": Wanda(), "sparsity": Unstructured(0.6)}
    alone, trained = pruner_of(name, **options), pruner_of(name, reconstruction=OPTIONS, **options)
    alone.run()
    reports = trained.run()
    ratios = trained.reconstruction.ratios
    assert ratios.keys() == trained.reconstruction.blocks.keys()
    assert all(0 < ratio <= 1 for ratio in ratios.values())
    assert min(ratios.values()) < 0.95
    assert {report.reconstruction for report in reports} - {None} <= set(ratios.values())
    first = {layer for unit in trained.packages[0] for layer in unit.names}
    for layer in first:
        assert torch.equal(alone.layers[layer].weight == 0, trained.layers[layer].weight == 0), layer
    inside = tuple(f"{block}." for block in trained.reconstruction.blocks)
    for key, parameter in trained.sampler.denoiser.named_parameters():
        pruned = any(key.startswith(f"{layer}.") for layer in trained.layers)
        assert key.startswith(inside) or pruned or torch.equal(parameter, dense[key]), key


@pytest.mark.parametrize(
    ("name", "sparsity", "rate"),
    [("sd3", Structured(0.5), 1e-4), ("sd3", SemiStructured(2, 4), 1e-3), ("flux", Unstructured(0.7), 1e-3)],
)
def test_latents_are_closer_to_those_of_the_dense_denoiser(name, sparsity, rate):
    dense = latents(pruner_of(name))
    options = {"sparsity": sparsity} | ({} if isinstance(sparsity, Structured) else {"ordering": Ordering.rose()})
    alone, trained = pruner_of(name, **options), pruner_of(name, reconstruction=replace(OPTIONS, rate=rate), **options)
    alone.run()
    trained.run()
    assert distance(trained, dense) < distance(alone, dense)
    zeros = [sum(int((layer.weight == 0).sum()) for layer in pruner.layers.values()) for pruner in (alone, trained)]
    assert zeros[0] == zeros[1]


def test_blocks_are_trained_on_inputs_of_the_pruned_and_targets_of_the_dense_denoiser(monkeypatch):
    """The weights of the calls are those of their steps, and later blocks see inputs that differ from the dense ones."""
    dense = sampler("sd3").denoiser
    differs = {}
    original = DenoiserReconstruction._inputs_and_targets

    def checked(self, name):
        inputs, targets = original(self, name)
        differs[name] = False
        for place, call in enumerate(self.calls.calls):
            arguments, _ = seen(self.denoiser, name, call)
            dense_arguments, outputs = seen(dense, name, call)
            assert_equal(arguments, tensors((inputs.calls[place].args, inputs.calls[place].kwargs)))
            assert_equal(outputs, targets[place])
            differs[name] |= any(not torch.equal(a, b) for a, b in zip(arguments, dense_arguments, strict=True))
        batches = len(inputs.pieces)
        steps = [step for batch in range(batches) for step in kept_steps(batch, STEPS)]
        assert inputs.weights == [self.pruner.weights(step, STEPS) for step in steps]
        assert batches == len(PROMPTS)
        assert [place for piece in inputs.pieces for place in range(piece.start, piece.stop)] == list(range(len(inputs.calls)))
        return inputs, targets

    monkeypatch.setattr(DenoiserReconstruction, "_inputs_and_targets", checked)
    pruner = pruner_of("sd3", reconstruction=OPTIONS)
    pruner.run()
    assert list(differs) == list(pruner.reconstruction.blocks)
    assert list(differs.values()) == [False] + [True] * (len(differs) - 1)


def tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def seen(denoiser, name: str, call) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the arguments and outputs of a block while the denoiser runs ``call``."""
    found = []

    def hook(_module, args, kwargs, output):
        found.extend([tensors((args, kwargs)), tensors(output)])

    handle = denoiser.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        denoiser(*call.args, **call.kwargs)
    handle.remove()
    return found[0], found[1]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_blocks_that_are_not_pruned_are_not_trained():
    pruner = pruner_of("sd3", method=SparseGPT(), sparsity=Unstructured(0.0), reconstruction=OPTIONS)
    before = {key: p.clone() for key, p in pruner.sampler.denoiser.named_parameters()}
    reports = pruner.run()
    assert {report.reconstruction for report in reports} == {None}
    for key, parameter in pruner.sampler.denoiser.named_parameters():
        torch.testing.assert_close(parameter, before[key], rtol=1e-5, atol=1e-6)


def test_resuming_gives_identical_weights(tmp_path, monkeypatch):
    options = {"count": 3, "reconstruction": replace(OPTIONS, epochs=1)}
    whole = pruner_of("sd3", **options)
    expected = whole.run()
    state = RunState(tmp_path, {"code": "a"}, "recompute")
    real = interruption.check

    def check() -> None:
        if state.progress.blocks == 2:
            raise Interrupted("stop")
        real()

    monkeypatch.setattr(interruption, "check", check)
    with pytest.raises(Interrupted):
        pruner_of("sd3", state=state, **options).run()
    monkeypatch.setattr(interruption, "check", real)
    again = pruner_of("sd3", state=RunState(tmp_path, {"code": "a"}, "recompute"), **options)
    reports = again.run()
    assert [replace(report, seconds=0.0) for report in reports] == [replace(report, seconds=0.0) for report in expected]
    for key, parameter in again.sampler.denoiser.named_parameters():
        assert torch.equal(parameter, dict(whole.sampler.denoiser.named_parameters())[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_an_element_of_a_list_with_its_layers(name):
    names = [layer for unit in units_of(name) for layer in unit.names]
    blocks = blocks_of(sampler(name).denoiser, names)
    assert all(layer.startswith(f"{block}.") for block, layers in blocks.items() for layer in layers)
    assert all(block.rpartition(".")[2].isdigit() and len(layers) > 1 for block, layers in blocks.items())
    left = set(names) - {layer for layers in blocks.values() for layer in layers}
    assert not left or name == "ddpm"


@pytest.mark.parametrize("steps", [1, 2, 5, 25, 50])
def test_kept_steps_cover_all_steps_evenly(steps):
    counts = torch.zeros(steps)
    for batch in range(100):
        kept = kept_steps(batch, steps)
        assert len(set(kept)) == len(kept) == min(CALLS, steps)
        assert max(kept) < steps
        counts[kept] += 1
    assert counts.max() - counts.min() <= 0.2 * counts.mean() + 2


def test_a_single_batch_of_prompts_is_rejected():
    pruner = pruner_of("sd3", reconstruction=OPTIONS)
    pruner.prompts, pruner.seeds = pruner.prompts[:1], pruner.seeds[:1]
    with pytest.raises(RoseExpError, match=r"calibration.samples: expected at least two batches .* got 1"):
        pruner.run()
