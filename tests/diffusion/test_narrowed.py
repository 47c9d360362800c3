"""Structured pruning of denoisers: removal of heads and neurons."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from rose_exp.diffusion import Sampler
from rose_exp.diffusion.loading import save_pipeline
from rose_exp.diffusion.narrowed import NarrowedSD3Transformer2DModel, key_of, remove_masked, widths
from rose_exp.engine import Magnitude, SparseGPT, Structured
from rose_exp.models import find_structures
from rose_exp.pruning.structured import wanted_structures
from rose_exp.runtime.errors import RoseExpError

from .pipelines import NAMES, STEPS, images, pruner_of, sampler


def again(pipeline, of: Sampler) -> Sampler:
    """Return a sampler with the same settings for another pipeline."""
    options = of.options
    size = (options["height"], options["width"]) if "height" in options else None
    length = options.get("max_sequence_length")
    return Sampler(pipeline, steps=STEPS, guidance=options.get("guidance_scale"), size=size, text_length=length, batch=2)


def structured(name: str, ratio: float, **options):
    of = sampler(name)
    how = {key: options.pop(key) for key in ("heads", "neurons", "saliency") if key in options}
    how |= {"neurons": False} if name == "ddpm" else {}  # DDPM has no feed-forward neurons
    return pruner_of(name, sparsity=Structured(ratio, **how), of=of, **options)


def structures_of(pruner) -> list:
    return wanted_structures(pruner.sampler.denoiser, "", pruner.plan)


@pytest.mark.parametrize("name", NAMES)
def test_removing_masked_structures_preserves_images_after_reloading(name, tmp_path):
    of = sampler(name)
    dense = images(of)
    size = sum(parameter.numel() for parameter in of.denoiser.parameters())
    counts = {}
    for structure in find_structures(of.denoiser):
        counts[key_of(structure)] = Structured(0.4).count(structure.groups)
        removed = torch.zeros(structure.groups, dtype=torch.bool)
        removed[torch.randperm(structure.groups)[: counts[key_of(structure)]]] = True
        structure.mask(removed)
    masked = images(of)
    assert not torch.allclose(dense, masked, atol=1e-3)
    remove_masked(of.pipeline, counts)
    torch.testing.assert_close(images(of), masked, rtol=1e-4, atol=1e-4)
    assert sum(parameter.numel() for parameter in of.denoiser.parameters()) < size
    folder = save_pipeline(of.pipeline, tmp_path / "model")
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".ckpt")]
    loaded = DiffusionPipeline.from_pretrained(folder)
    torch.testing.assert_close(images(again(loaded, of)), masked, rtol=1e-4, atol=1e-4)
    assert widths(again(loaded, of).denoiser) == widths(of.denoiser)


def test_narrowing_can_be_repeated(tmp_path):
    of = sampler("sd3")
    for _ in range(2):
        counts = {}
        for structure in find_structures(of.denoiser):
            structure.mask(torch.arange(structure.groups) < 1)
            counts[key_of(structure)] = 1
        remove_masked(of.pipeline, counts)
    assert type(of.denoiser) is NarrowedSD3Transformer2DModel
    expected = images(of)
    loaded = DiffusionPipeline.from_pretrained(save_pipeline(of.pipeline, tmp_path / "model"))
    torch.testing.assert_close(images(again(loaded, of)), expected, rtol=1e-4, atol=1e-4)


def test_removing_more_than_is_masked_raises_an_error():
    of = sampler("sd3")
    (first, *_) = find_structures(of.denoiser)
    with pytest.raises(ValueError, match="expected at least 2 masked heads, got 0"):
        remove_masked(of.pipeline, {key_of(first): 2})
    with pytest.raises(ValueError, match=r"narrowed\.transformer_blocks.*expected 1 to 4, got 9"):
        NarrowedSD3Transformer2DModel(narrowed={key_of(first): 9}, num_attention_heads=4, num_layers=1)


@pytest.mark.parametrize("name", NAMES)
def test_pruning_masks_the_requested_number_of_groups(name):
    of = structured(name, 0.3)
    reports = of.run()
    assert {report.name for report in reports} == {p.layer.name for s in structures_of(of) for p in s.consumers}
    for structure in structures_of(of):
        assert int(structure.masked().sum()) == Structured(0.3).count(structure.groups)
    assert all(report.groups > 0 and 0 <= report.error < 1 for report in reports)


def test_joint_attention_loses_the_same_heads_in_both_streams():
    of = structured("sd3", 0.5, neurons=False)
    of.run()
    structure = structures_of(of)[0]
    assert [part.layer.name.rpartition("attn.")[2] for part in structure.consumers] == ["to_out.0", "to_add_out"]
    gone = [(part.layer.weight == 0).all(dim=0)[part.places].all(dim=1) for part in structure.consumers]
    assert torch.equal(gone[0], gone[1])
    assert int(gone[0].sum()) == 2
    for part in structure.makers:
        assert torch.equal((part.layer.weight == 0).all(dim=1)[part.places].all(dim=1), gone[0])
    assert not any(s.masked().any() for s in find_structures(of.sampler.denoiser) if s.kind == "neurons")


def test_zero_ratio_leaves_the_weights_unchanged():
    of = structured("sd3", 0.0)
    before = {name: value.clone() for name, value in of.sampler.denoiser.state_dict().items()}
    of.run()
    for name, value in of.sampler.denoiser.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_compensation_preserves_images_better_than_magnitude(name):
    dense = images(sampler(name))
    distances = {}
    for method in (Magnitude(), SparseGPT()):
        of = structured(name, 0.3, method=method)
        of.run()
        distances[type(method).__name__] = float((images(of.sampler) - dense).square().mean())
    assert distances["SparseGPT"] < distances["Magnitude"]


def test_attention_that_normalizes_over_all_heads_is_rejected():
    of = sampler("sd3")
    attention = of.denoiser.transformer_blocks[1].attn
    attention.norm_q = torch.nn.LayerNorm(attention.to_q.out_features)
    with pytest.raises(RoseExpError, match=r"transformer_blocks\.1\.attn\.norm_q normalizes over all heads"):
        find_structures(of.denoiser)
