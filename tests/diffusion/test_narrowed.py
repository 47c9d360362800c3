"""Structured pruning of denoisers: removal of heads and neurons."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanDiT2DModel, WanTransformer3DModel

from rose_exp.diffusion import Sampler
from rose_exp.diffusion.loading import save_pipeline
from rose_exp.diffusion.modeling_narrowed import NarrowedSD3Transformer2DModel
from rose_exp.diffusion.narrowed import key_of, remove_masked, shrink, widths
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
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
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
    loaded = DiffusionPipeline.from_pretrained(save_pipeline(of.pipeline, tmp_path / "model"), trust_remote_code=True)
    torch.testing.assert_close(images(again(loaded, of)), expected, rtol=1e-4, atol=1e-4)


def test_removing_more_than_is_masked_raises_an_error():
    of = sampler("sd3")
    (first, *_) = find_structures(of.denoiser)
    with pytest.raises(ValueError, match="expected at least 2 masked heads, got 0"):
        remove_masked(of.pipeline, {key_of(first): 2})


@pytest.mark.parametrize(
    ("narrowed", "message"),
    [
        (
            {"layers": {"proj_out": [9, 9999]}, "attributes": {}},
            r"layers\.proj_out: expected a linear layer with at least 9 rows",
        ),
        ({"layers": {"pos_embed": [1, 1]}, "attributes": {}}, r"narrowed\.layers\.pos_embed: expected a linear layer"),
        (
            {"layers": {}, "attributes": {"proj_out": {"heads": 2}}},
            r"attributes\.proj_out\.heads: expected an existing",
        ),
        ({"layers": {}, "attributes": {"pos_embed": {"height": "2"}}}, r"attributes\.pos_embed\.height: expected an existing"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_rejected(narrowed, message):
    with pytest.raises(ValueError, match=message):
        NarrowedSD3Transformer2DModel(narrowed=narrowed, num_attention_heads=4, num_layers=1)


def test_classes_whose_configuration_has_the_number_of_neurons_are_kept(tmp_path):
    models = {
        "ffn_dim": WanTransformer3DModel(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=40, text_dim=8),
        "mlp_ratio": HunyuanDiT2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=8, hidden_size=16, in_channels=4, patch_size=2
        ),
    }
    for entry, model in models.items():
        kind, original = type(model), model.config[entry]
        counts = {}
        for structure in find_structures(model, kinds=("neurons",)):
            structure.mask(torch.arange(structure.groups) % 4 == 0)
            counts[key_of(structure)] = structure.groups // 4
        shrink(model, counts)
        assert type(model) is kind
        assert model.config[entry] == 0.75 * original
        model.save_pretrained(tmp_path / entry)
        loaded = kind.from_pretrained(tmp_path / entry).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
        (first, *_) = find_structures(model, kinds=("neurons",))
        first.mask(torch.arange(first.groups) == 0)
        shrink(model, {key_of(first): 1})  # now the blocks differ
        assert type(model).__name__ == f"Narrowed{kind.__name__}"
        model.save_pretrained(tmp_path / f"{entry} twice")
        loaded = type(model).from_pretrained(tmp_path / f"{entry} twice").state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


ALONE = """
import sys
sys.modules["rose_exp"] = None  # any import of it fails
import diffusers, torch

root, names = sys.argv[1], sys.argv[2:]
for name in names:
    arguments, images, weights = torch.load(f"{root}/{name}.pt", weights_only=True)
    for place in (f"{root}/{name}", f"{root}/{name} again"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
        found = getattr(pipeline, "unet", None) or pipeline.transformer
        assert all(torch.equal(value, weights.pop(key)) for key, value in found.state_dict().items()) and not weights
        weights = found.state_dict()
        generator = [torch.Generator().manual_seed(3)]
        difference = torch.from_numpy(pipeline(**arguments, generator=generator).images) - images
        assert difference.abs().max() < 1e-4, difference  # rounding depends on the alignment of the weights
        pipeline.save_pretrained(f"{root}/{name} again")
"""


def test_saved_pipelines_load_without_this_package(tmp_path):
    names = ("sd3", "flux", "sd", "ddpm")
    for name in names:
        of = sampler(name)
        counts = {}
        for structure in find_structures(of.denoiser):
            counts[key_of(structure)] = count = Structured(0.4).count(structure.groups)
            structure.mask(torch.randperm(structure.groups) < count)
        remove_masked(of.pipeline, counts)
        save_pipeline(of.pipeline, tmp_path / name)
        arguments = of._arguments(["a red fox"], [3], decode=True)
        images = torch.from_numpy(of.pipeline(**arguments).images)
        del arguments["generator"]
        torch.save((arguments, images, of.denoiser.state_dict()), tmp_path / f"{name}.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", ALONE, str(tmp_path), *names]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
