"""Image distances and scores."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from rose_exp.diffusion.images import Distances, distances, render
from rose_exp.diffusion.scores import load_scores
from rose_exp.diffusion.small import clip_tokenizer
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.diffusion import ImagesSettings

from .pipelines import NAMES, PROMPTS, STEPS, sampler


def rendered(of, prompts, seeds):
    """Render images; return the result together with all images and latents."""
    images, latents = [], []
    found = render(of, prompts, seeds, "images", lambda _number, x, y: (images.append(x), latents.append(y)))
    return found, torch.cat(images), torch.cat(latents)


@pytest.mark.parametrize("name", NAMES)
def test_rendering_returns_every_image_and_the_latents_of_each_step(name):
    of = sampler(name)
    found, images, latents = rendered(of, PROMPTS, [1, 2, 3])
    assert images.shape == (3, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    assert torch.equal(found.images, (images * 255).round().to(torch.uint8))
    assert latents.shape[:2] == (3, STEPS)
    assert found.milliseconds > 0
    assert "step" not in vars(of.pipeline.scheduler)  # the hook is removed
    _, alone, alone_latents = rendered(of, PROMPTS[2:], [3])
    torch.testing.assert_close(alone[0], images[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone_latents[0], latents[2], rtol=1e-3, atol=1e-4)
    _, other, _ = rendered(of, PROMPTS[2:], [4])
    assert not torch.allclose(other[0], images[2], atol=1e-2)


def test_scheduler_noise_comes_from_the_generators_of_the_images():
    of = sampler("sd")
    of.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(of.pipeline.scheduler.config)
    first, second = rendered(of, PROMPTS[:2], [1, 2]), rendered(of, PROMPTS[:2], [1, 2])
    assert torch.equal(first[2], second[2])


def test_distances_match_their_formulas():
    first, second = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    a, b = torch.randn(3, 5, 4, 8, 8), torch.randn(3, 5, 4, 8, 8)
    found, by_step = distances(first, second, a, b)
    mse = (first - second).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(found["psnr"], 10 * torch.log10(1 / mse))
    torch.testing.assert_close(by_step, (a - b).square().mean(dim=(2, 3, 4)))
    torch.testing.assert_close(found["latent_mse"], by_step[:, -1])
    torch.testing.assert_close(found["latent_mse_all"], by_step.mean(dim=1))


def test_batchwise_distances_match_distances_over_all_images(tmp_path):
    first, second = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    a, b = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    collected = Distances(tmp_path)
    for start, end in ((0, 2), (2, 3)):
        collected.keep(start, first[start:end], a[start:end])
    for start, end in ((0, 2), (2, 3)):
        collected.compare(start, second[start:end], b[start:end])
    expected, by_step = distances(first, second, a, b)
    for name, (mean, error) in collected.metrics().items():
        assert mean == pytest.approx(float(expected[name].mean()), rel=1e-5)
        assert error == pytest.approx(float(expected[name].std() / math.sqrt(3)), rel=1e-5)
    assert collected.latent_mse() == pytest.approx(by_step.mean(dim=0).tolist(), rel=1e-5)
    assert len(list(tmp_path.iterdir())) == 2  # kept for other runs


def test_distances_are_zero_for_equal_images_and_grow_with_noise():
    vae, images, latents = sampler("sd").pipeline.vae, torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 4)
    near, far = (images + 0.02 * torch.randn_like(images)).clamp(0, 1), torch.rand(2, 3, 32, 32)
    same, small, large = (distances(images, x, latents, latents, vae)[0] for x in (images, near, far))
    assert same["vae_distance"].abs().max() < 1e-9
    assert (same["ssim"] > 0.9999).all()
    for image in range(2):
        assert 0 < small["vae_distance"][image] < large["vae_distance"][image]
        assert small["ssim"][image] > large["ssim"][image]
        assert small["psnr"][image] > large["psnr"][image]
    half = sampler("sd").pipeline.vae.to(torch.float16)
    torch.testing.assert_close(
        distances(images, near, latents, latents, half)[0]["vae_distance"], small["vae_distance"], rtol=0.05, atol=1e-3
    )
    assert next(half.parameters()).dtype == torch.float16


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Save a small CLIP model with random weights; return its folder."""
    tokenizer, folder = clip_tokenizer(), tmp_path_factory.mktemp("clip")
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


def test_clip_score_is_the_cosine_similarity_of_embeddings(clip):
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    score = load_scores(settings(metrics=["distance", "clip_score"], clip=str(clip)), PROMPTS, torch.device("cpu"))[
        "clip_score"
    ]
    value, error = score(images, PROMPTS, None)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    texts = processor.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        answer = model(pixel_values=(images / 255 - mean) / std, **texts)
    expected = torch.nn.functional.cosine_similarity(answer.image_embeds, answer.text_embeds)
    assert value == pytest.approx(float(expected.mean()), abs=1e-4)
    assert error == pytest.approx(float(expected.std() / math.sqrt(3)), abs=1e-4)


def test_score_without_weights_raises_an_error(tmp_path):
    with pytest.raises(RoseExpError, match=r"evaluation\.images\.metrics: clip_score is unavailable"):
        load_scores(settings(metrics=["clip_score"], clip=str(tmp_path)), PROMPTS, torch.device("cpu"))


def test_invalid_image_settings_are_reported():
    (unknown,) = settings(metrics=["distanse"]).problems("evaluation.images")
    assert "did you mean 'distance'?" in unknown
    problems = settings(metrics=["fid", "image_reward"]).problems("evaluation.images")
    assert any("image_reward, got none: pip install image-reward" in problem for problem in problems)
    assert any("reference: expected a folder of real images" in problem for problem in problems)
