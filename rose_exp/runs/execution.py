"""Executes a run exactly once: finished runs are reused, and a lock keeps other processes out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..pruning import FirstBlock
from ..report import format_table
from ..runtime.errors import RoseExpError
from ..runtime.files import remove
from ..runtime.ranks import Ranks
from ..runtime.signals import check, handle_signals
from ..settings.schema import Settings
from ..tracking import Identity, read_record
from ..tracking.reading import values_of
from .folder import RunFolder
from .identity import run_id
from .leftovers import clean
from .reuse import lacking, supplement
from .run import run_experiment

log = logging.getLogger(__name__)


def do_run(
    settings: Settings,
    config: Mapping[str, Any],
    folder: Path,
    identity: Identity | None = None,
    wait: bool = False,
    first_block: FirstBlock | None = None,
) -> dict[str, Any]:
    """Call :func:`run_experiment`, unless ``folder`` already has the result.

    With ``rerun``, discards earlier results and progress.

    Args:
        wait: whether to wait if another process is working on the same run, instead of raising an error.
    Returns:
        The record of this run or of the reused one.
    Raises:
        RoseExpError: as :func:`run_experiment`; or the folder contains another run, or another process is working on it.
    """
    ranks = Ranks()
    folder = ranks.gather(folder)[0]
    if len(set(ranks.gather(run_id(settings)))) > 1:
        raise RoseExpError("torchrun: expected equal settings in all processes, got different ones")
    with _locked(folder, wait, ranks):
        earlier = ranks.gather(_prepared(settings, folder) if ranks.first else None)[0]
        if earlier is None:
            return run_experiment(settings, dict(config), folder, identity, first_block)
        log.info("%s is finished already: %s", settings.label, RunFolder(folder).record)
        with values_of(RunFolder(folder).record):
            if not ranks.first:
                return earlier
            with handle_signals():  # figures and records are completed before a signal stops the process
                record = supplement(earlier, settings, config, folder, identity)
                check()
            return record


def _prepared(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """Remove what dead processes of this run left behind, and return what :func:`_reusable` returns."""
    earlier = _reusable(settings, folder)
    clean(RunFolder(folder), finished=earlier is not None)
    return earlier


def _reusable(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """Return the record of an earlier run if it is finished and has everything that the settings request.

    Otherwise, remove its saved model and, with ``rerun``, its state, and return None.

    Raises:
        RoseExpError: the folder contains another run, or a model of unknown origin.
    """
    run_folder = RunFolder(folder)
    path = run_folder.record
    if not path.exists():
        if settings.save and run_folder.model.exists():
            name = run_folder.model.name
            raise RoseExpError(f"hydra.run.dir: expected a folder without {name}, to which save=true writes, got {folder}")
        return None
    record, expected_id = read_record(path, reused=True), run_id(settings)
    if record.get("run_id") != expected_id:
        raise RoseExpError(
            f"hydra.run.dir: expected an empty folder or one of the same run, {expected_id}, got {folder} with run "
            f"{record.get('run_id')} ({record['label']})"
        )
    if record["status"] == "finished" and not settings.rerun:
        with values_of(path):
            format_table([record])  # the command prints it
            missing = lacking(settings, record, folder)
        if not missing:
            return record
        log.info("%s is finished, but without %s: running it again", settings.label, ", ".join(missing))
    if settings.rerun:
        remove(run_folder.state)
    if settings.rerun or settings.save:
        remove(run_folder.model)
    return None


@contextmanager
def _locked(folder: Path, wait: bool, ranks: Ranks) -> Iterator[None]:
    """Hold the folder's lock while the body runs. Only the first rank of a distributed run acquires it."""
    if not ranks.first:
        yield
        return
    lock = FileLock(RunFolder(folder).lock)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise RoseExpError(f"{folder}: another process is working on this run; wait for it or stop it") from None
            log.info("waiting for another process that is working on %s", folder)
            lock.acquire()
    except OSError as error:
        raise RoseExpError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
