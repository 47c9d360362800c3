"""Implementation of :func:`rose_exp.run` and :func:`rose_exp.sweep`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .cli.command import check_command
from .cli.overrides import ADD_MULTIRUN
from .pruning import FirstBlock
from .runs.execution import do_run
from .runtime.errors import SettingsError
from .runtime.output import guard_logs
from .sweeps.devices import claimed
from .sweeps.job import Job
from .tracking import Identity, read_record
from .tracking.record import FILE_NAME

log = logging.getLogger(__name__)


def run_one(overrides: list[str], folder: Path) -> dict[str, Any]:
    """See :func:`rose_exp.run`."""
    guard_logs()
    try:
        jobs = check_command(overrides).jobs
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
    command, first_block = check_command(["--multirun", *overrides]), FirstBlock()
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
