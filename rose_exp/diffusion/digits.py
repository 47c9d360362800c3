"""A small classifier of handwritten digits, which scores the images of the embedded pipeline without a hub.

Its weights and the statistics of real digits are files of this package. ``scripts/train_digits.py`` produces both.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

SIZE = 32  # height and width of the classifier's input in pixels
FEATURES = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FOLDER = Path(__file__).parent.parent / "data" / "digits"
CLASSIFIER, STATISTICS = FOLDER / "classifier.safetensors", FOLDER / "statistics.safetensors"


class DigitClassifier(nn.Module):
    """A convolutional network with ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_stage(1, 16),
            *_stage(16, 32),
            *_stage(32, 64),
            nn.Flatten(),
            nn.Linear(64 * (SIZE // 8) ** 2, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, len(WORDS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (images, 10) and the features (images, 32) of grayscale images (images, 1, 32, 32), 0 to 1."""
        features = self.features(2 * images - 1)
        return self.head(features), features


def _stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.GELU(), nn.MaxPool2d(2)


def load_classifier() -> DigitClassifier:
    """Return the embedded classifier in evaluation mode, float32 on the CPU."""
    classifier = DigitClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(CLASSIFIER).items()})
    return classifier.eval()


def requested_digit(prompt: str) -> int | None:
    """Return the digit that a prompt names as a word, or None unless it names exactly one."""
    named = {word for word in re.findall(r"[a-z]+", prompt.lower()) if word in WORDS}
    return WORDS.index(named.pop()) if len(named) == 1 else None


@torch.no_grad()
def classify(classifier: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the digits that the classifier recognizes, (images,), and its features, (images, 32) float64.

    Args:
        images: (images, channels, height, width), uint8 or 0 to 1. Channels are averaged, and other sizes are resized.
    """
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    gray = scaled.mean(dim=1, keepdim=True)
    if gray.shape[2:] != (SIZE, SIZE):
        gray = functional.interpolate(gray, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    logits, features = classifier(gray)
    return logits.argmax(dim=1), features.double()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (features,) and covariance (features, features) of the features (images, features) of two or more images."""
    return features.mean(dim=0), features.T.cov()


def real_statistics() -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the features of the real digits that the classifier was not trained on."""
    stored = load_file(STATISTICS)
    return stored["mean"], stored["covariance"]


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return the squared Fréchet distance of two normal distributions (mean, covariance), as in Heusel et al. (2017).

    With the covariances A and B, the trace of the root of AB is the sum of the roots of the eigenvalues of A^½ B A^½, which is
    symmetric and positive semidefinite.
    """
    (mean_a, a), (mean_b, b) = first, second
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * cross)
