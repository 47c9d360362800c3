"""How far images are apart, and what scores them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from rose_exp.diffusion.images import Rendering, distance, render
from rose_exp.diffusion.scores import load_scores
from rose_exp.diffusion.sheet import draw_sheet
from rose_exp.diffusion.small import _clip_tokenizer
from rose_exp.errors import RoseExpError
from rose_exp.image_settings import ImagesSettings

from .pipelines import NAMES, PROMPTS, STEPS, sampler


@pytest.mark.parametrize("name", NAMES)
def test_a_rendering_has_every_image_and_what_each_step_left(name):
    of = sampler(name)
    found = render(of, PROMPTS, [1, 2, 3], "images")
    assert found.images.shape == (3, 3, 32, 32)
    assert 0 <= found.images.min() <= found.images.max() <= 1
    assert found.latents.shape[:2] == (3, STEPS)
    assert found.milliseconds > 0
    assert "step" not in vars(of.pipeline.scheduler)  # what watched it has gone
    alone = render(of, PROMPTS[2:], [3], "images")
    torch.testing.assert_close(alone.images[0], found.images[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.latents[0], found.latents[2], rtol=1e-3, atol=1e-4)
    other = render(of, PROMPTS[2:], [4], "images")
    assert not torch.allclose(other.images[0], found.images[2], atol=1e-2)


def rendering(images: torch.Tensor, latents: torch.Tensor) -> Rendering:
    return Rendering(images, latents, 1.0)


def test_distances_are_what_their_formulas_say():
    first, second = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    a, b = torch.randn(3, 5, 4, 8, 8), torch.randn(3, 5, 4, 8, 8)
    found = distance(rendering(first, a), rendering(second, b))
    mse = (first - second).square().flatten(1).mean(dim=1)
    assert found.metrics["psnr"] == pytest.approx(float((10 * torch.log10(1 / mse)).mean()), rel=1e-5)
    by_step = (a - b).square().mean(dim=(0, 2, 3, 4))
    assert found.latent_mse == pytest.approx(by_step.tolist(), rel=1e-5)
    assert found.metrics["latent_mse"] == pytest.approx(float(by_step[-1]), rel=1e-5)
    assert found.metrics["latent_mse_all"] == pytest.approx(float(by_step.mean()), rel=1e-5)
    last = (a - b)[:, -1].square().flatten(1).mean(dim=1)
    assert found.errors["latent_mse"] == pytest.approx(float(last.std() / math.sqrt(3)), rel=1e-5)


def test_equal_images_are_not_apart_and_others_the_more_the_further():
    vae, images, latents = sampler("sd").pipeline.vae, torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 4)
    near, far = (images + 0.02 * torch.randn_like(images)).clamp(0, 1), torch.rand(2, 3, 32, 32)
    same, small, large = (distance(rendering(images, latents), rendering(x, latents), vae).metrics for x in (images, near, far))
    assert same["vae_distance"] == pytest.approx(0, abs=1e-9)
    assert same["ssim"] == pytest.approx(1)
    assert 0 < small["vae_distance"] < large["vae_distance"]
    assert small["ssim"] > large["ssim"]
    assert small["psnr"] > large["psnr"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP with random weights, saved."""
    tokenizer, folder = _clip_tokenizer(), tmp_path_factory.mktemp("clip")
    own = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = own | ends | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(text_config=text, vision_config=own | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).eval().save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def settings(**options) -> ImagesSettings:
    return ImagesSettings(embedded="evaluation_prompts", samples=4, **options)


def test_the_clip_score_is_the_cosine_of_embeddings(clip):
    images = torch.rand(3, 3, 32, 32)
    score = load_scores(settings(metrics=["distance", "clip_score"], clip=str(clip)), torch.device("cpu"))["clip_score"]
    value, error = score(images, PROMPTS)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    texts = processor.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        answer = model(pixel_values=((images * 255).round() / 255 - mean) / std, **texts)
    expected = torch.nn.functional.cosine_similarity(answer.image_embeds, answer.text_embeds)
    assert value == pytest.approx(float(expected.mean()), abs=1e-4)
    assert error == pytest.approx(float(expected.std() / math.sqrt(3)), abs=1e-4)


def test_a_score_whose_weights_cannot_be_had_is_told(tmp_path):
    with pytest.raises(RoseExpError, match=r"evaluation\.images\.metrics: clip_score cannot be measured here"):
        load_scores(settings(metrics=["clip_score"], clip=str(tmp_path)), torch.device("cpu"))


def test_settings_of_images_name_what_is_missing():
    (unknown,) = settings(metrics=["distanse"]).problems("evaluation.images")
    assert "did you mean 'distance'?" in unknown
    problems = settings(metrics=["fid", "image_reward"]).problems("evaluation.images")
    assert any("image_reward, got none: pip install image-reward" in problem for problem in problems)
    assert any("reference: expected a folder of real images" in problem for problem in problems)


def test_the_contact_sheet_shows_both_models(tmp_path):
    from PIL import Image

    dark, light = torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)
    dark[:, 0] = 1  # red
    light[:, 1:] = 0
    light[:, 2] = 1  # magenta
    path = draw_sheet(dark, light, PROMPTS[:2], "OBS-Diff", tmp_path / "figures" / "sheet.png")
    with Image.open(path) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(2**24)}
    assert colours[(255, 0, 0)] > 10_000
    assert colours[(255, 0, 255)] == pytest.approx(colours[(255, 0, 0)], rel=0.05)
