"""Variants of weight files, and pipelines without some of their components."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

from rose_exp.diffusion import Sampler
from rose_exp.diffusion.loading import load_pipeline
from rose_exp.diffusion.small import small_pipeline
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

from . import survey
from .pipelines import sampler


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "sd3"
    pipeline = small_pipeline("sd3")
    pipeline.save_pretrained(folder)
    with torch.no_grad():
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            for parameter in getattr(pipeline, name).parameters():
                parameter.mul_(2)  # so that the variant is another model
    pipeline.save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "sd3"))


def loaded(path: Path, **options):
    return load_pipeline(ModelSettings(kind="diffusion", path=str(path), **options))[0]


def change_index(folder: Path, **entries) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def images(pipeline) -> torch.Tensor:
    of = Sampler(pipeline, steps=2, guidance=4.0, size=(32, 32), text_length=16)
    with torch.no_grad():
        return torch.cat([found for _, found in of.run(["a cat"], [0], "images", decode=True)])


def test_a_variant_selects_the_weight_files_of_every_component(folder):
    plain, variant = loaded(folder), loaded(folder, variant="fp16")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        first, second = (next(getattr(pipeline, name).parameters()) for pipeline in (plain, variant))
        assert torch.equal(2 * first, second), name


@pytest.mark.parametrize(("variant", "left"), [("fp16", "null"), ("bf16", "fp16, null"), (None, "fp16")])
def test_missing_variants_are_named_with_those_that_exist(variant, left, folder):
    for path in folder.rglob("*.safetensors"):
        if (path.name.count(".") == 2) != ("fp16" in left) and left != "fp16, null":
            path.unlink()
    with pytest.raises(RoseExpError, match=rf"^model\.path: .* with model\.variant={variant or 'null'}, .* {left}: "):
        loaded(folder, variant=variant)


@pytest.mark.parametrize("entry", [[None, None], None])
def test_null_components_in_the_index_are_left_out(entry, folder):
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    change_index(folder, text_encoder_3=entry, tokenizer_3=entry)
    pipeline = loaded(folder)
    assert pipeline.text_encoder_3 is None
    assert torch.equal(images(pipeline), images(loaded(folder, omit=["text_encoder_3"])))
    pipeline.save_pretrained(folder.parent / "again")
    assert torch.equal(images(loaded(folder.parent / "again")), images(pipeline))


def test_an_omitted_encoder_is_not_read(folder):
    reference = images(loaded(folder))
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(RoseExpError, match="expected a folder text_encoder_3 in "):
        loaded(folder)
    pipeline = loaded(folder, omit=["text_encoder_3"])
    assert pipeline.text_encoder_3 is pipeline.tokenizer_3 is None
    assert not torch.equal(images(pipeline), reference)
    built = load_pipeline(ModelSettings(kind="diffusion", built="sd3", omit=["text_encoder_3"]))[0]
    assert torch.equal(images(built), images(pipeline))


def test_components_that_a_pipeline_lacks_cannot_be_omitted():
    with pytest.raises(RoseExpError, match="model.omit: expected components of StableDiffusionPipeline, got text_encoder_3"):
        load_pipeline(ModelSettings(kind="diffusion", built="sd", omit=["text_encoder_3"]))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"kind": "language", "variant": "fp16", "embedded": "smollm2-135m"},
            "model.variant: expected null unless model.kind is",
        ),
        ({"kind": "language", "omit": ["text_encoder_3"], "embedded": "smollm2-135m"}, "model.omit: expected none unless "),
        ({"kind": "diffusion", "built": "sd3", "variant": "fp16"}, "model.variant: expected null with model.built, got 'fp16'"),
        (
            {"kind": "diffusion", "path": "owner/name", "variant": "../x"},
            "model.variant: expected a name such as fp16, got '../x'",
        ),
    ],
)
def test_settings_are_checked(options, problem):
    (found,) = ModelSettings(**options).problems("model")
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"vae": ["os", "system"]},
            "expected one of diffusers, transformers, modeling_narrowed as the library of vae in .*, got 'os'",
        ),
        (
            {"vae": ["diffusers", "NoSuchModel"]},
            "uses diffusers.NoSuchModel as its vae, which is not installed: AttributeError",
        ),
        ({"vae": ["diffusers", 5]}, "expected a library and a class for vae in .*model_index.json, got "),
        ({"vae": ["diffusers"]}, "expected a library and a class for vae in "),
        ({"../vae": ["diffusers", "AutoencoderKL"]}, "expected a library and a class for ../vae in "),
        ({"transformer": None}, "cannot load the pipeline"),
        ({"transformer": [None, None]}, "model: expected a pipeline with transformer or unet|cannot load the pipeline"),
        ({"_class_name": 5}, "cannot load the pipeline"),
        ({"_class_name": "NoPipeline"}, "cannot load the pipeline"),
    ],
)
def test_damaged_indices_are_named(entries, message, folder):
    change_index(folder, **entries)
    with pytest.raises(RoseExpError, match=message) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_together_are_found_when_loading():
    of = sampler("sd3")
    of.rehearse(decode=True)
    of.pipeline.text_encoder = sampler("sd").pipeline.text_encoder  # without a projection
    with pytest.raises(RoseExpError, match="model.path, diffusion: StableDiffusion3Pipeline cannot generate an image: "):
        of.rehearse(decode=False)


def test_pipelines_that_need_other_inputs_are_rejected_by_name():
    vae = sampler("sd").pipeline.vae
    pipeline = DiTPipeline(survey.build("DiTTransformer2DModel"), vae, DDIMScheduler())
    with pytest.raises(RoseExpError, match="generates images from prompts, .* got a DiTPipeline that needs class_labels"):
        Sampler(pipeline, steps=1).rehearse(decode=False)


def test_pipelines_of_videos_are_rejected(monkeypatch):
    class VideoPipeline:
        def __call__(self, prompt=None, generator=None, output_type=None):
            return {"frames": torch.zeros(1)}

        def set_progress_bar_config(self, disable):
            assert disable

    monkeypatch.setattr(Sampler, "denoiser", small_pipeline("sd3").transformer)
    with pytest.raises(RoseExpError, match="expected a pipeline that generates images, got VideoPipeline with frames"):
        Sampler(VideoPipeline(), steps=1).rehearse(decode=False)
