"""The study of a search: created or resumed in its database, by one process at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from .search import WHERE, SearchError

if TYPE_CHECKING:
    from optuna import Study

log = logging.getLogger(__name__)

SEARCHED = "searched"  # attribute of a study: a hash of what it searches


@contextmanager
def exclusive(storage: str, name: str, folder: Path) -> Iterator[None]:
    """Keep other processes out of a study while the body runs.

    The lock is next to a SQLite database, and in the folder of the sweep for a database on a server.

    Raises:
        SearchError: another process is working on the study, or the lock cannot be written.
    """
    path, key = _lock_folder(storage, folder), hashlib.sha256(f"{storage.rpartition('/')[2]} {name}".encode()).hexdigest()[:8]
    lock = FileLock(path / f".optuna-{key}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise SearchError(
            f"{WHERE}.study_name: another process is working on study {name!r} in {storage}; wait for it, stop it, or choose "
            "another name"
        ) from None
    except OSError as error:
        raise SearchError(f"{WHERE}.storage: cannot write to {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def storage_errors(storage: str) -> Iterator[None]:
    """Turn the errors of a database in the body into a :class:`SearchError`."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        raise SearchError(f"{WHERE}.storage: cannot use {storage}: {reason}") from error


def open_study(storage: str, name: str, direction: str, searched: str, folder: Path) -> Study:
    """Create or load a study, and enqueue interrupted trials again. Requires :func:`exclusive`.

    A study without complete trials is replaced if it searches something else, such as another metric.

    Args:
        searched: a hash of what the study searches.
        folder: folder of the sweep.
    Raises:
        SearchError: the study searches something else and has complete trials.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with FileLock(_lock_folder(storage, folder) / ".optuna.lock"):  # two processes must not create the tables at once
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        except ImportError as error:  # no driver for this kind of database
            raise SearchError(f"{WHERE}.storage: cannot use {storage}: {error}") from error
        if study.user_attrs.get(SEARCHED, searched) != searched:
            if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                raise SearchError(f"{WHERE}.study_name: study {name!r} in {storage} has other settings; choose another name")
            optuna.delete_study(study_name=name, storage=storage)
            study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        study.set_user_attr(SEARCHED, searched)
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING:  # its process was killed
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
    if trials:
        log.info("resuming study %s after %d trials", name, len(trials))
    return study


def _lock_folder(storage: str, folder: Path) -> Path:
    from sqlalchemy.engine import make_url

    url = make_url(storage)
    on_disk = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(url.database).resolve().parent if on_disk else folder
