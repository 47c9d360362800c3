"""Settings of diffusion models: how they are run, and what is measured of their images."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..engine.weighting import Weighting
from ..runtime.errors import suggest
from ..runtime.fingerprint import folder_sha256
from .section import Count, Positive, Section
from .texts import PromptSettings

LIBRARIES = {  # that metrics of images need, by the name that they are imported by
    "distance": ("torchmetrics",),
    "clip_score": (),
    "image_reward": ("ImageReward",),
    "fid": ("torchmetrics", "torch_fidelity"),
}

Pixels = Annotated[int, Field(ge=8, multiple_of=8)]


class DiffusionSettings(Section):
    """See :class:`rose_exp.diffusion.sampling.Sampler` and :func:`rose_exp.engine.weighting.step_weights`."""

    steps: Positive = 25  # of denoising
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 7.0  # null: as the pipeline has it
    height: Pixels | None = 512  # null: as the pipeline has it
    width: Pixels | None = 512
    text_length: Positive | None = None  # tokens of a T5 encoder; null: as the pipeline has it
    batch: Positive = 4  # images at once on a GPU; a CPU makes one at a time
    scheduler: str | None = None  # a class of diffusers; null: the pipeline's own
    packages: Positive = 4  # of modules that are pruned together, one denoising of all prompts each
    weighting: Weighting = "log_decrease"  # how much each step counts in the Hessian
    alpha_min: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.8
    alpha_max: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.2
    convolutions: bool = False  # pruned as well, as the linear layers that they are of patches

    def problems(self, where: str) -> list[str]:
        found = []
        if (self.height is None) != (self.width is None):
            found.append(f"{where}.height: expected null where width is, got {self.height} and width {self.width}")
        if self.alpha_min > self.alpha_max:
            expected = f"at most alpha_max, {self.alpha_max:g}"
            found.append(f"{where}.alpha_min: expected {expected}, got {self.alpha_min:g}")
        return found

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.height is None or self.width is None else (self.height, self.width)


class ImagesSettings(PromptSettings):
    """What is measured of a diffusion model's images, of prompts from noise that is the same for every run."""

    metrics: list[str] = Field(["distance"])  # distance (to the dense model at equal noise), clip_score, image_reward, fid
    clip: str = "openai/clip-vit-base-patch16"  # folder or hub id of the CLIP model that scores
    reference: str | None = None  # folder of real images, for fid
    sheet: Count = 6  # prompts whose images stand side by side on the contact sheet

    def problems(self, where: str) -> list[str]:
        found = super().problems(where)
        for name in self.metrics:
            if name not in LIBRARIES:
                expected = f"some of {', '.join(LIBRARIES)}"
                found.append(f"{where}.metrics: expected {expected}, got {name!r}{suggest(name, LIBRARIES)}")
                continue
            missing = [library for library in LIBRARIES[name] if importlib.util.find_spec(library) is None]
            if missing:
                package = missing[0].replace("_", "-").replace("ImageReward", "image-reward")
                found.append(f"{where}.metrics: expected an installed package for {name}, got none: pip install {package}")
        if "fid" in self.metrics and (self.reference is None or not Path(self.reference).expanduser().is_dir()):
            found.append(f"{where}.reference: expected a folder of real images for fid, got {self.reference!r}")
        return found

    def fingerprints(self) -> dict[str, str | None]:
        """What scores hang on beside images and prompts: the CLIP model and the real images, local ones by their content."""
        clip = Path(self.clip).expanduser()
        known = folder_sha256(clip) if clip.is_dir() else self.clip
        real = folder_sha256(Path(self.reference).expanduser()) if "fid" in self.metrics and self.reference else None
        return {"clip": known if "clip_score" in self.metrics else None, "reference": real}


ModelKind = Literal["language", "diffusion"]
Built = Literal["sd3", "flux", "sd", "sdxl", "ddpm"]
