"""The run of a diffusion model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data import Prompts, load_prompts
from ..diffusion.images import Distances, OnBatch, Rendering, render
from ..diffusion.loading import load_pipeline, save_pipeline
from ..diffusion.narrowed import is_narrowed
from ..diffusion.sampling import noise_seeds
from ..diffusion.scores import load_scores
from ..pruning import LayerReport, PruneContext
from ..report.sheets import Images, Pictures, draw_run
from ..runtime.cache import cached
from ..runtime.errors import RoseExpError
from ..runtime.files import scratch_folder
from .card import model_card
from .dense import images_key
from .pipelines import package_pruner, remove_structures, sampler_of, select_layers
from .preparation import limited
from .run import Run

log = logging.getLogger(__name__)

EVALUATION_NOISE = 24432  # seed of the noise for evaluation, independent of the run's seed
LIBRARIES = ("diffusers", "torchmetrics")
DENSE = "images.safetensors"  # file of the dense model's images


class DiffusionRun(Run):
    """The run of a diffusion pipeline."""

    libraries = LIBRARIES
    resume = "recompute"  # the state holds pruned layers only

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        if self.ranks.size > 1:
            raise RoseExpError(f"torchrun: expected one process for a diffusion model, got {self.ranks.size}")
        self.dense: Tensor | None = None  # images, as in Rendering
        self.dense_milliseconds: float | None = None  # None for images from the cache
        self.distances: Distances | None = None

    def read_inputs(self, stack: ExitStack) -> None:
        """Read the prompts and load the image metrics, so that errors are reported early."""
        settings, images = self.settings, self.settings.evaluation.images
        self.protocol |= {"calibration": None, "evaluation": {}, "images": None}
        self.scratch = stack.enter_context(scratch_folder(self.folder.root))
        with self.watch.stage("texts"):
            self.prompts: Prompts | None = None
            if settings.pruned:
                self.prompts = load_prompts(settings.calibration.prompts, "calibration")
                self.seeds = noise_seeds(settings.seed, len(self.prompts.texts))
                digest = hashlib.sha256(repr(self.seeds).encode()).hexdigest()
                self.protocol["calibration"] = self.prompts.protocol | {"seed": settings.seed, "noise_sha256": digest}
            if images is not None:
                limit = limited(settings, images.samples)
                self.evaluated = load_prompts(images.model_copy(update={"samples": limit}), "evaluation.images")
                self.protocol["images"] = self.evaluated.protocol | {"noise_seed": EVALUATION_NOISE} | images.fingerprints()
                self.scores = load_scores(images, self.evaluated.texts, self.device)

    def load_model(self) -> None:
        """Load the pipeline and find its prunable layers."""
        settings = self.settings
        self.pipeline, self.protocol["model"] = load_pipeline(settings.model, settings.diffusion.scheduler)
        self.pipeline.to(self.device)
        self.sampler = sampler_of(self.pipeline, settings)
        self.image_values = self.sampler.rehearse(decode=settings.evaluation.images is not None)
        self.selection = select_layers(self.sampler, settings)

    def calibration_fingerprint(self) -> dict[str, str]:
        return {name: self.protocol["calibration"][name] for name in ("sha256", "noise_sha256")}

    def before_pruning(self) -> None:
        """Generate the dense model's images, or take them from the cache if no speedup is measured."""
        images = self.settings.evaluation.images
        if images is None:
            return
        with self.watch.stage("evaluation.dense"):
            key = None if self.selection.structures else images_key(self.protocol, self.settings)
            size = 4 * len(self.evaluated.texts) * self.image_values * (self.settings.diffusion.steps + 2)
            folder = cached("dense_images", key, self._render_dense, size) if key is not None else None
            if folder is None:
                folder = self.scratch
                self._render_dense(folder)
            self.dense = load_file(folder / DENSE)["images"]
            if "distance" in images.metrics:
                self.distances = Distances(folder, getattr(self.pipeline, "vae", None))

    def _render_dense(self, folder: Path) -> None:
        """Store the dense model's images, and what the distances to them need."""
        keep = Distances(folder).keep if "distance" in self.settings.evaluation.images.metrics else None
        rendering = self._render("images of the dense model", keep)
        self.dense_milliseconds = rendering.milliseconds
        save_file({"images": rendering.images}, folder / DENSE)

    def prune_layers(self, context: PruneContext) -> Sequence[LayerReport]:
        pruner = package_pruner(self.sampler, self.selection, self.prompts.texts, self.settings, context)
        reports = pruner.run()
        self.record.data["packages"] = [vars(package) for package in pruner.facts]
        return reports

    def _render(self, what: str, on_batch: OnBatch | None) -> Rendering:
        prompts = self.evaluated.texts
        return render(self.sampler, prompts, noise_seeds(EVALUATION_NOISE, len(prompts)), what, on_batch)

    def measure(self) -> None:
        """Measure sparsity, remove pruned heads and neurons, then measure the images."""
        record, settings = self.record, self.settings
        reports = {report["name"]: report for report in record.data["layers"]}
        record.data["metrics"]["sparsity"] = self.selection.sparsity(reports)
        before = sum(p.numel() for p in self.sampler.denoiser.parameters())
        remove_structures(self.pipeline, self.selection, settings)
        record.data["parameters"] = {"dense": before, "pruned": sum(p.numel() for p in self.sampler.denoiser.parameters())}
        if settings.evaluation.images is None:
            return
        with self.watch.stage("evaluation"):
            description = "images of the pruned model" if settings.pruned else "images"
            pruned = self._render(description, self.distances and self.distances.compare)
            record.data["images"] = {"denoiser_ms": pruned.milliseconds}
            if self.dense is not None:
                self._compare(pruned)
            for name, score in self.scores.items():
                result = score(pruned.images, self.evaluated.texts, self.dense)
                if result is not None:
                    record.measured(f"images.{name}", *result)
        for name, value in record.data["metrics"].items():
            if name.startswith("images."):
                log.info("%s: %s %.4g", settings.label, name.removeprefix("images."), value)
        self._draw(pruned)

    def _compare(self, pruned: Rendering) -> None:
        if self.selection.structures:  # only removed heads and neurons can change the speed
            self.record.data["images"]["dense_denoiser_ms"] = self.dense_milliseconds
            self.record.measured("images.speedup", self.dense_milliseconds / pruned.milliseconds)
        if self.distances is not None:
            self.record.data["images"]["latent_mse"] = self.distances.latent_mse()
            for name, (value, error) in self.distances.metrics().items():
                self.record.measured(f"images.{name}", value, error)

    def _draw(self, pruned: Rendering) -> None:
        count = min(self.settings.evaluation.images.sheet, len(pruned.images))
        if not self.settings.figures.draw or not count or self.dense is None:
            return
        label = f"{self.settings.label}, {self.settings.sparsity.parsed}"
        dense, own = (_channels_last(images[:count]) for images in (self.dense, pruned.images))
        sheet = draw_run(Pictures(dense, own, self.evaluated.texts[:count]), label, self.folder.root)
        self.trackers.log("figure", "contact_sheet", sheet)

    def save(self, place: Path) -> Path:
        card = model_card(self.record.data, self.settings, narrowed=is_narrowed(self.sampler.denoiser))
        return save_pipeline(self.pipeline, place, card)

    def release(self) -> None:
        self.distances, self.dense = None, None
        del self.pipeline, self.sampler, self.selection


def _channels_last(images: Tensor) -> Images:
    return images.permute(0, 2, 3, 1).numpy()
