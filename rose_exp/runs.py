"""Doing a run once: what is finished already is reused, and no two processes work on the same."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .errors import RoseExpError
from .experiment import run_experiment
from .pipeline import FirstBlock
from .ranks import Ranks
from .report.figures import FOLDER, draw_figures
from .run_id import run_id
from .settings import Settings
from .tracking import Identity, read_record
from .tracking.record import FILE_NAME

log = logging.getLogger(__name__)

LOCK = ".lock"


def do_run(
    settings: Settings,
    config: Mapping[str, Any],
    folder: Path,
    identity: Identity | None = None,
    wait: bool = False,
    first_block: FirstBlock | None = None,
) -> dict[str, Any]:
    """What :func:`run_experiment` does, unless ``folder`` has it already.

    Args:
        wait: for another process that is at the same run; else that is an error.
    Returns:
        The run record, of this run or of the earlier one.
    Raises:
        RoseExpError: as :func:`run_experiment`; or the folder holds another run, or is being worked on.
    """
    ranks = Ranks()
    folder = ranks.gather(folder)[0]
    if len(set(ranks.gather(run_id(settings)))) > 1:
        raise RoseExpError("torchrun: expected equal settings in all processes, got different ones")
    with _locked(folder, wait, ranks):
        earlier = ranks.gather(_earlier(settings, folder) if ranks.first else None)[0]
        if earlier is not None:
            log.info("%s is finished already: %s", settings.label, folder / FILE_NAME)
            if ranks.first and settings.figures.draw and not (folder / FOLDER).is_dir():
                draw_figures(earlier, folder)  # a record is all that they need
            return earlier
        if ranks.first and settings.save and (folder / "model").is_dir():
            shutil.rmtree(folder / "model")  # of an earlier attempt at this same run
        return run_experiment(settings, dict(config), folder, identity, first_block)


def _earlier(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """The record of the same run, where it is finished and all that is asked of it is there.

    Raises:
        RoseExpError: the folder holds another run.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    record, own = read_record(path), run_id(settings)
    if record.get("run_id") != own:
        raise RoseExpError(
            f"hydra.run.dir: expected an empty folder or one of the same run, {own}, got {folder} with run "
            f"{record.get('run_id')} ({record['label']})"
        )
    if record["status"] != "finished" or settings.rerun:
        return None
    return record if _complete(settings, record, folder) else None


def _complete(settings: Settings, record: Mapping[str, Any], folder: Path) -> bool:
    """Whether all is there that is asked for and hangs not on the settings that a run is called by."""
    studied = set(settings.figures.study) <= set(record["config"].get("figures", {}).get("study", []))
    saved = (folder / "model").is_dir() or not settings.save
    timed = (
        settings.evaluation.speed is None or not record["protocol"]["speed"]["not_measured"] or not torch.cuda.is_available()
    )
    return studied and saved and timed


@contextmanager
def _locked(folder: Path, wait: bool, ranks: Ranks) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process that holds it; of several processes at a run the first holds it."""
    if not ranks.first:
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise RoseExpError(f"{folder}: another process is at this run; wait for it, or end it") from None
            log.info("waiting for another process that is at %s", folder)
            lock.acquire()
    except OSError as error:
        raise RoseExpError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
