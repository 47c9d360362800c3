"""Run a diffusion pipeline on given prompts and noise seeds, with callbacks for each step."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..runtime import signals as interruption
from ..runtime.batches import batch_size
from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors
from .denoiser import DenoiserCall

PARTS = ("transformer", "unet")  # attributes that may hold the denoiser of a pipeline


class Sampler:
    """A pipeline with fixed sampling options. None selects the pipeline's default.

    Args:
        pipeline: a diffusers pipeline, conditioned on prompts or unconditional.
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance, or guidance input of a guidance-distilled model.
        size: (height, width) in pixels.
        text_length: maximum number of tokens for the T5 encoder.
        batch: images per batch on a GPU, see :func:`rose_exp.runtime.batches.batch_size`. It does not change the noise, because
            each image has its own generator.
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
        arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": text_length}
        arguments |= dict(zip(("height", "width"), size or (None, None), strict=True))
        self.options = {name: value for name, value in arguments.items() if value is not None and name in self.accepted}
        self.ignored = sorted(name for name, value in arguments.items() if value is not None and name not in self.accepted)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, denoiser_name(self.pipeline))

    @property
    def conditioned(self) -> bool:
        """Whether the pipeline takes prompts."""
        return "prompt" in self.accepted

    def run(
        self, prompts: Sequence[str], seeds: Sequence[int], what: str, decode: bool
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Generate an image for each prompt, batch by batch.

        Args:
            seeds: seeds of the initial noise, one per image.
            what: name of the progress bar.
            decode: whether to decode the latents; unconditional pipelines always return images.
        Yields:
            Indices of the images, and the images (batch, channels, height, width), 0 to 1, or latents without ``decode``;
            float32 on the CPU.
        Raises:
            RoseExpError: values are not finite.
        """
        size = batch_size(self.batch, next(self.denoiser.parameters()).device)
        starts = range(0, len(prompts), size)
        bar = tqdm(starts, what, len(starts), unit="batch", disable=None)
        self.pipeline.set_progress_bar_config(disable=True)
        for start in bar:
            numbers = range(start, min(start + size, len(prompts)))
            yield numbers, self._batch([prompts[i] for i in numbers], [seeds[i] for i in numbers], decode)

    def _batch(self, prompts: Sequence[str], seeds: Sequence[int], decode: bool) -> Tensor:
        arguments = self._arguments(prompts, seeds, decode)
        with self._float32_images():
            images = self.pipeline(**arguments).images
        if arguments["output_type"] == "np":
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
        return self._finite(images.float().cpu())

    @contextmanager
    def _float32_images(self) -> Iterator[None]:
        """Convert the output of the last step: unconditional pipelines return it as numpy, which has no bfloat16."""
        if self.conditioned or self.denoiser.dtype != torch.bfloat16:
            yield
            return
        scheduler, steps = self.pipeline.scheduler, itertools.count(1)
        step = scheduler.step

        @functools.wraps(step)
        def converted(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if next(steps) == len(scheduler.timesteps):
                result.prev_sample = result.prev_sample.float()
            return result

        with _replaced(scheduler, "step", converted):
            yield

    def _finite(self, images: Tensor) -> Tensor:
        """Return images or latents, or raise RoseExpError with the cause if they are not finite."""
        if torch.isfinite(images).all():
            return images
        models = {part: model for part, model in self.pipeline.components.items() if isinstance(model, nn.Module)}
        for part, model in models.items():
            for name, parameter in model.named_parameters():
                if not torch.isfinite(parameter).all():
                    raise RoseExpError(f"{part}.{name}: expected finite weights, got NaN or infinity")
        dtype = self.denoiser.dtype
        larger = "; set model.dtype to float32 or bfloat16, which have a larger range" if dtype == torch.float16 else ""
        raise RoseExpError(
            f"{type(self.pipeline).__name__}: expected finite images, got NaN or infinity in "
            f"{str(dtype).removeprefix('torch.')}, whose maximum is {torch.finfo(dtype).max:.3g}{larger}"
        )

    def _arguments(self, prompts: Sequence[str], seeds: Sequence[int], decode: bool) -> dict[str, Any]:
        """Return the arguments of the pipeline."""
        inputs = {"prompt": list(prompts)} if self.conditioned else {"batch_size": len(prompts)}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        kind = "np" if decode or not self.conditioned else "latent"
        return inputs | self.options | {"generator": generators, "output_type": kind}

    def rehearse(self, decode: bool) -> int:
        """Generate one image, to find parts that do not fit together before any long work starts.

        Returns:
            Number of values of the image, or of its latents without ``decode``.
        Raises:
            RoseExpError: the pipeline needs other inputs or generates no images, it cannot generate an image, or its values are
                not finite.
        """
        arguments = self._arguments(["a photograph"], [0], decode)
        kind = type(self.pipeline).__name__
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [name for name, p in self.accepted.items() if p.default is p.empty and p.kind not in variable]
        needed = [name for name in required if name not in arguments]
        if needed or not arguments.keys() <= self.accepted.keys():
            inputs = f"that needs {', '.join(needed)}" if needed else f"with the inputs {', '.join(self.accepted)}"
            raise RoseExpError(
                "model.path: expected a pipeline that generates images from prompts, or from noise alone, got a "
                f"{kind} {inputs}"
            )
        self.pipeline.set_progress_bar_config(disable=True)
        failed = f"model.path, diffusion: {kind} cannot generate an image"
        with self._float32_images(), torch.no_grad(), outside_errors(failed):
            output = self.pipeline(**arguments)
        if not hasattr(output, "images"):
            raise RoseExpError(f"model.path: expected a pipeline that generates images, got {kind} with {', '.join(output)}")
        images = output.images
        self._finite(torch.as_tensor(images))
        return math.prod(images.shape[1:])

    def first_call(self, prompt: str) -> DenoiserCall:
        """Return the arguments of the denoiser in the first step for ``prompt``."""
        calls: list[DenoiserCall] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(DenoiserCall(args, kwargs))
            raise _StopPipeline

        hook = self.denoiser.register_forward_pre_hook(record, with_kwargs=True)
        try:
            self.pipeline.set_progress_bar_config(disable=True)
            self._batch([prompt], [0], decode=False)
        except _StopPipeline:
            pass
        finally:
            hook.remove()
        return calls[0]

    @contextmanager
    def steps(self, on_step: Callable[[int, int], None]) -> Iterator[None]:
        """Call ``on_step(step, steps)`` before each call of the denoiser, with ``step`` starting at 0 for each batch.

        Every call counts as a step, also with schedulers that call the denoiser more than once per step, such as Heun's.

        Raises:
            Interrupted: a signal requested a stop; checked before each call.
        """
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
        """Call ``on_latents`` with the latents after each step of the scheduler."""
        scheduler = self.pipeline.scheduler
        step = scheduler.step

        @functools.wraps(step)  # pipelines inspect its signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            on_latents(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        with _replaced(scheduler, "step", watched):
            yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object, and restore what was there before."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


class _StopPipeline(Exception):
    """Stops a pipeline when it calls its denoiser."""


def denoiser_name(pipeline: Any) -> str | None:
    """Return the name of the attribute that holds the denoiser, or None if the pipeline has no known denoiser."""
    return next((name for name in PARTS if isinstance(getattr(pipeline, name, None), nn.Module)), None)


def noise_seeds(seed: int, count: int) -> list[int]:
    """Return ``count`` distinct noise seeds; a larger count extends the list without changing its start."""
    generator = torch.Generator().manual_seed(seed)
    seeds: dict[int, None] = {}
    while len(seeds) < count:
        seeds[int(torch.randint(2**62, (1,), generator=generator))] = None
    return list(seeds)
