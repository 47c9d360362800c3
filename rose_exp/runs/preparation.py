"""Inputs of a run's stages from its settings: the device, token windows and the pruning plan."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data import Windows, contiguous_windows, draw_windows, load_text
from ..engine.kernels.backends import resolve
from ..pruning import PruningPlan
from ..runtime.errors import RoseExpError
from ..runtime.ranks import Ranks
from ..settings.effective import settings_of
from ..settings.schema import Settings
from ..settings.texts import Bos

log = logging.getLogger(__name__)


def find_device(name: str, ranks: Ranks) -> torch.device:
    """Return the device that the setting ``device`` names.

    Raises:
        RoseExpError: the device does not exist.
    """
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"  # each rank has set its device
    elif ranks.size > 1 and name != "cpu":
        raise RoseExpError(f"device: expected auto or cpu with {ranks.size} processes, each of which has its own, got {name!r}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for kernel launches and for measurements of memory and time
    except (RuntimeError, AssertionError) as error:
        raise RoseExpError(f"device: expected auto, cpu or a CUDA device of this machine, got {name!r}: {error}") from error
    return device


def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Log a warning if the processor has no instructions for a dtype of half precision, so that float32 may be faster."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    checks = {torch.bfloat16: "_is_avx512_bf16_supported", torch.float16: "_is_amx_fp16_supported"}  # absent in older versions
    supported = getattr(torch.cpu, checks.get(dtype, ""), lambda: True)
    if device.type == "cpu" and x86 and not supported():
        name = str(dtype).removeprefix("torch.")
        log.warning("model.dtype: this processor has no instructions for %s; float32 may be several times as fast", name)


def resolved_backend(settings: Settings, device: torch.device) -> str:
    """Return the name of the engine's backend on this device. Float64 models always use plain torch."""
    try:
        return resolve(settings.engine.backend, device, torch.float32)
    except ValueError as error:
        raise RoseExpError(f"engine.{error}") from error


def calibration_windows(settings: Settings, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> Windows:
    """Draw random windows from the calibration text."""
    calibration = settings.calibration
    text = load_text(calibration, "calibration")
    return draw_windows(
        text, tokenizer, calibration.window, calibration.samples, settings.seed, calibration.draw, "calibration", bos
    )


def evaluation_windows(settings: Settings, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> dict[str, Windows]:
    """Cut each text on which perplexity is measured into windows; return them by the text's name."""
    windows = {}
    for name, text in settings.evaluation.perplexity.items():
        setting = f"evaluation.perplexity.{name}"
        limit = limited(settings, text.windows)
        windows[name] = contiguous_windows(load_text(text, setting), tokenizer, text.window, limit, setting, bos)
    return windows


def limited(settings: Settings, limit: int | None) -> int | None:
    """Return the smaller of ``limit`` and ``evaluation.limit``, or None if neither is set."""
    limits = [n for n in (limit, settings.evaluation.limit) if n is not None]
    return min(limits, default=None)


def check_window_lengths(settings: Settings, limit: int | None) -> None:
    """Check that no window is longer than the model's maximum sequence length.

    Raises:
        RoseExpError: a window is too long.
    """
    windows = {f"evaluation.perplexity.{name}.window": text.window for name, text in settings.evaluation.perplexity.items()}
    if settings.pruned:
        windows["calibration.window"] = settings.calibration.window
    if settings.evaluation.speed is not None:
        windows["evaluation.speed.window"] = settings.evaluation.speed.window
    for setting, window in windows.items():
        if limit is not None and window > limit:
            raise RoseExpError(f"{setting}: expected at most {limit}, the model's maximum sequence length, got {window}")


def pruning_plan(settings: Settings) -> PruningPlan:
    """Return the pruning plan of the settings."""
    method = settings.method
    return PruningPlan(
        method.create(),
        settings.sparsity.parsed,
        methods={pattern: method.create((pattern,)) for pattern in method.layer_options},
        allocation=settings.allocation,
        reconstruction=settings.reconstruction,
        replicate=settings.calibration.replicate,
        blocks=settings.model.blocks,
        study=settings.figures.study,
        ordering=settings.reorder,
        refine=settings.refine,
        target=settings.target,
        **vars(settings.engine),
        **settings.pipeline.layer_options,
    )


def first_key(settings: Settings, protocol: Mapping[str, Any]) -> str:
    """Return a key that differs between runs whose moments of the first block can differ.

    It contains the settings that can change them, and the model, windows and device of the protocol.
    """
    evaluated = ("evaluation", "zero_shot", "speed", "seed")
    facts = {name: value for name, value in protocol.items() if name not in evaluated}
    config = settings.model_dump(mode="json")
    determining = {setting.name: setting.value for setting in settings_of(config) if setting.effect.moments}
    return json.dumps([facts, determining], sort_keys=True)
