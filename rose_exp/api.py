"""Implementation of :func:`rose_exp.run`, :func:`rose_exp.sweep` and :func:`rose_exp.prune`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .cli.command import check_command, check_settings
from .cli.overrides import ADD_MULTIRUN
from .cli.paths import with_local_files
from .engine.patterns import as_sparsity
from .pruning import FirstBlock
from .runs.execution import do_run
from .runs.in_memory import PruneReport, is_pipeline, prune_in_memory
from .runtime.errors import SettingsError
from .runtime.output import guard_logs
from .settings.effective import within
from .sweeps.devices import claimed
from .sweeps.job import Job
from .tracking import Identity, read_record
from .tracking.record import FILE_NAME

log = logging.getLogger(__name__)

OF_PRUNING = (  # settings, or groups of settings, of a model in memory
    *("method", "sparsity", "allocation", "reorder", "refine", "target", "reconstruction", "engine", "seed", "calibration"),
    *("model.bos", "model.blocks", "diffusion", "pipeline.layers", "pipeline.skip", "pipeline.true_sequential"),
    *("pipeline.permute", "pipeline.batch", "pipeline.activations", "pipeline.expert_tokens", "pipeline.starved_experts"),
)
UNUSED = "in/memory"  # for model.path, which a model in memory does not use


def prune_model(
    model: Any, calibration: Any, method: str, sparsity: float | str, overrides: Sequence[str], device: str
) -> PruneReport:
    """See :func:`rose_exp.prune`."""
    guard_logs()
    pipeline = is_pipeline(model)
    names = {text: text.lstrip("+~").partition("=")[0] for text in overrides}
    problems = [
        f"overrides: expected settings of pruning, got {text!r}"
        for text, name in names.items()
        if not any(within(name, known) for known in OF_PRUNING)
    ]
    arguments = {"method": "method", "sparsity": "sparsity", "sparsity.pattern": "sparsity", "method.name": "method"}
    arguments |= {} if sparsity == "structured" else {"sparsity.ratio": "sparsity"}
    problems += [
        f"overrides: expected no value of the argument {arguments[name]}, got {text!r}"
        for text, name in names.items()
        if name in arguments
    ]
    problems += _calibration_problems(calibration, pipeline, overrides)
    if pipeline and device != "auto":
        problems.append(f"device: expected auto for a pipeline, which is pruned on its own device, got {device!r}")
    if problems:
        raise SettingsError(problems)
    given = [f"model={'diffusion-local' if pipeline else 'local'}", f"model.path={UNUSED}", "evaluation=none"]
    given += [f"method={method}", *_sparsity_overrides(sparsity), f"device='{model.device if pipeline else device}'"]
    given += [f"diffusion.{name}=null" for name in ("guidance", "height", "width")] if pipeline else []  # its own defaults
    if isinstance(calibration, Tensor) and calibration.ndim == 2:
        given += [f"calibration.samples={len(calibration)}", f"calibration.window={calibration.shape[1]}"]
    settings = check_settings([*given, *overrides])
    if not settings.pruned:
        raise SettingsError(["method: expected a method that prunes, got dense"])
    return prune_in_memory(model, calibration, settings)


def _calibration_problems(calibration: Any, pipeline: bool, overrides: Sequence[str]) -> list[str]:
    """Return the errors of calibration data for the kind of model, and of settings that the data replaces."""
    kind = type(calibration).__name__
    if pipeline:
        valid = calibration is None or (isinstance(calibration, Sequence) and all(isinstance(p, str) for p in calibration))
        if not valid or isinstance(calibration, str) or (calibration is not None and not calibration):
            return [f"calibration: expected a list of prompts or None for a diffusers pipeline, got {kind}"]
    elif not isinstance(calibration, Tensor) and not callable(getattr(calibration, "encode", None)):
        return [f"calibration: expected tokens of shape (windows, length) or the model's tokenizer, got {kind}"]
    if calibration is None or callable(getattr(calibration, "encode", None)):
        return []
    names = {text: text.lstrip("+~").partition("=")[0] for text in overrides}
    replaced = [
        text
        for text, name in names.items()
        if name == "model.bos" or (within(name, "calibration") and name != "calibration.replicate")
    ]
    return [
        f"overrides: expected no settings of a calibration text besides calibration data, got {text!r}" for text in replaced
    ]


def _sparsity_overrides(sparsity: float | str) -> list[str]:
    """Return the overrides for a sparsity such as 0.7, ``"2:4"`` or ``"structured"``."""
    if sparsity == "structured":
        return ["sparsity=structured"]
    if isinstance(sparsity, str) and ":" in sparsity:
        return [f"sparsity.pattern='{sparsity}'"]
    try:
        return [f"sparsity.ratio={as_sparsity(sparsity).ratio}"]
    except ValueError as error:
        raise SettingsError([str(error)]) from None


def run_one(overrides: list[str], folder: Path) -> dict[str, Any]:
    """See :func:`rose_exp.run`."""
    guard_logs()
    try:
        jobs = check_command(with_local_files(overrides)).jobs
    except SettingsError as error:
        problems = [problem.replace(ADD_MULTIRUN, "rose_exp.sweep runs one job per value") for problem in error.problems]
        raise SettingsError(problems) from None
    if len(jobs) != 1:
        raise SettingsError([f"overrides: expected those of one run, got those of {len(jobs)}; use rose_exp.sweep"])
    with claimed(jobs[0].settings.device, sweep=False) as device:
        return do_run(jobs[0].settings.on(device), jobs[0].config, folder / jobs[0].run_id)


def run_all(overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """See :func:`rose_exp.sweep`."""
    guard_logs()
    command, first_block = check_command(["--multirun", *with_local_files(overrides)]), FirstBlock()
    if command.searched:
        raise SettingsError(["hydra/sweeper: expected basic, because only the command line searches, got another sweeper"])
    return [_tried(job, folder, first_block) for job in command.jobs]


def _tried(job: Job, folder: Path, first_block: FirstBlock) -> dict[str, Any]:
    place = folder / job.run_id
    try:
        with claimed(job.settings.device, sweep=True) as device:
            identity = Identity(job.name, folder.name)
            return do_run(job.settings.on(device), job.config, place, identity, wait=True, first_block=first_block)
    except Exception as error:
        log.exception("%s failed; the sweep continues", job.name)
        if not (place / FILE_NAME).exists():  # the run has not started, so no record has the error
            raise
        return read_record(place / FILE_NAME) | {"status": "failed", "error": f"{type(error).__name__}: {error}"}
