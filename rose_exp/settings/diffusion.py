"""Settings of diffusion models: sampling, and metrics of the images."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, MultipleOf
from pydantic import Field

from ..engine.bounds import Count, NonNegative, Positive
from ..engine.weighting import StepWeighting
from ..runtime.errors import suggest
from ..runtime.fingerprint import folder_sha256
from .texts import PromptSettings

PIPELINES = ("digits-sd3",)
"""Embedded pipelines with trained weights, which are folders in the data of this package."""

DIGIT_METRICS = ("recognized", "digit_distance", "dense_distance")
"""Metrics by the embedded classifier of digits. For the first, every prompt must name one digit as a word, such as "three"."""

LIBRARIES = {  # modules that each image metric imports
    "distance": ("torchmetrics",),
    **dict.fromkeys(DIGIT_METRICS, ()),
    "clip_score": (),
    "image_reward": ("ImageReward",),
    "fid": ("torchmetrics", "torch_fidelity"),
}

Pixels = Annotated[int, Ge(8), MultipleOf(8)]


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(StepWeighting):
    """See :class:`rose_exp.diffusion.sampling.Sampler` for the options of sampling."""

    steps: Positive = 25  # denoising steps
    guidance: NonNegative | None = 7.0  # null: the pipeline's default
    height: Pixels | None = 512  # null: the pipeline's default
    width: Pixels | None = 512
    text_length: Positive | None = None  # maximum sequence length of a T5 encoder; null: the pipeline's default
    batch: Positive = 4  # batch size on a GPU; a CPU always uses 1
    scheduler: str | None = None  # a scheduler class of diffusers; null: the pipeline's own
    packages: Positive = 4  # module packages; each takes one denoising of all prompts
    convolutions: bool = False  # also prune convolutions, as linear layers on patches

    def problems(self, where: str) -> list[str]:
        if (self.height is None) == (self.width is None):
            return []
        return [f"{where}.height: expected null exactly if width is null, got {self.height} and width {self.width}"]

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.height is None or self.width is None else (self.height, self.width)


class ImagesSettings(PromptSettings):
    """Metrics of a diffusion model's images, and their prompts. All runs use the same noise."""

    # distance (to the dense model, same noise), recognized, digit_distance, dense_distance (by the embedded classifier of
    # digits), clip_score, image_reward, fid
    metrics: list[str] = Field(["distance"])
    clip: str = "openai/clip-vit-base-patch16"  # folder or hub ID of the CLIP model for clip_score
    reference: str | None = None  # folder of real images for fid
    sheet: Count = 6  # prompts on the contact sheet, which compares dense and pruned images

    def problems(self, where: str) -> list[str]:
        problems = super().problems(where)
        for name in self.metrics:
            if name not in LIBRARIES:
                expected = f"some of {', '.join(LIBRARIES)}"
                problems.append(f"{where}.metrics: expected {expected}, got {name!r}{suggest(name, LIBRARIES)}")
                continue
            missing = [library for library in LIBRARIES[name] if importlib.util.find_spec(library) is None]
            if missing:
                package = missing[0].replace("_", "-").replace("ImageReward", "image-reward")
                problems.append(f"{where}.metrics: expected an installed package for {name}, got none: pip install {package}")
        if "fid" in self.metrics and not os.path.isdir(os.path.expanduser(self.reference or "")):
            problems.append(f"{where}.reference: expected a folder of real images for fid, got {self.reference!r}")
        return problems

    def fingerprints(self) -> dict[str, str | None]:
        """Return the fingerprints of the CLIP model and the real images, on which the scores depend.

        The fingerprint of a local folder is that of its content.
        """
        clip = os.path.expanduser(self.clip)
        known = folder_sha256(Path(clip)) if os.path.isdir(clip) else self.clip
        real = folder_sha256(Path(self.reference).expanduser()) if "fid" in self.metrics and self.reference else None
        return {"clip": known if "clip_score" in self.metrics else None, "reference": real}


def embedded_folder(name: str) -> Path:
    """Return the folder of an embedded pipeline."""
    return Path(__file__).parent.parent / "data" / name


ModelKind = Literal["language", "diffusion"]
Built = Literal["sd3", "flux", "sd", "sdxl", "ddpm"]

Omissible = Literal["text_encoder_3"]
"""Components that a pipeline can work without: the T5 encoder of Stable Diffusion 3."""
