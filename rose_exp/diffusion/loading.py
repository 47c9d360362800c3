"""Load diffusion pipelines: embedded, from a folder, from the hub, or built with random weights; and save them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..models.saving import whole_or_not, write_card
from ..runtime.errors import RoseExpError, suggest
from ..runtime.files import scratch_folder
from ..runtime.fingerprint import folder_sha256
from ..runtime.outside import outside_errors, read_json_object
from ..settings.diffusion import embedded_folder
from ..settings.schema import ModelSettings
from . import modeling_narrowed
from .components import INDEX, read_components, read_index, with_tokenizer
from .sampling import PARTS, denoiser_name
from .small import small_pipeline

log = logging.getLogger(__name__)


def load_pipeline(settings: ModelSettings, scheduler: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Load a pipeline in evaluation mode on the CPU, and describe its weights for the run record.

    Args:
        scheduler: name of a diffusers class that replaces the pipeline's scheduler and keeps its noise schedule; if
            None, the scheduler is not replaced.
    Raises:
        RoseExpError: the pipeline is unavailable or has no known denoiser.
    """
    kind = _scheduler(scheduler) if scheduler is not None else None  # reports an unknown name before weights are read
    log.info("loading %s", settings.name)
    if settings.built is not None:
        pipeline = small_pipeline(settings.built)
        _leave_out(pipeline, settings.omit)
        if settings.dtype not in ("auto", "float32"):
            pipeline.to(getattr(torch, settings.dtype))
        facts: dict[str, Any] = {"source": f"small {settings.built}, random weights"}
    else:
        pipeline, facts = _read(settings)
    if denoiser_name(pipeline) is None:
        raise RoseExpError(f"model: expected a pipeline with {' or '.join(PARTS)}, got {type(pipeline).__name__}")
    if getattr(pipeline, "safety_checker", None) is not None:
        log.info("removing the safety checker: images that it blackens cannot be compared")
        pipeline.safety_checker = None
    if kind is not None:
        with outside_errors(f"diffusion.scheduler: {scheduler} cannot use the noise schedule of the pipeline"):
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    return pipeline, {
        "name": settings.name,
        "architecture": type(pipeline).__name__,
        "denoiser": type(denoiser).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
    } | facts


def _read(settings: ModelSettings) -> tuple[Any, dict[str, Any]]:
    path = Path(os.path.expanduser(settings.path)) if settings.path is not None else embedded_folder(settings.embedded)
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)  # pipelines do not record their own
    options = {"use_safetensors": True, "dtype": dtype} | ({"variant": settings.variant} if settings.variant else {})
    where = f"model.path: cannot load the pipeline {settings.path or settings.embedded!r}"
    if settings.path is None:
        folder, facts = path, {"source": f"{settings.embedded}, embedded", "sha256": folder_sha256(path)}
    elif os.path.exists(path):
        folder, facts = path, {"source": str(path), "sha256": folder_sha256(path)}
    else:
        with outside_errors(f"{where} (no such local folder, and unavailable from the hub)"):
            downloaded = DiffusionPipeline.download(
                settings.path, revision=settings.revision, variant=settings.variant, use_safetensors=True
            )
        folder = Path(downloaded)
        facts = {"source": settings.path, "revision": folder.name}  # the hub's cache names a folder after its commit
    components, unused = read_components(folder, PARTS, settings.omit, options)
    with _readable(folder) as readable, outside_errors(where):
        pipeline = DiffusionPipeline.from_pretrained(readable, **components, **options)
        pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline, facts | ({"unused_weights": unused} if unused else {})


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """Yield a folder that diffusers can read: the given one, or links to its files and an index with known classes."""
    index = read_json_object(folder / INDEX, "model.path")
    replaced: dict[str, Any] = {}
    for name, entry in read_index(folder).items():
        if entry is None and index[name] is None:
            replaced[name] = [None, None]
        elif entry is not None and entry[0] == modeling_narrowed.MODULE:
            # the index names a class of the saved module; diffusers expects the class of its own that this one is derived from
            replaced[name] = ["diffusers", entry[1].removeprefix(modeling_narrowed.PREFIX)]
    if not replaced:
        yield folder
        return
    with scratch_folder() as scratch:
        for path in folder.iterdir():
            if path.name != INDEX:
                (scratch / path.name).symlink_to(path.resolve())
        (scratch / INDEX).write_text(json.dumps(index | replaced), encoding="utf-8")
        yield scratch


def _leave_out(pipeline: Any, omitted: Sequence[str]) -> None:
    for name in omitted:
        if name not in pipeline.components:
            raise RoseExpError(f"model.omit: expected components of {type(pipeline).__name__}, got {name}")
        pipeline.register_modules(**dict.fromkeys(with_tokenizer(name)))


def _scheduler(name: str) -> Any:
    known = [option for option in dir(diffusers) if option.endswith("Scheduler")]
    if name not in known:
        hint = suggest(name, known)
        raise RoseExpError(f"diffusion.scheduler: expected a scheduler of diffusers, such as DDIMScheduler, got {name!r}{hint}")
    return getattr(diffusers, name)


def save_pipeline(pipeline: Any, folder: Path, card: str | None = None) -> Path:
    """Save the pipeline atomically, as a folder of safetensors files that diffusers can load.

    Args:
        card: contents of ``README.md``.
    Raises:
        RoseExpError: the folder cannot be written or already exists.
    """
    with whole_or_not(folder) as scratch:
        pipeline.save_pretrained(scratch, safe_serialization=True)
        write_card(scratch, card)
    return folder
