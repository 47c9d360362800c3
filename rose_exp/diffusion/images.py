"""Images of a dense and of a pruned model from the same noise, and how far they are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from .sampling import Sampler


@dataclass(frozen=True)
class Rendering:
    """What a model makes of prompts.

    Attributes:
        images: (images, channels, height, width), 0 to 1, float32.
        latents: what each step left, (images, steps, …), float32.
        milliseconds: of a call of the denoiser, the median.
    """

    images: Tensor
    latents: Tensor
    milliseconds: float


@torch.no_grad()
def render(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], what: str) -> Rendering:
    """Make an image of each prompt from the noise of its seed."""
    images: list[Tensor] = []
    latents: list[list[Tensor]] = []
    clock = _Clock(sampler.denoiser)
    with ExitStack() as stack:
        stack.enter_context(sampler.latents(lambda found: latents[-1].append(found.float().cpu())))
        stack.enter_context(sampler.steps(lambda step, _steps: latents.append([]) if step == 0 else None))
        clock.attach(stack)
        for _, batch in sampler.run(prompts, seeds, what, decode=True):
            images.append(batch)
    steps = [torch.stack(of_batch, dim=1) for of_batch in latents]
    return Rendering(torch.cat(images), torch.cat(steps), 1000 * statistics.median(clock.seconds))


class _Clock:
    """How long the denoiser's calls take."""

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


@dataclass(frozen=True)
class Distance:
    """How far a pruned model's images are from the dense model's, at equal noise.

    Attributes:
        metrics: means over the images, by name: ``latent_mse`` after the last step, ``latent_mse_all`` over all steps; ``psnr``
            (dB) and ``ssim`` of the images; ``vae_distance`` where the pipeline has an autoencoder.
        errors: standard errors of these.
        latent_mse: after each step, a mean over the images.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    latent_mse: list[float]


@torch.no_grad()
def distance(dense: Rendering, pruned: Rendering, vae: nn.Module | None = None) -> Distance:
    """Compare two renderings of the same prompts and seeds.

    ``vae_distance`` is made as LPIPS is (Zhang et al., 2018), from the features of the pipeline's own encoder in place of a
    network for which weights must be fetched: of the output of each of its stages, normalised over channels, the squared
    difference summed over channels and averaged over places, summed over stages. No human has judged it.
    """
    by_step = (dense.latents - pruned.latents).square().flatten(2).mean(dim=2)  # (images, steps)
    found = {"latent_mse": by_step[:, -1], "latent_mse_all": by_step.mean(dim=1)}
    pairs = list(zip(dense.images[:, None], pruned.images[:, None], strict=True))
    found["psnr"] = torch.stack([peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in pairs])
    found["ssim"] = torch.stack([structural_similarity_index_measure(b, a, data_range=1.0) for a, b in pairs])
    if vae is not None:
        found["vae_distance"] = torch.stack([_encoder_distance(vae, a, b) for a, b in pairs])
    metrics = {name: float(values.mean()) for name, values in found.items()}
    errors = {name: float(v.std() / len(v) ** 0.5) for name, v in found.items() if len(v) > 1}
    return Distance(metrics, errors, by_step.mean(dim=0).tolist())


def _encoder_distance(vae: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    features: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, output: features.append(output)) for block in vae.encoder.down_blocks]
    try:
        place = next(vae.parameters())
        vae.encode(torch.cat([first, second]).to(place) * 2 - 1)
    finally:
        for hook in hooks:
            hook.remove()
    total = torch.zeros(())
    for feature in features:
        a, b = functional.normalize(feature.float(), dim=1, eps=1e-10)  # (channels, height, width) each
        total = total + (a - b).square().sum(dim=0).mean().cpu()
    return total
