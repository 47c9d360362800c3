"""Running a diffusion pipeline: the same prompts from the same noise, watched step by step."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..runtime import signals as interruption
from ..runtime.batches import at_once
from .denoiser import DenoiserCall

PARTS = ("transformer", "unet")  # what pipelines call their denoiser


class Sampler:
    """A pipeline with the number of steps, guidance and size that it is run with.

    Args:
        pipeline: of diffusers, conditioned on prompts or not.
        steps: of denoising.
        guidance: scale of classifier-free guidance, or what a guidance-distilled model is told; None: as the pipeline has it.
        size: (height, width) in pixels; None: as the pipeline has it.
        text_length: tokens of a T5 encoder; None: as the pipeline has it.
        batch: images at once, on a GPU; see :func:`rose_exp.runtime.batches.at_once`. Each image has a generator of its own.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        steps: int,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        text_length: int | None = None,
        batch: int = 4,
    ):
        self.pipeline, self.batch = pipeline, batch
        self.accepted = inspect.signature(pipeline.__call__).parameters
        wanted = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": text_length}
        wanted |= dict(zip(("height", "width"), size or (None, None), strict=True))
        self.options = {name: value for name, value in wanted.items() if value is not None and name in self.accepted}
        self.ignored = sorted(name for name, value in wanted.items() if value is not None and name not in self.accepted)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, denoiser_name(self.pipeline))

    @property
    def conditioned(self) -> bool:
        """Whether images are made of prompts."""
        return "prompt" in self.accepted

    def run(
        self, prompts: Sequence[str], seeds: Sequence[int], what: str, decode: bool
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Make an image of every prompt, a batch at a time: numbers of the images, and the images (batch, channels, height,
        width), 0 to 1, float32 on the CPU; or what came instead where nothing is to be decoded.

        Args:
            seeds: of the noise that each image is made of.
            what: is being done, for the progress bar.
        """
        size = at_once(self.batch, next(self.denoiser.parameters()).device)
        starts = range(0, len(prompts), size)
        bar = tqdm(starts, what, len(starts), unit="batch", disable=None)
        self.pipeline.set_progress_bar_config(disable=True)
        for start in bar:
            numbers = range(start, min(start + size, len(prompts)))
            yield numbers, self._batch([prompts[i] for i in numbers], [seeds[i] for i in numbers], decode)

    def _batch(self, prompts: Sequence[str], seeds: Sequence[int], decode: bool) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        own = {"prompt": list(prompts)} if self.conditioned else {"batch_size": len(prompts)}
        kind = "np" if decode or not self.conditioned else "latent"
        images = self.pipeline(**own, generator=generators, output_type=kind, **self.options).images
        if kind == "np":
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
        return images.float().cpu()

    def first_call(self, prompt: str) -> DenoiserCall:
        """How the denoiser is called in the first step of the first image."""
        found: list[DenoiserCall] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(DenoiserCall(args, kwargs))
            raise _Enough

        hook = self.denoiser.register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.pipeline.set_progress_bar_config(disable=True)
            self._batch([prompt], [0], decode=False)
        except _Enough:
            pass
        finally:
            hook.remove()
        return found[0]

    @contextmanager
    def steps(self, on_step: Callable[[int, int], None]) -> Iterator[None]:
        """Call ``on_step(step, steps)`` before each call of the denoiser, steps counted from 0 for each batch; a signal to stop
        is heeded there. A sampler that calls the denoiser more than once a step (Heun's) has as many steps as calls."""
        calls = itertools.count()

        def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            interruption.check()
            total = len(self.pipeline.scheduler.timesteps)
            on_step(next(calls) % total, total)

        hook = self.denoiser.register_forward_pre_hook(before)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def latents(self, on_latents: Callable[[Tensor], None]) -> Iterator[None]:
        """Call ``on_latents`` with what every step of the scheduler leaves."""
        scheduler = self.pipeline.scheduler
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at what it takes
        def watched(*args: Any, **kwargs: Any) -> Any:
            found = step(*args, **kwargs)
            on_latents(found[0] if isinstance(found, tuple) else found.prev_sample)
            return found

        with ExitStack() as stack:
            scheduler.step = watched
            stack.callback(vars(scheduler).pop, "step")
            yield


class _Enough(Exception):
    """Ends a pipeline once its denoiser has been called."""


def denoiser_name(pipeline: Any) -> str | None:
    """What the pipeline calls its denoiser, None where it has none that is known."""
    return next((name for name in PARTS if isinstance(getattr(pipeline, name, None), nn.Module)), None)


def noise_seeds(seed: int, count: int) -> list[int]:
    """A seed of its own for the noise of each of ``count`` images, the same first ones for any count; none twice."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, None] = {}
    while len(found) < count:
        found[int(torch.randint(2**62, (1,), generator=generator))] = None
    return list(found)
