"""Image metrics that use other networks: the embedded classifier of digits, CLIP, ImageReward and Inception."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors
from ..settings.diffusion import DIGIT_METRICS, ImagesSettings
from .digits import WORDS, classify, frechet_distance, load_classifier, real_statistics, requested_digit, statistics

BATCH = 16
Score = Callable[[Tensor, Sequence[str], Tensor | None], tuple[float, float | None] | None]
"""Scores uint8 images, given their prompts and the dense model's images, which are None for a dense model. Returns the mean and
its standard error, if it has one, or None if the score is not defined."""


def load_scores(settings: ImagesSettings, prompts: Sequence[str], device: torch.device) -> dict[str, Score]:
    """Load the networks for the metrics in ``settings``, and return the scoring functions by name.

    This runs before any image is generated, so that missing weights and unsuitable prompts are reported early.

    Raises:
        RoseExpError: weights or packages are unavailable, or the prompts do not suit a metric.
    """
    digits = [name for name in settings.metrics if name in DIGIT_METRICS]
    if digits:
        _check_digits(prompts, digits)
    makers = {
        "recognized": _recognized,
        "digit_distance": _digit_distance,
        "dense_distance": _dense_distance,
        "clip_score": _clip_score,
        "image_reward": _image_reward,
        "fid": _fid,
    }
    scores = {}
    for name in settings.metrics:
        if name not in makers:
            continue
        scores[name] = makers[name](settings, device)
    return scores


def _check_digits(prompts: Sequence[str], metrics: Sequence[str]) -> None:
    where, distances = "evaluation.images", [name for name in metrics if name != "recognized"]
    for prompt in prompts if "recognized" in metrics else ():
        if requested_digit(prompt) is None:
            expected = f"prompts that name one digit ({WORDS[0]} to {WORDS[-1]}) for recognized"
            raise RoseExpError(f"{where}.metrics: expected {expected}, got {prompt!r}")
    if len(prompts) < 2 and distances:
        raise RoseExpError(f"{where}.samples: expected at least 2 for {', '.join(distances)}, got {len(prompts)}")


def _recognized(_settings: ImagesSettings, _device: torch.device) -> Score:
    """Return the fraction of images that the classifier recognizes as the digit in their prompt."""
    classifier = load_classifier()

    def score(images: Tensor, prompts: Sequence[str], _dense: Tensor | None) -> tuple[float, float | None]:
        recognized, _ = classify(classifier, images)
        wanted = torch.tensor([requested_digit(prompt) for prompt in prompts])
        return _mean((recognized == wanted).double())

    return score


def _digit_distance(_settings: ImagesSettings, _device: torch.device) -> Score:
    """Return the Fréchet distance to real digits in the classifier's features."""
    classifier, real = load_classifier(), real_statistics()

    def score(images: Tensor, _prompts: Sequence[str], _dense: Tensor | None) -> tuple[float, float | None]:
        return frechet_distance(statistics(classify(classifier, images)[1]), real), None

    return score


def _dense_distance(_settings: ImagesSettings, _device: torch.device) -> Score:
    """Return the Fréchet distance to the dense model's images in the classifier's features."""
    classifier = load_classifier()

    def score(images: Tensor, _prompts: Sequence[str], dense: Tensor | None) -> tuple[float, float | None] | None:
        if dense is None:
            return None
        return frechet_distance(*(statistics(classify(classifier, of)[1]) for of in (images, dense))), None

    return score


def _clip_score(settings: ImagesSettings, device: torch.device) -> Score:
    """Return the CLIP score as OBS-Diff reports it: cosine similarity of image and prompt (Hessel et al., 2021), unscaled."""
    from transformers import AutoProcessor, CLIPModel

    with outside_errors("evaluation.images.metrics: clip_score is unavailable"):
        model, info = CLIPModel.from_pretrained(settings.clip, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(settings.clip)
    if missing := sorted(info["missing_keys"]):  # transformers has initialized them at random
        raise RoseExpError(f"evaluation.images.clip: expected all weights of CLIP in {settings.clip}, got no {missing[0]}")
    model.eval().to(device)

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str], _dense: Tensor | None) -> tuple[float, float | None]:
        similarities = []
        for start in tqdm(range(0, len(images), BATCH), "CLIP score", unit="batch", disable=None):
            batch = [image.permute(1, 2, 0).numpy() for image in images[start : start + BATCH]]
            texts = list(prompts[start : start + BATCH])
            inputs = processor(text=texts, images=batch, return_tensors="pt", padding=True, truncation=True)
            output = model(**inputs.to(device))
            similarities.append(functional.cosine_similarity(output.image_embeds, output.text_embeds).cpu())
        return _mean(torch.cat(similarities))

    return score


def _image_reward(_settings: ImagesSettings, device: torch.device) -> Score:
    with outside_errors("evaluation.images.metrics: image_reward is unavailable"):
        import ImageReward

        model = ImageReward.load("ImageReward-v1.0", device=str(device))

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str], _dense: Tensor | None) -> tuple[float, float | None]:
        from PIL import Image

        rewards = []
        for image, prompt in zip(tqdm(images, "ImageReward", unit="image", disable=None), prompts, strict=True):
            rewards.append(model.score(prompt, Image.fromarray(image.permute(1, 2, 0).numpy())))
        return _mean(torch.tensor(rewards))

    return score


def _fid(settings: ImagesSettings, device: torch.device) -> Score:
    """Return the Fréchet inception distance to a folder of real images, without a standard error."""
    from PIL import Image
    from torchmetrics.image.fid import FrechetInceptionDistance

    with outside_errors("evaluation.images.metrics: fid is unavailable"):
        metric = FrechetInceptionDistance(feature=2048).to(device)
    files = sorted(p for p in Path(settings.reference).expanduser().rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < 2:
        raise RoseExpError(
            f"evaluation.images.reference: expected at least two .png or .jpg files in {settings.reference}, got {len(files)}"
        )
    for file in files:  # now, not after pruning
        with outside_errors(f"evaluation.images.reference: cannot read {file}"), Image.open(file) as image:
            image.load()

    def score(images: Tensor, _prompts: Sequence[str], _dense: Tensor | None) -> tuple[float, float | None]:
        import numpy as np

        size = tuple(images.shape[2:])
        for file in tqdm(files, "FID, real images", unit="image", disable=None):
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC))
            metric.update(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device), real=True)
        for image in tqdm(images, "FID", unit="image", disable=None):
            metric.update(image[None].to(device), real=False)
        return float(metric.compute()), None

    return score


def _mean(values: Tensor) -> tuple[float, float | None]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
