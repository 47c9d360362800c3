"""Generate images with a dense and a pruned model from the same noise, and measure the distances between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from .sampling import Sampler


@dataclass(frozen=True)
class Rendering:
    """Images that a model generates from prompts.

    Attributes:
        images: (images, channels, height, width) uint8.
        milliseconds: median duration of a call of the denoiser.
    """

    images: Tensor
    milliseconds: float


OnBatch = Callable[[int, Tensor, Tensor], None]  # index of the first image, images (0 to 1), latents (images, steps, …)


@torch.no_grad()
def render(
    sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], what: str, on_batch: OnBatch | None = None
) -> Rendering:
    """Generate an image for each prompt from the noise of its seed.

    Args:
        what: name of the progress bar.
        on_batch: called with the images of each batch and their latents after each step, float32 on the CPU.
    """
    images: list[Tensor] = []
    latents: list[Tensor] = []
    clock = _Clock(sampler.denoiser)
    with ExitStack() as stack:
        if on_batch is not None:
            stack.enter_context(sampler.latents(lambda step_latents: latents.append(step_latents.float().cpu())))
        stack.enter_context(sampler.steps(lambda _step, _steps: None))
        clock.attach(stack)
        for numbers, batch in sampler.run(prompts, seeds, what, decode=True):
            images.append((batch * 255).round().clamp(0, 255).to(torch.uint8))
            if on_batch is not None:
                on_batch(numbers[0], batch, torch.stack(latents, dim=1))
                latents.clear()
    return Rendering(torch.cat(images), 1000 * statistics.median(clock.seconds))


class _Clock:
    """Measures the duration of each call of the denoiser."""

    def __init__(self, denoiser: nn.Module):
        self.denoiser, self.seconds, self.start = denoiser, [], 0.0
        self.cuda = next(denoiser.parameters()).is_cuda

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def attach(self, stack: ExitStack) -> None:
        def before(*_: Any) -> None:
            self.start = self._now()

        def after(*_: Any) -> None:
            self.seconds.append(self._now() - self.start)

        stack.callback(self.denoiser.register_forward_pre_hook(before).remove)
        stack.callback(self.denoiser.register_forward_hook(after).remove)


class Distances:
    """Distances between the images of a pruned and a dense model from the same noise, accumulated batch by batch.

    Batches of the dense model are stored on disk.

    Args:
        folder: an existing folder for the batches of the dense model.
        vae: the pipeline's autoencoder, for ``vae_distance``. The metric is left out if this is not an ``AutoencoderKL``.
    """

    def __init__(self, folder: Path, vae: nn.Module | None = None):
        self.folder, self.vae = folder, vae if hasattr(getattr(vae, "encoder", None), "down_blocks") else None
        self.values: dict[str, list[Tensor]] = {}
        self.by_step: list[Tensor] = []

    def keep(self, number: int, images: Tensor, latents: Tensor) -> None:
        """Store a batch of the dense model; ``number`` is the index of its first image."""
        save_file({"images": images.contiguous(), "latents": latents.contiguous()}, self._file(number))

    def compare(self, number: int, images: Tensor, latents: Tensor) -> None:
        """Compare a batch of the pruned model with the stored one of the same ``number``."""
        dense = load_file(self._file(number))
        image_distances, by_step = distances(dense["images"], images, dense["latents"], latents, self.vae)
        for name, values in image_distances.items():
            self.values.setdefault(name, []).append(values)
        self.by_step.append(by_step)

    def metrics(self) -> dict[str, tuple[float, float | None]]:
        """Return the mean over the images and its standard error for each metric of :func:`distances`."""
        joined = {name: torch.cat(values) for name, values in self.values.items()}
        return {n: (float(v.mean()), float(v.std() / len(v) ** 0.5) if len(v) > 1 else None) for n, v in joined.items()}

    def latent_mse(self) -> list[float]:
        """Return the mean squared difference of the latents after each step, averaged over the images."""
        return torch.cat(self.by_step).mean(dim=0).tolist()

    def _file(self, number: int) -> Path:
        return self.folder / f"dense-{number:06}.safetensors"


@torch.no_grad()
def distances(
    dense: Tensor, pruned: Tensor, dense_latents: Tensor, pruned_latents: Tensor, vae: nn.Module | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Compare images (images, channels, height, width), 0 to 1, and latents (images, steps, …) of the same prompts and seeds.

    Returns:
        Metrics by name, each (images,): ``latent_mse``, the mean squared difference of the latents after the last step;
        ``latent_mse_all``, its mean over all steps; ``psnr`` (dB); ``ssim``; and ``vae_distance`` if ``vae`` is given.
        Also the mean squared difference after each step, (images, steps).

    ``vae_distance`` follows LPIPS (Zhang et al., 2018), but uses the features of the pipeline's own encoder, which needs no
    download. The output of each encoder stage is normalized over channels; squared differences are summed over channels,
    averaged over positions and summed over stages. The metric is not calibrated against human judgement.
    """
    by_step = (dense_latents - pruned_latents).square().flatten(2).mean(dim=2)
    values = {"latent_mse": by_step[:, -1], "latent_mse_all": by_step.mean(dim=1)}
    pairs = list(zip(dense[:, None], pruned[:, None], strict=True))
    values["psnr"] = torch.stack([peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in pairs])
    values["ssim"] = torch.stack([structural_similarity_index_measure(b, a, data_range=1.0) for a, b in pairs])
    if vae is not None:
        values["vae_distance"] = _encoder_distance(vae, dense, pruned)
    return values, by_step


def _encoder_distance(vae: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """Return the distance of each pair of images, in float32, because half precision overflows in some encoders."""
    place, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    features: list[Tensor] = []
    total = torch.zeros(len(first))
    with ExitStack() as stack:
        for block in vae.encoder.down_blocks:
            stack.callback(block.register_forward_hook(lambda _m, _a, output: features.append(output)).remove)
        stack.callback(vae.to, dtype)
        vae.to(torch.float32)
        for number, pair in enumerate(zip(first, second, strict=True)):
            features.clear()
            vae.encode(torch.stack(pair).to(place) * 2 - 1)
            for feature in features:
                a, b = functional.normalize(feature, dim=1, eps=1e-10)  # (channels, height, width) each
                total[number] += (a - b).square().sum(dim=0).mean().cpu()
    return total
